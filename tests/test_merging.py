"""A merge is W + scale * BA and nothing else, proven after writing; whatever goes wrong leaves no model."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stagecraft import merging
from stagecraft.errors import UserError
from stagecraft.merging import Paths, check_inputs, check_written

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS, ADAPTER = "model.safetensors", "adapter_model.safetensors"
RANK, ALPHA = 4, 12


def make_adapter(base: Path, folder: Path, reward: bool = False, seed: int = 0, **settings) -> Path:
    """A LoRA adapter of the base as a stage leaves it, with weights as if trained."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    torch.manual_seed(seed)
    if reward:
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
        settings = {"task_type": "SEQ_CLS", "modules_to_save": ["score"], **settings}
    else:
        model = AutoModelForCausalLM.from_pretrained(base)
        settings = {"task_type": "CAUSAL_LM", **settings}
    settings = {"target_modules": "all-linear", **settings}
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return folder


def copy_model(base: Path, folder: Path, **changes) -> Path:
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


def merged(base: Path, adapter: Path, output: Path) -> dict[str, torch.Tensor]:
    paths = Paths(base, adapter, output)
    merging.merge(paths, check_inputs(paths), lambda line: None)
    return load_file(output / WEIGHTS)


def tensors_of(adapter: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Module -> its tensors by name, as the base spells the module."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(adapter / ADAPTER).items():
        module, _, part = name.removeprefix("base_model.model.").partition(".lora_")
        found.setdefault(module, {})[part.removesuffix(".weight")] = tensor
    return found


def told(function, *arguments) -> list[str]:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    return str(caught.value).splitlines()


@pytest.fixture(scope="module")
def adapter(tiny_base, tmp_path_factory) -> Path:
    return make_adapter(tiny_base, tmp_path_factory.mktemp("lora") / "adapter")


@pytest.fixture
def own_adapter(adapter, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(adapter, tmp_path / "adapter"))


@pytest.fixture
def merge_lora(monkeypatch, tmp_path):
    """merge_lora(*flags) is `merge_lora.py FLAGS` in this process."""
    import merge_lora as script

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["merge_lora.py", *map(str, flags)])
        script.main()

    return call


# The weights


@pytest.mark.parametrize(
    ("settings", "scale"),
    [({}, ALPHA / RANK), ({"use_rslora": True}, ALPHA / math.sqrt(RANK))],
    ids=["LoRA", "rsLoRA"],
)
def test_merged_weights_are_the_base_plus_scaled_ba(tiny_base, tmp_path, settings, scale):
    adapter = make_adapter(
        tiny_base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"], **settings
    )
    result, base, lora = (
        merged(tiny_base, adapter, tmp_path / "out"),
        load_file(tiny_base / WEIGHTS),
        tensors_of(adapter),
    )
    assert len(lora) == 4 and result.keys() == base.keys()
    for name, before in base.items():
        module = name.removesuffix(".weight")
        if module not in lora:
            assert torch.equal(result[name], before), name  # not a bit differs
            continue
        change = scale * (lora[module]["B"].double() @ lora[module]["A"].double())
        torch.testing.assert_close(result[name].double(), before.double() + change, rtol=0, atol=1e-7)
        # Control: the other scale, or none, would be found.
        wrong = ALPHA / math.sqrt(RANK) if scale == ALPHA / RANK else ALPHA / RANK
        assert (result[name].double() - before.double() - change * wrong / scale).abs().max() > 1e-4
        assert (result[name] - before).abs().max() > 1e-4


def test_dora_is_merged_by_the_formula_and_as_peft_does(tiny_base, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = make_adapter(tiny_base, tmp_path / "adapter", use_dora=True)
    result, base, lora = (
        merged(tiny_base, adapter, tmp_path / "out"),
        load_file(tiny_base / WEIGHTS),
        tensors_of(adapter),
    )
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), adapter)
    by_peft = model.merge_and_unload().state_dict()
    assert len(lora) == 14
    for name, before in base.items():
        torch.testing.assert_close(result[name], by_peft[name], rtol=0, atol=0)
        parts = lora.get(name.removesuffix(".weight"))
        if parts is None:
            assert torch.equal(result[name], before), name
            continue
        direction = before.double() + ALPHA / RANK * (parts["B"].double() @ parts["A"].double())
        expected = (
            parts["magnitude_vector"].double()[:, None] * direction / direction.norm(dim=1, keepdim=True)
        )
        torch.testing.assert_close(result[name].double(), expected, rtol=0, atol=1e-6)
        assert (result[name].double() - direction).abs().max() > 1e-4  # control: plain LoRA is something else


