"""Make's graph: what runs after what changed.

The kit's own Makefile and scripts run in a copy of the repository. Only .venv/bin/python is another program:
it notes its arguments and leaves the files that a real run leaves.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYTHON = r"""#!/usr/bin/env bash
# Note the call; leave what the script would have left; with FAIL=words, a call with these leaves nothing and fails
# (FAIL_LOOK=words: a call that only looks; FAIL_LATE=words: all is left, but the call fails or, with SLOW, waits).
set -eu
if [[ $1 == python/supervise.py && $2 != --ranks ]]; then exec "${@:2}"; fi
if [[ $1 == python/check_inputs.py ]]; then exec REAL_PYTHON "$@"; fi
echo "$*" >>calls.log
call=$*
case "$*" in
  *--check_flags* | *prepare_data*) [[ "$*" != *"${FAIL_LOOK:-nothing}"* ]] && exit || exit 3 ;;
  *"${FAIL:-nothing}"*) exit "${STATUS:-3}" ;;
esac
script=x config=/dev/null output='' stage='' model=null data=null
while (($#)); do
  case $1 in
    python/supervise.py) ;;
    python/*.py) script=$1 ;;
    --output_dir) output=$2 ;;
    --stage_dir) stage=$2 ;;
    --config) config=$2 ;;
    --model_name_or_path) model="\"$2\"" ;;
    --train_file_dir) data="\"$2\"" ;;
  esac
  shift
done
run() {
  echo "{\"started\": \"$(date +%s%N)\", \"arguments\": {\"model_name_or_path\": $model, \"train_file_dir\": $data}}" \
    >"$output/run.json"
}
made() { # of the same flags, YAML, data and model the same weights, as a real stage makes them
  mkdir -p "$1"
  from=(${model//\"/} ${data//\"/})
  (echo "$call" && cat "$config" && cat $(find -L ${from[@]//null/} -name '*.jsonl' -o -name '*.safetensors' | sort)) |
    md5sum >"$1/model.safetensors"
  echo '{}' >"$1/config.json"
  date +%s%N >"$1/lineage.json"
}
case $script in
  python/build_base.py)
    made "$output/model"
    run
    touch "$output/DONE"
    ;;
  python/evaluate_model.py) mkdir -p "$output"; date +%s%N >"$output/DONE" ;;
  python/merge_lora.py)
    test -f "$stage/TRAINED"
    cp -r "$stage/adapter" "$stage/model.new" && rm -rf "$stage/model" && mv "$stage/model.new" "$stage/model"
    touch "$stage/DONE"
    ;;
  python/chat.py) cat ;;
  python/*ing.py)
    mkdir -p "$output/logs"
    made "$output/adapter"
    rm -f "$output/DONE"
    run
    date +%s%N >"$output/TRAINED"
    ;;
esac
if [[ $call == *"${FAIL_LATE:-nothing}"* ]]; then
  if [[ -n ${SLOW:-} ]]; then sleep 20; fi
  exit 3
fi
"""
STAGES = ("pt", "sft", "rm", "dpo")
SCRIPTS = {
    "build_base": "base",
    "pretraining": "pt",
    "supervised_finetuning": "sft",
    "reward_modeling": "rm",
    "dpo_training": "dpo",
    "evaluate_model": "eval",
}
EVERYTHING = ["base", "pt", "pt+", "sft", "sft+", "rm", "rm+", "dpo", "dpo+", "eval"]
SFT_ON = ["sft", "sft+", "rm", "rm+", "dpo", "dpo+", "eval"]


class Kit:
    """A copy of the repository in which commands run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("Makefile", "scripts", "recipes/tiny"):
            source = ROOT / name
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, folder / name)
        for name in ("base", *STAGES, "eval"):
            (folder / f"recipes/tiny/{name}.yaml").touch()
        for name in ("pretrain", "finetune", "reward", "eval"):
            (folder / "data" / name).mkdir(parents=True)
            (folder / "data" / name / "rows.jsonl").write_text("{}\n")
        (folder / "python").mkdir()
        for name in ("show_status", "follow_log", "check_inputs"):
            shutil.copy(ROOT / f"python/{name}.py", folder / "python")
        (folder / "python/stagecraft").symlink_to(ROOT / "python/stagecraft")
        for name in (*SCRIPTS, "merge_lora", "chat", "prepare_data"):
            (folder / "python" / f"{name}.py").touch()
        (folder / "requirements").mkdir()
        (folder / "requirements/export.txt").touch()
        (folder / ".venv/bin").mkdir(parents=True)
        for name in (".stagecraft-env", ".stagecraft-test"):
            (folder / ".venv" / name).touch()
        (folder / ".venv/bin/python").write_text(PYTHON.replace("REAL_PYTHON", sys.executable))
        (folder / ".venv/bin/python").chmod(0o755)

    @classmethod
    def at(cls, folder: Path) -> "Kit":
        """The kit that is in a folder already."""
        kit = cls.__new__(cls)
        kit.folder = folder
        return kit

    def change(self, name: str) -> None:
        """Give a file another content."""
        with (self.folder / name).open("a") as stream:
            stream.write("{}\n" if name.endswith("jsonl") else "# changed\n")

    def age(self) -> None:
        """Set every file and folder back by a minute: what changes next is newer at any grain of the clock."""
        for parent, _, names in os.walk(self.folder):
            for path in (parent, *(os.path.join(parent, name) for name in names)):
                status = os.stat(path)
                os.utime(path, ns=(status.st_atime_ns - 60 * 10**9, status.st_mtime_ns - 60 * 10**9))

    def run(self, *words: str, stdin: str | None = None, **environment: str) -> subprocess.CompletedProcess:
        """A command, by default on a machine without CUDA and without variables of the caller's."""
        kept = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(
            words,
            check=False,
            cwd=self.folder,
            env=kept | environment,
            capture_output=True,
            text=True,
            input=stdin,
        )

    def make(self, *words: str, **environment: str) -> list[str]:
        """Run Make; returns the stages that ran ("sft" trained, "sft+" merged), in order."""
        (self.folder / "calls.log").unlink(missing_ok=True)
        done = self.run("make", *words, **environment)
        assert done.returncode == 0, done.stderr
        return [name_of(call) for call in self.calls()]

    def calls(self, looks: bool = False) -> list[str]:
        """The command lines that reached Python since the last make(): those that do a stage's work, or only look."""
        path = self.folder / "calls.log"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if ("--check_flags" in line or "prepare_data" in line) == looks]


def name_of(call: str) -> str:
    script = re.search(r"python/(\w+)\.py", call)[1]
    if script == "supervise":  # --ranks
        script = re.search(r"python/(?!supervise\.)(\w+)\.py", call)[1]
    return re.search(r"outputs-(\w+)", call)[1] + "+" if script == "merge_lora" else SCRIPTS[script]


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    return Kit(tmp_path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which everything ran."""
    kit = Kit(tmp_path_factory.mktemp("finished"))
    assert kit.make("all") == EVERYTHING
    return kit.folder


@pytest.fixture
def built(finished: Path, tmp_path: Path) -> Kit:
    """A copy of it: where it is and how old its files are makes no difference."""
    folder = shutil.copytree(finished, tmp_path / "copy", symlinks=True, copy_function=shutil.copy)
    (folder / ".venv/.stagecraft-env").touch()  # of which alone the time counts
    return Kit.at(folder)


def test_all_runs_every_stage_with_the_models_and_data_it_needs(built: Kit):
    calls = {name_of(call): call for call in built.calls()}  # of the run whose copy this is
    assert calls["base"] == (
        "python/build_base.py --config recipes/tiny/base.yaml --output_dir outputs-base/tiny "
        "--overwrite_output_dir --train_file_dir data/pretrain"
    )
    for stage, before, data in (
        ("pt", "base", "pretrain"),
        ("sft", "pt", "finetune"),
        ("rm", "sft", "reward"),
        ("dpo", "sft", "reward"),
    ):
        assert calls[stage].split(" ", 1)[1] == (
            f"--config recipes/tiny/{stage}.yaml --model_name_or_path outputs-{before}/tiny/model "
            f"--train_file_dir data/{data} --output_dir outputs-{stage}/tiny --overwrite_output_dir"
        )
        assert calls[stage + "+"] == f"python/merge_lora.py --stage_dir outputs-{stage}/tiny"
    assert calls["eval"] == (
        "python/evaluate_model.py --config recipes/tiny/eval.yaml --models base=outputs-base/tiny/model "
        "pt=outputs-pt/tiny/model sft=outputs-sft/tiny/model dpo=outputs-dpo/tiny/model "
        "--reward_model outputs-rm/tiny/model --eval_dir data/eval --train_data pt=data/pretrain "
        "sft=data/finetune rm=data/reward dpo=data/reward --output_dir outputs-eval/tiny --overwrite_output_dir"
    )


def test_nothing_runs_when_up_to_date(built: Kit):
    began = time.monotonic()
    done = built.run("make", "all")
    assert time.monotonic() - began < 3
    assert (done.returncode, done.stdout, done.stderr) == (0, "everything is up to date (RECIPE=tiny)\n", "")
    assert built.run("make", "sft").stdout == "sft is up to date (RECIPE=tiny)\n"
    assert built.run("make", "merge-rm").stdout == "rm is merged and up to date (RECIPE=tiny)\n"
    assert built.make("all") == []


@pytest.mark.parametrize(
    ("changed", "ran"),
    [
        ("recipes/tiny/recipe.mk", []),  # what it sets counts, not its content
        ("recipes/tiny/base.yaml", EVERYTHING),
        ("data/pretrain/rows.jsonl", EVERYTHING),  # tiny's tokenizer is made from it
        ("recipes/tiny/pt.yaml", EVERYTHING[1:]),
        ("recipes/tiny/sft.yaml", SFT_ON),
        ("data/finetune/rows.jsonl", SFT_ON),
        ("data/reward/rows.jsonl", SFT_ON[2:]),
        ("recipes/tiny/rm.yaml", ["rm", "rm+", "eval"]),
        ("recipes/tiny/dpo.yaml", ["dpo", "dpo+", "eval"]),
        ("outputs-base/tiny/model/model.safetensors", EVERYTHING[1:]),
        ("outputs-sft/tiny/model/model.safetensors", SFT_ON[2:]),
        ("outputs-sft/tiny/model/lineage.json", []),  # has times in it
        ("recipes/tiny/eval.yaml", ["eval"]),
        ("data/eval/rows.jsonl", ["eval"]),
        (".venv/.stagecraft-env", []),
        ("python/dpo_training.py", []),
    ],
)
def test_what_changed_runs_again_with_what_follows_and_nothing_else(built: Kit, changed: str, ran: list):
    built.change(changed)
    assert planned(built, "all") == ran
    assert built.make("all") == ran
    assert built.make("all") == []


def test_times_alone_change_nothing(built: Kit):
    for minutes in (60, -60):  # newer inputs, and then a clock that went back
        for parent in ("data", "recipes", "outputs-base", "outputs-pt"):
            for path in (built.folder / parent).rglob("*"):
                os.utime(path, (time.time() + minutes * 60,) * 2)
        assert planned(built, "all") == []
        assert built.make("all") == []


def test_a_file_restored_with_its_size_and_time_is_noticed(built: Kit):
    rows = built.folder / "data/finetune/rows.jsonl"
    assert built.make("all") == []
    status = rows.stat()
    rows.write_text("[]\n")
    os.utime(rows, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (rows.stat().st_size, rows.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert built.make("all") == SFT_ON


def planned(kit: Kit, *words: str) -> list[str]:
    """What `make -n` says, in the names of Kit.make; every line must be a stage's command."""
    names = []
    for line in kit.run("make", "-n", *words).stdout.splitlines():
        if line.startswith("make: ") or "scripts/check_ahead.sh" in line:  # nothing to do, and a look
            continue
        script, stage = re.search(r"scripts/run_(\w+)\.sh ?(\w*)", line).groups()
        names.append(stage + "+" if script == "merge" else script)
    return names


def test_dry_run_says_exactly_what_runs(kit: Kit):
    commands = kit.run("make", "-n", "all").stdout.splitlines()
    assert kit.calls() == []
    assert planned(kit, "all") == EVERYTHING
    said = kit.run("make", "all").stdout.splitlines()
    assert [line for line in said if not line.startswith("launch: ")] == commands
    assert commands[4] == "RECIPE=tiny FROM=pt DATA='data/finetune' scripts/run_sft.sh"


def test_a_dry_run_writes_nothing(built: Kit):
    shutil.rmtree(built.folder / ".cache")
    (built.folder / "outputs-rm/tiny/.inputs.json").unlink()  # which a real run would write again
    built.change("data/finetune/rows.jsonl")
    before = {path: path.lstat().st_mtime_ns for path in built.folder.rglob("*")}
    assert planned(built, "-n", "-k", "all") == SFT_ON
    assert before == {path: path.lstat().st_mtime_ns for path in built.folder.rglob("*")}


def reasons(kit: Kit, *words: str) -> list[str]:
    """Why finished stages run again, as Make says it first of all."""
    return kit.run("make", "-n", "all", *words).stderr.splitlines()


def test_why_a_finished_stage_runs_again_is_said_in_a_line(built: Kit):
    assert reasons(built) == []
    fewer = "make: eval runs again: no longer takes outputs-rm/tiny/model"
    assert reasons(built, "STAGES=pt sft dpo") == [fewer]
    assert reasons(built, "ARGS=--seed 1")[0] == "make: pt runs again: ARGS are given"
    built.change("recipes/tiny/dpo.yaml")
    changed = "make: dpo runs again: recipes/tiny/dpo.yaml changed"
    assert reasons(built) == [changed, "make: eval runs again: dpo does"]
    (built.folder / "data/eval/more.jsonl").write_text("{}\n")
    assert reasons(built) == [changed, "make: eval runs again: takes data/eval/more.jsonl now"]
    (built.folder / "data/eval/rows.jsonl").rename(built.folder / "data/eval/more.jsonl")
    assert reasons(built)[1].startswith("make: eval runs again: takes data/eval/more.jsonl")
    assert reasons(built, "EVAL_DATA=data/reward")[1] == (
        "make: eval runs again: no longer takes data/eval/rows.jsonl"
    )


@pytest.mark.parametrize(
    "name",
    [
        "more.jsonl",
        "two words.jsonl",
        "odd#:%;*[1] $x'&.jsonl",
        "新数据.jsonl",
        "sub/a.jsonl",
        os.fsdecode(b"\xff.jsonl"),
    ],
    ids=range(6),
)
def test_data_files_added_changed_and_removed(built: Kit, name: str):
    file = built.folder / "data/finetune" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("{}\n")
    assert planned(built, "all") == SFT_ON
    assert built.make("sft") == SFT_ON[:2]
    file.touch()
    assert built.make("sft") == []
    file.write_text("[]\n")
    assert built.make("sft") == SFT_ON[:2]
    file.unlink()
    assert built.make("sft") == SFT_ON[:2]
    assert built.make("sft") == []


@pytest.mark.parametrize("name", [".rows.jsonl.swp", "rows.jsonl~", "README.md", ".git/rows.jsonl"])
def test_what_no_stage_reads_is_no_data(built: Kit, name: str):
    file = built.folder / "data/finetune" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("x")
    assert built.make("all") == []


def test_stages_drop_out_of_the_chain(kit: Kit):
    assert kit.make("all", "STAGES=sft dpo") == ["base", "sft", "sft+", "dpo", "dpo+", "eval"]
    calls = {name_of(call): call for call in kit.calls()}
    assert "--model_name_or_path outputs-base/tiny/model" in calls["sft"]
    assert "--model_name_or_path outputs-sft/tiny/model" in calls["dpo"]
    assert "--models base=outputs-base/tiny/model sft=outputs-sft/tiny/model dpo=" in calls["eval"]
    assert "--reward_model" not in calls["eval"]
    assert kit.make("rm", "STAGES=pt") == ["pt", "pt+", "rm", "rm+"]
    assert "--model_name_or_path outputs-pt/tiny/model" in kit.calls()[2]
    assert kit.make("dpo", "STAGES=dpo") == ["dpo", "dpo+"]  # it was made from sft before
    assert "--model_name_or_path outputs-base/tiny/model" in kit.calls()[0]
    assert kit.make("all", "STAGES=rm") == ["rm", "rm+", "eval"]
    assert kit.make("all", "STAGES=rm") == []


def test_a_stage_makes_only_what_it_needs(kit: Kit):
    assert kit.make("sft") == ["base", "pt", "pt+", "sft", "sft+"]
    assert kit.make("merge-dpo") == ["dpo", "dpo+"]


def test_args_go_to_the_stages_named_and_force_them(kit: Kit):
    assert kit.make("sft", "ARGS=--learning_rate 1e-4") == ["base", "pt", "pt+", "sft", "sft+"]
    assert [name_of(c) for c in kit.calls() if c.endswith(" --learning_rate 1e-4")] == ["sft"]
    assert kit.make("sft") == []
    assert kit.make("sft", "ARGS=--learning_rate 1e-4") == ["sft", "sft+"]
    assert kit.make("all", "ARGS=--seed 7") == ["pt", "pt+", *SFT_ON]
    assert [name_of(c) for c in kit.calls() if c.endswith(" --seed 7")] == list(STAGES)
    assert kit.make("all") == []
    assert kit.make("all", ARGS="--seed 7") == []  # a variable left in the environment forces nothing


def test_the_first_stage_looks_at_the_flags_and_rows_of_those_after_it(kit: Kit):
    kit.make("dpo", "ARGS=--run_name 'a b'", "DPO_DATA=data/finetune")
    rows, *flags = kit.calls(looks=True)
    assert [SCRIPTS[re.search(r"python/(\w+)", call)[1]] for call in flags] == ["pt", "sft", "dpo"]
    assert [call.endswith(" --run_name a b --check_flags") for call in flags] == [False, False, True]
    assert rows == "python/prepare_data.py check pt=data/pretrain sft=data/finetune dpo=data/finetune"
    # Once, and only at what will run: a last stage has nothing ahead, a finished one doesn't look.
    kit.make("dpo", "DPO_DATA=data/finetune")
    assert kit.calls(looks=True) == []
    kit.make("eval", "STAGES=pt sft", "SFT_DATA=data/reward")
    assert [call.split()[0] for call in kit.calls(looks=True)] == [
        "python/prepare_data.py",
        "python/evaluate_model.py",
    ]


@pytest.mark.parametrize("look", ["dpo.yaml", "check pt=data/pretrain"])
def test_a_mistake_in_a_later_stage_stops_the_first(kit: Kit, look: str):
    done = kit.run("make", "all", FAIL_LOOK=look)
    assert done.returncode == 2
    assert kit.calls() == []
    # All of them are looked at nevertheless, so that one pass tells everything.
    assert len(kit.calls(looks=True)) == 6


def test_the_recipe_makefile_is_no_input(built: Kit):
    """Only what it sets is: the base model, which base's run.json names, and the stages."""
    recipe = built.folder / "recipes/tiny/recipe.mk"
    recipe.write_text("BASE_MODEL := Qwen/Qwen3-0.6B\n")
    assert built.make("base") == ["base"]


def test_a_base_model_named_on_the_command_line_counts(built: Kit):
    assert built.make("base", "BASE_MODEL=Qwen/Qwen3-0.6B") == ["base"]
    assert "--model_name_or_path Qwen/Qwen3-0.6B" in built.calls()[0]
    assert "--train_file_dir" not in built.calls()[0]
    assert built.make("base", "BASE_MODEL=Qwen/Qwen3-0.6B") == []
    assert built.make("base") == ["base"]


def test_another_data_folder_counts_even_if_its_files_are_the_same(built: Kit):
    assert built.make("all", "SFT_DATA=data/finetune/") == []
    shutil.copytree(built.folder / "data/finetune", built.folder / "data/mine")
    assert built.make("sft", "SFT_DATA=data/mine") == ["sft", "sft+"]
    assert built.make("sft", "SFT_DATA=data/mine") == []
    assert planned(built, "sft") == ["sft", "sft+"]
    # A part of it, as a folder below.
    assert built.make("sft", "SFT_DATA=data") == ["sft", "sft+"]
    assert built.make("sft", "SFT_DATA=data/mine") == ["sft", "sft+"]


def test_pretraining_data_is_nothing_to_a_base_that_is_fetched(kit: Kit):
    recipe = kit.folder / "recipes/tiny/recipe.mk"
    recipe.write_text(recipe.read_text().replace("BASE_MODEL :=", "BASE_MODEL := Qwen/Qwen2.5-3B"))
    assert kit.make("base") == ["base"]
    kit.change("data/pretrain/rows.jsonl")
    assert kit.make("base") == []
    assert kit.make("pt") == ["pt", "pt+"]


def test_a_failed_merge_is_done_again_without_training(kit: Kit):
    assert kit.run("make", "sft", "STAGES=sft", FAIL="merge").returncode == 2
    assert (kit.folder / "outputs-sft/tiny/TRAINED").exists()
    assert kit.make("sft", "STAGES=sft") == ["sft+"]


def test_a_failed_stage_stops_the_chain_and_runs_again(kit: Kit):
    done = kit.run("make", "all", FAIL="supervised")
    assert done.returncode == 2
    assert [name_of(call) for call in kit.calls()] == ["base", "pt", "pt+", "sft"]
    assert kit.make("all") == SFT_ON


def test_an_interrupted_stage_ends_make_and_the_next_make_goes_on(built: Kit):
    built.change("recipes/tiny/sft.yaml")
    done = built.run("make", "all", FAIL="supervised", STATUS="75")
    assert done.returncode == 2
    assert "outputs-sft/tiny/TRAINED] Error 75" in done.stderr
    assert built.make("all") == SFT_ON


def test_a_change_taken_back_before_it_ran_is_none(built: Kit):
    yaml = built.folder / "recipes/tiny/sft.yaml"
    before = yaml.read_text()
    yaml.write_text("learning_rate: fast\n")
    assert built.run("make", "all", FAIL="supervised").returncode == 2
    assert planned(built, "all") == SFT_ON
    yaml.write_text(before)
    assert built.make("all") == []


def test_a_stage_that_fails_after_its_last_word_is_not_trained_again(built: Kit):
    """Its process may still crash, or Make be killed, when TRAINED is there."""
    built.change("recipes/tiny/sft.yaml")
    assert built.run("make", "all", FAIL_LATE="supervised").returncode == 2
    assert (built.folder / "outputs-sft/tiny/TRAINED").exists()
    assert built.make("all") == SFT_ON[1:]


def test_an_interrupt_takes_no_marker_away(built: Kit):
    built.change("recipes/tiny/sft.yaml")
    marker = built.folder / "outputs-sft/tiny/TRAINED"
    before = marker.read_text()
    process = subprocess.Popen(
        ["make", "all"],
        cwd=built.folder,
        env={"PATH": os.environ["PATH"], "FAIL_LATE": "supervised", "SLOW": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_until(lambda: marker.exists() and marker.read_text() not in ("", before))
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=30) != 0
    assert built.make("all") == SFT_ON[1:]


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_stage_made_again_with_the_same_result_makes_nothing_else_run(built: Kit):
    """Here after a Make that came as far as the stage's merge."""
    (built.folder / "outputs-sft/tiny/TRAINED").unlink()
    assert built.run("make", "all", FAIL="reward_modeling").returncode == 2
    assert [name_of(call) for call in built.calls()[-3:]] == ["sft", "sft+", "rm"]
    assert built.make("all") == []


def test_models_thrown_away_are_made_again_when_something_needs_them(built: Kit):
    for stage in ("pt", "sft"):
        shutil.rmtree(built.folder / f"outputs-{stage}/tiny/model")
    assert built.make("all") == []
    built.change("recipes/tiny/dpo.yaml")
    assert reasons(built)[0] == "make: pt is merged again: eval needs outputs-pt/tiny/model, which is gone"
    assert built.make("dpo") == ["sft+", "dpo", "dpo+"]
    assert built.make("all") == ["pt+", "eval"]
    # What was not merged can only be made by the stage itself, and the rest follows.
    shutil.rmtree(built.folder / "outputs-base/tiny/model")
    assert built.make("all") == []
    built.change("recipes/tiny/pt.yaml")
    assert built.make("all") == EVERYTHING


def test_a_run_made_by_hand_or_by_an_older_version_is_taken_as_it_is(built: Kit):
    for note in built.folder.glob("outputs-*/tiny/.inputs.json"):
        note.unlink()
    assert planned(built, "all") == []
    assert built.make("all") == []
    built.change("recipes/tiny/rm.yaml")  # seen from then on
    assert built.make("all") == ["rm", "rm+", "eval"]
    words = ["scripts/run_dpo.sh", "--learning_rate", "1"]
    assert built.run(*words, RECIPE="tiny").returncode == 0
    assert built.make("all") == ["dpo+", "eval"]
    assert built.run(*words, RECIPE="tiny", FROM="pt").returncode == 0
    assert built.make("all") == ["dpo", "dpo+", "eval"]  # not what the chain has


def test_what_was_read_is_what_run_json_says(built: Kit):
    """Rows that changed while the stage was reading others, and held-out rows that only the YAML names."""
    (built.folder / "held.jsonl").write_text("{}\n")
    path = built.folder / "outputs-rm/tiny/run.json"
    run = json.loads(path.read_text())
    rows = {"path": "data/reward/rows.jsonl", "sha256": hashlib.sha256(b"{}\n").hexdigest()}
    held = {"path": "held.jsonl", "sha256": hashlib.sha256(b"{}\n").hexdigest()}
    path.write_text(json.dumps(run | {"data": [rows, held]}))
    assert planned(built, "all") == []
    (built.folder / "held.jsonl").write_text("{ }\n")
    assert planned(built, "all") == ["rm", "rm+", "eval"]
    path.write_text(json.dumps(run | {"data": [rows | {"sha256": "other"}]}))
    assert planned(built, "all") == ["rm", "rm+", "eval"]


def test_the_export_runs_again_when_its_model_changed(built: Kit):
    dry = ("make", "-n", "export", "STAGE=sft")
    assert built.run(*dry).stdout.endswith("scripts/export.sh\n")
    exported = built.folder / "outputs-export/tiny/sft-fp8"
    exported.mkdir(parents=True)
    (exported / "config.json").write_text("{}")
    assert "export.sh" not in built.run(*dry).stdout
    assert built.run("make", "export", "STAGE=sft").stdout == (
        "sft is exported to fp8 and up to date (RECIPE=tiny)\n"
    )
    built.change("outputs-sft/tiny/model/model.safetensors")
    assert built.run(*dry).stderr == "make: export runs again: outputs-sft/tiny/model changed\n"


def test_one_stage_at_a_time_even_with_j(kit: Kit):
    assert kit.make("-j", "8", "all") == EVERYTHING


def test_two_gpus_mean_two_processes(kit: Kit):
    kit.make("sft", "STAGES=sft", "GPUS=0,1")
    base, sft, merge = kit.calls()
    assert sft.startswith(
        "python/supervise.py --ranks --nproc_per_node 2 --standalone python/supervised_finetuning.py --config "
    )
    assert base.startswith("python/build_base.py ")
    assert merge.startswith("python/merge_lora.py ")


def test_a_recipe_of_its_own_folder_and_data(kit: Kit):
    shutil.copytree(kit.folder / "recipes/tiny", kit.folder / "recipes/mine")
    kit.make("sft", "RECIPE=mine", "STAGES=sft", "SFT_DATA=data/eval")
    assert "--train_file_dir data/eval --output_dir outputs-sft/mine" in kit.calls()[1]
    assert not (kit.folder / "outputs-sft/tiny").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["all", "RECIPE=tinny"],
            'RECIPE="tinny" is not in recipes/ (there: other, tiny); did you mean tiny?',
        ),
        (["-n", "all", "RECIPE=zzz"], 'RECIPE="zzz" is not in recipes/ (there: other, tiny)'),
        (
            ["clean-sft", "RECIPE=../tiny"],
            'RECIPE="../tiny" is not in recipes/ (there: other, tiny); did you mean tiny?',
        ),
        (
            ["all", "RECIPE=tiny other"],
            'RECIPE="tiny other" is more than one word; a recipe is one of: other, tiny',
        ),
        (
            ["all", "STAGES=sft dop ppo"],
            'STAGES="sft dop ppo": no stage is called dop, ppo; there are pt, sft, rm, dpo',
        ),
        (
            ["all", "PRICE=2,50"],
            'PRICE="2,50": must be a number, what the machine costs an hour, e.g. PRICE=18 or PRICE=2.49',
        ),
        (["pt", "serv"], "no target is called serv (`make` lists them); did you mean serve?"),
        (["status", "qqqq"], "no target is called qqqq (`make` lists them)"),
        (
            ["merge-sft", "ARGS=--x"],
            "ARGS are for base, pt, sft, rm, dpo, eval, all, bench-eval, chat, web, serve, serve-check and export; "
            "named here: merge-sft",
        ),
        (
            ["dpo", "SFT_DATA=data/none", "DPO_DATA=gone"],
            "missing: data/none, gone (data folders: PT_DATA, SFT_DATA, RM_DATA, DPO_DATA, EVAL_DATA)",
        ),
        (
            ["all", "RECIPE=other"],
            "missing: recipes/other/dpo.yaml (data folders: PT_DATA, SFT_DATA, RM_DATA, DPO_DATA, EVAL_DATA)",
        ),
    ],
)
def test_mistakes_are_told_in_one_line_before_anything_runs(kit: Kit, words: list, message: str):
    shutil.copytree(kit.folder / "recipes/tiny", kit.folder / "recipes/other")
    (kit.folder / "recipes/other/dpo.yaml").unlink()
    done = kit.run("make", *words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.sub(r"^Makefile:\d+: ", "", done.stderr) == f"*** {message}.  Stop.\n"
    assert kit.calls() == []


def test_help_setup_and_lint_work_with_a_wrong_recipe(kit: Kit):
    for target in ("help", "setup", "test", "lint"):
        assert kit.run("make", "-n", target, "RECIPE=none").returncode == 0


def test_help_shows_every_target_and_variable(kit: Kit):
    text = kit.run("make", "GPUS=0,1").stdout
    assert max(map(len, text.splitlines())) <= 100
    for target in (
        "setup",
        "base",
        *STAGES,
        "merge-STAGE",
        "eval",
        "all",
        "bench-eval",
        "chat",
        "web",
        "serve",
        "tensorboard",
    ):
        assert re.search(rf"^  {target} +\w", text, re.MULTILINE), target
    for target in ("status", "logs", "data", "test", "lint", "clean-STAGE"):
        assert re.search(rf"^  {target} +\w", text, re.MULTILINE), target
    for variable, value in (
        ("RECIPE", "tiny"),
        ("STAGES", "pt sft rm dpo"),
        ("GPUS", "0,1"),
        ("NNODES", "1"),
        ("MASTER_PORT", "29500"),
        ("HOST", "127.0.0.1"),
    ):
        assert re.search(rf"^  {variable} +{value} +\w", text, re.MULTILINE), variable
    for variable in (
        "ARGS",
        "PRICE",
        "NPROC",
        "NODE_RANK",
        "MASTER_ADDR",
        "DEEPSPEED",
        "ENV",
        "PORT",
        "MODEL",
    ):
        assert re.search(rf"^  {variable} ", text, re.MULTILINE), variable


def test_a_shells_own_variables_are_not_taken_for_ours(kit: Kit):
    text = kit.run("make", ENV="/home/me/.shrc", HOST="x86_64-conda-linux-gnu").stdout
    assert ".shrc" not in text
    assert "conda" not in text
    assert re.search(r"^  ENV +gpu ", kit.run("make", ENV="gpu").stdout, re.MULTILINE)


def test_clean_removes_one_stage_of_one_recipe(built: Kit):
    done = built.run("make", "clean-sft")
    assert done.stdout == "rm -rf outputs-sft/tiny\n"
    assert not (built.folder / "outputs-sft/tiny").exists()
    assert (built.folder / "outputs-dpo/tiny/DONE").exists()
    assert built.make("all") == SFT_ON


def test_clean_alone_refuses(built: Kit):
    done = built.run("make", "clean")
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == (
        "make clean would throw away hours of training: say which, e.g. make clean-sft RECIPE=tiny"
    )
    assert (built.folder / "outputs-base/tiny/DONE").exists()


def test_an_interpreter_of_the_users_own_needs_no_venv(kit: Kit):
    (kit.folder / ".venv/bin/python").rename(kit.folder / "mypython")
    shutil.rmtree(kit.folder / ".venv")
    assert kit.make("base", f"PYTHON={kit.folder}/mypython") == ["base"]
    assert kit.run("make", "-n", "base").stdout.splitlines()[0] == "scripts/setup.sh"


def test_chat_prints_the_answer_alone(built: Kit):
    done = built.run("make", "chat", stdin="问题\n")  # what stands in for chat.py gives its question back
    assert (done.returncode, done.stdout, done.stderr) == (0, "问题\n", "")
    assert built.calls()[-1] == "python/chat.py"  # which knows the newest model
    assert built.run("make", "chat", "ARGS=--max_new_tokens 5", stdin="x").returncode == 0
    assert built.calls()[-1] == "python/chat.py --max_new_tokens 5"
    built.run("make", "chat", "MODEL=outputs-pt/tiny/model", stdin="x")
    assert built.calls()[-1] == "python/chat.py --model outputs-pt/tiny/model"


def test_data_checks_every_folder_once(kit: Kit):
    done = kit.run("make", "data")
    assert done.returncode == 0
    assert kit.calls(looks=True) == [
        "python/prepare_data.py check pt=data/pretrain sft=data/finetune dpo=data/reward eval=data/eval"
    ]


def test_data_of_the_reward_model_alone_is_checked(kit: Kit):
    kit.run("make", "data", "STAGES=rm")
    assert kit.calls(looks=True) == ["python/prepare_data.py check rm=data/reward eval=data/eval"]


def test_data_fails_when_the_check_does(kit: Kit):
    assert kit.run("make", "data", FAIL_LOOK="prepare_data").returncode == 2


def test_tensorboard_before_any_run_says_so(kit: Kit):
    done = kit.run("make", "tensorboard")
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "no outputs-*/tiny/logs yet: run a stage first"


def test_tensorboard_shows_every_stage_on_loopback(built: Kit):
    assert built.run("make", "tensorboard", "PORT=7007").returncode == 0
    assert built.calls()[-1] == (
        "-m tensorboard.main --host 127.0.0.1 --port 7007 --logdir_spec "
        "dpo:outputs-dpo/tiny/logs,pt:outputs-pt/tiny/logs,rm:outputs-rm/tiny/logs,sft:outputs-sft/tiny/logs"
    )
