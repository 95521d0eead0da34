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

from stagecraft import checkpoints, disk, lineage
from stagecraft.arguments import RunArguments
from stagecraft.console import settle_libraries
from stagecraft.errors import ProofFailed, Stopped, UserError
from stagecraft.files import replace_folder, require_free_disk, write_json, write_text
from stagecraft.interrupts import Interrupted, Interrupts
from stagecraft.manifest import describe_run, is_secret, now
from stagecraft.models import describe_parameters, resolve_precision
from stagecraft.pace import price_an_hour
from stagecraft.processes import die_with_parent, is_held
from stagecraft.training import trackers

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
    "resume_anyway",
    "logging_dir",
    "report_to",
    "run_name",
    "overwrite_cache",
    "preprocessing_num_workers",
    "save_total_limit",
}


# Exit statuses: come back to go on (as sysexits has it for a temporary failure); start again with a smaller batch.
INTERRUPTED, OUT_OF_MEMORY = 75, 76
# What a run keeps in checkpoints/ beside them.
IDENTITY, MICRO_BATCH, RESTARTS, STOPPED = (
    "identity.json",
    "micro_batch.json",
    "restarts.json",
    "stopped.json",
)
LOWER = (
    "  --model_max_length, --block_size or --max_source_length: activations grow with the longest row",
    "  --gradient_checkpointing true: activations of one layer at a time, a third more time",
    "  --load_in_4bit true (LoRA): a quarter of the base's weights",
    "  --lora_rank, or fewer --target_modules: gradients and optimizer",
    "  DEEPSPEED=zero3 or more GPUS: weights and optimizer spread over cards",
)


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
        self.interrupts = Interrupts()
        self.trainer: Trainer | None = None  # once it trains

    def configure(self, config_class: type, training: dict[str, Any], **ours: Any) -> Any:
        """The trainer's configuration: flags as given, and what the folder and the machine decide.

        Raises UserError where the library refuses a combination of flags.
        """
        import torch

        if self.args.logging_dir:
            os.environ["TENSORBOARD_LOGGING_DIR"] = self.args.logging_dir
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(self.logs))
        values: dict[str, Any] = {
            "report_to": "tensorboard",
            "run_name": f"{self.name}-{self.folder.resolve().name}",
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
                # A rank's device is then cpu:0, which torch.load does not know when an optimizer is resumed.
                torch.serialization.register_package(
                    0,
                    lambda storage: None,
                    lambda storage, place: storage if place.startswith("cpu:") else None,
                )
        if training.get("deepspeed"):
            import deepspeed

            _clear_stale_builds()
            # ZeRO-3 reads the world size when its configuration is read; without a process group that is one.
            deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo")
        print(resolve_precision(training), flush=True)
        ours |= self._smaller_batch()
        try:
            return config_class(**values | training | ours, output_dir=str(self.checkpoints))
        except (ValueError, TypeError, ImportError) as error:
            raise UserError(f"the trainer refuses these flags: {' '.join(str(error).split())}") from None

    def train(self, trainer: Trainer, corpus: Corpus) -> None:
        """Train, from the last checkpoint when this is the same run as the one that left it."""
        from transformers import PrinterCallback

        from stagecraft.progress import Progress
        from stagecraft.watching import Watch

        if self.is_main:
            self.clear_finished()
        world = trainer.accelerator.num_processes
        if world != int(os.environ.get("WORLD_SIZE", "1")):
            raise RuntimeError(
                f"{os.environ['WORLD_SIZE']} processes were started, but the trainer sees {world}"
            )
        checkpoint = self._resume_point(trainer, self._identity(corpus))
        print(describe_parameters(trainer.model), flush=True)
        args = trainer.args
        each, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
        print(
            f"global batch {each * steps * world} = {each} a device x {steps} accumulated x {world} "
            f"process{'es' if world > 1 else ''}",
            flush=True,
        )
        print(trainer.padding.describe(), flush=True)
        if self.is_main:
            disk.require_room(trainer, self.folder, self.arguments)
        self.manifest |= {
            "data": corpus.files,
            "counts": corpus.counts,
            "lengths": corpus.lengths,
            "bad_rows_skipped": corpus.skipped,
            "world_size": world,
            "seed": args.seed,
        }
        trainer.remove_callback(PrinterCallback)
        Watch(trainer, trainer.processing_class, self.interrupts, keep=args.save_total_limit)
        args.save_total_limit = None  # an older checkpoint goes when the newer one is sealed, see Watch
        trainer.add_callback(
            Progress(
                self.name,
                self.logs / "progress.jsonl",
                show=self.is_main,
                tokens=corpus.counts["tokens an epoch"],
            )
        )
        if self.is_main:
            trackers.follow(trainer, args.run_name, self.logs, self.checkpoints, resumes=bool(checkpoint))
        self.trainer = trainer
        self.interrupts.training = True
        result = trainer.train(resume_from_checkpoint=checkpoint)
        if self.interrupts.name and result.global_step < trainer.state.max_steps:
            self._note_stop(self.interrupts.name)
            raise Stopped(
                f"{self.name}: stopped by {self.interrupts.name} after step {result.global_step} of {trainer.state.max_steps}, "
                "which is kept; the same command goes on from there",
                status=INTERRUPTED,
            )
        print(trainer.padding.outcome(), flush=True)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        self.manifest["metrics"] = {
            "steps": result.global_step,
            "seconds": round(result.metrics["train_runtime"], 2),
            "tokens": round(corpus.counts["tokens an epoch"] * (trainer.state.epoch or 0)),
            "loss_first": losses[0] if losses else None,
            "loss_last": losses[-1] if losses else None,
            "padding": trainer.padding.describe(),
            "padding_share": round(trainer.padding.computed, 4),  # of the tokens that the layers computed
            "padding_share_of_batches": round(trainer.padding.share, 4),
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
        self.manifest |= {"restarts": self._restarts(), "finished": now()}
        replace_folder(temporary, self.folder / name)
        write_json(self.folder / "run.json", self.manifest)
        note_outputs(self.folder, name)
        write_text(self.folder / "TRAINED", now() + "\n")
        shutil.rmtree(self.checkpoints, ignore_errors=True)  # last: until then they are all there is
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
            if entry.name not in (*LEAVINGS, ".lock", ".gitkeep", ".inputs.json")
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
        if finished:  # before the markers: what is left of another run must never look like an unfinished one
            shutil.rmtree(self.checkpoints, ignore_errors=True)
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
        watched["processes"] = int(os.environ.get("WORLD_SIZE", "1"))
        identity = {
            "arguments": watched,
            "data": {file["path"]: file["sha256"] for file in corpus.files},
            "models": {
                str(path): lineage.weights_in(Path(str(path)))
                for flag in ("model_name_or_path", "peft_path")
                if (path := self.arguments.get(flag))
            },
        }
        return json.loads(json.dumps(identity, default=str))

    def _resume_point(self, trainer: Trainer, identity: dict[str, Any]) -> str | None:
        """The checkpoint to go on from, or None for a start from the beginning. The first rank decides for all."""
        from accelerate.utils import broadcast_object_list

        decided = [self._decide(identity) if self.is_main else None]
        broadcast_object_list(decided)
        trainer.accelerator.wait_for_everyone()
        return decided[0]

    def _decide(self, identity: dict[str, Any]) -> str | None:
        asked = (self.args.resume_from_checkpoint or "").lower()
        found = checkpoints.found_in(self.checkpoints)
        if asked == "false" and self.checkpoints.exists():
            if found:
                print(f"{found[0].name} is removed, as asked: starting from the beginning", flush=True)
            shutil.rmtree(self.checkpoints)
            found = []
        before = _read_json(self.checkpoints / IDENTITY)
        differences = _differences(before, identity) if found else []
        if differences and not self.args.resume_anyway:
            raise UserError(
                f"--output_dir {self.folder}: holds {found[0].name} of another run:",
                *differences,
                "--resume_anyway goes on all the same, --resume_from_checkpoint False starts afresh and removes it",
            )
        chosen = self._chosen(asked)
        if before:  # a run was under way here
            stopped = _read_json(self.checkpoints / STOPPED)
            step = checkpoints.step_of(chosen) if chosen else 0
            restart = {"time": now(), "reason": stopped.get("reason", "killed"), "step": step}
            write_json(self.checkpoints / RESTARTS, {"restarts": [*self._restarts(), restart]})
            (self.checkpoints / STOPPED).unlink(missing_ok=True)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_json(self.checkpoints / IDENTITY, identity)
        if chosen:
            print(f"resuming from {chosen}", flush=True)
        return str(chosen) if chosen else None

    def _chosen(self, asked: str) -> Path | None:
        if asked not in ("", "true", "false"):
            path = Path(self.args.resume_from_checkpoint or "")
            fault = checkpoints.fault_of(path) if (path / checkpoints.SEAL).exists() else None
            if fault or not (path / "trainer_state.json").exists():
                raise UserError(
                    f"--resume_from_checkpoint {path}: {fault or 'no complete checkpoint there'}; name another one"
                )
            return path
        chosen, said = checkpoints.newest_whole(self.checkpoints)
        for line in said:
            print(line, flush=True)
        if chosen is None and asked == "true":
            raise UserError(f"--resume_from_checkpoint True: no checkpoint in {self.checkpoints}")
        if chosen is None and said:
            print("no checkpoint is left: starting from the beginning", flush=True)
        return chosen

    def _restarts(self) -> list[dict[str, Any]]:
        return _read_json(self.checkpoints / RESTARTS).get("restarts", [])

    def _note_stop(self, reason: str) -> None:
        """Why this process ends before the run does: told at the next start, and in run.json at the end."""
        if self.trainer is not None and self.checkpoints.exists():
            with contextlib.suppress(OSError):  # a full disk, perhaps: the reason is worth no second error
                write_json(self.checkpoints / STOPPED, {"reason": reason, "time": now()})

    def _smaller_batch(self) -> dict[str, int]:
        """The micro-batch that an out-of-memory stop left for this run; nothing where there was none."""
        if (self.args.resume_from_checkpoint or "").lower() == "false":
            return {}
        kept = _read_json(self.checkpoints / MICRO_BATCH)
        found = kept.get("instead", {}) if kept.get("of") == self._asked_batch() else {}
        if found:
            print(
                f"micro-batch {found['per_device_train_batch_size']} x {found['gradient_accumulation_steps']} accumulated, since "
                "memory did not suffice for a larger one",
                flush=True,
            )
        return found

    def _asked_batch(self) -> list[Any]:
        """The micro-batch and accumulation that the flags ask for."""
        return [self.arguments.get(f) for f in ("per_device_train_batch_size", "gradient_accumulation_steps")]

    def explained(self, error: Exception) -> Exception:
        """What to raise for an error that came from below: a stop or a line where it is known what to do."""
        from stagecraft.watching import is_full_disk, is_out_of_memory

        if is_out_of_memory(error):
            return self.out_of_memory(error)
        if is_full_disk(error, self.folder):
            self._note_stop("disk full")
            return UserError(
                f"--output_dir {self.folder}: the disk is full; what was complete there is as it was. Make room, then run the "
                "same command again: it goes on"
            )
        return error

    def out_of_memory(self, error: BaseException) -> Exception:
        """What to raise for it: a stop that a smaller micro-batch follows, or what else could be lowered."""
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        self._note_stop("out of memory")
        args = self.trainer.args if self.trainer else None
        smaller = (
            _next_smaller(args.per_device_train_batch_size, args.gradient_accumulation_steps)
            if args
            else None
        )
        if smaller is None:
            return UserError(f"out of memory ({reason}); what else to lower, in order of effect:", *LOWER)
        instead = {"per_device_train_batch_size": smaller[0], "gradient_accumulation_steps": smaller[1]}
        with contextlib.suppress(FileNotFoundError):  # whichever rank it was writes it; two write the same
            write_json(self.checkpoints / MICRO_BATCH, {"of": self._asked_batch(), "instead": instead})
        return Stopped(
            f"{self.name}: out of memory after step {self.trainer.state.global_step} with a micro-batch of "
            f"{args.per_device_train_batch_size} ({reason}); the next start takes {smaller[0]} x {smaller[1]} accumulated, the same "
            "global batch",
            status=OUT_OF_MEMORY,
        )


@contextlib.contextmanager
def stage(name: str, args: RunArguments, *groups: Any, training: dict[str, Any]) -> Iterator[Stage]:
    """Hold a stage's folder: locked, logged to logs/train.log, and described in run.json."""
    price_an_hour()  # a PRICE that is no number is told now, not after the loading
    trackers.require(training.get("report_to"))
    current = Stage(name, args, groups, training)
    if "WORLD_SIZE" in os.environ:
        die_with_parent()  # a rank whose torchrun was killed would hold the card and wait for the others
    with contextlib.ExitStack() as held, current.interrupts:
        try:
            settle_libraries()
            if current.is_main:
                require_free_disk(current.folder, disk.final_bytes(current.arguments))
                held.enter_context(lock(current.folder))
                current._refuse_taken()
                held.enter_context(tee(current.logs / "train.log"))
                current.manifest = describe_run(name, current.arguments)
                print(f"{name}: {current.arguments['model_name_or_path']} -> {current.folder}", flush=True)
            else:  # one voice: rank 0 speaks, errors of all ranks are heard
                held.enter_context(contextlib.redirect_stdout(held.enter_context(open(os.devnull, "w"))))
            yield current
        except Interrupted as signal:
            raise Stopped(
                f"{name}: stopped by {signal} before the first step; the same command starts it again",
                status=INTERRUPTED,
            ) from None
        except Stopped as stop:
            if stop.status == 1:
                current._note_stop(str(stop).splitlines()[0])
            raise
        except UserError as error:
            current._note_stop(str(error).splitlines()[0])
            raise
        except Exception as error:
            raise current.explained(error) from error


def note_outputs(folder: Path, name: str) -> None:
    """Add bytes and SHA-256 of every file in folder/name to the run.json of a stage's folder."""
    manifest = _read_json(folder / "run.json")
    outputs = {k: v for k, v in manifest.get("outputs", {}).items() if not k.startswith(f"{name}/")}
    found = checkpoints.describe_files(folder / name)
    outputs |= {f"{name}/{file}": described for file, described in found.items()}
    write_json(folder / "run.json", manifest | {"outputs": outputs})


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


def _clear_stale_builds() -> None:
    """Remove the locks of extensions whose build was killed: torch waits for ever for whoever held them."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")).expanduser()
    for stale in (*root.glob("*/lock"), *root.glob("*/*/lock")):
        if not is_held(stale):
            stale.unlink(missing_ok=True)
            print(f"{stale}: left by a build that was killed: removed", flush=True)


def _next_smaller(each: int, accumulated: int) -> tuple[int, int] | None:
    """(micro-batch, accumulation) with the largest micro-batch up to half of `each` that keeps the global batch."""
    total = each * accumulated
    return next(((size, total // size) for size in range(each // 2, 0, -1) if total % size == 0), None)


def _read_json(path: Path) -> dict[str, Any]:
    """What a file of ours says; an empty dict where it is not there or not whole."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What changed between two identities, a line each."""
    found = []
    for part in ("arguments", "data", "models"):
        old, new = before.get(part, {}), now.get(part, {})
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) == new.get(key):
                continue
            if part == "arguments":
                found.append(f"  {key}: {old.get(key)} -> {new.get(key)}")
            elif part == "data":
                found.append(f"  {key}: the file's content changed")
            elif key in old and key in new:  # else the flag that names it says so already
                found.append(f"  {key}: the weights there changed")
    return found
