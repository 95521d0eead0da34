"""Where a model is: a complete folder, BASE+ADAPTER, an adapter's folder alone (its adapter_config.json names the base),
or the URL of an OpenAI-compatible server, URL#MODEL where it serves several. What must be true of it, and loading it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stagecraft import generation, models
from stagecraft.errors import UserError
from stagecraft.merging.adapter import CONFIG
from stagecraft.merging.inputs import plan_merge
from stagecraft.remote import connect, is_url


@dataclass(frozen=True)
class Place:
    """Where a model is. `adapter`: folder of what is put on it, `base` then the folder of what it is put on."""

    name: str
    path: str  # as it was given
    flag: str  # what an error about it begins with
    base: str
    adapter: str | None = None
    merged: bool = False  # in memory, before it is used
    vocabulary: int | None = None  # rows of the embedding where the adapter brings more than the base has

    @property
    def kind(self) -> str:
        """folder, adapter or server."""
        return "server" if is_url(self.path) else "adapter" if self.adapter else "folder"

    @property
    def tokenizer(self) -> str:
        """The folder of its tokenizer and chat template: the adapter's own, where it brings one."""
        own = self.adapter and (Path(self.adapter) / "tokenizer_config.json").exists()
        return self.adapter if self.adapter and own else self.base


def read_place(name: str, path: str, flag: str, merged: bool = False) -> Place:
    """A place, checked as far as that is cheap, a server asked. Raises UserError listing what is wrong with it."""
    if is_url(path):
        connect(path, flag)
        return Place(name, path, flag, path)
    base, adapter = parted(path, flag)
    if adapter is None:
        generation.require_usable(base, flag)
        return Place(name, path, flag, base)
    try:
        plan = plan_merge(base or None, [adapter], None, "auto")
    except UserError as error:
        raise UserError(*(_in_our_words(line, flag) for line in str(error).splitlines())) from None
    if plan.reward:
        raise UserError(f"{flag} {adapter}: a reward model's adapter, which writes no text")
    place = Place(name, path, flag, str(plan.base.folder), adapter, merged, plan.vocabulary)
    generation.require_usable(place.base, flag, tokenizer_path=place.tokenizer)
    return place


def parted(path: str, flag: str) -> tuple[str, str | None]:
    """(base, adapter) of what a path says; the base is "" where the adapter has to name it. Raises UserError."""
    if Path(path).exists() or "+" not in path:
        return ("", path) if (Path(path) / CONFIG).exists() else (path, None)
    # A folder's name may hold a "+" too: the one that parts two folders that are there, else the last.
    splits = [(path[:i], path[i + 1 :]) for i, letter in enumerate(path) if letter == "+"]
    base, adapter = next(
        ((base, adapter) for base, adapter in splits if Path(base).is_dir() and Path(adapter).is_dir()),
        splits[-1],
    )
    if not (Path(adapter) / CONFIG).exists():
        raise UserError(f"{flag} {path}: {adapter or 'nothing'} is no adapter ({CONFIG} is not there)")
    return base, adapter


def _in_our_words(line: str, flag: str) -> str:
    """A merge's fault as one of `flag`: nobody here has given --lora_model or --base_model."""
    line = line.replace("; give it with --base_model", "; write BASE+ADAPTER")
    line = line.replace(" --base_model ", " the base ")
    return flag + " " + re.sub(r"^--(lora_model|base_model)[ :]*", "", line)


def load(place: Place, dtype: str) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder or of an adapter on its base. Raises UserError for what can't be loaded."""
    model, tokenizer = generation.load(models.load_causal, place.base, dtype, place.flag, place.tokenizer)
    if place.adapter is None:
        return model, tokenizer
    from peft import PeftModel

    if place.vocabulary:
        model.resize_token_embeddings(place.vocabulary, mean_resizing=False)
    model = PeftModel.from_pretrained(model, place.adapter).eval()
    return (model.merge_and_unload() if place.merged else model), tokenizer
