"""An adapter that can't be merged is refused before anything is written, by name and all at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from adapters import (
    ADAPTER,
    CONFIG,
    RANK,
    configure,
    make_adapter,
    plan_of,
    reweigh,
    told,
)

PREFIX = "base_model.model."
QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def adapter(tiny_base, tmp_path_factory) -> Path:
    return make_adapter(tiny_base, tmp_path_factory.mktemp("lora") / "adapter")


@pytest.fixture
def own_adapter(adapter, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(adapter, tmp_path / "adapter"))


@pytest.fixture
def own_base(tiny_base, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


# The adapter's configuration


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"use_qalora": True}, "adapter_config.json sets use_qalora, which this merge does not know"),
        (
            {"target_parameters": ["mlp.experts.gate_up_proj"]},
            "adapter_config.json sets target_parameters, which this merge does not know",
        ),
        (
            {"trainable_token_indices": [1, 2]},
            "adapter_config.json sets trainable_token_indices, which this merge does not know",
        ),
        (
            {"layer_replication": [[0, 2]]},
            "adapter_config.json sets layer_replication, which this merge does not know",
        ),
        (
            {"something_new": "on"},
            "adapter_config.json sets something_new, which this merge does not know",
        ),
        (
            {"init_lora_weights": "pissa"},
            "init_lora_weights pissa changed the base's weights before training; save the adapter with "
            "path_initial_model_for_weight_conversion, then merge that",
        ),
        (
            {"init_lora_weights": "olora"},
            "init_lora_weights olora changed the base's weights before training; save the adapter with "
            "path_initial_model_for_weight_conversion, then merge that",
        ),
        ({"peft_type": "IA3"}, "a IA3 adapter; only LoRA can be merged"),
        ({"peft_type": None}, "a None adapter; only LoRA can be merged"),
        (
            {"task_type": "SEQ_2_SEQ_LM"},
            "task_type SEQ_2_SEQ_LM: only CAUSAL_LM and SEQ_CLS can be merged",
        ),
    ],
    ids=str,
)
def test_a_configuration_that_is_not_known_is_refused_by_name(tiny_base, own_adapter, changes, fault):
    configure(own_adapter, **changes)
    assert told(plan_of, tiny_base, own_adapter) == [f"--lora_model {own_adapter}: {fault}"]


def test_a_configuration_of_todays_peft_and_of_older_ones_is_known(tiny_base, own_adapter):
    from peft import LoraConfig

    plain = LoraConfig(task_type="CAUSAL_LM", r=RANK).to_dict()
    configure(own_adapter, **{k: v for k, v in plain.items() if k not in ("target_modules", "lora_alpha")})
    plan_of(tiny_base, own_adapter)
    old = json.loads((own_adapter / CONFIG).read_text())
    few = ("peft_type", "task_type", "r", "lora_alpha", "target_modules", "base_model_name_or_path")
    (own_adapter / CONFIG).write_text(json.dumps({name: old[name] for name in few}))
    plan_of(tiny_base, own_adapter)


@pytest.mark.parametrize("content", ["{", "[]", '"LORA"', "null", ""])
@pytest.mark.parametrize("where", ["adapter", "base"])
def test_a_configuration_that_is_none_is_told(own_base, own_adapter, where, content):
    file = {"adapter": own_adapter / CONFIG, "base": own_base / "config.json"}[where]
    file.write_text(content)
    [line] = told(plan_of, own_base, own_adapter)
    flag = {"adapter": f"--lora_model {own_adapter}", "base": f"--base_model {own_base}"}[where]
    assert line.startswith(f"{flag}: {file.name} is not JSON: ")


@pytest.mark.parametrize(
    "changes", [{"lora_alpha": None}, {"lora_alpha": "12"}, {"rank_pattern": ["q_proj"]}]
)
def test_a_rank_or_alpha_that_is_no_number_is_told(tiny_base, own_adapter, changes):
    lines = told(plan_of, tiny_base, configure(own_adapter, **changes))
    assert all(line.startswith(f"--lora_model {own_adapter}: ") for line in lines)


# The adapter's tensors


def test_a_wrong_rank_is_told(tiny_base, own_adapter):
    configure(own_adapter, r=8)
    lines = told(plan_of, tiny_base, own_adapter)
    assert (
        len(lines) == 14
        and (
            f"--lora_model {own_adapter}: {QUERY}: lora_A (4, 32) and lora_B (32, 4) do not have the rank 8 that "
            "adapter_config.json says"
        )
        in lines
    )


def test_a_pair_swapped_is_told(tiny_base, own_adapter):
    def swap(tensors):
        a, b = f"{PREFIX}{QUERY}.lora_A.weight", f"{PREFIX}{QUERY}.lora_B.weight"
        tensors[a], tensors[b] = tensors[b], tensors[a]

    reweigh(own_adapter, swap)
    assert told(plan_of, tiny_base, own_adapter) == [
        f"--lora_model {own_adapter}: {QUERY}: lora_A (32, 4) and lora_B (4, 32) do not have the rank 4 that "
        "adapter_config.json says"
    ]


def test_half_a_pair_is_told(tiny_base, own_adapter):
    reweigh(own_adapter, lambda tensors: tensors.pop(f"{PREFIX}{QUERY}.lora_B.weight"))
    assert told(plan_of, tiny_base, own_adapter) == [
        f"--lora_model {own_adapter}: {QUERY}: lora_B missing in adapter_model.safetensors"
    ]


UP = "model.layers.0.mlp.up_proj"
SAME = f"{PREFIX}{QUERY}.lora_A.weight"


@pytest.mark.parametrize(
    ("added", "fault"),
    [
        (
            {f"{PREFIX}{QUERY}.lora_C.weight": (4, 4)},
            f"{PREFIX}{QUERY}.lora_C.weight: this merge does not know what it is",
        ),
        (
            {f"{PREFIX}{QUERY}.lora_A.default.weight": (4, 32)},
            f"{PREFIX}{QUERY}.lora_A.default.weight: this merge does not know what it is",
        ),
        (
            {f"{PREFIX}{QUERY}.lora_magnitude_vector": (32,)},
            f"{QUERY}: has a lora_magnitude_vector, but adapter_config.json does not set use_dora",
        ),
        (
            {f"{PREFIX}{QUERY}.lora_B.bias": (32,)},
            f"{QUERY}: has a lora_B.bias, but adapter_config.json does not set lora_bias",
        ),
        (
            {f"{PREFIX}model.norm.weight": (32,)},
            "model.norm.weight is neither LoRA nor in modules_to_save: this merge does not know what it is",
        ),
        (
            {f"{PREFIX}model.prompt.weight": (3, 32)},
            "model.prompt.weight is neither LoRA nor in modules_to_save: this merge does not know what it is",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_tensor_that_nobody_knows_is_told(tiny_base, own_adapter, added, fault):
    reweigh(own_adapter, lambda tensors: tensors.update({k: torch.ones(s) for k, s in added.items()}))
    assert told(plan_of, tiny_base, own_adapter) == [f"--lora_model {own_adapter}: {fault}"]


@pytest.mark.parametrize(
    "name", [SAME.removeprefix(PREFIX), f"{PREFIX}{QUERY}.lora_embedding_A"], ids=["prefix", "kind"]
)
def test_a_second_tensor_for_one_place_is_told(tiny_base, own_adapter, name):
    """Every tensor of the file is used once or the merge fails: none replaces another without a word."""
    reweigh(own_adapter, lambda tensors: tensors.update({name: tensors[SAME] + 1}))
    lines = told(plan_of, tiny_base, own_adapter)
    assert lines[0].startswith(f"--lora_model {own_adapter}: ")


def test_two_values_for_one_module_are_told(tiny_base, tmp_path):
    adapter = make_adapter(tiny_base, tmp_path / "adapter", modules_to_save=["lm_head"])
    name = f"{PREFIX}lm_head.weight"
    reweigh(adapter, lambda t: t.update({f"{PREFIX}lm_head.modules_to_save.weight": t[name] + 1}))
    lines = told(plan_of, tiny_base, adapter)
    assert lines[0].startswith(f"--lora_model {adapter}: ") and "lm_head" in lines[0]


def test_tensors_that_the_configuration_promises_are_missed(tiny_base, tmp_path):
    dora = make_adapter(tiny_base, tmp_path / "dora", use_dora=True)
    reweigh(dora, lambda tensors: tensors.pop(f"{PREFIX}{QUERY}.lora_magnitude_vector"))
    assert told(plan_of, tiny_base, dora) == [
        f"--lora_model {dora}: {QUERY}: lora_magnitude_vector missing in adapter_model.safetensors"
    ]
    saved = make_adapter(tiny_base, tmp_path / "saved", modules_to_save=["lm_head"])
    reweigh(saved, lambda tensors: tensors.pop(f"{PREFIX}lm_head.weight"))
    [line] = told(plan_of, tiny_base, saved)
    assert line.startswith(f"--lora_model {saved}: ") and "lm_head" in line
    reward = make_adapter(tiny_base, tmp_path / "reward", reward=True)
    reweigh(reward, lambda tensors: tensors.pop(f"{PREFIX}score.weight"))
    [line] = told(plan_of, tiny_base, reward)
    assert line.startswith(f"--lora_model {reward}: ") and "score" in line


def test_an_adapter_without_a_tensor_is_told(tiny_base, own_adapter):
    reweigh(own_adapter, lambda tensors: tensors.clear())
    [line] = told(plan_of, tiny_base, own_adapter)
    assert line.startswith(f"--lora_model {own_adapter}: {ADAPTER} is empty")


def test_an_adapter_given_twice_is_told(tiny_base, adapter):
    [line] = told(plan_of, tiny_base, adapter, adapter, weights=[0.5, 0.5])
    assert line.startswith(f"--lora_model {adapter}: ") and "twice" in line
