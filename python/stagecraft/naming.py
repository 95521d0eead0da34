"""What a user calls a model -> where it is: a stage's name besides all that stagecraft.places knows. No torch here."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from stagecraft.errors import UserError
from stagecraft.places import Place, parted, read_place
from stagecraft.remote import is_url

STAGES = ("base", "pt", "sft", "dpo", "ppo")  # in the order of the pipeline; a reward model writes no text


def default_recipe() -> str:
    """RECIPE, as Make hands it on."""
    return os.environ.get("RECIPE") or "tiny"


def marker(recipe: str, stage: str) -> Path:
    """The file that says a stage's model is complete."""
    return Path(f"outputs-{stage}") / recipe / "DONE"


def finished(recipe: str) -> list[str]:
    """Stages of the recipe whose model is complete, in the order of the pipeline."""
    return [stage for stage in STAGES if marker(recipe, stage).exists()]


def newest(recipe: str, count: int) -> list[str]:
    """The stages that finished last, in the order of the pipeline. Raises UserError where none has."""
    there = finished(recipe)
    if not there:
        raise UserError(
            f"RECIPE={recipe}: no finished model yet; run: make sft RECIPE={recipe}, or name a model: MODEL=FOLDER"
        )
    when = {stage: marker(recipe, stage).stat().st_mtime_ns for stage in there}
    chosen = sorted(there, key=lambda stage: (when[stage], STAGES.index(stage)))[-count:]
    return [stage for stage in STAGES if stage in chosen]


def find(word: str, recipe: str, flag: str) -> Place:
    """The place that a word means, found to be usable. Raises UserError listing what is wrong with it."""
    given, _, rest = word.partition("=")
    named = rest and given and not set(given) & set("/:#+.")
    name, path = (given, rest) if named else ("", word)
    if is_url(path):  # asked when it is opened
        return Place(name or _server_name(path), path, flag, path)
    if path in (*STAGES, "rm") and not Path(path).is_dir():
        name, path = name or path, _of_stage(path, recipe, flag)
    elif not Path(path).is_dir() and "+" not in path:
        near = difflib.get_close_matches(path, (*STAGES, "rm"), 1)
        hint = f'; did you mean the stage "{near[0]}"?' if near else f", and no stage ({', '.join(STAGES)})"
        raise UserError(f"{flag} {path}: no such folder{hint}")
    return read_place(name or _folder_name(path, flag), path, flag, merged=True)


def find_all(words: list[str], recipe: str, flag: str, most: int | None = None) -> list[Place]:
    """The places of several words, no two of one name. Raises UserError with the faults of all of them."""
    faults, found = [], []
    if most and len(words) > most:
        faults.append(f"{flag}: {len(words)} models; {most} answers side by side are the most")
    for word in words:
        try:
            found.append(find(word, recipe, flag))
        except UserError as error:
            faults.append(str(error))
    names = [place.name for place in found]
    for name in sorted({name for name in names if names.count(name) > 1}):
        faults.append(f"{flag}: {names.count(name)} models are called {name}; name them: NAME=PLACE")
    if faults:
        raise UserError(*faults)
    return found


def _of_stage(stage: str, recipe: str, flag: str) -> str:
    if stage == "rm":
        raise UserError(f"{flag} rm: a reward model scores answers and gives none")
    if stage not in finished(recipe):
        there = ", ".join(finished(recipe)) or "none"
        make = (
            "" if stage == "ppo" else f"; run: make {stage} RECIPE={recipe}"
        )  # no recipe trains PPO in its chain
        raise UserError(f"{flag} {stage}: not finished for RECIPE={recipe} (finished: {there}){make}")
    return f"outputs-{stage}/{recipe}/model"


def _folder_name(path: str, flag: str) -> str:
    """outputs-sft/tiny/model is called sft; another folder as it is called, `model` and the like as the one above."""
    base, adapter = parted(path, flag)
    folder = Path(adapter or base)
    parts = folder.absolute().parts
    if len(parts) > 2 and parts[-3].startswith("outputs-") and parts[-1] in ("model", "adapter"):
        return parts[-3].removeprefix("outputs-")
    return parts[-2] if parts[-1] in ("model", "adapter") and len(parts) > 2 else folder.name or path


def _server_name(url: str) -> str:
    address, _, model = url.partition("#")
    return model.rstrip("/").rsplit("/", 1)[-1] if model else address.split("//", 1)[-1].split("/", 1)[0]
