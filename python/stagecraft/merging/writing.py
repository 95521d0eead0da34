"""A plan streamed into shards: read, add, round, write, in a window of some 100 MB whatever the model's size.

The main thread reads and computes into one of a few buffers while another thread writes the last one. Files are
written past the page cache (O_DIRECT) where the file system allows it: a merged model is larger than what is worth
caching, and writing through the cache took 1 to 9 s for 3 GB here where this takes 1.1 s.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch

from stagecraft.errors import ProofFailed
from stagecraft.merging.plan import Output, Plan
from stagecraft.merging.tensors import ITEM_SIZE, TORCH_NAME, Reader, header_of

BUFFER, BUFFERS = 16 << 20, 3
ALIGNMENT = 4096  # of offset, length and address under O_DIRECT
BLOCK = (
    1 << 19
)  # elements computed at a time: 4 MB in float64, so that a block stays in the processor's cache
# In float64 every result is the number of its dtype that is nearest to the exact one. float32 would save an eighth of
# the processor's time and no time at all, as the disk is slower; where W and BA nearly cancel, which happens in every
# large model, it was up to 4 units in the last place off.
ARITHMETIC = torch.float64


def write_plan(plan: Plan, folder: Path, progress: Callable[[int], object]) -> None:
    """Write every file of the plan into `folder`, synced. `progress` is told bytes. Raises OSError, ProofFailed."""
    with Reader() as reader:
        for name, outputs in plan.files.items():
            header = header_of((o.name, o.dtype, o.shape, o.size) for o in outputs)
            total = len(header) + sum(output.size for output in outputs)
            with _Stream(folder / name, total) as stream:
                stream.put(header)
                for output in outputs:
                    # What comes from an adapter goes through the arithmetic, which finds numbers that are none.
                    plain = output.is_copy and output.source.file.parent == plan.base.folder
                    (_copy if plain else _compute)(output, reader, stream)
                    progress(output.size)


def _copy(output: Output, reader: Reader, stream: _Stream) -> None:
    done = 0
    while done < output.size:
        room = stream.room(output.size - done)
        reader.into(output.source, done, room)
        done += len(room)


def _compute(output: Output, reader: Reader, stream: _Stream) -> None:
    """The tensor block by block; see _Merged for the arithmetic."""
    merged = _Merged(output, reader)
    limit = torch.finfo(getattr(torch, TORCH_NAME[output.dtype])).max
    for first, last in merged.blocks():
        block = merged.rows(first, last)
        low, high = torch.aminmax(block)
        if not (low >= -limit and high <= limit):  # NaN compares as false
            raise ProofFailed(
                f"{output.name}: not every number is finite in {TORCH_NAME[output.dtype]} after merging "
                f"(rows {first} to {last - 1}: {low:.3g} to {high:.3g})"
            )
        _put(block.view(-1), output.dtype, stream)


def _put(numbers: torch.Tensor, dtype: str, stream: _Stream) -> None:
    """Round once to the dtype, straight into the stream's buffers."""
    size, done = ITEM_SIZE[dtype], 0
    while done < len(numbers):
        room = stream.room((len(numbers) - done) * size)
        view = torch.frombuffer(room, dtype=getattr(torch, TORCH_NAME[dtype]))
        view.copy_(numbers[done : done + len(view)])
        done += len(view)


