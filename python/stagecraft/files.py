"""Files that matter: written whole or not at all, and not started where they would not fit."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

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


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name, sync, rename: the file is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """write_text of indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def replace_folder(temporary: Path, final: Path) -> None:
    """Sync every file of a finished folder and give it its name, in place of an older one."""
    for file in temporary.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
