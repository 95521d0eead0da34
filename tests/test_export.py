"""An export is 8 bits, complete and near its source; what can't be exported is refused before anything is loaded."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import export_model
from export_model import ExportArguments
from stagecraft import exporting
from stagecraft.errors import UserError
from stagecraft.exporting import Calibration

ROOT = Path(__file__).resolve().parents[1]
PYTHON = os.environ.get("EXPORT_PYTHON") or str(ROOT / ".venv-export/bin/python")
NO_DATA = ("--calibration_data", "none")
# What sets it apart from `make test`: an environment of 1.5 GB that only `make export` makes.
installed = pytest.mark.skipif(
    not Path(PYTHON).exists(), reason="no .venv-export (make export makes it) and no EXPORT_PYTHON"
)
SPOIL = """
import sys
from pathlib import Path
from stagecraft import exporting
from safetensors.torch import load_file, save_file

if __name__ == "__main__":
    source, export, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    tensors = load_file(export / "model.safetensors")
    scale = "model.layers.1.mlp.up_proj.weight_scale"
    if kind == "changed":
        tensors[scale] *= 1.1
        tensors["model.norm.weight"] += 1
    else:
        del tensors[scale]
    save_file(tensors, export / "model.safetensors", metadata={"format": "pt"})
    print(*exporting.prove(source, export, "int8")[1], sep="\\n")
"""
FUSSY = """
import export_model
from stagecraft import exporting

