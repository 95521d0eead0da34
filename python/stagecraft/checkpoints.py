"""Checkpoints that are whole or known not to be: sealed with sizes and hashes, looked at before they are used."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from stagecraft.files import write_json

SEAL = "COMPLETE.json"
PREFIX = "checkpoint-"
DAMAGED = ".damaged"


def step_of(checkpoint: Path) -> int:
    """The step of a folder checkpoint-N."""
    return int(checkpoint.name.removeprefix(PREFIX))


def found_in(folder: Path) -> list[Path]:
    """Every checkpoint-N in a folder, whole or not, the newest first."""
    names = [entry for entry in folder.glob(f"{PREFIX}*") if entry.name.removeprefix(PREFIX).isdigit()]
    return sorted(names, key=step_of, reverse=True)


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Bytes and SHA-256 of every file below a folder, by relative path; each is synced to the disk."""
    found = {}
    for file in sorted(entry for entry in folder.rglob("*") if entry.is_file() and entry.name != SEAL):
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            os.fsync(stream.fileno())
        found[str(file.relative_to(folder))] = {"bytes": file.stat().st_size, "sha256": digest}
    return found


def seal(checkpoint: Path) -> None:
    """Say that a checkpoint is complete, now that all of it is on the disk."""
    write_json(checkpoint / SEAL, {"step": step_of(checkpoint), "files": describe_files(checkpoint)})


def rotate(folder: Path, keep: int | None, best: str | None) -> None:
    """Remove all sealed checkpoints but the newest `keep` and the best one; call it when the newest is sealed."""
    sealed = [checkpoint for checkpoint in found_in(folder) if (checkpoint / SEAL).exists()]
    for checkpoint in sealed[keep:] if keep else []:
        if best is None or checkpoint.resolve() != Path(best).resolve():
            (checkpoint / SEAL).unlink()  # first, so that a crash half-way leaves nothing that looks whole
            shutil.rmtree(checkpoint)


def fault_of(checkpoint: Path) -> str | None:
    """What is wrong with a sealed checkpoint, or None."""
    try:
        files = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))["files"]
        wanted = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return f"{SEAL} is damaged"
    for name, (size, _) in wanted.items():
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if (checkpoint / name).stat().st_size != size:
            return f"{name} has {(checkpoint / name).stat().st_size:,} bytes instead of {size:,}"
    for name, (_, digest) in wanted.items():
        with (checkpoint / name).open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != digest:
                return f"{name} is not what was written (another SHA-256)"
    return None


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """(the newest checkpoint that can be used, what was found on the way).

    Half-written ones are removed; damaged ones are set aside as checkpoint-N.damaged.
    """
    said = []
    for checkpoint in found_in(folder):
        if not (checkpoint / SEAL).exists():
            shutil.rmtree(checkpoint)
            said.append(f"{checkpoint.name} was cut short while it was written: removed")
            continue
        fault = fault_of(checkpoint)
        if fault is None:
            return checkpoint, said
        aside = checkpoint.with_name(checkpoint.name + DAMAGED)
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.rename(aside)
        said.append(f"{checkpoint.name} is damaged ({fault}): set aside as {aside.name}")
    return None, said
