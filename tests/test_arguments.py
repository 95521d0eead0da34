"""Flags: what YAML and command line make of each other, and what a wrong one is told."""

from __future__ import annotations

import dataclasses
import importlib
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from stagecraft.arguments import (
    DECIDED,
    RENAMED,
    LoraArguments,
    ModelArguments,
    PreferenceDataArguments,
    RunArguments,
    SFTDataArguments,
    parse,
)
from stagecraft.errors import UserError
from stagecraft.flags import Words, trainer_flags

ROOT = Path(__file__).resolve().parents[1]
# Without serve_model.py, whose flags are the engine's (tests/serving).
SCRIPTS = sorted({path.name for path in (ROOT / "python").glob("*.py")} - {"serve_model.py"})
STAGES = {
    "transformers": SFTDataArguments,
    "reward": PreferenceDataArguments,
    "dpo": PreferenceDataArguments,
}
NEEDED = ["--model_name_or_path", "M", "--train_file_dir", "T", "--output_dir", "O"]


def parse_stage(*flags: str, trainer: str = "transformers", needed: list[str] = NEEDED) -> dict:
    """Every argument of a training stage in one dict; trainer flags only where they were set."""
    groups = (ModelArguments, LoraArguments, STAGES[trainer], RunArguments)
    *instances, training = parse("a stage", *groups, trainer=trainer, argv=[*needed, *flags])
    return {k: v for instance in instances for k, v in dataclasses.asdict(instance).items()} | training


def faults_of(*flags: str, **settings) -> list[str]:
    with pytest.raises(UserError) as caught:
        parse_stage(*flags, **settings)
    return str(caught.value).splitlines()


@pytest.fixture
def yaml_file(tmp_path):
    def write(name: str, text: str) -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


# What wins


def test_later_yaml_files_win_over_earlier_ones_and_flags_over_all(yaml_file):
    first = yaml_file("a.yaml", "lora_rank: 1\nlora_alpha: 1\nseed: 1\nlearning_rate: 1e-3\n")
    second = yaml_file("b.yaml", "lora_alpha: 2\nseed: 2\n")
    expected = {"lora_rank": 1, "lora_alpha": 2, "seed": 3, "learning_rate": 1e-3}
    for flags in (
        ("--config", first, second, "--seed", "3"),
        ("--seed", "3", "--config", first, second),
        ("--config", first, "--config", second, "--seed=3"),
    ):
        found = parse_stage(*flags)
        assert {name: found[name] for name in expected} == expected
    # Control: the other order gives the first file's values.
    assert parse_stage("--config", second, first)["lora_alpha"] == 1


def test_a_yaml_may_hold_everything_that_is_needed(yaml_file):
    path = yaml_file("a.yaml", "model_name_or_path: M\ntrain_file_dir: T\noutput_dir: O\n")
    assert parse_stage("--config", path, needed=[])["output_dir"] == "O"


def test_the_last_of_two_same_flags_wins():
    assert parse_stage("--seed", "1", "--seed", "2")["seed"] == 2


def test_an_empty_yaml_changes_nothing(yaml_file):
    assert parse_stage("--config", yaml_file("a.yaml", "# only a comment\n")) == parse_stage()


# Values


@pytest.mark.parametrize("text", ["2e-5", "2.0e-5", "0.00002", '"2e-5"'])
def test_a_number_in_yaml_is_a_number_however_it_is_written(yaml_file, text):
    assert parse_stage("--config", yaml_file("a.yaml", f"learning_rate: {text}\n"))["learning_rate"] == 2e-5


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (["--use_dora"], "use_dora", True),
        (["--use_dora", "--seed", "1"], "use_dora", True),
        (["--use_peft", "false"], "use_peft", False),
        (["--use_peft=False"], "use_peft", False),
        (["--use-peft", "no"], "use_peft", False),
        (["--target_modules", "q_proj", "v_proj"], "target_modules", ["q_proj", "v_proj"]),
        (["--target_modules", "all"], "target_modules", ["all"]),
        (["--report_to", "tensorboard"], "report_to", "tensorboard"),
        (["--report_to", "tensorboard", "wandb"], "report_to", ["tensorboard", "wandb"]),
        (["--lr_scheduler_type", "cosine"], "lr_scheduler_type", "cosine"),
        (["--lr_scheduler_kwargs", '{"num_cycles": 2}'], "lr_scheduler_kwargs", {"num_cycles": 2}),
        (["--device_map", "None"], "device_map", None),
        (["--modules_to_save", "None"], "modules_to_save", None),
        (["--warmup_steps", "0.1"], "warmup_steps", 0.1),
        (["--max_steps", "-1"], "max_steps", -1),
        (["--resume_from_checkpoint", "True"], "resume_from_checkpoint", "True"),
    ],
)
def test_words_become_values(flags, name, value):
    found = parse_stage(*flags)[name]
    assert (found, type(found)) == (value, type(value))