def test_a_reward_model_gets_its_head(tiny_base, tmp_path):
    from stagecraft import models

    adapter = make_adapter(tiny_base, tmp_path / "adapter", reward=True)
    result, base, lora = (
        merged(tiny_base, adapter, tmp_path / "out"),
        load_file(tiny_base / WEIGHTS),
        tensors_of(adapter),
    )
    head = load_file(adapter / ADAPTER)["base_model.model.score.weight"]
    assert torch.equal(result["score.weight"], head) and head.shape == (1, 32)
    assert result.keys() - base.keys() == {"score.weight"}
    for name, before in base.items():
        parts = lora.get(name.removesuffix(".weight"), {})
        change = ALPHA / RANK * (parts["B"].double() @ parts["A"].double()) if parts else 0
        torch.testing.assert_close(result[name].double(), before.double() + change, rtol=0, atol=1e-7)
    model = models.load_reward(str(tmp_path / "out"))
    assert torch.equal(model.score.weight.cpu(), head)


def test_a_module_trained_in_full_is_taken_over(tiny_base, tmp_path):
    untied = copy_model(tiny_base, tmp_path / "untied", tie_word_embeddings=False)
    adapter = make_adapter(
        untied, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    result, base = merged(untied, adapter, tmp_path / "out"), load_file(untied / WEIGHTS)
    assert torch.equal(
        result["lm_head.weight"], load_file(adapter / ADAPTER)["base_model.model.lm_head.weight"]
    )
    assert not torch.equal(result["lm_head.weight"], base["lm_head.weight"])
    assert torch.equal(result["model.embed_tokens.weight"], base["model.embed_tokens.weight"])


def test_the_dtype_of_the_base_is_kept(tiny_base, adapter, tmp_path):
    from transformers import AutoModelForCausalLM

    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16).save_pretrained(base)
    result, exact = merged(base, adapter, tmp_path / "out"), merged(tiny_base, adapter, tmp_path / "exact")
    assert {tensor.dtype for tensor in result.values()} == {torch.bfloat16}
    for name, tensor in result.items():
        torch.testing.assert_close(tensor.float(), exact[name], rtol=2**-7, atol=2e-3)


def test_an_untrained_adapter_changes_nothing_and_may(tiny_base, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    settings = LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_base), settings)
    model.save_pretrained(tmp_path / "adapter")
    result, base = merged(tiny_base, tmp_path / "adapter", tmp_path / "out"), load_file(tiny_base / WEIGHTS)
    assert all(torch.equal(result[name], base[name]) for name in base)


def test_the_result_carries_the_tokenizer_it_was_trained_with(tiny_base, own_adapter, tokenizer, tmp_path):
    tokenizer.chat_template = "{{ 'trained with this' }}"
    tokenizer.save_pretrained(own_adapter)
    merged(tiny_base, own_adapter, tmp_path / "out")
    from stagecraft import models

    found = models.load_tokenizer(str(tmp_path / "out"))
    assert found.chat_template == "{{ 'trained with this' }}" and found.get_vocab() == tokenizer.get_vocab()
    models.require_model_folder(str(tmp_path / "out"))
    assert not (tmp_path / "out" / "adapter_config.json").exists()


@pytest.mark.parametrize("reward", [False, True], ids=["causal", "reward"])
def test_the_figures_count_each_parameter_once(tiny_base, tmp_path, reward):
    """What is reported: the adapter's numbers, and those of the base without the adapter."""
    adapter = make_adapter(tiny_base, tmp_path / "adapter", reward=reward)
    paths = Paths(tiny_base, adapter, tmp_path / "out")
    figures = merging.merge(paths, check_inputs(paths), lambda line: None)
    assert figures["lora_parameters"] == sum(
        tensor.numel() for tensor in load_file(adapter / ADAPTER).values()
    )
    assert figures["total_parameters"] == sum(
        t.numel() for t in load_file(tmp_path / "out" / WEIGHTS).values()
    )
    assert figures["dtype"] == "float32"


# Faults of the inputs


def test_folders_that_are_neither_are_told_together(tmp_path):
    assert told(check_inputs, Paths(tmp_path / "b", tmp_path / "a", tmp_path / "o")) == [
        f"--lora_model {tmp_path}/a: no adapter_config.json there: this is not an adapter",
        f"--base_model {tmp_path}/b: no config.json there: this is not a model folder",
    ]


