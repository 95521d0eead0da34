"""The proof finds what is wrong with a written model and names it; nothing that failed has a name that loads."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters import (
    ALPHA,
    RANK,
    WEIGHTS,
    causal,
    configure,
    copy_model,
    loras_of,
    make_adapter,
    merged,
    new_model,
    plan_of,
    reweigh,
    tensors_of,
    told,
)
from stagecraft.errors import ProofFailed
from stagecraft.merging import behaviour, making
from stagecraft.merging.behaviour import Question
from stagecraft.merging.making import Proof

NORM, QUERY = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"
KEY = QUERY.replace("q_", "k_")


@pytest.fixture(scope="module")
def adapter(tiny_base, tmp_path_factory) -> Path:
    """Touches q_proj only."""
    folder = tmp_path_factory.mktemp("lora") / "adapter"
    return make_adapter(tiny_base, folder, target_modules=["q_proj"])


@pytest.fixture
def older(tmp_path) -> Path:
    """An output folder with a model of before."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    (tmp_path / "out" / WEIGHTS).write_bytes(b"older")
    return tmp_path / "out"


@pytest.fixture
def merge_lora(monkeypatch):
    """merge_lora(*flags) is `merge_lora.py FLAGS` in this process; returns the exit status."""
    import merge_lora as script
    from stagecraft.errors import run_main

    def call(*flags) -> int:
        monkeypatch.setattr(sys, "argv", ["merge_lora.py", *map(str, flags)])
        try:
            run_main(script.main)
        except SystemExit as end:
            return end.code
        return 0

    return call


@pytest.fixture
def no_behaviour(monkeypatch):
    """The two checks before it are the point, and it costs six seconds."""
    figures = {"gap_to_adapter": 0.0, "gap_to_base": 1.0, "tokens": 1, "limit": 0.5}
    figures["device"] = "cpu"
    monkeypatch.setattr(behaviour, "check_behaviour", lambda question: dict(figures))


@pytest.fixture
def behaviour_here(monkeypatch):
    """The behaviour check in this process, where transformers is imported already: 0.3 s."""

    def check(question: Question) -> dict:
        figures = behaviour._compare(question)
        behaviour._judge(figures, question)
        return figures

    monkeypatch.setattr(behaviour, "check_behaviour", check)


def check_failed(output: Path) -> None:
    """What is left of a failed merge: the older model as it was, and the new one where nothing loads it."""
    assert (output / WEIGHTS).read_bytes() == b"older" and (output / "config.json").read_text() == "{}"
    failed = output.with_name(f"{output.name}.failed")
    assert (failed / WEIGHTS).exists() and not (failed / "config.json").exists()
    with pytest.raises((OSError, ValueError)):
        causal(failed)
    assert {path.name for path in output.parent.iterdir()} <= {output.name, failed.name, "adapter", "base"}


# Tampered between writing and proof


def two_units(tensor: torch.Tensor) -> torch.Tensor:
    changed = tensor.clone()
    changed.view(torch.int32).view(-1)[3] += 2
    return changed


def one_bit(tensor: torch.Tensor) -> torch.Tensor:
    changed = tensor.clone()
    changed.view(torch.int32).view(-1)[3] ^= 1
    return changed


