"""Every kind of adapter and every precision through every stage: what was trained is what the merged folder says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adapters import ADAPTER, causal, classifier, copy_model, tensors_of
from kinds import bases_of, history, losses, rows_of, running, train, trained
from stagecraft.arguments import LoraArguments, ModelArguments, parse
from stagecraft.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")

KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "DoRA": {"use_dora": True},
    "rsLoRA": {
        "use_rslora": True,
        "lora_alpha": 12,
    },  # a scale of 3, LoRA's is 2; with 8 three steps overshoot
    "4-bit": {"load_in_4bit": True},
    "8-bit": {"load_in_8bit": True},
    "full": {"use_peft": False},
}
# name -> (dtype of the base's files, flags)
PRECISIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp32": ("float32", {}),
    "mixed": ("float32", {"bf16": True}),
    "bf16": ("bfloat16", {"bf16": True}),
    "pure bf16": ("bfloat16", {}),
    "fp16": ("float16", {}),
    "cast to fp16": ("float32", {"torch_dtype": "float16"}),
}
# Every stage with every kind, every stage with every precision, and the pairs that are most likely to break.
CHOSEN = {
    "pt": {
        "LoRA": ["fp16"],
        "DoRA": ["cast to fp16"],
        "rsLoRA": ["bf16"],
        "4-bit": ["fp32"],
        "8-bit": ["pure bf16"],
        "full": ["mixed"],
    },
    "sft": {
        "LoRA": ["bf16"],
        "DoRA": ["fp16"],
        "rsLoRA": ["cast to fp16"],
        "4-bit": ["mixed", "fp16"],
        "8-bit": ["fp32"],
        "full": ["pure bf16"],
    },
    "rm": {
        "LoRA": list(PRECISIONS),
        "DoRA": ["fp16"],
        "rsLoRA": ["mixed"],
        "4-bit": ["fp32", "fp16", "bf16"],
        "8-bit": ["cast to fp16"],
        "full": ["bf16"],
    },
    "dpo": {
        "LoRA": ["fp32"],
        "DoRA": ["fp16"],
        "rsLoRA": ["pure bf16"],
        "4-bit": ["mixed", "bf16", "fp16"],
        "8-bit": ["cast to fp16"],
        "full": ["fp32"],
    },
}
CASES = [
    (stage, kind, name)
    for stage, kinds in CHOSEN.items()
    for kind, names in kinds.items()
    for name in names
    if kind != "full"
]
FULL = [(stage, name) for stage, kinds in CHOSEN.items() for name in kinds["full"]]
# Merged with the whole proof, whose process of its own takes six seconds; each kind once.
PROVEN = [
    ("sft", "LoRA", "bf16"),
    ("pt", "DoRA", "cast to fp16"),
    ("dpo", "rsLoRA", "pure bf16"),
    ("rm", "4-bit", "fp16"),
    ("rm", "8-bit", "cast to fp16"),
]
# The share by which answers may differ for rounding: PEFT adds two products, a merge rounds the sum of two weights.
ROUNDING = {"float32": 1e-5, "float16": 3e-3, "bfloat16": 3e-2}


@pytest.fixture(scope="module")
def bases(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return bases_of(tiny_base, tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def data(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    return rows_of(tiny_base, tmp_path_factory.mktemp("data"))


# ---- Adapters


def answers(model: Any) -> torch.Tensor:
    """Logits, or scores, of six texts."""
    with torch.inference_mode():
        texts = [(torch.arange(24)[None] * step + 5) % 380 for step in (7, 11, 13, 17, 19, 23)]
        return torch.stack([model.eval()(input_ids=text).logits.float() for text in texts])


def gap(one: torch.Tensor, other: torch.Tensor) -> float:
    """How far apart, as a share of the other's length."""
    return ((one - other).norm() / other.norm()).item()


