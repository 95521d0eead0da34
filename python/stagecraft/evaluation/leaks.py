"""Evaluation rows that training has seen: the same text, or a near copy within one training row.

Near copies are told by runs of GRAM = 13 words, the length with which GPT-3 was cleaned (Brown et al., 2020, appendix
C): shorter runs are shared by texts that have nothing to do with each other. GPT-3 called one shared run a leak, which
the sentences that a data set repeats would set off; here SHARE = 0.8 of a row's runs must stand in ONE training row,
the share of a text from which on the Llama 2 report (Touvron et al., 2023, appendix A.6) calls a sample dirty.

The training files are streamed through processes; what stays in memory is of the evaluation rows alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagecraft.data import intake, readers, rows
from stagecraft.data.intake import Piece
from stagecraft.data.rows import BadRow, Conversation, Document, Preference, Row
from stagecraft.data.turns import Message
from stagecraft.errors import UserError
from stagecraft.evaluation import text
from stagecraft.evaluation.results import Leak
from stagecraft.evaluation.sets import EvalSets

if TYPE_CHECKING:
    import numpy as np

GRAM = 13
SHARE = 0.8
SHOWN = 200  # characters of a row that a Leak quotes
# The fixed questions are not looked for: they are shown, and no number is made of them.
SETS = ("documents", "answers", "choices", "preferences")
KINDS = {"pt": "pt", "sft": "sft", "rm": "rm", "dpo": "rm"}  # stage -> how its rows are read


@dataclass(frozen=True)
class Wanted:
    """An evaluation row: the set and place it is from, its text, and the hash that an equal training text has."""

    name: str
    where: str
    text: str
    key: bytes


@dataclass(frozen=True)
class Index:
    """The evaluation rows, made to be asked which of them a training row holds."""

    wanted: list[Wanted]
    same: dict[bytes, list[int]]  # hash -> rows
    vocabulary: dict[str, int]  # unit -> 64 random bits; of the rows long enough for runs
    runs: list[np.ndarray]  # of each row: hashes of its runs, sorted; empty where it is too short
    anchors: np.ndarray  # its rarest runs, of which any near copy holds one, sorted
    owners: np.ndarray  # the row of each anchor


def weigh(folders: dict[str, str], flag: str = "--train_data") -> int:
    """Bytes that find() will read. Raises UserError listing every stage or folder that can't be read."""
    faults, size = [], 0
    for stage, folder in folders.items():
        if stage not in KINDS:
            faults.append(f"{flag} {stage}={folder}: the stages with training data are {', '.join(KINDS)}")
            continue
        try:
            size += sum(map(_bytes, readers.list_files(folder, f"{flag} {stage}")))
        except UserError as error:
            faults += str(error).splitlines()
    if faults:
        raise UserError(*faults)
    return size


def find(
    sets: EvalSets,
    folders: dict[str, str],
    progress: Callable[[int], Any] | None = None,
    workers: int | None = None,
) -> list[Leak]:
    """The evaluation rows that occur in the training data, in order, each with the training row most like it.

    `folders`: stage (pt, sft, rm, dpo) -> its files. `progress` is called with bytes just read, weigh() in all.
    Training rows that can't be read are passed over: they are no training rows either.
    """
    size, best = weigh(folders), {}
    index = _index(list(_wanted(sets)))
    seen: set[tuple[Path, str]] = set()
    for stage, folder in folders.items():
        files = readers.list_files(folder)
        kind = KINDS[stage]
        new = [file for file in files if (file.resolve(), kind) not in seen]  # RM and DPO often share theirs
        seen.update((file.resolve(), kind) for file in files)
        if progress:
            progress(sum(map(_bytes, files)) - sum(map(_bytes, new)))
        for source, row, overlap in _compared(new, (kind, index), workers, size, progress):
            if row not in best or overlap > best[row][1]:
                best[row] = (source, overlap)
    found = ((index.wanted[row], *best[row]) for row in sorted(best))
    return [Leak(w.name, w.where, _quoted(w.text), source, overlap) for w, source, overlap in found]


def without(sets: EvalSets, leaks: list[Leak]) -> EvalSets:
    """The sets without the leaked rows."""
    leaked = {(leak.name, leak.where) for leak in leaks}
    kept = {name: [row for row in getattr(sets, name) if (name, row.where) not in leaked] for name in SETS}
    return replace(sets, **kept)


# The evaluation rows


def _wanted(sets: EvalSets) -> Iterator[Wanted]:
    for row in sets.documents:
        yield Wanted("documents", row.where, row.text, _key("document", [row.text]))
    for name in ("answers", "choices"):
        for row in getattr(sets, name):
            turns = _turns(row.prompt)
            yield Wanted(name, row.where, "\n".join(turns), _key("asked", turns))
    for row in sets.preferences:
        turns = [*_turns(row.prompt), row.chosen]
        yield Wanted("preferences", row.where, "\n".join(turns), _key("answered", turns))


