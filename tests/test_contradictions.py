"""Flags that exclude each other or would be ignored: each is told by its line, and its neighbours that work are not."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stagecraft import contradictions
from stagecraft.arguments import (
    LoraArguments,
    ModelArguments,
    PreferenceDataArguments,
    PretrainingDataArguments,
    ReferenceArguments,
    RunArguments,
    SFTDataArguments,
    parse,
)
from stagecraft.errors import UserError
from stagecraft.flags import trainer_flags

ROOT = Path(__file__).resolve().parents[1]
DATA = {
    "pt": PretrainingDataArguments,
    "sft": SFTDataArguments,
    "rm": PreferenceDataArguments,
    "dpo": PreferenceDataArguments,
}
TRAINERS = {"pt": "transformers", "sft": "transformers", "rm": "reward", "dpo": "dpo"}
NEEDED = ["--model_name_or_path", "M", "--train_file_dir", "T", "--output_dir", "O"]


def faults_of(stage: str, words: str) -> list[str]:
    """What a stage says to these flags; nothing where it takes them."""
    reference = [ReferenceArguments] if stage == "dpo" else []
    groups = (ModelArguments, LoraArguments, DATA[stage], *reference, RunArguments)
    try:
        parse("a stage", *groups, trainer=TRAINERS[stage], argv=[*NEEDED, *words.split()])
    except UserError as error:
        return str(error).splitlines()
    return []


NO_LORA = "does nothing with --use_peft false: leave it out, or --use_peft true"
ADAPTER = "does nothing with --peft_path: that adapter's own configuration counts; leave one of them out"
NO_EVAL = "does nothing without evaluation: leave it out, or set --eval_strategy steps (or epoch)"
NOT_ADAM = "does nothing with this --optim: leave it out, or --optim adamw_torch (others take --optim_args)"
NO_WARMUP = (
    "does nothing with this --lr_scheduler_type: leave it out, or for instance constant_with_warmup or cosine"
)
SMOOTHED = (
    "does nothing with this --loss_type: leave it out, or --loss_type aot, aot_unpaired, exo_pair, robust"
)
REFERENCE = "does nothing with --loss_type sft alone, which has no reference: leave it out, or add sigmoid"
SAMPLED = "does nothing with this --train_sampling_strategy: --seed counts; leave it out, or random"
WORKERS = "needs --dataloader_num_workers 1 or more"
PAIRS = (
    "--train_sampling_strategy needs rows of one text each, but here a row is a pair of answers: leave it out"
)

# (stage, flags that contradict, the line, the same flags so that they don't)
CASES = [
    (
        "sft",
        "--load_in_4bit --load_in_8bit",
        "--load_in_4bit and --load_in_8bit exclude each other",
        "--load_in_4bit",
    ),
    (
        "dpo",
        "--load_in_8bit --use_peft false",
        "--load_in_4bit/--load_in_8bit need LoRA: quantised weights can't be trained (--use_peft true)",
        "--load_in_8bit --use_peft true",
    ),
    ("rm", "--bf16 --fp16", "--bf16 and --fp16 exclude each other", "--bf16 false --fp16"),
    (
        "sft",
        "--flash_attn --torch_dtype float32",
        "--flash_attn has no float32: --torch_dtype bfloat16 (or float16), or leave it out",
        "--flash_attn --torch_dtype bfloat16",
    ),
    ("sft", "--peft_path a --use_peft false", "--peft_path goes with --use_peft true", "--peft_path a"),
    (
        "pt",
        "--use_peft false --torch_dtype float16",
        "--use_peft false trains every weight, which float16 weights do not survive: load them in another dtype "
        "(--torch_dtype float32 or bfloat16)",
        "--use_peft false --torch_dtype bfloat16",
    ),
    (
        "sft",
        "--modules_to_save lm_head --torch_dtype float16",
        "--modules_to_save trains whole weights, which float16 weights do not survive: load them in another dtype "
        "(--torch_dtype float32 or bfloat16)",
        "--torch_dtype float16",
    ),
    (
        "dpo",
        "--reference_free --precompute_ref_log_probs false",
        "--reference_free has nothing to ask a reference for in every step: leave out --precompute_ref_log_probs false",
        "--reference_free",
    ),
    (
        "dpo",
        "--reference_free --use_peft false --sync_ref_model",
        "--reference_free has no reference for --sync_ref_model: leave one out",
        "--use_peft false --sync_ref_model",
    ),
    ("sft", "--lora_rank 0", "--lora_rank must be at least 1, not 0", "--lora_rank 1"),
    *[
        (
            stage,
            f"--use_peft false --{flag} {value}",
            f"--{flag} {NO_LORA}",
            f"--use_peft true --{flag} {value}",
        )
        for stage in ("pt", "dpo")
        for flag, value in {
            "target_modules": "q_proj",
            "lora_rank": 16,
            "lora_alpha": 32,
            "lora_dropout": 0.05,
            "use_dora": "",
            "use_rslora": "true",
            "modules_to_save": "lm_head",
        }.items()
    ],
    *[
        ("sft", f"--peft_path a --{flag} {value}", f"--{flag} {ADAPTER}", f"--{flag} {value}")
        for flag, value in {
            "lora_rank": 8,
            "target_modules": "all",
            "use_dora": "true",
            "lora_alpha": 4,
        }.items()
    ],
    (
        "sft",
        "--target_modules q_proj embed_tokens --modules_to_save embed_tokens",
        "--target_modules and --modules_to_save both name embed_tokens: adapted or trained in full, not both",
        "--target_modules q_proj --modules_to_save embed_tokens",
    ),
    (
        "sft",
        "--validation_file_dir V --validation_split_percentage 5",
        "--validation_split_percentage does nothing with --validation_file_dir: leave one of them out",
        "--validation_file_dir T --validation_split_percentage 5",  # the training folder: it is split
    ),
    (
        "sft",
        "--logging_dir L --report_to none",
        "--logging_dir does nothing without --report_to tensorboard",
        "--logging_dir L --report_to wandb tensorboard",
    ),
    (
        "sft",
        "--max_steps 5 --num_train_epochs 2",
        "--num_train_epochs does nothing with --max_steps: leave one of them out (--max_steps -1 takes a recipe's back)",
        "--max_steps -1 --num_train_epochs 2",
    ),
    (
        "sft",
        "--eval_steps 5",
        "--eval_steps does nothing without --eval_strategy steps",
        "--eval_steps 5 --eval_strategy steps",
    ),
    (
        "sft",
        "--eval_steps 5 --eval_strategy epoch",
        "--eval_steps does nothing without --eval_strategy steps",
        "--eval_strategy epoch",
    ),
    *[
        (
            stage,
            f"--{flag}",
            f"--{flag.split()[0]} {NO_EVAL}",
            f"--{flag} --eval_strategy epoch --save_strategy epoch",
        )
        for stage, flag in [
            ("sft", "load_best_model_at_end"),
            ("dpo", "load_best_model_at_end"),
            ("sft", "eval_delay 3"),
            ("pt", "per_device_eval_batch_size 4"),
            ("rm", "metric_for_best_model loss"),
        ]
    ],
    (
        "sft",
        "--load_best_model_at_end --eval_strategy steps --save_strategy epoch",
        "--load_best_model_at_end needs a checkpoint of every evaluation: --save_strategy steps, not epoch",
        "--load_best_model_at_end --eval_strategy steps",
    ),
    (
        "sft",
        "--greater_is_better true --eval_strategy steps",
        "--greater_is_better does nothing without --metric_for_best_model",
        "--greater_is_better true --eval_strategy steps --load_best_model_at_end",
    ),
    (
        "sft",
        "--save_strategy best",
        "--save_strategy best goes by evaluations: set --eval_strategy steps (or epoch)",
        "--save_strategy best --eval_strategy steps",
    ),
    (
        "sft",
        "--lr_scheduler_type reduce_lr_on_plateau",
        "--lr_scheduler_type reduce_lr_on_plateau goes by evaluations: set --eval_strategy steps (or epoch)",
        "--lr_scheduler_type reduce_lr_on_plateau --eval_strategy steps",
    ),
    (
        "sft",
        "--eval_strategy steps --validation_split_percentage 0",
        "--eval_strategy needs validation rows: --validation_split_percentage is 0 and there is no --validation_file_dir",
        "--eval_strategy steps --validation_split_percentage 0 --validation_file_dir V",
    ),
    (
        "sft",
        "--eval_strategy steps --max_eval_samples 0",
        "--eval_strategy needs validation rows: --max_eval_samples is 0",
        "--eval_strategy steps --max_eval_samples 1",
    ),
    (
        "sft",
        "--save_strategy epoch --save_steps 5",
        "--save_steps does nothing without --save_strategy steps",
        "--save_strategy steps --save_steps 5",
    ),
    (
        "sft",
        "--logging_strategy epoch --logging_steps 5",
        "--logging_steps does nothing without --logging_strategy steps",
        "--logging_steps 5",
    ),
    (
        "sft",
        "--lr_scheduler_type constant --warmup_steps 9",
        f"--warmup_steps {NO_WARMUP}",
        "--warmup_steps 9",
    ),
    (
        "sft",
        "--lr_scheduler_type constant --warmup_ratio 0.1",  # by its older name
        f"--warmup_steps {NO_WARMUP}",
        "--lr_scheduler_type constant_with_warmup --warmup_ratio 0.1",
    ),
    (
        "sft",
        '--lr_scheduler_type constant --lr_scheduler_kwargs {"a":1}',
        "--lr_scheduler_kwargs does nothing with this --lr_scheduler_type, which has no settings",
        '--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs {"min_lr":1e-6}',
    ),
    *[
        ("sft", f"--optim {optim} --{flag} 0.5", f"--{flag} {NOT_ADAM}", f"--optim adamw_torch --{flag} 0.5")
        for optim, flag in [("sgd", "adam_beta1"), ("adafactor", "adam_beta2"), ("rmsprop", "adam_epsilon")]
    ],
    (
        "sft",
        "--optim lion_32bit --adam_epsilon 1e-6",
        "--adam_epsilon does nothing with this --optim, which divides by nothing: leave it out, or --optim adamw_torch",
        "--optim lion_32bit --adam_beta1 0.5",
    ),
    (
        "sft",
        "--optim_args momentum=0.9",
        "--optim_args does nothing with this --optim: --adam_beta1, --adam_beta2 and --adam_epsilon are its settings, if any",
        "--optim sgd --optim_args momentum=0.9",
    ),
    (
        "sft",
        "--optim_target_modules mlp",
        "--optim_target_modules does nothing with this --optim: it is for galore_* and apollo_*",
        "--optim galore_adamw --optim_target_modules mlp",
    ),
    ("sft", "--group_by_length --data_seed 3", f"--data_seed {SAMPLED}", "--data_seed 3"),
    ("dpo", "--train_sampling_strategy sequential --data_seed 3", f"--data_seed {SAMPLED}", "--data_seed 3"),
    (
        "pt",
        "--group_by_length",
        "--train_sampling_strategy groups rows by length, but blocks of text have one length (--block_size): leave it out",
        "--group_by_length false",
    ),
    ("rm", "--group_by_length", PAIRS, "--train_sampling_strategy sequential"),
    ("dpo", "--train_sampling_strategy batch_rebalance", PAIRS, "--train_sampling_strategy random"),
    (
        "sft",
        '--gradient_checkpointing_kwargs {"use_reentrant":false}',
        "--gradient_checkpointing_kwargs does nothing without --gradient_checkpointing true",
        '--gradient_checkpointing --gradient_checkpointing_kwargs {"use_reentrant":false}',
    ),
    (
        "dpo",
        '--gradient_checkpointing false --gradient_checkpointing_kwargs {"use_reentrant":false}',
        "--gradient_checkpointing_kwargs does nothing without --gradient_checkpointing true",
        '--gradient_checkpointing_kwargs {"use_reentrant":false}',  # on is the default there
    ),
    *[
        ("sft", f"--{flag}", f"--{flag.split()[0]} {WORKERS}", f"--{flag} --dataloader_num_workers 2")
        for flag in (
            "dataloader_prefetch_factor 2",
            "dataloader_persistent_workers",
            "dataloader_multiprocessing_context spawn",
        )
    ],
    (
        "sft",
        '--liger_kernel_config {"rope":true}',
        "--liger_kernel_config does nothing without --use_liger_kernel",
        '--use_liger_kernel --liger_kernel_config {"rope":true}',
    ),
    (
        "sft",
        '--fsdp_config {"min_num_params":1}',
        "--fsdp_config does nothing without --fsdp",
        '--fsdp full_shard --fsdp_config {"min_num_params":1}',
    ),
    (
        "sft",
        "--hub_model_id a/b",
        "--hub_model_id does nothing without --push_to_hub",
        "--push_to_hub --hub_model_id a/b",
    ),
    (
        "rm",
        "--label_smoothing_factor 0.1",
        "--label_smoothing_factor does nothing here: the loss of a reward model has no labels to smooth; leave it out",
        "--label_smoothing_factor 0",
    ),
    (
        "dpo",
        "--label_smoothing_factor 0.1",
        "--label_smoothing_factor does nothing here: leave it out, or use --label_smoothing with --loss_type robust or "
        "exo_pair",
        "--label_smoothing 0.1 --loss_type robust",
    ),
    (
        "dpo",
        "--label_smoothing 0.1",
        f"--label_smoothing {SMOOTHED}",
        "--label_smoothing 0.1 --loss_type aot",
    ),
    ("dpo", "--label_smoothing 0.1 --loss_type ipo", f"--label_smoothing {SMOOTHED}", "--loss_type ipo"),
    ("dpo", "--beta 0.3 --loss_type sft", f"--beta {REFERENCE}", "--beta 0.3 --loss_type sigmoid sft"),
    (
        "dpo",
        "--f_divergence_type forward_kl --loss_type sft",
        f"--f_divergence_type {REFERENCE}",
        "--f_divergence_type forward_kl --loss_type sigmoid sft",
    ),
    (
        "dpo",
        "--f_divergence_type forward_kl --loss_type aot sigmoid",
        "--f_divergence_type forward_kl is not for --loss_type aot: leave it out",
        "--f_divergence_type forward_kl --loss_type hinge sigmoid",
    ),
    (
        "dpo",
        "--f_alpha_divergence_coef 0.3",
        "--f_alpha_divergence_coef does nothing without --f_divergence_type alpha_divergence",
        "--f_alpha_divergence_coef 0.3 --f_divergence_type alpha_divergence",
    ),
    (
        "dpo",
        "--discopop_tau 0.1",
        "--discopop_tau does nothing without --loss_type discopop",
        "--discopop_tau 0.1 --loss_type discopop",
    ),
    (
        "dpo",
        "--loss_type sigmoid sft --loss_weights 1",
        "--loss_weights has 1 and --loss_type 2: one weight for each loss",
        "--loss_type sigmoid sft --loss_weights 1 0.5",
    ),
    (
        "dpo",
        "--loss_weights 1 0.5",
        "--loss_weights has 2 and --loss_type 1: one weight for each loss",
        "--loss_weights 0.5",
    ),
    (
        "dpo",
        "--loss_type sigmod",
        f'--loss_type: unknown loss "sigmod"; known: {", ".join(sorted(contradictions.LOSSES))}',
        "--loss_type sigmoid",
    ),
    (
        "dpo",
        "--loss_type exo_pair",
        "--loss_type exo_pair takes the logarithm of --label_smoothing: set it, for instance to 1e-3",
        "--loss_type exo_pair --label_smoothing 1e-3",
    ),
    (
        "dpo",
        "--loss_type robust --label_smoothing 0.5",
        "--label_smoothing must be at least 0 and below 0.5 with --loss_type robust, not 0.5",
        "--loss_type robust --label_smoothing 0.4",
    ),
    (
        "dpo",
        "--loss_type aot --use_weighting",
        "--use_weighting weighs pairs, which --loss_type aot and aot_unpaired take apart: leave it out",
        "--loss_type ipo --use_weighting",
    ),
    ("dpo", "--ld_alpha 2", "--ld_alpha must be between 0 and 1, not 2", "--ld_alpha 1"),
    (
        "dpo",
        "--sync_ref_model",
        "--sync_ref_model needs a reference of its own, and with LoRA it is the model without its adapter: --use_peft false",
        "--sync_ref_model --use_peft false",
    ),
    (
        "dpo",
        "--sync_ref_model --use_peft false --precompute_ref_log_probs true",
        "--sync_ref_model changes the reference, --precompute_ref_log_probs asks it once: leave one out",
        "--precompute_ref_log_probs true",
    ),
    (
        "dpo",
        "--ref_model_sync_steps 5",
        "--ref_model_sync_steps does nothing without --sync_ref_model true",
        "--ref_model_sync_steps 5 --sync_ref_model --use_peft false",
    ),
]


@pytest.mark.parametrize(("stage", "words", "line", "works"), CASES, ids=[f"{c[0]} {c[1]}" for c in CASES])
def test_a_contradiction_is_told_by_its_line(stage: str, words: str, line: str, works: str) -> None:
    assert faults_of(stage, words) == [line]
    assert faults_of(stage, works) == []  # control


def test_all_are_told_at_once_with_everything_else() -> None:
    words = "--use_peft false --lora_rank 8 --lora_alpha 8 --loss_weights 1 2 --label_smoothing 0.1 --eval_steps 5"
    assert faults_of("dpo", words) == [
        "--loss_weights has 2 and --loss_type 1: one weight for each loss",
        f"--lora_rank {NO_LORA}",
        f"--lora_alpha {NO_LORA}",
        "--eval_steps does nothing without --eval_strategy steps",
        f"--label_smoothing {SMOOTHED}",
    ]
    # A mistyped flag may be what a flag is missing, but it is no excuse for two that exclude each other.
    assert faults_of("sft", "--eval_stratgey steps --eval_steps 5 --bf16 --fp16") == [
        'unknown flag "--eval_stratgey"; did you mean "--eval_strategy"?',
        "--bf16 and --fp16 exclude each other",
    ]


def test_a_default_contradicts_nothing_and_neither_does_what_asks_for_nothing() -> None:
    assert faults_of("sft", "--use_peft false") == []
    assert faults_of("sft", "--peft_path a") == []
    assert faults_of("sft", "--max_steps 5") == []
    assert faults_of("sft", "--use_peft false --lora_dropout 0 --use_dora false --modules_to_save None") == []
    assert faults_of("dpo", "--label_smoothing 0.0 --sync_ref_model false") == []


def test_what_is_set_later_takes_back_what_an_earlier_file_said(tmp_path: Path) -> None:
    recipe, change, both = (tmp_path / name for name in ("recipe.yaml", "change.yaml", "both.yaml"))
    recipe.write_text("lora_rank: 8\nnum_train_epochs: 3\neval_strategy: steps\neval_steps: 5\n")
    change.write_text("use_peft: false\n")
    both.write_text("lora_rank: 8\nuse_peft: false\n")
    for words in (
        "--use_peft false",
        f"--config {change}",
        "--max_steps 4",
        "--eval_strategy no",
        "--peft_path a",
    ):
        assert faults_of("sft", f"--config {recipe} {words}") == [], words
    # Control: the other way round the later flag is the one that does nothing, and in one file it is a slip.
    assert faults_of("sft", f"--config {change} {recipe}") == [f"{recipe}:1: lora_rank {NO_LORA}"]
    assert faults_of("sft", f"--config {change} --lora_rank 8") == [f"--lora_rank {NO_LORA}"]
    assert faults_of("sft", f"--config {both}") == [f"{both}:1: lora_rank {NO_LORA}"]
    assert faults_of("sft", f"--config {recipe} --use_peft false --lora_rank 4") == [f"--lora_rank {NO_LORA}"]


def test_one_copy_over_several_gpus_is_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert faults_of("sft", "--device_map auto") == []
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert faults_of("sft", "--device_map auto") == [
        "--device_map spreads one copy over the GPUs; with several processes each has its own (NPROC=1)"
    ]


@pytest.mark.parametrize("stage", ["rm", "dpo"])
def test_a_dropout_that_the_trainer_switches_off_is_said(
    stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "--lora_dropout does nothing here: this trainer switches dropout off (--disable_dropout false keeps it)\n"
    for words, expected in {
        "--lora_dropout 0.1": said,
        "--lora_dropout 0.1 --disable_dropout true": said,
        "--lora_dropout 0.1 --disable_dropout false": "",
        "--lora_dropout 0": "",
        "": "",
    }.items():
        assert faults_of(stage, words) == []
        assert capsys.readouterr().err == expected, words
    assert faults_of("sft", "--lora_dropout 0.1") == [] and capsys.readouterr().err == ""


RECIPES = sorted(path for stage in DATA for path in (ROOT / "recipes").glob(f"*/{stage}*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_recipes_contradict_nothing(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = recipe.stem.split("-")[0]
    first = f"{recipe.parent}/{stage}.yaml" if recipe.stem != stage else ""
    with pytest.raises(SystemExit) as ended:
        faults = faults_of(stage, f"--config {first} {recipe} --check_flags")
        raise AssertionError(faults)
    assert (ended.value.code, *capsys.readouterr()) == (0, "", "")


def test_a_contradiction_is_told_before_any_library_is_imported(tmp_path: Path) -> None:
    script = "import sys; sys.path.insert(0, sys.argv.pop(1)); import supervised_finetuning as s, stagecraft.errors as e\n"
    script += "try: e.run_main(s.main)\n"
    script += (
        "finally: print(sorted({'torch', 'transformers', 'trl', 'peft', 'datasets'} & sys.modules.keys()))\n"
    )
    command = [
        sys.executable,
        "-c",
        script,
        str(ROOT / "python"),
        *NEEDED,
        "--use_peft",
        "false",
        "--lora_rank",
        "8",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (2, "[]\n", f"--lora_rank {NO_LORA}\n")


def test_every_flag_that_the_rules_name_is_one() -> None:
    known = {name for trainer in TRAINERS.values() for name in trainer_flags(trainer)}
    groups = (ModelArguments, LoraArguments, RunArguments, *DATA.values())
    known |= {name for group in groups for name in group.__dataclass_fields__}
    named = {name for rule in contradictions.IDLE for name in (*rule.flags, *rule.by)}
    named |= {name for rule in contradictions.IDLE for name in re.findall(r"--(\w+)", rule.hint)}
    assert named and named <= known


def test_the_losses_are_those_of_the_trainer() -> None:
    """And what each makes of label smoothing and divergences is what its source says."""
    source = Path(importlib.util.find_spec("trl").origin).parent
    text = (source / "trainer" / "dpo_trainer.py").read_text(encoding="utf-8")
    branches = re.split(r'\n            (?:el)?if loss_type == "(\w+)":', text)[1:]
    losses = dict(zip(branches[::2], branches[1::2], strict=True))
    last = next(name for name in reversed(losses))
    losses[last] = losses[last].split("\n            else:")[0]
    assert set(losses) == contradictions.LOSSES
    assert {
        name for name, code in losses.items() if "self.label_smoothing" in code
    } == contradictions.SMOOTHED
    scored = {name for name, code in losses.items() if re.search(r"delta_score|chosen_scores", code)}
    assert scored == contradictions.DIVERGING


# What can only be known with the libraries or the model at hand


@pytest.mark.parametrize(
    ("task", "lora", "line"),
    [
        (
            "causal",
            {"target_modules": ["q_proj", "q_norm"]},
            "--target_modules: q_norm can't be adapted, only trained in full (--modules_to_save)",
        ),
        (
            "reward",
            {"target_modules": ["q_proj", "score"]},
            "--target_modules: score is trained in full in this stage; leave it out",
        ),
        ("causal", {"target_modules": ["q_proj"], "modules_to_save": ["q_norm"]}, None),
        ("causal", {"target_modules": ["embed_tokens"], "use_dora": True}, None),
        ("reward", {"target_modules": ["q_proj"], "use_dora": True}, None),
    ],
)
def test_modules_that_no_adapter_fits_are_told(
    tiny_base: Path, task: str, lora: dict, line: str | None
) -> None:
    from peft import get_peft_model

    from stagecraft import models

    arguments = ModelArguments(str(tiny_base)), LoraArguments(**lora)
    if line is None:  # controls: PEFT takes these
        model, adapter = models.load_for_training(*arguments, task=task)
        get_peft_model(model, adapter)
        return
    with pytest.raises(UserError) as caught:
        models.load_for_training(*arguments, task=task)
    assert str(caught.value) == line


def test_dora_on_8_bits_is_refused_on_a_cpu(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from stagecraft import models

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError) as caught:
        models.load_for_training(
            ModelArguments(str(tiny_base), load_in_8bit=True), LoraArguments(use_dora=True)
        )
    assert str(caught.value) == (
        "--use_dora with --load_in_8bit needs CUDA; leave one out, or use --load_in_4bit"
    )


def test_fp16_is_refused_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer would take it, and train in fp32 all the same."""
    import torch

    from stagecraft import models

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError) as caught:
        models.resolve_precision({"fp16": True})
    assert str(caught.value) == "--fp16 needs CUDA; here use --bf16 true, or neither"
    assert models.resolve_precision({"fp16": False, "bf16": True}) == "precision: bf16 autocast (asked for)"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert models.resolve_precision({"fp16": True}) == "precision: fp16 autocast (asked for)"  # control