def adapted(stage: str, base: Path, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Answers of base + adapter as PEFT has them, and of the same with the LoRA part off (a trained head stays)."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    model = PeftModel.from_pretrained((classifier if stage == "rm" else causal)(base), folder / "adapter")
    found = answers(model)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.enable_adapters(False)
    return found, answers(model)


@pytest.mark.parametrize(("stage", "kind", "precision"), CASES)
def test_the_merged_folder_answers_as_base_and_adapter_do(
    bases: dict[str, Path], data: dict, tmp_path: Path, stage: str, kind: str, precision: str
) -> None:
    dtype, flags = PRECISIONS[precision]
    folder = trained(stage, bases[dtype], data[stage], tmp_path / "run", **KINDS[kind], **flags)
    assert losses(folder)[-1] < losses(folder)[0]
    if stage == "dpo":  # the policy starts as its own reference, which is the adapter switched off
        assert losses(folder)[0] == pytest.approx(math.log(2), abs=1e-3)
    assert {tensor.dtype for tensor in load_file(folder / "adapter" / ADAPTER).values()} == {torch.float32}
    proof = [] if (stage, kind, precision) in PROVEN else ["--no_validate"]
    ended = running.run(running.MERGE, folder, proof)
    assert ended.status == 0 and (folder / "DONE").exists(), ended

    merged = (classifier if stage == "rm" else causal)(folder / "model")
    assert str(merged.dtype) == f"torch.{dtype}"
    wanted, untouched = adapted(stage, bases[dtype], folder)
    assert gap(answers(merged), wanted) < ROUNDING[dtype]
    assert gap(untouched, wanted) > 5 * ROUNDING[dtype]


@pytest.mark.parametrize("kind", ["LoRA", "4-bit", "8-bit"])
def test_an_evaluation_leaves_training_as_it_is(
    tiny_base: Path, data: dict, tmp_path: Path, kind: str
) -> None:
    """On some CPUs bitsandbytes changes 4-bit weights in evaluation, from a width of 64 on in silence."""
    base = copy_model(tiny_base, tmp_path / "wide", hidden_size=64, head_dim=32, intermediate_size=128)
    plain = losses(trained("sft", base, data["sft"], tmp_path / "plain", **KINDS[kind]))
    watched = {**KINDS[kind], "eval_strategy": "steps", "eval_steps": 1}
    folder = trained("sft", base, data["sft"], tmp_path / "watched", **watched)
    assert losses(folder) == pytest.approx(plain, rel=1e-6)
    # Control: evaluations there were, and rows in another order are seen.
    assert sum("eval_loss" in row for row in history(folder)) == 3
    other = losses(trained("sft", base, data["sft"], tmp_path / "other", **KINDS[kind], seed=7))
    assert other != pytest.approx(plain, rel=1e-4)


def test_every_stage_meets_every_kind_and_every_precision() -> None:
    for kinds in CHOSEN.values():
        assert set(kinds) == set(KINDS)
        assert {name for names in kinds.values() for name in names} == set(PRECISIONS)


# ---- Every weight


@pytest.mark.parametrize(("stage", "precision"), FULL)
def test_the_saved_model_is_the_one_that_was_evaluated_last(
    bases: dict[str, Path], data: dict, tmp_path: Path, stage: str, precision: str
) -> None:
    """Training ends with an evaluation; a second run on its model begins with one, of the same rows."""
    dtype, flags = PRECISIONS[precision]
    flags = {**flags, **KINDS["full"], "eval_strategy": "steps", "eval_steps": 3, "eval_on_start": True}
    figure = (
        "eval_logps/chosen" if stage == "dpo" else "eval_loss"
    )  # DPO's loss is relative to where it started
    first = trained(stage, bases[dtype], data[stage], tmp_path / "first", **flags)
    ended = running.run(running.MERGE, first, [])
    assert ended.status == 0 and (first / "DONE").exists(), ended
    again = trained(stage, first / "model", data[stage], tmp_path / "again", **flags)
    start, end = (row[figure] for row in history(first) if figure in row)
    resumed = next(row[figure] for row in history(again) if figure in row)
    assert resumed == pytest.approx(end, rel=1e-6)
    assert start != pytest.approx(end, rel=1e-3)
    tensors = tensors_of(first / "model")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {f"torch.{dtype}"}


# ---- fp16


@pytest.mark.parametrize("stage", CHOSEN)
def test_fp16_autocast_without_cuda_is_refused_before_the_model_is_loaded(
    bases: dict[str, Path], data: dict, tmp_path: Path, stage: str
) -> None:
    """Accelerate would leave it out in silence. (Without the flag all of these train, see above.)"""
    flags = {"bf16": False, "fp16": True, "use_cpu": True}
    ended = train(stage, bases["float32"], data[stage], tmp_path / "run", **flags)
    assert ended.status == 2
    assert ended.lines[-1] == "--fp16 needs CUDA; here use --bf16 true, or neither"
    assert not any("trainable" in line for line in ended.lines)


LOST = "which float16 weights do not survive: load them in another dtype (--torch_dtype float32 or bfloat16)"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"use_peft": False}, f"--use_peft false trains every weight, {LOST}"),
        ({"modules_to_save": "embed_tokens"}, f"--modules_to_save trains whole weights, {LOST}"),
    ],
)
def test_weights_that_would_be_trained_in_float16_are_refused(
    bases: dict[str, Path], data: dict, tmp_path: Path, flags: dict[str, Any], told: str
) -> None:
    asked = train("sft", bases["float32"], data["sft"], tmp_path / "asked", torch_dtype="float16", **flags)
    assert (asked.status, asked.lines) == (2, [told])  # at once: nothing was read
    saved = train("sft", bases["float16"], data["sft"], tmp_path / "saved", **flags)
    assert (saved.status, saved.lines[-1]) == (2, told)
    # Control: the same files in another dtype.
    trained("sft", bases["float16"], data["sft"], tmp_path / "cast", torch_dtype="float32", **flags)


