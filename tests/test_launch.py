"""The launchers: which devices and processes, every error line, what Make is started with."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ECHO = """#!/usr/bin/env bash
echo "${0##*/}: $*"
env | grep -E '^(CUDA_V|OMP_|DS_|MASTER_|VLLM_)' || true
"""
MAKE = """#!/usr/bin/env bash
[[ $1 == all ]] || exec "$REAL_MAKE" "$@"
printf "<%s>" "$@"
echo
exit "${FAIL:-0}"
"""
TORCHRUN = "python/supervise.py --ranks --nproc_per_node"


class Kit:
    """A copy of the launchers. Python and the servers are a program that prints what it was given."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("Makefile", "scripts", "recipes/tiny"):
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
        for name in ("python", "ds_configs", "bin", "model", ".venv/bin"):
            (folder / name).mkdir(parents=True)
        for name in ("python/job.py", "model/config.json", "ds_configs/zero2.json", "ds_configs/zero3.json"):
            (folder / name).touch()
        for name in ("python", "vllm", "transformers"):
            self.program(f".venv/bin/{name}", ECHO)

    def program(self, path: str, text: str) -> None:
        (self.folder / path).write_text(text)
        (self.folder / path).chmod(0o755)

    def add_gpus(self, count: int) -> None:
        """nvidia-smi says that there are so many."""
        lines = "".join(f"echo 'GPU {i}: NVIDIA H100 (UUID: GPU-{i})'\n" for i in range(count))
        self.program("bin/nvidia-smi", f"#!/usr/bin/env bash\n{lines}")

    def run(self, *words: str, **environment: str) -> subprocess.CompletedProcess:
        kept = {"PATH": f"{self.folder}/bin:{os.environ['PATH']}", "HOME": os.environ.get("HOME", "/")}
        return subprocess.run(
            words, check=False, cwd="/", env=kept | environment, capture_output=True, text=True
        )

    def launch(self, *flags: str, **environment: str) -> list[str]:
        done = self.run(f"{self.folder}/scripts/launch.sh", "python/job.py", *flags, **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    def refuse(self, script: str, *words: str, **environment: str) -> list[str]:
        done = self.run(f"{self.folder}/scripts/{script}", *words, **environment)
        assert done.returncode == 2
        assert done.stdout == ""
        return done.stderr.splitlines()


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    kit = Kit(tmp_path)
    kit.program("bin/nvidia-smi", "#!/usr/bin/env bash\nexit 9\n")  # whatever the machine has: no driver here
    return kit


# ---- launch.sh


def test_without_cuda_one_plain_process(kit: Kit):
    assert kit.launch("--text", "two words") == [
        "launch: .venv/bin/python python/job.py --text two\\ words",
        "python: python/supervise.py .venv/bin/python python/job.py --text two words",
    ]


def test_gpus_without_cuda_are_cpu_processes(kit: Kit):
    lines = kit.launch(GPUS="0,1", OMP_NUM_THREADS="3")
    assert lines[0] == "GPUS=0,1: no CUDA device here, so 2 CPU processes"
    assert lines[2:] == [
        f"python: python/supervise.py .venv/bin/python {TORCHRUN} 2 --standalone python/job.py",
        "OMP_NUM_THREADS=3",
    ]
    assert kit.launch(GPUS="0")[0] == "GPUS=0: no CUDA device here, so 1 CPU process"


def test_processes_share_the_cores(kit: Kit):
    threads = len(os.sched_getaffinity(0)) // 2 or 1
    assert kit.launch(NPROC="2") == [
        f"launch: OMP_NUM_THREADS={threads} .venv/bin/python {TORCHRUN} 2 --standalone python/job.py",
        f"python: python/supervise.py .venv/bin/python {TORCHRUN} 2 --standalone python/job.py",
        f"OMP_NUM_THREADS={threads}",
    ]
    assert not any("OMP_NUM_THREADS" in line for line in kit.launch())


def test_every_cuda_device_gets_a_process(kit: Kit):
    kit.add_gpus(4)
    assert (
        kit.launch()[1]
        == f"python: python/supervise.py .venv/bin/python {TORCHRUN} 4 --standalone python/job.py"
    )
    kit.add_gpus(1)
    assert kit.launch()[1] == "python: python/supervise.py .venv/bin/python python/job.py"


def test_gpus_choose_devices(kit: Kit):
    kit.add_gpus(4)
    lines = kit.launch(GPUS="1,3")
    assert f"python: python/supervise.py .venv/bin/python {TORCHRUN} 2 --standalone python/job.py" in lines
    assert "CUDA_VISIBLE_DEVICES=1,3" in lines
    assert kit.launch(GPUS="2")[1:] == [
        "python: python/supervise.py .venv/bin/python python/job.py",
        "CUDA_VISIBLE_DEVICES=2",
    ]


def test_one_process_for_several_devices_only_when_both_are_named(kit: Kit):
    kit.add_gpus(4)
    assert kit.launch(GPUS="0,1", NPROC="1")[1:] == [
        "python: python/supervise.py .venv/bin/python python/job.py",
        "CUDA_VISIBLE_DEVICES=0,1",
    ]
    assert kit.launch(NPROC="1")[1:] == [
        "python: python/supervise.py .venv/bin/python python/job.py",
        "CUDA_VISIBLE_DEVICES=0",
    ]
    assert "CUDA_VISIBLE_DEVICES=2,3" in kit.launch(NPROC="2", CUDA_VISIBLE_DEVICES="2,3,0")


def test_a_schedulers_choice_of_devices_counts(kit: Kit):
    kit.add_gpus(8)
    assert (
        kit.launch(CUDA_VISIBLE_DEVICES="2,5")[1]
        == f"python: python/supervise.py .venv/bin/python {TORCHRUN} 2 --standalone python/job.py"
    )
    assert (
        kit.launch(CUDA_VISIBLE_DEVICES="")[1] == "python: python/supervise.py .venv/bin/python python/job.py"
    )
    assert (
        kit.launch(CUDA_VISIBLE_DEVICES="-1")[1]
        == "python: python/supervise.py .venv/bin/python python/job.py"
    )


def test_several_machines(kit: Kit):
    lines = kit.launch(NNODES="2", NODE_RANK="1", MASTER_ADDR="10.0.0.1")
    flags = "--nnodes 2 --node_rank 1 --master_addr 10.0.0.1 --master_port 29500"
    assert f"python: python/supervise.py .venv/bin/python {TORCHRUN} 1 {flags} python/job.py" in lines
    assert not any(line.startswith("MASTER_") for line in lines)


def test_deepspeed_wants_torchrun_and_the_cpu_said(kit: Kit):
    wanted = f"python: python/supervise.py .venv/bin/python {TORCHRUN} 1 --standalone python/job.py --seed 1 --deepspeed ds_configs/zero2.json"
    assert kit.launch("--seed", "1", DEEPSPEED="zero2")[1:] == [wanted, "DS_ACCELERATOR=cpu"]
    kit.add_gpus(1)
    assert kit.launch("--seed", "1", DEEPSPEED="zero2")[1:] == [wanted]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"GPUS": "0,x"}, 'GPUS="0,x": must be device numbers with commas between, e.g. GPUS=0,1'),
        ({"GPUS": "0, 1"}, 'GPUS="0, 1": must be device numbers with commas between, e.g. GPUS=0,1'),
        ({"GPUS": "1,"}, 'GPUS="1,": must be device numbers with commas between, e.g. GPUS=0,1'),
        ({"GPUS": "1,1"}, "GPUS=1,1: device 1 stands twice"),
        ({"GPUS": "0,7"}, "GPUS=0,7: no CUDA device 7 here (there: 0 to 1)"),
        ({"NPROC": "0"}, 'NPROC="0": must be a whole number from 1 up'),
        ({"NPROC": "3"}, "NPROC=3: only 2 CUDA devices, and a process needs one of its own"),
        ({"NNODES": "two"}, 'NNODES="two": must be a whole number from 1 up'),
        ({"NNODES": "2"}, "NNODES=2 needs MASTER_ADDR: the address of the machine with NODE_RANK=0"),
        (
            {"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"},
            'NODE_RANK="2": must be from 0 to 1 (NNODES=2)',
        ),
        (
            {"NNODES": "2", "MASTER_PORT": "70000", "MASTER_ADDR": "a"},
            'MASTER_PORT="70000": must be a port, 1 to 65535',
        ),
        ({"DEEPSPEED": "zero9"}, "DEEPSPEED=zero9: no ds_configs/zero9.json (there: zero2 zero3)"),
        ({"PYTHON": "/none/python"}, "/none/python: no Python there; run: make setup (or set PYTHON)"),
    ],
)
def test_wrong_variables_are_told_in_one_line(kit: Kit, environment: dict, message: str):
    kit.add_gpus(2)
    assert kit.refuse("launch.sh", "python/job.py", **environment) == [message]


