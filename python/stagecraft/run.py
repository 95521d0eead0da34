"""A run's life: its folder, lock, log, resume point and the marker that says it is whole."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from stagecraft import lineage
from stagecraft.arguments import RunArguments
from stagecraft.console import settle_libraries
from stagecraft.errors import ProofFailed, UserError
from stagecraft.files import replace_folder, require_free_disk, write_json, write_text
from stagecraft.manifest import describe_run, is_secret, now
from stagecraft.models import describe_parameters, resolve_precision

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer

    from stagecraft.data.corpus import Corpus

# What a stage may have left in its folder; nothing else there is ever touched.
LEAVINGS = ("DONE", "TRAINED", "run.json", "adapter", "model", "checkpoints", "logs")
# Flags that change where a run writes or how it is watched, not what it computes.
UNWATCHED = {
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "logging_dir",
    "report_to",
    "run_name",
    "overwrite_cache",
    "preprocessing_num_workers",
    "save_total_limit",
}


class Stage:
    """One training stage in its folder. Use `with run.stage(...)`; see supervised_finetuning.py."""

    def __init__(
        self, name: str, args: RunArguments, groups: tuple[Any, ...], training: dict[str, Any]
    ) -> None:
        self.name = name
        self.args = args
        self.folder = Path(args.output_dir)
        self.checkpoints = self.folder / "checkpoints"
        self.logs = self.folder / "logs"
        self.arguments = {k: v for group in groups for k, v in dataclasses.asdict(group).items()} | training
        self.is_main = int(os.environ.get("RANK", "0")) == 0
        self.manifest: dict[str, Any] = {}

    def configure(self, config_class: type, training: dict[str, Any], **ours: Any) -> Any:
        """The trainer's configuration: flags as given, and what the folder and the machine decide.

        Raises UserError where the library refuses a combination of flags.
        """
        import torch

        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", self.args.logging_dir or str(self.logs))
        values: dict[str, Any] = {
            "report_to": "tensorboard",
            "logging_steps": 10,
            "logging_first_step": True,
            "disable_tqdm": True,  # stagecraft.progress shows the bar
            "ddp_find_unused_parameters": False,  # every trained weight is used in every step
        }
        if not torch.cuda.is_available():
            # Without use_cpu transformers neither joins a CPU process group nor allows bf16.
            values |= {"dataloader_pin_memory": False, "use_cpu": True}
            if "WORLD_SIZE" in os.environ:
                values["ddp_backend"] = "gloo"
        if training.get("deepspeed"):
            import deepspeed

            # ZeRO-3 reads the world size when its configuration is read; without a process group that is one.
            deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo")
        print(resolve_precision(training), flush=True)
        try:
            return config_class(**values | training | ours, output_dir=str(self.checkpoints))
        except (ValueError, TypeError, ImportError) as error:
            raise UserError(f"the trainer refuses these flags: {' '.join(str(error).split())}") from None

    def train(self, trainer: Trainer, corpus: Corpus) -> None:
        """Train, from the last checkpoint when this is the same run as the one that left it."""
        from transformers import PrinterCallback

        from stagecraft.progress import Progress

        if self.is_main:
            self.clear_finished()
        identity = self._identity(corpus)
        checkpoint = self._resume_point(identity)
        trainer.accelerator.wait_for_everyone()
        if self.is_main:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_json(self.checkpoints / "identity.json", identity)
        print(describe_parameters(trainer.model), flush=True)
        world = trainer.accelerator.num_processes
        if world != int(os.environ.get("WORLD_SIZE", "1")):
            raise RuntimeError(
                f"{os.environ['WORLD_SIZE']} processes were started, but the trainer sees {world}"
            )
        args = trainer.args
        each, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
        print(
            f"global batch {each * steps * world} = {each} a device x {steps} accumulated x {world} "
            f"process{'es' if world > 1 else ''}",
            flush=True,
        )
        self.manifest |= {
            "data": corpus.files,
            "counts": corpus.counts,
            "lengths": corpus.lengths,
            "bad_rows_skipped": corpus.skipped,
            "world_size": world,
            "seed": args.seed,
        }
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Progress(self.name, self.logs / "progress.jsonl", show=self.is_main))
        result = trainer.train(resume_from_checkpoint=checkpoint)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        self.manifest["metrics"] = {
            "steps": result.global_step,
            "seconds": round(result.metrics["train_runtime"], 2),
            "tokens": round(corpus.counts["tokens an epoch"] * (trainer.state.epoch or 0)),
            "loss_first": losses[0] if losses else None,
            "loss_last": losses[-1] if losses else None,
        }

    def finish(self, trainer: Trainer, tokenizer: PreTrainedTokenizerBase, end_ids: list[int] | None) -> None:
        """Write adapter/ or the complete model/, run.json, then TRAINED. `end_ids`: what ends an answer."""
        from peft import PeftModel

        model = trainer.accelerator.unwrap_model(trainer.model)
        name = "adapter" if isinstance(model, PeftModel) else "model"
        if hasattr(model, "generation_config") and end_ids:
            model.generation_config.eos_token_id = end_ids
            model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.config.use_cache = True
        temporary = self.folder / f".{name}.tmp"
        if self.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        trainer.accelerator.wait_for_everyone()
        trainer.save_model(str(temporary))  # every rank: gathering ZeRO-3 weights is a collective
        trainer.accelerator.end_training()  # DeepSpeed with offloading aborts at exit when the process group still stands
        if not self.is_main:
            return
        tokenizer.save_pretrained(temporary)
        if name == "adapter" and end_ids:
            model.generation_config.save_pretrained(temporary)
        step = {key: self.manifest[key] for key in ("stage", "data", "counts", "seed", "metrics", "git")}
        write_json(temporary / lineage.FILE, lineage.after(self.arguments["model_name_or_path"], step))
        for leftover in (
            "training_args.bin",
            "README.md",
        ):  # a pickle, and a card that PEFT fills with blanks
            (temporary / leftover).unlink(missing_ok=True)
        replace_folder(temporary, self.folder / name)
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        self.manifest["finished"] = now()
        write_json(self.folder / "run.json", self.manifest)
        write_text(self.folder / "TRAINED", now() + "\n")
        print(self._outcome(name), flush=True)

    def _outcome(self, name: str) -> str:
        metrics = self.manifest["metrics"]
        first, last = metrics["loss_first"], metrics["loss_last"]
        loss = f"loss {first:.4g} -> {last:.4g}, " if first is not None else ""
        return (
            f"{self.name}: {metrics['steps']} steps, {metrics['tokens']:,} tokens, {metrics['seconds']:.1f} s, "
            f"{loss}saved to {self.folder / name}"
        )

    def _refuse_taken(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        finished = [marker for marker in ("TRAINED", "DONE") if (self.folder / marker).exists()]
        strangers = [
            entry.name
            for entry in self.folder.iterdir()
            if entry.name not in (*LEAVINGS, ".lock", ".gitkeep")
            and not (entry.name.startswith(".") and entry.name.endswith(".tmp"))  # of a killed run of ours
        ]
        if strangers and not (self.folder / "run.json").exists():
            raise UserError(
                f"--output_dir {self.folder}: holds other files ({', '.join(sorted(strangers)[:3])}); choose an empty folder"
            )
        if finished and not self.args.overwrite_output_dir:
            raise UserError(
                f"--output_dir {self.folder}: holds a finished run ({finished[0]}); "
                "--overwrite_output_dir replaces it, or choose another folder"
            )

    def clear_finished(self) -> None:
        """Take away what a finished run left, now that flags and data are known to be good; train.log goes on."""
        finished = [self.folder / marker for marker in ("DONE", "TRAINED") if (self.folder / marker).exists()]
        for marker in finished:  # markers go first, so that a crash below leaves no false DONE
            marker.unlink()
        for name in ("adapter", "model") if finished else ():
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for entry in self.logs.iterdir() if finished else ():
            if entry.name != "train.log":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def _identity(self, corpus: Corpus) -> dict[str, Any]:
        """What makes a run the same run: everything that changes its weights."""
        watched = {k: v for k, v in self.arguments.items() if k not in UNWATCHED and not is_secret(k)}
        return {"arguments": watched, "data": {file["path"]: file["sha256"] for file in corpus.files}}

    def _resume_point(self, identity: dict[str, Any]) -> str | None:
        """The checkpoint to go on from, or None for a fresh start (which clears unfinished checkpoints)."""
        asked = self.args.resume_from_checkpoint
        if asked and asked.lower() not in ("true", "false"):
            if not (Path(asked) / "trainer_state.json").exists():
                raise UserError(f"--resume_from_checkpoint {asked}: no complete checkpoint there")
            return asked
        found = sorted(self.checkpoints.glob("checkpoint-*/trainer_state.json"), key=_step_of)
        if not found:
            if asked and asked.lower() == "true":
                raise UserError(f"--resume_from_checkpoint True: no checkpoint in {self.checkpoints}")
            return None
        newest = found[-1].parent
        try:
            before = json.loads((self.checkpoints / "identity.json").read_text())
        except (OSError, json.JSONDecodeError):
            before = {}
        differences = _differences(before, json.loads(json.dumps(identity, default=str)))
        if asked and asked.lower() == "true" or asked is None and not differences:
            print(f"resuming from {newest}", flush=True)
            return str(newest)
        if not self.args.overwrite_output_dir and asked is None:
            raise UserError(
                f"--output_dir {self.folder}: holds {newest.name} of another run:",
                *differences,
                "--overwrite_output_dir starts afresh, --resume_from_checkpoint True goes on all the same",
            )
        why = "as asked" if asked else f"the run is another one now ({differences[0].strip()})"
        print(f"starting afresh, {newest.name} is removed: {why}", flush=True)
        if self.is_main:
            shutil.rmtree(self.checkpoints, ignore_errors=True)
        return None


@contextlib.contextmanager
def stage(name: str, args: RunArguments, *groups: Any, training: dict[str, Any]) -> Iterator[Stage]:
    """Hold a stage's folder: locked, logged to logs/train.log, and described in run.json."""
    current = Stage(name, args, groups, training)
    settle_libraries()
    if not current.is_main:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 -- one voice: rank 0 speaks, errors of all ranks are heard
        yield current
        return
    require_free_disk(current.folder, _bytes_to_write(current.arguments))
    with lock(current.folder):
        current._refuse_taken()
        with tee(current.logs / "train.log"):
            current.manifest = describe_run(name, current.arguments)
            print(f"{name}: {current.arguments['model_name_or_path']} -> {current.folder}", flush=True)
            yield current


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """One run at a time for a folder; the lock dies with its process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = (folder / ".lock").open("a+")
    except OSError as error:
        raise UserError(f"--output_dir {folder}: can't be written: {error.strerror or error}") from None
    with opened as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            stream.seek(0)
            raise UserError(
                f"--output_dir {folder}: in use by {stream.read().strip() or 'another run'}"
            ) from None
        stream.truncate(0)
        stream.write(f"process {os.getpid()} since {now()}")
        stream.flush()
        yield


class _Tee:
    """Writes to the terminal and, line by line, to the log; of a progress bar the log keeps the last state."""

    def __init__(self, terminal: TextIO, log: TextIO) -> None:
        self.terminal, self.log, self.line = terminal, log, ""

    def write(self, text: str) -> int:
        self.terminal.write(text)
        *whole, self.line = (self.line + text).split("\n")
        for line in whole:
            self._log(line)
        return len(text)

    def end(self) -> None:
        """What no line end has ended yet (a bar that an error cut off) is logged too."""
        if self.line:
            self._log(self.line)
            self.line = ""

    def _log(self, line: str) -> None:
        self.log.write(line.rstrip("\r").split("\r")[-1] + "\n")

    def flush(self) -> None:
        self.terminal.flush()
        self.log.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.terminal, name)


@contextlib.contextmanager
def tee(path: Path) -> Iterator[None]:
    """Everything printed while inside, errors included, also goes to the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    out, err = sys.stdout, sys.stderr
    with path.open("a", encoding="utf-8") as log:
        sys.stdout, sys.stderr = _Tee(out, log), _Tee(err, log)
        try:
            yield
        except (UserError, ProofFailed) as error:
            log.write(f"{error}\n")
            raise
        except Exception:
            import traceback

            log.write(traceback.format_exc())
            raise
        finally:
            for stream in (sys.stdout, sys.stderr):
                if isinstance(stream, _Tee):
                    stream.end()
            sys.stdout, sys.stderr = out, err


def _bytes_to_write(arguments: dict[str, Any]) -> int:
    """Upper estimate: checkpoints (weights and two fp32 moments each) and the final model, all from the base's size."""
    base = Path(str(arguments.get("model_name_or_path")))
    weights = sum(file.stat().st_size for file in base.glob("*.safetensors")) if base.is_dir() else 0
    kept = 0 if arguments.get("save_strategy") == "no" else int(arguments.get("save_total_limit") or 1)
    if arguments.get("use_peft"):
        return weights + 50_000_000  # adapters and their checkpoints are small beside the merged model
    return weights * (1 + 3 * kept)


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    found = []
    for part in ("arguments", "data"):
        old, new = before.get(part, {}), now.get(part, {})
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                shown = (
                    f"{key}: {old.get(key)} -> {new.get(key)}"
                    if part == "arguments"
                    else f"{key}: the file's content changed"
                )
                found.append(f"  {shown}")
    return found


def _step_of(state: Path) -> int:
    return int(state.parent.name.rsplit("-", 1)[1])
