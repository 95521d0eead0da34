"""The models that an evaluation is asked for: what name=PLACE means, what must be true of it, and loading it.

PLACE is a complete model's folder, BASE+ADAPTER, an adapter's folder alone (its adapter_config.json names the base),
or the URL of an OpenAI-compatible server, URL#MODEL where it serves several.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stagecraft import generation, lineage, models
from stagecraft.data.rows import Message
from stagecraft.errors import UserError
from stagecraft.evaluation.results import Subject
from stagecraft.merging.adapter import CONFIG
from stagecraft.merging.inputs import plan_merge
from stagecraft.remote import connect, is_url

REWARD = "rm"  # the reward model's column
LONGEST_NAME = 24
EXAMPLE = "e.g. sft=outputs-sft/tiny/model"
_NAME = re.compile(r"[\w.+-]+")
TEMPLATES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Place:
    """Where a model is. `adapter`: folder of what is put on it, `base` then the folder of what it is put on."""

    name: str
    path: str  # as it was given
    base: str
    adapter: str | None = None
    merged: bool = False  # in memory, before it is measured
    vocabulary: int | None = None  # rows of the embedding where the adapter brings more than the base has

    @property
    def flag(self) -> str:
        """What an error about it begins with."""
        return f"--models {self.name}"

    @property
    def kind(self) -> str:
        """folder, adapter or server."""
        return "server" if is_url(self.path) else "adapter" if self.adapter else "folder"

    @property
    def tokenizer(self) -> str:
        """The folder of its tokenizer and chat template: the adapter's own, where it brings one."""
        own = self.adapter and (Path(self.adapter) / "tokenizer_config.json").exists()
        return self.adapter if self.adapter and own else self.base

    def as_subject(self) -> Subject:
        """What the report says of it."""
        template = None if self.kind == "server" else template_hash(Path(self.tokenizer))
        return Subject(self.name, self.path, self.kind, template)

    def fingerprint(self) -> list[Any]:
        """Changes whenever its replies or likelihoods may. A server is known by what it says."""
        if self.kind == "server":
            return [self.path, probe(self)]
        weights = [lineage.weights_in(Path(folder)) for folder in (self.base, self.adapter) if folder]
        texts = [Path(self.tokenizer, name) for name in ("tokenizer.json", *TEMPLATES)]
        texts += [Path(self.base, name) for name in ("config.json", "generation_config.json")]
        texts += [Path(self.adapter, CONFIG)] if self.adapter else []
        hashes = [hashlib.sha256(text.read_bytes()).hexdigest() for text in texts if text.exists()]
        return [self.kind, self.merged, weights, hashes]


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
        place = collect(faults, read_place, name, path, name in merged)
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


def read_place(name: str, path: str, merged: bool = False) -> Place:
    """A place, checked. Raises UserError listing what is wrong with it."""
    flag = f"--models {name}"
    if is_url(path):
        connect(path, flag)
        return Place(name, path, path)
    base, adapter = _parted(path, flag)
    if adapter is None:
        generation.require_usable(base, flag)
        return Place(name, path, base)
    try:
        plan = plan_merge(base or None, [adapter], None, "auto")
    except UserError as error:
        raise UserError(*(_in_our_words(line, flag) for line in str(error).splitlines())) from None
    if plan.reward:
        raise UserError(f"{flag} {adapter}: a reward model's adapter, which writes no text")
    place = Place(name, path, str(plan.base.folder), adapter, merged, plan.vocabulary)
    generation.require_usable(place.base, flag, tokenizer_path=place.tokenizer)
    return place


def _parted(path: str, flag: str) -> tuple[str, str | None]:
    """(base, adapter) of what a place says; the base is "" where the adapter has to name it."""
    if Path(path).exists() or "+" not in path:
        return ("", path) if (Path(path) / CONFIG).exists() else (path, None)
    # A folder's name may hold a "+" too: the one that parts two folders that are there, else the last.
    splits = [(path[:i], path[i + 1 :]) for i, letter in enumerate(path) if letter == "+"]
    base, adapter = next(
        ((base, adapter) for base, adapter in splits if Path(base).is_dir() and Path(adapter).is_dir()),
        splits[-1],
    )
    if not (Path(adapter) / CONFIG).exists():
        raise UserError(f"{flag} {path}: {adapter or 'nothing'} is no adapter ({CONFIG} is not there)")
    return base, adapter


def _in_our_words(line: str, flag: str) -> str:
    """A merge's fault as one of --models: nobody here has given --lora_model or --base_model."""
    line = line.replace("; give it with --base_model", "; write BASE+ADAPTER")
    line = line.replace(" --base_model ", " the base ")
    return flag + " " + re.sub(r"^--(lora_model|base_model)[ :]*", "", line)


def load(place: Place, dtype: str) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder or of an adapter on its base. Raises UserError for what can't be loaded."""
    model, tokenizer = generation.load(models.load_causal, place.base, dtype, place.flag, place.tokenizer)
    if place.adapter is None:
        return model, tokenizer
    from peft import PeftModel

    if place.vocabulary:
        model.resize_token_embeddings(place.vocabulary, mean_resizing=False)
    model = PeftModel.from_pretrained(model, place.adapter).eval()
    return (model.merge_and_unload() if place.merged else model), tokenizer


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
