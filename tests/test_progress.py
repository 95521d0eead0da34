"""What is seen of a training: figures, plain lines, the bar, progress.jsonl over restarts."""

from __future__ import annotations

import json
import os
import pty
import termios
import time
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState

from stagecraft import pace, progress
from stagecraft.errors import UserError
from stagecraft.pace import Pace
from stagecraft.progress import Progress


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    monkeypatch.setattr(Pace.__init__, "__defaults__", (0.0, clock))
    monkeypatch.delenv("PRICE", raising=False)
    return clock


class Run:
    """A training as the trainer tells of it."""

    def __init__(
        self, path: Path, clock: Clock, steps: int, step: int = 0, tokens: int | None = 1000
    ) -> None:
        self.progress, self.clock = Progress("sft", path, show=True, tokens=tokens), clock
        self.state = TrainerState(global_step=step, max_steps=steps, epoch=step / 10)
        self.progress.on_train_begin(None, self.state, TrainerControl())

    def step(self, seconds: float, **logs: float) -> None:
        self.clock.now += seconds
        self.state.global_step += 1
        self.state.epoch = self.state.global_step / 10
        self.progress.on_step_end(None, self.state, TrainerControl())
        if logs:
            self.progress.on_log(None, self.state, TrainerControl(), logs)

    def end(self) -> None:
        self.progress.on_train_end(None, self.state, TrainerControl())


def entries(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# Pace


def test_time_left_and_tokens_leave_the_first_step_out():
    clock = Clock()
    run = Pace(0, 11, 0.0, 1000, clock=clock)
    assert (run.seconds_left, run.tokens_per_second, run.words(None)) == (None, None, [])
    clock.now += 30  # the first step warms up
    run.reached(1, 0.1)
    assert run.seconds_left == pytest.approx(300)
    clock.now += 4
    run.reached(2, 0.2)
    clock.now += 4
    run.reached(3, 0.3)
    assert run.seconds_left == pytest.approx(8 * 4)
    assert run.tokens_per_second == pytest.approx(2 * 100 / 8)
    assert run.seconds == 38
    assert run.words(None) == ["25 tokens/s", "0:32 left"]
    assert run.words(36.0) == ["25 tokens/s", "0:32 left", "0.38 spent, 0.32 to come"]


def test_a_resumed_run_counts_its_own_steps_and_all_seconds():
    clock = Clock()
    run = Pace(100, 104, 10.0, 1000, before=3600, clock=clock)
    for step in (101, 102):
        clock.now += 10
        run.reached(step, step / 10)
    assert run.seconds_left == pytest.approx(20)
    assert run.seconds == 3620
    assert run.words(1.0)[-1] == "1.01 spent, 0.01 to come"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (725, "12:05"), (3600 * 30 + 61, "30:01:01")]
)
def test_durations(seconds: float, text: str):
    assert pace.duration(seconds) == text


