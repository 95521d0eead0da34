"""A disk that fills up while a stage runs: told in one line, what was there stays whole, and with room it goes on."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import running
from running import MERGE, SFT, complete, losses, weights

pytest_plugins = ["stages"]
SIZE = 80_000_000  # the stage asks for 50 MB and what it will write, which is a few MB here


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 80 MB in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)],
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        pytest.skip(
            f"no file system of its own can be mounted here: {done.stderr.strip() or done.returncode}"
        )
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, but: int = 0) -> Path:
    """A file that takes all room, but for so many bytes."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as stream:
        while os.statvfs(disk).f_bavail > 0:
            try:
                stream.write(bytes(1 << 16))
            except OSError:
                break
        stream.truncate(stream.tell() - but)
    return filler


@pytest.mark.parametrize(
    "but", [0, pytest.param(50_000, marks=pytest.mark.long)], ids=["nothing left", "half a checkpoint left"]
)
def test_full_while_it_trains(
    disk: Path, sft: list[object], straight: Path, tmp_path: Path, but: int
) -> None:
    folder = disk / "run"
    started = running.start(SFT, folder, sft, log=tmp_path / "said")
    started.until(lambda: complete(folder) == [3])
    started.hold()
    filler = fill(disk, but)
    started.go_on()
    done = started.wait()
    assert done.status == 2 and "Traceback" not in done.said, done
    assert "full" in done.lines[-1] and str(folder) in done.lines[-1] and "checkpoint-3" in done.lines[-1], (
        done
    )
    assert complete(folder)[-1:] == [3] and not (folder / "TRAINED").exists()
    again = running.run(SFT, folder, sft, log=tmp_path / "again")  # still full: refused, and nothing is lost
    assert again.status == 2 and "Traceback" not in again.said and complete(folder)[-1:] == [3], again
    filler.unlink()
    done = running.run(SFT, folder, sft, log=tmp_path / "last")
    assert done.status == 0 and f"resuming from {folder}/checkpoints/checkpoint-3" in done.lines, done
    assert weights(folder) == weights(straight) and losses(folder) == losses(straight)


def test_full_while_it_writes_the_adapter(
    disk: Path, sft: list[object], straight: Path, tmp_path: Path
) -> None:
    folder = disk / "run"
    started = running.start(SFT, folder, sft, log=tmp_path / "said")
    started.until(lambda: complete(folder)[-1:] == [16])
    started.hold()
    filler = fill(disk)
    started.go_on()
    done = started.wait()
    assert done.status == 2 and "Traceback" not in done.said and "full" in done.lines[-1], done
    assert complete(folder)[-1] == 16 and not (folder / "TRAINED").exists()
    filler.unlink()
    done = running.run(SFT, folder, sft, log=tmp_path / "last")
    assert done.status == 0 and "resuming from" in done.said and weights(folder) == weights(straight), done


def test_full_while_it_stops_for_a_signal(
    disk: Path, sft: list[object], straight: Path, tmp_path: Path
) -> None:
    folder = disk / "run"
    started = running.start(SFT, folder, sft, log=tmp_path / "said")
    started.until(lambda: complete(folder)[-1:] == [6])
    started.hold()
    filler = fill(disk)
    started.send(signal.SIGTERM)
    started.go_on()
    done = started.wait()
    assert done.status in (2, 75) and "Traceback" not in done.said, done
    filler.unlink()
    assert running.run(SFT, folder, sft, log=tmp_path / "last").status == 0
    assert weights(folder) == weights(straight)


def test_full_from_the_start_nothing_is_begun(disk: Path, sft: list[object], tmp_path: Path) -> None:
    fill(disk, but=1_000_000)
    done = running.run(SFT, disk / "run", sft, log=tmp_path / "said")
    assert done.status == 2 and len(done.lines) == 1 and "MB are free" in done.lines[0], done


def test_merged_on_a_disk_that_is_full(disk: Path, sft: list[object], straight: Path, tmp_path: Path) -> None:
    folder = running.copy_of(straight, disk / "run")
    filler = fill(disk)
    done = running.run(MERGE, folder, [], log=tmp_path / "said")
    assert done.status == 2 and "Traceback" not in done.said, done
    assert not (folder / "DONE").exists() and weights(folder) == weights(straight)
    filler.unlink()
    done = running.run(MERGE, folder, [], log=tmp_path / "again")
    assert done.status == 0 and (folder / "DONE").exists(), done
