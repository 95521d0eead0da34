"""The models that an evaluation is asked for, as --models names them, and what tells one from another."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stagecraft import lineage
from stagecraft.data.rows import Message
from stagecraft.errors import UserError
from stagecraft.evaluation.results import Subject
from stagecraft.merging.adapter import CONFIG
from stagecraft.places import Place, read_place

REWARD = "rm"  # the reward model's column
LONGEST_NAME = 24
EXAMPLE = "e.g. sft=outputs-sft/tiny/model"
_NAME = re.compile(r"[\w.+-]+")
TEMPLATES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")


def subject_of(place: Place) -> Subject:
    """What the report says of a model."""
    template = None if place.kind == "server" else template_hash(Path(place.tokenizer))
    return Subject(place.name, place.path, place.kind, template)


def fingerprint_of(place: Place) -> list[Any]:
    """Changes whenever its replies or likelihoods may. A server is known by what it says."""
    if place.kind == "server":
        return [place.path, probe(place)]
    weights = [lineage.weights_in(Path(folder)) for folder in (place.base, place.adapter) if folder]
    texts = [Path(place.tokenizer, name) for name in ("tokenizer.json", *TEMPLATES)]
    texts += [Path(place.base, name) for name in ("config.json", "generation_config.json")]
    texts += [Path(place.adapter, CONFIG)] if place.adapter else []
    hashes = [hashlib.sha256(text.read_bytes()).hexdigest() for text in texts if text.exists()]
    return [place.kind, place.merged, weights, hashes]


def read_places(words: list[str], merged: list[str], taken: str | None, faults: list[str]) -> list[Place]:
    """The places of --models, each checked as far as that is cheap; all that is wrong joins `faults`.

    `merged`: names of --merge_lora. `taken`: a name that another column has.
    """
    if not words:
        faults.append(f"--models: name at least one model, {EXAMPLE}")
    found: dict[str, Place] = {}
    names = []
    for word in words:
        name, _, path = word.partition("=")
        if not path or not _NAME.fullmatch(name) or _width(name) > LONGEST_NAME:
            faults.append(
                f'--models "{word}": write name=folder, {EXAMPLE}; a name has up to {LONGEST_NAME} letters and digits'
            )
            continue
        if name in names or name == taken:
            faults.append(f'--models "{word}": the name "{name}" is taken; give each model a name of its own')
            continue
        names.append(name)
        place = collect(faults, read_place, name, path, f"--models {name}", name in merged)
        if place:
            found[name] = place
    for name in merged:
        if name not in names:
            faults.append(f'--merge_lora {name}: no model of --models is called "{name}"')
        elif name in found and found[name].kind != "adapter":
            faults.append(
                f"--merge_lora {name}: {found[name].path} is no adapter, so there is nothing to merge"
            )
    return list(found.values())


def template_hash(folder: Path) -> str | None:
    """The first twelve digits of SHA-256 over the chat template's text; None where the folder has none."""
    jinja, as_json, config = (folder / name for name in TEMPLATES)
    text = None
    if jinja.exists():
        text = jinja.read_text(encoding="utf-8")
    else:
        for file in (as_json, config):
            if text is None and file.exists():
                text = json.loads(file.read_text(encoding="utf-8")).get("chat_template")
    return hashlib.sha256(json.dumps(text).encode()).hexdigest()[:12] if text else None


PROBE: list[Message] = [
    {"role": "user", "content": "Name three colours, then count to seven. 请再说一句话。"}
]


def probe(place: Place) -> str:
    """What a server says to a fixed question: another model behind the same address says something else."""
    from stagecraft.evaluation.engines import Server, Settings

    return Server(place, Settings(max_new_tokens=16)).replies([PROBE])[0].text


def collect(faults: list[str], function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns; where it raises a UserError, the error's lines join `faults`."""
    try:
        return function(*arguments)
    except UserError as error:
        faults += str(error).splitlines()
        return None


def _width(text: str) -> int:
    from stagecraft.evaluation.report import display_width

    return display_width(text)
