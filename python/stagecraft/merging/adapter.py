"""An adapter folder -> what it does to each weight of its base. What is not known here is refused by name."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stagecraft.merging.tensors import TORCH_NAME, Damaged, Tensor, open_file, same_content

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."

# Fields of PEFT 0.21's LoraConfig that change nothing here, because the tensors show it or because they only steer
# the training. Any other field with a value in it is refused.
HARMLESS = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("lora_dropout", "modules_to_save", "ensure_weight_tying", "eva_config", "megatron_core"),
    *("qalora_group_size", "runtime_config", "bias"),
}
USED = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out"}
USED |= {"lora_bias", "init_lora_weights"}
# Starting values that leave the base as it is. pissa, olora, corda, lora_ga and loftq change the base's weights.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_PARTS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_B.bias": "b_bias",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "base_layer.weight": "base",
}


class Unknown(Exception):
    """Why an adapter can't be merged, in one line a fault."""

    def __init__(self, *faults: str) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


@dataclass
class Lora:
    """W + scale * BA; with a magnitude m (DoRA) m * (W + scale * BA) / norm over the inputs of each output."""

    a: Tensor  # [r, in]
    b: Tensor  # [out, r]
    scale: float
    magnitude: Tensor | None = None  # [out]
    # Whether the base keeps the weight as [in, out]: embeddings do (in = words), GPT-2's Conv1D, fan_in_fan_out.
    # None: W is square and the tensors do not tell; the configuration's fan_in_fan_out does.
    transposed: bool | None = None

    @property
    def rank(self) -> int:
        """r"""
        return self.a.shape[0]


@dataclass
class Adapter:
    """One adapter: what it brings, by the names its own model had for modules and parameters."""

    folder: Path
    config: dict[str, Any]
    loras: dict[str, Lora] = field(default_factory=dict)  # module -> change of its weight
    added: dict[str, tuple[Tensor, float]] = field(default_factory=dict)  # parameter -> (B's bias, scale)
    whole: dict[str, Tensor] = field(
        default_factory=dict
    )  # parameter -> its new value (modules_to_save, bias)
    embeddings: dict[str, Tensor] = field(default_factory=dict)  # parameter -> the base it stood on (resized)
    parameters: int = 0

    @property
    def reward(self) -> bool:
        """Whether it turns the base into a sequence classifier."""
        return self.config.get("task_type") == "SEQ_CLS"


def open_adapter(folder: Path) -> Adapter:
    """What is in an adapter folder. Raises Unknown with every reason why it can't be merged."""
    if not (folder / CONFIG).exists():
        raise Unknown(f"no {CONFIG} there: this is not an adapter")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("no object at its top")
    except ValueError as error:
        raise Unknown(f"{CONFIG} is not JSON: {error}") from None
    faults = _faults_of(config)
    tensors: dict[str, Tensor] = {}
    if not (folder / WEIGHTS).exists():
        pickled = (
            " (a pickled adapter_model.bin is not read)" if (folder / "adapter_model.bin").exists() else ""
        )
        faults.append(f"{WEIGHTS} is missing{pickled}")
    else:
        try:
            tensors = open_file(folder / WEIGHTS)
        except Damaged as fault:
            faults.append(str(fault))
    if faults:
        raise Unknown(*faults)
    adapter = Adapter(folder, config, parameters=sum(tensor.numel for tensor in tensors.values()))
    faults = _sort_out(adapter, tensors)
    if not tensors:
        faults.append(f"{WEIGHTS} is empty")
    if faults:
        raise Unknown(*faults)
    return adapter


def _faults_of(config: dict[str, Any]) -> list[str]:
    """What the configuration says that a merge here can't do."""
    if config.get("peft_type") != "LORA":
        return [f"a {config.get('peft_type')} adapter; only LoRA can be merged"]
    faults = [
        f"{CONFIG} sets {name}, which this merge does not know"
        for name, value in sorted(config.items())
        if name not in HARMLESS | USED and value not in (None, False, {}, [], "")
    ]
    start = config.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        faults.append(
            f"init_lora_weights {start} changed the base's weights before training; save the adapter with "
            "path_initial_model_for_weight_conversion, then merge that"
        )
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name) or {}, dict):
            faults.append(f"{CONFIG}: {name} must hold a number for each module, not {config[name]!r}")
    for name in ("r", "lora_alpha"):
        values = (config.get(name), *_values(config.get("rank_pattern" if name == "r" else "alpha_pattern")))
        faults += [
            f"{CONFIG}: {name} must be a number, not {value!r}"
            for value in values
            if type(value) not in (int, float)
        ]
    if config.get("task_type") not in ("CAUSAL_LM", "SEQ_CLS", None):
        faults.append(f"task_type {config['task_type']}: only CAUSAL_LM and SEQ_CLS can be merged")
    return faults


def _values(pattern: Any) -> list[Any]:
    return list(pattern.values()) if isinstance(pattern, dict) else []


