"""merge_lora.py: what it leaves is a complete model or nothing; how it is called, and what a stage gets."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adapters import (
    ADAPTER,
    WEIGHTS,
    causal,
    configure,
    make_adapter,
    reweigh,
    tensors_of,
    told,
)
from stagecraft.errors import ProofFailed

ROOT = Path(__file__).resolve().parents[1]
INDEX = "model.safetensors.index.json"
QUERY, NORM, EMBEDDING = (
    "model.layers.1.self_attn.q_proj.weight",
    "model.norm.weight",
    "model.embed_tokens.weight",
)


@pytest.fixture(scope="module")
def adapter(tiny_base, tmp_path_factory) -> Path:
    return make_adapter(tiny_base, tmp_path_factory.mktemp("lora") / "adapter")


@pytest.fixture
def own_adapter(adapter, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(adapter, tmp_path / "adapter"))


@pytest.fixture
def own_base(tiny_base, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


@pytest.fixture
def merge_lora(monkeypatch):
    """merge_lora(*flags) is `merge_lora.py FLAGS --no_validate` in this process."""
    import merge_lora as script

    def call(*flags, validate=False):
        proof = [] if validate else ["--no_validate"]
        monkeypatch.setattr(sys, "argv", ["merge_lora.py", *map(str, flags), *proof])
        script.main()

    return call


# The script


def test_adapter_and_output_are_enough(adapter, tiny_base, merge_lora, tmp_path, capsys):
    merge_lora(adapter, "-o", tmp_path / "out")
    said = capsys.readouterr().out
    result, base = tensors_of(tmp_path / "out"), tensors_of(tiny_base)
    lora, total = (sum(t.numel() for t in group.values()) for group in (load_file(adapter / ADAPTER), result))
    for line in (
        f"base model  {tiny_base}",
        f"adapter     {adapter} (LoRA, rank 4, alpha 12, 14 modules)",
        f"output      {tmp_path}/out",
        f"parameters  {lora:,} of the adapter, {total:,} of the model: {lora / total:.2%}; weights in float32",
        "[2/3] writing 24 tensors, 14 of them merged",
    ):
        assert f"{line}\n" in said
    assert "complete model, not proven (--no_validate): weights there, no adapter_config.json" in said
    assert f"MB  {WEIGHTS}\n" in said and " GB/s), " in said
    assert result.keys() == base.keys() and not all(torch.equal(result[name], base[name]) for name in base)
    # The other spellings do the same, to the bit.
    for number, flags in enumerate(
        [
            ("--base_model", tiny_base, "--lora_model", adapter, "--output_dir", tmp_path / "0"),
            ("--sft_lora", adapter, "--output", tmp_path / "1", "--dtype", "float32", "--device", "cpu"),
            ("--lora_model", adapter, "--weights", "1", "--output", tmp_path / "2"),
        ]
    ):
        merge_lora(*flags)
        again = tensors_of(tmp_path / str(number))
        assert all(torch.equal(result[name], again[name]) for name in base)


def test_what_is_missing_is_told_together(merge_lora, tmp_path):
    assert told(merge_lora) == ["--lora_model is missing", "--output_dir is missing"]
    assert told(merge_lora, tmp_path, "-o", tmp_path / "out") == [
        f"--lora_model {tmp_path}: no adapter_config.json there: this is not an adapter"
    ]
    assert told(merge_lora, "--stage_dir", tmp_path, "-o", tmp_path / "out", "--test_prompt", "hello") == [
        "--output_dir and --stage_dir: a stage's folder says where both are; give one of the two",
        "--test_prompt is answered in the proof: leave out --no_validate",
    ]


def test_an_adapter_that_names_no_base_is_told(own_adapter, merge_lora, tmp_path):
    configure(own_adapter, base_model_name_or_path=None)
    assert told(merge_lora, own_adapter, "-o", tmp_path / "out") == [
        f"--lora_model {own_adapter}: names no base; give it with --base_model"
    ]


def test_adapters_that_name_two_bases_are_told(own_adapter, adapter, merge_lora, tmp_path):
    configure(own_adapter, base_model_name_or_path="other/base")
    [line] = told(merge_lora, own_adapter, adapter, "-o", tmp_path / "out")
    assert line.startswith("--lora_model: the adapters name different bases (") and "--base_model" in line


def test_a_base_that_has_moved_is_told(own_adapter, merge_lora, tmp_path):
    configure(own_adapter, base_model_name_or_path="gone/model")
    assert told(merge_lora, own_adapter, "-o", tmp_path / "out") == [
        "--base_model gone/model: no such folder, and not in the hub's cache (HF_HUB_OFFLINE is set)"
    ]
    configure(own_adapter, base_model_name_or_path="outputs-sft/gone/model")
    assert told(merge_lora, own_adapter, "-o", tmp_path / "out") == [
        "--base_model outputs-sft/gone/model: no such folder"
    ]


def test_an_output_that_is_not_empty_is_not_replaced_unasked(adapter, merge_lora, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    merge_lora(adapter, "-o", out)  # empty: nothing to lose
    (out / WEIGHTS).write_bytes(b"older")
    (out / "leftover.txt").write_text("of the older one")
    assert told(merge_lora, adapter, "-o", out) == [
        f"--output_dir {out}: not empty; --overwrite_output_dir replaces it"
    ]
    assert (out / WEIGHTS).read_bytes() == b"older"
    merge_lora(adapter, "-o", out, "--overwrite_output_dir")
    assert (out / WEIGHTS).stat().st_size > 1000 and not (out / "leftover.txt").exists()


def test_overwriting_takes_no_folder_that_is_no_model(adapter, merge_lora, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work\n")
    assert told(merge_lora, adapter, "-o", tmp_path / "home", "--overwrite_output_dir") == [
        f"--output_dir {tmp_path}/home: holds no model that could be replaced; choose another folder"
    ]
    assert (tmp_path / "home" / "thesis.tex").exists()


@pytest.mark.parametrize("which", ["base", "adapter", "link", "around the adapter", "around the base"])
def test_what_is_read_is_not_replaced(own_base, own_adapter, merge_lora, tmp_path, which):
    (tmp_path / "link").symlink_to(own_base)
    output = {"base": own_base, "adapter": own_adapter, "link": tmp_path / "link"}.get(
        which, tmp_path / "run"
    )
    base, adapter = own_base, own_adapter
    if which.startswith("around"):  # a trainer's folder: a model, and checkpoints below it
        output.mkdir()
        shutil.copy(own_base / "config.json", output)
        if which.endswith("adapter"):
            adapter = own_adapter.rename(output / "checkpoint-20")
        else:
            base = own_base.rename(output / "base")
    if which == "adapter":
        (own_adapter / "config.json").write_text("{}")
    before = (base / WEIGHTS).read_bytes(), (adapter / ADAPTER).read_bytes()
    flags = ("--base_model", base, "--lora_model", adapter, "--output_dir", output, "--overwrite_output_dir")
    [line] = told(merge_lora, *flags)
    assert line.startswith(f"--output_dir {output}: ")
    assert before == ((base / WEIGHTS).read_bytes(), (adapter / ADAPTER).read_bytes())


def test_a_file_as_output_is_told(adapter, merge_lora, tmp_path):
    (tmp_path / "out").write_text("mine")
    assert told(merge_lora, adapter, "-o", tmp_path / "out") == [
        f"--output_dir {tmp_path}/out: is a file; name a folder"
    ]
    [line] = told(merge_lora, adapter, "-o", tmp_path / "out" / "below")
    assert line.startswith(f"--output_dir {tmp_path}/out/below: ")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("name", [".", "out/", "new/../out"])
def test_an_output_by_any_name(adapter, merge_lora, tmp_path, monkeypatch, name):
    """The folder that one stands in has no name of its own to put .tmp behind."""
    (tmp_path / "here" / "new").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" if name != "." else tmp_path / "here" / "new")
    where = Path.cwd() if name == "." else Path.cwd() / "out"
    merge_lora(adapter, "-o", name)
    assert (where / WEIGHTS).exists() and (where / "config.json").exists()


def test_a_link_as_output_leads_to_the_model(adapter, merge_lora, tmp_path):
    """Models live on another disk often enough."""
    (tmp_path / "disk" / "model").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "model")
    merge_lora(adapter, "-o", tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists() and (tmp_path / "out" / WEIGHTS).exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out"]


def test_a_base_that_was_downloaded_before_needs_no_network(tiny_base, adapter, tmp_path):
    home = tmp_path / "home" / "hub" / "models--org--tiny"
    for folder in ("refs", "blobs", "snapshots/0123"):
        (home / folder).mkdir(parents=True)
    (home / "refs" / "main").write_text("0123")
    for number, file in enumerate(tiny_base.iterdir()):
        shutil.copy(file, home / "blobs" / str(number))
        (home / "snapshots" / "0123" / file.name).symlink_to(home / "blobs" / str(number))
    flags = (adapter, "--base_model", "org/tiny", "-o", tmp_path / "out", "--no_validate")
    done = run_merge(*flags, env=os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"})
    assert (done.returncode, done.stderr) == (0, "")
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())
    assert causal(tmp_path / "out").config.num_hidden_layers == 2


def without(tmp_path: Path, *packages: str) -> dict[str, str]:
    """An environment in which these packages can't be imported."""
    for name in packages:
        (tmp_path / "fake" / name).mkdir(parents=True)
        (tmp_path / "fake" / name / "__init__.py").write_text("raise ImportError('not on this path')\n")
    return os.environ | {"PYTHONPATH": str(tmp_path / "fake")}


