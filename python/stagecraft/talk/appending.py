"""Rows put at the end of a jsonl file that others may read or write: whole lines only, on the disk when it says so."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from stagecraft.data import rows
from stagecraft.data.fields import BadRow
from stagecraft.data.forms import check_output
from stagecraft.errors import UserError


def check_file(path: Path, kind: str, flag: str) -> None:
    """Raise UserError where rows of a kind (sft, dpo) can't be appended to the file, new or there."""
    check_output(path, flag)
    try:
        existing = next(above for above in (path, *path.absolute().parents) if above.exists())
        if not os.access(existing, os.W_OK):
            raise PermissionError(0, "no permission to write there")
        if path.exists():
            with path.open("rb") as stream:
                _require_kind(stream, path, kind, flag)
    except OSError as error:
        raise UserError(f"{flag} {path}: can't be written: {error.strerror or error}") from None


def append_rows(path: Path, forms: list[dict[str, Any]], kind: str, flag: str) -> int:
    """Append rows as lines under a lock; returns how many lines the file then has. Raises UserError.

    Every row is read first as the stage will read it. Nothing but whole lines is left, also on a full disk.
    """
    for form in forms:
        try:
            rows.canonical(form, kind, str(path))
        except BadRow as reason:
            raise UserError(f"{flag} {path}: nothing written: {reason}") from None
    lines = "".join(json.dumps(form, ensure_ascii=False) + "\n" for form in forms).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b", buffering=0) as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            _require_kind(stream, path, kind, flag)
            _append(stream, lines)
            stream.seek(0)
            return sum(1 for line in stream if line.strip())
    except OSError as error:
        raise UserError(f"{flag} {path}: can't be written: {error.strerror or error}") from None


def _append(stream: BinaryIO, lines: bytes) -> None:
    size = stream.seek(0, os.SEEK_END)
    if size and _tail(stream, size) != b"\n":  # a last line that an editor left open
        lines = b"\n" + lines
    try:
        written = 0
        while written < len(lines):
            written += stream.write(lines[written:])
        os.fsync(stream.fileno())
    except OSError:
        stream.truncate(size)
        raise


def _tail(stream: BinaryIO, size: int) -> bytes:
    stream.seek(size - 1)
    return stream.read(1)


def _require_kind(stream: BinaryIO, path: Path, kind: str, flag: str) -> None:
    """The first and the last line must be rows of this kind: the file is no other one, and not cut off."""
    stream.seek(0)
    first = last = b""
    number = 0
    for count, line in enumerate(stream, start=1):
        if line.strip():
            first, last, number = first or line, line, count
    for line, where in ((first, f"{path}"), (last, f"{path}:{number}")):
        if not line:
            continue
        try:
            rows.canonical(json.loads(line.decode("utf-8-sig")), kind, where)
        except (ValueError, BadRow) as reason:
            raise UserError(
                f"{flag} {where}: holds something else than {kind} rows ({reason}); nothing is appended to it"
            ) from None