exporting.MAX_ERROR = 1e-6
export_model.run_main(export_model.main)
"""


@pytest.fixture
def stage(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout's folder with a finished stage; the working directory is there."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_base, "outputs-dpo/tiny/model")
    Path("data/finetune").mkdir(parents=True)
    row = {"conversations": [{"from": "human", "value": "头痛"}, {"from": "gpt", "value": "多喝水。"}]}
    Path("data/finetune/rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    return Path("outputs-dpo/tiny/model")


def refused(**settings: object) -> list[str]:
    settings = {"model": "outputs-dpo/tiny/model", **settings}
    with pytest.raises(UserError) as caught:
        export_model.check(ExportArguments(**settings))
    return str(caught.value).splitlines()


def change_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


# The folder


@pytest.mark.parametrize(
    ("model", "settings", "output"),
    [
        ("outputs-dpo/tiny/model", {}, "outputs-export/tiny/dpo-fp8"),
        ("./outputs-dpo/tiny/model/", {"format": "int8"}, "outputs-export/tiny/dpo-int8"),
        ("../here/outputs-sft/qwen2.5-3b/model", {}, "../here/outputs-export/qwen2.5-3b/sft-fp8"),
        ("merged", {"output_dir": "small"}, "small"),
    ],
)
def test_the_export_lies_beside_the_stages(tmp_path, monkeypatch, model, settings, output):
    monkeypatch.chdir(tmp_path)
    faults: list[str] = []
    args = ExportArguments(model, **settings)
    assert (export_model.output_of(Path(model), args, faults), faults) == (Path(output), [])


def test_an_export_is_replaced_only_on_demand_and_nothing_else_is(stage):
    output = Path("outputs-export/tiny/dpo-fp8")
    output.mkdir(parents=True)
    assert export_model.check(ExportArguments(str(stage))) == (output, Calibration(None, 128))  # empty
    shutil.copy(stage / "config.json", output)
    assert refused() == [f"--output_dir {output}: not empty; --overwrite_output_dir replaces it"]
    assert refused(overwrite_output_dir=True) == [
        f"--output_dir {output}: holds no export that could be replaced; choose another folder"
    ]
    change_config(output, quantization_config={"quant_method": "compressed-tensors"})
    assert export_model.check(ExportArguments(str(stage), overwrite_output_dir=True))[0] == output


def test_int8_takes_the_recipes_conversations_unless_told_otherwise(stage):
    for asked, data in (("auto", "data/finetune"), ("none", None), ("data/finetune", "data/finetune")):
        args = ExportArguments(str(stage), format="int8", calibration_data=asked)
        assert export_model.check(args) == (Path("outputs-export/tiny/dpo-int8"), Calibration(data, 128))


# What is refused


def test_a_folder_that_is_no_model_is_refused(stage):
    assert refused(model="outputs-sft/tiny/model") == ["--model outputs-sft/tiny/model: no such folder"]
    (stage / "tokenizer.json").unlink()
    assert refused() == [f"--model {stage}: not a complete model folder: tokenizer.json missing"]


def test_a_reward_model_is_refused_with_the_reason(stage):
    change_config(stage, architectures=["Qwen3ForSequenceClassification"])
    assert refused() == [
        f"--model {stage}: a reward model, which scores answers and gives none: there is nothing to serve"
    ]


def test_faults_are_told_together(stage):
    change_config(stage, quantization_config={"quant_method": "gptq"})
    assert refused(calibration_data="data/finetune", calibration_rows=0, output_dir=str(stage)) == [
        f"--model {stage}: its weights are quantised; export the full-precision model",
        f"--output_dir {stage}: holds the model to export; choose another folder",
        "--calibration_data data/finetune: fp8 takes no data; leave it out",
        "--calibration_rows must be at least 1, not 0",
    ]


def test_missing_calibration_data_is_told_with_the_way_out(stage):
    assert refused(format="int8", calibration_data="data/none") == [
        "--calibration_data data/none: no such file or folder; --calibration_data none exports without data"
    ]


def test_a_model_elsewhere_needs_a_folder(stage):
    stage.rename("merged")
    assert refused(model="merged") == ["--output_dir is missing: merged is no outputs-STAGE/RECIPE/model"]


def test_damaged_weights_are_told_before_they_are_loaded(stage):
    weights = stage / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    [line] = refused()
    assert line.startswith(f"--model {stage}: model.safetensors")


def test_flags_are_checked_in_silence(run_script: Callable):
    done = run_script("export_model.py", "--model", "nowhere", "--check_flags")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = run_script("export_model.py", "--model", "nowhere", "--format", "gguf", "--calibration_row", "8")
    assert (done.returncode, done.stderr.splitlines()) == (
        2,
        [
            "--format must be one of fp8, int8, not 'gguf'",
            'unknown flag "--calibration_row"; did you mean "--calibration_rows"?',
        ],
    )


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"STAGE": "rm"},
            "STAGE=rm: a reward model scores answers and gives none, so there is nothing to serve; export another stage",
        ),
        ({}, 'STAGE="": must be base, pt, sft, dpo or ppo'),
        (
            {"STAGE": "dpo", "FORMAT": "gguf"},
            'FORMAT="gguf": must be fp8 or int8 (for other formats no well-kept library is on the package index)',
        ),
        (
            {"STAGE": "dpo", "RECIPE": "none"},
            "STAGE=dpo RECIPE=none: not finished (no outputs-dpo/none/DONE); run: make dpo RECIPE=none",
        ),
    ],
)
def test_the_script_refuses_before_it_installs(variables, message):
    surroundings = {k: v for k, v in os.environ.items() if k not in ("STAGE", "FORMAT", "RECIPE")} | variables
    done = subprocess.run(
        [ROOT / "scripts/export.sh"], env=surroundings, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message + "\n")


# Calibration rows


def test_rows_are_drawn_from_all_of_a_folder_and_the_same_again(stage, tokenizer):
    talks = [
        {"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "a cough"}]}
        for i in range(300)
    ]
    Path("data/finetune/more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talks))
    rows = Calibration("data/finetune", 40)
    texts = [tokenizer.decode(ids) for ids in exporting.draw(str(stage), rows, tokenizer)["input_ids"]]
    numbers = [int(text.split("user\n")[1].split("<")[0]) for text in texts if "a cough" in text]
    assert len(texts) == 40 and len(set(numbers)) == len(numbers) >= 38
    assert min(numbers) < 100 and max(numbers) >= 200
    again = exporting.draw(str(stage), rows, tokenizer)["input_ids"]
    assert [tokenizer.decode(ids) for ids in again] == texts


def test_rows_that_cannot_be_used_are_told_by_line(stage, tokenizer):
    with Path("data/finetune/rows.jsonl").open("a") as stream:
        stream.write('{"text": "no conversation"}\n')
    with pytest.raises(UserError) as caught:
        exporting.draw(str(stage), Calibration("data/finetune", 128), tokenizer)
    assert str(caught.value).startswith("data/finetune/rows.jsonl:3: ")


# The verdict


def test_an_export_is_judged_by_every_figure():
    sound = {"errors": {"a.weight": 0.02}, "spoiled": [], "kl": 0.01}
    assert exporting.judge(sound) == []
    assert exporting.judge({"errors": {}, "spoiled": ["b"], "kl": math.nan}) == [
        "b: lost, or changed without being quantised",
        "no matrix was quantised",
        "KL to the source is nan a token (limit 0.1)",
    ]
    assert exporting.judge(sound | {"errors": {"a.weight": 0.1}, "kl": 0.8}) == [
        "a.weight: 10.0% away from the source (limit 7%)",
        "KL to the source is 0.8 a token (limit 0.1)",
    ]


def test_the_card_carries_the_report_and_the_sources_card(stage, tmp_path):
    (stage / "README.md").write_text("---\nlicense: mit\n---\n# Merged\nfrom base and adapter\n")
    export_model.write_card(stage, tmp_path, Path("outputs-export/tiny/dpo-fp8"), {"KL": "0.01"})
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("# tiny dpo-fp8\n\n| | |\n|---|---|\n| KL | 0.01 |\n")
    assert (
        text.endswith("## Card of the source\n\n# Merged\nfrom base and adapter\n") and "license" not in text
    )


# For real


def run(*words: object) -> subprocess.CompletedProcess[str]:
    """A command of the export environment, with the kit's modules."""
    surroundings = os.environ | {"PYTHONPATH": str(ROOT / "python")}
    command = [PYTHON, *map(str, words)]
    return subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=300)


