"""--report_to wandb and swanlab: the packages themselves, offline; the files they write hold the losses."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import running

FLAGS = [
    "--max_steps",
    8,
    "--per_device_train_batch_size",
    4,
    "--logging_steps",
    1,
    "--learning_rate",
    "5e-3",
]
FLAGS += [
    "--bf16",
    "false",
    "--gradient_checkpointing",
    "false",
    "--save_strategy",
    "steps",
    "--save_steps",
    2,
]
SECRET = "hf_veryverysecret0123456789"
# No login from outside, and no server: the ones that a test asks for stand behind a closed port.
ALONE = {
    "WANDB_API_KEY": "",
    "WANDB_MODE": "",
    "WANDB_BASE_URL": "http://127.0.0.1:9",
    "SWANLAB_API_KEY": "",
    "SWANLAB_MODE": "",
    "SWANLAB_API_HOST": "http://127.0.0.1:9/api",
}


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    yield
    running.kill_what_is_left()


@pytest.fixture
def flags(write_jsonl: Any, tiny_base: Path) -> list[Any]:
    rows = [
        {"question": f"What helps against sign {i}?", "answer": f"Rest and drink water, number {i}."}
        for i in range(40)
    ]
    data = write_jsonl("data/rows.jsonl", rows).parent
    return [*FLAGS, "--model_name_or_path", tiny_base, "--train_file_dir", data]


def settings(tmp_path: Path) -> dict[str, str]:
    return {
        **ALONE,
        "HOME": str(tmp_path),
        "NETRC": str(tmp_path / "netrc"),
        "SWANLAB_SAVE_DIR": str(tmp_path),
    }


def wandb_losses(folder: Path) -> dict[int, float]:
    """Loss by step in a run's .wandb file: LevelDB's log of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    [file] = folder.glob("*.wandb")
    content, at, found, piece = file.read_bytes(), 7, {}, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:  # a block's end holds no head
            at += left
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        if kind == 0:
            at += left
            continue
        piece += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last piece
            record = Record()
            record.ParseFromString(piece)
            piece = b""
            row = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            if "train/loss" in row:
                found[round(float(row["train/global_step"]))] = float(row["train/loss"])
    return found


def swanlab_losses(folder: Path) -> dict[int, float]:
    """Loss by step in a run's backup.swanlab: JSON in records."""
    found = {}
    for piece in (folder / "backup.swanlab").read_bytes().split(b'{"model_type": "Scalar"')[1:]:
        row, _ = json.JSONDecoder().raw_decode('{"model_type": "Scalar"' + piece.decode(errors="replace"))
        if row["data"]["key"] == "train/loss":
            found[row["data"]["step"]] = row["data"]["metric"]["data"]
    return found


def runs(folder: Path, tracker: str) -> list[Path]:
    return sorted((folder / "logs" / tracker).glob("*run-*"), key=lambda path: path.stat().st_mtime)


def test_without_a_login_both_keep_the_losses_on_the_disk_and_say_where(tmp_path: Path, flags: list[Any]):
    folder = tmp_path / "outputs-sft" / "mine"
    asked = [*flags, "--report_to", "wandb", "swanlab", "--hub_token", SECRET]
    done = running.run(running.SFT, folder, asked, **settings(tmp_path))
    assert done.status == 0, done
    losses = running.losses(folder)
    assert len(losses) == 8
    for tracker, read in (("wandb", wandb_losses), ("swanlab", swanlab_losses)):
        [kept] = runs(folder, tracker)
        assert read(kept) == pytest.approx(losses, abs=1e-6)
        [said] = [line for line in done.lines if line.startswith(f"{tracker}: ")]
        assert (
            said
            == f"{tracker}: sft-mine is kept in {kept} (no login here); upload it with: {tracker} sync {kept}"
        )
        for file in [file for file in kept.rglob("*") if file.is_file()]:
            assert SECRET.encode() not in file.read_bytes(), file
            assert b"sft-mine" in file.read_bytes() or file.suffix not in (".wandb", ".swanlab")


def test_with_a_login_and_no_server_the_run_is_offline_and_the_key_stays_unwritten(
    tmp_path: Path, flags: list[Any]
):
    folder = tmp_path / "sft"
    key = "0123456789abcdef0123456789abcdef01234567"
    keys = {"WANDB_API_KEY": key, "SWANLAB_API_KEY": key}
    done = running.run(
        running.SFT, folder, [*flags, "--report_to", "wandb", "swanlab"], **(settings(tmp_path) | keys)
    )
    assert done.status == 0, done
    assert done.said.count("(its server does not answer)") == 2
    for file in [file for file in folder.rglob("*") if file.is_file()]:
        assert key.encode() not in file.read_bytes(), file