@pytest.mark.parametrize(
    ("name", "tamper", "message"),
    [
        (QUERY, two_units, f"{QUERY}: [0, 3] is "),
        (QUERY, lambda t: t.fill_(math.inf), f"{QUERY}: [0, 0] is inf, but base and adapter give "),
        (QUERY, lambda t: t.fill_(math.nan), f"{QUERY}: [0, 0] is nan, but base and adapter give "),
        (QUERY, lambda t: t.T.contiguous(), f"{QUERY}: "),
        (NORM, one_bit, f"{NORM}: changed, though no adapter touches it"),
        (KEY, one_bit, f"{KEY}: changed, though no adapter touches it"),
        (NORM, lambda t: None, f"{NORM}: is not in {WEIGHTS}"),
        (NORM, lambda t: t.bfloat16(), f"{NORM}: BF16 [32] instead of F32 [32]"),
        (NORM, lambda t: t[:-1].clone(), f"{NORM}: F32 [31] instead of F32 [32]"),
        (NORM, lambda t: t[None].clone(), f"{NORM}: F32 [1, 32] instead of F32 [32]"),
        (
            "model.extra.weight",
            lambda t: torch.ones(1),
            f"model.extra.weight: is in {WEIGHTS}, but belongs to no such model",
        ),
    ],
)
def test_a_tampered_tensor_is_found_and_named(
    tiny_base, adapter, older, merge_lora, monkeypatch, capsys, no_behaviour, name, tamper, message
):
    prove = making.prove

    def tamper_and_prove(plan, folder, proof):
        tensors = load_file(folder / WEIGHTS)
        changed = tamper(tensors.pop(name, None))
        save_file(tensors | ({} if changed is None else {name: changed}), folder / WEIGHTS, {"format": "pt"})
        return prove(plan, folder, proof)

    monkeypatch.setattr(making, "prove", tamper_and_prove)
    assert merge_lora(adapter, "-o", older, "--overwrite_output_dir") == 1
    [line, kept] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"proof failed: {message}")
    assert kept == f"what was written is in {older}.failed, without config.json so that nothing loads it"
    check_failed(older)
    # Control, and what failed is no obstacle to the next.
    monkeypatch.setattr(making, "prove", prove)
    assert merge_lora(adapter, "-o", older, "--overwrite_output_dir") == 0
    assert load_file(older / WEIGHTS).keys() == tensors_of(tiny_base).keys()


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (
            lambda folder: (folder / "adapter_config.json").write_text("{}"),
            "adapter_config.json is still there: this is no complete model",
        ),
        (
            lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-4]),
            f"{WEIGHTS} is cut off: ",
        ),
        (lambda folder: (folder / WEIGHTS).unlink(), "no *.safetensors there"),
    ],
    ids=["adapter_config", "cut off", "gone"],
)
def test_a_tampered_folder_is_found(adapter, older, merge_lora, monkeypatch, capsys, tamper, message):
    prove = making.prove
    monkeypatch.setattr(
        making, "prove", lambda plan, folder, proof: (tamper(folder), prove(plan, folder, proof))[1]
    )
    assert merge_lora(adapter, "-o", older, "--overwrite_output_dir") == 1
    assert capsys.readouterr().err.startswith(f"proof failed: {message}")
    assert (older / WEIGHTS).read_bytes() == b"older" and not (
        older.parent / "out.failed" / "config.json"
    ).exists()


def test_a_result_without_the_adapter_is_found(tiny_base, adapter, older, merge_lora, monkeypatch, capsys):
    prove = making.prove

    def swap_and_prove(plan, folder, proof):
        shutil.copy(tiny_base / WEIGHTS, folder)
        return prove(plan, folder, proof)

    monkeypatch.setattr(making, "prove", swap_and_prove)
    assert merge_lora(adapter, "-o", older, "--overwrite_output_dir") == 1
    first = QUERY.replace(".1.", ".0.")
    assert capsys.readouterr().err.startswith(f"proof failed: {first}: [0, 0] is ")
    check_failed(older)


# Numbers


def test_a_nan_in_the_adapter_is_found(tiny_base, adapter, older, merge_lora, capsys):
    own = Path(shutil.copytree(adapter, older.parent / "adapter"))
    name = f"base_model.model.{QUERY.removesuffix('.weight')}.lora_A.weight"
    reweigh(own, lambda tensors: tensors[name][0].fill_(math.nan))
    assert merge_lora(own, "-o", older, "--overwrite_output_dir", "--no_validate") == 1
    assert capsys.readouterr().err.startswith(
        f"proof failed: {QUERY}: not every number is finite in float32 after merging (rows 0 to 31: nan to nan)\n"
    )
    check_failed(older)


@pytest.mark.parametrize("name", ["lm_head", "model.norm"])
def test_a_nan_in_a_module_trained_in_full_is_found(tiny_base, tmp_path, name):
    adapter = make_adapter(tiny_base, tmp_path / "adapter", modules_to_save=[name])
    reweigh(adapter, lambda t: t[f"base_model.model.{name}.weight"].view(-1)[-1].fill_(math.nan))
    with pytest.raises(ProofFailed, match=rf"{name}\.weight: not every number is finite"):
        merged(tiny_base, adapter, output=tmp_path / "out")