def test_a_list_in_yaml_is_a_list(yaml_file):
    path = yaml_file(
        "a.yaml", "loss_type: [sigmoid, sft]\nloss_weights: [1, 0.5]\ntarget_modules: [q_proj]\n"
    )
    found = parse_stage("--config", path, trainer="dpo")
    assert found["loss_type"] == ["sigmoid", "sft"]
    assert found["loss_weights"] == [1.0, 0.5]
    assert found["target_modules"] == ["q_proj"]


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        (["--lora_rank", "many"], "--lora_rank must be a whole number, not 'many'"),
        (["--lora_rank", "1.5"], "--lora_rank must be a whole number, not '1.5'"),
        (["--lora_dropout", "much"], "--lora_dropout must be a number, not 'much'"),
        (["--use_dora", "maybe"], "--use_dora must be true or false, not 'maybe'"),
        (["--lora_rank"], "--lora_rank needs one value, not 0"),
        (["--lora_rank", "1", "2"], 'stray word "2": values follow a flag (--name value)'),
        (["--config"], "--config needs the path of a YAML file"),
        (["--config", "none.yaml"], "--config none.yaml: No such file or directory"),
    ],
)
def test_a_wrong_value_is_told_with_its_flag(flags, fault):
    assert faults_of(*flags) == [fault]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("seed: 1\nlora_rank: true\n", ":2: lora_rank must be a whole number, not True"),
        ("seed: 1\n\nlora_rank: 1.5\n", ":3: lora_rank must be a whole number, not 1.5"),
        ("lora_rank: [1, 2]\n", ":1: lora_rank must be a whole number, not [1, 2]"),
        ("lora_rank:\n", ":1: lora_rank has no value"),
        ("seed: 1\nseed: 2\n", ':2: "seed" stands twice'),
        ("- seed\n", ':1: must hold "flag: value" lines'),
        ("seed: 1\nlora_rank: [1\n", ":3: not YAML: expected ',' or ']', but got '<stream end>'"),
    ],
)
def test_a_wrong_yaml_is_told_with_its_line(yaml_file, text, fault):
    path = yaml_file("a.yaml", text)
    assert faults_of("--config", path) == [path + fault]


