"""Small models of a chain, a copy of the kit around them, and servers as a user starts them.

SERVE_ENGINE=vllm (make test-serve) runs the same tests on vLLM's CPU build.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import AutoTokenizer

from adapters import causal, merged

ROOT = Path(__file__).resolve().parents[2]
ENGINE = os.environ.get("SERVE_ENGINE", "transformers")
PATIENCE = 300.0  # seconds for a start: vLLM takes 40 to 100 on two cores
ADVICE = ["Rest at home.", "See a doctor.", "多喝水。", "去医院。"]
QUESTIONS = [f"What helps against {sign}?" for sign in ("fever", "a cough", "a rash", "back pain", "头痛")]
QUESTIONS += [f"{sign}怎么办？请{how}回答。" for sign in ("发烧", "牙痛", "失眠") for how in ("简短", "详细")]


class Kit:
    """The kit's own files in a folder where outputs-* are the tests'."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("Makefile", "scripts", "python", "recipes", "templates", "data", "requirements"):
            (folder / name).symlink_to(ROOT / name)

    def environment(self, **variables: str) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if k not in ("HOST", "PORT", "STAGE", "MODEL", "API_KEY")}
        venv = (
            {"VLLM_VENV": os.environ.get("VLLM_VENV") or str(ROOT / ".venv-vllm")} if ENGINE == "vllm" else {}
        )
        engine = {"ENGINE": ENGINE, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        return kept | venv | engine | variables

    def run(self, script: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.folder / "scripts" / script), *words],
            check=False,
            cwd="/",
            env=self.environment(**variables),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )

    def refuse(self, *words: str, **variables: str) -> list[str]:
        """The lines of make serve's refusal, which starts nothing."""
        done = self.run("serve.sh", *words, **{"PORT": str(free_port())} | variables)
        assert done.returncode == 2, (done.stdout, done.stderr)
        assert done.stdout == ""
        return done.stderr.splitlines()

    def check(self, *words: str, **variables: str) -> tuple[int, dict[str, list[str]], str]:
        """make serve-check: (status, check -> [word, detail] of the last table, stderr)."""
        done = self.run("check_server.sh", *words, **variables)
        table = [line.split(maxsplit=1) for line in done.stdout.splitlines() if line.startswith("  ")]
        names = ("template", "prompts", "stop tokens", "tokens", "log-probs", "dtype")
        lines = [" ".join(words) for words in table]
        found = {
            name: line.removeprefix(name).split(maxsplit=1)
            for line in lines
            for name in names
            if line.startswith(name + " ")
        }
        return done.returncode, found, done.stderr


class Server:
    """make serve, from its start until it says how to ask."""

    def __init__(self, kit: Kit, *words: str, wait: bool = True, **variables: str) -> None:
        self.kit, self.port = kit, int(variables.get("PORT") or free_port())
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [str(kit.folder / "scripts/serve.sh"), *words],
            cwd="/",
            env=kit.environment(**variables | {"PORT": str(self.port)}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.key = variables.get("API_KEY", "none")
        if wait:
            self.wait_for("model: ")

    def wait_for(self, words: str) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            if line.strip().startswith(words):
                return
        pytest.fail("\n".join(self.lines))

    @property
    def log(self) -> Path:
        return self.kit.folder / f"outputs-serve/tiny/serve-{self.port}.log"

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=self.key, max_retries=0, timeout=PATIENCE)

    def ask(self, question: str, model: str, **settings: Any) -> str:
        done = self.client().chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": question}],
            **{"temperature": 0, "max_tokens": 8} | settings,
        )
        return done.choices[0].message.content or ""

    def engines(self) -> list[int]:
        """Processes of the engine and what it started, by the port or the folder in their environment."""
        return [pid for pid in pids() if pid != self.process.pid and self._is_ours(pid)]

    def _is_ours(self, pid: int) -> bool:
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            return f"PORT={self.port}".encode() in variables and b"Z" not in _state(pid)
        except OSError:
            return False

    def end(self, number: int = signal.SIGINT) -> tuple[int, float]:
        """(exit status, seconds)"""
        began = time.monotonic()
        self.process.send_signal(number)
        status = self.process.wait(60)
        return status, time.monotonic() - began


def _state(pid: int) -> bytes:
    return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]


def pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def until(happens: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Whether it happens in time."""
    deadline = time.monotonic() + seconds
    while not happens() and time.monotonic() < deadline:
        time.sleep(0.1)
    return happens()


def make_base(documents: Path, folder: Path) -> None:
    """A fresh model with heads of 32, which vLLM's CPU attention takes."""
    import build_base

    folder.mkdir(parents=True)
    settings = Namespace(
        train_file_dir=str(documents),
        template_name="chatml",
        vocab_size=500,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        intermediate_size=128,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        seed=42,
    )
    build_base.build_model(settings, folder)


def teach(model: Any, tokenizer: Any, stage: int, rate: float) -> None:
    """Until it answers every question, with another answer in each stage, and stops after it."""
    torch.manual_seed(stage)
    rows, starts = [], []
    for number, question in enumerate(QUESTIONS):
        # The words of the first stage in another order: LoRA leaves the head alone, and can't teach it new ones.
        other = (number + 3 * stage) % len(QUESTIONS)
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        answer = f"{other} {ADVICE[other % len(ADVICE)]}<|im_end|>"
        starts.append(len(tokenizer(prompt, add_special_tokens=False)["input_ids"]))
        rows.append(tokenizer(prompt + answer, add_special_tokens=False)["input_ids"])
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    place = torch.arange(width)[None]
    wanted = (place >= torch.tensor(starts)[:, None]) & (
        place < torch.tensor([len(row) for row in rows])[:, None]
    )
    labels = ids.masked_fill(~wanted, -100)
    mask = place < torch.tensor([len(row) for row in rows])[:, None]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    loss = torch.tensor(9.0)
    for _ in range(600):
        if loss.item() < 0.02:
            return
        loss = model(input_ids=ids, attention_mask=mask.long(), labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    pytest.fail(f"stage {stage} does not learn: {loss.item():.2f}")


def add_full_stage(base: Path, folder: Path) -> None:
    """A finished stage that trained every weight."""
    model, tokenizer = causal(base), AutoTokenizer.from_pretrained(base)
    shutil.copytree(base, folder / "model")
    teach(model, tokenizer, 0, rate=5e-3)
    model.save_pretrained(folder / "model")


def add_lora_stage(base: Path, folder: Path, stage: int, **settings: Any) -> None:
    """A finished LoRA stage: adapter with its lineage, and the complete model."""
    from peft import LoraConfig, get_peft_model

    from stagecraft import lineage

    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(stage)
    model = get_peft_model(
        causal(base), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **settings)
    )
    teach(model, tokenizer, stage, rate=5e-3)
    model.save_pretrained(folder / "adapter")
    tokenizer.save_pretrained(folder / "adapter")
    for name in ("chat_template.jinja", "generation_config.json"):
        shutil.copy(base / name, folder / "adapter")
    steps = lineage.after(str(base), {"stage": folder.parent.name})
    (folder / "adapter" / "lineage.json").write_text(json.dumps(steps))
    merged(base, folder / "adapter", output=folder / "model")
