"""A run's folder: one run at a time, nobody else's files touched, whole files, resumed only as the same run."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from stagecraft import files, manifest, run
from stagecraft.arguments import LoraArguments, ModelArguments, RunArguments
from stagecraft.data.corpus import Corpus
from stagecraft.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def stage(folder: Path, base: object = "none", training: dict | None = None, lora: bool = True, **settings):
    args = RunArguments(output_dir=str(folder), **settings)
    groups = (ModelArguments(model_name_or_path=str(base)), LoraArguments(use_peft=lora))
    return run.stage("pt", args, *groups, training={} if training is None else training)


def told(caught: pytest.ExceptionInfo) -> list[str]:
    return str(caught.value).splitlines()


def fill(folder: Path, *names: str) -> None:
    """Files (or, for a name with a slash, folders with a file)."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("kept\n")


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def own_events(tmp_path, monkeypatch):
    """A stage sets this variable for its process; here many stages share one."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))


# One run at a time

HOLD = "import sys, pathlib; from stagecraft import run\nwith run.lock(pathlib.Path(sys.argv[1])):\n"
HOLD += "    print('held', flush=True); sys.stdin.read()"


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path/out until its input ends."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT / "python"
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.parametrize("ends_by", ["itself", "SIGKILL"])
def test_a_second_run_is_refused_until_the_first_has_ended(holder, tmp_path, ends_by):
    out = tmp_path / "out"
    with pytest.raises(UserError) as caught, run.lock(out):
        pass
    [line] = told(caught)
    assert line.startswith(f"--output_dir {out}: in use by process {holder.pid} since 20")
    with pytest.raises(UserError, match=f"in use by process {holder.pid} "), stage(out):
        pass
    assert names_in(out) == {".lock"}  # the second run left nothing
    with run.lock(tmp_path / "other"):  # control: another folder is free
        pass
    if ends_by == "itself":
        holder.stdin.close()
    else:
        holder.send_signal(signal.SIGKILL)
    holder.wait(timeout=30)
    with run.lock(out), pytest.raises(UserError, match="in use by process"), run.lock(out):
        pass
    with stage(out):
        pass


# What lies in the folder already


def test_a_new_folder_is_made_and_described(tmp_path):
    with stage(tmp_path / "a" / "b", lora=False):
        print("said")
    assert names_in(tmp_path / "a" / "b") == {".lock", "logs/train.log"}
    assert (tmp_path / "a/b/logs/train.log").read_text() == f"pt: none -> {tmp_path}/a/b\nsaid\n"


@pytest.mark.parametrize("marker", ["TRAINED", "DONE"])
def test_a_finished_run_is_not_replaced_unasked(tmp_path, marker):
    fill(tmp_path, "adapter/weights", "model/weights", "run.json", marker)
    before = names_in(tmp_path)
    with pytest.raises(UserError) as caught, stage(tmp_path):
        pass
    [line] = told(caught)
    assert line.startswith(
        f"--output_dir {tmp_path}: holds a finished run ({marker}); --overwrite_output_dir replaces"
    )
    assert names_in(tmp_path) == before | {".lock"}


def test_overwriting_removes_what_a_stage_left_and_nothing_else(tmp_path):
    own = (
        "TRAINED",
        "DONE",
        "run.json",
        "adapter/weights",
        "model/weights",
        "logs/train.log",
        "logs/events.1",
    )
    foreign = ("notes.txt", "plots/loss.png", "model-of-mine/weights", ".gitkeep")
    fill(tmp_path, *own, *foreign)
    with stage(tmp_path, overwrite_output_dir=True) as started:
        assert {*own, *foreign} <= names_in(tmp_path)  # flags and data may still turn out to be wrong
        started.clear_finished()
        left = names_in(tmp_path)
        assert {*foreign, "logs/train.log"} <= left
        assert not {"TRAINED", "DONE", "adapter/weights", "model/weights", "logs/events.1"} & left
    assert all((tmp_path / name).read_text() == "kept\n" for name in foreign)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_other_files_is_refused(tmp_path, overwrite):
    fill(tmp_path, "thesis.tex", "figures/one.png", "model/weights")
    before = names_in(tmp_path)
    with pytest.raises(UserError) as caught, stage(tmp_path, overwrite_output_dir=overwrite):
        pass
    assert told(caught) == [
        f"--output_dir {tmp_path}: holds other files (figures, thesis.tex); choose an empty folder"
    ]
    assert names_in(tmp_path) == before | {".lock"}


@pytest.mark.parametrize("name", [".gitkeep", ".adapter.tmp/weights", ".model.tmp/weights", ".run.json.tmp"])
def test_what_a_killed_run_may_leave_does_not_stop_the_next(tmp_path, name):
    fill(tmp_path, name, "logs/train.log", "checkpoints/identity.json")
    with stage(tmp_path):
        pass


def test_a_file_where_the_folder_should_be_is_told(tmp_path):
    fill(tmp_path, "out")
    with pytest.raises(UserError, match=f"--output_dir {tmp_path}/out: "), stage(tmp_path / "out"):
        pass
    assert (tmp_path / "out").read_text() == "kept\n"


# Disk

Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    ("lora", "training", "needed"),
    [
        (True, {}, 250),  # the merged model, and 50 MB beside it
        (False, {}, 250),  # the model; checkpoints are counted when the trainer is there
    ],
)
def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch, lora, training, needed):
    base = tmp_path / "base"
    base.mkdir()
    with (base / "model.safetensors").open("wb") as stream:
        stream.truncate(200_000_000)
    out = tmp_path / "new" / "out"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, needed * 1_000_000 - 1))
    with pytest.raises(UserError) as caught, stage(out, base, training, lora):
        pass
    [line] = told(caught)
    assert line.startswith(
        f"--output_dir {out}: {needed:,} MB are free, about {needed:,} MB will be written; free "
    )
    assert not out.parent.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, needed * 1_000_000))  # control
    with stage(out, base, training, lora):
        pass


# Whole files


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"name": "值"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"name": "值"}
    whole = path.read_bytes()
    with pytest.raises(UnicodeEncodeError):
        files.write_text(path, "x" * 100_000 + "\ud800")  # fails after the first part is on disk
    assert path.read_bytes() == whole
    files.write_text(path, "new")
    assert path.read_text() == "new"
    assert names_in(tmp_path) == {"a.json"}


def test_a_folder_takes_the_place_of_an_older_one(tmp_path):
    fill(tmp_path, "new/a", "old/b")
    files.replace_folder(tmp_path / "new", tmp_path / "old")
    assert names_in(tmp_path) == {"old/a"}


# The log


def test_the_log_keeps_the_last_state_of_a_bar(tmp_path, capsys):
    log = tmp_path / "logs" / "train.log"
    with run.tee(log):
        print("before")
        for part in ("\r 10%", "\r 50%", "\r100%", "\n"):
            sys.stderr.write(part)
        print("after\r")
    assert log.read_text() == "before\n100%\nafter\n"
    assert capsys.readouterr() == ("before\nafter\r\n", "\r 10%\r 50%\r100%\n")  # the terminal has it all
    with run.tee(log):
        print("again")
    assert log.read_text() == "before\n100%\nafter\nagain\n"


def test_the_log_keeps_what_was_not_ended_by_a_line_end(tmp_path):
    log = tmp_path / "train.log"
    with pytest.raises(RuntimeError), run.tee(log):
        sys.stderr.write("\r 10%\r 50%")  # a bar that an error cuts off
        raise RuntimeError("broke")
    lines = log.read_text().splitlines()
    assert " 50%" in lines and "RuntimeError: broke" in lines and not any("10%" in line for line in lines)


def test_errors_are_in_the_log_a_bug_with_its_traceback_a_mistake_without(tmp_path):
    log = tmp_path / "train.log"
    with pytest.raises(UserError), run.tee(log):
        raise UserError("--seed 1: no", "--seed 2: no")
    assert log.read_text() == "--seed 1: no\n--seed 2: no\n"
    with pytest.raises(ZeroDivisionError), run.tee(log):
        1 / 0  # noqa: B018
    assert "Traceback" in log.read_text() and "ZeroDivisionError" in log.read_text()
    assert (sys.stdout.__class__.__name__, sys.stderr.__class__.__name__) != ("_Tee", "_Tee")


# The manifest

SECRET = "hf_abcdefgh"


@pytest.mark.parametrize(
    "flags", [["--hub_token", SECRET], [f"--hub_token={SECRET}"], [f"--hub-token={SECRET}"]]
)
def test_the_manifest_holds_the_command_but_no_secret(monkeypatch, flags):
    monkeypatch.setattr(sys, "argv", ["pretraining.py", "--seed", "7", *flags, "--max_steps", "3"])
    told = manifest.describe_run(
        "pt", {"hub_token": SECRET, "seed": 7, "some_api_key": SECRET, "learning_rate": 1e-3}
    )
    assert told["arguments"] == {"seed": 7, "learning_rate": 1e-3}
    assert told["command"].startswith("pretraining.py --seed 7 ") and told["command"].endswith(
        " --max_steps 3"
    )
    assert SECRET not in json.dumps(told)
    assert told["versions"]["torch"] and told["stage"] == "pt"


# Training, interrupted and gone on with


@pytest.fixture
def train(tiny_base, tokenizer, tmp_path):
    """train(crash_after=step, ...): 3 steps in tmp_path/out with a checkpoint a step; returns the stage."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments

    from stagecraft.training.language import LanguageTrainer

    ids = tokenizer("多喝水，注意休息。 Rest at home.")["input_ids"][:8]
    rows = Dataset.from_list([{"input_ids": ids, "labels": ids}] * 6)

    def run_training(
        crash_after: int = 0, sha256: str = "a", learning_rate: float = 1e-3, more=None, **settings
    ):
        class Crash(TrainerCallback):
            def on_save(self, args, state, control, **kwargs):
                if state.global_step == crash_after:
                    raise RuntimeError("crashed")

        training = {
            "max_steps": 3,
            "save_steps": 1,
            "per_device_train_batch_size": 2,
            "learning_rate": learning_rate,
            "seed": 7,
            "save_total_limit": 2,
            **(more or {}),
        }
        corpus = Corpus(rows, None, {"tokens an epoch": 48}, [{"path": "rows.jsonl", "sha256": sha256}])
        with stage(tmp_path / "out", tiny_base, training, lora=False, **settings) as current:
            args = current.configure(TrainingArguments, training)
            model = AutoModelForCausalLM.from_pretrained(tiny_base)
            trainer = LanguageTrainer(model, args, corpus, tokenizer, padding_free=True)
            trainer.add_callback(Crash())
            current.train(trainer, corpus)
            current.finish(trainer, tokenizer, end_ids=None)
        return current

    return run_training


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def test_an_interrupted_run_goes_on_and_ends_where_an_uninterrupted_one_does(train, tmp_path, capsys):
    out = tmp_path / "out"
    train()
    straight = weights(out)
    assert "resuming" not in capsys.readouterr().out
    shutil.rmtree(out)
    with pytest.raises(RuntimeError, match="crashed"):
        train(crash_after=2)
    assert not {"TRAINED", "DONE", "run.json"} & names_in(out) and not (out / "model").exists()
    train(more={"save_total_limit": 1})  # what is kept changes no weight
    assert f"resuming from {out}/checkpoints/checkpoint-2\n" in capsys.readouterr().out
    assert weights(out) == straight
    assert {"TRAINED", "run.json"} <= names_in(out) and not (out / "DONE").exists()
    assert not (out / "checkpoints").exists()
    told = json.loads((out / "run.json").read_text())
    assert told["metrics"]["steps"] == 3 and told["seed"] == 7 and told["counts"] == {"tokens an epoch": 48}
    assert told["data"] == [{"path": "rows.jsonl", "sha256": "a"}]
    # Control: another learning rate ends elsewhere.
    train(learning_rate=2e-3, overwrite_output_dir=True)
    assert weights(out) != straight