def test_a_yaml_that_is_not_utf8_is_told(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes("seed: 1  # Grüße\n".encode("latin-1"))
    [fault] = faults_of("--config", str(path))
    assert str(path) in fault and "UTF-8" in fault


# Names


def test_an_unknown_key_names_the_nearest_with_its_line(yaml_file):
    path = yaml_file("a.yaml", "seed: 1\nlora_rnk: 8\n")
    assert faults_of("--config", path) == [f'{path}:2: unknown key "lora_rnk"; did you mean "lora_rank"?']


@pytest.mark.parametrize(
    ("flag", "fault"),
    [
        ("--lora_rnk", 'unknown flag "--lora_rnk"; did you mean "--lora_rank"?'),
        ("--per_device_train_batchsize", 'unknown flag "--per_device_train_batchsize"; '),
        ("--conifg", 'unknown flag "--conifg"; did you mean "--config"?'),
        ("--zzz", 'unknown flag "--zzz"; --help lists them'),
    ],
)
def test_an_unknown_flag_names_the_nearest(flag, fault):
    [found] = faults_of(flag, "8")
    assert found.startswith(fault)


def test_every_fault_of_a_pass_is_told_at_once(yaml_file):
    path = yaml_file("a.yaml", "lora_rnk: 8\nlora_alpha: x\nmax_length: 5\n")
    assert faults_of("--config", path, "none.yaml", "--zzz", "1", "--seed", "x") == [
        f'{path}:1: unknown key "lora_rnk"; did you mean "lora_rank"?',
        f"{path}:2: lora_alpha must be a whole number, not 'x'",
        f"{path}:3: max_length is not a flag of the kit: {DECIDED['max_length']}",
        "--config none.yaml: No such file or directory",
        'unknown flag "--zzz"; --help lists them',
        "--seed must be a whole number, not 'x'",
    ]


def test_contradictions_are_told_at_once():
    flags = [
        "--load_in_4bit",
        "--load_in_8bit",
        "--use_peft",
        "false",
        "--bf16",
        "--fp16",
        "--peft_path",
        "a",
    ]
    assert faults_of(*flags) == [
        "--load_in_4bit and --load_in_8bit exclude each other",
        "--load_in_4bit/--load_in_8bit need LoRA: quantised weights can't be trained (--use_peft true)",
        "--bf16 and --fp16 exclude each other",
        "--peft_path goes with --use_peft true",
    ]
    for flag in ("--load_in_4bit", "--load_in_8bit", "--bf16", "--fp16", "--use_peft"):  # control: each alone
        assert parse_stage(flag)[flag[2:]] is True


def test_flags_can_be_checked_and_nothing_else(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_stage("--lora_rank", "4", "--check_flags")
    assert (ended.value.code, capsys.readouterr().out) == (0, "")
    assert faults_of("--check_flags", "--lora_rnk", "4") == [
        'unknown flag "--lora_rnk"; did you mean "--lora_rank"?'
    ]
    assert faults_of("--check_flags", "--lora_rank", "0") == ["--lora_rank must be at least 1, not 0"]


def test_everything_that_is_missing_is_told_at_once():
    assert faults_of(needed=[]) == [
        "--model_name_or_path is missing: model folder (or hub id) to start from",
        "--train_file_dir is missing: folder (or file) of training rows",
        "--output_dir is missing: the stage's folder: adapter/ or model/, checkpoints/, logs/, run.json",
    ]


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (["--warmup_ratio", "0.1"], "warmup_steps", 0.1),
        (["--evaluation_strategy", "steps"], "eval_strategy", "steps"),
        (["--no_cuda"], "use_cpu", True),
        (["--no_cuda", "false"], "use_cpu", False),
        (["--group_by_length"], "train_sampling_strategy", "group_by_length"),
        (["--group_by_length", "false"], "train_sampling_strategy", "random"),
    ],
)
@pytest.mark.parametrize("trainer", STAGES)
def test_flags_of_older_guides_are_mapped_and_said(capsys, flags, name, value, trainer):
    if (
        value == "group_by_length" and trainer != "transformers"
    ):  # said, and then refused: rows are pairs there
        assert (
            "--train_sampling_strategy needs rows of one text each" in faults_of(*flags, trainer=trainer)[0]
        )
    else:
        assert parse_stage(*flags, trainer=trainer)[name] == value
    said = f"{flags[0]} is now --{name}: using {name}={value}\n"
    assert capsys.readouterr().err.lower() == said.lower()


def test_renamed_keys_in_yaml_are_said_with_their_line(yaml_file, capsys):
    path = yaml_file("a.yaml", "seed: 1\nwarmup_ratio: 0.05\n")
    assert parse_stage("--config", path)["warmup_steps"] == 0.05
    assert capsys.readouterr().err == f"{path}:2: warmup_ratio is now warmup_steps: using warmup_steps=0.05\n"


def test_a_renamed_flag_with_a_wrong_value_is_a_fault():
    assert faults_of("--group_by_length", "maybe") == ["--group_by_length must be true or false, not 'maybe'"]


@pytest.mark.parametrize("name", [name for name in DECIDED if name != "max_length"])
def test_decided_flags_are_refused_with_what_to_use(name):
    assert faults_of(f"--{name}", "1") == [f"--{name} is not a flag of the kit: {DECIDED[name]}"]


def test_what_a_refusal_names_exists():
    groups = (ModelArguments, LoraArguments, *STAGES.values(), RunArguments)
    ours = {item.name for group in groups for item in dataclasses.fields(group)}
    theirs = {name for trainer in STAGES for name in trainer_flags(trainer)} - DECIDED.keys()
    named = {name for text in DECIDED.values() for name in re.findall(r"--(\w+)", text)}
    assert named and named <= ours | theirs
    assert {new for new, _ in RENAMED.values()} <= theirs


# The trainers' own flags


def config_class(trainer: str) -> type:
    from transformers import TrainingArguments
    from trl import DPOConfig, RewardConfig

    return {"transformers": TrainingArguments, "reward": RewardConfig, "dpo": DPOConfig}[trainer]


@pytest.mark.parametrize("trainer", STAGES)
def test_every_field_of_the_trainer_is_a_flag_or_decided(trainer):
    real = {f.name for f in dataclasses.fields(config_class(trainer)) if f.init}
    assert real - trainer_flags(trainer).keys() == set()
    assert trainer_flags(trainer).keys() - real == set()
    faults = faults_of(*[f"--{name}" for name in real], "--control", trainer=trainer)
    assert [fault for fault in faults if "unknown" in fault] == [
        'unknown flag "--control"; --help lists them'
    ]


