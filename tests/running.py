"""Stages as processes of their own that tests signal, stop and kill; each start costs a second instead of six.

A fork server has imported the libraries once; a stage is a fork of it in a session of its own, so that signals,
locks, exit statuses and SIGKILL are real. `launch` starts scripts/launch.sh instead, as a user does.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / "python"
LIBRARIES = [
    "torch",
    "datasets",
    "peft",
    "accelerate",
    "transformers.trainer",
    "transformers.data.data_collator",
    "transformers.models.auto.modeling_auto",
    "transformers.models.qwen3.modeling_qwen3",
]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(LIBRARIES)
WEIGHTS = ("adapter/adapter_model.safetensors", "model/model.safetensors")
PATIENCE = 120.0  # seconds until a wait is a failure; alone on two cores nothing here needs more than fifteen


# ---- The stages that the tests run, and their flags

SFT = "supervised_finetuning.py"
PT = "pretraining.py"
MERGE = "merge_lora.py"
STEPS, EPOCH, SAVE = 16, 9, 3  # 72 rows, 8 a step: the second epoch begins with step 10
# fp32, so that equal means equal to the bit; with dropout, so that random numbers have to be resumed, too.
SHORT = [
    "--max_steps",
    STEPS,
    "--per_device_train_batch_size",
    8,
    "--learning_rate",
    "5e-3",
    "--logging_steps",
    1,
]
SHORT += [
    "--save_strategy",
    "steps",
    "--save_steps",
    SAVE,
    "--save_total_limit",
    2,
    "--lr_scheduler_type",
    "cosine",
]
SHORT += ["--bf16", "false", "--gradient_checkpointing", "false", "--report_to", "none"]

# ---- Starting, watching, ending

STARTED: list[Started] = []


def kill_what_is_left() -> None:
    """End every stage that a test has started and, because it failed, not waited for."""
    while STARTED:
        started = STARTED.pop()
        if started.is_alive():
            started.send(signal.SIGKILL)
            started.wait(10)


class Ended:
    """What a stage left: its exit status (negative: the signal that ended it) and all it said."""

    def __init__(self, status: int, said: str) -> None:
        self.status, self.said = status, said

    def __repr__(self) -> str:  # what pytest shows where an assertion on it fails
        return f"exit status {self.status}\n{self.said[-3000:]}"

    @property
    def lines(self) -> list[str]:
        return self.said.splitlines()


class Started:
    """A stage on its way, in a session of its own."""

    def __init__(self, folder: Path, log: Path, process: Any) -> None:
        self.folder, self.log, self.process = folder, log, process
        self.pid: int = process.pid
        self.began = time.time()
        STARTED.append(self)

    def wait(self, seconds: float = PATIENCE) -> Ended:
        """Wait for its end; fails, and kills it, where it does not come."""
        if isinstance(self.process, subprocess.Popen):
            try:
                status = self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                status = None
        else:
            self.process.join(seconds)
            status = self.process.exitcode
        if status is None:
            os.killpg(self.pid, signal.SIGKILL)
            raise AssertionError(f"still running after {seconds:.0f} s\n{self.said()[-3000:]}")
        return Ended(status, self.said())

    def said(self) -> str:
        """All it has said so far."""
        if not self.log.exists():
            return ""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def is_alive(self) -> bool:
        return (
            self.process.poll() is None
            if isinstance(self.process, subprocess.Popen)
            else self.process.is_alive()
        )

    def until(self, happened: Callable[[], Any]) -> None:
        """Wait for something to be seen, looking every two milliseconds; fails where the stage ends before."""
        last = time.monotonic() + PATIENCE
        while not happened():
            if not self.is_alive() or time.monotonic() > last:
                raise AssertionError(f"it did not come to that\n{self.wait(1)}")
            time.sleep(0.002)

    def stop_at(self, step: int) -> None:
        """Hold it (SIGSTOP) when this start has logged `step`; everything a test does then comes before its next step."""
        self.until(lambda: any(row["step"] >= step and row["time"] > self.began for row in rows(self.folder)))
        self.hold()

    def hold(self) -> None:
        self.send(signal.SIGSTOP)

    def go_on(self) -> None:
        self.send(signal.SIGCONT)

    def send(self, number: signal.Signals) -> None:
        """A signal to every process of its session's group, as a terminal or `kill -- -PGID` sends it."""
        os.killpg(self.pid, number)


