"""Every kind of adapter is merged as PEFT understands it, in all of its tensors, and the folder answers the same."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adapters import (
    ADAPTER,
    ALPHA,
    RANK,
    WEIGHTS,
    causal,
    classifier,
    configure,
    copy_model,
    logits,
    loras_of,
    make_adapter,
    merged,
    new_model,
    reweigh,
    tensors_of,
    told,
    with_adapter,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # PEFT warns of tied weights, of fan_in_fan_out, of resizing
WORDS = 500  # of the models made here; the tiny model has 495 or so
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def models(tiny_base, tmp_path_factory) -> dict[str, Path]:
    """tied: Qwen3; untied: the same with a head; biased: Qwen2; conv1d: GPT-2, whose matrices are kept as [in, out]."""
    from transformers import GPT2Config, Qwen2Config

    folder = tmp_path_factory.mktemp("models")
    ends = {"vocab_size": WORDS, "eos_token_id": 0, "bos_token_id": 0}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    qwen2 = Qwen2Config(**ends, **heads, **size, tie_word_embeddings=False)
    gpt2 = GPT2Config(**ends, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    return {
        "tied": tiny_base,
        "untied": copy_model(tiny_base, folder / "untied", tie_word_embeddings=False),
        "biased": new_model(tiny_base, folder / "biased", qwen2),
        "conv1d": new_model(tiny_base, folder / "conv1d", gpt2),
    }


def gap(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference relative to the largest number."""
    return ((one.double() - other.double()).abs().max() / other.double().abs().max()).item()


def check_answers(base: Path, adapter: Path, output: Path, load=causal, load_base=None) -> None:
    """The folder, loaded as a user would, gives the logits of base + adapter, and not those of the base."""
    wanted = logits(with_adapter(base, adapter, load_base or load))
    with warnings.catch_warnings(record=True):
        found = logits(load(output))
    assert gap(found, wanted) < 1e-5
    if load is causal:
        untouched = logits((load_base or load)(base))
        assert gap(found, untouched) > 1e-2


def check_weights(base: Path, adapter: Path, result: dict[str, torch.Tensor], load=causal) -> set[str]:
    """Every tensor is what PEFT's merge makes of it, untouched ones to the bit. Returns the names of the others."""
    by_peft = with_adapter(base, adapter, load).merge_and_unload().state_dict()
    before, touched = tensors_of(base), set()
    for name, tensor in result.items():
        if name in before and torch.equal(by_peft[name], before[name]):
            assert torch.equal(tensor, before[name]), name
            continue
        touched.add(name)
        assert gap(tensor, by_peft[name]) < 1e-6, name
        if name in before and before[name].shape == tensor.shape:
            assert (tensor - before[name]).abs().max() > 1e-4, name
    return touched


