"""Adapters along a chain as one adapter of the chain's base: A's above one another, B's side by side, scales in B.

    W + s1 B1 A1 + s2 B2 A2 = W + [s1 B1, s2 B2] [A1; A2]

Exact but for the rounding of s*B to float32, and proven: base and file together give the numbers of the stage's merged
model, within the roundings that merging made on the way.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagecraft import files, lineage
from stagecraft.errors import ProofFailed
from stagecraft.merging.adapter import CONFIG, PREFIX, WEIGHTS, Lora, open_adapter
from stagecraft.merging.planning import make_plan
from stagecraft.merging.tensors import Reader, Tensor, open_weights
from stagecraft.serving.chain import Chain, Module

if TYPE_CHECKING:
    import torch

    from stagecraft.merging.plan import Output

SOURCES = "sources.json"
VERSION = 1  # of what is written; another one makes old folders again


def compose(chain: Chain, module: Module, folder: Path) -> bool:
    """Make `folder` unless it was made of the same adapters, base and model. Returns whether it was made.

    Raises UserError where the adapters do not fit the base, ProofFailed where the sum is not the merged model.
    """
    sources = _sources(chain, module)
    try:
        if json.loads((folder / SOURCES).read_text(encoding="utf-8")) == sources:
            return False
    except (OSError, ValueError):
        pass
    plan = make_plan(chain.weights, module.adapters, [1.0] * len(module.adapters), "auto")
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write(chain, module, temporary)
        _prove([output for output in plan.outputs if output.loras], module, temporary)
        files.write_json(temporary / SOURCES, sources)
        files.replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return True


def _sources(chain: Chain, module: Module) -> dict[str, Any]:
    """What an adapter was made of."""
    return {
        "version": VERSION,
        "base": lineage.fingerprint_of(chain.base.folder),
        "model": lineage.fingerprint_of(module.served.folder),
        "adapters": [
            {
                "folder": str(adapter.folder),
                "weights": lineage.weights_in(adapter.folder) or _digest(adapter.folder / WEIGHTS),
                "config": _digest(adapter.folder / CONFIG),
            }
            for adapter in module.adapters
        ],
    }


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _write(chain: Chain, module: Module, folder: Path) -> None:
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    names = list(dict.fromkeys(name for adapter in module.adapters for name in adapter.loras))
    with Reader() as reader:
        for name in names:
            a, b = _side_by_side(
                [adapter.loras.get(name) for adapter in module.adapters], module.rank, reader
            )
            tensors[f"{PREFIX}{name}.lora_A.weight"] = a
            tensors[f"{PREFIX}{name}.lora_B.weight"] = b
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(chain.base.folder),
        "r": module.rank,
        "lora_alpha": module.rank,  # a scale of 1: the adapters' own are in B
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted({name.rpartition(".")[2] for name in names}),
    }
    files.write_json(folder / CONFIG, config)


def _side_by_side(loras: list[Lora | None], rank: int, reader: Reader) -> tuple[torch.Tensor, torch.Tensor]:
    """One module's A [rank, in] and B [out, rank] in float32; rows of zeros where an adapter has less to say."""
    import torch

    present = [lora for lora in loras if lora]
    a = torch.zeros(rank, present[0].a.shape[1])
    b = torch.zeros(present[0].b.shape[0], rank)
    first = 0
    for lora in present:
        last = first + lora.rank
        a[first:last] = reader.rows(lora.a).float()
        b[:, first:last] = (reader.rows(lora.b).double() * lora.scale).float()
        first = last
    return a, b


def _prove(outputs: list[Output], module: Module, folder: Path) -> None:
    """Base and written adapter against the merged model: sampled rows of every tensor that the adapters change."""
    merged = open_weights(module.served.folder)
    written = open_adapter(folder).loras
    places = {
        (lora.a.file, lora.a.name): name
        for adapter in module.adapters
        for name, lora in adapter.loras.items()
    }
    with Reader() as reader:
        for output in outputs:
            name = places[output.loras[0].a.file, output.loras[0].a.name]
            if output.name not in merged:
                raise ProofFailed(f"{module.served.name}: the merged model has no {output.name}")
            _check_rows(output, written[name], merged[output.name], reader, module.served.name)


def _check_rows(output: Output, lora: Lora, merged: Tensor, reader: Reader, stage: str) -> None:
    """Every stage rounded its model to the file's dtype once: half a unit in the last place each, and no more."""
    import torch

    from stagecraft.merging.proof import ROWS, last_place

    count = output.shape[0]
    rows = sorted({round(k * (count - 1) / (ROWS - 1)) for k in range(ROWS)})
    partial = torch.stack([reader.rows(output.source, row, row + 1).reshape(-1) for row in rows]).double()
    turned = bool(output.loras[0].transposed)
    units, size = torch.zeros_like(partial), partial.abs()
    found = torch.stack([reader.rows(merged, row, row + 1).reshape(-1) for row in rows]).double()
    exact = partial + _product(lora, rows, turned, reader, 1.0)
    for one in output.loras:
        change = _product(one, rows, turned, reader, one.scale)
        partial, size = partial + change, size + change.abs()
        units += last_place(torch.maximum(partial.abs(), found.abs()), merged.dtype) / 2
    # s*B was rounded to float32, and the sums of float64 lose nearly nothing; the terms may be larger than their sum.
    a, b = reader.rows(lora.a).double().abs(), reader.rows(lora.b).double().abs()
    terms = (a.T[rows] @ b.T) if turned else (b[rows] @ a)
    allowed = units * 1.01 + 2**-23 * (terms + size * 2**-20)
    off = (found - exact).abs()
    if not bool((off <= allowed).all()):
        i, j = ((off <= allowed) == 0).nonzero()[0].tolist()
        raise ProofFailed(
            f"{stage}: {output.name}[{rows[i]}, {j}] is {found[i, j]:.6g} in the merged model, but base and adapters give "
            f"{exact[i, j]:.6g} (allowed: {allowed[i, j]:.2g} apart); merge it again: make merge-{stage}, or serve "
            f"STAGE={stage} alone"
        )


def _product(lora: Lora, rows: list[int], turned: bool, reader: Reader, scale: float) -> torch.Tensor:
    a, b = reader.rows(lora.a).double(), reader.rows(lora.b).double()
    return scale * ((a.T[rows] @ b.T) if turned else (b[rows] @ a))
