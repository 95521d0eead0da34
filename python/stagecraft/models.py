"""Tokenizers, models, quantised bases and adapters: loading them, for training and for use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagecraft.arguments import LoraArguments, ModelArguments
from stagecraft.contradictions import untrainable
from stagecraft.errors import UserError

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

# A classification head (score) is trained and saved in full beside the adapter of a reward model.
REWARD_HEAD = "score"


def require_model_folder(path: str, flag: str = "--model_name_or_path") -> None:
    """Check cheaply, before torch is imported, that a local path is a complete model. Raises UserError.

    A name that is no path (like Qwen/Qwen2.5-3B) is left to the hub.
    """
    folder = Path(path)
    if not folder.exists():
        if path.startswith((".", "/", "~", "outputs-")) or path.count("/") > 1:
            raise UserError(
                f"{flag} {path}: no such folder; the stage before it has not been run (`make status`)"
            )
        return
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{flag} {path}: this is an adapter; merge it first: python python/merge_lora.py {path} ..."
        )
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).exists()]
    if not any(folder.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        raise UserError(f"{flag} {path}: not a complete model folder: {', '.join(missing)} missing")


def load_tokenizer(path: str, trust_remote_code: bool = False, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder. Raises UserError where padding could not be told from the end of a text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, **kwargs)
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        spare = next(
            (t for t in ("<|pad|>", "<pad>", "<|finetune_right_pad_id|>") if t in tokenizer.get_vocab()), None
        )
        # Padding is masked by position in every collator here, so sharing the id with eos hides no loss.
        tokenizer.pad_token = spare or tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def load_model_tokenizer(args: ModelArguments) -> PreTrainedTokenizerBase:
    """The tokenizer of the model that a stage starts from."""
    return load_tokenizer(args.model_name_or_path, args.trust_remote_code, cache_dir=args.cache_dir)


def open_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder. Raises UserError where there is none; the hub is not asked."""
    if not (Path(path) / "tokenizer_config.json").exists():
        raise UserError(
            f"--tokenizer {path}: no folder with a tokenizer (build_base.py fetches a model from the hub)"
        )
    try:
        return load_tokenizer(path)
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"--tokenizer {path}: can't be loaded: {reason}") from None


def load_causal(
    path: str, dtype: str = "auto", device_map: str | None = None, **kwargs: Any
) -> PreTrainedModel:
    """A causal language model for use: evaluation mode, on the GPU if there is one."""
    from transformers import AutoModelForCausalLM

    return _ready(
        load_whole(AutoModelForCausalLM, path, dtype=dtype, device_map=device_map, **kwargs), device_map
    )


def load_reward(path: str, dtype: str = "auto", device_map: str | None = None) -> PreTrainedModel:
    """A reward model (one score a text) for use."""
    from transformers import AutoModelForSequenceClassification

    model = load_whole(AutoModelForSequenceClassification, path, dtype=dtype, device_map=device_map)
    if model.config.num_labels != 1:
        raise UserError(f"{path}: not a reward model: it has {model.config.num_labels} outputs, not one")
    return _ready(model, device_map)