SQUARE = ["attn.c_proj"]  # [32, 32]: its shape does not tell which side is which
# name -> (model, settings of the adapter, what is touched, settings with which the same weights mean something else)
KINDS = {
    "LoRA": ("tied", {}, r"_proj\.weight$", {"lora_alpha": ALPHA + 1}),
    "rsLoRA": ("tied", {"use_rslora": True}, r"_proj\.weight$", {"use_rslora": False}),
    "one kind of layer": ("tied", {"target_modules": ["k_proj"]}, r"k_proj\.weight$", {"lora_alpha": 1}),
    "one layer": (
        "tied",
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        r"layers\.1\.\S+q_proj\.weight$",
        {"lora_alpha": 1},
    ),
    "expression": ("tied", {"target_modules": r".*\.0\..*v_proj"}, r"\.0\..*v_proj", {"lora_alpha": 1}),
    "all but one": (
        "tied",
        {"exclude_modules": ["q_proj"]},
        r"(?<!q)_proj\.weight$",
        {"lora_alpha": ALPHA + 1},
    ),
    "patterns": (
        "tied",
        {
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 3},
            "alpha_pattern": {"k_proj": 5, r"layers\.\d+\.mlp\.gate_proj": 7},
        },
        r"_proj\.weight$",
        {"alpha_pattern": {}},
    ),
    "rsLoRA with patterns": (
        "tied",
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5}},
        r"_proj\.weight$",
        {"use_rslora": False},
    ),
    "DoRA": ("tied", {"use_dora": True}, r"_proj\.weight$", {"lora_alpha": ALPHA + 1}),
    "DoRA with rsLoRA": ("tied", {"use_dora": True, "use_rslora": True}, r"_proj", {"use_rslora": False}),
    "Conv1D": ("conv1d", {"fan_in_fan_out": True}, r"(attn|proj|fc)\.weight$", {"lora_alpha": 1}),
    "square Conv1D": ("conv1d", {"target_modules": SQUARE}, r"attn\.c_proj\.weight$", {"lora_alpha": 1}),
    "Conv1D and embedding": (
        "conv1d",
        {"target_modules": [*SQUARE, "wpe"]},
        r"(attn\.c_proj|wpe)\.weight$",
        {"lora_alpha": 1},
    ),
    "DoRA on Conv1D": (
        "conv1d",
        {"use_dora": True},
        r"(attn|proj|fc)\.weight$",
        {"lora_alpha": 1},
    ),
    "lora_bias": (
        "biased",
        {"target_modules": ["q_proj", "v_proj"], "lora_bias": True, "use_rslora": True},
        r"[qv]_proj\.(weight|bias)$",
        {"use_rslora": False},
    ),
    "bias=all": ("biased", {"bias": "all"}, r"_proj\.(weight|bias)$", {"lora_alpha": 1}),
    "bias=lora_only": (
        "biased",
        {"target_modules": ["q_proj"], "bias": "lora_only"},
        r"q_proj\.(weight|bias)$",
        {"lora_alpha": 1},
    ),
    "bias=all with lora_bias": (
        "biased",
        {"target_modules": ["q_proj"], "bias": "all", "lora_bias": True},
        r"q_proj\.weight$|bias$",
        {"lora_alpha": 1},
    ),
    "head in full": ("untied", {"modules_to_save": ["lm_head"]}, r"_proj|lm_head", {"lora_alpha": 1}),
    "embedding in full": ("untied", {"modules_to_save": ["embed_tokens"]}, r"_proj|embed", {"lora_alpha": 1}),
    "last norm in full": ("tied", {"modules_to_save": ["model.norm"]}, r"_proj|el\.norm", {"lora_alpha": 1}),
    "all norms in full": ("tied", {"modules_to_save": ["norm"]}, r"_proj|norm", {"lora_alpha": 1}),
    "embedding": ("untied", {"target_modules": ["q_proj", "embed_tokens"]}, r"q_proj|emb", {"lora_alpha": 1}),
    "head": ("untied", {"target_modules": ["q_proj", "lm_head"]}, r"q_proj|lm_head", {"lora_alpha": 1}),
    "both": ("untied", {"target_modules": ["embed_tokens", "lm_head"]}, r"embed|head", {"lora_alpha": 1}),
    "DoRA on embedding and head": (
        "untied",
        {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True},
        r"embed|head",
        {"lora_alpha": 1},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_is_that_of_peft(models, tmp_path, kind):
    model, settings, touched, other = KINDS[kind]
    base = models[model]
    adapter = make_adapter(base, tmp_path / "adapter", **settings)
    result = merged(base, adapter, output=tmp_path / "out")
    names = {name for name in tensors_of(base) if re.search(touched, name)}
    assert result.keys() == tensors_of(base).keys()
    assert check_weights(base, adapter, result) == names and names
    check_answers(base, adapter, tmp_path / "out")
    # Control: read otherwise, the same tensors give another model.
    spoiled = merged(base, configure(adapter, **other), output=tmp_path / "spoiled")
    assert max(gap(spoiled[name], result[name]) for name in names) > 1e-3


def test_plain_lora_is_the_formula_to_the_last_place(tiny_base, tmp_path):
    """float32 of the float64 result: PEFT, which computes in float32, is not always that near."""
    adapter = make_adapter(tiny_base, tmp_path / "adapter")
    result, before, loras = (
        merged(tiny_base, adapter, output=tmp_path / "out"),
        tensors_of(tiny_base),
        loras_of(adapter),
    )
    assert len(loras) == 14
    for module, parts in loras.items():
        exact = before[f"{module}.weight"].double() + ALPHA / RANK * (
            parts["B"].double() @ parts["A"].double()
        )
        assert torch.equal(result[f"{module}.weight"], exact.float()), module


def test_dora_is_the_formula(tiny_base, tmp_path):
    adapter = make_adapter(tiny_base, tmp_path / "adapter", use_dora=True)
    result, before, loras = (
        merged(tiny_base, adapter, output=tmp_path / "out"),
        tensors_of(tiny_base),
        loras_of(adapter),
    )
    assert len(loras) == 14
    for module, parts in loras.items():
        direction = before[f"{module}.weight"].double()
        direction = direction + ALPHA / RANK * (parts["B"].double() @ parts["A"].double())
        exact = parts["magnitude_vector"].double()[:, None] * direction / direction.norm(dim=1, keepdim=True)
        torch.testing.assert_close(result[f"{module}.weight"].double(), exact, rtol=1e-7, atol=0)
        assert gap(result[f"{module}.weight"], direction) > 1e-3  # control: plain LoRA is something else


@pytest.mark.parametrize("fan_in_fan_out", [True, False])
def test_a_square_matrix_is_turned_as_its_own_kind_is_kept(models, tmp_path, fan_in_fan_out):
    """A head beside Conv1D: PEFT saves the setting of whichever module it met last, and both are in one adapter."""
    base = models["conv1d"]
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["c_attn", "c_proj", "lm_head"])
    configure(adapter, fan_in_fan_out=fan_in_fan_out)
    merged(base, adapter, output=tmp_path / "out")
    check_answers(base, adapter, tmp_path / "out")