def run_merge(*flags, **settings) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "python" / "merge_lora.py"), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **settings)


def test_no_heavy_library_is_imported(adapter, tmp_path):
    """transformers alone takes 4 s to import, more than merging a small model."""
    environment = without(tmp_path, "transformers", "peft", "accelerate", "datasets")
    done = run_merge(adapter, "-o", tmp_path / "out", "--no_validate", env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out" / "config.json").exists()
    proven = run_merge(adapter, "-o", tmp_path / "proven", env=environment)  # control: the proof needs them
    assert proven.returncode == 1 and not (tmp_path / "proven").exists()


def test_faults_are_told_before_torch_is_imported(own_adapter, tmp_path):
    configure(own_adapter, use_qalora=True)
    environment = without(tmp_path, "torch", "transformers", "peft")
    done = run_merge(own_adapter, "-o", tmp_path / "out", env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"--lora_model {own_adapter}: adapter_config.json sets use_qalora, which this merge does not know\n"
    )


def test_a_rename_that_fails_loses_nothing(adapter, merge_lora, tmp_path, monkeypatch):
    """A folder that a container mounts can't be replaced; the older model is worth more than none."""
    out = tmp_path / "out"
    merge_lora(adapter, "-o", out)
    before = (out / WEIGHTS).read_bytes()
    rename = Path.rename

    def busy(path: Path, target: Path) -> Path:
        if out in (path, Path(target)):
            raise OSError(16, "Device or resource busy")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", busy)
    monkeypatch.setattr(Path, "replace", busy)
    [line] = told(merge_lora, adapter, "-o", out, "--overwrite_output_dir")
    assert line.startswith(f"--output_dir {out}: ")
    assert (out / "config.json").exists() and (out / WEIGHTS).read_bytes() == before


# Killed


@pytest.mark.parametrize("when", ["[2/3]", "[3/3]"])
def test_a_killed_merge_leaves_nothing_that_loads(adapter, merge_lora, tmp_path, when):
    out = tmp_path / "models" / "out"
    assert kill_at(when, [adapter, "-o", out]) == -signal.SIGKILL
    assert not out.exists()
    for left in out.parent.iterdir():
        assert not (left / "config.json").exists()
        with pytest.raises((OSError, ValueError)):
            causal(left)
    merge_lora(adapter, "-o", out)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    causal(out)


def kill_at(line: str, flags: list) -> int:
    """Kill the merge, and not what it may have started, when its output shows the line; the exit status."""
    command = [sys.executable, str(ROOT / "python" / "merge_lora.py"), *map(str, flags)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        for said in process.stdout:
            if said.startswith(line):
                process.kill()
                break
        else:
            pytest.fail(f"the merge never came to {line}")
        process.wait(timeout=30)
    return process.returncode


def test_two_merges_into_one_folder_do_not_mix(adapter, merge_lora, tmp_path):
    """The second is refused while the first is at work, and the first does not notice."""
    command = [
        sys.executable,
        str(ROOT / "python" / "merge_lora.py"),
        str(adapter),
        "-o",
        str(tmp_path / "out"),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as first:
        assert any(line.startswith("[3/3]") for line in first.stdout)
        [line] = told(merge_lora, adapter, "-o", tmp_path / "out")
        assert str(tmp_path / "out") in line
        _, errors = first.communicate(timeout=60)
    assert (first.returncode, errors) == (0, "")
    assert (tmp_path / "out" / "config.json").exists()


# A stage's folder


@pytest.fixture
def trained(adapter, tmp_path) -> Path:
    """What a LoRA stage leaves."""
    stage = tmp_path / "outputs-sft" / "tiny"
    shutil.copytree(adapter, stage / "adapter")
    (stage / "TRAINED").write_text("")
    (stage / "run.json").write_text(json.dumps({"stage": "sft", "outputs": {"adapter/README.md": {}}}))
    return stage


def test_a_stage_gets_its_model_then_done(trained, merge_lora):
    from stagecraft import models

    merge_lora("--stage_dir", trained, validate=True)
    assert (trained / "DONE").read_text() == f"{trained}/model\n"
    models.require_model_folder(str(trained / "model"))
    log = (trained / "logs" / "train.log").read_text()
    assert "complete model, proven to be base + adapter" in log and "[3/3] proof" in log
    merge_lora("--stage_dir", trained)  # and once more
    assert (trained / "DONE").exists()
    left = {path.name for path in trained.iterdir()}
    assert left == {"adapter", "model", "logs", "run.json", ".lock", "TRAINED", "DONE"}
    manifest = json.loads((trained / "run.json").read_text())
    model = {f"model/{path.name}" for path in (trained / "model").iterdir()}
    assert manifest["stage"] == "sft" and set(manifest["outputs"]) == {"adapter/README.md", *model}
    digest = hashlib.sha256((trained / "model" / WEIGHTS).read_bytes()).hexdigest()
    assert manifest["outputs"][f"model/{WEIGHTS}"]["sha256"] == digest


def test_a_stage_that_is_not_trained_is_told(trained, merge_lora):
    (trained / "TRAINED").unlink()
    assert told(merge_lora, "--stage_dir", trained) == [
        f"--stage_dir {trained}: no finished training there (TRAINED is missing)"
    ]
    assert not (trained / "DONE").exists()


def test_after_full_training_the_model_is_checked(trained, tiny_base, merge_lora):
    shutil.rmtree(trained / "adapter")
    shutil.copytree(tiny_base, trained / "model")
    (trained / "model" / WEIGHTS).unlink()
    assert told(merge_lora, "--stage_dir", trained) == [
        f"--stage_dir {trained}/model: not a complete model folder: *.safetensors missing"
    ]
    assert not (trained / "DONE").exists()
    shutil.copy(tiny_base / WEIGHTS, trained / "model")
    merge_lora("--stage_dir", trained)
    assert (trained / "DONE").exists()


@pytest.mark.parametrize("had_a_model", [False, True])
def test_a_failed_merge_leaves_no_done(trained, adapter, merge_lora, had_a_model):
    (trained / "DONE").write_text("of an earlier merge\n")
    if had_a_model:
        (trained / "model").mkdir()
        (trained / "model" / "config.json").write_text("older")
    reweigh(trained / "adapter", lambda tensors: next(iter(tensors.values())).fill_(math.nan))
    with pytest.raises(ProofFailed, match="finite"):
        merge_lora("--stage_dir", trained)
    assert not (trained / "DONE").exists() and (trained / "model").exists() == had_a_model
    assert not had_a_model or (trained / "model" / "config.json").read_text() == "older"
    assert (trained / "model.failed" / WEIGHTS).exists()
    assert "finite" in (trained / "logs" / "train.log").read_text()
    # What it left does not stop the merge of the mended adapter.
    shutil.copy(adapter / ADAPTER, trained / "adapter")
    merge_lora("--stage_dir", trained)
    assert (trained / "DONE").exists()
    left = {path.name for path in trained.iterdir()}
    assert left == {"adapter", "model", "logs", "run.json", ".lock", "TRAINED", "DONE"}


def test_a_killed_stage_has_no_model_no_done_and_no_lock(trained, merge_lora):
    assert kill_at("[3/3]", ["--stage_dir", trained]) == -signal.SIGKILL
    assert not (trained / "model").exists() and not (trained / "DONE").exists()
    merge_lora("--stage_dir", trained)  # at once: its lock died with it
    assert (trained / "DONE").exists()


def test_two_merges_of_one_stage_do_not_mix(trained, merge_lora):
    from stagecraft import run

    with run.lock(trained):
        [line] = told(merge_lora, "--stage_dir", trained)
    assert str(trained) in line and not (trained / "model").exists()
