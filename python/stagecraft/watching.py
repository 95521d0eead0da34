"""A trainer under watch: every step's numbers, signals, memory, and each checkpoint until it is sealed."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stagecraft import checkpoints
from stagecraft.errors import Stopped, UserError
from stagecraft.interrupts import Interrupts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A gradient norm that is not finite in one step may be fp16's loss scale finding its place; in so many it is not.
BAD_NORMS = 5
SHOWN_ROWS, SHOWN_CHARACTERS = 8, 70


class Watch(TrainerCallback):
    """Watches `trainer` from now on. `interrupts` tells of signals; `keep` is how many checkpoints stay."""

    def __init__(
        self, trainer: Trainer, tokenizer: PreTrainedTokenizerBase, interrupts: Interrupts, keep: int | None
    ) -> None:
        self.trainer, self.tokenizer, self.interrupts, self.keep = trainer, tokenizer, interrupts, keep
        self.fault = Fault.from_environment()
        self.batches: list[dict[str, Any]] = []
        self.bad_loss: torch.Tensor | None = None
        self.norm: Any = None
        self.bad_norms = 0
        self._wrap()
        trainer.add_callback(self)

    def _wrap(self) -> None:
        """Put ourselves around four methods of this one trainer; subclasses would be needed once for each library."""
        trainer = self.trainer
        training_step, evaluate, save = trainer.training_step, trainer.evaluate, trainer._save_checkpoint
        clip = trainer.accelerator.clip_grad_norm_

        def watched_step(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
            self.batches.append(inputs)
            self.fault.before(trainer)
            loss = self.fault.changed(trainer, training_step(model, inputs, *args, **kwargs))
            bad = ~torch.isfinite(loss.detach()).all()
            self.bad_loss = bad if self.bad_loss is None else self.bad_loss | bad
            return loss

        def watched_clip(*args: Any, **kwargs: Any) -> Any:
            self.norm = self.fault.norm(trainer, clip(*args, **kwargs))
            return self.norm

        trainer.training_step = watched_step
        trainer.evaluate = lambda *args, **kwargs: self._evaluate(evaluate, *args, **kwargs)
        trainer._save_checkpoint = lambda *args, **kwargs: self._save(save, *args, **kwargs)
        trainer.accelerator.clip_grad_norm_ = watched_clip

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        norm = self.norm if self.norm is not None else 0.0
        norm_is_bad = not bool(torch.isfinite(torch.as_tensor(norm, dtype=torch.float32)).all())
        self.bad_norms = self.bad_norms + 1 if norm_is_bad else 0
        bad_loss, stop = self._any_rank(bool(self.bad_loss), self.interrupts.name is not None)
        if bad_loss or self.bad_norms >= BAD_NORMS:
            what = "the loss is" if bad_loss else f"the gradient norm has been for {BAD_NORMS} steps"
            raise Stopped(
                f"step {state.global_step}: {what} not a finite number; {self._advice()}", *self._rows()
            )
        self.batches, self.bad_loss, self.norm = [], None, None
        self.fault.after(state.global_step)
        if stop:
            control.should_save = control.should_training_stop = True

    def _any_rank(self, *flags: bool) -> list[bool]:
        """Each flag, true where it is on any rank: all ranks have to leave the loop in the same step."""
        if not torch.distributed.is_initialized():
            return list(flags)
        told = torch.tensor(flags, dtype=torch.int32, device=self.trainer.args.device)
        torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX)
        return [bool(flag) for flag in told.tolist()]

    def _advice(self) -> str:
        whole = self._whole()
        kept = f"{whole[0].name} is kept" if whole else "there is no checkpoint yet"
        return f"{kept}; a lower --learning_rate, --max_grad_norm, or bf16 instead of fp16 helps. The step's rows:"

    def _rows(self) -> list[str]:
        """How each row of the step begins, as text."""
        rows = []
        for batch in self.batches:
            key = next((name for name in ("input_ids", "chosen_input_ids") if name in batch), None)
            for ids in batch[key].tolist() if key else []:
                text = self.tokenizer.decode([i for i in ids if i != self.tokenizer.pad_token_id])
                rows.append(f"  {' '.join(text.split())[:SHOWN_CHARACTERS]}")
        more = [f"  ... and {len(rows) - SHOWN_ROWS} more"] if len(rows) > SHOWN_ROWS else []
        return rows[:SHOWN_ROWS] + more

    def _whole(self) -> list[Path]:
        """Sealed checkpoints, the newest first."""
        return [each for each in checkpoints.found_in(self._folder()) if (each / checkpoints.SEAL).exists()]

    def _folder(self) -> Path:
        return Path(self.trainer.args.output_dir)

    def _evaluate(self, evaluate: Any, *args: Any, **kwargs: Any) -> Any:
        """Evaluation with a batch of its own: halved where memory does not suffice, while training's stays."""
        random_state = torch.random.get_rng_state()  # a second try must not draw other numbers than one alone
        while True:
            try:
                torch.random.set_rng_state(random_state)
                self.fault.before_evaluation(self.trainer)
                return evaluate(*args, **kwargs)
            except Exception as error:
                size = self.trainer.args.per_device_eval_batch_size
                # Ranks that did not run out of memory wait in a collective: only one process can try again.
                if not is_out_of_memory(error) or size == 1 or torch.distributed.is_initialized():
                    raise
            free_memory()
            self.trainer.args.per_device_eval_batch_size = size // 2
            print(
                f"evaluation ran out of memory: again with --per_device_eval_batch_size {size // 2}",
                flush=True,
            )

    def _save(self, save: Any, *args: Any, **kwargs: Any) -> None:
        """One checkpoint, sealed when all of it is on the disk; only then an older one goes."""
        trainer = self.trainer
        target = self._folder() / f"{checkpoints.PREFIX}{trainer.state.global_step}"
        if trainer.args.should_save:
            shutil.rmtree(target, ignore_errors=True)  # half of it, from before a kill
        trainer.accelerator.wait_for_everyone()
        try:
            save(*args, **kwargs)
            trainer.accelerator.wait_for_everyone()
            if trainer.args.should_save:
                checkpoints.seal(target)
                checkpoints.rotate(self._folder(), self.keep, trainer.state.best_model_checkpoint)
        except Exception as error:
            if not is_full_disk(error, self._folder()):
                raise
            shutil.rmtree(target, ignore_errors=True)
            whole = self._whole()
            free = shutil.disk_usage(self._folder()).free
            raise UserError(
                f"{target}: the disk is full ({free / 1e6:,.0f} MB free): not written; "
                f"{f'{whole[0].name} is whole' if whole else 'there is no earlier checkpoint'}. Make room (--save_total_limit keeps "
                "fewer), then run the same command again: it goes on"
            ) from None
        trainer.accelerator.wait_for_everyone()


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA's out of memory, the host's, or torch's own words for the host's."""
    text = str(error)
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(word in text for word in words)
    )


def free_memory() -> None:
    """Give back what an interrupted step had."""
    import gc

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_full_disk(error: BaseException, folder: Path) -> bool:
    """Whether a save failed for want of room: libraries in C++ and Rust do not always keep the error's number."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error)
    if "No space left" in text or "os error 28" in text:
        return True
    return isinstance(error, RuntimeError) and "write" in text and shutil.disk_usage(folder).free < 1 << 20


