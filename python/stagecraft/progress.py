"""What a person sees while a stage trains: a bar on a terminal, plain lines elsewhere, and progress.jsonl."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stagecraft.files import write_text
from stagecraft.pace import Pace, price_an_hour

# Seconds between plain lines: the first ones soon, to see that it lives, then rare enough to read after a night.
FIRST_PAUSE, LONGEST_PAUSE, GROWTH = 15.0, 60.0, 1.25
SHOWN = {
    "loss": "loss",
    "eval_loss": "eval loss",
    "learning_rate": "lr",
    "rewards/accuracies": "preferred",
    "accuracy": "accuracy",
    "mean_token_accuracy": "token accuracy",
}
BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"


class Progress(TrainerCallback):
    """Shows step, loss, pace, time left and money; keeps one JSON line a log in `path`.

    `show`: whether this process speaks. `tokens`: of an epoch, without padding.
    """

    def __init__(self, name: str, path: Path, show: bool, tokens: int | None = None) -> None:
        self.name, self.path, self.show, self.tokens = name, path, show, tokens
        self.price = price_an_hour()
        self.bar: tqdm | None = None
        self.figures: dict[str, str] = {}
        self.pause, self.line_at, self.line_step = 0.0, 0.0, -1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.show:
            return
        before = cut(self.path, state.global_step, state.max_steps)
        self.pace = Pace(state.global_step, state.max_steps, state.epoch or 0.0, self.tokens, before)
        self.line_at = time.monotonic()
        if sys.stderr.isatty():
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc=self.name,
                dynamic_ncols=True,
                bar_format=BAR,
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.show:
            return
        self.pace.reached(state.global_step, state.epoch or 0.0)
        if self.bar is not None:
            self.bar.set_postfix_str(self._figures(), refresh=False)
            self.bar.update(state.global_step - self.bar.n)
        # No line before the first loss is known: the first log comes right after the first step.
        if self.figures and time.monotonic() - self.line_at >= self.pause:
            self._line(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not self.show or not logs:
            return
        record = {"time": round(time.time(), 1), "step": state.global_step, "steps": state.max_steps, **logs}
        record |= {"lr": logs.get("learning_rate"), "seconds": round(self.pace.seconds, 1)}
        for name in ("tokens_per_second", "seconds_left"):
            if getattr(self.pace, name) is not None:
                record[name] = round(getattr(self.pace, name), 1)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
        first = not self.figures
        self.figures |= {SHOWN[key]: f"{float(logs[key]):.3g}" for key in SHOWN if key in logs}
        if first and self.figures:
            self._line(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.show:
            return
        if self.line_step != state.global_step:
            self._line(state)
        if self.bar is not None:
            self.bar.close()

    def _figures(self) -> str:
        return ", ".join(
            [*(f"{name} {value}" for name, value in self.figures.items()), *self.pace.words(self.price)]
        )

    def _line(self, state: TrainerState) -> None:
        """One plain line; where the terminal has the bar it goes to the log alone."""
        self.line_at, self.line_step = time.monotonic(), state.global_step
        self.pause = min(LONGEST_PAUSE, max(FIRST_PAUSE, self.pause * GROWTH))
        line = f"{self.name} step {state.global_step}/{state.max_steps}: {self._figures()}".rstrip(": ")
        if self.bar is None:
            print(line, flush=True)
            return
        log = getattr(sys.stdout, "log", None)  # run.tee's
        if log is not None:
            log.write(line + "\n")
            log.flush()


def cut(path: Path, step: int, steps: int) -> float:
    """Take away lines of steps after `step`, which will be made again; the training seconds so far, theirs included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept, seconds, found = [], 0.0, False
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
            found, seconds = True, max(seconds, entry.get("seconds", 0.0))
            if entry["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError, AttributeError):  # half a line, from a kill
            continue
    if found:  # a line of its own keeps the seconds of the steps that went
        start = {"time": round(time.time(), 1), "step": step, "steps": steps, "seconds": seconds}
        write_text(path, "".join(line + "\n" for line in [*kept, json.dumps(start)]))
    return seconds
