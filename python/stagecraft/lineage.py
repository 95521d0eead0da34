"""Where a model comes from: lineage.json travels with every adapter and model, one entry a step since the base.

It also tells a merge whether the base it is given is the one that the adapter was trained on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stagecraft.merging.tensors import Damaged, fingerprint, open_weights

FILE = "lineage.json"


def read(folder: Path) -> list[dict[str, Any]]:
    """The steps so far, the oldest first; none where the folder says nothing (or nothing readable)."""
    try:
        steps = json.loads((folder / FILE).read_text(encoding="utf-8"))["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []


def after(base: str, step: dict[str, Any]) -> dict[str, Any]:
    """The content of lineage.json for what a step made of `base`, a folder or a name on the hub."""
    folder = Path(base)
    return {"steps": [*read(folder), {**step, "base": base, "base_fingerprint": fingerprint_of(folder)}]}


def weights_in(folder: Path) -> str | None:
    """fingerprint() of a model's or an adapter's weights; None where there are none."""
    try:
        return fingerprint(open_weights(folder))
    except (OSError, Damaged):
        return None


def fingerprint_of(folder: Path) -> str | None:
    """Of a base's full-precision weights; None where they are quantised, not here or not whole."""
    try:
        if json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config"):
            return None
    except (OSError, ValueError, AttributeError):
        return None
    return weights_in(folder)
