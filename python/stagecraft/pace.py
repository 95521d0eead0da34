"""How fast a run goes: tokens a second, time left and, at a price an hour, money spent and to come."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable

from stagecraft.errors import UserError


def price_an_hour() -> float | None:
    """What PRICE in the environment says. Raises UserError where that is no number."""
    text = os.environ.get("PRICE", "").strip()
    if text and not re.fullmatch(r"\d+(\.\d+)?", text, re.ASCII):
        raise UserError(
            f'PRICE="{text}": must be a number, what the machine costs an hour, e.g. PRICE=18 or PRICE=2.49'
        )
    return float(text) if text else None


class Pace:
    """Counts from `step` of `steps` on; `before`: training seconds of earlier starts of this run.

    `tokens` is an epoch's, without padding: multiplied with epochs it gives tokens without a look at any batch, which
    would make the device wait. Exact over an epoch; within one it takes every row for an average one.
    """

    def __init__(
        self,
        step: int,
        steps: int,
        epoch: float,
        tokens: int | None,
        before: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.steps, self.tokens, self.before, self.clock = steps, tokens, before, clock
        self.began = clock()
        self.origin = self.now = (self.began, step, epoch)
        self.took_first_step = False

    def reached(self, step: int, epoch: float) -> None:
        """Tell that a step is done. The first one, which warms up, is not counted once there is another."""
        self.now = (self.clock(), step, epoch)
        if not self.took_first_step:
            self.took_first_step, self.after_first = True, self.now
        else:
            self.origin = self.after_first

    @property
    def seconds(self) -> float:
        """Training seconds of this run so far, over all its starts."""
        return self.before + self.clock() - self.began

    @property
    def seconds_left(self) -> float | None:
        """At the pace of this process's steps; None before the first."""
        seconds, steps = self.now[0] - self.origin[0], self.now[1] - self.origin[1]
        return seconds / steps * (self.steps - self.now[1]) if steps > 0 else None

    @property
    def tokens_per_second(self) -> float | None:
        """Of all processes together."""
        seconds, epochs = self.now[0] - self.origin[0], self.now[2] - self.origin[2]
        return self.tokens * epochs / seconds if self.tokens and epochs > 0 and seconds > 0 else None

    def words(self, price: float | None) -> list[str]:
        """For people: "1,850 tokens/s", "12:05 left", "3.42 spent, 8.10 to come"."""
        said = []
        if self.tokens_per_second is not None:
            said.append(f"{self.tokens_per_second:,.0f} tokens/s")
        if self.seconds_left is not None:
            said.append(f"{duration(self.seconds_left)} left")
        if price is not None:
            coming = (
                f", {self.seconds_left * price / 3600:.2f} to come" if self.seconds_left is not None else ""
            )
            said.append(f"{self.seconds * price / 3600:.2f} spent{coming}")
        return said


def duration(seconds: float) -> str:
    """2:05, 1:02:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