@pytest.mark.parametrize("text", ["2,50", "cheap", "-1", "1e3", "nan", "$2", "٣"])
def test_a_price_that_is_no_number_is_told(text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PRICE", text)
    with pytest.raises(UserError) as caught:
        Progress("sft", tmp_path / "progress.jsonl", show=True)
    assert str(caught.value).startswith(f'PRICE="{text}": must be a number')


@pytest.mark.parametrize(("text", "price"), [("", None), ("18", 18.0), ("2.49", 2.49)])
def test_prices(text: str, price: float | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PRICE", text)
    assert pace.price_an_hour() == price


# Lines without a terminal


def test_plain_lines_come_soon_then_rarely_and_always_the_last(tmp_path: Path, clock: Clock, capsys):
    run = Run(tmp_path / "progress.jsonl", clock, steps=1001)
    times = []
    for step in range(1, 1002):
        run.step(1.0, **({"loss": 2.0} if step == 1 or step % 50 == 0 else {}))
        if capsys.readouterr().out:
            times.append(step)
    run.end()
    pauses = [after - before for before, after in zip(times, times[1:], strict=False)]
    assert times[0] == 1
    assert pauses[0] == 15
    assert all(before <= after for before, after in zip(pauses, pauses[1:], strict=False))
    assert max(pauses) == 60 and 15 <= len(times) <= 30
    out, err = capsys.readouterr()
    assert out == "sft step 1001/1001: loss 2, 100 tokens/s, 0:00 left\n"
    assert err == ""


def test_a_line_has_loss_pace_time_and_money(tmp_path: Path, clock: Clock, capsys, monkeypatch):
    monkeypatch.setenv("PRICE", "36")
    run = Run(tmp_path / "progress.jsonl", clock, steps=100)
    run.step(5, loss=2.345678, learning_rate=1e-4)
    run.step(10)
    run.step(10)
    assert capsys.readouterr().out.splitlines() == [
        "sft step 1/100: loss 2.35, lr 0.0001, 20 tokens/s, 8:15 left, 0.05 spent, 4.95 to come",
        "sft step 3/100: loss 2.35, lr 0.0001, 10 tokens/s, 16:10 left, 0.25 spent, 9.70 to come",
    ]


def test_a_process_that_is_not_the_first_says_and_writes_nothing(tmp_path: Path, clock: Clock, capsys):
    silent = Progress("sft", tmp_path / "logs/progress.jsonl", show=False)
    state = TrainerState(global_step=1, max_steps=2, epoch=0.1)
    for call in (silent.on_train_begin, silent.on_step_end, silent.on_train_end):
        call(None, state, TrainerControl())
    silent.on_log(None, state, TrainerControl(), {"loss": 1.0})
    assert capsys.readouterr() == ("", "")
    assert not (tmp_path / "logs").exists()


# The bar


def test_on_a_terminal_a_bar_and_the_lines_in_the_log(tmp_path: Path, clock: Clock, monkeypatch, capsys):
    from stagecraft import run as run_module

    monkeypatch.setenv("PRICE", "36")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 160))
    with open(theirs, "w") as screen:
        monkeypatch.setattr("sys.stderr", screen)
        with run_module.tee(tmp_path / "train.log"):
            run = Run(tmp_path / "progress.jsonl", clock, steps=100, step=90)
            run.step(5, loss=2.5)
            for _ in range(9):
                run.step(10)
            run.end()
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    first, last = shown.replace("\n", "").strip("\r").split("\r")[0], shown.strip().split("\r")[-1]
    assert " 90%" in first and "90/100" in first  # the step it goes on from
    assert last.startswith("sft 100%|") and last.endswith(
        "100/100, loss 2.5, 10 tokens/s, 0:00 left, 0.95 spent, 0.00 to come"
    )
    assert capsys.readouterr().out == ""
    lines = [line for line in (tmp_path / "train.log").read_text().splitlines() if "|" not in line]
    assert lines[0] == "sft step 91/100: loss 2.5, 20 tokens/s, 0:45 left, 0.05 spent, 0.45 to come"
    assert lines[-1].startswith("sft step 100/100: loss 2.5, ")


# progress.jsonl


def test_every_log_is_a_line_with_the_pace(tmp_path: Path, clock: Clock):
    path = tmp_path / "logs/progress.jsonl"
    run = Run(path, clock, steps=10)
    run.step(5, loss=2.0, learning_rate=1e-4)
    run.step(2)
    run.step(2, loss=1.0, learning_rate=1e-5)
    run.progress.on_log(None, run.state, TrainerControl(), {"eval_loss": 3.0})
    lines = entries(path)
    assert [line["step"] for line in lines] == [1, 3, 3]
    assert lines[1] | {"time": 0} == {
        "time": 0,
        "step": 3,
        "steps": 10,
        "loss": 1.0,
        "learning_rate": 1e-5,
        "lr": 1e-5,
        "seconds": 9.0,
        "tokens_per_second": 50.0,
        "seconds_left": 14.0,
    }


def test_without_known_tokens_none_are_told(tmp_path: Path, clock: Clock, capsys):
    run = Run(tmp_path / "progress.jsonl", clock, steps=10, tokens=None)
    run.step(5, loss=2.0)
    assert "tokens_per_second" not in entries(tmp_path / "progress.jsonl")[0]
    assert capsys.readouterr().out == "sft step 1/10: loss 2, 0:45 left\n"


def test_steps_after_the_checkpoint_go_and_their_seconds_stay(tmp_path: Path, clock: Clock):
    path = tmp_path / "progress.jsonl"
    first = Run(path, clock, steps=20)
    for step in range(1, 10):
        first.step(10, loss=float(step))
    with path.open("a") as stream:
        stream.write('{"step": 10, "lo')  # killed
    second = Run(path, clock, steps=20, step=6)
    assert [line["step"] for line in entries(path)] == [1, 2, 3, 4, 5, 6, 6]
    assert entries(path)[-1] | {"time": 0} == {"time": 0, "step": 6, "steps": 20, "seconds": 90.0}
    third = Run(path, clock, steps=20, step=6)  # killed before its first log
    second.step(5, loss=7.0)
    third.step(5, loss=7.0)
    assert entries(path)[-1]["seconds"] == 100.0
    assert [line["loss"] for line in entries(path) if "loss" in line] == [1, 2, 3, 4, 5, 6, 7, 7]


def test_a_start_from_the_beginning_leaves_no_old_steps(tmp_path: Path, clock: Clock):
    path = tmp_path / "progress.jsonl"
    path.write_text(
        '{"step": 3, "steps": 9, "loss": 1.0}\n{"step": 4, "steps": 9, "loss": 1.0, "seconds": 8}\n'
    )
    assert progress.cut(path, 0, 9) == 8
    assert [set(line) for line in entries(path)] == [{"time", "step", "steps", "seconds"}]
    assert not list(tmp_path.glob(".*"))  # no half-written file beside it
