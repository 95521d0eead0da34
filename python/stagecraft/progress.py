"""What a person sees while a stage trains: a bar on a terminal, plain lines elsewhere, and progress.jsonl."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SECONDS_BETWEEN_LINES = 15.0  # without a terminal: often enough to see life, rare enough to read
SHOWN = ("loss", "eval_loss", "learning_rate", "rewards/accuracies", "accuracy", "mean_token_accuracy")


class Progress(TrainerCallback):
    """Shows step, loss, learning rate and time left; keeps one JSON line a log in `path`."""

    def __init__(self, name: str, path: Path, show: bool) -> None:
        self.name, self.path, self.show = name, path, show
        self.bar: tqdm | None = None
        self.last: dict[str, Any] = {}
        self.began = self.line_at = 0.0
        self.first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.began, self.line_at, self.first_step = time.time(), time.time(), state.global_step
        if self.show:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc=self.name,
                unit="step",
                dynamic_ncols=True,
                disable=not sys.stderr.isatty(),
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n if not self.bar.disable else 0)

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
        record["lr"] = logs.get("learning_rate")
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
        self.last |= {key: float(logs[key]) for key in SHOWN if key in logs}
        figures = {key.split("/")[-1]: f"{value:.3g}" for key, value in self.last.items()}
        if self.bar is not None and not self.bar.disable:
            self.bar.set_postfix(figures)
        elif time.time() - self.line_at >= SECONDS_BETWEEN_LINES:
            self.line_at = time.time()
            print(
                f"{self.name} {self._position(state)} " + " ".join(f"{k} {v}" for k, v in figures.items()),
                flush=True,
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.close()

    def _position(self, state: TrainerState) -> str:
        done = max(1, state.global_step - self.first_step)
        left = (time.time() - self.began) / done * (state.max_steps - state.global_step)
        minutes, seconds = divmod(round(left), 60)
        return f"step {state.global_step}/{state.max_steps} ({minutes}:{seconds:02d} left)"
