"""What several tests need: python/ on the path, no network, a complete tiny model, files of rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from documents import DOCUMENTS

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "python"))
# Before any library is imported: nothing is fetched, and small models gain nothing from threads.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# `make test` is not the parent of the makes that tests start: they'd print where they enter and leave. Nor do its
# variables mean the models of the tests.
for _name in (
    "MAKEFLAGS",
    "MAKELEVEL",
    "MFLAGS",
    "MAKEOVERRIDES",
    "RECIPE",
    "STAGE",
    "STAGES",
    "MODEL",
    "MODELS",
):
    os.environ.pop(_name, None)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """write_jsonl(path relative to tmp_path, rows) -> the file; a row that is text is written as it is."""

    def write(name: str, rows: Iterable[Any]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def run_script() -> Callable[..., subprocess.CompletedProcess[str]]:
    """run_script(name, *flags, cwd=...) -> the finished process of one of python/*.py."""

    def run(name: str, *flags: Any, **settings: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "python" / name), *map(str, flags)]
        return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120, **settings)

    return run


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a complete model: 2 layers of width 32 in the shape of Qwen3, about 500 tokens, ChatML."""
    from transformers import logging

    import build_base

    logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("base")
    documents = folder / "documents.jsonl"
    documents.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS), encoding="utf-8")
    args = Namespace(
        train_file_dir=str(documents),
        template_name="chatml",
        vocab_size=500,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        seed=42,
    )
    build_base.build_model(args, folder)
    return folder / "model"


@pytest.fixture
def tokenizer(tiny_base: Path) -> Any:
    """The tiny model's tokenizer, loaded as the stages load it."""
    from stagecraft import models

    return models.load_tokenizer(str(tiny_base))
