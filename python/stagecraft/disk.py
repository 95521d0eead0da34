"""Bytes that a stage will write, and whether they fit."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagecraft.errors import UserError

if TYPE_CHECKING:
    from transformers import Trainer

SLACK = 50_000_000  # logs, tokenizer, file system


def base_bytes(arguments: dict[str, Any]) -> int:
    """Size of the weights that a stage starts from; 0 where they are not in a local folder."""
    base = Path(str(arguments.get("model_name_or_path")))
    return sum(file.stat().st_size for file in base.glob("*.safetensors")) if base.is_dir() else 0


def final_bytes(arguments: dict[str, Any]) -> int:
    """The complete model at the end: what must fit at least. Needs no model in memory."""
    return base_bytes(arguments) + SLACK


def require_room(trainer: Trainer, folder: Path, arguments: dict[str, Any]) -> None:
    """Raise UserError unless checkpoints, adapter and merged model fit, with the numbers."""
    from peft import PeftModel

    args = trainer.args
    parameters = [
        (getattr(p, "ds_numel", p.numel()), p.element_size(), p.requires_grad)
        for p in trainer.model.parameters()
    ]
    trained = sum(count for count, _, trains in parameters if trains)
    whole = sum(count * size for count, size, _ in parameters)
    lora = isinstance(trainer.model, PeftModel)
    weights = sum(count * size for count, size, trains in parameters if trains) if lora else whole
    # Two moments a trained number, in fp32 (in 8 bits it is less, with ZeRO's fp32 copy of bf16 weights more).
    checkpoint = 0 if arguments.get("save_only_model") else 8 * trained
    checkpoint += weights
    kept = _kept(trainer)
    final = weights + (base_bytes(arguments) if lora else 0)
    needed = kept * checkpoint + final + SLACK
    there = sum(file.stat().st_size for file in (folder / "checkpoints").rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free + there  # those there count among those kept
    if free < needed:
        least = 2 * checkpoint + final + SLACK
        raise UserError(
            f"--output_dir {folder}: {free / 1e6:,.0f} MB are free, {needed / 1e6:,.0f} MB will be written "
            f"({kept} checkpoints of {checkpoint / 1e6:,.0f} MB, {final / 1e6:,.0f} MB for the result); "
            f"with --save_total_limit 1 it is {least / 1e6:,.0f} MB{'' if args.save_total_limit != 1 else ' (set already)'}; or "
            "free some space, or choose another disk"
        )


def _kept(trainer: Trainer) -> int:
    """Checkpoints on the disk at the same time: a new one is written before an old one goes."""
    args = trainer.args
    if args.save_strategy == "no":
        return 1  # an interrupted run keeps one
    batches = math.ceil(len(trainer.train_dataset) / (args.per_device_train_batch_size * args.world_size))
    steps = math.ceil(batches / args.gradient_accumulation_steps)
    total = args.max_steps if args.max_steps > 0 else math.ceil(steps * args.num_train_epochs)
    every = steps if args.save_strategy == "epoch" else args.save_steps
    every = total * every if isinstance(every, float) and every < 1 else every
    written = max(1, int(total // max(1, every)))
    return written if args.save_total_limit is None else min(written, args.save_total_limit + 1)
