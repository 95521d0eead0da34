"""Two processes that train together: killed, preempted, out of memory, one of them gone."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

import running
from running import SFT, Ended, complete, losses, rows, weights

pytest_plugins = ["stages"]


@pytest.fixture(scope="module")
def two(sft: list[object]) -> list[object]:
    return [*sft, "--per_device_train_batch_size", 4]


@pytest.fixture(scope="module")
def both(two: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run by two ranks to which nothing happened."""
    folder = tmp_path_factory.mktemp("both") / "run"
    done = running.launch(SFT, folder, two, NPROC="2").wait()
    assert done.status == 0 and "x 2 processes" in done.said, done
    return folder


def of_this_run(folder: Path) -> list[int]:
    """Every process whose command names the folder: launcher, supervisor, torchrun, ranks."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def ranks(folder: Path) -> list[int]:
    """The training processes themselves, the first rank first."""
    found = {}
    for process in of_this_run(folder):
        with contextlib.suppress(OSError):
            variables = (Path("/proc") / str(process) / "environ").read_bytes().split(b"\0")
            rank = [v for v in variables if v.startswith(b"RANK=")]
            if rank:
                found[rank[0]] = process
    return [found[name] for name in sorted(found)]


def goes_on(folder: Path, flags: list[object], both: Path) -> Ended:
    done = running.launch(SFT, folder, flags, NPROC="2").wait()
    assert done.status == 0, done
    assert weights(folder) == weights(both) and losses(folder) == losses(both)
    return done


def test_preempted_both_stop_after_the_same_step_and_go_on(
    two: list[object], both: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    started = running.launch(SFT, folder, two, NPROC="2")
    started.until(lambda: len(rows(folder)) >= 4)
    os.kill(started.pid, signal.SIGTERM)
    done = started.wait()
    assert done.status == 75 and done.said.count("goes on from there") == 1, done
    assert "Traceback" not in done.said and of_this_run(folder) == [], done
    step = complete(folder)[-1]
    assert f"resuming from {folder}/checkpoints/checkpoint-{step}" in goes_on(folder, two, both).said


@pytest.mark.long
def test_the_whole_group_killed_leaves_no_rank_and_goes_on(
    two: list[object], both: Path, tmp_path: Path
) -> None:
    """torchrun starts its ranks in sessions of their own: a kill of the group does not reach them."""
    folder = tmp_path / "run"
    started = running.launch(SFT, folder, two, NPROC="2")
    started.until(lambda: complete(folder)[-1:] == [9])
    assert len(ranks(folder)) == 2
    started.send(signal.SIGKILL)
    last = time.monotonic() + 5
    while left := of_this_run(folder):
        assert time.monotonic() < last, f"still there: {left}"
        time.sleep(0.02)
    started.wait()
    goes_on(folder, two, both)


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_killed_ends_the_other_and_goes_on(
    two: list[object], both: Path, tmp_path: Path, rank: int
) -> None:
    folder = tmp_path / "run"
    started = running.launch(SFT, folder, two, NPROC="2")
    started.until(lambda: complete(folder)[-1:] == [6])
    os.kill(ranks(folder)[rank], signal.SIGKILL)
    done = started.wait()
    assert done.status not in (0, 2, 75, 76) and of_this_run(folder) == [], done
    goes_on(folder, two, both)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_from_the_terminal_reaches_both_once(
    two: list[object], both: Path, tmp_path: Path, number: signal.Signals
) -> None:
    folder = tmp_path / "run"
    started = running.launch(SFT, folder, two, NPROC="2")
    started.until(lambda: len(rows(folder)) >= 4)
    started.send(number)
    done = started.wait()
    assert done.status == 75 and "Traceback" not in done.said, done
    assert done.said.count("stopped by SIG") == 1 and "goes on from there" in done.lines[-1]
    goes_on(folder, two, both)


@pytest.mark.long
def test_out_of_memory_is_started_again_with_half(two: list[object], tmp_path: Path) -> None:
    flags = [*two, "--lora_dropout", 0]
    whole = running.launch(SFT, tmp_path / "whole", flags, NPROC="2").wait()
    assert whole.status == 0, whole
    folder = tmp_path / "run"
    done = running.launch(SFT, folder, flags, NPROC="2", STAGECRAFT_FAULT="oom@8:4").wait()
    assert done.status == 0 and "Traceback" not in done.said, done
    assert "global batch 8 = 2 a device x 2 accumulated x 2 processes" in done.lines, done
    assert losses(folder) == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


@pytest.mark.long
def test_out_of_memory_in_one_rank_alone_halves_both(two: list[object], tmp_path: Path) -> None:
    """The rule on GPUs: the rank with the longest rows. The first rank waits for it in a collective, and hears nothing."""
    alone = tmp_path / "alone"
    alone.mkdir()
    text = "import os\nif os.environ.get('RANK') == '0':\n    del os.environ['STAGECRAFT_FAULT']\n"
    (alone / "sitecustomize.py").write_text(text)
    fault = {"STAGECRAFT_FAULT": "oom@8:4", "PYTHONPATH": str(alone)}
    flags = [*two, "--lora_dropout", 0]
    done = running.launch(SFT, tmp_path / "run", flags, NPROC="2", **fault).wait()
    assert done.status == 0, done
    assert "global batch 8 = 2 a device x 2 accumulated x 2 processes" in done.lines, done


@pytest.mark.long
def test_a_loss_that_is_no_number_ends_both(two: list[object], both: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = running.launch(SFT, folder, two, NPROC="2", STAGECRAFT_FAULT="nan@8").wait()
    assert done.status == 1 and "step 8" in done.said and complete(folder) == [3, 6], done
    goes_on(folder, two, both)


@pytest.mark.long
def test_another_number_of_processes_is_another_run(
    two: list[object], sft: list[object], tmp_path: Path
) -> None:
    """Global batch and rows of a step are the same, but the order of sums is not; it is refused with that difference."""
    folder = tmp_path / "run"
    started = running.launch(SFT, folder, two, NPROC="2")
    started.until(lambda: complete(folder)[-1:] == [6])
    os.kill(started.pid, signal.SIGTERM)
    assert started.wait().status == 75
    done = running.run(SFT, folder, sft)
    assert done.status == 2 and "  processes: 2 -> 1" in done.lines, done


@pytest.mark.long
def test_a_damaged_checkpoint_is_decided_on_by_one_for_both(
    two: list[object], both: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    started = running.launch(SFT, folder, two, NPROC="2")
    started.until(lambda: complete(folder)[-1:] == [9])
    started.send(signal.SIGKILL)
    started.wait()
    (folder / "checkpoints" / "checkpoint-9" / "optimizer.pt").write_bytes(b"")
    said = goes_on(folder, two, both).said
    assert "checkpoint-9.damaged" in said and f"resuming from {folder}/checkpoints/checkpoint-6" in said
