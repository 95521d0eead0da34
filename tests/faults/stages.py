"""Fixtures of the tests here: a small fine-tuning, the one that nothing happened to, and one that was killed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import running
from running import SFT, SHORT


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    yield
    running.kill_what_is_left()


@pytest.fixture(scope="session")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 72 conversations, no two of one length in a batch."""
    folder = tmp_path_factory.mktemp("conversations")
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as stream:
        for n in range(72):
            turns = [
                ("human", f"问题{n}，请回答{'。' * (n % 7)}"),
                ("gpt", f"答案是{n * 7}。" + " Rest." * (n % 11)),
            ]
            row = {"conversations": [{"from": who, "value": value} for who, value in turns]}
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    # Chosen, so that every one of the 72 trains: without it some are held out.
    (folder / "valid").mkdir()
    (folder / "valid" / "rows.jsonl").write_text(
        (folder / "rows.jsonl").read_text(encoding="utf-8").split("\n")[0] + "\n"
    )
    return folder


@pytest.fixture(scope="session")
def sft(tiny_base: Path, conversations: Path) -> list[object]:
    """Flags of the fine-tuning, all but --output_dir; a later flag wins."""
    data = [
        "--train_file_dir",
        conversations / "rows.jsonl",
        "--validation_file_dir",
        conversations / "valid",
    ]
    return ["--model_name_or_path", tiny_base, *data, *SHORT, "--lora_dropout", 0.1]


@pytest.fixture(scope="session")
def pt(tiny_base: Path) -> list[object]:
    """Flags of a full-parameter pretraining whose rows are blocks packed from documents."""
    data = ["--train_file_dir", tiny_base.parent / "documents.jsonl", "--block_size", 32]
    return ["--model_name_or_path", tiny_base, *data, *SHORT, "--use_peft", "false"]


@pytest.fixture(scope="session")
def straight(sft: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the fine-tuning to which nothing happened."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    done = running.run(SFT, folder, sft)
    assert done.status == 0, done
    return folder


@pytest.fixture(scope="session")
def killed(sft: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one that was killed at the end of step 11, in its second epoch: checkpoints 6 and 9 are there."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    done = running.run(SFT, folder, sft, STAGECRAFT_FAULT="kill@11")
    assert done.status == -9 and running.complete(folder) == [6, 9], done
    return folder


@pytest.fixture
def again(killed: Path, tmp_path: Path) -> Path:
    """A copy of the killed one, for a test to go on with or to damage."""
    return running.copy_of(killed, tmp_path / "again")
