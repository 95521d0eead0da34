"""What a row of data may look like -> one canonical row, or an error with its file and line.

A row's format is found by the row itself, so files of different formats can lie in one folder.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stagecraft.errors import UserError

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

SUFFIXES = (".jsonl", ".json", ".txt")
SHOWN_FAULTS = 20
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


@dataclass(frozen=True)
class Document:
    """A text to pretrain on."""

    text: str
    where: str


@dataclass(frozen=True)
class Conversation:
    """Turns that end with an assistant's; every assistant turn is trained on."""

    messages: list[Message]
    where: str


@dataclass(frozen=True)
class Preference:
    """A prompt (its last turn is the user's) with a better and a worse answer."""

    prompt: list[Message]
    chosen: str
    rejected: str
    where: str


Row = Document | Conversation | Preference


class BadRow(ValueError):
    """Why a row can't be used."""


def read_rows(path: str, kind: str, flag: str = "--train_file_dir") -> list[Row]:
    """All rows of a file, or of a folder's files in name order. `kind`: pt, sft, rm or dpo.

    Raises UserError that lists the faults of the whole pass, each as file:line: reason.
    """
    canonical = CANONICAL[kind]
    rows: list[Row] = []
    faults: list[str] = []
    for file in list_files(path, flag):
        before = len(rows) + len(faults)
        for where, raw in read_raw(file, faults):
            try:
                row = canonical(raw, where)
                _require_characters(row)
                rows.append(row)
            except BadRow as reason:
                faults.append(f"{where}: {reason}")
        if len(rows) + len(faults) == before:
            faults.append(f"{file}: holds no rows")
    if faults:
        more = [f"... and {len(faults) - SHOWN_FAULTS} more"] if len(faults) > SHOWN_FAULTS else []
        total = f"{len(faults)} of {len(rows) + len(faults)} rows are bad. Mend or remove them."
        raise UserError(*faults[:SHOWN_FAULTS], *more, total)
    return rows


def text_of(row: Row) -> str:
    """All the words of a row, turns joined by newlines."""
    if isinstance(row, Document):
        return row.text
    if isinstance(row, Conversation):
        return "\n".join(message["content"] for message in row.messages)
    return "\n".join([*(message["content"] for message in row.prompt), row.chosen, row.rejected])


def list_files(path: str, flag: str = "--train_file_dir") -> list[Path]:
    """The data files at `path`, in name order; a folder is searched with its subfolders."""
    root = Path(path)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise UserError(f"{flag} {path}: no such file or folder")
    files = [file for file in sorted(root.rglob("*")) if file.is_file() and _suffix(file) in SUFFIXES]
    if not files:
        raise UserError(
            f"{flag} {path}: no {', '.join(SUFFIXES)} file (or one of these with .gz) in the folder"
        )
    return files


def read_raw(file: Path, faults: list[str]) -> Iterator[tuple[str, Any]]:
    """(file:line, decoded row) of one file; a .txt line is {"text": line}. What can't be decoded joins `faults`."""
    try:
        opened = gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb")
        with opened as stream:
            data = stream.read()
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # Positions are counted in error.object: a byte order mark is not part of it.
        line, byte = error.object[: error.start].count(b"\n") + 1, error.object[error.start]
        faults.append(f"{file}:{line}: not UTF-8 (byte 0x{byte:02x}); convert the file to UTF-8")
        return
    except (OSError, EOFError, zlib.error) as error:
        faults.append(f"{file}: can't be read: {getattr(error, 'strerror', None) or error}")
        return
    if _suffix(file) == ".json":
        yield from _read_array(file, text, faults)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        if _suffix(file) == ".txt":
            yield where, {"text": line.rstrip("\r")}
            continue
        try:
            yield where, json.loads(line)
        except (ValueError, RecursionError) as error:
            faults.append(f"{where}: not JSON: {_json_reason(error)}")


def _read_array(file: Path, text: str, faults: list[str]) -> Iterator[tuple[str, Any]]:
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        faults.append(f"{file}:{getattr(error, 'lineno', 1)}: not JSON: {_json_reason(error)}")
        return
    if not isinstance(items, list):
        faults.append(f"{file}:1: must hold an array of rows ([...])")
        return
    for number, item in enumerate(items, start=1):
        yield f"{file}: row {number}", item


def _json_reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error).split(";")[0]


def _suffix(file: Path) -> str:
    return Path(file.stem).suffix if file.suffix == ".gz" else file.suffix


def _document(raw: Any, where: str) -> Document:
    row = _object(raw)
    if "text" not in row:
        raise BadRow(f'no "text" (keys: {", ".join(row) or "none"})')
    return Document(_text(row, "text"), where)


def _conversation(raw: Any, where: str) -> Conversation:
    row = _object(raw)
    name = next((name for name in ("conversations", "messages") if name in row), None)
    if name:
        messages = _turns(row[name], name)
        if row.get("system") and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": _text(row, "system")})
    elif "instruction" in row and "output" in row:
        asked = "\n".join(part for part in (_text(row, "instruction"), _optional(row, "input")) if part)
        messages = [*_prompt(row, asked), {"role": "assistant", "content": _text(row, "output")}]
    elif "question" in row and "answer" in row:
        messages = [
            *_prompt(row, _text(row, "question")),
            {"role": "assistant", "content": _text(row, "answer")},
        ]
    else:
        raise BadRow(
            'unknown format; expected "conversations", "messages", "instruction" and "output", or "question" and '
            f'"answer" (keys: {", ".join(row) or "none"})'
        )
    if messages[-1]["role"] != "assistant":
        raise BadRow(f"the last turn is the {messages[-1]['role']}'s; it must be the assistant's")
    return Conversation(messages, where)


