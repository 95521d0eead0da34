"""Every flag does something: each one is flipped in a short run, and the run has to change.

A flag that is read and then ignored looks like one that works. The table below holds every field of the kit's
dataclasses, every trainer flag that a recipe sets and those that users reach for most; two tests at the end fail for
a flag that is in neither the table nor EXCEPTIONS.

Runs are real: a process that has imported the libraries once forks a child for each, which is the stage's script.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import runpy
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {
    "pt": "pretraining.py",
    "sft": "supervised_finetuning.py",
    "rm": "reward_modeling.py",
    "dpo": "dpo_training.py",
}
# Without dropout, bf16 and checkpoints: two runs of the same flags end in the same weights, to the bit.
SHORT = (
    "--max_steps 3 --per_device_train_batch_size 4 --learning_rate 1e-3 --lr_scheduler_type linear --logging_steps 1 "
    "--bf16 false --gradient_checkpointing false --save_strategy no --report_to none --lora_dropout 0 --lora_rank 4 "
    "--preprocessing_num_workers 1"
)

# All that the stages import.
LIBRARIES = [
    "datasets",
    "deepspeed",
    "peft",
    "transformers.trainer",
    "transformers.models.auto.modeling_auto",
    "transformers.models.qwen3.modeling_qwen3",
    "trl.trainer.dpo_trainer",
    "trl.trainer.reward_trainer",
    "stagecraft.data.corpus",
    "stagecraft.progress",
    "stagecraft.run",
    "stagecraft.watching",
]


# ---- Runs


class Server:
    """A process with the libraries loaded; each run is a fork of it, so a run starts in milliseconds."""

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, str(folder)), daemon=True)
        self.process.start()

    def run(self, script: str, words: list[str], said: Path, variables: dict[str, str]) -> tuple[int, int]:
        """Exit status (negative: a signal) and peak memory in KiB."""
        self.pipe.send((script, words, str(said), variables))
        assert self.pipe.poll(120), f"{script} {' '.join(words)}: still running after 120 s"
        return self.pipe.recv()


def _serve(pipe: Any, folder: str) -> None:
    sys.path.insert(0, str(ROOT / "python"))
    for name in LIBRARIES:
        importlib.import_module(name)
    mapping = importlib.import_module("transformers.conversion_mapping")
    mapping.get_checkpoint_conversion_mapping("qwen3")  # 0.1 s of regular expressions
    gc.collect()
    gc.freeze()  # a collection in a fork would look through, and so copy, all that was imported here: 0.3 s
    os.environ["HF_MODULES_CACHE"] = f"{folder}/modules"
    os.chdir(folder)  # the tokenised rows are kept under the working directory
    with contextlib.suppress(EOFError):
        while True:
            script, words, said, variables = pipe.recv()
            child = os.fork()
            if not child:
                _be(script, words, said, variables)
            _, status, used = os.wait4(child, 0)
            pipe.send((os.waitstatus_to_exitcode(status), used.ru_maxrss))


def _be(script: str, words: list[str], said: str, variables: dict[str, str]) -> None:
    """In the fork: be the script, then end without what the server would do at its end."""
    status = 1
    try:
        stream = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)
        os.environ.update(variables)
        sys.path.insert(0, str(ROOT / "python"))
        sys.argv = [str(ROOT / "python" / script), *words]
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


# ---- What a run left


class Ran:
    """What can be seen of a run: its exit status, its words, its folder."""

    def __init__(self, folder: Path, status: int, said: str, peak: int) -> None:
        self.folder, self.status, self.said, self.peak = folder, status, said, peak

    def __repr__(self) -> str:  # what pytest shows where an assertion on it fails
        return f"exit status {self.status}\n{self.said[-2000:]}"

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The lines of progress.jsonl."""
        path = self.folder / "logs" / "progress.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def logged(self, name: str) -> list[float]:
        return [row[name] for row in self.rows if name in row]

    @property
    def losses(self) -> list[float]:
        return self.logged("loss")

    @property
    def rates(self) -> list[float]:
        return self.logged("learning_rate")

    @property
    def evaluations(self) -> list[int]:
        """Steps at which validation rows were looked at."""
        return [row["step"] for row in self.rows if "eval_loss" in row]

    @property
    def weights(self) -> str:
        """SHA-256 of the tensors of adapter/ or model/."""
        files = sorted(self.folder.glob("adapter/*.safetensors")) + sorted(
            self.folder.glob("model/*.safetensors")
        )
        assert files, self
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()

    @property
    def run(self) -> dict[str, Any]:
        return json.loads((self.folder / "run.json").read_text())

    @property
    def steps(self) -> int:
        return self.run["metrics"]["steps"]

    @property
    def eval_losses(self) -> list[float]:
        return self.logged("eval_loss")

    @property
    def first_loss(self) -> float:
        return self.losses[0]

    @property
    def logs(self) -> list[int]:
        """Steps of which progress.jsonl speaks."""
        return [row["step"] for row in self.rows if "loss" in row]

    @property
    def parameters(self) -> str:
        return next(line for line in self.said.splitlines() if line.startswith("trainable"))

    @property
    def padding(self) -> str:
        return self.run["metrics"]["padding"]

    @property
    def counts(self) -> dict[str, int]:
        return self.run["counts"]

    @property
    def adapter(self) -> dict[str, Any]:
        """adapter_config.json."""
        return json.loads((self.folder / "adapter" / "adapter_config.json").read_text())

    @property
    def lengths(self) -> dict[str, int]:
        return self.run["lengths"]

    @property
    def names(self) -> list[str]:
        """Names of the folders and files here and in the folders here."""
        return sorted(
            {path.name.split(".")[0] for path in (*self.folder.glob("*"), *self.folder.glob("*/*"))}
        )

    @property
    def notes(self) -> list[str]:
        return [line for line in self.said.splitlines() if line.startswith("--")]

    @property
    def files(self) -> list[str]:
        """Every file of the run by its place beside the folder that it was given."""
        beside = self.folder.parent.glob(f"{self.folder.name}*/**/*")
        found = [path for path in beside if path.is_file()]
        return sorted(re.sub(r"^\d+|\d{6,}.*", "", str(p.relative_to(self.folder.parent))) for p in found)

    @property
    def kept(self) -> list[str]:
        """Names of the whole checkpoints; there are some only where a run did not come to its end."""
        return sorted(seal.parent.name for seal in self.folder.glob("checkpoints/*/COMPLETE.json"))