def export(stage: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return run(ROOT / "python/export_model.py", "--model", stage, *flags)


@installed
@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (["--format", "fp8"], "F8_E4M3"),
        (["--format", "int8"], "I8"),
        (["--format", "int8", *NO_DATA], "I8"),
    ],
    ids=["fp8", "int8", "int8 without data"],
)
def test_an_export_is_complete_and_near_its_source(stage, flags, code):
    from stagecraft.merging.tensors import open_weights

    done = export(stage, *flags)
    assert done.returncode == 0, done.stderr
    output = Path(f"outputs-export/tiny/dpo-{flags[1]}")
    assert [entry.name for entry in output.parent.iterdir()] == [output.name]
    assert done.stdout.splitlines()[-1].startswith(f"complete model for vLLM: {output}; ")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (output / name).read_bytes() == (stage / name).read_bytes(), name
    before, after = open_weights(stage), open_weights(output)
    quantised = {name for name, tensor in after.items() if tensor.dtype == code}
    assert quantised == {name for name in before if "_proj" in name} and len(quantised) == 14
    assert after.keys() - before.keys() == {f"{name}_scale" for name in quantised}
    config = json.loads((output / "config.json").read_text())
    settings = config.pop("quantization_config")
    assert config == json.loads((stage / "config.json").read_text())
    assert (settings["quant_method"], settings["ignore"]) == ("compressed-tensors", ["lm_head"])
    assert settings["config_groups"]["group_0"]["input_activations"]["strategy"] == "token"
    report = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line.startswith("KL"))
    assert float(report["KL"].split()[0]) < exporting.WARN_KL
    assert f"| KL | {report['KL']} |" in (output / "README.md").read_text()
    [step] = json.loads((output / "lineage.json").read_text())["steps"]
    assert (step["stage"], step["base"]) == ("export", str(stage))


@installed
def test_a_spoiled_export_is_caught(stage, tmp_path):
    assert export(stage, "--output_dir", "good", "--format", "int8", *NO_DATA).returncode == 0
    (tmp_path / "spoil.py").write_text(SPOIL)
    found = {}
    for kind in ("changed", "lost"):
        shutil.copytree("good", kind)
        done = run("spoil.py", stage, kind, kind)
        assert done.returncode == 0, done.stderr
        found[kind] = done.stdout.splitlines()
    assert found["changed"][:2] == [
        "model.norm.weight: lost, or changed without being quantised",
        "model.layers.1.mlp.up_proj.weight: 10.0% away from the source (limit 7%)",
    ]
    assert found["lost"] == [
        "the export does not load: lost: weights are missing in its files: model.layers.1.mlp.up_proj.weight_scale"
    ]


@installed
def test_an_export_that_fails_its_proof_leaves_the_one_before(stage):
    output = Path("outputs-export/tiny/dpo-int8")
    assert export(stage, "--format", "int8", *NO_DATA).returncode == 0
    (output / "mine").touch()
    done = run("-c", FUSSY, "--model", stage, "--format", "int8", *NO_DATA, "--overwrite_output_dir")
    assert done.returncode == 1
    assert "\nproof failed: model.layers.0." in done.stderr  # after the bars
    assert done.stderr.splitlines()[-1] == f"kept as {output}.failed to look at"
    assert sorted(entry.name for entry in output.parent.iterdir()) == ["dpo-int8", "dpo-int8.failed"]
    assert (output / "mine").exists() and not Path(f"{output}.failed/mine").exists()
