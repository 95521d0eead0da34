"""Follow the log of the stage that is running, or that ran last; from one stage to the next.

    python3 python/follow_log.py --recipe tiny [--stage sft]

Ctrl-C ends it with status 0, under Make too. Needs the standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from pathlib import Path

from show_status import TRAINING, is_running, read_progress, stages_of
from stagecraft.processes import in_the_foreground

FIRST_BYTES = 4000  # of a log that was there already
PAUSE = 0.5  # seconds between two looks


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="tiny", help="a folder in recipes/")
    parser.add_argument("--stage", help="one stage's log only", choices=("base", *TRAINING, "ppo", "eval"))
    args = parser.parse_args()
    stages_of(args.recipe)  # ends here when there is no such recipe
    with in_the_foreground():
        follow(args.recipe, args.stage)


def follow(recipe: str, stage: str | None) -> None:
    """Print what is added to the log, until Ctrl-C or until nobody reads."""
    current = newest_log(recipe, stage)
    if current is None:
        print(f"no outputs-{stage or '*'}/{recipe}/logs yet: run a stage first", file=sys.stderr)
        sys.exit(2)
    end = last_lines(current)
    print(f"== {current}", flush=True)
    while True:
        with (
            contextlib.suppress(FileNotFoundError),
            current.open("rb") as stream,
        ):  # a clean-sft may take it away
            if os.fstat(stream.fileno()).st_size < end:  # begun anew
                end = 0
            stream.seek(end)
            text = stream.read()
            end += len(text)
            sys.stdout.buffer.write(text)
            sys.stdout.flush()
        time.sleep(PAUSE)
        newest = newest_log(recipe, stage)
        if newest is not None and newest != current:
            current, end = newest, last_lines(newest)
            print(f"== {current}", flush=True)


def last_lines(path: Path) -> int:
    """Where the last lines of a log begin."""
    size = path.stat().st_size
    if size <= FIRST_BYTES:
        return 0
    with path.open("rb") as stream:
        stream.seek(size - FIRST_BYTES)
        stream.readline()
        return stream.tell()


def newest_log(recipe: str, stage: str | None) -> Path | None:
    """The log that was written to last, one of a running stage before all others."""
    logs = []
    for path in Path().glob(f"outputs-{stage or '*'}/{recipe}/logs/*.log"):
        folder = path.parent.parent
        with contextlib.suppress(FileNotFoundError):
            running = is_running(folder, read_progress(folder / "logs" / "progress.jsonl"))
            logs.append((running, path.stat().st_mtime, path))
    return max(logs)[2] if logs else None


if __name__ == "__main__":
    main()
