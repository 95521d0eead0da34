"""A base, and the complete model before it is written: where each tensor comes from and what is added to it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stagecraft.errors import UserError
from stagecraft.merging.adapter import Adapter, Lora
from stagecraft.merging.tensors import (
    ITEM_SIZE,
    Damaged,
    Tensor,
    open_weights,
    same_content,
)


@dataclass
class Base:
    """A model folder: its configuration and where its tensors lie."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def tied(self, embedding: str | None, head: str | None) -> bool:
        """Whether the head's weight is the embedding's.

        A configuration that is silent means so if there is no head; of a file that has two different ones both count,
        whatever the configuration says, as in transformers.
        """
        if embedding is None or (head and not same_content(self.tensors[embedding], self.tensors[head])):
            return False
        for config in (self.config, self.config.get("text_config") or {}):
            if "tie_word_embeddings" in config:
                return bool(config["tie_word_embeddings"])
        return head is None


@dataclass
class Output:
    """One tensor of the complete model: `source`, cast to `dtype`, with every lora and every added vector on top."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: Tensor
    loras: list[Lora] = field(default_factory=list)
    added: list[tuple[Tensor, float]] = field(default_factory=list)

    @property
    def is_copy(self) -> bool:
        """Whether its bytes are those of its source."""
        return not self.loras and not self.added and self.dtype == self.source.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.source.numel

    @property
    def size(self) -> int:
        """Bytes."""
        return self.numel * ITEM_SIZE[self.dtype]


@dataclass
class Plan:
    """The complete model before it is written."""

    base: Base
    adapters: list[Adapter]
    weights: list[float]
    files: dict[str, list[Output]]
    dtype: str  # in torch's words: that of most of its bytes
    head_rows: int | None = None  # labels of a new classification head
    vocabulary: int | None = None  # rows of the embedding where the adapter brings another number
    untied: bool = False  # embedding and head were one in the base and no longer are
    dropped: list[str] = field(default_factory=list)  # of the base, and not in the complete model

    @property
    def outputs(self) -> list[Output]:
        """All tensors, in the order of the files."""
        return [output for outputs in self.files.values() for output in outputs]

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(output.size for output in self.outputs)

    def notes(self) -> list[str]:
        """What a user might not expect of the result."""
        found = []
        if self.untied:
            found.append("the base ties head and embedding, the adapter changes them apart: both are written")
        if self.dropped:
            found.append(f"{', '.join(self.dropped)} left out: a reward model has a score head instead")
        if self.vocabulary:
            found.append(f"the adapter brings a vocabulary of {self.vocabulary:,} words")
        return found

    @property
    def reward(self) -> bool:
        """Whether the model scores texts instead of writing them."""
        return any(adapter.reward for adapter in self.adapters)


def open_base(folder: Path) -> Base:
    """A base's configuration and table of tensors. Raises UserError listing what is wrong."""
    flag = f"--base_model {folder}"
    if not (folder / "config.json").exists():
        raise UserError(f"{flag}: no config.json there: this is not a model folder")
    faults, config, tensors = [], {}, {}
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("no object at its top")
        if config.get("quantization_config"):
            faults.append(f"{flag}: its weights are quantised; merge into the full-precision base")
    except ValueError as error:
        faults.append(f"{flag}: config.json is not JSON: {error}")
    try:
        tensors = open_weights(folder)
    except Damaged as fault:
        faults.append(f"{flag}: {fault}")
    if faults:
        raise UserError(*faults)
    return Base(folder, config, tensors)
