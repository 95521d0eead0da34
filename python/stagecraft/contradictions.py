"""Flags that exclude each other, and flags that would be read and then ignored: told before anything is imported.

A flag counts where YAML or the command line sets it to something; false, 0 and none ask for nothing. What is set later
may switch off what an earlier YAML file said: `--use_peft false` after a recipe with a lora_rank is no mistake, in one
file it is one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LORA = (
    "target_modules",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "use_dora",
    "use_rslora",
    "modules_to_save",
)
# What the losses of TRL's DPO make of some flags (dpo_trainer.py, _compute_loss and __init__).
LOSSES = {
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
}  # fmt: skip
SMOOTHED = {"exo_pair", "robust", "aot", "aot_unpaired"}
DIVERGING = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"}
# Beginnings of the names of optimizers that take none of Adam's numbers.
NOT_ADAM = ("sgd", "adagrad", "rmsprop", "adafactor", "galore")
WITHOUT_ARGS = ("adamw_torch", "adamw_torch_fused", "adafactor")


@dataclass(frozen=True)
class Given:
    """The flags of a stage that were set: values, and which file (0, 1, ...; the command line last) set each."""

    stage: str  # pt, sft, rm or dpo
    values: dict[str, Any]
    layers: dict[str, int]
    wheres: dict[str, str]  # file:line; empty on the command line

    def get(self, name: str, default: Any = None) -> Any:
        return self.values.get(name, default)

    def asks(self, name: str) -> bool:
        """Whether the flag was set to something that does more than nothing."""
        return bool(self.values.get(name)) and self.values[name] != "no"

    def overruled(self, name: str, by: tuple[str, ...]) -> bool:
        """Whether a later file or the command line set one of the flags that switch it off."""
        return any(self.layers.get(other, -1) > self.layers[name] for other in by)

    def spelled(self, name: str) -> str:
        where = self.wheres.get(name)
        return f"{where}: {name}" if where else f"--{name}"

    @property
    def lora(self) -> bool:
        return bool(self.get("use_peft", True))

    @property
    def evaluates(self) -> bool:
        return self.asks("eval_strategy") or self.asks("eval_on_start")

    @property
    def losses(self) -> list[str]:
        return self.get("loss_type") or ["sigmoid"]

    @property
    def optimizer(self) -> str:
        return self.get("optim", "adamw_torch_fused")

    @property
    def scheduler(self) -> str:
        return self.get("lr_scheduler_type", "linear")

    @property
    def order(self) -> str:
        return self.get("train_sampling_strategy", "random")


def given(stage: str, settings: dict[str, tuple[str, Any]], paths: list[str]) -> Given:
    """What was set (name -> (file:line or nothing, value)) by the YAML files `paths`, then the command line."""
    order = {path: layer for layer, path in enumerate(paths)}
    wheres = {name: where for name, (where, _) in settings.items()}
    return Given(
        stage,
        {name: value for name, (_, value) in settings.items()},
        {name: order.get(where.rpartition(":")[0], len(paths)) for name, where in wheres.items()},
        wheres,
    )


@dataclass(frozen=True)
class Idle:
    """Flags that do nothing in some runs: which, when, what to say, and the flags whose values decide that."""

    flags: tuple[str, ...]
    when: Callable[[Given], bool]
    hint: str
    by: tuple[str, ...] = ()


def _no(*names: str) -> Callable[[Given], bool]:
    """A condition: none of these flags asks for anything."""
    return lambda given: not any(given.asks(name) for name in names)


def _has_validation_folder(given: Given) -> bool:
    folder, train = given.get("validation_file_dir"), given.get("train_file_dir", "")
    return bool(folder) and Path(folder).resolve() != Path(train).resolve()


def _checkpointing(given: Given) -> bool:
    return bool(given.get("gradient_checkpointing", given.stage in ("rm", "dpo")))  # TRL's default is true


_EVALUATE = "does nothing without evaluation: leave it out, or set --eval_strategy steps (or epoch)"
IDLE = [
    Idle(
        LORA,
        lambda g: not g.lora,
        "does nothing with --use_peft false: leave it out, or --use_peft true",
        ("use_peft",),
    ),
    Idle(
        LORA,
        lambda g: g.lora and g.asks("peft_path"),
        "does nothing with --peft_path: that adapter's own configuration counts; leave one of them out",
        ("peft_path",),
    ),
    Idle(
        ("validation_split_percentage",),
        _has_validation_folder,
        "does nothing with --validation_file_dir: leave one of them out",
        ("validation_file_dir",),
    ),
    Idle(
        ("logging_dir",),
        lambda g: "report_to" in g.values and not {"tensorboard", "all"} & _set_of(g.get("report_to")),
        "does nothing without --report_to tensorboard",
        ("report_to",),
    ),
    Idle(
        ("num_train_epochs",),
        lambda g: (g.get("max_steps") or -1) > 0,
        "does nothing with --max_steps: leave one of them out (--max_steps -1 takes a recipe's back)",
        ("max_steps",),
    ),
    Idle(
        ("eval_steps",),
        lambda g: g.get("eval_strategy", "no") != "steps",
        "does nothing without --eval_strategy steps",
        ("eval_strategy",),
    ),
    Idle(
        ("eval_delay", "load_best_model_at_end", "metric_for_best_model"),
        lambda g: not g.evaluates,
        _EVALUATE,
        ("eval_strategy",),
    ),
    Idle(
        ("per_device_eval_batch_size",),
        # DPO may ask its reference about the validation rows, whether it evaluates or not.
        lambda g: not g.evaluates and g.stage != "dpo",
        _EVALUATE,
        ("eval_strategy",),
    ),
    Idle(
        ("greater_is_better",),
        _no("metric_for_best_model", "load_best_model_at_end"),
        "does nothing without --metric_for_best_model",
        ("metric_for_best_model", "load_best_model_at_end"),
    ),
    Idle(
        ("save_steps",),
        lambda g: g.get("save_strategy", "steps") in ("epoch", "best"),
        "does nothing without --save_strategy steps",
        ("save_strategy",),
    ),
    Idle(
        ("logging_steps",),
        lambda g: g.get("logging_strategy", "steps") != "steps",
        "does nothing without --logging_strategy steps",
        ("logging_strategy",),
    ),
    Idle(
        ("warmup_steps",),
        lambda g: g.scheduler in ("constant", "reduce_lr_on_plateau", "greedy"),
        "does nothing with this --lr_scheduler_type: leave it out, or for instance constant_with_warmup or cosine",
        ("lr_scheduler_type",),
    ),
    Idle(
        ("lr_scheduler_kwargs",),
        lambda g: g.scheduler in ("constant", "constant_with_warmup"),
        "does nothing with this --lr_scheduler_type, which has no settings",
        ("lr_scheduler_type",),
    ),
    Idle(
        ("adam_beta1", "adam_beta2", "adam_epsilon"),
        lambda g: g.optimizer.startswith(NOT_ADAM),
        "does nothing with this --optim: leave it out, or --optim adamw_torch (others take --optim_args)",
        ("optim",),
    ),
    Idle(
        ("adam_epsilon",),
        lambda g: "lion" in g.optimizer,
        "does nothing with this --optim, which divides by nothing: leave it out, or --optim adamw_torch",
        ("optim",),
    ),
    Idle(
        ("optim_args",),
        lambda g: g.optimizer in WITHOUT_ARGS,
        "does nothing with this --optim: --adam_beta1, --adam_beta2 and --adam_epsilon are its settings, if any",
        ("optim",),
    ),
    Idle(
        ("optim_target_modules",),
        lambda g: not g.optimizer.startswith(("galore", "apollo")),
        "does nothing with this --optim: it is for galore_* and apollo_*",
        ("optim",),
    ),
    Idle(
        ("data_seed",),
        lambda g: g.order != "random",
        "does nothing with this --train_sampling_strategy: --seed counts; leave it out, or random",
        ("train_sampling_strategy",),
    ),
    Idle(
        ("gradient_checkpointing_kwargs",),
        lambda g: not _checkpointing(g),
        "does nothing without --gradient_checkpointing true",
        ("gradient_checkpointing",),
    ),
    Idle(
        ("dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_multiprocessing_context"),
        _no("dataloader_num_workers"),
        "needs --dataloader_num_workers 1 or more",
        ("dataloader_num_workers",),
    ),
    Idle(("liger_kernel_config",), _no("use_liger_kernel"), "does nothing without --use_liger_kernel"),
    Idle(("fsdp_config",), _no("fsdp"), "does nothing without --fsdp"),
    Idle(
        ("hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"),
        _no("push_to_hub"),
        "does nothing without --push_to_hub",
        ("push_to_hub",),
    ),
    Idle(
        ("label_smoothing_factor",),
        lambda g: g.stage == "rm",
        "does nothing here: the loss of a reward model has no labels to smooth; leave it out",
    ),
    Idle(
        ("label_smoothing_factor",),
        lambda g: g.stage == "dpo",
        "does nothing here: leave it out, or use --label_smoothing with --loss_type robust or exo_pair",
    ),
    Idle(
        ("train_sampling_strategy",),
        lambda g: g.stage == "pt" and g.order in ("group_by_length", "batch_rebalance"),
        "groups rows by length, but blocks of text have one length (--block_size): leave it out",
    ),
    Idle(
        ("train_sampling_strategy",),
        lambda g: g.stage in ("rm", "dpo") and g.order in ("group_by_length", "batch_rebalance"),
        "needs rows of one text each, but here a row is a pair of answers: leave it out",
    ),
    Idle(
        ("label_smoothing",),
        lambda g: not SMOOTHED & set(g.losses),
        f"does nothing with this --loss_type: leave it out, or --loss_type {', '.join(sorted(SMOOTHED))}",
        ("loss_type",),
    ),
    Idle(
        ("beta", "f_divergence_type"),
        lambda g: set(g.losses) == {"sft"},
        "does nothing with --loss_type sft alone, which has no reference: leave it out, or add sigmoid",
        ("loss_type",),
    ),
    Idle(
        ("discopop_tau",),
        lambda g: "discopop" not in g.losses,
        "does nothing without --loss_type discopop",
        ("loss_type",),
    ),
    Idle(
        ("f_alpha_divergence_coef",),
        lambda g: g.get("f_divergence_type") != "alpha_divergence",
        "does nothing without --f_divergence_type alpha_divergence",
        ("f_divergence_type",),
    ),
    Idle(
        ("ref_model_mixup_alpha", "ref_model_sync_steps"),
        _no("sync_ref_model"),
        "does nothing without --sync_ref_model true",
        ("sync_ref_model",),
    ),
]


def _set_of(value: Any) -> set[str]:
    return set(value if isinstance(value, list) else [value])


def idle(given: Given) -> list[str]:
    """A line for each flag that would be read and ignored."""
    found = {}
    for rule in IDLE:
        for name in rule.flags:
            if given.asks(name) and not given.overruled(name, rule.by) and rule.when(given):
                found.setdefault(name, f"{given.spelled(name)} {rule.hint}")
    return list(found.values())


def excluded(given: Given) -> list[str]:
    """A line for each pair of flags that can't both be followed."""
    return [*_excluded_in_models(given), *_excluded_in_training(given), *_excluded_in_dpo(given)]