SIGNS = ["fever", "a cough", "a sore throat", "back pain", "头痛", "咳嗽", "发烧", "牙痛"]
ADVICE = [
    "Rest at home.",
    "See a doctor when it lasts, and drink a lot of water meanwhile.",
    "多喝水，注意休息。",
]


class Runs:
    """Runs of the stages on one small model; a run that was made once is not made again."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.base, self.folder = base, folder
        self.made: dict[tuple[str, ...], Ran] = {}
        self.server = Server(folder)
        for stage, rows in _rows().items():
            for name, part in {"train": rows[:-3], "valid": rows[-3:]}.items():
                file = folder / stage / name / "rows.jsonl"
                file.parent.mkdir(parents=True)
                file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part))
        _more_inputs(base, folder)

    def run(self, stage: str, words: str = "", fault: str = "", again: bool = False) -> Ran:
        """Run `stage` with SHORT and then `words`.

        In them DATA is the stage's rows, FOLDER where all is, RUN the output folder and ADAPTER the plain run's.
        """
        key = (stage, words, fault)
        if key not in self.made or again:
            self.made[key] = self._run(stage, words, fault)
        return self.made[key]

    def _run(self, stage: str, words: str, fault: str) -> Ran:
        output = self.folder / "runs" / str(len(list(self.folder.glob("runs/*.said"))))
        output.parent.mkdir(exist_ok=True)
        said = output.with_suffix(".said")
        where = f"--model_name_or_path {self.base} --train_file_dir {self.folder}/{stage}/train --output_dir {output}"
        given = words.replace("DATA", f"{self.folder}/{stage}").replace("FOLDER", str(self.folder))
        given = given.replace("RUN", str(output))
        if "ADAPTER" in given:
            given = given.replace("ADAPTER", str(self.run(stage).folder / "adapter"))
        blocks = "--block_size 32" if stage == "pt" else ""
        flags = f"{where} {SHORT} {blocks} {given}".split()
        for other, gone in {
            "--use_peft false": ["--lora_dropout", "--lora_rank"],
            "--peft_path": ["--lora_rank"],
            "--logging_strategy epoch": ["--logging_steps"],
        }.items():
            flags = _without(flags, *gone) if other in given else flags
        status, peak = self.server.run(
            SCRIPTS[stage], flags, said, {"STAGECRAFT_FAULT": fault} if fault else {}
        )
        return Ran(output, status, said.read_text(), peak)


def _without(flags: list[str], *names: str) -> list[str]:
    gone = {place + step for place, word in enumerate(flags) if word in names for step in (0, 1)}
    return [word for place, word in enumerate(flags) if place not in gone]


def _rows() -> dict[str, list[dict[str, Any]]]:
    """Rows of every stage, of different lengths."""
    pairs = [(sign, ADVICE[n % 3] * (n % 4 + 1)) for n, sign in enumerate(SIGNS * 3)]
    documents = [{"text": f"Someone has {sign}, {n}. {advice}"} for n, (sign, advice) in enumerate(pairs)]
    talks, preferences = [], []
    for n, (sign, advice) in enumerate(pairs):
        turns = [("human", f"What about {sign}? {n}"), ("gpt", advice)]
        talks.append({"conversations": [{"from": who, "value": text} for who, text in turns]})
        question = f"What about {sign}? {n}"
        preferences.append(
            {"question": question, "response_chosen": advice, "response_rejected": f"Sing {n}."}
        )
    return {"pt": documents, "sft": talks, "rm": preferences, "dpo": preferences}


LOUD = """
from transformers import Qwen3ForCausalLM


