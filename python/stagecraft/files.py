"""Files that matter: written whole or not at all, and not started where they would not fit."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from stagecraft.errors import UserError


def require_free_disk(folder: Path, needed: int) -> None:
    """Raise UserError when the file system that holds `folder` has less free space than `needed` bytes."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"--output_dir {folder}: {free / 1e6:,.0f} MB are free, about {needed / 1e6:,.0f} MB will be written; "
            "free some space, lower --save_total_limit or choose another disk"
        )


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A stream whose file appears as `path` when the block ends well, and not at all otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A whole_file of text."""
    with whole_file(path) as stream:
        stream.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """write_text of indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def replace_folder(temporary: Path, final: Path) -> None:
    """Sync every file of a finished folder and give it its name, in place of an older one.

    The older one goes when the new one is there; it stays where renaming fails. Raises OSError.
    """
    for file in temporary.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
    older = final.with_name(f".{final.name}.old")
    shutil.rmtree(older, ignore_errors=True)
    if final.exists():
        final.rename(older)
    try:
        temporary.rename(final)
    except OSError:
        if older.exists():
            older.rename(final)
        raise
    shutil.rmtree(older, ignore_errors=True)