def _excluded_in_models(given: Given) -> Iterator[str]:
    quantised = given.asks("load_in_4bit") or given.asks("load_in_8bit")
    if given.asks("load_in_4bit") and given.asks("load_in_8bit"):
        yield "--load_in_4bit and --load_in_8bit exclude each other"
    if quantised and not given.lora:
        yield "--load_in_4bit/--load_in_8bit need LoRA: quantised weights can't be trained (--use_peft true)"
    if given.asks("bf16") and given.asks("fp16"):
        yield "--bf16 and --fp16 exclude each other"
    if given.asks("device_map") and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        yield "--device_map spreads one copy over the GPUs; with several processes each has its own (NPROC=1)"
    if given.asks("peft_path") and not given.lora:
        yield "--peft_path goes with --use_peft true"
    if given.get("lora_rank", 1) < 1:
        yield f"--lora_rank must be at least 1, not {given.get('lora_rank')}"
    if given.asks("flash_attn") and given.get("torch_dtype") == "float32":
        yield "--flash_attn has no float32: --torch_dtype bfloat16 (or float16), or leave it out"
    if given.get("torch_dtype") == "float16" and not given.asks("deepspeed"):
        yield from untrainable(given.lora, given.get("modules_to_save"))
    both = set(given.get("target_modules", [])) & set(given.get("modules_to_save") or [])
    for name in sorted(both) if given.lora else ():
        yield f"--target_modules and --modules_to_save both name {name}: adapted or trained in full, not both"


