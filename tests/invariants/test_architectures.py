"""Batches without padding, model by model: the same loss and gradients as padded ones, or padded with a word about it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from stagecraft.errors import UserError
from stagecraft.training import row_attention, trial
from stagecraft.training.padding import Padding, Rows
from stagecraft.training.scoring import Scoring

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What else each needs; with a window of 8 tokens rows of up to 23 are longer than it.
END_TO_END: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen2": {},
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2-windows": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "gemma3_text": {"sliding_window": 8},
    "phi3": {},
    "glm4": {},
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "cohere": {"logit_scale": 0.25},
    "olmo2": {},
    "smollm3": {},
    "gpt2": {"n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
PADDED = {"gemma2": "softcap", "gpt_oss": "s_aux", "bloom": "its own attention"}


def model_of(name: str, **more: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name.split("-")[0], **SMALL, **END_TO_END.get(name, {}), **more)
    config.dtype = None
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # far from their start, where models differ most from one another
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.train()


def batch() -> dict[str, Tensor]:
    """Five rows of 3 to 23 tokens, the first half of each not supervised."""
    sizes = [23, 3, 11, 17, 8]
    ids, mask = torch.zeros(5, 24, dtype=torch.long), torch.zeros(5, 24, dtype=torch.long)
    generator = torch.Generator().manual_seed(1)
    labels = torch.full_like(ids, -100)
    for row, size in enumerate(sizes):
        ids[row, :size] = torch.randint(3, 97, (size,), generator=generator)
        mask[row, :size] = 1
        labels[row, size // 2 : size] = ids[row, size // 2 : size]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def learnt(model: PreTrainedModel) -> tuple[float, Tensor]:
    """(loss, all gradients)."""
    loss = model(**batch()).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def same(one: tuple[float, Tensor], other: tuple[float, Tensor]) -> bool:
    off = (one[1] - other[1]).norm() / one[1].norm()
    return one[0] == pytest.approx(other[0], rel=1e-5) and off.item() < 1e-5


@pytest.mark.parametrize("name", END_TO_END)
def test_rows_end_to_end_are_learnt_as_padded_rows_are(name: str) -> None:
    model = model_of(name)
    padding, scoring = Padding(model), Scoring(model)
    lean = learnt(model)
    assert not padding.why_not and not scoring.why_not and padding.computed == 0
    assert padding.share == pytest.approx(1 - 62 / 120)
    assert same(lean, learnt(model_of(name)))


@pytest.mark.parametrize(("name", "word"), PADDED.items())
def test_what_has_no_such_form_is_padded_and_says_so(
    name: str, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_of(name)
    padding = Padding(model)
    Scoring(model)
    found = learnt(model)
    assert padding.computed == padding.share > 0.4
    assert padding.why_not.startswith("batches are padded (") and word in padding.why_not
    assert (
        name == "bloom" or padding.why_not in capsys.readouterr().out
    )  # the others are found out by the first batch
    assert same(found, learnt(model_of(name)))


def test_control_without_the_window_the_loss_differs() -> None:
    model = model_of("mistral")
    Padding(model)
    wide = model_of("mistral")
    wide.config.sliding_window = None
    for layer in wide.model.layers:
        layer.self_attn.sliding_window = None
    assert not same(learnt(model), learnt(wide))


def test_control_without_their_scales_the_losses_differ() -> None:
    model = model_of("granite")
    Scoring(model).transform = lambda logits: logits
    lean = learnt(model)  # the first batch shows it, and the model keeps its own loss
    assert same(lean, learnt(model_of("granite")))
    model = model_of("granite")
    blind = Scoring(model)
    blind.transform, blind.is_checked = lambda logits: logits, True
    assert not same(learnt(model), learnt(model_of("granite")))


def test_no_row_sees_another() -> None:
    """With a cache, transformers' own packed rows see each other, in silence; ours don't, whatever the configuration."""
    given = batch()
    other = given["input_ids"].clone()
    other[0, :23] = other[0, :23].flip(0)
    packed = Rows(given["attention_mask"])

    model = model_of("qwen3").eval()
    own = [
        model(input_ids=packed.joined(ids), position_ids=packed.positions, use_cache=True).logits[0, 23:]
        for ids in (given["input_ids"], other)
    ]
    assert (own[0] - own[1]).abs().max() > 0.1  # the leak

    model.config.use_cache = True
    Padding(model)
    ours = [
        model.model(input_ids=ids, attention_mask=given["attention_mask"]).last_hidden_state
        for ids in (given["input_ids"], other)
    ]
    assert torch.equal(ours[0][1:], ours[1][1:]) and not torch.equal(ours[0][0], ours[1][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["weights", "autocast"])
def test_rounding_is_not_taken_for_a_neighbour_and_a_neighbour_not_for_rounding(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, autocast: bool
) -> None:
    def looked_at() -> Padding:
        model = model_of("qwen3") if autocast else model_of("qwen3").to(dtype)
        padding = Padding(model)
        with torch.autocast("cpu", dtype, enabled=autocast and dtype != torch.float32):
            model(**batch())
        return padding

    assert looked_at().why_not == ""
    joined = Rows.__init__

    def careless(self: Rows, mask: Tensor) -> None:
        joined(self, mask)
        self.starts, self.longest = self.starts[[0, -1]], self.tokens

    monkeypatch.setattr(Rows, "__init__", careless)
    assert "rows end to end would change its states" in looked_at().why_not


def test_generation_is_the_models_own() -> None:
    """Samples may be drawn while a model trains."""
    model = model_of("qwen3").eval()
    prompt = {k: v[[0, 3], :8] for k, v in batch().items() if k != "labels"}
    before = model.generate(**prompt, max_new_tokens=6, do_sample=False)
    Padding(model)
    Scoring(model)
    assert torch.equal(model.generate(**prompt, max_new_tokens=6, do_sample=False), before)


def test_a_model_with_a_loss_of_its_own_keeps_it(capsys: pytest.CaptureFixture[str]) -> None:
    model = model_of("qwen3")
    own = model.forward

    def loud(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        if output.loss is not None:
            output["loss"] = 2 * output["loss"]
        return output

    model.forward = loud
    expected = model(**batch()).loss.item()
    scoring = Scoring(model)
    assert model(**batch()).loss.item() == pytest.approx(expected, rel=1e-6)
    assert scoring.why_not in capsys.readouterr().out and "loss: Qwen3ForCausalLM's own" in scoring.why_not


def test_smoothing_is_refused_where_the_loss_is_the_models_own() -> None:
    model = model_of("qwen3")
    model.config.output_router_logits = True
    assert Scoring(model).why_not and model.forward == Scoring(model).own_forward
    with pytest.raises(UserError, match="--label_smoothing_factor: not for Qwen3ForCausalLM"):
        Scoring(model, label_smoothing=0.1)


def test_a_trial_leaves_nothing_behind() -> None:
    model = model_of("qwen3")
    model.model.layers[1].eval()
    before = [part.training for part in model.modules()]
    random = torch.random.get_rng_state()
    with trial.trial(model):
        assert not any(part.training for part in model.modules()) and not torch.is_grad_enabled()
        model(**batch())
    assert [part.training for part in model.modules()] == before and torch.is_grad_enabled()
    assert torch.equal(torch.random.get_rng_state(), random)


def test_rows_are_joined_and_taken_apart() -> None:
    mask = torch.tensor([[0, 1, 1], [1, 0, 0], [1, 1, 1]])
    rows = Rows(mask)
    values = torch.arange(9.0).reshape(3, 3)
    assert rows.joined(values).tolist() == [[1, 2, 3, 6, 7, 8]]
    assert rows.positions.tolist() == [[0, 1, 0, 0, 1, 2]]
    assert rows.starts.tolist() == [0, 2, 3, 6] and rows.longest == 3
    assert torch.equal(rows.apart(rows.joined(values)), values * mask)


def test_attention_outside_a_padding_free_batch_is_transformers_own() -> None:
    row_attention.register()
    plain, ours = model_of("qwen3").eval(), model_of("qwen3").eval()
    ours.set_attn_implementation(row_attention.ROWS)
    given = {k: v for k, v in batch().items() if k != "labels"}
    assert torch.equal(plain(**given).logits, ours(**given).logits)