def test_going_on_with_changed_arguments_is_refused_with_the_differences(train, tmp_path, capsys):
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="crashed"):
        train(crash_after=1)
    with pytest.raises(UserError) as caught:
        train(learning_rate=0.5, sha256="b", more={"weight_decay": 0.1})
    assert told(caught) == [
        f"--output_dir {out}: holds checkpoint-1 of another run:",
        "  learning_rate: 0.001 -> 0.5",
        "  weight_decay: None -> 0.1",
        "  rows.jsonl: the file's content changed",
        "--resume_anyway goes on all the same, --resume_from_checkpoint False starts afresh and removes it",
    ]
    assert (out / "checkpoints" / "checkpoint-1").exists() and not (out / "TRAINED").exists()
    # What the message offers, works.
    with pytest.raises(RuntimeError, match="crashed"):
        train(crash_after=2, learning_rate=0.5, resume_anyway=True)
    assert f"resuming from {out}/checkpoints/checkpoint-1\n" in capsys.readouterr().out
    with pytest.raises(UserError):  # leave to replace a finished run is none to replace this one
        train(learning_rate=1e-3, overwrite_output_dir=True)
    train(learning_rate=1e-3, resume_from_checkpoint="False")
    said = capsys.readouterr().out
    assert "checkpoint-2 is removed, as asked: starting from the beginning\n" in said
    assert "resuming" not in said and (out / "TRAINED").exists()


