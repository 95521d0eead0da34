"""What was written, held against the plan: every file, and sampled numbers of every tensor recomputed in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from stagecraft.errors import ProofFailed
from stagecraft.merging.plan import Output, Plan
from stagecraft.merging.tensors import INDEX, ITEM_SIZE, TORCH_NAME, Damaged, Reader, Tensor, open_weights
from stagecraft.merging.writing import BLOCK

ROWS = 16  # recomputed of each tensor: the first, the last and others spread between
PIECE = 1 << 16  # bytes compared at three places of an untouched tensor
# dtype -> (bits after the binary point, exponent of the smallest normal number)
MANTISSA = {"BF16": (7, -126), "F16": (10, -14), "F32": (23, -126), "F64": (52, -1022)}


def check_files(plan: Plan, folder: Path) -> None:
    """Names, shapes, dtypes and byte counts of every file against the plan, read by us and by the library."""
    if (folder / "adapter_config.json").exists():
        raise ProofFailed("adapter_config.json is still there: this is no complete model")
    try:
        written = open_weights(folder)
    except Damaged as fault:
        raise ProofFailed(str(fault)) from None
    for file, outputs in plan.files.items():
        with safe_open(folder / file, "pt") as library:
            names = set(library.keys())
            for output in outputs:
                if output.name not in names or output.name not in written:
                    raise ProofFailed(f"{output.name}: is not in {file}")
                seen = library.get_slice(output.name)
                _check_entry(output, written[output.name], (seen.get_dtype(), tuple(seen.get_shape())), file)
    more = sorted(written.keys() - {output.name for output in plan.outputs})
    if more:
        raise ProofFailed(f"{more[0]}: is in {written[more[0]].file.name}, but belongs to no such model")
    if len(plan.files) > 1:
        total = json.loads((folder / INDEX).read_text(encoding="utf-8"))["metadata"]["total_size"]
        if total != plan.size:
            raise ProofFailed(f"{INDEX}: total_size is {total}, the tensors have {plan.size} bytes")


def _check_entry(output: Output, ours: Tensor, library: tuple[str, tuple[int, ...]], file: str) -> None:
    wanted = (output.dtype, output.shape)
    for found in ((ours.dtype, ours.shape), library):
        if found != wanted:
            raise ProofFailed(
                f"{output.name}: {found[0]} {list(found[1])} instead of {wanted[0]} {list(wanted[1])}"
            )
    if (ours.file.name, ours.size) != (file, output.size):
        raise ProofFailed(
            f"{output.name}: {ours.size} bytes in {ours.file.name} instead of {output.size} in {file}"
        )


def check_numbers(plan: Plan, folder: Path, progress: Callable[[int], object]) -> dict[str, Any]:
    """Sampled rows of every changed tensor in float64, sampled bytes of the others. Returns figures for the report.

    A number may be off by half a unit in the last place of its dtype, and by the little that float64 itself loses. `progress` is told tensors.
    """
    written = open_weights(folder)
    changed, worst, wanted, moved = 0, 0.0, False, False
    with Reader() as reader:
        for output in plan.outputs:
            if output.is_copy:
                _check_copy(output, written[output.name], reader)
            elif output.numel:
                changed += 1
                error, should_move, moves = _check_rows(output, written[output.name], reader)
                worst, wanted, moved = max(worst, error), wanted or should_move, moved or moves
            progress(1)
    if wanted and not moved:
        raise ProofFailed(
            f"no number differs from the base: {plan.dtype} rounds the adapter's whole change away; --dtype float32 keeps it"
        )
    return {"tensors": len(plan.outputs), "changed": changed, "worst_ulp": worst}


def _check_copy(output: Output, written: Tensor, reader: Reader) -> None:
    piece = min(PIECE, output.size)
    for offset in (0, (output.size - piece) // 2, output.size - piece):
        before, after = bytearray(piece), bytearray(piece)
        reader.into(output.source, offset, memoryview(before))
        reader.into(written, offset, memoryview(after))
        if before != after:
            raise ProofFailed(f"{output.name}: changed, though no adapter touches it")


def _check_rows(output: Output, written: Tensor, reader: Reader) -> tuple[float, bool, bool]:
    """Of the sampled rows: largest error in units of the last place, whether they should differ from the base, and do.

    Raises ProofFailed where the error is too large.
    """
    length = output.shape[0] if output.shape else 1
    rows = sorted({round(k * (length - 1) / (ROWS - 1)) for k in range(ROWS)})
    exact, lost = exact_rows(output, reader, rows)
    found = torch.stack([_row(reader, written, row) for row in rows]).double()
    unit = last_place(exact, output.dtype)
    error = (found - exact).abs()
    # NaN compares as false: it is caught too.
    bad = ~(error <= unit / 2 + lost)
    if bad.any():
        i, j = bad.nonzero()[0].tolist()
        place = f"[{rows[i]}, {j}]" if len(output.shape) > 1 else f"[{rows[i]}]"
        raise ProofFailed(
            f"{output.name}: {place} is {found[i, j]:.6g}, but base and adapter give {exact[i, j]:.6g} "
            f"({error[i, j] / unit[i, j]:.3g} units in the last place of {TORCH_NAME[output.dtype]})"
        )
    before = torch.stack([_row(reader, output.source, row) for row in rows]).double()
    wanted, moved = (not torch.equal(numbers, before) for numbers in (exact, found))
    return (error / unit).max().item(), wanted and bool(output.loras), moved


def exact_rows(output: Output, reader: Reader, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of a merged tensor in float64 [len(rows), width], and how much the merge's arithmetic may have lost of each.

    Written apart from the merge's own code on purpose: formulas straight from the papers, one row at a time.
    """
    exact = torch.stack([_row(reader, output.source, row) for row in rows]).double()
    size = exact.abs()
    rank = 0
    for lora in output.loras:
        a, b = reader.rows(lora.a).double(), reader.rows(lora.b).double()
        left, right = (a.T[rows], b.T) if lora.transposed else (b[rows], a)
        exact += lora.scale * (left @ right)
        size += abs(lora.scale) * (left.abs() @ right.abs())
        rank += lora.rank
    for vector, scale in output.added:
        exact += scale * reader.rows(vector).double()[rows][:, None]
        size += abs(scale) * reader.rows(vector).double()[rows][:, None].abs()
    for lora in output.loras:
        if lora.magnitude:
            magnitude = reader.rows(lora.magnitude).double()
            if lora.transposed:
                factor = (magnitude / _column_norms(output, reader))[None]
            else:
                factor = (magnitude[rows] / exact.norm(dim=1))[:, None]
            exact, size = exact * factor, size * factor.abs()
    lost = (rank + 8) * torch.finfo(torch.float64).eps * size
    if ITEM_SIZE[output.dtype] < 4:  # torch rounds float64 to 16 bits by way of float32
        lost += torch.finfo(torch.float32).eps / 2 * exact.abs()
    return exact, lost