def test_all_faults_of_a_launch_are_told_at_once(kit: Kit):
    assert kit.refuse("launch.sh", "python/jobb.py", GPUS="a", NPROC="b", DEEPSPEED="c") == [
        "python/jobb.py: no such script",
        'GPUS="a": must be device numbers with commas between, e.g. GPUS=0,1',
        'NPROC="b": must be a whole number from 1 up',
        "DEEPSPEED=c: no ds_configs/c.json (there: zero2 zero3)",
    ]
    assert kit.refuse("launch.sh") == ["usage: scripts/launch.sh SCRIPT.py [FLAG ...]"]


def test_a_merge_wants_a_stage(kit: Kit):
    assert kit.refuse("run_merge.sh", "eval") == [
        'usage: scripts/run_merge.sh STAGE (pt, sft, rm, dpo or ppo), not "eval"'
    ]


# ---- train_all.sh


def train_all(kit: Kit, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    """With a Make that prints what it is asked to make, except for questions, which the real one answers."""
    kit.program("bin/make", MAKE)
    return kit.run(
        f"{kit.folder}/scripts/train_all.sh", *flags, REAL_MAKE=shutil.which("make"), **environment
    )


@pytest.mark.parametrize(
    ("flags", "made"),
    [
        ([], "<all><RECIPE=tiny><GPUS=>"),
        (["--gpus", "0,1"], "<all><RECIPE=tiny><GPUS=0,1>"),
        (["--align", "dpo"], "<all><RECIPE=tiny><GPUS=><STAGES=pt sft dpo>"),
        (["--align", "rm"], "<all><RECIPE=tiny><GPUS=><STAGES=pt sft rm>"),
        (["--align", "none"], "<all><RECIPE=tiny><GPUS=><STAGES=pt sft>"),
    ],
)
def test_train_all_is_make_all_with_the_stages_chosen(kit: Kit, flags: list, made: str):
    done = train_all(kit, *flags)
    assert done.returncode == 0
    assert re.fullmatch(rf"{re.escape(made)}\nfinished after 0:00:\d\d\n", done.stdout)


def test_train_all_adds_the_choice_to_a_recipe_without_it(kit: Kit):
    recipe = kit.folder / "recipes/mine/recipe.mk"
    recipe.parent.mkdir()
    recipe.write_text("BASE_MODEL := a/b\nSTAGES ?= sft\n")
    assert train_all(kit, "--recipe", "mine", "--align", "dpo").stdout.startswith(
        "<all><RECIPE=mine><GPUS=><STAGES=sft dpo>\n"
    )


def test_train_all_says_what_it_cost(kit: Kit):
    last = train_all(kit, "--price", "36000").stdout.splitlines()[-1]
    seconds, cost = re.fullmatch(r"finished after 0:00:(\d\d), (\d+\.\d\d) at 36000 an hour", last).groups()
    assert abs(float(cost) - 10 * int(seconds)) <= 10  # the clock may tick between the two


def test_train_all_ends_with_makes_status(kit: Kit):
    done = train_all(kit, FAIL="3")
    assert done.returncode == 3
    assert done.stdout.splitlines()[-1].startswith("stopped after 0:00:")


def test_train_all_help_is_its_header(kit: Kit):
    done = train_all(kit, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("Train every stage of a recipe and compare the models")
    for flag in ("--recipe", "--gpus", "--align", "--price"):
        assert f"  {flag} " in done.stdout
    assert "set -euo" not in done.stdout


@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        (["--align", "ppo"], ["--align ppo: PPO is not in this version; choose dpo, rm or none"]),
        (["--align", "kto"], ["--align kto: must be dpo, rm or none"]),
        (["--price", "cheap"], ["--price cheap: must be a number, e.g. 18"]),
        (["--gpus"], ["--gpus needs a value; --help shows which"]),
        (
            ["--recipes", "--price", "--align", "x"],
            [
                'unknown flag "--recipes"; there are --recipe --gpus --align --price --help',
                "--price needs a value; --help shows which",
                "--align x: must be dpo, rm or none",
            ],
        ),
    ],
)
def test_train_all_names_wrong_flags(kit: Kit, flags: list, messages: list):
    done = train_all(kit, *flags)
    assert (done.returncode, done.stdout, done.stderr.splitlines()) == (2, "", messages)


def test_train_all_passes_on_what_make_says(kit: Kit):
    done = train_all(kit, "--recipe", "tinny", "--align", "dpo")
    assert done.returncode == 2
    assert 'RECIPE="tinny" is not in recipes/ (there: tiny); did you mean tiny?' in done.stderr
