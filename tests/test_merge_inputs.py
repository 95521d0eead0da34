"""Files that are missing or cut off, bases that are not the adapter's: told before anything is written."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adapters import (
    ADAPTER,
    WEIGHTS,
    causal,
    configure,
    copy_model,
    make_adapter,
    merged,
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


# Files


def test_folders_that_are_neither_are_told_together(tmp_path):
    (tmp_path / "b").mkdir()
    assert told(plan_of, tmp_path / "b", tmp_path / "a") == [
        f"--lora_model {tmp_path}/a: no adapter_config.json there: this is not an adapter",
        f"--base_model {tmp_path}/b: no config.json there: this is not a model folder",
    ]
    assert told(plan_of, tmp_path / "gone", tmp_path / "a") == [
        f"--lora_model {tmp_path}/a: no adapter_config.json there: this is not an adapter",
        f"--base_model {tmp_path}/gone: no such folder",
    ]


def test_missing_weights_are_told_together(own_base, own_adapter):
    (own_adapter / ADAPTER).unlink()
    (own_base / WEIGHTS).unlink()
    assert told(plan_of, own_base, own_adapter) == [
        f"--lora_model {own_adapter}: adapter_model.safetensors is missing",
        f"--base_model {own_base}: no *.safetensors there",
    ]


def test_pickled_weights_are_not_read(own_base, own_adapter):
    (own_adapter / ADAPTER).rename(own_adapter / "adapter_model.bin")
    (own_base / WEIGHTS).rename(own_base / "pytorch_model.bin")
    assert told(plan_of, own_base, own_adapter) == [
        f"--lora_model {own_adapter}: adapter_model.safetensors is missing (a pickled adapter_model.bin is not read)",
        f"--base_model {own_base}: only pickled weights (pytorch_model.bin); save them as safetensors "
        "(save_pretrained does)",
    ]


def test_a_link_that_leads_nowhere_is_a_missing_file(own_base, own_adapter):
    """As in a hub cache whose blobs were deleted."""
    (own_base / WEIGHTS).unlink()
    (own_base / WEIGHTS).symlink_to(own_base / "blobs" / "0123")
    [line] = told(plan_of, own_base, own_adapter)
    assert line.startswith(f"--base_model {own_base}: ")


@pytest.fixture
def sharded(tiny_base, tmp_path) -> Path:
    folder = tmp_path / "sharded"
    causal(tiny_base).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def test_a_missing_shard_is_named(sharded, adapter):
    shards = sorted(sharded.glob("*.safetensors"))
    shards[1].unlink()
    assert told(plan_of, sharded, adapter) == [
        f"--base_model {sharded}: {shards[1].name} is missing (model.safetensors.index.json names it)"
    ]
    shards[0].unlink()
    [line] = told(plan_of, sharded, adapter)
    assert shards[0].name in line and shards[1].name in line
    (sharded / "model.safetensors.index.json").unlink()
    [line] = told(plan_of, sharded, adapter)
    assert line.endswith("*.safetensors but no model.safetensors.index.json; copy the index too")


def test_one_shard_alone_is_no_model(sharded, tiny_base, tmp_path):
    adapter = make_adapter(
        tiny_base, tmp_path / "adapter", target_modules=["q_proj"], layers_to_transform=[1]
    )
    for file in [*sharded.glob("*.safetensors"), sharded / "model.safetensors.index.json"]:
        if file.suffix == ".json" or f"{QUERY.replace('.0.', '.1.')}.weight" not in load_file(file):
            file.unlink()
    [line] = told(plan_of, sharded, adapter)
    assert line.startswith(f"--base_model {sharded}: ") and "index" in line


def test_an_index_that_is_wrong_is_told(sharded, adapter):
    index = sharded / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    last = sorted(table["weight_map"].values())[-1]
    lost = table["weight_map"] | {"model.ghost.weight": last}
    index.write_text(json.dumps(table | {"weight_map": lost}))
    assert told(plan_of, sharded, adapter) == [
        f"--base_model {sharded}: model.safetensors.index.json: model.ghost.weight is not in {last}"
    ]
    index.write_text("{}")
    assert told(plan_of, sharded, adapter) == [
        f"--base_model {sharded}: model.safetensors.index.json is damaged; copy it again"
    ]


@pytest.mark.parametrize("where", ["adapter", "base"])
@pytest.mark.parametrize("left", [-100, -1, 2000, 50, 8, 3, 0])
def test_weights_cut_off_are_told(own_base, own_adapter, where, left):
    folder, name = {"adapter": (own_adapter, ADAPTER), "base": (own_base, WEIGHTS)}[where]
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:left])
    [line] = told(plan_of, own_base, own_adapter)
    flag = {"adapter": "--lora_model", "base": "--base_model"}[where]
    assert line.startswith(f"{flag} {folder}: {name} is cut off")
    if left < 0:
        assert line == (
            f"{flag} {folder}: {name} is cut off: {len(data) + left:,} bytes of {len(data):,}; copy it again"
        )


def test_bytes_that_belong_to_no_tensor_are_told(own_base, own_adapter):
    with (own_base / WEIGHTS).open("ab") as stream:
        stream.write(b"more")
    [line] = told(plan_of, own_base, own_adapter)
    assert line.startswith(f"--base_model {own_base}: {WEIGHTS} ")
    assert "cut off" not in line  # it is longer than it should be


# The base


def test_a_quantised_base_is_refused(own_base, adapter):
    configure(own_base, "config.json", quantization_config={"load_in_4bit": True})
    assert told(plan_of, own_base, adapter) == [
        f"--base_model {own_base}: its weights are quantised; merge into the full-precision base"
    ]


def test_a_base_with_bytes_for_weights_is_refused(own_base, tmp_path, tiny_base):
    adapter = make_adapter(tiny_base, tmp_path / "adapter", target_modules=["q_proj"])
    reweigh(
        own_base, lambda t: t.update({f"{QUERY}.weight": torch.zeros(32, 32, dtype=torch.uint8)}), WEIGHTS
    )
    assert told(plan_of, own_base, adapter) == [
        f"--lora_model {adapter}: does not fit --base_model {own_base}: {QUERY}.weight is U8: its weights are quantised"
    ]


OTHER_SIZES = {
    "hidden_size=64": "model.layers.0.mlp.down_proj.weight is [64, 64], the adapter is for [32, 64] (4 modules do not fit)",
    "intermediate_size=128": "model.layers.0.mlp.down_proj.weight is [32, 128], the adapter is for [32, 64] (2 modules do not fit)",
    "num_hidden_layers=1": "the base has no model.layers.1.mlp.down_proj.weight (2 modules do not fit)",
    "num_hidden_layers=3": "the adapter has nothing for model.layers.2.mlp.down_proj",
}


@pytest.mark.parametrize("change", OTHER_SIZES)
def test_a_base_of_another_size_is_refused(tiny_base, tmp_path, change):
    adapter = make_adapter(tiny_base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    name, _, value = change.partition("=")
    base = copy_model(tiny_base, tmp_path / "base", **{name: int(value)})
    [line] = told(merged, base, adapter, output=tmp_path / "out")
    assert line == f"--lora_model {adapter}: does not fit --base_model {base}: {OTHER_SIZES[change]}"
    assert not (tmp_path / "out").exists()


def test_a_base_of_another_size_does_not_fill_the_screen(tiny_base, tmp_path):
    """A model of 28 layers has 196 modules: one line each would hide what there is to know."""
    deep = copy_model(tiny_base, tmp_path / "deep", num_hidden_layers=6)
    adapter = make_adapter(deep, tmp_path / "adapter")
    base = copy_model(tiny_base, tmp_path / "base", num_hidden_layers=6, hidden_size=64)
    assert 1 <= len(told(plan_of, base, adapter)) <= 21


def test_an_embedding_of_another_width_is_refused(tiny_base, tmp_path):
    adapter = make_adapter(
        tiny_base, tmp_path / "adapter", target_modules=["gate_proj"], modules_to_save=["embed_tokens"]
    )
    reweigh(adapter, lambda t: t.update({f"{PREFIX}model.embed_tokens.weight": torch.ones(393, 16)}))
    [line] = told(plan_of, tiny_base, adapter)
    assert line.startswith(f"--lora_model {adapter}: does not fit --base_model {tiny_base}: ")


def test_another_base_of_the_same_size_is_refused(tiny_base, own_adapter, tmp_path):
    from stagecraft import files, lineage

    files.write_json(own_adapter / "lineage.json", lineage.after(str(tiny_base), {"stage": "sft"}))
    plan_of(tiny_base, own_adapter)  # control
    sharded = tmp_path / "sharded"
    causal(tiny_base).save_pretrained(sharded, max_shard_size="40KB")
    plan_of(sharded, own_adapter)  # the same weights, otherwise kept
    other = copy_model(tiny_base, tmp_path / "other")
    assert told(plan_of, other, own_adapter) == [
        f"--lora_model {own_adapter}: was trained on other weights than those of --base_model {other} "
        f"(lineage.json names {tiny_base}); give that base, or take that name out of lineage.json if you know better (the same "
        "weights in another dtype)"
    ]
    (own_adapter / "lineage.json").unlink()  # one that came from elsewhere names a base, which may lie here
    [line] = told(plan_of, other, own_adapter)
    assert f"(adapter_config.json names {tiny_base}); give that base" in line
    configure(own_adapter, base_model_name_or_path="elsewhere/model")
    plan_of(other, own_adapter)  # nobody knows


@pytest.mark.parametrize("content", ['{"steps": ["sft"]}', '{"steps": {}}', '{"steps": []}', "[]", "{"])
def test_a_lineage_that_says_nothing_stops_nothing(tiny_base, own_adapter, tmp_path, content):
    (own_adapter / "lineage.json").write_text(content)
    merged(tiny_base, own_adapter, output=tmp_path / "out")


# Room


def test_a_full_disk_is_told(tiny_base, adapter, tmp_path, monkeypatch):
    from stagecraft.merging.making import check_room

    usage = namedtuple("usage", "total used free")
    plan = plan_of(tiny_base, adapter)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, plan.size))
    [line] = told(check_room, plan, tmp_path / "out", None)
    assert line.startswith(f"--output_dir {tmp_path}/out: 0 MB are free, about 50 MB will be written; ")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 2 * plan.size + 50_000_000))  # control
    check_room(plan, tmp_path / "out", None)


@pytest.mark.parametrize("when", ["fallocate", "written"])
def test_a_disk_that_fills_up_leaves_nothing(tiny_base, adapter, tmp_path, monkeypatch, when):
    from stagecraft.merging import writing

    def full(*_):
        raise OSError(28, "No space left on device")

    if when == "fallocate":
        monkeypatch.setattr(os, "posix_fallocate", full)
    else:
        monkeypatch.setattr(writing._Stream, "_write_all", full)
    assert told(merged, tiny_base, adapter, output=tmp_path / "out") == [
        f"--output_dir {tmp_path}/out: No space left on device; nothing was changed there"
    ]
    assert list(tmp_path.iterdir()) == []


def test_code_of_the_base_is_not_run_unasked(own_base, adapter, tmp_path):
    from stagecraft.merging.making import Proof, check_room

    configure(own_base, "config.json", auto_map={"AutoModelForCausalLM": "modeling_x.Model"})
    plan = plan_of(own_base, adapter)
    assert told(check_room, plan, tmp_path / "out", Proof()) == [
        f"--base_model {own_base}: comes with code of its own (auto_map in config.json), which the proof would run: "
        "--trust_remote_code allows that, --no_validate leaves the proof out"
    ]
    check_room(plan, tmp_path / "out", Proof(trust_remote_code=True))
    check_room(plan, tmp_path / "out", None)


def test_weights_are_counted(tiny_base, adapter):
    assert told(plan_of, tiny_base, adapter, weights=[0.7, 0.3]) == [
        "--weights: 2 for 1 adapters; give one each"
    ]
    assert told(plan_of, tiny_base, adapter, adapter, weights=[1.0])[0] == (
        "--weights: 1 for 2 adapters; give one each"
    )
    for weight in (float("nan"), float("inf")):
        [line] = told(plan_of, tiny_base, adapter, weights=[weight])
        assert line.startswith("--weights")


def test_everything_is_told_together(own_base, own_adapter, tmp_path):
    configure(own_adapter, use_qalora=True, init_lora_weights="pissa")
    other = tmp_path / "other"
    other.mkdir()
    configure(own_base, "config.json", quantization_config={"bits": 4})
    (own_base / WEIGHTS).unlink()
    assert told(plan_of, own_base, own_adapter, other, weights=[1.0]) == [
        "--weights: 1 for 2 adapters; give one each",
        f"--lora_model {own_adapter}: adapter_config.json sets use_qalora, which this merge does not know",
        f"--lora_model {own_adapter}: init_lora_weights pissa changed the base's weights before training; save the "
        "adapter with path_initial_model_for_weight_conversion, then merge that",
        f"--lora_model {other}: no adapter_config.json there: this is not an adapter",
        f"--base_model {own_base}: its weights are quantised; merge into the full-precision base",
        f"--base_model {own_base}: no *.safetensors there",
    ]


def test_the_adapters_bytes_are_not_touched(tiny_base, own_adapter, tmp_path):
    before = load_file(own_adapter / ADAPTER)
    merged(tiny_base, own_adapter, output=tmp_path / "out")
    after = load_file(own_adapter / ADAPTER)
    assert all(torch.equal(before[name], after[name]) for name in before)