def test_missing_weights_are_told_together(tiny_base, own_adapter, tmp_path):
    (own_adapter / ADAPTER).unlink()
    base = tmp_path / "base"
    base.mkdir()
    shutil.copy(tiny_base / "config.json", base)
    assert told(check_inputs, Paths(base, own_adapter, tmp_path / "o")) == [
        f"--lora_model {own_adapter}: adapter_model.safetensors is missing",
        f"--base_model {base}: no *.safetensors there",
    ]


def test_a_quantised_base_is_refused(tiny_base, adapter, tmp_path):
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"load_in_4bit": True}}))
    assert told(check_inputs, Paths(base, adapter, tmp_path / "o")) == [
        f"--base_model {base}: its weights are quantised; merge into the full-precision base"
    ]


def test_another_kind_of_adapter_is_refused(tiny_base, own_adapter, tmp_path):
    config = json.loads((own_adapter / "adapter_config.json").read_text())
    (own_adapter / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))
    assert told(check_inputs, Paths(tiny_base, own_adapter, tmp_path / "o")) == [
        f"--lora_model {own_adapter}: a IA3 adapter; only LoRA can be merged"
    ]


@pytest.mark.parametrize("where", ["adapter", "base"])
def test_a_configuration_cut_off_is_told(tiny_base, own_adapter, tmp_path, where):
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    file = {"adapter": own_adapter / "adapter_config.json", "base": base / "config.json"}[where]
    file.write_text(file.read_text()[:40])
    [line] = told(check_inputs, Paths(base, own_adapter, tmp_path / "o"))
    assert str(file.parent) in line and file.name in line


@pytest.mark.parametrize("where", ["adapter", "base"])
def test_weights_cut_off_are_told(tiny_base, own_adapter, tmp_path, where):
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    file = {"adapter": own_adapter / ADAPTER, "base": base / WEIGHTS}[where]
    file.write_bytes(file.read_bytes()[:-100])
    lines = told(merged, base, own_adapter, tmp_path / "out")
    assert str(file.parent) in lines[0] and not (tmp_path / "out").exists()


OTHER_SIZES = [
    {"hidden_size": 64},
    {"intermediate_size": 128},
    {"num_hidden_layers": 1},
    {"num_hidden_layers": 3},
]


@pytest.mark.parametrize("changes", OTHER_SIZES, ids=str)
def test_a_base_of_another_size_is_refused(tiny_base, tmp_path, changes):
    adapter = make_adapter(tiny_base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    base = copy_model(tiny_base, tmp_path / "base", **changes)
    [line] = told(merged, base, adapter, tmp_path / "out")
    assert line.startswith(f"--lora_model {adapter}: does not fit --base_model {base}: ")
    if "num_hidden_layers" not in changes:
        assert "size mismatch for base_model.model.model.layers.1." in line
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_told(tiny_base, adapter, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    size = (tiny_base / WEIGHTS).stat().st_size
    paths = Paths(tiny_base, adapter, tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, size))
    [line] = told(check_inputs, paths)
    assert line.startswith(f"--output_dir {tmp_path}/out: 0 MB are free, about 0 MB will be written; ")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 2 * size))  # control
    check_inputs(paths)


# A tampered result


@pytest.fixture(scope="module")
def result(tiny_base, tmp_path_factory) -> tuple[Path, Paths, dict]:
    """A finished merge that touches q_proj only."""
    folder = tmp_path_factory.mktemp("result")
    adapter = make_adapter(tiny_base, folder / "adapter", target_modules=["q_proj"])
    paths = Paths(tiny_base, adapter, folder / "out")
    config = check_inputs(paths)
    merging.merge(paths, config, lambda line: None)
    return paths.output, paths, config


NORM, QUERY = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"


def one_bit(tensor: torch.Tensor) -> torch.Tensor:
    changed = tensor.clone()
    changed.view(torch.int32).view(-1)[3] ^= 1
    return changed