def test_deepspeed_trains_float16_weights_through_its_own_fp32_copy() -> None:
    words = ["--model_name_or_path", "M", "--torch_dtype", "float16", "--use_peft", "false"]
    parse("a stage", ModelArguments, LoraArguments, trainer="transformers", argv=[*words, "--deepspeed", "Z"])
    with pytest.raises(UserError):
        parse("a stage", ModelArguments, LoraArguments, trainer="transformers", argv=words)


# ---- The reward head


def test_a_small_step_moves_every_weight_of_the_head_on_a_16_bit_base(
    bases: dict[str, Path], data: dict, tmp_path: Path
) -> None:
    heads = []
    for steps in (1, 3):
        flags = {"max_steps": steps, "learning_rate": 1e-5}
        folder = trained("rm", bases["bfloat16"], data["rm"], tmp_path / f"{steps}", **flags)
        tensors = load_file(folder / "adapter" / ADAPTER)
        heads.append(next(tensor for name, tensor in tensors.items() if "score" in name))
    one, three = heads
    assert (one != three).float().mean() > 0.99
    # Control: in bf16 two steps are too small to be seen.
    assert (one.bfloat16() != three.bfloat16()).float().mean() < 0.3


# ---- Losses over words: NEFTune and label smoothing


@pytest.mark.parametrize("stage", ["pt", "sft"])
def test_neftune_is_noise_in_training_and_nowhere_else(
    bases: dict[str, Path], data: dict, tmp_path: Path, stage: str
) -> None:
    base = bases["float32"]
    watched = {**KINDS["full"], "eval_strategy": "steps", "eval_steps": 3, "learning_rate": 0}
    plain = trained(stage, base, data[stage], tmp_path / "plain", **watched)
    noisy = trained(stage, base, data[stage], tmp_path / "noisy", **watched, neftune_noise_alpha=5)
    assert all(one != other for one, other in zip(losses(plain), losses(noisy), strict=True))
    evaluated = [[row["eval_loss"] for row in history(run) if "eval_loss" in row] for run in (plain, noisy)]
    assert evaluated[0] == evaluated[1] and len(evaluated[0]) == 1
    # Nothing was learned, so what is saved is the base to the bit, and computes as it does.
    before, after = tensors_of(base), tensors_of(noisy / "model")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(answers(causal(noisy / "model")), answers(causal(base)))
    assert "neftune" not in (noisy / "model" / "config.json").read_text()
    # Control: where something is learned, it is learned through the noise.
    watched["learning_rate"] = 1e-3
    moved = trained(stage, base, data[stage], tmp_path / "moved", **watched, neftune_noise_alpha=5)
    assert any(not torch.equal(before[name], tensor) for name, tensor in tensors_of(moved / "model").items())


@pytest.mark.parametrize("stage", ["pt", "sft"])
def test_label_smoothing_mixes_in_every_word(
    bases: dict[str, Path], data: dict, tmp_path: Path, stage: str
) -> None:
    """(1 - e) * loss + e * (mean over all words): linear in e, and the same however a batch is cut up."""
    found = {}
    for factor in (0, 0.1, 0.4):
        flags = {"learning_rate": 0, "label_smoothing_factor": factor}
        found[factor] = losses(trained(stage, bases["float32"], data[stage], tmp_path / f"{factor}", **flags))
    for none, some, more in zip(*found.values(), strict=True):
        assert abs(some - none) > 1e-5
        assert more - none == pytest.approx(4 * (some - none), rel=0.02)
    flags |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    cut = losses(trained(stage, bases["float32"], data[stage], tmp_path / "cut", **flags))
    assert cut == pytest.approx(found[0.4], rel=1e-5)