def test_what_float16_can_not_hold_is_found(tiny_base, adapter, older, merge_lora, capsys):
    base = Path(shutil.copytree(tiny_base, older.parent / "base"))
    adapter = configure(
        Path(shutil.copytree(adapter, older.parent / "adapter")), base_model_name_or_path="elsewhere"
    )
    reweigh(base, lambda tensors: tensors[KEY][2].fill_(70000.0), WEIGHTS)
    flags = (adapter, "--base_model", base, "-o", older, "--overwrite_output_dir", "--dtype", "float16")
    assert merge_lora(*flags) == 1
    assert capsys.readouterr().err.startswith(
        f"proof failed: {KEY}: not every number is finite in float16 after merging (rows 0 to 15: "
    )
    check_failed(older)
    assert merge_lora(*flags[:-1], "bfloat16", "--no_validate") == 0  # control


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rounding_is_the_nearest(tiny_base, tmp_path, dtype):
    """Every element is at most half a unit in the last place from the float64 result."""
    from stagecraft.merging.proof import last_place

    adapter = make_adapter(tiny_base, tmp_path / "adapter")
    result, before = merged(tiny_base, adapter, output=tmp_path / "out", dtype=dtype), tensors_of(tiny_base)
    loras, code = loras_of(adapter), {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]
    assert {str(tensor.dtype) for tensor in result.values()} == {f"torch.{dtype}"}
    worst = 0.0
    for name, tensor in before.items():
        exact, parts = tensor.double(), loras.get(name.removesuffix(".weight"))
        if parts:
            exact = exact + ALPHA / RANK * (parts["B"].double() @ parts["A"].double())
        off = (result[name].double() - exact).abs() / last_place(exact, code)
        assert off.max() <= 0.5001, name
        worst = max(worst, off.max().item())
        if parts:  # control: adding in the dtype itself rounds more than once
            change = ALPHA / RANK * (parts["B"] @ parts["A"]).to(tensor.dtype)
            twice = tensor.to(result[name].dtype) + change.to(result[name].dtype)
            assert (
                dtype == "float32" or ((twice.double() - exact).abs() / last_place(exact, code)).max() > 0.55
            )
    assert worst > 0.49


def test_the_unit_in_the_last_place_is_that_of_torch():
    from stagecraft.merging.proof import last_place

    for code, dtype in (("BF16", torch.bfloat16), ("F16", torch.float16), ("F32", torch.float32)):
        for value in (1.0, 0.7, 3.14159, 1e-3, 255.0, torch.finfo(dtype).tiny):
            number = torch.tensor(value, dtype=dtype)
            after = torch.nextafter(number, torch.tensor(math.inf, dtype=dtype)) if code == "F32" else None
            if after is None:
                bits = number.view(torch.int16) + 1
                after = bits.view(dtype)
            step = after.double() - number.double()
            assert last_place(number.double(), code).item() == step.item()


# Behaviour


def question(**settings) -> Question:
    return Question(Path("b"), [Path("a")], [1.0], Path("m"), **{"dtype": "float32", **settings})


@pytest.mark.parametrize(
    ("dtype", "reward", "gap", "message"),
    [
        ("float32", False, 1.1e-6, "the merged model is 1.1e-06 (KL a token) away from base + adapter"),
        ("bfloat16", False, 1.1e-2, "the limit in bfloat16 is 0.01; the base alone is 0.5 away"),
        ("float16", False, 1.1e-2, "the limit in float16 is 0.01"),
        ("float32", False, math.nan, "the merged model is nan (KL a token) away"),
        ("float32", True, 1.1e-4, "the merged model is 0.00011 (scores) away from base + adapter"),
    ],
)
def test_a_model_that_answers_otherwise_fails(dtype, reward, gap, message):
    with pytest.raises(ProofFailed) as caught:
        behaviour._judge({"gap_to_adapter": gap, "gap_to_base": 0.5}, question(dtype=dtype, reward=reward))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "reward", "gap"),
    [
        ("float32", False, 0.9e-6),
        ("bfloat16", False, 0.9e-2),
        ("float32", True, 0.9e-4),
        ("float32", False, 0),
    ],
)
def test_a_model_that_answers_as_it_should_passes(dtype, reward, gap):
    figures = {"gap_to_adapter": gap, "gap_to_base": 0.1}
    behaviour._judge(figures, question(dtype=dtype, reward=reward))
    assert figures["limit"] > gap