def _sort_out(adapter: Adapter, tensors: dict[str, Tensor]) -> list[str]:
    """Give every tensor of the file its place in `adapter`; returns what has none."""
    faults: list[str] = []
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        bare = name.removeprefix(PREFIX)
        match = re.fullmatch(rf"(.+)\.({'|'.join(map(re.escape, _PARTS))})", bare)
        if tensor.dtype not in TORCH_NAME:
            faults.append(f"{name} has the dtype {tensor.dtype}, which this merge does not know")
        elif match:
            parts = modules.setdefault(match[1], {})
            if _PARTS[match[2]] in parts:
                faults.append(f"{name} and {parts[_PARTS[match[2]]].name} are for the same place")
            parts[_PARTS[match[2]]] = tensor
            if match[2].startswith("lora_embedding"):
                parts["embedding"] = tensor
        elif "lora_" in bare:
            faults.append(f"{name}: this merge does not know what it is")
        elif bare.endswith(
            ".original_module.weight"
        ):  # what a module of modules_to_save was before the training
            adapter.embeddings[bare.replace(".original_module.", ".")] = tensor
        else:
            place = bare.replace(".modules_to_save.", ".").replace(".base_layer.", ".")
            if place in adapter.whole and not same_content(adapter.whole[place], tensor):
                faults.append(f"{name} and {adapter.whole[place].name} are for the same place")
            adapter.whole[place] = tensor
    for module, parts in modules.items():
        fault = _place(adapter, module, parts)
        if fault:
            faults.append(f"{module}: {fault}")
    faults += _strangers(adapter)
    return faults


def _place(adapter: Adapter, module: str, parts: dict[str, Tensor]) -> str | None:
    """One module's tensors into the adapter; returns what is wrong with them."""
    config = adapter.config
    if "base" in parts:
        adapter.embeddings[f"{module}.weight"] = parts["base"]
    missing = [f"lora_{part.upper()}" for part in ("a", "b") if part not in parts]
    if config.get("use_dora") and "magnitude" not in parts:
        missing.append("lora_magnitude_vector")
    if missing:
        return f"{' and '.join(missing)} missing in {WEIGHTS}"
    if "magnitude" in parts and not config.get("use_dora"):
        return f"has a lora_magnitude_vector, but {CONFIG} does not set use_dora"
    if "b_bias" in parts and not config.get("lora_bias"):
        return f"has a lora_B.bias, but {CONFIG} does not set lora_bias"
    a, b = parts["a"], parts["b"]
    try:
        rank = _of_pattern(config.get("rank_pattern"), module, config["r"])
        alpha = _of_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    except (KeyError, re.error) as error:
        return f"{CONFIG} does not tell its rank and alpha ({error})"
    if len(a.shape) != 2 or len(b.shape) != 2:
        return f"lora_A {a.shape} and lora_B {b.shape} are no matrices; only linear layers and embeddings can be merged"
    if (a.shape[0], b.shape[1]) != (rank, rank):
        return f"lora_A {a.shape} and lora_B {b.shape} do not have the rank {rank} that {CONFIG} says"
    if "magnitude" in parts and parts["magnitude"].numel != b.shape[0]:
        return f"lora_magnitude_vector has {parts['magnitude'].numel} numbers for {b.shape[0]} outputs"
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    transposed = True if "embedding" in parts else None
    adapter.loras[module] = Lora(a, b, scale, parts.get("magnitude"), transposed)
    if "b_bias" in parts:
        adapter.added[f"{module}.bias"] = (parts["b_bias"], scale)
    return None


def _of_pattern(pattern: dict[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first key that is the module's name or, at a dot, its end; keys are regular expressions."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _strangers(adapter: Adapter) -> list[str]:
    """Whole tensors that the configuration does not account for: PEFT would leave them aside without a word."""
    saved = adapter.config.get("modules_to_save") or []
    biases = adapter.config.get("bias") or "none"
    faults = []
    for name in list(adapter.whole):
        module, _, leaf = name.rpartition(".")
        if _is_saved(module, saved) or (leaf == "bias" and biases != "none"):
            continue
        if (
            module.rpartition(".")[2] in EMBEDDINGS | HEADS and leaf == "weight"
        ):  # saved because it was resized
            adapter.embeddings[name] = adapter.whole.pop(name)
            continue
        faults.append(f"{name} is neither LoRA nor in modules_to_save: this merge does not know what it is")
    # PEFT names both that a classifier's head may have; a model has one of them.
    heads = ["classifier", "score"] if adapter.reward else []
    missed = [k for k in saved if not any(_is_saved(n.rpartition(".")[0], [k]) for n in adapter.whole)]
    if heads and not set(heads) - set(missed):
        faults.append(f"the head of the classifier (score) is missing in {WEIGHTS}")
    faults += [
        f"modules_to_save names {kept}, but {WEIGHTS} has no such tensor"
        for kept in missed
        if kept not in heads
    ]
    for name in adapter.embeddings:
        if name.split(".")[-2] not in EMBEDDINGS | HEADS:
            faults.append(
                f"{name} as it was before the training is in the file: only embeddings and heads may be"
            )
    return faults


def _is_saved(module: str, saved: list[str]) -> bool:
    """PEFT's rule: a module whose name ends in one of modules_to_save is trained in full, with all that is in it."""
    parts = module.split(".")
    return any(".".join(parts[:k]).endswith(kept) for kept in saved for k in range(1, len(parts) + 1))


# What architectures call the table of words and the layer that turns states into words.
EMBEDDINGS = {"embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings"}
HEADS = {"lm_head", "embed_out", "output"}