def _row(reader: Reader, tensor: Tensor, row: int) -> torch.Tensor:
    return reader.rows(tensor, row, row + 1).reshape(-1)


def _column_norms(output: Output, reader: Reader) -> torch.Tensor:
    """Norms over the first dimension of W + scale * BA, kept as [in, out], in float64 [out]."""
    squares = torch.zeros(output.shape[1], dtype=torch.float64)
    step = max(1, BLOCK // output.shape[1])
    for first in range(0, output.shape[0], step):
        last = min(first + step, output.shape[0])
        block = reader.rows(output.source, first, last).double()
        for lora in output.loras:
            a, b = reader.rows(lora.a).double(), reader.rows(lora.b).double()
            block += lora.scale * (a[:, first:last].T @ b.T)
        squares += block.square().sum(0)
    return squares.sqrt()


def last_place(numbers: torch.Tensor, dtype: str) -> torch.Tensor:
    """The distance of neighbouring numbers of `dtype` at the size of each of `numbers` (float64)."""
    bits, smallest = MANTISSA[dtype]
    _, exponent = torch.frexp(numbers)  # numbers = m * 2 ** exponent with 0.5 <= m < 1
    return torch.ldexp(torch.ones_like(numbers), (exponent - 1).clamp(min=smallest) - bits)