def test_kl_is_that_of_torch_and_zero_only_for_the_same():
    torch.manual_seed(0)
    p, q = [torch.randn(n, 30) for n in (3, 40)], [torch.randn(n, 30) for n in (3, 40)]
    one, other = torch.cat(p).double().log_softmax(-1), torch.cat(q).double().log_softmax(-1)
    wanted = (one.exp() * (one - other)).sum() / 43
    assert behaviour.kl(p, q) == pytest.approx(wanted.item(), rel=1e-12)
    assert behaviour.kl(p, p) == 0 and behaviour.kl(q, p) != pytest.approx(wanted.item(), rel=1e-3)
    assert behaviour.kl(p, [t + 5 for t in p]) == pytest.approx(0, abs=1e-12)  # the same words all the same
    assert math.isnan(behaviour.kl(p, [t * math.nan for t in p]))


def test_a_wrong_scale_is_found_though_plan_and_file_agree(tiny_base, adapter, older):
    """The arithmetic is held against PEFT's, not against itself."""
    plan = plan_of(tiny_base, adapter)
    for output in plan.outputs:
        for lora in output.loras:
            lora.scale *= 1.3
    with pytest.raises(
        ProofFailed, match=r"the merged model is \S+ \(KL a token\) away from base \+ adapter, the limit"
    ):
        making.make_model(plan, older, Proof("cpu"))
    check_failed(older)


TRUE_MERGES = {
    "LoRA": ({}, {}),
    "untrained": ({"strength": 0.0}, {}),
    "untrained on the embedding": ({"strength": 0.0, "target_modules": ["q_proj", "embed_tokens"]}, {}),
    "untrained reward": ({"strength": 0.0, "reward": True}, {}),
    "untrained in full": ({"strength": 0.0, "modules_to_save": ["lm_head"]}, {}),
    "untrained orthogonal": ({"strength": 0.0, "init_lora_weights": "orthogonal"}, {}),
    "untrained DoRA": ({"strength": 0.0, "use_dora": True}, {}),
    "reward": ({"reward": True}, {}),
    "reward with DoRA": ({"reward": True, "use_dora": True}, {}),
    "tied head apart": ({"target_modules": ["q_proj", "lm_head"]}, {}),
    "tied embedding apart": ({"target_modules": ["q_proj", "embed_tokens"]}, {}),
    "tied in full": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, {}),
    "weight 0.5": ({}, {"weights": [0.5]}),
    "weight 0": ({}, {"weights": [0.0]}),
    "to bfloat16": ({}, {"dtype": "bfloat16"}),
    "to float16": ({}, {"dtype": "float16"}),
}


@pytest.mark.parametrize("case", TRUE_MERGES)
@pytest.mark.filterwarnings("ignore")
def test_a_true_merge_passes(tiny_base, tmp_path, behaviour_here, case):
    """Nothing is refused that is right, least of all what an adapter hardly changes."""
    settings, merging = TRUE_MERGES[case]
    adapter = make_adapter(tiny_base, tmp_path / "adapter", **settings)
    making.make_model(plan_of(tiny_base, adapter, **merging), tmp_path / "out", Proof("cpu"))
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1.0, 1.0], [1.0, -1.0]], ids=str)
def test_a_true_merge_of_two_passes(tiny_base, tmp_path, behaviour_here, weights):
    other = {"r": 2, "use_rslora": True, "target_modules": ["q_proj"]}
    adapters = [
        make_adapter(tiny_base, tmp_path / "adapter", target_modules=["q_proj", "up_proj"]),
        make_adapter(tiny_base, tmp_path / "b", seed=1, **other),
    ]
    making.make_model(plan_of(tiny_base, *adapters, weights=weights), tmp_path / "out", Proof("cpu"))
    # Control: other weights are another model.
    plan = plan_of(tiny_base, *adapters, weights=[0.9, 0.1])
    plan.weights = weights
    with pytest.raises(ProofFailed, match="away from base"):
        making.make_model(plan, tmp_path / "wrong", Proof("cpu"))


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_true_merge_into_sixteen_bits_passes(tiny_base, tmp_path, behaviour_here, dtype):
    """Kept as they are, and widened: the base in 16 bits computes otherwise than the result in 32."""
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    causal(tiny_base, dtype=torch.bfloat16).save_pretrained(base)
    adapter = make_adapter(base, tmp_path / "adapter")
    making.make_model(plan_of(base, adapter, dtype=dtype), tmp_path / "out", Proof("cpu"))
    kept = {"auto": torch.bfloat16, "float32": torch.float32}[dtype]
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {kept}


