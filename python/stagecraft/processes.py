"""How helper processes end, and what they leave."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
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
