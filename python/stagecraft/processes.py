"""How processes end, and what they leave. Needs the standard library only."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Call in a child: a parent that was killed leaves nobody behind (Linux). `number`: the signal the child gets."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def is_held(file: Path) -> bool:
    """Whether any process that we may look at has the file open (Linux)."""
    wanted = os.path.realpath(file)
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is another user's
            if os.readlink(descriptor) == wanted:
                return True
    return False


@contextlib.contextmanager
def in_the_foreground() -> Iterator[None]:
    """Ctrl-C is for this process alone and ends it well: Make, in another group, doesn't get it and sees status 0."""
    signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
    group, terminal = os.getpgrp(), sys.stdin.isatty() and os.tcgetpgrp(0) == os.getpgrp()
    if terminal:
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        os.setpgid(0, 0)
        os.tcsetpgrp(0, os.getpgrp())
    try:
        yield
    except BrokenPipeError:
        os._exit(0)
    finally:
        if terminal:
            os.tcsetpgrp(0, group)
