"""Two starts at once, and losses and gradients that are no numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

import running
from running import PT, SFT, complete, losses, rows, weights

pytest_plugins = ["stages"]


def test_a_second_start_is_refused_and_disturbs_nothing(
    sft: list[object], straight: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    first = running.start(SFT, folder, sft)
    first.stop_at(4)
    for flags in ([], ["--overwrite_output_dir"], ["--resume_from_checkpoint", "False"]):
        second = running.run(SFT, folder, [*sft, *flags])
        assert second.status == 2, second
        assert second.lines[-1].startswith(f"--output_dir {folder}: in use by process {first.pid} since 20")
    first.go_on()
    assert first.wait().status == 0
    assert weights(folder) == weights(straight) and losses(folder) == losses(straight)


def test_of_three_at_the_same_moment_one_runs(sft: list[object], straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ended = [started.wait() for started in [running.start(SFT, folder, sft) for _ in range(3)]]
    assert sorted(done.status for done in ended) == [0, 2, 2], ended
    assert weights(folder) == weights(straight)


@pytest.mark.long
def test_two_recipes_run_side_by_side(sft: list[object], straight: Path, tmp_path: Path) -> None:
    both = [running.start(SFT, tmp_path / name, sft) for name in ("one", "two")]
    assert [started.wait().status for started in both] == [0, 0]
    assert weights(tmp_path / "one") == weights(tmp_path / "two") == weights(straight)


def test_a_lock_of_a_killed_process_holds_nobody_up(killed: Path) -> None:
    """Every test of a resume shows it; here, that the file it leaves is there to be misread."""
    assert (killed / ".lock").read_text().startswith("process ")


def test_gradients_that_are_no_numbers_for_five_steps_stop_the_run(
    sft: list[object], straight: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    done = running.run(SFT, folder, sft, STAGECRAFT_FAULT="norm@4:5")
    assert done.status == 1 and "Traceback" not in done.said, done
    at = next(i for i, line in enumerate(done.lines) if "step 8" in line)
    assert (
        "the gradient norm has been for 5 steps not a finite number; checkpoint-6 is kept" in done.lines[at]
    )
    assert len(done.lines[at + 1 :]) == 8, done  # the step's rows
    few = running.run(SFT, tmp_path / "few", sft, STAGECRAFT_FAULT="norm@4:4")
    assert few.status == 0, few
    assert weights(tmp_path / "few") == weights(straight)  # the norm was told wrong, the gradients were not


@pytest.mark.parametrize("script", [SFT, PT])
def test_a_loss_that_is_no_number_stops_the_run_with_the_rows_of_the_step(
    script: str, sft: list[object], pt: list[object], straight: Path, tmp_path: Path
) -> None:
    folder, flags = tmp_path / "run", sft if script == SFT else pt
    done = running.run(script, folder, flags, STAGECRAFT_FAULT="nan@8")
    assert done.status == 1 and "Traceback" not in done.said, done
    at = next(i for i, line in enumerate(done.lines) if "step 8" in line)
    assert "loss" in done.lines[at] and "checkpoint-6" in done.lines[at], done
    told = done.lines[at + 1 :]
    assert len(told) == 8 and all(line.startswith("  ") and line.strip() for line in told), done
    assert complete(folder) == [3, 6] and not (folder / "TRAINED").exists()
    assert rows(folder)[-1]["step"] <= 8
    done = running.run(script, folder, flags)
    assert done.status == 0 and f"resuming from {folder}/checkpoints/checkpoint-6" in done.lines, done
    if script == SFT:
        assert weights(folder) == weights(straight)
        [restart] = running.manifest(folder)["restarts"]
        assert "loss" in restart["reason"] and restart["step"] == 6