@pytest.mark.parametrize("how", ["killed", "Ctrl-C"])
def test_a_run_that_was_cut_goes_on_as_the_same_run(tmp_path: Path, flags: list[Any], how: str):
    folder = tmp_path / "sft"
    asked = [*flags, "--report_to", "wandb"]
    started = running.start(running.SFT, folder, asked, **settings(tmp_path))
    started.stop_at(5)
    if how == "killed":
        started.send(signal.SIGKILL)
    else:
        started.send(signal.SIGINT)
        started.go_on()
    assert started.wait().status == (-signal.SIGKILL if how == "killed" else 75)
    [first] = runs(folder, "wandb")
    done = running.run(running.SFT, folder, asked, **settings(tmp_path))
    assert done.status == 0, done
    assert "resuming from" in done.said
    both = runs(folder, "wandb")
    assert len(both) == 2
    assert len({next(run.glob("*.wandb")).name for run in both}) == 1  # one id: both upload into one run
    # wandb writes in pieces of 32 KB and at its end: what a kill takes is in progress.jsonl alone.
    kept = wandb_losses(first) | wandb_losses(both[1])
    expected = {step: loss for step, loss in running.losses(folder).items() if how == "Ctrl-C" or step > 4}
    assert kept == pytest.approx(expected, abs=1e-6)


def test_a_tracker_that_fails_is_told_and_the_stage_ends_well(tmp_path: Path, flags: list[Any]):
    folder = tmp_path / "sft"
    wrong = settings(tmp_path) | {"SWANLAB_PROJECT": "no such?", "WANDB_PROJECT": "no/such?"}
    done = running.run(running.SFT, folder, [*flags, "--report_to", "wandb", "swanlab"], **wrong)
    assert done.status == 0, done
    for tracker in ("wandb", "swanlab"):
        assert done.said.count(f"{tracker}: no longer follows this run") == 1
    assert (folder / "TRAINED").exists()


def hide_both() -> None:
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: None if name in ("wandb", "swanlab") else find(name, *rest)


def test_a_missing_package_or_a_strange_mode_is_told_before_anything_is_loaded(
    tmp_path: Path, flags: list[Any]
):
    folder = tmp_path / "sft"
    asked = [*flags, "--report_to", "wandb", "swanlab"]
    wrong = settings(tmp_path) | {"SWANLAB_MODE": "nowhere"}
    done = running.run(running.SFT, folder, asked, patch=hide_both, **wrong)
    assert done.status == 2
    assert done.lines == [
        "--report_to wandb: the package is not installed; run: make setup, or pip install wandb",
        "--report_to swanlab: the package is not installed; run: make setup, or pip install swanlab",
        'SWANLAB_MODE="nowhere": must be one of cloud, local, offline, disabled, or not set',
    ]
    assert not (folder / "logs").exists()


def test_the_name_of_a_run_can_be_given(tmp_path: Path, flags: list[Any]):
    folder = tmp_path / "sft"
    asked = [*flags, "--report_to", "wandb", "--run_name", "my words"]
    done = running.run(running.SFT, folder, asked, **settings(tmp_path))
    assert "wandb: my words is kept in" in done.said, done


def test_tensorboard_alone_asks_for_no_tracker(tmp_path: Path, flags: list[Any]):
    folder = tmp_path / "sft"
    done = running.run(running.SFT, folder, [*flags, "--report_to", "tensorboard"], **settings(tmp_path))
    assert done.status == 0, done
    assert "kept in" not in done.said
    assert not runs(folder, "wandb") + runs(folder, "swanlab")
    assert list((folder / "logs").glob("events*"))


def test_a_taken_port_is_told_in_a_line(root: Path, tmp_path: Path):
    (tmp_path / "scripts").mkdir()
    shutil.copy(root / "scripts" / "tensorboard.sh", tmp_path / "scripts")
    (tmp_path / "outputs-sft" / "tiny" / "logs").mkdir(parents=True)

    def tensorboard(port: object) -> subprocess.CompletedProcess[str]:
        told = os.environ | {"RECIPE": "tiny", "PORT": str(port), "PYTHON": "echo"}
        return subprocess.run(
            [tmp_path / "scripts" / "tensorboard.sh"], env=told, check=False, capture_output=True, text=True
        )

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        taken = tensorboard(port)
    assert taken.returncode == 2
    assert taken.stderr.startswith(f"PORT={port}: taken on 127.0.0.1; stop what listens there")
    assert taken.stderr.count("\n") == 1
    assert "--logdir_spec sft:outputs-sft/tiny/logs" in tensorboard(port).stdout  # free again
    assert tensorboard("6006x").stderr == 'PORT="6006x": must be a port, 1 to 65535\n'
