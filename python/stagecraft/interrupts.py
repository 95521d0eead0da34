"""SIGTERM, SIGINT and SIGHUP while a stage runs: finish the step, keep it, say how to go on."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Ctrl-C reaches a rank from the terminal and once more from torchrun: within so many seconds they are one.
ONE_SIGNAL = 1.0


class Interrupted(KeyboardInterrupt):
    """A signal before there was a step to finish. As with Ctrl-C no handler of ordinary errors takes it."""


class Interrupts:
    """Takes the signals while inside. `name` is the first that came; `training` makes it wait for the step's end."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.training = False
        self._at = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interrupts:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's, or a background job's, choice stays
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)  # type: ignore[arg-type]

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None:
            if time.monotonic() - self._at > ONE_SIGNAL:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.name, self._at = signal.Signals(number).name, time.monotonic()
        if not self.training:
            raise Interrupted(self.name)
        # Not print: the signal may have come in the middle of one.
        os.write(
            2, f"{self.name}: a checkpoint after this step, then stop; once more ends at once\n".encode()
        )
