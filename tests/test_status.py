"""What `make status` and `make logs` say, while a stage runs and after it was cut off."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOBODY = 2**22 + 1  # no process has this number


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    """What the two targets need of the repository."""
    for name in ("Makefile", "recipes/tiny/recipe.mk", "python/show_status.py", "python/follow_log.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "python/stagecraft").symlink_to(ROOT / "python/stagecraft")
    return tmp_path


def status(kit: Path) -> tuple[dict[str, list[str]], list[str]]:
    """({stage: the cells of its line}, the lines below the table)."""
    done = subprocess.run(
        ["make", "status", f"PYTHON={sys.executable}"], cwd=kit, check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    head, *lines = done.stdout.splitlines()
    assert head.split() == ["stage", "state", "step", "loss", "left", "last", "change", "on", "disk"]
    places = [head.index(name) for name in ("stage", "state")]
    table = [line for line in lines if line[places[1] - 1 : places[1]] in (" ", "")]
    notes = [line for line in lines if line not in table]
    return {line.split()[0]: [c.strip() for c in line.split("  ") if c.strip()][1:] for line in table}, notes


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value) + "\n")


def lock(folder: Path, process: int, since: float | None = None) -> None:
    when = datetime.datetime.fromtimestamp(since or time.time()).astimezone().isoformat(timespec="seconds")
    write(folder / ".lock", f"process {process} since {when}")


def test_before_anything_ran(kit: Path):
    write(kit / "outputs-pt/tiny/.inputs.tmp", {})  # Make's note alone is no start
    assert status(kit) == (
        {stage: ["not started"] for stage in ("base", "sft", "rm", "dpo", "eval")}
        | {"pt": ["not started", time.strftime("%Y-%m-%d %H:%M"), "0 kB"]},
        [],
    )


def test_a_running_stage_has_steps_loss_and_time_left(kit: Path):
    folder = kit / "outputs-sft/tiny"
    lock(folder, os.getpid())  # pytest is a Python that lives
    step = {"time": time.time() - 20, "step": 5, "steps": 48, "loss": 0.25, "seconds_left": 3745.0}
    evaluation = json.dumps({"step": 6, "eval_loss": 2.0, "steps": 48})
    write(folder / "logs/progress.jsonl", json.dumps(step) + "\n" + evaluation + '\n{"step": 7, "ste')
    write(folder / "checkpoints/restarts.json", [{"reason": "SIGTERM"}, {"reason": "killed"}])
    cells = status(kit)[0]["sft"]
    assert cells[:3] == ["running, 2 restarts", "6/48", "0.25"]
    assert cells[3] in ("1:02:05", "1:02:04", "1:02:03")


def test_a_number_that_another_process_got_since_is_not_the_run(kit: Path):
    folder = kit / "outputs-sft/tiny"
    write(folder / "logs/train.log", "x\n")
    lock(folder, os.getpid(), since=time.time() - 86400 * 30)
    assert status(kit)[0]["sft"][0] == "unfinished"
    lock(folder, NOBODY)
    assert status(kit)[0]["sft"][0] == "unfinished"


def test_where_a_stage_was_left(kit: Path):
    pt, sft, rm, dpo = (kit / f"outputs-{stage}/tiny" for stage in ("pt", "sft", "rm", "dpo"))
    for marker in (pt / "TRAINED", pt / "DONE", sft / "TRAINED"):
        write(marker, "x\n")
    write(pt / "run.json", {"restarts": [{"reason": "SIGTERM"}]})
    write(pt / "logs/progress.jsonl", {"step": 48, "steps": 48, "loss": 1.5, "seconds_left": 0.0})
    for step in (8, 16):
        write(rm / f"checkpoints/checkpoint-{step}/COMPLETE.json", {})
    write(rm / "checkpoints/checkpoint-24/model.safetensors", "half")
    write(rm / "checkpoints/stopped.json", {"reason": "SIGTERM"})
    write(dpo / "checkpoints/stopped.json", {"reason": "step 7: the loss is not a finite number"})
    write(kit / "outputs-eval/tiny/logs/eval.log", "Traceback (most recent call last):\n  x\nKeyError: 'y'\n")
    table, notes = status(kit)
    assert table["pt"][:3] == ["done, 1 restart", "48/48", "1.5"]
    assert table["sft"][0] == "trained, not merged"
    assert table["rm"][0] == "interrupted at step 16"
    assert table["dpo"][0] == "failed"
    assert table["eval"][0] == "failed"
    assert notes == ["dpo: step 7: the loss is not a finite number", "eval: KeyError: 'y'"]
    lock(sft, os.getpid())
    assert status(kit)[0]["sft"][0] == "merging"


def test_a_run_without_a_lock_counts_as_running_while_its_steps_are_fresh(kit: Path):
    log = kit / "outputs-pt/tiny/logs/progress.jsonl"
    for age, state in ((100, "running"), (140, "unfinished")):
        write(log, {"time": time.time() - age, "step": 1, "steps": 2})
        assert status(kit)[0]["pt"][:2] == [state, "1/2"]


def test_status_of_no_recipe(kit: Path):
    for script in ("show_status", "follow_log"):
        done = subprocess.run(
            [sys.executable, f"python/{script}.py", "--recipe", "none"],
            cwd=kit,
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (2, "--recipe none: not in recipes/ (there: tiny)\n")


# make logs


class Terminal:
    """A command on a terminal of its own, as in a shell's window."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.process, self.terminal = pty.fork()
        if self.process == 0:
            os.chdir(folder)
            os.execvp(words[0], words)
        self.text = ""
        os.set_blocking(self.terminal, False)

    def read(self) -> str:
        """All that was printed so far."""
        with contextlib.suppress(OSError):  # nothing new, or the end
            self.text += os.read(self.terminal, 65536).decode().replace("\r", "")
        return self.text

    def wait_for(self, words: str) -> None:
        wait_until(lambda: words in self.read())

    def close(self) -> None:
        os.close(self.terminal)


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def follow(kit: Path) -> Iterator[Callable[..., Terminal]]:
    """follow(words of make) -> make logs on a terminal."""
    started: list[Terminal] = []

    def start(*words: str) -> Terminal:
        started.append(Terminal(kit, "make", "logs", f"PYTHON={sys.executable}", *words))
        return started[-1]

    yield start
    for terminal in started:
        terminal.close()


