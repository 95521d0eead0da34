"""A copy of the project with a small recipe, and `make` in it as a process group that can be killed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from running import MERGE, ROOT, restore_signals, rows, sha256

RECIPE = "faults"
STAGES = ("pt", "sft", "rm", "dpo")
GOALS = ("base", *STAGES, "eval")
SCRIPTS = {
    "base": "build_base.py",
    "pt": "pretraining.py",
    "sft": "supervised_finetuning.py",
    "rm": "reward_modeling.py",
    "dpo": "dpo_training.py",
    "eval": "evaluate_model.py",
}
COPIED = ("Makefile", "data", "ds_configs", "python", "recipes", "scripts", "templates")
ROWS = {
    "data/pretrain": 240,
    "data/finetune": 128,
    "data/reward": 96,
    "data/eval": 24,
}  # lines kept of each file

# Every stage saves every 3 steps and passes the end of an epoch; fp32, so that a hash can be asked for.
TRAINING = {
    "bf16": "false",
    "max_steps": 24,
    "per_device_train_batch_size": 8,
    "learning_rate": "1e-3",
    "lr_scheduler_type": "cosine",
    "gradient_checkpointing": "false",
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 3,
    "save_total_limit": 2,
}
LORA = TRAINING | {"lora_rank": 8, "lora_alpha": 16, "lora_dropout": 0.1}
PAIRS = LORA | {"max_source_length": 96, "max_target_length": 96}
SETTINGS = {
    "base": {"vocab_size": 600, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 64, "max_position_embeddings": 512},
    "pt": TRAINING | {"use_peft": "false", "block_size": 128},
    "sft": LORA | {"model_max_length": 256},
    "rm": PAIRS,
    "dpo": PAIRS,
    "eval": {"max_new_tokens": 8, "batch_size": 16},
}


class Project:
    """A copy of the working tree with the recipe `faults`; outputs are its own."""

    def __init__(self, folder: Path, seed: int = 42) -> None:
        self.folder = folder
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(
                    ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".ruff_cache")
                )
            else:
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, folder / name)
        for name, count in ROWS.items():
            for file in (folder / name).glob("*.jsonl"):
                file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:count]))
        recipe = folder / "recipes" / RECIPE
        recipe.mkdir()
        (recipe / "recipe.mk").write_text("BASE_MODEL :=\nSTAGES ?= pt sft rm dpo\n")
        for stage, settings in SETTINGS.items():
            lines = [f"{name}: {value}\n" for name, value in ({"seed": seed} | settings).items()]
            (recipe / f"{stage}.yaml").write_text("".join(lines))

    def of(self, stage: str) -> Path:
        """A stage's folder."""
        return self.folder / f"outputs-{stage}" / RECIPE

    def take(self, other: Project, stages: Sequence[str]) -> None:
        """The finished stages of another project, with the times of their files."""
        for stage in stages:
            shutil.copytree(other.of(stage), self.of(stage), symlinks=True)

    def weights(self, stage: str) -> dict[str, str]:
        """SHA-256 of all weights that a stage left, adapter and complete model."""
        folder = self.of(stage)
        return {str(f.relative_to(folder)): sha256(f) for f in sorted(folder.glob("*/*.safetensors"))}

    def metrics(self) -> list[dict]:
        """The evaluation's numbers, but for the one that a clock gives."""
        found = json.loads((self.of("eval") / "report.json").read_text(encoding="utf-8"))["metrics"]
        return [metric for metric in found if metric["metric"] != "tokens_per_second"]

    def log_of(self, number: int) -> str:
        """What the make of this number said; -1: the last."""
        logs = sorted(self.folder.glob("make.*.log"))
        return logs[number].read_text(encoding="utf-8", errors="replace")

    def make(self, *words: str) -> Attempt:
        return Attempt(self, words)


class Attempt:
    """One `make` in a session of its own, known by a mark in the environment of every process that comes from it."""

    def __init__(self, project: Project, words: Sequence[str]) -> None:
        self.project, self.mark = project, uuid.uuid4().hex
        self.began, self.clock, self.seen = time.monotonic(), time.time(), {}
        # `make test` hands its own flags down to a make it starts; a user's make has none.
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        own = {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "STAGECRAFT_MARK": self.mark,
        }
        number = len(list(project.folder.glob("make.*.log")))
        self.log = project.folder / f"make.{number:03d}.log"
        with self.log.open("wb") as stream:
            self.process = subprocess.Popen(
                ["make", f"PYTHON={sys.executable}", f"RECIPE={RECIPE}", *words],
                cwd=project.folder,
                env=kept | own,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=restore_signals,
            )

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def status(self) -> int | None:
        """Make's exit status, None while it runs."""
        return self.process.poll()

    def is_new(self, path: Path) -> bool:
        """Whether a file or folder has changed since this make began."""
        try:
            return path.stat().st_mtime > self.clock
        except FileNotFoundError:
            return False

    def step(self, stage: str) -> int:
        """The last step that the stage has logged since this make began; 0: none."""
        path = self.project.of(stage) / "logs" / "progress.jsonl"
        new = (
            [row["step"] for row in rows(self.project.of(stage)) if row["time"] > self.clock]
            if self.is_new(path)
            else []
        )
        return new[-1] if new else 0

    def command(self) -> str:
        """The command line of a script of the pipeline that runs now; "" between two, and while flags are looked at."""
        lines = [line for _, line in self.processes() if "--check_flags" not in line]
        return next((line for line in lines if any(name in line for name in (*SCRIPTS.values(), MERGE))), "")

    def resumed(self, stage: str) -> int | None:
        """The step that this attempt took the stage on from; 0: from its beginning; None: it did not train it."""
        found = re.findall(rf"resuming from outputs-{stage}/\S+checkpoint-(\d+)", self.said)
        return int(found[-1]) if found else 0 if self.step(stage) else None

    def processes(self) -> list[tuple[int, str]]:
        """(id, command line) of every process that came from this make, whoever its parent is now."""
        found = []
        for entry in os.scandir("/proc"):
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError):  # it ended meanwhile
                if self.mark.encode() in Path(entry.path, "environ").read_bytes():
                    words = (
                        Path(entry.path, "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    )
                    if words:  # a zombie has none
                        found.append((int(entry.name), words.strip()))
        return found

    def kill(self, number: signal.Signals = signal.SIGKILL, seconds: float = 10) -> None:
        """The signal to the whole group; fails where a process of it is still there after `seconds`."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)
        last = time.monotonic() + seconds
        self.process.wait(seconds)
        while left := self.processes():
            if time.monotonic() > last:
                for process, _ in left:
                    os.kill(process, signal.SIGKILL)
                raise AssertionError(f"{number.name} to make's group left {left} running")
            time.sleep(0.01)
