"""The folder of a merged model: its tensors and files as the base and the adapter have them, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters import (
    ADAPTER,
    ALPHA,
    CONFIG,
    RANK,
    WEIGHTS,
    causal,
    configure,
    loras_of,
    make_adapter,
    merged,
    reweigh,
    tensors_of,
)
from families import END, NAMES, tokenizer_of

INDEX = "model.safetensors.index.json"
QUERY, NORM, EMBEDDING = (
    "model.layers.1.self_attn.q_proj.weight",
    "model.norm.weight",
    "model.embed_tokens.weight",
)


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


# The weights of the folder


def test_what_no_adapter_touches_keeps_every_bit(tiny_base, tmp_path):
    """Patterns of bits that arithmetic would change: NaN with a payload, minus zero, numbers below the smallest."""
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    odd = torch.tensor([0x7FC01234, -0x80000000, 1, 0x7F800000], dtype=torch.int32).view(torch.float32)
    reweigh(base, lambda t: t.update({NORM: odd.repeat(8), "model.count": torch.arange(5)}), WEIGHTS)
    adapter = make_adapter(tiny_base, tmp_path / "adapter", target_modules=["q_proj"])
    configure(adapter, base_model_name_or_path="elsewhere/model")  # the base it names is another one now
    result, before = merged(base, adapter, output=tmp_path / "out"), tensors_of(base)
    changed = {name for name in before if result[name].numpy().tobytes() != before[name].numpy().tobytes()}
    assert changed == {QUERY, QUERY.replace(".1.", ".0.")} and result.keys() == before.keys()


def test_a_sharded_base_stays_sharded(tiny_base, adapter, tmp_path):
    base = tmp_path / "base"
    causal(tiny_base).save_pretrained(base, max_shard_size="20KB")
    shards = sorted(file.name for file in base.glob("*.safetensors"))
    single = merged(tiny_base, adapter, output=tmp_path / "single")
    result = merged(base, adapter, output=tmp_path / "out")
    assert len(shards) > 3
    assert sorted(file.name for file in (tmp_path / "out").glob("*.safetensors")) == shards
    assert result.keys() == single.keys()
    assert all(torch.equal(result[name], single[name]) for name in single)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    where = {k: file for file in shards for k in load_file(tmp_path / "out" / file)}
    assert index["weight_map"] == where
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in result.values())
    assert torch.equal(causal(tmp_path / "out").state_dict()[QUERY], single[QUERY])


def test_a_head_in_a_shard_of_its_own_may_go(tiny_base, tmp_path):
    """A reward model has none: the file that is left is a model of one file again."""
    from stagecraft import models

    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    tensors = load_file(base / WEIGHTS)
    (base / WEIGHTS).unlink()
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    head = {"lm_head.weight": tensors[EMBEDDING] + 1}
    save_file(tensors, base / one, {"format": "pt"})
    save_file(head, base / two, {"format": "pt"})
    where = {**dict.fromkeys(tensors, one), "lm_head.weight": two}
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    configure(base, "config.json", tie_word_embeddings=False)
    adapter = make_adapter(base, tmp_path / "adapter", reward=True)
    merged(base, adapter, output=tmp_path / "out")
    model = models.load_reward(str(tmp_path / "out"))
    assert torch.equal(model.score.weight, load_file(adapter / ADAPTER)["base_model.model.score.weight"])


@pytest.mark.parametrize("main", [torch.bfloat16, torch.float16])
def test_dtypes_are_the_bases_tensor_by_tensor(tiny_base, adapter, tmp_path, main):
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))

    def mix(tensors):
        for name, tensor in tensors.items():
            tensors[name] = tensor if "norm" in name else tensor.to(main)

    reweigh(base, mix, WEIGHTS)
    result, before = merged(base, adapter, output=tmp_path / "out"), tensors_of(base)
    assert {name: tensor.dtype for name, tensor in result.items()} == {k: v.dtype for k, v in before.items()}
    assert {tensor.dtype for tensor in result.values()} == {main, torch.float32}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == str(main).removeprefix("torch.") and "torch_dtype" not in config
    for name in before:
        assert torch.equal(result[name], before[name]) == ("_proj" not in name), name
    cast = merged(base, adapter, output=tmp_path / "cast", dtype="float32")
    assert {tensor.dtype for tensor in cast.values()} == {torch.float32}
    assert torch.equal(cast[EMBEDDING], before[EMBEDDING].float())


def test_the_same_merge_gives_the_same_bytes(adapter, own_base, tmp_path):
    (own_base / "modeling_extra.py").write_text("X = 1\n")
    folders = []
    for parent in ("one", "two"):
        merged(own_base, adapter, output=tmp_path / parent / "out")
        folders.append({f.name: f.read_bytes() for f in sorted((tmp_path / parent / "out").iterdir())})
    assert folders[0] == folders[1] and len(folders[0]) > 5


# The rest of the folder


def test_the_folder_is_complete(own_base, own_adapter, tokenizer, tmp_path):
    from stagecraft import models

    tokenizer.chat_template = "{{ 'trained with this' }}"
    tokenizer.save_pretrained(own_adapter)
    for name in ("modeling_extra.py", "LICENSE", "NOTICE.txt", "preprocessor_config.json"):
        (own_base / name).write_text(f"{name} of the base\n" if name.startswith(("LIC", "NOT")) else "{}\n")
    (own_base / "README.md").write_text("the base's own card")
    (own_adapter / "README.md").write_text("the adapter's own card")
    merged(own_base, own_adapter, output=tmp_path / "out")
    out = tmp_path / "out"
    models.require_model_folder(str(out))
    found = models.load_tokenizer(str(out))
    assert found.chat_template == "{{ 'trained with this' }}" and found.get_vocab() == tokenizer.get_vocab()
    assert (out / "LICENSE").read_text() == "LICENSE of the base\n"
    assert (out / "modeling_extra.py").exists() and (out / "NOTICE.txt").exists()
    assert (out / "preprocessor_config.json").exists()
    assert not (out / CONFIG).exists() and not (out / ADAPTER).exists()
    assert not [file for file in out.iterdir() if "unproven" in file.name or file.name.startswith(".")]
    assert "own card" not in (out / "README.md").read_text()
    config, before = (json.loads((folder / "config.json").read_text()) for folder in (out, own_base))
    assert "_name_or_path" not in config
    assert {k: v for k, v in config.items() if k != "dtype"} == {
        k: v for k, v in before.items() if k not in ("_name_or_path", "torch_dtype", "dtype")
    }


def ends(folder: Path) -> list[int]:
    found = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    return found if isinstance(found, list) else [found]


@pytest.mark.parametrize("kept", ["both", "base", "neither"])
def test_generation_ends_where_a_turn_ends(own_base, own_adapter, tokenizer, tmp_path, kept):
    """Said in the adapter's generation_config.json, or in the base's without it, or only by the template."""
    tokenizer.eos_token = "<|im_start|>"  # another one than ends a turn, as in Qwen's base models
    tokenizer.save_pretrained(own_adapter)
    turn, text = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"])
    (own_base / "generation_config.json").write_text(json.dumps({"eos_token_id": text, "temperature": 0.9}))
    (own_adapter / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [turn, text], "top_k": 9})
    )
    if kept != "both":
        (own_adapter / "generation_config.json").unlink()
    if kept == "neither":
        (own_base / "generation_config.json").unlink()
    merged(own_base, own_adapter, output=tmp_path / "out")
    assert turn in ends(tmp_path / "out") and text in ends(tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings.get("top_k") == {"both": 9}.get(kept)
    assert settings.get("temperature") == {"base": 0.9}.get(kept)
    assert turn in causal(tmp_path / "out").generation_config.eos_token_id


@pytest.mark.parametrize("name", NAMES)
def test_the_end_of_turn_of_other_families_is_found(own_base, own_adapter, tmp_path, name):
    from stagecraft.chat import templates

    tokenizer = tokenizer_of(name)
    tokenizer.chat_template = templates.load_template(tokenizer, name).saved_text
    tokenizer.save_pretrained(own_adapter)
    (own_base / "generation_config.json").unlink(missing_ok=True)
    merged(own_base, own_adapter, output=tmp_path / "out")
    assert ends(tmp_path / "out")[0] == tokenizer.convert_tokens_to_ids(END[name])


def test_a_template_that_leaves_answers_out_names_no_end(own_base, own_adapter, tokenizer, tmp_path):
    """Whatever such a template begins with does not end a turn."""
    tokenizer.chat_template = "<|im_start|>{{ messages | length }}"
    tokenizer.save_pretrained(own_adapter)
    merged(own_base, own_adapter, output=tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") not in ends(tmp_path / "out")


def test_the_lineage_is_carried_on(tiny_base, own_adapter, tmp_path):
    from stagecraft import files, lineage

    data = [{"path": "data/a.jsonl", "bytes": 1234, "sha256": "ab" * 32}]
    step = {"stage": "sft", "data": data, "metrics": {"eval_loss": 1.5}, "counts": {"rows": 7}, "seed": 3}
    files.write_json(own_adapter / "lineage.json", lineage.after(str(tiny_base), step))
    merged(tiny_base, own_adapter, output=tmp_path / "sft")
    [first] = lineage.read(tmp_path / "sft")
    assert first == {
        **step,
        "base": str(tiny_base),
        "base_fingerprint": lineage.fingerprint_of(tiny_base),
        "adapter": str(own_adapter),
        "weight": 1.0,
    }
    card = (tmp_path / "sft" / "README.md").read_text()
    for words in (
        str(tiny_base),
        str(own_adapter),
        "data/a.jsonl",
        "ab" * 32,
        "eval_loss 1.5",
        "rows 7",
        "seed 3",
    ):
        assert words in card, words
    # The next stage trains on that model: its own step comes after this one.
    second = make_adapter(tmp_path / "sft", tmp_path / "dpo_adapter", target_modules=["q_proj"])
    files.write_json(second / "lineage.json", lineage.after(str(tmp_path / "sft"), {"stage": "dpo"}))
    merged(tmp_path / "sft", second, output=tmp_path / "dpo")
    steps = lineage.read(tmp_path / "dpo")
    assert [step["stage"] for step in steps] == ["sft", "dpo"] and steps[0] == first
    assert steps[1]["base_fingerprint"] == lineage.fingerprint_of(tmp_path / "sft")
    assert "1. sft" in (tmp_path / "dpo" / "README.md").read_text()


def test_an_adapter_without_a_lineage_has_one_afterwards(tiny_base, own_adapter, tmp_path):
    from stagecraft import lineage

    merged(tiny_base, own_adapter, output=tmp_path / "out")
    [step] = lineage.read(tmp_path / "out")
    assert step["base"] == str(tiny_base) and step["adapter"] == str(own_adapter)


# The writer, which small models hardly use


def big_model(folder: Path, tokenizer, dtype: torch.dtype) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """Tensors larger than a buffer, of lengths that are no multiples of anything; a base, an adapter, the truth."""
    torch.manual_seed(4)
    base, adapter = folder / "base", folder / "adapter"
    for path in (base, adapter):
        path.mkdir(parents=True)
        tokenizer.save_pretrained(path)
    shapes = {"layers.0.up": (3001, 3331), "layers.0.down": (1777, 3001), "layers.0.wide": (3, 600_011)}
    tensors = {f"model.{name}.weight": torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    tensors |= {
        "model.bytes": torch.arange(77, dtype=torch.uint8),
        "model.wide.bias": torch.randn(9).double(),
    }
    save_file(tensors, base / WEIGHTS, {"format": "pt"})
    (base / "config.json").write_text(json.dumps({"model_type": "none", "tie_word_embeddings": False}))
    truth, loras = dict(tensors), {}
    for name in ("layers.0.up", "layers.0.wide"):
        rows, columns = shapes[name]
        a, b = torch.randn(RANK, columns), torch.randn(rows, RANK) * 0.1
        loras |= {f"base_model.model.model.{name}.lora_{part}.weight": t for part, t in (("A", a), ("B", b))}
        weight = tensors[f"model.{name}.weight"].double()
        truth[f"model.{name}.weight"] = weight + ALPHA / RANK * (b.double() @ a.double())
    save_file(loras, adapter / ADAPTER)
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA}
    (adapter / CONFIG).write_text(json.dumps(settings | {"target_modules": ["up", "wide"]}))
    return base, adapter, truth


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_larger_than_a_buffer(tokenizer, tmp_path, dtype):
    base, adapter, truth = big_model(tmp_path, tokenizer, dtype)
    result, before = merged(base, adapter, output=tmp_path / "out"), tensors_of(base)
    assert result.keys() == truth.keys()
    for name, exact in truth.items():
        if exact.dtype == before[name].dtype:
            assert torch.equal(result[name], before[name]), name
        else:
            assert torch.equal(result[name], exact.to(dtype)), name
            assert not torch.equal(result[name], before[name])


@pytest.mark.parametrize(
    "case", ["small buffers", "small blocks", "no O_DIRECT", "O_DIRECT refused later", "short"]
)
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_the_bytes_are_the_same_however_they_are_written(tiny_base, tmp_path, monkeypatch, case, settings):
    from stagecraft.merging import writing

    adapter = make_adapter(tiny_base, tmp_path / "adapter", **settings)
    merged(tiny_base, adapter, output=tmp_path / "plain")
    system_open, pwrite = os.open, os.pwrite

    def open_without(path, flags, *mode):
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return system_open(path, flags, *mode)

    def refuse(descriptor, data, offset):
        import fcntl

        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return pwrite(descriptor, data, offset)

    def short(descriptor, data, offset):
        return pwrite(descriptor, data[: max(4096, len(data) // 8192 * 4096)], offset)

    if case == "small buffers":
        monkeypatch.setattr(writing, "BUFFER", 8192)
    elif case == "small blocks":
        monkeypatch.setattr(writing, "BLOCK", 100)
    elif case == "no O_DIRECT":
        monkeypatch.setattr(os, "open", open_without)
    else:
        monkeypatch.setattr(os, "pwrite", refuse if case == "O_DIRECT refused later" else short)
    merged(tiny_base, adapter, output=tmp_path / "other")
    one, other = ((tmp_path / name / WEIGHTS).read_bytes() for name in ("plain", "other"))
    if case == "small blocks" and settings:  # sums of other lengths may round the last bit otherwise
        tensors = tensors_of(tmp_path / "plain")
        for name, tensor in tensors_of(tmp_path / "other").items():
            torch.testing.assert_close(tensor, tensors[name], rtol=1e-7, atol=0)
    else:
        assert one == other
    assert loras_of(adapter)
