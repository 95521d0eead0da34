"""What a merge is given -> its plan, after everything that can be known without reading a weight was checked."""

from __future__ import annotations

import math
from pathlib import Path

from stagecraft import lineage
from stagecraft.errors import UserError
from stagecraft.merging.adapter import CONFIG, Adapter, Unknown, open_adapter
from stagecraft.merging.hub import locate
from stagecraft.merging.plan import Base, Plan, open_base
from stagecraft.merging.planning import make_plan
from stagecraft.merging.tensors import Damaged, fingerprint, open_weights


def plan_merge(base: str | None, adapters: list[str], weights: list[float] | None, dtype: str) -> Plan:
    """The complete model that base and adapters make. `base` None: the one adapter_config.json names.

    Raises UserError with all faults.
    """
    faults: list[str] = []
    if weights is not None and len(weights) != len(adapters):
        faults.append(f"--weights: {len(weights)} for {len(adapters)} adapters; give one each")
    if not all(math.isfinite(weight) for weight in weights or []):
        faults.append("--weights: must be finite numbers")
    faults += [f"--lora_model {path}: is given twice" for path in sorted(_twice(adapters))]
    opened: list[Adapter] = []
    for path in adapters:
        try:
            opened.append(open_adapter(Path(path)))
        except Unknown as unknown:
            faults += [f"--lora_model {path}: {fault}" for fault in unknown.faults]
    found = None
    try:
        found = _open_base(base, opened)
    except UserError as error:
        faults.append(str(error))
    if found is None or faults:
        raise UserError(*faults)
    plan = make_plan(found, opened, weights or [1.0] * len(opened), dtype)
    others = [fault for adapter in opened if (fault := _other_base(adapter, found))]
    if others:
        raise UserError(*others)
    return plan


def _twice(adapters: list[str]) -> set[str]:
    folders = [Path(path).resolve() for path in adapters]
    return {path for path in adapters if folders.count(Path(path).resolve()) > 1}


def _open_base(base: str | None, adapters: list[Adapter]) -> Base | None:
    if base is not None:
        return open_base(locate(base, "--base_model"))
    named = {adapter.config.get("base_model_name_or_path") for adapter in adapters}
    if not named:
        return None  # no adapter could be opened, which is fault enough
    if named & {None, ""}:
        raise UserError(f"--lora_model {adapters[0].folder}: names no base; give it with --base_model")
    if len(named) > 1:
        raise UserError(
            f"--lora_model: the adapters name different bases ({', '.join(sorted(named))}); give --base_model"
        )
    return open_base(locate(named.pop(), "--base_model"))


def _dtypes(folder: Path) -> set[str]:
    try:
        return {tensor.dtype for tensor in open_weights(folder).values()}
    except (Damaged, OSError):
        return set()


def _other_base(adapter: Adapter, base: Base) -> str | None:
    """What is wrong where it is known which weights the adapter was trained on and the base has others.

    The adapter's lineage knows; an adapter that came without one names a base, which may lie here.
    """
    steps = lineage.read(adapter.folder)
    known, source = (steps[-1].get("base_fingerprint"), lineage.FILE) if steps else (None, lineage.FILE)
    named = steps[-1].get("base") if steps else adapter.config.get("base_model_name_or_path")
    if known is None and named and _dtypes(Path(named)) == {tensor.dtype for tensor in base.tensors.values()}:
        known, source = lineage.fingerprint_of(Path(named)), CONFIG
    if known is None or known == fingerprint(base.tensors):
        return None
    return (
        f"--lora_model {adapter.folder}: was trained on other weights than those of --base_model {base.folder} "
        f"({source} names {named}); give that base, or take that name out of {source} if you know better (the same "
        "weights in another dtype)"
    )