@pytest.mark.parametrize("trainer", STAGES)
def test_every_default_of_the_trainer_can_be_written_as_a_flag(trainer):
    """A flag's kind agrees with the library's: its own default, written out, is read as the same value."""
    checked = 0
    ours = {
        f.name for group in (ModelArguments, STAGES[trainer], RunArguments) for f in dataclasses.fields(group)
    }
    for item in dataclasses.fields(config_class(trainer)):
        value = item.default
        if item.name in DECIDED or item.name in ours or not isinstance(value, (bool, int, float, str)):
            continue
        value = getattr(value, "value", value)  # enumerations take their value's text
        read = trainer_flags(trainer)[item.name].convert(Words([str(value)]))
        assert read == value or (value == "no" and read is False), item.name  # some say False as "no"
        checked += 1
    assert checked > 50


# The scripts


@dataclass
class _Nothing:
    """Nothing"""

    seed: int = field(default=1, metadata={"help": "seed"})


def test_help_shows_groups_flags_and_defaults(capsys):
    with pytest.raises(SystemExit) as ended:
        parse("What it does.", _Nothing, argv=["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert "What it does." in shown and "Nothing" in shown and "--seed int" in shown and "seed [1]" in shown


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_works(script, run_script, tmp_path):
    done = run_script(script, "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    summary = (ROOT / "python" / script).read_text(encoding="utf-8").split('"""')[1].splitlines()[0]
    assert summary in done.stdout and "--" in done.stdout


WITHOUT_TORCH = """
import runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rsplit("/", 1)[0])
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(sorted({"torch", "transformers", "trl", "datasets", "peft"} & sys.modules.keys()))
"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_wrong_flag_is_told_before_torch_is_imported(script, tmp_path):
    words = ["check"] if script == "prepare_data.py" else []
    command = [sys.executable, "-c", WITHOUT_TORCH, str(ROOT / "python" / script), *words, "--zzz", "1"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (done.returncode, done.stdout) == (2, "[]\n")
    if "stagecraft.arguments" in (ROOT / "python" / script).read_text(encoding="utf-8"):
        assert done.stderr == 'unknown flag "--zzz"; --help lists them\n'
    else:  # show_status.py has the standard library only
        assert "--zzz" in done.stderr and "Traceback" not in done.stderr


def test_a_wrong_flag_is_told_within_3_s(run_script, tmp_path):
    began = time.monotonic()
    done = run_script("supervised_finetuning.py", *NEEDED, "--lora_rnk", "8", cwd=tmp_path)
    assert time.monotonic() - began < 3
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == 'unknown flag "--lora_rnk"; did you mean "--lora_rank"?\n'
    assert not any(tmp_path.iterdir())


STAGE_SCRIPTS = {
    "base": ("build_base", []),
    "pt": ("pretraining", ["--train_file_dir", "T"]),
    "sft": ("supervised_finetuning", ["--train_file_dir", "T"]),
    "rm": ("reward_modeling", ["--train_file_dir", "T"]),
    "dpo": ("dpo_training", ["--train_file_dir", "T"]),
    "eval": ("evaluate_model", []),
}
RECIPES = sorted((ROOT / "recipes").glob("*/*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_recipe_is_read_by_its_stage(recipe, tmp_path, monkeypatch):
    """The script itself reads the recipe: the one fault it finds is the folder that is not there."""
    script, flags = STAGE_SCRIPTS[recipe.stem.split("-")[0]]
    missing = str(tmp_path / "missing")
    model = ["--models", f"sft={missing}"] if recipe.stem == "eval" else ["--model_name_or_path", missing]
    if recipe.stem == "base":  # it would ask the hub for a name that is no folder
        model = ["--train_file_dir", missing]
    flags = ["--config", str(recipe), *model, *flags, "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [script, *flags])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        importlib.import_module(script).main()
    faults = [line for line in str(caught.value).splitlines() if "eval_dir" not in line]
    assert faults and all(missing in line and "no such" in line for line in faults)


def test_a_recipe_with_a_wrong_key_would_be_found(tmp_path, monkeypatch, yaml_file):
    """Control of the test above."""
    flags = ["--model_name_or_path", "M", "--train_file_dir", "T", "--output_dir", "O"]
    monkeypatch.setattr(sys, "argv", ["x", "--config", yaml_file("sft.yaml", "blok_size: 1\n"), *flags])
    with pytest.raises(UserError, match='unknown key "blok_size"'):
        importlib.import_module("supervised_finetuning").main()