def load_for_training(
    args: ModelArguments, lora: LoraArguments, task: str = "causal"
) -> tuple[PreTrainedModel, LoraConfig | None]:
    """The model a stage trains, and the adapter for its trainer to add (None: every weight, or --peft_path).

    `task`: causal or reward. The trainer adds the adapter, not we: only then does DPO know that its reference is
    the model with the adapter switched off.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if lora.use_peft and lora.use_dora and args.load_in_8bit and not torch.cuda.is_available():
        # bitsandbytes' way through 8 bits on a CPU ends in an AttributeError at DoRA's first backward pass.
        raise UserError("--use_dora with --load_in_8bit needs CUDA; leave one out, or use --load_in_4bit")
    kwargs: dict[str, Any] = {
        "dtype": args.torch_dtype,
        "trust_remote_code": args.trust_remote_code,
        "cache_dir": args.cache_dir,
        "device_map": args.device_map,
    }
    if args.flash_attn:
        kwargs["attn_implementation"] = "flash_attention_2"
    if args.load_in_4bit or args.load_in_8bit:
        kwargs["quantization_config"] = _quantisation(args)
    if task == "reward":
        with (
            without_load_report()
        ):  # it would warn that the score head is new; that is the point of this stage
            model = AutoModelForSequenceClassification.from_pretrained(
                args.model_name_or_path, num_labels=1, **kwargs
            )
    else:
        model = load_whole(AutoModelForCausalLM, args.model_name_or_path, **kwargs)
    _check_trainable(model, lora)
    _keep_4_bit_differentiable(model)
    model.config.use_cache = (
        False  # a cache costs memory in training and leaks between packed rows under SDPA
    )
    if not lora.use_peft:
        return model, None
    if lora.peft_path:
        from peft import PeftModel

        return PeftModel.from_pretrained(model, lora.peft_path, is_trainable=True), None
    adapter = _adapter(lora, task)
    _check_target_modules(model, lora, adapter.modules_to_save or [])
    return model, adapter


def add_adapter(
    model: PreTrainedModel, adapter: LoraConfig | None, args: TrainingArguments
) -> PreTrainedModel | PeftModel:
    """The model with its adapter, for transformers' own Trainer (TRL's trainers do this themselves)."""
    from peft import PeftModel, get_peft_model
    from transformers.integrations import is_deepspeed_zero3_enabled

    if adapter is not None:
        # ZeRO-3 gathers parameters of one dtype only: fp32 adapters on a bf16 base would stop its first step.
        model = get_peft_model(model, adapter, autocast_adapter_dtype=not is_deepspeed_zero3_enabled())
    if isinstance(model, PeftModel) and args.gradient_checkpointing:
        model.enable_input_require_grads()  # else nothing before the first adapter has a gradient to recompute
    return model


def train_in_fp32(model: PreTrainedModel | PeftModel) -> None:
    """What TRL's trainers train beside a frozen base, adapter and reward head, in fp32: as PEFT does where it can.

    They leave the head in the base's dtype, and put all of it into bf16 on a quantised base. There AdamW's steps are
    lost: at a learning rate of 1e-5, nine in ten weights of a bf16 head did not move in two steps.
    """
    import torch
    from peft import PeftModel
    from transformers.integrations import is_deepspeed_zero3_enabled

    if not isinstance(model, PeftModel) or is_deepspeed_zero3_enabled():  # ZeRO-3: one dtype only, see above
        return
    head = f".{REWARD_HEAD}.modules_to_save."
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ("lora_" in name or head in name):
            parameter.data = parameter.data.to(torch.float32)
    for name, module in model.named_modules():
        if head in f".{name}":  # what comes in has the base's dtype, and nothing casts it without autocast
            module.register_forward_pre_hook(
                lambda score, given: (given[0].to(score.weight.dtype), *given[1:])
            )


def require_inputs(args: ModelArguments, lora: LoraArguments) -> None:
    """What a stage starts from must be there. Raises UserError listing all that is not."""
    faults = []
    if lora.peft_path and not (Path(lora.peft_path) / "adapter_config.json").exists():
        faults.append(f"--peft_path {lora.peft_path}: no adapter_config.json there")
    try:
        require_model_folder(args.model_name_or_path)
    except UserError as error:
        faults.append(str(error))
    if faults:
        raise UserError(*faults)


def check_devices(args: ModelArguments) -> None:
    """What can only be known with torch imported. Raises UserError."""
    import torch

    if args.flash_attn and not torch.cuda.is_available():
        raise UserError("--flash_attn needs CUDA; leave it out here (SDPA is used)")


def resolve_precision(training: dict[str, Any]) -> str:
    """Set bf16 in `training` where neither precision was asked for; returns what was chosen and why.

    Raises UserError where the machine can't do what was asked for.
    """
    import torch

    if training.get("bf16"):
        return "precision: bf16 autocast (asked for)"
    if training.get("fp16"):
        if not torch.cuda.is_available() or training.get("use_cpu"):
            # accelerate leaves fp16 out on a CPU without a word: the run would be fp32, and say that it is fp16.
            raise UserError("--fp16 needs CUDA; here use --bf16 true, or neither")
        training["bf16"] = False
        return "precision: fp16 autocast (asked for)"
    if training.get("bf16") is False:
        return "precision: no autocast (asked for)"
    if torch.cuda.is_available():
        training["bf16"] = torch.cuda.is_bf16_supported()
        return f"precision: {'bf16 autocast (the GPU has it)' if training['bf16'] else 'no autocast'}"
    training["bf16"] = _cpu_has_bf16()
    if training["bf16"]:  # 1.8 times the tokens/s of fp32, measured on blocks of tiny
        return "precision: bf16 autocast (the CPU has avx512_bf16)"
    return "precision: no autocast (the CPU has no avx512_bf16)"


def _cpu_has_bf16() -> bool:
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def describe_parameters(model: PreTrainedModel) -> str:
    """'trainable 116,736 of 1,176,832 parameters (9.92 %)'; 4-bit weights count as the weights they stand for."""
    trainable = total = 0
    for parameter in model.parameters():
        count = getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 leaves an empty shell on each rank
        if parameter.__class__.__name__ == "Params4bit":
            count *= 2 * parameter.element_size()  # two 4-bit weights a byte
        total += count
        trainable += count if parameter.requires_grad else 0
    return f"trainable {trainable:,} of {total:,} parameters ({trainable / total:.2%})"


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase, end_of_turn: str) -> list[int]:
    """Token ids that end an answer: the template's end of turn, then the tokenizer's own eos."""
    ids = tokenizer(end_of_turn, add_special_tokens=False)["input_ids"]
    return list(dict.fromkeys([*ids, tokenizer.eos_token_id]))


def load_whole(model_class: Any, path: str, **kwargs: Any) -> PreTrainedModel:
    """from_pretrained that refuses what transformers only reports: weights that are missing get random numbers."""
    with without_load_report():
        model, info = model_class.from_pretrained(path, output_loading_info=True, **kwargs)
    missing = sorted(info["missing_keys"])
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(f"{path}: weights are missing in its files: {', '.join(missing[:3])}{more}")
    return model


def _ready(model: PreTrainedModel, device_map: str | None) -> PreTrainedModel:
    import torch

    if device_map is None and torch.cuda.is_available():
        model.to("cuda")
    return model.eval()


def _quantisation(args: ModelArguments) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    if args.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _adapter(lora: LoraArguments, task: str) -> LoraConfig:
    from peft import LoraConfig, TaskType

    return LoraConfig(
        task_type=TaskType.SEQ_CLS if task == "reward" else TaskType.CAUSAL_LM,
        r=lora.lora_rank,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules="all-linear" if _targets_all(lora) else lora.target_modules,
        modules_to_save=[*(lora.modules_to_save or []), *([REWARD_HEAD] if task == "reward" else [])] or None,
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
    )


def _check_trainable(model: PreTrainedModel, lora: LoraArguments) -> None:
    """Raises UserError where weights would be trained in float16 (as their files have them, or as asked)."""
    import torch
    from accelerate.utils import parse_flag_from_env

    if model.dtype == torch.float16 and not parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        faults = untrainable(lora.use_peft, lora.modules_to_save)
        if faults:
            raise UserError(*faults)


def _keep_4_bit_differentiable(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from packing weights for a CPU with avx512_bf16 when they are first used in evaluation.

    They stay packed, and the product of packed weights has no gradient: after one evaluation training went on, with
    nothing reaching the layers below (DPO's third loss .32 instead of .23). Widths under 64 can't be packed at all.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _targets_all(lora: LoraArguments) -> bool:
    return lora.target_modules in (["all"], ["all-linear"])


def _check_target_modules(model: PreTrainedModel, lora: LoraArguments, saved: list[str]) -> None:
    """Modules that are asked for must be there, and be ones that an adapter can be put on. Raises UserError."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    kinds: dict[str, bool] = {}  # name -> whether an adapter can be put on it
    for name, module in model.named_modules():
        fits = isinstance(module, (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, Conv1D))
        kinds[name.rsplit(".", 1)[-1]] = fits
    asked = [] if _targets_all(lora) else lora.target_modules
    known = ", ".join(sorted(name for name in kinds if name.endswith(("proj", "head", "tokens"))))
    faults = []
    for flag, wanted in (("target_modules", asked), ("modules_to_save", lora.modules_to_save or [])):
        unknown = [name for name in wanted if name not in kinds]
        if unknown:
            faults.append(f"--{flag}: the model has no {', '.join(unknown)}; it has {known}")
    unfit = [name for name in asked if not kinds.get(name, True)]
    if unfit:
        faults.append(
            f"--target_modules: {', '.join(unfit)} can't be adapted, only trained in full (--modules_to_save)"
        )
    for name in set(asked) & set(saved) - set(lora.modules_to_save or []):
        faults.append(f"--target_modules: {name} is trained in full in this stage; leave it out")
    if faults:
        raise UserError(*faults)


@contextlib.contextmanager
def without_load_report() -> Iterator[None]:
    """Silence transformers' table of missing and unexpected weights, where they are expected."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