@pytest.mark.parametrize(
    ("name", "tamper", "message"),
    [
        (NORM, one_bit, f"{NORM}: changed, though the adapter does not touch it"),
        (QUERY.replace("q_", "k_"), one_bit, "k_proj.weight: changed, though the adapter does not touch it"),
        (NORM, lambda t: None, f"tensors lost: ['{NORM}'], unknown: []"),
        (NORM, lambda t: t.bfloat16(), f"{NORM}: (32,) torch.float32 became (32,) torch.bfloat16"),
        (NORM, lambda t: t[:-1].clone(), f"{NORM}: (32,) torch.float32 became (31,) torch.float32"),
        (QUERY, lambda t: t.fill_(math.inf), f"{QUERY}: not every number is finite after merging"),
        (QUERY, lambda t: t.fill_(math.nan), f"{QUERY}: not every number is finite after merging"),
        ("model.extra.weight", lambda t: torch.ones(1), "tensors lost: [], unknown: ['model.extra.weight']"),
    ],
)
def test_a_tampered_result_is_found_and_the_tensor_named(result, tmp_path, name, tamper, message):
    output, paths, config = result
    folder = Path(shutil.copytree(output, tmp_path / "copy"))
    check_written(folder, paths, config, "float32")  # control
    tensors = load_file(folder / WEIGHTS)
    changed = tamper(tensors.get(name))
    tensors = {k: v for k, v in tensors.items() if k != name} | ({} if changed is None else {name: changed})
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(RuntimeError) as caught:
        check_written(folder, paths, config, "float32")
    assert message in str(caught.value)


def test_a_result_without_the_adapter_is_found(result, tmp_path):
    _, paths, config = result
    folder = Path(shutil.copytree(paths.base, tmp_path / "copy"))
    with pytest.raises(RuntimeError, match="no tensor differs from the base: the adapter was not merged"):
        check_written(folder, paths, config, "float32")
    shutil.copy(paths.adapter / "adapter_config.json", folder)
    with pytest.raises(RuntimeError, match=r"adapter_config\.json is still there"):
        check_written(folder, paths, config, "float32")


# The script


def test_adapter_and_output_are_enough(adapter, tiny_base, merge_lora, tmp_path, capsys):
    merge_lora(adapter, "-o", tmp_path / "out")
    said = capsys.readouterr().out
    assert f"base model  {tiny_base}\n" in said and "complete model: weights there" in said
    result, base = load_file(tmp_path / "out" / WEIGHTS), load_file(tiny_base / WEIGHTS)
    assert result.keys() == base.keys() and not all(torch.equal(result[name], base[name]) for name in base)
    # The long form does the same, and the same twice is the same to the bit.
    merge_lora("--base_model", tiny_base, "--lora_model", adapter, "--output_dir", tmp_path / "long")
    again = load_file(tmp_path / "long" / WEIGHTS)
    assert all(torch.equal(result[name], again[name]) for name in base)


def test_what_is_missing_is_told_together(merge_lora, tmp_path):
    assert told(merge_lora) == ["--lora_model is missing", "--output_dir is missing"]
    assert told(merge_lora, tmp_path, "-o", tmp_path / "out") == [
        f"--lora_model {tmp_path}: no adapter_config.json there: this is not an adapter"
    ]


def test_an_adapter_that_names_no_base_is_told(own_adapter, merge_lora, tmp_path):
    config = json.loads((own_adapter / "adapter_config.json").read_text())
    (own_adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    [line] = told(merge_lora, own_adapter, "-o", tmp_path / "out")
    assert "--base_model" in line


def test_a_base_that_has_moved_is_told(own_adapter, merge_lora, tmp_path):
    config = json.loads((own_adapter / "adapter_config.json").read_text())
    (own_adapter / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "gone/model"})
    )
    assert told(merge_lora, own_adapter, "-o", tmp_path / "out") == [
        "--base_model gone/model: no config.json there: this is not a model folder"
    ]


def test_an_output_that_is_not_empty_is_not_replaced_unasked(adapter, merge_lora, tmp_path):
    out = tmp_path / "out"
    merge_lora(adapter, "-o", out)
    (out / WEIGHTS).write_bytes(b"older")
    assert told(merge_lora, adapter, "-o", out) == [
        f"--output_dir {out}: not empty; --overwrite_output_dir replaces it"
    ]
    assert (out / WEIGHTS).read_bytes() == b"older"
    merge_lora(adapter, "-o", out, "--overwrite_output_dir")
    assert (out / WEIGHTS).stat().st_size > 1000


