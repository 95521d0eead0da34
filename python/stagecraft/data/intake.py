"""Files -> rows, in two passes shared out to processes: what is there, then what is made of the rows chosen.

The first pass reads and checks every row and keeps of each a hash and a length; the second reads the chosen rows
again and encodes them. Reading twice costs a few per cent of tokenising; in return no pass holds the rows
themselves, so of each only a hash and two numbers stay in memory, and what is not chosen is never tokenised.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stagecraft.chat.templates import TemplateFault
from stagecraft.data import readers, rows
from stagecraft.data.readers import Chunk
from stagecraft.data.rows import BadRow, Conversation, Row
from stagecraft.errors import UserError
from stagecraft.processes import die_with_parent

PIECE = 500  # rows of a piece that one process reads and another works on
THOUGHTS = "answers with a thought"  # the name of a count
KEPT_FAULTS = 1000  # faults kept word for word; all are counted
Item = dict[str, Any]  # column -> token ids; "spans" -> labels; "dropped", "noted", "thought" -> counts
EncodeRows = Callable[[list[Row]], list[Item]]


@dataclass(frozen=True)
class Piece:
    """Rows for one process: a chunk of a file to read, or raw rows (number, row) that were read already."""

    file: str
    chunk: Chunk | None
    raw: list[tuple[int, Any]] = field(default_factory=list)

    def read(self) -> tuple[list[tuple[int, Any]], int]:
        """(numbered raw rows, how many numbers they use)."""
        if self.chunk is None:
            return self.raw, 0
        reader = readers.ChunkReader(self.chunk)
        return list(reader), reader.numbers


@dataclass
class Survey:
    """What the files hold: of each good row, in order, a hash and a length; of the bad ones place and reason."""

    files: list[Path]
    kind: str
    hashes: np.ndarray = field(default_factory=lambda: np.zeros(0, "S16"))
    characters: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    turns: int = 0
    bad: int = 0
    faults: list[str] = field(default_factory=list)  # the first KEPT_FAULTS
    first: list[int] = field(default_factory=list)  # of each piece: the number before its first one
    sizes: list[int] = field(default_factory=list)  # of each piece: its good rows

    def __len__(self) -> int:
        return len(self.hashes)


class Column:
    """Lists of int32, one after the other."""

    def __init__(self) -> None:
        self.values, self.lengths = array("i"), array("i")

    def add(self, ids: array[int]) -> None:
        self.values.extend(ids)
        self.lengths.append(len(ids))


class Batch:
    """What came of a piece: columns of token ids for each part, counts for each part, and faults."""

    def __init__(self) -> None:
        self.columns: dict[int, dict[str, Column]] = {}
        self.counts: dict[int, Counter[str]] = {}
        self.faults: list[str] = []

    def add(self, part: int, item: Item) -> None:
        """An item of this part: its columns, or only why it has none."""
        counts = self.counts.setdefault(part, Counter())
        for key in ("dropped", "noted"):
            if key in item:
                counts[item[key]] += 1
        ids = {name: array("i", value) for name, value in item.items() if name.endswith("ids")}
        if not ids:
            return
        counts["rows"] += 1
        counts["tokens"] += sum(map(len, ids.values()))
        counts[THOUGHTS] += item.get("thought", False)
        if "spans" in item:
            tokens = ids["input_ids"]
            ids["labels"] = array("i", [-100]) * len(tokens)
            for start, end in item["spans"]:
                ids["labels"][start:end] = tokens[start:end]
                counts["supervised"] += end - start
        columns = self.columns.setdefault(part, {})
        for name, value in ids.items():
            columns.setdefault(name, Column()).add(value)


def workers_for(asked: int | None) -> int:
    """Processes to use: as asked, or one a core this process may use."""
    return asked or len(os.sched_getaffinity(0))


def survey(path: str, kind: str, flag: str, workers: int | None = None) -> Survey:
    """Read and check every row. Raises UserError where there is no file; bad rows are listed, not raised."""
    found = Survey(readers.list_files(path, flag), kind)
    hashes, characters = [], []
    numbers: dict[str, int] = {}
    rows_in: dict[str, int] = dict.fromkeys(map(str, found.files), 0)
    size = sum(file.stat().st_size for file in found.files if file.exists())
    with _bar(size, "reading", "B") as bar:
        for piece, done in ordered_map(_look, pieces(found.files), kind, workers_for(workers), size):
            base = numbers.get(piece.file, 0)
            found.first.append(base)
            found.sizes.append(len(done["characters"]))
            numbers[piece.file] = base + done["numbers"]
            rows_in[piece.file] += len(done["characters"]) + len(done["faults"])
            hashes.append(done["hashes"])
            characters.append(done["characters"])
            found.turns += done["turns"]
            found.bad += len(done["faults"])
            for number, reason in done["faults"][: max(0, KEPT_FAULTS - len(found.faults))]:
                found.faults.append(f"{readers.place(piece.file, number and base + number)}: {reason}")
            if piece.chunk:
                bar.update(max(0, piece.chunk.end - piece.chunk.start))
    for file, count in rows_in.items():
        if not count:
            found.bad += 1
            found.faults.append(f"{file}: holds no rows")
    found.hashes = np.frombuffer(b"".join(hashes), "S16")
    found.characters = np.concatenate([np.zeros(0, np.int32), *characters])
    return found


def encode(
    found: Survey, choice: np.ndarray, encode_rows: EncodeRows, workers: int | None = None
) -> Iterator[Batch]:
    """The chosen rows of a survey, encoded, piece by piece in order.

    `choice`: uint8 for each good row, 0: left out, else the number of its part. `encode_rows` makes of rows as many
    items; it runs in other processes when there is more to do than a moment's work.
    """
    ends = np.cumsum(found.sizes)
    work = [
        (base, choice[end - size : end])
        for base, size, end in zip(found.first, found.sizes, ends, strict=True)
    ]
    tasks = ((piece, *work[i]) for i, piece in enumerate(pieces(found.files)) if np.count_nonzero(work[i][1]))
    context = (found.kind, encode_rows)
    with _bar(int(np.count_nonzero(choice)), "tokenising", " rows") as bar:
        for task, done in ordered_map(_encode, tasks, context, workers_for(workers), len(found) * 1000):
            yield done
            bar.update(int(np.count_nonzero(task[2])))


def pieces(files: Iterable[Path]) -> Iterator[Piece]:
    """The files as work for processes, the same at every call: chunks to read there, or rows read here."""
    for file in files:
        chunks = readers.split(file)
        if len(chunks) > 1 or chunks[0].end >= 0:
            yield from (Piece(str(file), chunk) for chunk in chunks)
            continue
        reader = iter(readers.ChunkReader(chunks[0]))  # one stream: only this process can read it
        while raw := list(itertools.islice(reader, PIECE)):
            yield Piece(str(file), None, raw)


# What a process of a pool works with; set before it is forked, as functions can't be sent to it.
_context: Any = None
SMALL = 4 << 20  # bytes (or rows x 1000) that one process has done before others would have started


def ordered_map(
    function: Callable[[Any], Any], tasks: Iterable[Any], context: Any, workers: int, size: int
) -> Iterator[tuple[Any, Any]]:
    """(task, function(task)) in order, over forked processes when there is enough to do; `context` is their _context.

    Tasks are drawn as results are taken, so neither piles up.
    """
    global _context
    _context = context
    if workers <= 1 or size <= SMALL:
        for task in tasks:
            yield task, function(task)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), initializer=_alone)
    try:
        waiting: deque[tuple[Any, Any]] = deque()
        for task in tasks:
            waiting.append((task, pool.submit(function, task)))
            if len(waiting) > 2 * workers:
                task, future = waiting.popleft()
                yield task, future.result()
        for task, future in waiting:
            yield task, future.result()
    except BrokenProcessPool:
        raise UserError(
            "a process that reads the data was killed, most likely for want of memory; "
            "use fewer: --preprocessing_num_workers 1"
        ) from None
    finally:
        # Waiting costs a piece's time; without it Python 3.11 may use a pipe at its end that the pool closes meanwhile.
        pool.shutdown(wait=True, cancel_futures=True)


def _alone() -> None:
    """How a forked process differs from the one it came from."""
    # The tokenizer's own threads are not there after a fork; waiting for them would never end.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Ctrl-C goes to every process of the terminal: the parent's answer to it is enough, and a worker that took it in
    # the middle of a result would leave the parent waiting for the rest.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent()


def _good_rows(
    raw: list[tuple[int, Any]], kind: str, faults: list[tuple[int, str]]
) -> Iterator[tuple[int, Row]]:
    for number, value in raw:
        try:
            if isinstance(value, BadRow):
                raise value
            yield number, rows.canonical(value, kind, "")
        except BadRow as reason:
            faults.append((number, str(reason)))


def _look(piece: Piece) -> dict[str, Any]:
    raw, numbers = piece.read()
    faults: list[tuple[int, str]] = []
    hashes, characters, turns = [], [], 0
    for _, row in _good_rows(raw, _context, faults):
        hashes.append(rows.content_hash(row))
        characters.append(len(rows.text_of(row)))
        turns += len(row.messages) if isinstance(row, Conversation) else 0
    return {
        "numbers": numbers,
        "hashes": b"".join(hashes),
        "characters": np.array(characters, np.int32),
        "turns": turns,
        "faults": faults,
    }


def _encode(task: tuple[Piece, int, np.ndarray]) -> Batch:
    piece, base, choice = task
    kind, encode_rows = _context
    good = _good_rows(piece.read()[0], kind, [])
    wanted = [(number, row, int(part)) for (number, row), part in zip(good, choice, strict=True) if part]
    done = Batch()
    for start in range(0, len(wanted), PIECE):
        batch = wanted[start : start + PIECE]
        try:
            items = encode_rows([row for _, row, _ in batch])
        except TemplateFault:
            items = []
            for number, row, _ in batch:  # one by one, to tell them all with their places
                try:
                    items += encode_rows([row])
                except TemplateFault as reason:
                    items.append({})
                    done.faults.append(f"{readers.place(piece.file, base + number)}: {reason}")
        for (_, _, part), item in zip(batch, items, strict=True):
            done.add(part, item)
    return done


def _bar(total: int, text: str, unit: str) -> Any:
    from tqdm import tqdm

    # A bar only on a terminal, and only where there is something to wait for.
    return tqdm(total=total, desc=text, unit=unit, unit_scale=True, leave=False, disable=None, delay=1)
