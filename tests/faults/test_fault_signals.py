"""SIGTERM, SIGINT, SIGHUP: a checkpoint at the end of the step, exit status 75, and the same weights in the end."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

import running
from running import SFT, Ended, complete, manifest, rows, weights

pytest_plugins = ["stages"]
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def preempted(folder: Path, flags: list[object], number: signal.Signals, step: int = 5) -> Ended:
    """A start that gets the signal in a step after `step`."""
    started = running.start(SFT, folder, flags)
    started.stop_at(step)
    started.send(number)
    started.go_on()
    return started.wait()


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_the_step_is_finished_and_kept_and_the_next_start_goes_on(
    sft: list[object], straight: Path, tmp_path: Path, number: signal.Signals
) -> None:
    folder = tmp_path / "run"
    done = preempted(folder, sft, number)
    assert done.status == 75 and "Traceback" not in done.said, done
    step = complete(folder)[-1]
    assert 5 <= step <= 8 and rows(folder)[-1]["step"] == step
    assert (
        number.name in done.lines[-1]
        and f"step {step} of 16" in done.lines[-1]
        and "goes on" in done.lines[-1]
    )
    assert not (folder / "TRAINED").exists()
    done = running.run(SFT, folder, sft)
    assert done.status == 0 and f"resuming from {folder}/checkpoints/checkpoint-{step}" in done.lines, done
    assert weights(folder) == weights(straight)
    [restart] = manifest(folder)["restarts"]
    assert restart["step"] == step and number.name in restart["reason"]


@pytest.mark.long
def test_preempted_five_times_it_ends_in_the_same_weights(
    sft: list[object], straight: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    for step in (1, 4, 7, 10, 13):
        done = preempted(folder, sft, signal.SIGTERM, step)
        assert done.status == 75, done
    assert running.run(SFT, folder, sft).status == 0
    assert weights(folder) == weights(straight) and len(manifest(folder)["restarts"]) == 5


def test_without_checkpoints_asked_for_the_step_is_kept_all_the_same(
    sft: list[object], straight: Path, tmp_path: Path
) -> None:
    """The sample recipes save none: --save_strategy no."""
    folder, flags = tmp_path / "run", [*sft, "--save_strategy", "no"]
    done = preempted(folder, flags, signal.SIGTERM)
    assert done.status == 75 and len(complete(folder)) == 1, done
    assert running.run(SFT, folder, flags).status == 0
    assert weights(folder) == weights(straight)


def test_before_the_first_step_it_ends_at_once(sft: list[object], straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    started = running.start(SFT, folder, sft)
    started.until(lambda: (folder / "logs" / "train.log").exists())
    began = time.monotonic()
    started.send(signal.SIGTERM)
    done = started.wait()
    assert time.monotonic() - began < 5
    assert done.status == 75 and "Traceback" not in done.said and "before the first step" in done.lines[-1], (
        done
    )
    assert rows(folder) == [] and complete(folder) == []
    assert running.run(SFT, folder, sft).status == 0
    assert weights(folder) == weights(straight)


def test_under_nohup_a_closed_terminal_changes_nothing(
    sft: list[object], straight: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    started = running.start(SFT, folder, sft, ignore=[signal.SIGHUP])
    started.stop_at(5)
    started.send(signal.SIGHUP)
    started.go_on()
    done = started.wait()
    assert done.status == 0 and weights(folder) == weights(straight), done


@pytest.mark.parametrize(("pause", "status"), [(0.0, 75), (1.2, -signal.SIGTERM)], ids=["same", "second"])
def test_a_second_signal_ends_at_once_one_in_the_same_second_is_the_first(
    sft: list[object], straight: Path, tmp_path: Path, pause: float, status: int
) -> None:
    """An epoch is a step here, half a second long; held in the middle of it, it lasts as long as the test needs."""
    folder, flags = (
        tmp_path / "run",
        [*sft, "--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 72],
    )
    started = running.start(SFT, folder, flags)
    started.stop_at(1)
    started.go_on()
    started.send(signal.SIGTERM)
    started.until(lambda: "once more ends at once" in started.said())
    started.hold()
    time.sleep(pause)
    started.send(signal.SIGTERM)
    began = time.monotonic()
    started.go_on()
    done = started.wait()
    assert done.status == status, done
    kept = complete(folder)
    assert len(kept) == (1 if status == 75 else 0), kept
    assert status == 75 or time.monotonic() - began < 1


def test_when_the_last_step_is_done_the_run_is_finished_rather_than_stopped(
    sft: list[object], straight: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    started = running.start(SFT, folder, sft)
    started.until(lambda: (folder / ".adapter.tmp").exists())
    started.send(signal.SIGTERM)
    assert started.wait().status == 0
    assert (folder / "TRAINED").exists() and weights(folder) == weights(straight)


# ---- Through launch.sh: what a scheduler signals is the script that it started


@pytest.mark.parametrize("to", [pytest.param("script", marks=pytest.mark.long), "group"])
def test_through_launch_sh(sft: list[object], straight: Path, tmp_path: Path, to: str) -> None:
    folder = tmp_path / "run"
    started = running.launch(SFT, folder, sft)
    started.until(lambda: rows(folder))
    os.kill(started.pid, signal.SIGTERM) if to == "script" else started.send(signal.SIGTERM)
    done = started.wait()
    assert done.status == 75 and done.said.count("goes on from there") == 1, done
    assert running.run(SFT, folder, sft).status == 0
    assert weights(folder) == weights(straight)