class Fault:
    """A fault asked for by STAGECRAFT_FAULT, so that tests can see what becomes of it: oom@K[:B], evaloom@B, nan@K,
    norm@K:B (for B steps), kill@K.
    """

    def __init__(self, kind: str = "", step: int = 0, batch: int = 2) -> None:
        self.kind, self.step, self.batch = kind, step, batch

    @classmethod
    def from_environment(cls) -> Fault:
        """The fault that the environment asks for; usually none."""
        kind, _, place = os.environ.get("STAGECRAFT_FAULT", "").partition("@")
        step, _, batch = place.partition(":")
        return cls(kind, int(step), int(batch or 2)) if kind else cls()

    def before(self, trainer: Trainer) -> None:
        """Called before a micro-batch."""
        size = trainer.args.per_device_train_batch_size
        if self.kind == "oom" and trainer.state.global_step + 1 == self.step and size >= self.batch:
            raise MemoryError(f"STAGECRAFT_FAULT: step {self.step}")

    def before_evaluation(self, trainer: Trainer) -> None:
        """Called before an evaluation; evaloom@B: while its batch is at least B."""
        if self.kind == "evaloom" and trainer.args.per_device_eval_batch_size >= self.step:
            raise MemoryError("STAGECRAFT_FAULT: evaluation")

    def changed(self, trainer: Trainer, loss: torch.Tensor) -> torch.Tensor:
        """The loss of a micro-batch as the fault has it."""
        if self.kind == "nan" and trainer.state.global_step + 1 == self.step:
            return loss * float("nan")
        return loss

    def norm(self, trainer: Trainer, norm: Any) -> Any:
        """The gradient norm of a step as the fault has it."""
        is_its_step = 0 <= trainer.state.global_step + 1 - self.step < self.batch
        return torch.tensor(float("inf")) if self.kind == "norm" and is_its_step else norm

    def after(self, step: int) -> None:
        """Called at the end of a step."""
        if self.kind == "kill" and step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)