def untrainable(use_peft: bool, modules_to_save: list[str] | None) -> list[str]:
    """What can't be trained in float16. (DeepSpeed keeps weights of its own in fp32, so all can be there.)

    In float16 AdamW's mean of squared gradients starts as zero for gradients under 5e-3, and it divides by its root:
    weights jump by up to lr * 1e8 of a gradient (two layers of width 32: loss 5.7 -> 20 in a step). On a GPU the
    gradient scaler of --fp16 refuses such weights.
    """
    mend = "load them in another dtype (--torch_dtype float32 or bfloat16)"
    if not use_peft:
        return [f"--use_peft false trains every weight, which float16 weights do not survive: {mend}"]
    if modules_to_save:
        return [f"--modules_to_save trains whole weights, which float16 weights do not survive: {mend}"]
    return []


def _excluded_in_training(given: Given) -> Iterator[str]:
    evaluation, saving = given.get("eval_strategy", "no"), given.get("save_strategy", "steps")
    if (
        evaluation != "no"
        and given.get("validation_split_percentage") == 0
        and not _has_validation_folder(given)
    ):
        yield (
            "--eval_strategy needs validation rows: --validation_split_percentage is 0 and there is no "
            "--validation_file_dir"
        )
    if evaluation != "no" and given.get("max_eval_samples") == 0:
        yield "--eval_strategy needs validation rows: --max_eval_samples is 0"
    if given.asks("load_best_model_at_end") and evaluation != "no" and saving not in (evaluation, "best"):
        yield (
            f"--load_best_model_at_end needs a checkpoint of every evaluation: --save_strategy {evaluation}, "
            f"not {saving}"
        )
    for name, value in {"save_strategy": saving, "lr_scheduler_type": given.scheduler}.items():
        if value in ("best", "reduce_lr_on_plateau", "greedy") and evaluation == "no":
            yield f"--{name} {value} goes by evaluations: set --eval_strategy steps (or epoch)"


