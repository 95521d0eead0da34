"""Which models a server is to have, by name, and whether it can have them."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from stagecraft import generation
from stagecraft.errors import UserError
from stagecraft.naming import STAGES, finished, marker, newest

ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Served:
    """A model of the server: the name clients ask for, and its complete folder."""

    name: str
    folder: Path


def choose(recipe: str, stage: str, model: str, faults: list[str]) -> list[Served]:
    """MODEL, the stage's model, every finished stage's (all), or the newest. Faults are added, none is raised."""
    if stage and model:
        faults.append(f"STAGE={stage} and MODEL={model}: say one of them")
        return []
    if model:
        return _usable([Served(name_of(Path(model)), Path(model))], f"MODEL={model}", faults)
    if stage in ("", "all"):
        try:
            chosen = newest(recipe, len(STAGES) if stage else 1)
        except UserError as error:
            faults.append(str(error))
            return []
    elif stage == "rm":
        faults.append("STAGE=rm: a reward model scores answers and gives none; serve another stage")
        return []
    elif stage not in STAGES:
        faults.append(f"STAGE={stage}: must be all, {', '.join(STAGES[:-1])} or {STAGES[-1]}")
        return []
    elif stage not in finished(recipe):
        make = (
            "" if stage == "ppo" else f"; run: make {stage} RECIPE={recipe}"
        )  # no recipe trains PPO in its chain
        faults.append(f"STAGE={stage} RECIPE={recipe}: not finished (no {marker(recipe, stage)}){make}")
        return []
    else:
        chosen = [stage]
    return _usable(
        [Served(name, marker(recipe, name).with_name("model")) for name in chosen], "model", faults
    )


def name_of(folder: Path) -> str:
    """A short name for clients: the stage of a stage's model, else the folder's own name."""
    parts = folder.absolute().parts
    stage = next((p.removeprefix("outputs-") for p in parts[-3:-2] if p.startswith("outputs-")), "")
    if parts[-1] == "model" and stage in STAGES:
        return stage
    own = parts[-2] if parts[-1] == "model" and len(parts) > 2 else parts[-1]
    # What a repository on the hub may be called: transformers serve takes the name for one.
    return re.sub(r"[^A-Za-z0-9_]*[^A-Za-z0-9_.][^A-Za-z0-9_]*|\.{2,}", "-", own).strip("-.")[:90] or "model"


def _usable(models: list[Served], flag: str, faults: list[str]) -> list[Served]:
    for model in models:
        path = str(model.folder)
        if (model.folder / ADAPTER_CONFIG).exists():
            faults.append(_adapter_fault(model.folder, flag))
            continue
        try:
            generation.require_usable(path, flag if "=" in flag else f"{model.name}:")
        except UserError as error:
            faults += [
                line.replace(f"MODEL={path} {path}:", f"MODEL={path}:") for line in str(error).splitlines()
            ]
    return models


def _adapter_fault(folder: Path, flag: str) -> str:
    """An adapter where a complete model should be: both ways to serve it."""
    base = "BASE"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        base = (
            json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
            or base
        )
    parts = folder.absolute().parts
    stage = parts[-3].removeprefix("outputs-") if len(parts) > 3 else ""
    if parts[-1] == "adapter" and stage in STAGES:
        return f"{flag}: a LoRA adapter, no complete model; STAGE={stage} serves it merged, STAGE=all on its base"
    return (
        f"{flag}: a LoRA adapter, no complete model; merge it into {base} first: "
        f"scripts/merge_lora.sh {base} {folder} FOLDER, then MODEL=FOLDER"
    )


def positions(folder: Path) -> int | None:
    """Tokens that a model can hold; None where its configuration does not say."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = config.get("text_config") or config
        found = config.get("max_position_embeddings") or config.get("n_positions")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, int) else None


def dtype_of(folder: Path) -> str:
    """What a model's weights are saved in, as its configuration says; auto where it does not."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        found = config.get("dtype") or config.get("torch_dtype")
    except (OSError, ValueError, AttributeError):
        return "auto"
    return found if found in ("float32", "bfloat16", "float16") else "auto"