def start(
    script: str,
    folder: Path,
    flags: Sequence[object],
    ignore: Sequence[int] = (),
    log: Path | None = None,
    patch: Callable[[], None] | None = None,
    **variables: str,
) -> Started:
    """Start python/SCRIPT on `folder`; `variables` join its environment, signals in `ignore` it never gets.

    What it says goes to `log`, where nothing is named to a new file beside the folder. `patch` is called in the new
    process first: it may change the libraries, for faults that no variable asks for.
    """
    log = log or new_log(folder)
    words = [*map(str, flags), *_output(script, folder)]
    process = SERVER.Process(target=_stage, args=(script, words, str(log), variables, list(ignore), patch))
    process.start()
    return Started(folder, log, process)


def launch(script: str, folder: Path, flags: Sequence[object], **variables: str) -> Started:
    """The same through scripts/launch.sh, which starts supervise.py and torchrun where they are needed."""
    log = new_log(folder)
    environment = (
        os.environ
        | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        | variables
    )
    with log.open("wb") as stream:
        process = subprocess.Popen(
            ["scripts/launch.sh", f"python/{script}", *map(str, flags), *_output(script, folder)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=restore_signals,
        )
    return Started(folder, log, process)


def run(script: str, folder: Path, flags: Sequence[object], **settings: Any) -> Ended:
    """`start` and wait."""
    return start(script, folder, flags, **settings).wait()


def restore_signals() -> None:
    """As a shell in a terminal hands them on: tests that run in the background, or under nohup, ignore some."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _output(script: str, folder: Path) -> list[str]:
    return ["--stage_dir" if script == MERGE else "--output_dir", str(folder)]


def new_log(folder: Path) -> Path:
    """A file beside the folder that no start has written to yet."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder.with_name(f"{folder.name}.said.{len(list(folder.parent.glob(f'{folder.name}.said.*')))}")


def _stage(
    script: str,
    words: list[str],
    log: str,
    variables: dict[str, str],
    ignore: list[int],
    patch: Callable[[], None] | None,
) -> None:
    """In the fork: become a process like the one a shell starts, then be the script."""
    os.setsid()
    restore_signals()
    for number in ignore:
        signal.signal(number, signal.SIG_IGN)
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)
    os.environ.update(variables)
    os.chdir(ROOT)
    sys.path.insert(0, str(PYTHON))
    sys.argv = [str(PYTHON / script), *words]
    if patch:
        patch()
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.stdout.flush()


# ---- What lies in a stage's folder


def rows(folder: Path) -> list[dict[str, Any]]:
    """The whole rows of logs/progress.jsonl that speak of a step's loss."""
    try:
        lines = (folder / "logs" / "progress.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    found = [json.loads(line) for line in lines if line.endswith("}\n")]
    return [row for row in found if "loss" in row]


def losses(folder: Path) -> dict[int, float]:
    """Loss by step; a step that was done again counts as it was the last time."""
    return {row["step"]: row["loss"] for row in rows(folder)}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def weights(folder: Path) -> dict[str, str]:
    """SHA-256 of a stage's final weights: adapter/, model/ or both."""
    found = {name: sha256(folder / name) for name in WEIGHTS if (folder / name).exists()}
    assert found, f"{folder}: no final weights"
    return found


def complete(folder: Path) -> list[int]:
    """Steps of the complete checkpoints, the oldest first."""
    seals = (folder / "checkpoints").glob("checkpoint-*/COMPLETE.json")
    return sorted(int(seal.parent.name.split("-")[1]) for seal in seals if seal.parent.name[11:].isdigit())


def manifest(folder: Path) -> dict[str, Any]:
    """run.json."""
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def copy_of(folder: Path, copy: Path) -> Path:
    """A copy of a stage's folder. Paths inside a checkpoint do not matter to it."""
    shutil.copytree(folder, copy, symlinks=True)
    return copy