def test_overwriting_takes_no_folder_that_is_no_model(adapter, merge_lora, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work\n")
    [line] = told(merge_lora, adapter, "-o", tmp_path / "home", "--overwrite_output_dir")
    assert line.startswith(f"--output_dir {tmp_path}/home: ")
    assert (tmp_path / "home" / "thesis.tex").exists()


@pytest.mark.parametrize("which", ["base", "adapter"])
def test_the_output_can_not_be_an_input(tiny_base, own_adapter, merge_lora, tmp_path, which):
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    output = {"base": base, "adapter": own_adapter}[which]
    before = sorted(file.name for file in output.iterdir()), (base / WEIGHTS).read_bytes()
    flags = (
        "--base_model",
        base,
        "--lora_model",
        own_adapter,
        "--output_dir",
        output,
        "--overwrite_output_dir",
    )
    [line] = told(merge_lora, *flags)
    assert line.startswith(f"--output_dir {output}: ")
    assert before == (sorted(file.name for file in output.iterdir()), (base / WEIGHTS).read_bytes())


def test_a_file_as_output_is_told(adapter, merge_lora, tmp_path):
    (tmp_path / "out").write_text("mine")
    [line] = told(merge_lora, adapter, "-o", tmp_path / "out")
    assert line.startswith(f"--output_dir {tmp_path}/out: ") and (tmp_path / "out").read_text() == "mine"


# A stage's folder


@pytest.fixture
def trained(adapter, tmp_path) -> Path:
    """What a LoRA stage leaves."""
    stage = tmp_path / "outputs-sft" / "tiny"
    shutil.copytree(adapter, stage / "adapter")
    (stage / "TRAINED").write_text("")
    return stage


def test_a_stage_gets_its_model_then_done(trained, merge_lora, tmp_path):
    from stagecraft import models

    merge_lora("--stage_dir", trained)
    assert (trained / "DONE").read_text() == f"{trained}/model\n"
    models.require_model_folder(str(trained / "model"))
    assert "complete model" in (trained / "logs" / "train.log").read_text()
    merge_lora("--stage_dir", trained)  # and once more
    assert (trained / "DONE").exists()


def test_a_stage_that_is_not_trained_is_told(trained, merge_lora):
    (trained / "TRAINED").unlink()
    assert told(merge_lora, "--stage_dir", trained) == [
        f"--stage_dir {trained}: no finished training there (TRAINED is missing)"
    ]
    assert not (trained / "DONE").exists()


def test_after_full_training_the_model_is_checked(trained, tiny_base, merge_lora):
    shutil.rmtree(trained / "adapter")
    shutil.copytree(tiny_base, trained / "model")
    (trained / "model" / WEIGHTS).unlink()
    assert told(merge_lora, "--stage_dir", trained) == [
        f"--stage_dir {trained}/model: not a complete model folder: *.safetensors missing"
    ]
    assert not (trained / "DONE").exists()
    shutil.copy(tiny_base / WEIGHTS, trained / "model")
    merge_lora("--stage_dir", trained)
    assert (trained / "DONE").exists()


def test_a_failed_merge_leaves_no_model_and_no_done(trained, adapter, merge_lora):
    (trained / "DONE").write_text("of an earlier merge\n")
    tensors = load_file(trained / "adapter" / ADAPTER)
    next(iter(tensors.values())).fill_(math.nan)
    save_file(tensors, trained / "adapter" / ADAPTER, {"format": "pt"})
    with pytest.raises((RuntimeError, UserError), match="finite"):
        merge_lora("--stage_dir", trained)
    assert not (trained / "model").exists() and not (trained / "DONE").exists()
    # What it left does not stop the merge of the mended adapter.
    shutil.copy(adapter / ADAPTER, trained / "adapter")
    merge_lora("--stage_dir", trained)
    assert (trained / "DONE").exists()
    left = {path.name for path in trained.iterdir()}
    assert left == {"adapter", "model", "logs", ".lock", "TRAINED", "DONE"}


def test_a_killed_merge_leaves_no_model_and_no_done(trained, merge_lora):
    command = [sys.executable, str(ROOT / "python" / "merge_lora.py"), "--stage_dir", str(trained)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        for line in process.stdout:
            if line.startswith("[3/4]"):
                process.kill()
                break
        else:
            pytest.fail("the merge never came to write")
        process.wait(timeout=30)
    assert process.returncode == -9
    assert not (trained / "model").exists() and not (trained / "DONE").exists()
    merge_lora("--stage_dir", trained)  # its lock died with it
    assert (trained / "DONE").exists()