def _excluded_in_dpo(given: Given) -> Iterator[str]:
    if given.stage != "dpo":
        return
    losses, weights = given.losses, given.get("loss_weights")
    smoothing, divergence = given.get("label_smoothing") or 0.0, given.get("f_divergence_type", "reverse_kl")
    for unknown in [name for name in losses if name not in LOSSES]:
        yield f'--loss_type: unknown loss "{unknown}"; known: {", ".join(sorted(LOSSES))}'
    if weights and len(weights) != len(losses):
        yield f"--loss_weights has {len(weights)} and --loss_type {len(losses)}: one weight for each loss"
    if "exo_pair" in losses and not smoothing:
        yield "--loss_type exo_pair takes the logarithm of --label_smoothing: set it, for instance to 1e-3"
    if "robust" in losses and not 0 <= smoothing < 0.5:
        yield f"--label_smoothing must be at least 0 and below 0.5 with --loss_type robust, not {smoothing:g}"
    undivided = sorted(set(losses) & (LOSSES - DIVERGING - {"sft"}))
    if divergence != "reverse_kl" and undivided:
        yield f"--f_divergence_type {divergence} is not for --loss_type {', '.join(undivided)}: leave it out"
    if given.asks("use_weighting") and {"aot", "aot_unpaired"} & set(losses):
        yield "--use_weighting weighs pairs, which --loss_type aot and aot_unpaired take apart: leave it out"
    if given.asks("sync_ref_model") and given.lora:
        yield (
            "--sync_ref_model needs a reference of its own, and with LoRA it is the model without its adapter: "
            "--use_peft false"
        )
    if given.asks("sync_ref_model") and given.asks("precompute_ref_log_probs"):
        yield "--sync_ref_model changes the reference, --precompute_ref_log_probs asks it once: leave one out"
    if given.asks("reference_free") and given.asks("sync_ref_model"):
        yield "--reference_free has no reference for --sync_ref_model: leave one out"
    if given.asks("reference_free") and given.get("precompute_ref_log_probs") is False:
        yield (
            "--reference_free has nothing to ask a reference for in every step: leave out "
            "--precompute_ref_log_probs false"
        )
    if not 0 <= (given.get("ld_alpha") or 0.0) <= 1:
        yield f"--ld_alpha must be between 0 and 1, not {given.get('ld_alpha'):g}"


def notes(given: Given) -> list[str]:
    """What a default makes of a flag, where that is worth a line but no error."""
    if given.stage in ("rm", "dpo") and given.asks("lora_dropout") and given.get("disable_dropout", True):
        return [
            f"{given.spelled('lora_dropout')} does nothing here: this trainer switches dropout off "
            "(--disable_dropout false keeps it)"
        ]
    return []