class LoudForCausalLM(Qwen3ForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        output = super().forward(input_ids, attention_mask=attention_mask, labels=labels, **kwargs)
        output["loss"] = 2 * output["loss"]
        return output
"""


def _more_inputs(base: Path, folder: Path) -> None:
    """A row that can't be used; documents for large batches; another model, and one with code of its own."""
    (folder / "bad.jsonl").write_text(
        (folder / "sft/train/rows.jsonl").read_text() + '{"conversations": []}\n'
    )
    (folder / "long.jsonl").write_text(json.dumps({"text": " ".join(ADVICE * 1500)}) + "\n")
    other, loud = (Path(shutil.copytree(base, folder / name)) for name in ("other", "loud"))
    tensors = load_file(other / "model.safetensors")
    save_file(
        {k: 1.1 * v for k, v in tensors.items()}, other / "model.safetensors", metadata={"format": "pt"}
    )
    (loud / "modeling_loud.py").write_text(LOUD)
    config = json.loads((loud / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_loud.LoudForCausalLM"}
    (loud / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def runs(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    made = Runs(tiny_base, tmp_path_factory.mktemp("knobs"))
    yield made
    made.server.process.terminate()


# ---- The table


@dataclass(frozen=True)
class Knob:
    """One flag of one stage: its other value, what that changes (names of Ran's properties), what it does not."""

    stage: str
    flag: str
    value: str
    differs: str = "weights"
    same: str = ""
    beside: str = ""  # flags of both runs
    fault: str = ""  # of both runs: killed at a step, for what lies there until the end
    refused: str = ""  # the one line that this flag is refused with here
    less_memory: bool = False

    def __str__(self) -> str:
        return f"{self.stage}-{self.flag}-{self.value.rsplit('/')[-1]}".rstrip("-")


EVALUATED = "--eval_strategy steps --eval_steps 1 --validation_file_dir DATA/valid"
WHOLE = "--max_steps -1 --num_train_epochs 1"
SAVED = "--save_strategy steps --save_steps 1"
# Every step makes the next evaluation worse.
WORSE = f"{EVALUATED} {SAVED} --use_peft false --learning_rate 1"
BIG = "--train_file_dir FOLDER/long.jsonl --block_size 256 --per_device_train_batch_size 64 --max_steps 1"
ALL = ("pt", "sft", "rm", "dpo")

KNOBS = [
    # Model
    *(Knob(stage, "model_name_or_path", "FOLDER/other", "first_loss") for stage in ("pt", "sft")),
    *(Knob(stage, "model_name_or_path", "FOLDER/other") for stage in ("rm", "dpo")),
    *(Knob(stage, "torch_dtype", "bfloat16", same="counts") for stage in ("sft", "rm", "dpo")),
    *(Knob(stage, "load_in_4bit", "true", same="parameters") for stage in ("sft", "rm")),
    Knob("sft", "load_in_8bit", "true", same="parameters"),
    Knob("sft", "flash_attn", "true", refused="--flash_attn needs CUDA; leave it out here (SDPA is used)"),
    Knob("sft", "trust_remote_code", "true", "first_loss", beside="--model_name_or_path FOLDER/loud"),
    *(Knob(stage, "padding_free", "false", "padding", same="counts") for stage in ALL),
    # LoRA
    *(Knob(stage, "use_peft", "false", "weights parameters names") for stage in ALL),
    *(Knob(stage, "target_modules", "q_proj", "weights parameters") for stage in ("sft", "rm", "dpo")),
    *(Knob(stage, "lora_rank", "8", "weights parameters") for stage in ("pt", "rm", "dpo")),
    *(Knob(stage, "lora_alpha", "8", same="first_loss parameters") for stage in ("sft", "rm", "dpo")),
    Knob("sft", "lora_dropout", "0.5", same="first_loss"),
    *(Knob(stage, "lora_dropout", "0.5", beside="--disable_dropout false") for stage in ("rm", "dpo")),
    *(Knob(stage, "lora_dropout", "0.5", "notes", same="weights") for stage in ("rm", "dpo")),
    *(Knob(stage, "use_dora", "true", "weights parameters") for stage in ("sft", "dpo")),
    Knob("sft", "use_rslora", "true", same="parameters first_loss"),
    *(Knob(stage, "modules_to_save", "embed_tokens", "weights parameters") for stage in ("sft", "rm", "dpo")),
    Knob("sft", "peft_path", "ADAPTER", "first_loss weights", same="parameters"),
    Knob("dpo", "peft_path", "ADAPTER"),
    # Data
    *(Knob(stage, "train_file_dir", "DATA/valid", "counts losses") for stage in ALL),
    Knob("sft", "validation_file_dir", "DATA/valid", "counts", same="weights"),
    Knob("pt", "validation_split_percentage", "30", "counts losses"),
    Knob("sft", "validation_split_percentage", "30", "counts losses"),
    Knob("sft", "max_train_samples", "5", "counts losses"),
    Knob("sft", "max_eval_samples", "1", "counts eval_losses", same="losses", beside=EVALUATED),
    Knob("sft", "on_bad_rows", "skip", "status", beside="--train_file_dir FOLDER/bad.jsonl"),
    Knob("pt", "block_size", "16", "lengths losses"),
    *(Knob(stage, "template_name", "alpaca", "lengths losses") for stage in ("sft", "rm", "dpo")),
    Knob("sft", "model_max_length", "40", "counts lengths"),
    Knob("sft", "on_long_rows", "truncate", "counts lengths", beside="--model_max_length 40"),
    *(Knob(stage, "max_source_length", "30", "counts") for stage in ("rm", "dpo")),
    *(Knob(stage, "max_target_length", "30", "counts") for stage in ("rm", "dpo")),
    Knob("dpo", "on_long_rows", "truncate", "counts", beside="--max_target_length 30"),
    # Run
    Knob("sft", "output_dir", "RUN.elsewhere", "files"),
    Knob("sft", "logging_dir", "RUN.events", "files", same="weights", beside="--report_to tensorboard"),
    # Steps and rows
    Knob("sft", "max_steps", "2", "steps rates"),
    Knob("sft", "num_train_epochs", "0.5", "steps", beside="--max_steps -1 --num_train_epochs 1"),
    *(Knob(stage, "per_device_train_batch_size", "2", "losses") for stage in ALL),
    *(Knob(stage, "gradient_accumulation_steps", "2", "losses") for stage in ALL),
    Knob("sft", "train_sampling_strategy", "group_by_length", "losses", same="counts"),
    Knob("sft", "group_by_length", "true", "losses", same="counts"),
    Knob("sft", "dataloader_drop_last", "true", "steps", beside=WHOLE),
    *(Knob(stage, "seed", "7", "losses", same="counts") for stage in ALL),
    Knob("sft", "data_seed", "7", "losses", same="counts"),
    # The optimizer
    *(Knob(stage, "learning_rate", "2e-3", "rates weights", same="first_loss") for stage in ALL),
    Knob("sft", "lr_scheduler_type", "cosine", "rates weights", same="first_loss"),
    Knob(
        "sft",
        "lr_scheduler_kwargs",
        '{"num_cycles":2}',
        "rates",
        beside="--lr_scheduler_type cosine_with_restarts",
    ),
    Knob("sft", "warmup_steps", "2", "rates weights", same="first_loss"),
    Knob("sft", "weight_decay", "0.5", same="first_loss rates"),
    Knob("sft", "max_grad_norm", "1e-6", same="first_loss rates"),
    Knob("sft", "adam_beta1", "0.5", same="first_loss rates"),
    Knob("sft", "adam_beta2", "0.5", same="first_loss rates"),
    Knob("sft", "adam_epsilon", "1e-2", same="first_loss rates"),
    Knob("sft", "optim", "adafactor", same="first_loss rates"),
    Knob("sft", "optim_args", "momentum=0.9", same="first_loss rates", beside="--optim sgd"),
    Knob("sft", "bf16", "true", same="counts rates"),
    Knob("sft", "fp16", "true", refused="--fp16 needs CUDA; here use --bf16 true, or neither"),
    Knob("pt", "gradient_checkpointing", "true", "", same="weights", beside=BIG, less_memory=True),
    *(Knob(stage, "neftune_noise_alpha", "50", "losses", same="rates") for stage in ALL),
    *(Knob(stage, "label_smoothing_factor", "0.2", "losses", same="rates") for stage in ("pt", "sft")),
    Knob(
        "rm",
        "label_smoothing_factor",
        "0.2",
        refused="--label_smoothing_factor does nothing here: the loss of a reward model has no labels to smooth; "
        "leave it out",
    ),
    # What is looked at, said and kept
    Knob("sft", "logging_steps", "2", "logs", same="weights"),
    Knob("sft", "logging_first_step", "false", "logs", same="weights", beside="--logging_steps 2"),
    Knob(
        "sft",
        "logging_strategy",
        "epoch",
        "logs",
        same="weights",
        beside="--logging_first_step false",
    ),
    Knob("sft", "report_to", "tensorboard", "names", same="weights"),
    Knob(
        "sft",
        "eval_strategy",
        "epoch",
        "evaluations",
        same="losses",
        beside=WHOLE + " --validation_file_dir DATA/valid",
    ),
    Knob("sft", "eval_steps", "2", "evaluations", same="weights", beside=EVALUATED),
    Knob("sft", "eval_on_start", "true", "evaluations", same="losses", beside=EVALUATED),
    Knob("sft", "eval_delay", "2", "evaluations", same="weights", beside=EVALUATED),
    *(
        Knob(s, "per_device_eval_batch_size", "1", "eval_losses", same="losses", beside=EVALUATED)
        for s in ("pt", "sft")
    ),
    Knob("sft", "save_strategy", "steps", "kept", beside="--save_steps 1", fault="kill@3"),
    Knob("sft", "save_steps", "2", "kept", beside=SAVED, fault="kill@3"),
    Knob("sft", "save_total_limit", "1", "kept", beside=SAVED, fault="kill@3"),
    Knob("sft", "save_only_model", "true", "files", same="kept", beside=SAVED, fault="kill@3"),
    Knob("sft", "load_best_model_at_end", "true", same="losses eval_losses", beside=WORSE),
    Knob(
        "sft",
        "greater_is_better",
        "true",
        same="losses eval_losses",
        beside=WORSE + " --load_best_model_at_end true",
    ),
    # Reward model
    Knob("rm", "center_rewards_coefficient", "0.5", "losses"),
    Knob("rm", "disable_dropout", "false", same="first_loss", beside="--lora_dropout 0.5"),
    # DPO
    Knob("dpo", "reference_free", "true", "first_loss"),
    # Beside a live reference, from which the first margins are exactly zero.
    Knob("dpo", "beta", "0.5", "losses", same="first_loss", beside="--precompute_ref_log_probs false"),
    *(
        Knob("dpo", "loss_type", name, "losses")
        for name in ("hinge", "ipo", "nca_pair", "sppo_hard", "apo_zero", "sft")
    ),
    Knob("dpo", "loss_weights", "1 0.1", "first_loss", beside="--loss_type sigmoid sft --loss_weights 1 1"),
    Knob("dpo", "label_smoothing", "0.2", "losses", beside="--loss_type robust"),
    Knob("dpo", "f_divergence_type", "alpha_divergence", "losses", same="first_loss"),
    Knob("dpo", "f_alpha_divergence_coef", "0.9", "losses", beside="--f_divergence_type alpha_divergence"),
    Knob("dpo", "ld_alpha", "0.1", "losses", same="first_loss", beside="--precompute_ref_log_probs false"),
    Knob("dpo", "use_weighting", "true", "losses"),
    Knob("dpo", "discopop_tau", "5", "losses", beside="--loss_type discopop"),
    Knob("dpo", "disable_dropout", "false", same="first_loss", beside="--lora_dropout 0.5"),
    Knob("dpo", "sync_ref_model", "true --ref_model_sync_steps 1", "losses", beside="--use_peft false"),
    Knob(
        "dpo",
        "ref_model_sync_steps",
        "2",
        "losses",
        beside="--use_peft false --sync_ref_model true --ref_model_sync_steps 1",
    ),
    Knob(
        "dpo",
        "ref_model_mixup_alpha",
        "0.1",
        "losses",
        beside="--use_peft false --sync_ref_model true --ref_model_sync_steps 1",
    ),
    # Noise on the embeddings shows it: what is asked once, before training, has none.
    Knob(
        "dpo",
        "precompute_ref_log_probs",
        "true",
        "first_loss",
        same="counts",
        beside="--neftune_noise_alpha 50 --precompute_ref_log_probs false",
    ),
]


@pytest.mark.parametrize("knob", KNOBS, ids=str)
def test_the_flag_changes_the_run(knob: Knob, runs: Runs) -> None:
    plain = runs.run(knob.stage, knob.beside, knob.fault)
    other = runs.run(knob.stage, f"{knob.beside} --{knob.flag} {knob.value}".strip(), knob.fault)
    if knob.refused:
        assert plain.status == 0, plain
        assert (other.status, other.said.splitlines()[-1]) == (2, knob.refused), other
        return
    ended = [-9] if knob.fault else [0]
    assert plain.status in (ended if "status" not in knob.differs else [2]) and other.status in ended, (
        plain,
        other,
    )
    for name in knob.differs.split():
        assert getattr(plain, name) != getattr(other, name), name
    for name in knob.same.split():
        assert getattr(plain, name) == getattr(other, name), name
    if (
        knob.less_memory
    ):  # KiB; one of two layers' activations is 35 MB, and a peak is up to 20 MB higher by chance
        words = f"{knob.beside} --{knob.flag} {knob.value}"
        peaks = [[runs.run(knob.stage, w, again=True).peak for _ in range(4)] for w in (words, knob.beside)]
        assert min(peaks[0]) < min(peaks[1]) - 5_000, peaks


@pytest.mark.parametrize("stage", ALL)
def test_control_the_same_flags_change_nothing(stage: str, runs: Runs) -> None:
    plain, again = runs.run(stage), runs.run(stage, "--seed 42")
    for name in ("weights", "losses", "rates", "counts", "names", "logs", "parameters", "lengths"):
        assert getattr(plain, name) == getattr(again, name), name


# ---- Flags that need more than two runs side by side


def test_overwrite_output_dir_replaces_a_finished_run(runs: Runs) -> None:
    finished = runs.run("sft", "--seed 3")
    before, where = finished.weights, f"--output_dir {finished.folder}"
    refused = runs.run("sft", where)
    assert refused.status == 2 and "--overwrite_output_dir replaces it" in refused.said, refused
    assert finished.weights == before
    replaced = runs.run("sft", f"{where} --overwrite_output_dir true")
    assert replaced.status == 0 and finished.weights == runs.run("sft").weights != before, replaced


def test_resume_flags_decide_where_a_run_goes_on(runs: Runs) -> None:
    """Killed at step 2 of 3 with its checkpoints; then asked for a start from the beginning, and for other flags."""
    killed = runs.run("sft", SAVED, "kill@2")
    assert killed.kept == ["checkpoint-1"], killed
    again = f"{SAVED} --output_dir {killed.folder}"
    other = runs.run("sft", f"{again} --weight_decay 0.5", "kill@2")
    assert other.status == 2 and "--resume_anyway goes on all the same" in other.said, other
    anyway = runs.run("sft", f"{again} --weight_decay 0.5 --resume_anyway true", "kill@2")
    assert anyway.status == -9 and "resuming from" in anyway.said, anyway
    afresh = runs.run("sft", f"{again} --resume_from_checkpoint False", "kill@3")
    assert afresh.status == -9 and "resuming from" not in afresh.said, afresh
    whole = runs.run("sft", again)
    assert whole.status == 0 and "resuming from" in whole.said, whole
    none = runs.run("sft", f"{SAVED} --resume_from_checkpoint True")
    assert none.status == 2 and "no checkpoint in" in none.said, none  # control: unset, it would start


def test_overwrite_cache_tokenises_again(runs: Runs) -> None:
    def made() -> int:
        return sum(file.stat().st_mtime_ns for file in runs.folder.glob(".cache/tokenised/*/made.json"))

    runs.run("sft")
    first = made()
    assert runs.run("sft", "--seed 11").status == 0 and made() == first  # control
    assert runs.run("sft", "--seed 11 --overwrite_cache true").status == 0 and made() != first


def test_cache_dir_is_where_a_hub_model_is_looked_for(tiny_base: Path, tmp_path: Path) -> None:
    from stagecraft import models
    from stagecraft.arguments import LoraArguments, ModelArguments

    hub = tmp_path / "models--somebody--tiny"
    shutil.copytree(tiny_base, hub / "snapshots" / "abc")
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("abc")
    lora = LoraArguments(use_peft=False)
    args = ModelArguments("somebody/tiny", cache_dir=str(tmp_path))
    model, _ = models.load_for_training(args, lora)
    assert model.config.hidden_size == 32 and models.load_model_tokenizer(args).eos_token
    with pytest.raises(OSError, match="couldn.t find them in the cached files"):  # nor is anything fetched
        models.load_for_training(ModelArguments("somebody/tiny", cache_dir=str(tmp_path / "other")), lora)


# ---- Nothing is left out

ELSEWHERE = {
    "overwrite_output_dir": test_overwrite_output_dir_replaces_a_finished_run,
    "resume_from_checkpoint": test_resume_flags_decide_where_a_run_goes_on,
    "resume_anyway": test_resume_flags_decide_where_a_run_goes_on,
    "overwrite_cache": test_overwrite_cache_tokenises_again,
    "cache_dir": test_cache_dir_is_where_a_hub_model_is_looked_for,
}
EXCEPTIONS = {
    "device_map": "a CPU is one place, and so is one GPU; test_contradictions.py: refused for several processes",
    "preprocessing_num_workers": "changes only speed; test_corpus.py: the same rows by any number of processes",
}
# What users reach for most, recipes or not.
REACHED_FOR = """
learning_rate lr_scheduler_type warmup_steps weight_decay max_grad_norm adam_beta1 adam_beta2 adam_epsilon optim
label_smoothing_factor neftune_noise_alpha seed data_seed max_steps num_train_epochs per_device_train_batch_size
per_device_eval_batch_size gradient_accumulation_steps train_sampling_strategy group_by_length dataloader_drop_last
gradient_checkpointing logging_steps eval_strategy eval_steps save_strategy save_steps save_total_limit
load_best_model_at_end beta loss_type label_smoothing loss_weights precompute_ref_log_probs disable_dropout
center_rewards_coefficient
"""


def _flags_of(stage: str) -> set[str]:
    """The kit's own flags of a stage, and the trainer's that its recipes set."""
    from stagecraft import arguments

    data = {"pt": arguments.PretrainingDataArguments, "sft": arguments.SFTDataArguments}
    groups = (
        arguments.ModelArguments,
        arguments.LoraArguments,
        data.get(stage, arguments.PreferenceDataArguments),
        arguments.RunArguments,
        *([arguments.ReferenceArguments] if stage == "dpo" else []),
    )
    ours = {field.name for group in groups for field in dataclasses.fields(group)}
    recipes = [path for path in (ROOT / "recipes").glob("*/*.yaml") if path.stem.split("-")[0] == stage]
    assert recipes
    return ours | {name for path in recipes for name in yaml.safe_load(path.read_text(encoding="utf-8"))}


def test_every_flag_is_flipped_by_a_test_or_has_a_reason_not_to_be() -> None:
    flipped = {knob.flag for knob in KNOBS} | ELSEWHERE.keys()
    asked = {name for stage in ALL for name in _flags_of(stage)} | set(REACHED_FOR.split())
    assert asked - flipped - EXCEPTIONS.keys() == set()
    # Neither list speaks of a flag that is tested, or of none at all.
    assert EXCEPTIONS.keys() & flipped == set() and EXCEPTIONS.keys() <= asked
    assert {knob.flag for knob in KNOBS if not (knob.differs or knob.refused or knob.less_memory)} == set()


def test_control_a_new_flag_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from stagecraft import arguments

    new = dataclasses.make_dataclass(
        "LoraArguments", [("brand_new", bool, False)], bases=(arguments.LoraArguments,)
    )
    monkeypatch.setattr(arguments, "LoraArguments", new)
    with pytest.raises(AssertionError, match="brand_new"):
        test_every_flag_is_flipped_by_a_test_or_has_a_reason_not_to_be()
