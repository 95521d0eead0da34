"""What the tests of merging share: small models and adapters of every kind, and PEFT's word on what they make."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stagecraft.errors import UserError

WEIGHTS, ADAPTER, CONFIG = "model.safetensors", "adapter_model.safetensors", "adapter_config.json"
RANK, ALPHA = 4, 12
IDS = torch.arange(40)[None] * 7 % 400  # a text, as far as these models are concerned


def causal(folder: Path, **settings: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **settings)


def classifier(folder: Path, **settings: Any) -> Any:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, **settings)


def make_adapter(
    base: Path,
    folder: Path,
    reward: bool = False,
    seed: int = 0,
    load: Callable[[Path], Any] | None = None,
    strength: float = 0.05,
    **settings: Any,
) -> Path:
    """A LoRA adapter of the base as a stage leaves it, with weights as if trained. `load` gives another model."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model = (load or (classifier if reward else causal))(base)
    kind = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]} if reward else {"task_type": "CAUSAL_LM"}
    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear", **kind, **settings}
    model = get_peft_model(model, LoraConfig(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * strength)
    model.save_pretrained(folder)
    return folder


def copy_model(base: Path, folder: Path, **changes: Any) -> Path:
    """The tiny model with another shape and fresh weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(base, folder)
    config = AutoConfig.from_pretrained(base)
    for name, value in changes.items():
        setattr(config, name, value)
    if "num_hidden_layers" in changes:
        config.layer_types = ["full_attention"] * changes["num_hidden_layers"]
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def new_model(base: Path, folder: Path, config: Any) -> Path:
    """A model of another architecture with random numbers in every tensor, and the tiny model's tokenizer."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # biases of a fresh model are zero, which would hide one that is lost
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder)
    for file in base.glob("token*"):
        shutil.copy(file, folder)
    return folder


def plan_of(base: Path | None, *adapters: Path, weights: Any = None, dtype: str = "auto") -> Any:
    from stagecraft.merging.inputs import plan_merge

    return plan_merge(base and str(base), [str(adapter) for adapter in adapters], weights, dtype)


def merged(base: Path, *adapters: Path, output: Path, **settings: Any) -> dict[str, torch.Tensor]:
    """Merge without the proof; what was written."""
    from stagecraft.merging.making import make_model

    make_model(plan_of(base, *adapters, **settings), output, None)
    return tensors_of(output)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model folder."""
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def loras_of(adapter: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Module -> its tensors by name, as the base spells the module."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(adapter / ADAPTER).items():
        module, _, part = name.removeprefix("base_model.model.").partition(".lora_")
        found.setdefault(module, {})[part.removesuffix(".weight")] = tensor
    return found


def with_adapter(base: Path, adapter: Path, load: Callable[[Path], Any] = causal) -> Any:
    """Base and adapter as PEFT puts them together."""
    from peft import PeftModel

    return PeftModel.from_pretrained(load(base), adapter).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=IDS).logits.float()


def configure(folder: Path, file: str = CONFIG, **changes: Any) -> Path:
    """Change values of a JSON file of the folder."""
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | changes))
    return folder


def reweigh(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], file: str = ADAPTER) -> Path:
    """Let `change` alter a file's tensors in place."""
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, {"format": "pt"})
    return folder


def told(function: Callable[..., Any], *arguments: Any, **settings: Any) -> list[str]:
    """The lines of the UserError that a call raises."""
    with pytest.raises(UserError) as caught:
        function(*arguments, **settings)
    return str(caught.value).splitlines()