# Tied embeddings: PEFT's own merge changes the one tensor twice, so base + adapter is the truth.

APART = {
    "LoRA on the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "LoRA on the head": {"target_modules": ["q_proj", "lm_head"]},
    "LoRA on both": {"target_modules": ["embed_tokens", "lm_head"]},
    "DoRA on the embedding": {"target_modules": ["embed_tokens"], "use_dora": True},
    "head in full": {"modules_to_save": ["lm_head"]},
    "embedding in full": {"modules_to_save": ["embed_tokens"]},
    "both in full": {"modules_to_save": ["embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("kind", APART)
def test_a_tie_that_the_adapter_broke_is_written_as_two(tiny_base, tmp_path, kind):
    adapter = make_adapter(tiny_base, tmp_path / "adapter", **APART[kind])
    result = merged(tiny_base, adapter, output=tmp_path / "out")
    assert result.keys() - tensors_of(tiny_base).keys() == {HEAD}
    assert gap(result[HEAD], result[EMBEDDING]) > 1e-3
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    check_answers(tiny_base, adapter, tmp_path / "out")


TOGETHER = {
    "plain": {},
    "LoRA on the embedding": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "LoRA on the head": {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True},
    "embedding in full": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "head in full": {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
}


@pytest.mark.parametrize("kind", TOGETHER)
def test_a_tie_that_holds_stays(tiny_base, tmp_path, kind):
    adapter = make_adapter(tiny_base, tmp_path / "adapter", **TOGETHER[kind])
    result = merged(tiny_base, adapter, output=tmp_path / "out")
    assert HEAD not in result
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    check_answers(tiny_base, adapter, tmp_path / "out")
    model = causal(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_head_beside_its_tied_embedding_is_not_touched(models, tmp_path):
    """A file may hold both; where they differ, transformers does not tie them, whatever the configuration says."""
    base = Path(shutil.copytree(models["untied"], tmp_path / "base"))
    configure(base, "config.json", tie_word_embeddings=True)
    adapter = make_adapter(base, tmp_path / "adapter")
    result = merged(base, adapter, output=tmp_path / "out")
    assert torch.equal(result[HEAD], tensors_of(base)[HEAD])
    check_answers(base, adapter, tmp_path / "out")


def test_a_copy_of_the_embedding_stays_a_copy(tiny_base, tmp_path):
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    reweigh(base, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}), WEIGHTS)
    adapter = make_adapter(base, tmp_path / "adapter")
    result = merged(base, adapter, output=tmp_path / "out")
    assert result.keys() == tensors_of(base).keys() and torch.equal(result[HEAD], result[EMBEDDING])
    check_answers(base, adapter, tmp_path / "out")


# A vocabulary that was resized before the training


def resized(base: Path):
    torch.manual_seed(3)
    model = causal(base)
    model.resize_token_embeddings(WORDS + 7, mean_resizing=False)
    return model


@pytest.mark.parametrize("model", ["tied", "untied"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ],
    ids=["beside LoRA", "LoRA on both", "both in full", "embedding in full", "head in full", "tied in full"],
)
def test_a_resized_vocabulary_comes_with_the_adapter(models, tmp_path, model, settings):
    base = models[model]
    adapter = make_adapter(base, tmp_path / "adapter", load=resized, **settings)
    result = merged(base, adapter, output=tmp_path / "out")
    assert result[EMBEDDING].shape == (WORDS + 7, 32)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == WORDS + 7
    check_answers(base, adapter, tmp_path / "out", load_base=resized)
    # Control: the rows that were added are the adapter's, and not new random ones.
    rows = [v for k, v in load_file(adapter / ADAPTER).items() if "embed_tokens" in k and len(v) == WORDS + 7]
    assert rows and (settings or torch.equal(result[EMBEDDING], rows[0]))
    broken_tie = model == "tied" and settings not in ({}, {**settings, "ensure_weight_tying": True})
    assert (HEAD in result) == (model == "untied" or broken_tie)


def test_a_vocabulary_without_its_head_is_refused(models, tmp_path):
    """PEFT saves only what it targets: with LoRA on the embedding alone, a resized head is lost with the training."""
    base = models["untied"]
    for target, lost in (("embed_tokens", "lm_head"), ("lm_head", "embed_tokens")):
        adapter = make_adapter(base, tmp_path / target, load=resized, target_modules=["q_proj", target])
        lines = told(merged, base, adapter, output=tmp_path / "out")
        assert any(line.startswith(f"--lora_model {adapter}: ") and lost in line for line in lines)
        assert not (tmp_path / "out").exists()


# Reward models


@pytest.mark.parametrize("model", ["tied", "untied", "conv1d"])
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_a_reward_model_gets_its_head(models, tmp_path, model, settings):
    base = models[model]
    adapter = make_adapter(base, tmp_path / "adapter", reward=True, **settings)
    result = merged(base, adapter, output=tmp_path / "out")
    head = load_file(adapter / ADAPTER)["base_model.model.score.weight"]
    assert torch.equal(result["score.weight"], head) and head.shape == (1, 32)
    assert result.keys() == (tensors_of(base).keys() - {HEAD}) | {"score.weight"}
    check_weights(base, adapter, result, classifier)
    check_answers(base, adapter, tmp_path / "out", classifier)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"][0].endswith("ForSequenceClassification") and len(config["id2label"]) == 1


def test_a_reward_model_loads_as_the_stages_load_it(tiny_base, tmp_path):
    from stagecraft import models

    adapter = make_adapter(tiny_base, tmp_path / "adapter", reward=True)
    result = merged(tiny_base, adapter, output=tmp_path / "out")
    model = models.load_reward(str(tmp_path / "out"))
    assert torch.equal(model.score.weight.cpu(), result["score.weight"])
    assert model.config.pad_token_id is not None


# Several adapters, and weights


@pytest.fixture(scope="module")
def pair(tiny_base, tmp_path_factory) -> list[Path]:
    """Two adapters of different rank, alpha, scaling and modules."""
    folder = tmp_path_factory.mktemp("pair")
    other = {"r": 2, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj", "o_proj"]}
    return [
        make_adapter(tiny_base, folder / "a"),
        make_adapter(tiny_base, folder / "b", seed=1, **other),
    ]


def test_several_adapters_add_up_as_in_peft(tiny_base, pair, tmp_path):
    """add_weighted_adapter's cat: W + 0.7 dW_A + 0.3 dW_B, where its linear would mix A's and B's factors."""
    one, other = pair
    model = with_adapter(tiny_base, one)
    model.load_adapter(other, "other")
    model.add_weighted_adapter(["default", "other"], [0.7, 0.3], "sum", combination_type="cat")
    model.set_adapter("sum")
    by_peft = model.merge_and_unload().state_dict()
    result, before = (
        merged(tiny_base, one, other, weights=[0.7, 0.3], output=tmp_path / "out"),
        tensors_of(tiny_base),
    )
    for name in before:
        assert gap(result[name], by_peft[name]) < 1e-6
    module = "model.layers.0.self_attn.q_proj"
    a, b = loras_of(one)[module], loras_of(other)[module]
    exact = before[f"{module}.weight"].double() + 0.7 * ALPHA / RANK * (a["B"].double() @ a["A"].double())
    exact += 0.3 * 3 / 2**0.5 * (b["B"].double() @ b["A"].double())
    torch.testing.assert_close(result[f"{module}.weight"].double(), exact, rtol=1e-7, atol=0)
    # Control: the order of the weights matters, and so do the weights.
    for number, weights in enumerate(([0.3, 0.7], None)):
        wrong = merged(tiny_base, one, other, weights=weights, output=tmp_path / f"wrong{number}")
        assert gap(wrong[f"{module}.weight"], result[f"{module}.weight"]) > 1e-2


@pytest.mark.parametrize("weight", [0.5, 0, -1.5])
def test_one_adapter_may_have_a_weight(tiny_base, pair, tmp_path, weight):
    result, full = (
        merged(tiny_base, pair[0], weights=[weight], output=tmp_path / "out"),
        merged(tiny_base, pair[0], output=tmp_path / "full"),
    )
    rounded = (
        1 + abs(weight)
    ) * 2**-26  # the result's, and the full merge's times the weight: all are below 0.5
    for name, before in tensors_of(tiny_base).items():
        exact = before.double() + weight * (full[name].double() - before.double())
        torch.testing.assert_close(result[name].double(), exact, rtol=0, atol=rounded)


@pytest.mark.parametrize(
    "settings",
    [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}],
    ids=["DoRA", "modules_to_save", "bias"],
)
def test_what_replaces_can_not_be_weighed(models, tmp_path, settings):
    base = models["biased"]
    adapter = make_adapter(base, tmp_path / "adapter", **settings)
    again = Path(shutil.copytree(adapter, tmp_path / "again"))
    for adapters, weights in (([adapter], [0.5]), ([adapter, again], None)):
        lines = told(merged, base, *adapters, weights=weights, output=tmp_path / "out")
        assert re.fullmatch(
            rf"--lora_model {re.escape(str(adapter))}: replaces \S+ \(modules_to_save, bias or DoRA\), which can't be "
            r"weighed against another value; only plain LoRA can be merged with --weights or with others",
            lines[0],
        )
    assert not (tmp_path / "out").exists()


# Quantised while it trained


@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_of_a_quantised_base_goes_into_the_full_one(tiny_base, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    settings = {
        4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        8: {"load_in_8bit": True},
    }[bits]

    def quantised(base: Path):
        model = causal(base, quantization_config=BitsAndBytesConfig(**settings))
        assert "bnb" in type(model.model.layers[0].self_attn.q_proj).__module__ or (
            "bitsandbytes" in type(model.model.layers[0].self_attn.q_proj).__module__
        )
        return model

    adapter = make_adapter(tiny_base, tmp_path / "adapter", load=quantised)
    assert len(loras_of(adapter)) == 14
    result = merged(tiny_base, adapter, output=tmp_path / "out")
    assert all("_proj" in name for name in check_weights(tiny_base, adapter, result))
    assert {tensor.dtype for tensor in result.values()} == {torch.float32}
    check_answers(tiny_base, adapter, tmp_path / "out")
