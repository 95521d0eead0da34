"""Adapters along a chain as one: the same model as the merged one, proven, made again when their sources change."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from servers import Kit

from adapters import IDS, causal, logits, make_adapter, merged, with_adapter
from stagecraft.errors import ProofFailed
from stagecraft.serving.chain import Chain, find_chain
from stagecraft.serving.choice import choose
from stagecraft.serving.composing import compose

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def here(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Inside the kit's folder."""
    monkeypatch.chdir(kit.folder)
    return kit.folder


def chain_here() -> Chain:
    faults: list[str] = []
    chain = find_chain(choose("tiny", "all", "", faults), faults)
    assert faults == [] and chain
    return chain


def test_the_chain_begins_where_every_weight_was_trained(here: Path):
    chain = chain_here()
    assert chain.base.name == "pt"
    assert [(module.served.name, module.rank) for module in chain.modules] == [("sft", 4), ("dpo", 12)]
    assert chain.left_out == ["base"]
    assert chain.limit == 16


@pytest.mark.parametrize("place", [0, 1])
def test_base_and_composed_adapter_are_the_merged_model(here: Path, place: int):
    chain = chain_here()
    module = chain.modules[place]
    assert compose(chain, module, here / "made")
    composed = logits(with_adapter(chain.base.folder, here / "made"))
    merged = logits(causal(module.served.folder))
    assert (composed - merged).abs().max() < 1e-4
    other = logits(causal(chain.modules[1 - place].served.folder))
    assert (composed - other).abs().max() > 0.1
    assert IDS.shape == (1, 40)  # logits() asked about a text


def test_bfloat16_models_are_proven_within_their_roundings(here: Path):
    """Each merge rounds once: two units for the second stage, and the proof allows no more than that."""
    pt = here / "outputs-pt/tiny/model"
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(pt / "model.safetensors").items()}
    save_file(tensors, pt / "model.safetensors", metadata={"format": "pt"})
    for stage, base in (("sft", "pt"), ("dpo", "sft")):
        folder = here / f"outputs-{stage}/tiny"
        shutil.rmtree(folder / "model")
        (folder / "adapter/lineage.json").unlink()
        merged(here / f"outputs-{base}/tiny/model", folder / "adapter", output=folder / "model")
    chain = chain_with_fingerprints(here)
    for module in chain.modules:
        assert compose(chain, module, here / module.served.name)
    spoil(here / "outputs-dpo/tiny/model", 0.01)
    with pytest.raises(ProofFailed, match="in the merged model, but base and adapters give"):
        compose(chain_with_fingerprints(here), chain.modules[1], here / "dpo")


def chain_with_fingerprints(here: Path) -> Chain:
    """The chain after models were changed by hand: lineage tells the new fingerprints."""
    from stagecraft import lineage

    for stage, base in (("sft", "pt"), ("dpo", "sft")):
        steps = lineage.after(f"outputs-{base}/tiny/model", {"stage": stage})
        (here / f"outputs-{stage}/tiny/adapter/lineage.json").write_text(json.dumps(steps))
    return chain_here()


def spoil(folder: Path, share: float) -> None:
    """Every number a little larger."""
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: (tensor.float() * (1 + share)).to(tensor.dtype) for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_it_is_made_again_when_a_source_changes(here: Path):
    chain = chain_here()
    made = here / "made"
    assert compose(chain, chain.modules[0], made)
    assert not compose(chain, chain.modules[0], made)
    adapter = here / "outputs-sft/tiny/adapter"
    before = (made / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(adapter)
    make_adapter(chain.base.folder, adapter, seed=5, r=4)
    chain = chain_with_fingerprints(here)
    with pytest.raises(ProofFailed):  # the merged model is still the old adapter's
        compose(chain, chain.modules[0], made)
    assert (made / "adapter_model.safetensors").read_bytes() == before
    assert not list(here.glob(".made*"))


def test_modules_of_different_adapters_are_filled_up_with_nothing(here: Path):
    """An adapter of the attention after one of everything: its absent modules change nothing."""
    sft, dpo = here / "outputs-sft/tiny/model", here / "outputs-dpo/tiny"
    shutil.rmtree(dpo)
    make_adapter(sft, dpo / "adapter", target_modules=["q_proj", "v_proj"], r=2, rank_pattern={"v_proj": 6})
    merged(sft, dpo / "adapter", output=dpo / "model")
    (dpo / "DONE").touch()
    chain = chain_with_fingerprints(here)
    assert chain.modules[1].rank == 10
    assert compose(chain, chain.modules[1], here / "made")
    found = load_file(here / "made/adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in found.items() if "lora_A" in name} == {10}
    untouched = next(t for n, t in found.items() if "down_proj.lora_A" in n)
    assert torch.count_nonzero(untouched[4:]) == 0
    composed = logits(with_adapter(chain.base.folder, here / "made"))
    assert (composed - logits(causal(dpo / "model"))).abs().max() < 1e-4
