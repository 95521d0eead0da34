"""Stage scripts as a user runs them: bad input told by message, adapters on every kind of base, several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROWS = [
    {
        "conversations": [
            {"from": "human", "value": f"问题{n}，请回答。"},
            {"from": "gpt", "value": f"答案是{n * 7}。"},
        ]
    }
    for n in range(64)
]


def script(name: str, *words: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run an entry script from the repo root with one thread, so that runs can be compared to the last digit."""
    return run_command([sys.executable, str(ROOT / "python" / name), *map(str, words)], env)


def run_command(command: list[str], env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS))
    return folder


def sft(base: Path, rows: Path, output: Path, *words: object) -> list[object]:
    """The flags of a short fine-tuning; later words win."""
    short = [
        "--max_steps",
        4,
        "--per_device_train_batch_size",
        8,
        "--learning_rate",
        "1e-3",
        "--logging_steps",
        1,
    ]
    quiet = [
        "--bf16",
        "false",
        "--lora_dropout",
        0,
        "--gradient_checkpointing",
        "false",
        "--save_strategy",
        "no",
        "--report_to",
        "none",
    ]
    where = ["--model_name_or_path", base, "--train_file_dir", rows, "--output_dir", output]
    return [*where, *short, *quiet, *words]


def logged(output: Path, name: str = "loss") -> list[float]:
    """What every step logged under a name."""
    lines = [json.loads(line) for line in (output / "logs" / "progress.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def plain(tiny_base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuning by one process, against which others are held."""
    output = tmp_path_factory.mktemp("plain")
    done = script("supervised_finetuning.py", *sft(tiny_base, rows, output))
    assert done.returncode == 0, done.stderr
    return output


def test_one_line_of_outcome_and_everything_in_the_log(plain: Path) -> None:
    log = (plain / "logs" / "train.log").read_text()
    last = log.strip().splitlines()[-1]
    assert last.startswith("sft: 4 steps, ") and f"saved to {plain}/adapter" in last
    assert "global batch 8 = 8 a device x 1 accumulated x 1 process" in log
    manifest = json.loads((plain / "run.json").read_text())
    assert manifest["counts"]["rows read"] == len(ROWS)
    assert manifest["seed"] == 42 and manifest["metrics"]["steps"] == 4


def test_the_same_seed_gives_the_same_weights_to_the_bit(
    plain: Path, tiny_base: Path, rows: Path, tmp_path: Path
) -> None:
    weights = (plain / "adapter" / "adapter_model.safetensors").read_bytes()
    again, other = tmp_path / "again", tmp_path / "other"
    assert script("supervised_finetuning.py", *sft(tiny_base, rows, again)).returncode == 0
    assert (again / "adapter" / "adapter_model.safetensors").read_bytes() == weights
    assert script("supervised_finetuning.py", *sft(tiny_base, rows, other, "--seed", 7)).returncode == 0
    assert (other / "adapter" / "adapter_model.safetensors").read_bytes() != weights


@pytest.mark.parametrize("deepspeed", [None, "zero2", "zero3"])
def test_two_processes_train_as_one_does(
    plain: Path, tiny_base: Path, rows: Path, tmp_path: Path, deepspeed: str | None
) -> None:
    """Global batch 8 = 4 a device x 2: the same rows a step, so the same losses and gradients; ZeRO only moves weights."""
    output = tmp_path / "run"
    words = sft(tiny_base, rows, output, "--per_device_train_batch_size", 4)
    if deepspeed:
        words += ["--deepspeed", ROOT / "ds_configs" / f"{deepspeed}.json"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = run_command([*torchrun, str(ROOT / "python/supervised_finetuning.py"), *map(str, words)])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "x 2 processes" in done.stdout and done.stdout.count("sft: 4 steps") == 1
    for name in ("loss", "grad_norm"):
        assert logged(output, name) == pytest.approx(logged(plain, name), rel=1e-5)
    merged = script("merge_lora.py", "--stage_dir", output)
    assert merged.returncode == 0, merged.stderr
    assert (output / "DONE").exists() and (output / "model" / "model.safetensors").exists()


def test_control_another_global_batch_gives_other_logged(
    plain: Path, tiny_base: Path, rows: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    done = script(
        "supervised_finetuning.py", *sft(tiny_base, rows, output, "--per_device_train_batch_size", 4)
    )
    assert done.returncode == 0, done.stderr
    assert logged(output) != pytest.approx(logged(plain), rel=1e-5)


@pytest.mark.parametrize(
    "flags", [["--load_in_4bit"], ["--load_in_8bit"], ["--use_dora"], ["--use_peft", "false"]]
)
def test_every_kind_of_training_leaves_a_complete_model(
    tiny_base: Path, rows: Path, tmp_path: Path, flags: list[str]
) -> None:
    output = tmp_path / "run"
    done = script("supervised_finetuning.py", *sft(tiny_base, rows, output, *flags))
    assert done.returncode == 0, done.stderr
    assert logged(output)[-1] < logged(output)[0]
    merged = script("merge_lora.py", "--stage_dir", output)
    assert merged.returncode == 0, merged.stderr
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        f.name for f in (output / "model").iterdir()
    }
    assert not (output / "model" / "adapter_config.json").exists()


def test_bad_rows_are_told_together_with_file_and_line(tiny_base: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    good = json.dumps(ROWS[0], ensure_ascii=False)
    twice = json.dumps({"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]})
    file.write_text(f"{good}\n{twice}\n{good[:-3]}\n")
    done = script("supervised_finetuning.py", *sft(tiny_base, file, tmp_path / "out"))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    told = done.stderr.strip().splitlines()
    assert told[0] == f'{file}:2: "conversations" has two "human" turns in a row (turns 1 and 2)'
    assert told[1].startswith(f"{file}:3: not JSON: ")
    assert told[2].startswith("2 of 3 rows are bad. Mend them, or leave them out with --on_bad_rows skip")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--train_file_dir", "/no/such"], "--train_file_dir /no/such: no such file or folder"),
        (
            ["--template_name", "qwem"],
            "--template_name qwem: no such template; known: alpaca, chatml, ",
        ),
        (
            ["--load_in_4bit", "--use_peft", "false"],
            "--load_in_4bit/--load_in_8bit need LoRA: quantised weights can't be trained (--use_peft true)",
        ),
        (["--bf16", "true", "--fp16", "true"], "--bf16 and --fp16 exclude each other"),
        (
            ["--target_modules", "qproj"],
            "--target_modules: the model has no qproj; it has down_proj, embed_tokens",
        ),
        (["--flash_attn"], "--flash_attn needs CUDA; leave it out here (SDPA is used)"),
        (
            ["--model_name_or_path", "outputs-pt/none/model"],
            "--model_name_or_path outputs-pt/none/model: no such folder",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(
    tiny_base: Path, rows: Path, tmp_path: Path, change: list[str], message: str
) -> None:
    done = script("supervised_finetuning.py", *sft(tiny_base, rows, tmp_path / "out", *change))
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith(message)
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "TRAINED").exists()


def test_a_finished_run_is_not_overwritten_unasked(plain: Path, tiny_base: Path, rows: Path) -> None:
    before = (plain / "adapter" / "adapter_model.safetensors").read_bytes()
    done = script("supervised_finetuning.py", *sft(tiny_base, rows, plain))
    assert done.returncode == 2
    assert done.stderr.strip() == (
        f"--output_dir {plain}: holds a finished run (TRAINED); "
        "--overwrite_output_dir replaces it, or choose another folder"
    )
    assert (plain / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_a_killed_run_goes_on_from_its_checkpoint_to_the_same_weights(
    plain: Path, tiny_base: Path, rows: Path, tmp_path: Path
) -> None:
    """Stop after a checkpoint at step 2 (a kill by the kernel), start again: steps 3 and 4 give the same adapter."""
    output = tmp_path / "run"
    words = [*sft(tiny_base, rows, output), "--save_strategy", "steps", "--save_steps", "2"]
    whole = tmp_path / "whole"
    assert script("supervised_finetuning.py", *words, "--output_dir", whole).returncode == 0
    killed = script("supervised_finetuning.py", *words, env=os.environ | {"STAGECRAFT_FAULT": "kill@3"})
    assert killed.returncode == -9 and not (output / "TRAINED").exists()
    resumed = script("supervised_finetuning.py", *words)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from" in resumed.stdout and "checkpoint-2" in resumed.stdout
    name = "adapter/adapter_model.safetensors"
    assert (output / name).read_bytes() == (whole / name).read_bytes()
