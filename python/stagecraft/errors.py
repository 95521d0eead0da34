"""Mistakes a user can mend (exit status 2) and results that are not what they should be (1): plain lines, no traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

SHOWN_FAULTS = 20  # told word for word; all are counted


class UserError(Exception):
    """One or more lines for the user: what is wrong, where (flag or file:line), how to mend it."""

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))


class Stopped(Exception):
    """A run that ends before its end, for a reason that is no mistake of the command: plain lines, `status`."""

    def __init__(self, *lines: str, status: int = 1) -> None:
        super().__init__("\n".join(lines))
        self.status = status


class ProofFailed(Exception):
    """A result that does not hold against its proof: what is wrong with it, and where it was put aside."""


def first_faults(faults: Sequence[str], count: int) -> list[str]:
    """The faults to show of `count`, and how many more there are."""
    shown = list(faults[:SHOWN_FAULTS])
    return [*shown, f"... and {count - len(shown):,} more"] if count > len(shown) else shown


def run_main(main: Callable[[], None]) -> None:
    """Run an entry script; a UserError becomes its lines on stderr and exit status 2, a ProofFailed 1."""
    try:
        main()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # under torchrun every rank finds the same fault; one tells it
            print(error, file=sys.stderr)
        sys.exit(2)
    except Stopped as error:
        if os.environ.get("RANK", "0") == "0" or error.status == 76:  # memory may fail on any one rank
            print(error, file=sys.stderr)
        sys.exit(error.status)
    except ProofFailed as error:
        print(f"proof failed: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output (head, less) went away
        sys.exit(0)