def test_logs_follow_the_newest_stage_until_ctrl_c(kit: Path, follow: Callable[..., Terminal]):
    first, second = (kit / f"outputs-{stage}/tiny/logs/train.log" for stage in ("pt", "sft"))
    write(first, "".join(f"line {n}\n" for n in range(2000)))
    terminal = follow()
    terminal.wait_for("line 1999\n")
    assert terminal.text.splitlines()[0] == "== outputs-pt/tiny/logs/train.log"
    assert terminal.text.splitlines()[1].startswith("line 1") and "line 1500\n" not in terminal.text
    with first.open("a") as stream:
        stream.write("and on\n")
    terminal.wait_for("and on\n")
    write(second, "sft begins\n")
    os.utime(second, (time.time() + 5,) * 2)
    terminal.wait_for("== outputs-sft/tiny/logs/train.log\nsft begins\n")
    os.write(terminal.terminal, b"\x03")
    assert os.waitstatus_to_exitcode(os.waitpid(terminal.process, 0)[1]) == 0
    assert "Error" not in terminal.read() and "Interrupt" not in terminal.read()


def test_logs_of_one_stage(kit: Path, follow: Callable[..., Terminal]):
    for age, stage in ((60, "pt"), (0, "sft")):
        path = kit / f"outputs-{stage}/tiny/logs/train.log"
        write(path, f"{stage} speaks\n")
        os.utime(path, (time.time() - age,) * 2)
    terminal = follow("STAGE=pt")
    terminal.wait_for("pt speaks\n")
    os.kill(terminal.process, signal.SIGTERM)
    os.waitpid(terminal.process, 0)
    assert "sft" not in terminal.read()
    lock(kit / "outputs-pt/tiny", os.getpid())  # one that runs comes first
    terminal = follow()
    terminal.wait_for("pt speaks\n")
    os.write(terminal.terminal, b"\x03")
    assert os.waitstatus_to_exitcode(os.waitpid(terminal.process, 0)[1]) == 0


def test_logs_before_any_run(kit: Path):
    command = ["make", "logs", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=kit, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "no outputs-*/tiny/logs yet: run a stage first"
