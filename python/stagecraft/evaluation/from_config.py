"""`--from_config evaluation.yaml`: the models of an evaluation as entries with model_path, is_lora, base_model, merge_lora.

Entries become the values of --models and --merge_lora; every other key is a flag, as in a file of --config.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from stagecraft.arguments import Lines
from stagecraft.flags import to_bool
from stagecraft.merging.adapter import CONFIG
from stagecraft.remote import is_url

KEYS = ("model_path", "is_lora", "base_model", "merge_lora", "name")


def as_config(argv: list[str]) -> list[str]:
    """--from_config as --config, which it is but for its models."""
    word = "--from_config"
    return [("--config" + w[len(word) :]) if w.split("=")[0] == word else w for w in argv]


def translated(lines: Lines, faults: list[str]) -> Lines:
    """A file's lines, entries of `models` told as flags; what is wrong with them joins `faults`."""
    found: Lines = []
    for where, key, value in lines:
        if key != "models" or not _has_entries(value):
            found.append((where, key, value))
            continue
        words, merged = [], []
        for name, entry in _named(where, value, faults):
            place = _place(f"{where}: models: {name}", entry, faults)
            if place:
                words.append(f"{name}={place[0]}")
                merged += [name] if place[1] else []
        found.append((where, key, words))
        found += [(where, "merge_lora", merged)] if merged else []
    return found


def _has_entries(value: Any) -> bool:
    return isinstance(value, dict) or isinstance(value, list) and any(isinstance(v, dict) for v in value)


def _named(where: str, value: Any, faults: list[str]) -> list[tuple[str, Any]]:
    """(name, entry) of a mapping or of a list whose entries have a name."""
    if isinstance(value, dict):
        return [(str(name), entry) for name, entry in value.items()]
    found = []
    for number, entry in enumerate(value, start=1):
        if not isinstance(entry, dict) or not entry.get("name"):
            faults.append(f"{where}: models: entry {number} has no name; write name and model_path")
        else:
            found.append((str(entry["name"]), {k: v for k, v in entry.items() if k != "name"}))
    return found


def _place(where: str, entry: Any, faults: list[str]) -> tuple[str, bool] | None:
    """(what --models says after the name, whether its adapter is merged first); None where it is wrong."""
    before = len(faults)
    if isinstance(entry, str):
        return entry, False
    entry = entry if isinstance(entry, dict) else {}
    for key in entry:
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, n=1)
            hint = f'; did you mean "{near[0]}"?' if near else f" (there are {', '.join(KEYS)})"
            faults.append(f'{where}: unknown key "{key}"{hint}')
    if len(faults) == before and not (isinstance(entry.get("model_path"), str) and entry["model_path"]):
        faults.append(f'{where}: needs "model_path": a folder, or the URL of a server')
    flags: dict[str, bool] = {}
    for key in ("is_lora", "merge_lora"):
        if entry.get(key) is not None:
            try:
                flags[key] = to_bool(entry[key])
            except ValueError as error:
                faults.append(f"{where}: {key} {error}")
    path, base = entry.get("model_path"), entry.get("base_model")
    if base is not None and not isinstance(base, str):
        faults.append(f'{where}: "base_model" must be a folder, not {base!r}')
    if len(faults) > before:
        return None
    faults += [f"{where}: {fault}" for fault in _contradictions(path, base, flags)]
    if len(faults) > before:
        return None
    return (f"{base}+{path}" if base else path), flags.get("merge_lora", False)


def _contradictions(path: str, base: str | None, flags: dict[str, bool]) -> list[str]:
    """An entry says adapter or complete model; its folder says which it is."""
    lora, there = flags.get("is_lora"), Path(path).is_dir()
    adapter = (Path(path) / CONFIG).exists()
    if is_url(path):
        return (
            ["a server has no is_lora, base_model or merge_lora here"] if base or any(flags.values()) else []
        )
    found = []
    if there and lora and not adapter:
        found.append(f"is_lora is true, but {path} is no adapter ({CONFIG} is not there)")
    if there and lora is False and adapter:
        found.append(f"is_lora is false, but {path} is an adapter ({CONFIG} is there)")
    if lora is False or there and not adapter and not lora:
        found += ["base_model is for an adapter; leave it out"] if base else []
        found += ["merge_lora is for an adapter; leave it out"] if flags.get("merge_lora") else []
    return found
