"""How far a recipe's stages are: state, steps, loss, time of the last change and size on disk.

    python3 python/show_status.py --recipe tiny

Needs the standard library only, so it answers before .venv exists and while a run has every core.
"""

import argparse
import contextlib
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

TRAINING = ("pt", "sft", "rm", "dpo")
RIGHT = (2, 3, 5)  # columns of figures
SECONDS_ALIVE = 120  # a run on another machine, whose process can't be seen here, counts as running so long


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="tiny", help="a folder in recipes/")
    recipe = parser.parse_args().recipe
    definition = Path("recipes", recipe, "recipe.mk")
    if not definition.is_file():
        there = ", ".join(sorted(path.parent.name for path in Path("recipes").glob("*/recipe.mk")))
        print(f"--recipe {recipe}: not in recipes/ (there: {there})", file=sys.stderr)
        sys.exit(2)
    table = [("stage", "state", "step", "loss", "last change", "on disk")]
    for stage in ("base", *stages_of(definition.read_text(encoding="utf-8"), recipe), "eval"):
        table.append(describe(stage, Path(f"outputs-{stage}", recipe)))
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    for row in table:
        cells = [
            c.rjust(w) if i in RIGHT else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def stages_of(definition: str, recipe: str) -> list[str]:
    """The recipe's stages, and others that have been run, in the order of the pipeline."""
    named = re.search(r"^STAGES\s*[?:]?=([^#\n]*)", definition, re.MULTILINE)
    chosen = named[1].split() if named else TRAINING
    return [stage for stage in TRAINING if stage in chosen or Path(f"outputs-{stage}", recipe).is_dir()]


def describe(stage: str, folder: Path) -> tuple[str, ...]:
    """A stage's line of the table."""
    progress = read_progress(folder / "logs" / "progress.jsonl")
    files = list_files(folder)
    newest = max((changed for changed, _ in files), default=0.0)
    return (
        stage,
        state(folder, progress),
        f"{progress['step']}/{progress['steps']}" if "step" in progress else "",
        f"{progress['loss']:.4g}" if "loss" in progress else "",
        time.strftime("%Y-%m-%d %H:%M", time.localtime(newest)) if newest else "",
        size(sum(count for _, count in files)) if files else "",
    )


def list_files(folder: Path) -> list[tuple[float, int]]:
    """Time and bytes of every file. A run may remove a checkpoint at any moment: what went is left out."""
    found = []
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                status = os.lstat(os.path.join(parent, name))
                found.append((status.st_mtime, status.st_size))
    return found


def state(folder: Path, progress: dict[str, Any]) -> str:
    """done, trained (not merged), running, unfinished or not started."""
    if is_running(folder, progress):
        return "running"
    if (folder / "DONE").exists():
        return "done"
    if (folder / "TRAINED").exists():
        return "trained, not merged"
    return "unfinished" if folder.is_dir() and any(folder.iterdir()) else "not started"


def is_running(folder: Path, progress: dict[str, Any]) -> bool:
    """Whether the process named in the folder's lock lives, or, without a lock, whether a step is fresh."""
    try:
        holder = re.search(r"process (\d+)", (folder / ".lock").read_text())
    except OSError:
        holder = None
    if holder:
        try:
            return b"python" in Path("/proc", holder[1], "cmdline").read_bytes()
        except OSError:
            return False
    return not (folder / "TRAINED").exists() and time.time() - progress.get("time", 0) < SECONDS_ALIVE


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


def size(count: int) -> str:
    """Bytes for people: 812 kB, 1.3 GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"


if __name__ == "__main__":
    main()
