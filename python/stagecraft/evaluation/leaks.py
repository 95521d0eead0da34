"""Evaluation rows that training has seen: the same text, or a near copy within one training row.

Near copies are told by runs of GRAM = 13 words, the length with which GPT-3 was cleaned (Brown et al., 2020, appendix
C): shorter runs are shared by texts that have nothing to do with each other. GPT-3 called one shared run a leak, which
the sentences that a data set repeats would set off; here SHARE = 0.8 of a row's runs must stand in ONE training row,
the share of a text from which on the Llama 2 report (Touvron et al., 2023, appendix A.6) calls a sample dirty.

The training files are streamed through processes; what stays in memory is of the evaluation rows alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagecraft.data import intake, readers, rows
from stagecraft.data.intake import Piece
from stagecraft.data.rows import BadRow, Conversation, Document, Preference, Row
from stagecraft.errors import UserError
from stagecraft.evaluation import text
from stagecraft.evaluation.results import Leak
from stagecraft.evaluation.sets import Choice, EvalSets, Question

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
    """An evaluation row: its set, its place and the start of its text."""

    name: str
    where: str
    text: str


@dataclass(frozen=True)
class Index:
    """The evaluation rows, made to be asked which of them a training row holds."""

    wanted: list[Wanted]
    same: dict[bytes, list[int]]  # hash that an equal training text has -> rows
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
    index = _index(sets)
    seen: set[tuple[Path, str]] = set()
    for stage, folder in folders.items():
        files = readers.list_files(folder)
        kind, left = KINDS[stage], sum(map(_bytes, files))
        new = [file for file in files if (file.resolve(), kind) not in seen]  # RM and DPO often share theirs
        seen.update((file.resolve(), kind) for file in files)
        for read, hits in _compared(new, (kind, index), workers, size):
            for source, row, overlap in hits:
                if row not in best or overlap > best[row][1]:
                    best[row] = (source, overlap)
            left -= read
            if progress:
                progress(read)
        if progress:
            progress(left)  # what was read before, and files that are read in one piece
    found = ((index.wanted[row], *best[row]) for row in sorted(best))
    return [Leak(w.name, w.where, w.text, source, overlap) for w, source, overlap in found]


def without(sets: EvalSets, leaks: list[Leak]) -> EvalSets:
    """The sets without the leaked rows."""
    leaked = {(leak.name, leak.where) for leak in leaks}
    kept = {name: [row for row in getattr(sets, name) if (name, row.where) not in leaked] for name in SETS}
    return replace(sets, **kept)


# The evaluation rows


def _index(sets: EvalSets) -> Index:
    import numpy as np

    wanted, same, cut = [], {}, []
    for name in SETS:
        for row in getattr(sets, name):
            turns = _turns(row)
            *_, key = _prefixes(_normal(turns))
            same.setdefault(key, []).append(len(wanted))
            wanted.append(Wanted(name, row.where, _quoted(" ".join(words for _, words in turns))))
            units = text.units("\n".join(words for _, words in turns))
            cut.append(units if len(units) >= GRAM else [])
    names = dict.fromkeys(unit for units in cut for unit in units)
    bits = np.random.default_rng(0).integers(1, 1 << 63, len(names), np.int64).tolist()
    vocabulary = dict(zip(names, bits, strict=True))
    runs = [np.unique(_runs([vocabulary[unit] for unit in units])) for units in cut]
    return Index(wanted, same, vocabulary, runs, *_anchors(runs))


def _anchors(runs: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(runs, whose they are): so many of each row that a training row without any of them can't hold SHARE of it.

    The rarest are taken, so that a sentence which all rows share does not make every training row worth a look.
    """
    import numpy as np

    none = np.zeros(0, np.uint64)
    values, counts = np.unique(np.concatenate([none, *runs]), return_counts=True)
    anchors, owners = [none], [np.zeros(0, np.int64)]
    for i, found in enumerate(runs):
        rare = found[np.argsort(counts[np.searchsorted(values, found)], kind="stable")]
        enough = len(found) - math.ceil(SHARE * len(found)) + 1
        anchors.append(rare[:enough])
        owners.append(np.full(len(rare[:enough]), i))
    order = np.argsort(np.concatenate(anchors), kind="stable")
    return np.concatenate(anchors)[order], np.concatenate(owners)[order]


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
    files: list[Path], context: tuple[str, Index], workers: int | None, size: int
) -> Iterator[tuple[int, list[tuple[str, int, float]]]]:
    """Piece by piece: (bytes read, [(place of a training row, evaluation row that it holds, overlap)])."""
    numbers: dict[str, int] = {}
    tasks = intake.pieces(files)
    for piece, (found, used) in intake.ordered_map(_look, tasks, context, intake.workers_for(workers), size):
        base = numbers.get(piece.file, 0)
        numbers[piece.file] = base + used
        hits = [(readers.place(piece.file, base + number), row, overlap) for number, row, overlap in found]
        yield (max(0, piece.chunk.end - piece.chunk.start) if piece.chunk else 0), hits


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
        turns = _normal(_turns(row))
        same = {i for key in _keys(turns) for i in index.same.get(key, ())}
        found += [(number, i, 1.0) for i in sorted(same)]
        words = [words for _, words in turns]
        if isinstance(row, Preference):
            words.append(text.normalise(row.rejected))
        found += [(number, i, share) for i, share in _near("\n".join(words), index) if i not in same]
    return found, used


def _near(normal: str, index: Index) -> Iterator[tuple[int, float]]:
    """(evaluation row, share of its runs in this text) of those with SHARE or more."""
    import numpy as np

    known = index.vocabulary
    here = _runs([known.get(unit, 0) for unit in text.units_of_normal(normal)])
    first, last = (np.searchsorted(index.anchors, here, side) for side in ("left", "right"))
    held = [index.owners[first[i] : last[i]] for i in np.flatnonzero(last > first)]
    for row in np.unique(np.concatenate(held)) if held else ():
        share = float(np.isin(index.runs[row], here).mean())
        if share >= SHARE:
            yield int(row), share


# Both


def _turns(row: Row | Question | Choice) -> list[tuple[str, str]]:
    """(role, text) of a row's turns, a preference's better answer the last one; no system prompt."""
    if isinstance(row, Document):
        return [("document", row.text)]
    messages = row.messages if isinstance(row, Conversation) else row.prompt
    turns = [(turn["role"], turn["content"]) for turn in messages if turn["role"] != "system"]
    return [*turns, ("assistant", row.chosen)] if isinstance(row, Preference) else turns


def _normal(turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(role, text.normalise(words).strip(text.EDGES)) for role, words in turns]


def _keys(turns: list[tuple[str, str]]) -> Iterator[bytes]:
    """Hashes of what an evaluation row could be equal to in a training row: its start, or one of its questions."""
    yield from _prefixes(turns)
    for role, words in turns[1:]:
        if role == "user":
            yield from _prefixes([(role, words)])


def _prefixes(turns: list[tuple[str, str]]) -> Iterator[bytes]:
    """16 bytes for the first turn, for the first two, and so on."""
    hashed = blake2b(digest_size=16)
    for role, words in turns:
        hashed.update(f"{role}\x1f{words}\x1e".encode("utf-8", "surrogatepass"))
        yield hashed.digest()


def _quoted(words: str) -> str:
    words = " ".join(words.split())
    return words if len(words) <= SHOWN else words[: SHOWN - 1] + "…"


def _bytes(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0
