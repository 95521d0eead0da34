"""What run.json says of a run before it starts: what was asked for, with which code, on what machine."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "deepspeed", "bitsandbytes")


def describe_run(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The head of run.json: what was asked for, with which code, on what machine. Never a secret."""
    return {
        "stage": name,
        "command": _command(),
        "arguments": {k: v for k, v in arguments.items() if not is_secret(k)},
        "versions": {"python": platform.python_version(), **_versions()},
        "git": _git(),
        "machine": {"cpu": platform.machine(), "cores": os.cpu_count(), "gpus": gpus()},
        "started": now(),
    }


def is_secret(flag: str) -> bool:
    """Whether a flag's value must never be written down."""
    return flag.endswith(("token", "key", "password", "secret"))


def _command() -> str:
    """The command as given, *** in place of a secret flag's value."""
    words, hidden = [], False
    for word in sys.argv:
        flag, equals, _ = word.partition("=")
        if word.startswith("--"):
            hidden = is_secret(flag.replace("-", "_"))
            words.append(f"{flag}=***" if hidden and equals else word)
        else:
            words.append("***" if hidden else word)
    return " ".join(words)


def now() -> str:
    """Local time with its offset, to the second."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def gpus() -> list[str]:
    """Names of the NVIDIA cards, without importing torch."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], check=False, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.split(" (UUID")[0] for line in done.stdout.splitlines()] if done.returncode == 0 else []


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _git() -> dict[str, Any]:
    root = Path(__file__).resolve().parents[2]

    def ask(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *words], check=False, capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    return {
        "commit": ask("rev-parse", "HEAD"),
        "dirty": bool(ask("status", "--porcelain", "--untracked-files=no")),
    }