def test_a_fresh_start_can_be_asked_for(train, capsys):
    with pytest.raises(RuntimeError, match="crashed"):
        train(crash_after=1)
    train(resume_from_checkpoint="False")
    said = capsys.readouterr().out
    assert "checkpoint-1 is removed, as asked: starting from the beginning\n" in said
    assert "resuming" not in said


def test_a_checkpoint_that_is_not_there_is_told(train, tmp_path):
    with pytest.raises(UserError) as caught:
        train(resume_from_checkpoint="True")
    assert told(caught) == [f"--resume_from_checkpoint True: no checkpoint in {tmp_path}/out/checkpoints"]
    with pytest.raises(UserError) as caught:
        train(resume_from_checkpoint=str(tmp_path))
    assert told(caught) == [
        f"--resume_from_checkpoint {tmp_path}: no complete checkpoint there; name another one"
    ]


def test_no_secret_reaches_the_folder(train, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pretraining.py", "--hub_token", SECRET])
    with pytest.raises(RuntimeError, match="crashed"):
        train(crash_after=1, more={"hub_token": SECRET})
    train(more={"hub_token": "hf_another"})  # another token is no other run
    files = [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".json", ".jsonl", ".log")]
    assert len(files) > 3
    assert not [path for path in files if "hf_a" in path.read_text(encoding="utf-8")]


def test_flags_the_trainer_refuses_are_told(tmp_path):
    from transformers import TrainingArguments

    training = {"eval_strategy": "sometimes"}
    with (
        pytest.raises(UserError, match=r"^the trainer refuses these flags: .*sometimes.* is not a valid"),
        stage(tmp_path / "out", training=training) as current,
    ):
        current.configure(TrainingArguments, training)


def test_a_lock_left_by_a_killed_build_is_removed_and_a_held_one_stays(tmp_path, monkeypatch, capsys):
    """torch waits for ever for a lock whose holder was killed while it compiled an extension."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    stale, held = tmp_path / "py311" / "cpu_adam" / "lock", tmp_path / "py311" / "other" / "lock"
    for file in (stale, held):
        file.parent.mkdir(parents=True)
        file.touch()
    with held.open():
        run._clear_stale_builds()
    assert not stale.exists() and held.exists()
    assert capsys.readouterr().out == f"{stale}: left by a build that was killed: removed\n"
