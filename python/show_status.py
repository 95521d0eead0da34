"""How far a recipe's stages are: state, steps, loss, time left, time of the last change and size on disk.

    python3 python/show_status.py --recipe tiny

Needs the standard library only, so it answers before .venv exists and while a run has every core.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from stagecraft.pace import duration

TRAINING = ("pt", "sft", "rm", "dpo")
HEAD = ("stage", "state", "step", "loss", "left", "last change", "on disk")
RIGHT = (2, 3, 4, 6)  # columns of figures
SECONDS_ALIVE = 120  # a run on another machine, whose process can't be seen here, counts as running so long
LONGEST_NOTE = 160
TRACEBACK_ENDS = re.compile(r"[\w.]+(Error|Exception)(:.*)?")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="tiny", help="a folder in recipes/")
    recipe = parser.parse_args().recipe
    table, notes = [HEAD], []
    for stage in ("base", *stages_of(recipe), "eval"):
        folder = Path(f"outputs-{stage}", recipe)
        line, note = describe(stage, folder)
        table.append(line)
        notes += [f"{stage}: {note[:LONGEST_NOTE]}"] if note else []
    widths = [max(len(row[i]) for row in table) for i in range(len(HEAD))]
    for row in table:
        cells = [
            c.rjust(w) if i in RIGHT else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
    for note in notes:
        print(note)


def stages_of(recipe: str) -> list[str]:
    """The recipe's stages, and others that have been run, in the order of the pipeline."""
    definition = Path("recipes", recipe, "recipe.mk")
    if not definition.is_file():
        there = ", ".join(sorted(path.parent.name for path in Path("recipes").glob("*/recipe.mk")))
        print(f"--recipe {recipe}: not in recipes/ (there: {there})", file=sys.stderr)
        sys.exit(2)
    named = re.search(r"^STAGES\s*[?:]?=([^#\n]*)", definition.read_text(encoding="utf-8"), re.MULTILINE)
    chosen = named[1].split() if named else TRAINING
    return [stage for stage in TRAINING if stage in chosen or Path(f"outputs-{stage}", recipe).is_dir()]


def describe(stage: str, folder: Path) -> tuple[tuple[str, ...], str]:
    """(a stage's line of the table, why it failed if it did)."""
    progress = read_progress(folder / "logs" / "progress.jsonl")
    files = list_files(folder)
    newest = max((changed for changed, _ in files), default=0.0)
    what, note = state(folder, progress)
    restarts = count_restarts(folder)
    if restarts:
        what += f", {restarts} restart{'s' if restarts > 1 else ''}"
    left = ""
    if what.startswith("running") and "seconds_left" in progress:
        left = duration(
            max(0.0, progress["seconds_left"] - (time.time() - progress.get("time", time.time())))
        )
    line = (
        stage,
        what,
        f"{progress['step']}/{progress['steps']}" if {"step", "steps"} <= progress.keys() else "",
        f"{progress['loss']:.4g}" if "loss" in progress else "",
        left,
        time.strftime("%Y-%m-%d %H:%M", time.localtime(newest)) if newest else "",
        size(sum(count for _, count in files)) if files else "",
    )
    return line, note


def list_files(folder: Path) -> list[tuple[float, int]]:
    """Time and bytes of every file. A run may remove a checkpoint at any moment: what went is left out."""
    found = []
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                status = os.lstat(os.path.join(parent, name))
                found.append((status.st_mtime, status.st_size))
    return found


def state(folder: Path, progress: dict[str, Any]) -> tuple[str, str]:
    """(what the stage is doing or where it was left, why it failed if it did)."""
    trained = (folder / "TRAINED").exists()
    if is_running(folder, progress):
        return ("merging" if trained else "running"), ""
    if (folder / "DONE").exists():
        return "done", ""
    if trained:
        return "trained, not merged", last_words(folder)
    stopped = read_json(folder / "checkpoints" / "stopped.json")
    reason = str(stopped.get("reason", "")) if isinstance(stopped, dict) else ""
    if reason.startswith("SIG"):
        return f"interrupted at step {newest_checkpoint(folder)}", ""
    reason = reason or last_words(folder)
    if reason:
        return "failed", reason
    started = folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir())
    return ("unfinished" if started else "not started"), ""


def newest_checkpoint(folder: Path) -> int:
    """The step of the newest complete checkpoint, 0 where there is none."""
    whole = (folder / "checkpoints").glob("checkpoint-*/COMPLETE.json")
    steps = [path.parent.name.rpartition("-")[2] for path in whole]
    return max((int(step) for step in steps if step.isdigit()), default=0)


def count_restarts(folder: Path) -> int:
    """How often the run went on after something ended it."""
    restarts = read_json(folder / "checkpoints" / "restarts.json")
    if not isinstance(restarts, list):
        run = read_json(folder / "run.json") if (folder / "TRAINED").exists() else {}
        restarts = run.get("restarts") if isinstance(run, dict) else []
    return len(restarts or [])


def last_words(folder: Path) -> str:
    """The last line of the log, if a traceback ends there."""
    line = ""
    for name in ("train.log", "eval.log"):
        with contextlib.suppress(OSError), (folder / "logs" / name).open("rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - 4096))
            line = (stream.read().decode("utf-8", "replace").splitlines() or [""])[-1]
    return line if TRACEBACK_ENDS.fullmatch(line) else ""


def is_running(folder: Path, progress: dict[str, Any]) -> bool:
    """Whether the process named in the folder's lock lives, or, without a lock, whether a step is fresh."""
    try:
        holder = re.search(r"process (\d+)(?: since (\S+))?", (folder / ".lock").read_text())
    except OSError:
        holder = None
    if holder is None:
        return not (folder / "TRAINED").exists() and time.time() - progress.get("time", 0) < SECONDS_ALIVE
    try:
        return b"python" in Path("/proc", holder[1], "cmdline").read_bytes() and not is_younger(
            *holder.groups()
        )
    except OSError:
        return False


def is_younger(process: str, since: str | None) -> bool:
    """Whether a process started after a time: then it only has the number of one that is gone (after a reboot, say)."""
    try:
        then = datetime.datetime.fromisoformat(since or "").timestamp()
        ticks = int(Path("/proc", process, "stat").read_text().rpartition(")")[2].split()[19])
        boot = re.search(r"^btime (\d+)", Path("/proc/stat").read_text(), re.MULTILINE)
        return boot is not None and int(boot[1]) + ticks / os.sysconf("SC_CLK_TCK") > then + 2
    except ValueError:
        return False


def read_progress(path: Path) -> dict[str, Any]:
    """What progress.jsonl said last, key by key (an evaluation's line has no loss); half a line counts for nothing."""
    known: dict[str, Any] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return known
    for line in lines:
        try:
            known |= {k: v for k, v in json.loads(line).items() if isinstance(v, (int, float))}
        except ValueError:
            continue
    return known


def read_json(path: Path) -> Any:
    """The file's value; an empty object where there is none, or none that is whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def size(count: int) -> str:
    """Bytes for people: 812 kB, 1.3 GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"


if __name__ == "__main__":
    main()
