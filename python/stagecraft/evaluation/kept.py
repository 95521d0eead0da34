"""What an evaluation has measured so far, on the disk: an interrupted one goes on where it was, to the same numbers.

The unit is a batch, because a resumed run must compute the same batches to give the same bits. A finished batch is a
line of kept/KEY/TASK.jsonl; a finished task is kept/KEY/TASK.json, and a model all of whose tasks are there need not
be loaded again. KEY stands for all that the numbers depend on: another model, row, setting or version is another key.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from stagecraft.files import write_json
from stagecraft.generation import Compute, Keep

FOLDER = "kept"


@dataclass
class Batch:
    """A finished batch: the numbers of its rows, a result of each (JSON's own types), the seconds that it took."""

    rows: list[int]
    results: list[Any]
    seconds: float


@dataclass
class Task:
    """A finished task: a result of each row, and its batches as they were computed. `kept`: batches from before."""

    results: list[Any]
    batches: list[Batch] = field(default_factory=list)
    kept: int = 0


def key_of(*what: Any) -> str:
    """A name for a folder that stands for everything the numbers depend on."""
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:16]


def clear(output: Path) -> None:
    """Take away what was kept: the report is there."""
    shutil.rmtree(output / FOLDER, ignore_errors=True)


class Kept:
    """One model's tasks in OUTPUT/kept/KEY."""

    def __init__(self, output: Path, key: str) -> None:
        self.folder = output / FOLDER / key

    def task(self, name: str, run: Callable[[Keep], list[Any]]) -> Task:
        """The task, as it was finished before or by calling `run` with what asks for a batch that is kept.

        `run` gives a result of each row, in JSON's own types.
        """
        whole, lines = self.folder / f"{name}.json", self.folder / f"{name}.jsonl"
        if whole.exists():
            found = json.loads(whole.read_text(encoding="utf-8"))
            batches = [Batch(**batch) for batch in found["batches"]]
            return Task(found["results"], batches, len(batches))
        self.folder.mkdir(parents=True, exist_ok=True)
        with lines.open("a+b") as stream:
            batches = _read(stream)
            before = len(batches)
            results = run(_keeper(stream, batches))
        as_json = [vars(batch) | {"results": []} for batch in batches]  # these stand in the results already
        write_json(whole, {"results": results, "batches": as_json})
        lines.unlink()
        # As JSON gives it back, so that a task finished now and one finished before are the same to the bit.
        return Task(json.loads(json.dumps(results)), batches, before)


def _read(stream: BinaryIO) -> list[Batch]:
    """The batches of the whole lines; half a line that a kill left behind is cut off."""
    stream.seek(0)
    batches, end = [], 0
    for line in stream:
        try:
            if not line.endswith(b"\n"):
                break
            batches.append(Batch(**json.loads(line)))
        except (ValueError, TypeError):
            break
        end += len(line)
    stream.truncate(end)
    return batches


def _keeper(stream: BinaryIO, batches: list[Batch]) -> Keep:
    """Answers with the kept batches, in the order in which they came; then computes, and keeps."""
    from_before = iter(list(batches))

    def keep(rows: list[int], compute: Compute) -> list[Any]:
        known = next(from_before, None)
        if known is not None:
            if known.rows != rows:  # the key says that this can't be
                raise RuntimeError(f"{stream.name}: other batches than this run's; remove the file")
            return known.results
        began = time.perf_counter()
        results = compute(rows)
        batch = Batch(rows, results, time.perf_counter() - began)
        batches.append(batch)
        stream.write((json.dumps(vars(batch), ensure_ascii=False) + "\n").encode())
        stream.flush()
        os.fsync(stream.fileno())
        return results

    return keep
