"""STAGE=all on vLLM: one model's weights in memory, the stages after it as LoRA modules on top.

A stage's adapter belongs to the complete model of the stage before it. Over a common base its change is therefore the
sum of all changes since: adapters are put side by side (composing.py). Training every weight begins a new base.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from stagecraft import lineage
from stagecraft.errors import UserError
from stagecraft.merging.adapter import EMBEDDINGS, HEADS, Adapter, Unknown, open_adapter
from stagecraft.merging.plan import Base, open_base
from stagecraft.serving.choice import ADAPTER_CONFIG, Served

# vLLM 0.31 (config/lora.py) knows these limits; memory and time grow with the one that is set.
LIMITS = (8, 16, 32, 64, 128, 256, 320, 512)
MERGED = "STAGE={0} serves its merged model alone"


@dataclass
class Module:
    """A stage that is served as LoRA: every adapter between the base and it, the oldest first."""

    served: Served
    adapters: list[Adapter]

    @property
    def rank(self) -> int:
        """The rank of all of them side by side."""
        return sum(max(lora.rank for lora in adapter.loras.values()) for adapter in self.adapters)


@dataclass
class Chain:
    """The model that is loaded, the stages on top of it, and those that can't be had beside them."""

    base: Served
    weights: Base
    modules: list[Module] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def limit(self) -> int:
        """The smallest of vLLM's limits that is enough."""
        return next(limit for limit in LIMITS if limit >= max(module.rank for module in self.modules))


def find_chain(models: list[Served], faults: list[str]) -> Chain | None:
    """The chain that ends with the last of `models`, by the fingerprints in lineage.json."""
    prints = {model.name: lineage.fingerprint_of(model.folder) for model in models}
    line: list[tuple[Served, Adapter]] = []
    model = models[-1]
    before = len(faults)
    while _is_adapted(model):
        parent, adapter = _parent(model, models, prints, faults)
        if adapter is not None:
            line.insert(0, (model, adapter))
        if parent is None:
            return None
        model = parent
    try:
        chain = Chain(model, open_base(model.folder))
    except UserError as error:
        faults += [
            f"STAGE=all: {line.removeprefix('--base_model ')}; {MERGED.format('NAME')}"
            for line in str(error).splitlines()
        ]
        return None
    adapters: list[Adapter] = []
    for stage, adapter in line:
        adapters = [*adapters, adapter]
        chain.modules.append(Module(stage, adapters))
        if len(faults) == before and chain.modules[-1].rank > LIMITS[-1]:
            faults.append(
                f"STAGE=all: {stage.name}: LoRA rank {chain.modules[-1].rank} (all adapters since {model.name}) is above "
                f"vLLM's limit of {LIMITS[-1]}; {MERGED.format(stage.name)}"
            )
    inside = {model.name, *(module.served.name for module in chain.modules)}
    chain.left_out = [found.name for found in models if found.name not in inside]
    return chain


def _is_adapted(model: Served) -> bool:
    return (_adapter_folder(model) / ADAPTER_CONFIG).exists()


def _adapter_folder(model: Served) -> Path:
    return model.folder.with_name("adapter")


def _parent(
    model: Served, models: list[Served], prints: dict[str, str | None], faults: list[str]
) -> tuple[Served | None, Adapter | None]:
    """(the model that a stage's adapter was trained on, the adapter)."""
    folder = _adapter_folder(model)
    adapter = None
    try:
        adapter = open_adapter(folder)
        faults += [f"STAGE=all: {folder}: {why}; {MERGED.format(model.name)}" for why in _unservable(adapter)]
    except Unknown as unknown:
        faults += [f"STAGE=all: {folder}: {why}; {MERGED.format(model.name)}" for why in unknown.faults]
    steps = lineage.read(folder)
    wanted = steps[-1].get("base_fingerprint") if steps else None
    earlier = models[: models.index(model)]
    parent = next((found for found in earlier if wanted and prints[found.name] == wanted), None)
    if parent is None:
        named = f" ({steps[-1].get('base')})" if steps else ""
        there = ", ".join(f"{found.name} {_short(prints[found.name])}" for found in earlier) or "none"
        faults.append(
            f"STAGE=all: {folder}: was trained on another base{named}, fingerprint {_short(wanted)}, than any stage here "
            f"({there}); run: make {model.name}, or {MERGED.format(model.name)}"
        )
    return parent, adapter


def _short(fingerprint: str | None) -> str:
    return fingerprint[:12] if fingerprint else "unknown"


def _unservable(adapter: Adapter) -> list[str]:
    """What vLLM can't put on top of a base."""
    found = []
    if any(lora.magnitude for lora in adapter.loras.values()):
        found.append("is DoRA, which is no sum of base and change")
    if adapter.whole or adapter.added:
        names = sorted({*adapter.whole, *adapter.added})
        found.append(f"brings {names[0]} whole (modules_to_save or bias)")
    ends = sorted(m for m in adapter.loras if m.rpartition(".")[2] in EMBEDDINGS | HEADS)
    if ends or adapter.embeddings:
        found.append(
            f"changes {(ends or sorted(adapter.embeddings))[0]}, and embeddings can't be LoRA in vLLM"
        )
    return found
