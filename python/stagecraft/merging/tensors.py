"""Safetensors files as tables: which tensor lies where in which file, without reading one.

The format: eight bytes with the header's length (little-endian), the header as JSON, then the tensors without gaps.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER = 100_000_000  # bytes; the safetensors library reads no longer one either

# The format's names of dtypes -> bytes an element. Those that a merge can compute with also have a name in torch.
ITEM_SIZE = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
}
ITEM_SIZE |= {"U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
TORCH_NAME = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SAFE_NAME = {name: code for code, name in TORCH_NAME.items()}


class Damaged(Exception):
    """Why weights can't be read: the file's name, what is wrong and how to mend it, in one line."""


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies. `start` is counted from the beginning of the file; `start` and `size` are in bytes."""

    name: str
    file: Path
    dtype: str  # as the format names it: BF16
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.size // ITEM_SIZE[self.dtype]


def open_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a model folder by name, in the order of its files. Raises Damaged, all faults at once."""
    files, weight_map, faults = _files(folder)
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= open_file(file)
        except Damaged as fault:
            faults.append(str(fault))
    if not faults and weight_map is not None:
        lost = sorted(n for n, file in weight_map.items() if n not in tensors or tensors[n].file.name != file)
        more = sorted(tensors.keys() - weight_map.keys())
        if lost:
            faults.append(f"{INDEX}: {lost[0]} is not in {weight_map[lost[0]]}{_others(lost)}")
        if more:
            faults.append(f"{tensors[more[0]].file.name}: {more[0]} is not in {INDEX}{_others(more)}")
    if faults:
        raise Damaged("; ".join(faults))
    return tensors


def _others(names: list[str]) -> str:
    return f" (and {len(names) - 1} more like it)" if len(names) > 1 else ""


def _files(folder: Path) -> tuple[list[Path], dict[str, str] | None, list[str]]:
    """The weight files of a folder, the index's weight map if there is one, and what is missing."""
    index = folder / INDEX
    if index.exists():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(weight_map.values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            return [], None, [f"{INDEX} is damaged; copy it again"]
        faults = [f"{name} is missing ({INDEX} names it)" for name in names if not (folder / name).exists()]
        return [folder / name for name in names if (folder / name).exists()], weight_map, faults
    if (folder / SINGLE).exists():
        return [folder / SINGLE], None, []
    found = sorted(file for file in folder.glob("*.safetensors") if file.exists())  # a link may lead nowhere
    if len(found) == 1 and not re.search(r"-of-0*(?!1\.)\d+\.safetensors$", found[0].name):
        return found, None, []
    if found:
        return [], None, [f"{len(found)} *.safetensors but no {INDEX}; copy the index too"]
    pickles = [*folder.glob("pytorch_model*.bin"), *folder.glob("consolidated*.pth")]
    if pickles:
        return (
            [],
            None,
            [f"only pickled weights ({pickles[0].name}); save them as safetensors (save_pretrained does)"],
        )
    return [], None, ["no *.safetensors there"]


def open_file(file: Path) -> dict[str, Tensor]:
    """The tensors of one file, in the order in which they lie. Raises Damaged where the file is not whole."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(length, MAX_HEADER)))
        header.pop("__metadata__", None)
        tensors = [_tensor(name, file, 8 + length, item) for name, item in header.items()]
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise Damaged(f"{file.name} is cut off or damaged ({error}); copy it again") from None
    tensors.sort(key=lambda tensor: (tensor.start, tensor.size))
    end = 8 + length
    for tensor in tensors:
        if tensor.start != end:
            raise Damaged(f"{file.name} is damaged ({tensor.name} overlaps or leaves a gap); copy it again")
        end += tensor.size
    size = file.stat().st_size
    if end > size:
        raise Damaged(f"{file.name} is cut off: {size:,} bytes of {end:,}; copy it again")
    if end < size:
        raise Damaged(
            f"{file.name} is damaged: {size - end:,} bytes at its end belong to no tensor; copy it again"
        )
    return {tensor.name: tensor for tensor in tensors}


def _tensor(name: str, file: Path, data: int, item: dict[str, Any]) -> Tensor:
    begin, end = item["data_offsets"]
    shape = tuple(item["shape"])
    numel = 1
    for length in shape:
        numel *= length
    if item["dtype"] not in ITEM_SIZE:
        raise ValueError(f"{name} has the unknown dtype {item['dtype']}")
    if end - begin != numel * ITEM_SIZE[item["dtype"]]:
        raise ValueError(f"{name} has {end - begin} bytes for {shape} {item['dtype']}")
    return Tensor(name, file, item["dtype"], shape, data + begin, end - begin)


def header_of(tensors: Iterable[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """The head of a file that holds (name, dtype, shape, bytes) in this order, up to where their data begins."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape, size in tensors:
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data begins on a multiple of eight, as the library has it
    return len(text).to_bytes(8, "little") + text


class Reader:
    """Bytes and numbers of tensors, from files that stay open until close(). Use as a context manager."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)

    def into(self, tensor: Tensor, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with a tensor's bytes from `offset` on. Raises OSError where the file has become shorter."""
        descriptor = self._files.get(tensor.file)
        if descriptor is None:
            descriptor = self._files[tensor.file] = os.open(tensor.file, os.O_RDONLY)
        done = 0
        while done < len(buffer):
            got = os.preadv(descriptor, [buffer[done:]], tensor.start + offset + done)
            if got == 0:
                raise OSError(f"{tensor.file}: became shorter while it was read")
            done += got

    def rows(self, tensor: Tensor, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Rows first to last of a tensor (all by default), in memory of their own, in the dtype of the file."""
        import torch

        length = tensor.shape[0] if tensor.shape else 1
        last = length if last is None else last
        row = tensor.size // length if length else 0
        raw = bytearray((last - first) * row)
        self.into(tensor, first * row, memoryview(raw))
        dtype = getattr(torch, TORCH_NAME[tensor.dtype])
        shape = (last - first, *tensor.shape[1:]) if tensor.shape else ()
        return torch.frombuffer(raw, dtype=dtype).view(shape) if raw else torch.empty(shape, dtype=dtype)


def same_content(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same bytes."""
    if one == other:
        return True
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    step = 1 << 24
    with Reader() as reader:
        for offset in range(0, one.size, step):
            left, right = (bytearray(min(step, one.size - offset)) for _ in range(2))
            reader.into(one, offset, memoryview(left))
            reader.into(other, offset, memoryview(right))
            if left != right:
                return False
    return True


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over every tensor's name, dtype, shape and 4 KB each of its beginning, middle and end.

    Tells one set of trained weights from another in a few thousand reads, whatever their size; the order of tensors
    and how they are spread over files do not count.
    """
    digest = hashlib.sha256()
    with Reader() as reader:
        for name in sorted(tensors):
            tensor = tensors[name]
            digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
            piece = min(4096, tensor.size)
            for offset in (0, (tensor.size - piece) // 2, tensor.size - piece):
                buffer = bytearray(piece)
                reader.into(tensor, offset, memoryview(buffer))
                digest.update(buffer)
    return digest.hexdigest()