def test_a_change_that_rounding_takes_away_is_told(tiny_base, tmp_path, behaviour_here, capsys):
    """The numbers are right and the merge is not worth having: the user must hear of it."""
    adapter = make_adapter(tiny_base, tmp_path / "adapter", strength=1e-4)
    making.make_model(plan_of(tiny_base, adapter, dtype="bfloat16"), tmp_path / "out", Proof("cpu"))
    assert "\nnote        the adapter changes too little" in capsys.readouterr().out
    control = make_adapter(tiny_base, tmp_path / "control")
    making.make_model(plan_of(tiny_base, control), tmp_path / "other", Proof("cpu"))
    assert "\nnote " not in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_true_merge_of_a_resized_vocabulary_passes(tiny_base, tmp_path, behaviour_here, tied):
    base = tiny_base if tied else copy_model(tiny_base, tmp_path / "base", tie_word_embeddings=False)

    def resized(folder: Path):
        model = causal(folder)
        model.resize_token_embeddings(507, mean_resizing=False)
        return model

    adapter = make_adapter(base, tmp_path / "adapter", load=resized)
    making.make_model(plan_of(base, adapter), tmp_path / "out", Proof("cpu"))
    assert causal(tmp_path / "out").lm_head.weight.shape == (507, 32)


def test_a_true_merge_into_a_classifier_passes(tiny_base, tmp_path, behaviour_here):
    """Its head has as many rows as it has labels, in the base already."""
    from transformers import AutoModelForSequenceClassification

    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    torch.manual_seed(5)
    AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=3).save_pretrained(base)
    adapter = make_adapter(
        base, tmp_path / "adapter", True, load=AutoModelForSequenceClassification.from_pretrained
    )
    making.make_model(plan_of(base, adapter), tmp_path / "out", Proof("cpu"))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.score.weight.shape == (3, 32)


def test_a_true_merge_of_a_model_with_few_positions_passes(tiny_base, tmp_path, behaviour_here):
    """Where positions are learned, a text must not be longer than there are any."""
    from transformers import GPT2Config

    size = {"n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 2}
    config = GPT2Config(vocab_size=500, eos_token_id=0, bos_token_id=0, **size)
    base = new_model(tiny_base, tmp_path / "base", config)
    adapter = make_adapter(base, tmp_path / "adapter", fan_in_fan_out=True)
    making.make_model(plan_of(base, adapter), tmp_path / "out", Proof("cpu"))
    assert (tmp_path / "out" / "config.json").exists()


def test_a_proof_without_a_tokenizer_says_so(tiny_base, tmp_path):
    base = tmp_path / "base"
    causal(tiny_base).save_pretrained(base)
    adapter = make_adapter(base, tmp_path / "adapter")
    [line] = told(_prove, base, adapter, tmp_path / "out")
    assert line.startswith(f"--base_model {base}: no tokenizer")


def _prove(base: Path, adapter: Path, output: Path) -> None:
    plan = plan_of(base, adapter)
    making.check_room(plan, output, Proof("cpu"))
    making.make_model(plan, output, Proof("cpu"))


def test_what_the_proof_found_is_in_the_card(tiny_base, adapter, tmp_path, merge_lora, capsys):
    prompt = ("--test_prompt", "Hello?")
    assert merge_lora(adapter, "-o", tmp_path / "out", *prompt) == 0
    said = capsys.readouterr().out
    assert f"base model  {tiny_base}\n" in said and "proven to be base + adapter" in said
    assert "\nanswer      " in said and "limit 1e-06" in said and "bit-identical" in said
    card = (tmp_path / "out" / "README.md").read_text()
    table = [line for line in card.splitlines() if line.startswith("|")]
    assert any(line.startswith("| proof | ") and "KL a token from base + adapter" in line for line in table)
    assert card.count("\n|") == len(table) and all(line.endswith("|") for line in table)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