def _index(wanted: list[Wanted]) -> Index:
    import numpy as np

    same: dict[bytes, list[int]] = {}
    for i, row in enumerate(wanted):
        same.setdefault(row.key, []).append(i)
    cut = [found if len(found := text.units(row.text)) >= GRAM else [] for row in wanted]
    names = dict.fromkeys(unit for found in cut for unit in found)
    bits = np.random.default_rng(0).integers(1, 1 << 63, len(names), np.int64).tolist()
    vocabulary = dict(zip(names, bits, strict=True))
    runs = [np.unique(_runs([vocabulary[unit] for unit in found])) for found in cut]
    values, counts = np.unique(np.concatenate([np.zeros(0, np.uint64), *runs]), return_counts=True)
    anchors, owners = [], []
    for i, found in enumerate(runs):
        rare = found[np.argsort(counts[np.searchsorted(values, found)], kind="stable")]
        rare = rare[: len(found) - math.ceil(SHARE * len(found)) + 1]
        anchors.append(rare)
        owners.append(np.full(len(rare), i))
    joined = np.concatenate([np.zeros(0, np.uint64), *anchors])
    order = np.argsort(joined, kind="stable")
    owned = np.concatenate([np.zeros(0, np.int64), *owners])
    return Index(wanted, same, vocabulary, runs, joined[order], owned[order])


def _runs(bits: list[int]) -> np.ndarray:
    """A hash of every GRAM units in a row; 0 among the bits is a unit that no evaluation row has: no run holds it."""
    import numpy as np

    if len(bits) < GRAM:
        return np.zeros(0, np.uint64)
    values = np.array(bits, np.uint64)
    count = len(values) - GRAM + 1
    total, known = np.zeros(count, np.uint64), np.ones(count, bool)
    for i in range(GRAM):
        here = values[i : i + count]
        total = total * np.uint64(0x9E3779B97F4A7C15) + here
        known &= here != 0
    return total[known]


# The training rows


def _compared(
    files: list[Path],
    context: tuple[str, Index],
    workers: int | None,
    size: int,
    progress: Callable[[int], Any] | None,
) -> Iterator[tuple[str, int, float]]:
    """(place of a training row, evaluation row, overlap) wherever one is in the other."""
    numbers: dict[str, int] = {}
    tasks = intake.pieces(files)
    for piece, (found, used) in intake.ordered_map(_look, tasks, context, intake.workers_for(workers), size):
        base = numbers.get(piece.file, 0)
        numbers[piece.file] = base + used
        for number, row, overlap in found:
            yield readers.place(piece.file, base + number), row, overlap
        if progress and piece.chunk:
            progress(max(0, piece.chunk.end - piece.chunk.start))


def _look(piece: Piece) -> tuple[list[tuple[int, int, float]], int]:
    """([(number, evaluation row, overlap)], numbers used) of a piece."""
    kind, index = intake._context
    raw, used = piece.read()
    found: list[tuple[int, int, float]] = []
    for number, value in raw:
        try:
            row = rows.canonical(value, kind, "")
        except BadRow:
            continue
        same = {i for key in _keys(row) for i in index.same.get(key, ())}
        found += [(number, i, 1.0) for i in sorted(same)]
        found += [(number, i, share) for i, share in _near(rows.text_of(row), index) if i not in same]
    return found, used


def _near(training: str, index: Index) -> Iterator[tuple[int, float]]:
    """(evaluation row, share of its runs in this text) of those with SHARE or more."""
    import numpy as np

    if not len(index.anchors):
        return
    known = index.vocabulary
    here = np.unique(_runs([known.get(unit, 0) for unit in text.units(training)]))
    first = np.searchsorted(index.anchors, here)
    last = np.searchsorted(index.anchors, here, "right")
    hits = [index.owners[a:b] for a, b in zip(first, last, strict=True) if b > a]
    for i in np.unique(np.concatenate(hits)) if hits else ():
        share = float(np.isin(index.runs[i], here, assume_unique=True).mean())
        if share >= SHARE:
            yield int(i), share


def _keys(row: Row) -> Iterator[bytes]:
    """Hashes of what an evaluation row could be equal to in this training row."""
    if isinstance(row, Document):
        yield _key("document", [row.text])
    elif isinstance(row, Conversation):
        yield from _asked(row.messages)
    elif isinstance(row, Preference):
        yield from _asked(row.prompt)
        yield _key("answered", [*_turns(row.prompt), row.chosen])


def _asked(messages: list[Message]) -> Iterator[bytes]:
    """A hash of every user turn, and of every exchange up to one."""
    before: list[str] = []
    for message in messages:
        if message["role"] == "system":
            continue
        if message["role"] == "user":
            yield _key("asked", [message["content"]])
            if before:
                yield _key("asked", [*before, message["content"]])
        elif message["role"] == "assistant" and before:
            yield _key("answered", [*before, message["content"]])
        before.append(message["content"])


def _turns(messages: list[Message]) -> list[str]:
    return [message["content"] for message in messages if message["role"] != "system"]


def _key(kind: str, turns: Iterable[str]) -> bytes:
    """16 bytes that texts share which differ in width, case, white space and the punctuation at their edges only."""
    parts = [kind, *(text.normalise(turn).strip(text.EDGES) for turn in turns)]
    return blake2b("\x1f".join(parts).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _quoted(words: str) -> str:
    words = " ".join(words.split())
    return words if len(words) <= SHOWN else words[: SHOWN - 1] + "…"


def _bytes(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0
