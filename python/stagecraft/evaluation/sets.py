"""The evaluation rows: what each file of an evaluation folder holds, checked row by row."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from stagecraft.data import rows
from stagecraft.data.fields import require_characters
from stagecraft.data.rows import BadRow, Document, Message, Preference
from stagecraft.errors import UserError, first_faults
from stagecraft.evaluation.text import says_something

T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """A conversation that ends with the user's question, and the key phrase a right reply contains, if any.

    reference: a whole right reply, where the row gives one.
    """

    prompt: list[Message]
    answer: str
    split: str | None
    where: str
    reference: str = ""

    @property
    def text(self) -> str:
        """The question itself."""
        return self.prompt[-1]["content"]


@dataclass(frozen=True)
class Choice:
    """A question with several whole answers, of which options[right] is the right one."""

    prompt: list[Message]
    options: list[str]
    right: int
    split: str | None
    where: str


@dataclass
class EvalSets:
    """The rows of an evaluation folder; a file that is not there leaves its list empty and is named in `missing`."""

    documents: list[Document] = field(default_factory=list)
    answers: list[Question] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    preferences: list[Preference] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def read_eval_sets(folder: str, at_most: int | None = None, seed: int = 42) -> EvalSets:
    """documents, answers, choices, preferences and questions (.jsonl) of a folder, any of which may be missing.

    `at_most` keeps a seeded sample of each set (questions excepted). Raises UserError listing the faults of all
    files as file:line: reason.
    """
    if not Path(folder).is_dir():
        raise UserError(f"--eval_dir {folder}: no such folder")
    sets, faults = EvalSets(), []
    for name, canonical in _CANONICAL.items():
        file = Path(folder) / f"{name}.jsonl"
        if not file.is_file():
            sets.missing.append(name)
            continue
        found = _read(file, canonical, faults)
        if at_most is not None and len(found) > at_most and name != "questions":
            kept = sorted(random.Random(seed).sample(range(len(found)), at_most))
            found = [found[i] for i in kept]
        setattr(sets, name, found)
    if len(sets.missing) == len(_CANONICAL):
        faults.append(
            f"--eval_dir {folder}: none of {', '.join(f'{name}.jsonl' for name in _CANONICAL)} is there"
        )
    if faults:
        raise UserError(*first_faults(faults, len(faults)))
    return sets


def _read(file: Path, canonical: Callable[[Any, str], T], faults: list[str]) -> list[T]:
    found: list[T] = []
    before = len(faults)
    for where, raw in rows.read_raw(file, faults):
        try:
            found.append(canonical(raw, where))
        except BadRow as reason:
            faults.append(f"{where}: {reason}")
    if not found and len(faults) == before:
        faults.append(f"{file}: holds no rows")
    return found


def _question(raw: Any, where: str, needs: tuple[str, ...] = ("question", "answer")) -> Question:
    if isinstance(raw, dict):
        for key in needs:
            if key not in raw:
                raise BadRow(f'no "{key}" (keys: {", ".join(raw) or "none"})')
        # As a row of fine-tuning: that honours "system" and "history", and wants an answer.
        raw = {"answer": "?"} | {key: raw[key] for key in ("system", "history", *needs) if key in raw}
    *prompt, answer = rows.canonical(raw, "sft", where).messages
    return Question(prompt, answer["content"], None, where)


def _answer(raw: Any, where: str) -> Question:
    question = _question(raw, where)
    if not says_something(question.answer):
        raise BadRow(f'"answer" {question.answer!r} holds only punctuation')
    reference = raw.get("reference", question.answer)
    if not isinstance(reference, str) or not says_something(reference):
        raise BadRow(f'"reference" must be a whole right reply, not {reference!r}')
    require_characters(reference)
    return replace(question, split=_split(raw), reference=reference)


def _choice(raw: Any, where: str) -> Choice:
    question = _question(raw, where)
    options = raw.get("options")
    if not isinstance(options, list) or len(options) < 2:
        raise BadRow('"options" must be a list of two or more texts')
    if not all(isinstance(option, str) and option.strip() for option in options):
        raise BadRow('"options" holds something that is no text, or an empty one')
    if len(set(options)) < len(options):
        raise BadRow('"options" has the same text twice')
    if question.answer not in options:
        raise BadRow('"answer" is not one of "options"')
    return Choice(question.prompt, options, options.index(question.answer), _split(raw), where)


def _split(raw: dict[str, Any]) -> str | None:
    value = raw.get("split")
    if value is not None and not (isinstance(value, str) and value.strip()):
        raise BadRow(f'"split" must be text, not {value!r}')
    return value


_CANONICAL: dict[str, Callable[[Any, str], Any]] = {
    "documents": lambda raw, where: rows.canonical(raw, "pt", where),
    "answers": _answer,
    "choices": _choice,
    "preferences": lambda raw, where: rows.canonical(raw, "rm", where),
    "questions": lambda raw, where: _question(raw, where, ("question",)),
}