class _Merged:
    """Rows of one merged tensor, before rounding: the source with its loras and added vectors on top."""

    def __init__(self, output: Output, reader: Reader) -> None:
        self.output, self.reader = output, reader
        self.length = output.shape[0] if output.shape else 1
        self.width = output.numel // self.length if self.length else 0
        self.raw = memoryview(bytearray(self.step * self.width * ITEM_SIZE[output.source.dtype]))
        self.block = torch.empty(self.step, self.width, dtype=ARITHMETIC)
        # Each as [rows, r] and [r, columns] of the weight as it is kept: W += scale * left @ right
        self.factors = [
            (a.T, b.T, lora.scale) if lora.transposed else (b, a, lora.scale)
            for lora in output.loras
            for a, b in [(reader.rows(lora.a).to(ARITHMETIC), reader.rows(lora.b).to(ARITHMETIC))]
        ]
        self.added = [(reader.rows(tensor).to(ARITHMETIC), scale) for tensor, scale in output.added]
        [self.dora] = [lora for lora in output.loras if lora.magnitude] or [None]
        self.columns = self._columns() if self.dora and self.dora.transposed else None

    @property
    def step(self) -> int:
        """Rows in a block."""
        return max(1, min(self.length, BLOCK // max(1, self.width)))

    def blocks(self) -> list[tuple[int, int]]:
        """(first, last) of the blocks that make up the tensor."""
        return [(k, min(k + self.step, self.length)) for k in range(0, self.length, self.step)]

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Rows first to last [rows, width]; at most a block's number. Overwritten by the next call."""
        block = self._sum(first, last)
        if self.dora is None:
            return block
        if self.columns is not None:
            return block.mul_(self.columns)
        magnitude = self.reader.rows(self.dora.magnitude, first, last).to(ARITHMETIC)
        return block.mul_((magnitude / torch.linalg.vector_norm(block, dim=1))[:, None])

    def _sum(self, first: int, last: int) -> torch.Tensor:
        """W + scale * BA + added, of these rows."""
        source, block = self.output.source, self.block[: last - first]
        size = self.width * ITEM_SIZE[source.dtype]
        raw = self.raw[: (last - first) * size]
        if size:
            self.reader.into(source, first * size, raw)
            block.copy_(
                torch.frombuffer(raw, dtype=getattr(torch, TORCH_NAME[source.dtype])).view(block.shape)
            )
        for left, right, scale in self.factors:
            block.addmm_(left[first:last], right, alpha=scale)
        for vector, scale in self.added:
            block.view(-1).add_(vector[first:last], alpha=scale)  # a bias: one number a row
        return block

    def _columns(self) -> torch.Tensor:
        """DoRA's factor for each column of a weight kept as [in, out]: its norm takes a pass of its own."""
        squares = torch.zeros(self.width, dtype=ARITHMETIC)
        for first, last in self.blocks():
            squares += self._sum(first, last).square().sum(0)
        magnitude = self.reader.rows(self.dora.magnitude).to(ARITHMETIC)
        return magnitude / squares.sqrt()


class _Stream:
    """A file written from front to back by a thread of its own. Use as a context manager."""

    def __init__(self, path: Path, total: int) -> None:
        self.path, self.total, self.written, self.filled = path, total, 0, 0
        self.descriptor = self._open()
        self.free: queue.SimpleQueue[mmap.mmap] = queue.SimpleQueue()
        self.full: queue.SimpleQueue[tuple[mmap.mmap, int] | None] = queue.SimpleQueue()
        for _ in range(BUFFERS):
            self.free.put(mmap.mmap(-1, BUFFER, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        self.buffer = self.free.get()
        self.error: OSError | None = None
        self.thread = threading.Thread(target=self._write, daemon=True)

    def _open(self) -> int:
        flags = os.O_CREAT | os.O_WRONLY | os.O_TRUNC
        try:
            descriptor = os.open(self.path, flags | os.O_DIRECT, 0o644)
            self.direct = True
        except OSError:  # a file system without it
            descriptor = os.open(self.path, flags, 0o644)
            self.direct = False
        try:
            os.posix_fallocate(descriptor, 0, self.total)  # a disk that is too full is told now
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENODEV):
                os.close(descriptor)
                raise
        return descriptor

    def __enter__(self) -> _Stream:
        self.thread.start()
        return self

    def room(self, wanted: int) -> memoryview:
        """The next bytes of the file, at most `wanted`, for the caller to fill. Raises the writer's OSError."""
        if self.filled == BUFFER:
            self._hand_over()
        count = min(wanted, BUFFER - self.filled)
        room = memoryview(self.buffer)[self.filled : self.filled + count]
        self.filled += count
        return room

    def put(self, data: bytes) -> None:
        """Bytes at the current place."""
        done = 0
        while done < len(data):
            room = self.room(len(data) - done)
            room[:] = data[done : done + len(room)]
            done += len(room)

    def _hand_over(self) -> None:
        if self.error:
            raise self.error
        self.full.put((self.buffer, self.filled))
        self.buffer, self.filled = self.free.get(), 0

    def _write(self) -> None:
        while (item := self.full.get()) is not None:
            buffer, count = item
            if not self.error:
                try:
                    self._write_all(memoryview(buffer)[:count])
                except OSError as error:
                    self.error = error
            self.free.put(buffer)

    def _write_all(self, data: memoryview) -> None:
        whole = len(data) // ALIGNMENT * ALIGNMENT if self.direct else len(data)
        done = 0
        while done < whole:
            try:
                done += os.pwrite(self.descriptor, data[done:whole], self.written + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not self.direct:
                    raise
                self._through_cache()
        if whole < len(data):  # the file's last bytes: what is not a multiple goes through the cache
            with contextlib.closing(open(self.path, "r+b", buffering=0)) as tail:
                tail.seek(self.written + whole)
                tail.write(data[whole:])
                os.fsync(tail.fileno())
        self.written += len(data)

    def _through_cache(self) -> None:
        """Some file systems take O_DIRECT when a file is opened and refuse it, or this alignment, when it is written."""
        fcntl.fcntl(
            self.descriptor, fcntl.F_SETFL, fcntl.fcntl(self.descriptor, fcntl.F_GETFL) & ~os.O_DIRECT
        )
        self.direct = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        try:
            if kind is None and self.filled:
                self.full.put((self.buffer, self.filled))
            self.full.put(None)
            self.thread.join()
            if kind is None:
                if self.error:
                    raise self.error
                os.fsync(self.descriptor)
        finally:
            os.close(self.descriptor)
