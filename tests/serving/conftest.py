"""A recipe's chain of small models, a copy of the kit around it, and a server that tests share."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import Kit, Server, add_full_stage, add_lora_stage, make_base


@pytest.fixture(scope="session")
def chain(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """outputs-base, -pt (every weight), -sft and -dpo (LoRA of different kinds) of the recipe tiny, all finished."""
    folder = tmp_path_factory.mktemp("chain")
    base, pt, sft, dpo = (folder / f"outputs-{stage}" / "tiny" for stage in ("base", "pt", "sft", "dpo"))
    make_base(tiny_base.parent / "documents.jsonl", base)
    add_full_stage(base / "model", pt)
    add_lora_stage(pt / "model", sft, 1, r=4, lora_alpha=8)
    add_lora_stage(sft / "model", dpo, 2, r=8, lora_alpha=8, use_rslora=True)
    for stage in (base, pt, sft, dpo):
        (stage / "DONE").touch()
        time.sleep(0.01)  # the newest is known by its time
    return folder


@pytest.fixture
def kit(chain: Path, tmp_path: Path) -> Kit:
    """The kit with a chain of its own, which a test may change."""
    kit = Kit(tmp_path)
    for stage in chain.iterdir():
        shutil.copytree(stage, tmp_path / stage.name)
    return kit


@pytest.fixture(scope="session")
def shared(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server of every stage for all tests that only ask; nobody changes its models."""
    kit = Kit(tmp_path_factory.mktemp("kit"))
    for stage in chain.iterdir():
        (kit.folder / stage.name).symlink_to(stage)
    server = Server(kit, STAGE="all")
    yield server
    server.end()