def _preference(raw: Any, where: str) -> Preference:
    row = _object(raw)
    if "response_chosen" in row and "response_rejected" in row:
        prompt = _prompt(row, _text(row, "question"))
        chosen, rejected = _text(row, "response_chosen"), _text(row, "response_rejected")
    elif "chosen" in row and "rejected" in row and "prompt" in row:
        given = row["prompt"]
        prompt = _turns(given, "prompt") if isinstance(given, list) else _prompt(row, _text(row, "prompt"))
        chosen, rejected = _answer(row, "chosen"), _answer(row, "rejected")
    elif "good_answer" in row and "bad_answer" in row:
        prompt = _prompt(row, _text(row, "question"))
        chosen, rejected = _text(row, "good_answer"), _text(row, "bad_answer")
    else:
        raise BadRow(
            'unknown format; expected "question", "response_chosen" and "response_rejected", "prompt", "chosen" and '
            f'"rejected", or "question", "good_answer" and "bad_answer" (keys: {", ".join(row) or "none"})'
        )
    if prompt[-1]["role"] != "user":
        raise BadRow(f"the prompt's last turn is the {prompt[-1]['role']}'s; it must be the user's")
    if chosen == rejected:
        raise BadRow("chosen and rejected are the same text")
    return Preference(prompt, chosen, rejected, where)


CANONICAL: dict[str, Callable[[Any, str], Row]] = {
    "pt": _document,
    "sft": _conversation,
    "rm": _preference,
    "dpo": _preference,
}


def _require_characters(row: Row) -> None:
    """JSON can spell half of a surrogate pair, which no tokenizer takes."""
    try:
        text_of(row).encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(
            f"holds half of a surrogate pair (\\u{ord(error.object[error.start]):x}), no character"
        ) from None


def _object(raw: Any) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise BadRow(f"must be an object ({{...}}), not {type(raw).__name__}")
    return raw


def _text(row: dict[str, Any], key: str) -> str:
    if key not in row:
        raise BadRow(f'no "{key}" (keys: {", ".join(row) or "none"})')
    value = row[key]
    if not isinstance(value, str):
        raise BadRow(f'"{key}" must be text, not {"null" if value is None else type(value).__name__}')
    if not value.strip():
        raise BadRow(f'"{key}" is empty')
    return value


def _optional(row: dict[str, Any], key: str) -> str:
    return _text(row, key) if row.get(key) not in (None, "") else ""


def _prompt(row: dict[str, Any], question: str) -> list[Message]:
    """System text, history ([[user, assistant], ...]) and the question as turns."""
    messages: list[Message] = []
    if row.get("system") not in (None, ""):
        messages.append({"role": "system", "content": _text(row, "system")})
    history = row.get("history") or []
    if not isinstance(history, list):
        raise BadRow(f'"history" must be a list of [question, answer] pairs, not {type(history).__name__}')
    for number, pair in enumerate(history, start=1):
        if not (
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) and t.strip() for t in pair)
        ):
            raise BadRow(f'"history" entry {number} must be a [question, answer] pair of texts')
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return [*messages, {"role": "user", "content": question}]


def _answer(row: dict[str, Any], key: str) -> str:
    value = row[key]
    if isinstance(value, list):
        turns = _turns(value, key, starts_with="assistant")
        if len(turns) != 1:
            raise BadRow(f'"{key}" must be one assistant turn, not {len(turns)} turns')
        return turns[0]["content"]
    return _text(row, key)


def _turns(value: Any, name: str, starts_with: str = "user") -> list[Message]:
    """ShareGPT ("from", "value") or role/content turns, checked to alternate after an optional system turn."""
    if not isinstance(value, list) or not value:
        raise BadRow(f'"{name}" must be a list of turns' + (", not an empty one" if value == [] else ""))
    messages: list[Message] = []
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, dict):
            raise BadRow(f'"{name}" turn {number} must be an object, not {type(turn).__name__}')
        role_key, text_key = ("from", "value") if "from" in turn else ("role", "content")
        given = turn.get(role_key)
        if not isinstance(given, str) or given not in ROLES:
            raise BadRow(f'"{name}" turn {number}: unknown role {given!r}; known: {", ".join(ROLES)}')
        if ROLES[given] == "system" and number > 1:
            raise BadRow(f'"{name}" turn {number}: a system turn can only be the first')
        if messages and messages[-1]["role"] == ROLES[given]:
            raise BadRow(f'"{name}" has two "{given}" turns in a row (turns {number - 1} and {number})')
        try:
            text = "" if ROLES[given] == "system" and turn.get(text_key) == "" else _text(turn, text_key)
        except BadRow as reason:
            raise BadRow(f'"{name}" turn {number}: {reason}') from None
        messages.append({"role": ROLES[given], "content": text})
    spoken = [message for message in messages if message["role"] != "system"]
    if not spoken or spoken[0]["role"] != starts_with:
        raise BadRow(f'"{name}": the first turn must be the {starts_with}\'s')
    return messages
