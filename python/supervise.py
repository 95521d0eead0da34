"""Start a stage, hand signals on to it, and start it again with a smaller micro-batch where memory did not suffice.

    python python/supervise.py COMMAND [ARGUMENT ...]          (scripts/launch.sh calls it)
    python python/supervise.py --ranks [TORCHRUN FLAG ...] SCRIPT.py [FLAG ...]

The second form is torchrun with time to write a checkpoint before its ranks are killed, and with their exit status.
"""

import functools
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from types import FrameType

from stagecraft.processes import die_with_parent

OUT_OF_MEMORY = 76  # stagecraft.run's exit status for: start me again
MOST_HALVINGS = 16  # from 32,768 down to 1
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
GRACE = 3600  # seconds that ranks get for their checkpoint; torchrun's own 30 are too few for a large model


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        sys.exit(0 if len(sys.argv) > 1 else 2)
    if sys.argv[1] == "--ranks":
        run_ranks(sys.argv[2:])
        return
    if shutil.which(sys.argv[1]) is None:
        print(f"{sys.argv[1]}: no such command to start (a command or --ranks comes first)", file=sys.stderr)
        sys.exit(2)
    for _ in range(MOST_HALVINGS):
        status = run_once(sys.argv[1:])
        if status != OUT_OF_MEMORY:
            break
        print("starting again with the smaller micro-batch", flush=True)
    if status < 0:  # end as the stage did
        signal.signal(-status, signal.SIG_DFL) if -status not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -status)
    sys.exit(status)


def run_once(command: list[str]) -> int:
    """The command's exit status; signals that come meanwhile are its own, and it may take its time."""
    # Should this process be killed, the stage gets the chance to keep its last step.
    process = subprocess.Popen(command, preexec_fn=functools.partial(die_with_parent, signal.SIGTERM))
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda taken, _: process.poll() is None and process.send_signal(taken))
    return process.wait()


def run_ranks(arguments: list[str]) -> None:
    """torchrun; ends with the status of the first rank that failed."""
    from torch.distributed.elastic.multiprocessing import api
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(GRACE))
    api._terminate_process_handler = once_a_second(api._terminate_process_handler)
    try:
        run(parse_args(arguments))
    except ChildFailedError as error:
        first = min(error.failures.values(), key=lambda failure: failure.timestamp)
        sys.exit(first.exitcode if first.exitcode > 0 else 128 - first.exitcode)
    except SignalException as error:
        sys.exit(75 if error.sigval in SIGNALS else 1)


def once_a_second(handler: Callable[..., None]) -> Callable[..., None]:
    """A signal handler that takes a signal from the terminal, which run_once hands on as well, for one and not for two."""
    taken: dict[int, float] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        before, taken[number] = taken.get(number, -math.inf), time.monotonic()
        if taken[number] - before > 1:
            handler(number, frame)

    return handle


if __name__ == "__main__":
    main()
