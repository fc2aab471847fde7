"""A safetensors file read with plain reads: what is in memory is what was asked for.

A memory map counts every page it ever touched as resident; copying a 70B model through one would show as 140 GB. Format:
https://github.com/huggingface/safetensors#format
"""

import json
import math
import os
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from megarl.checkpoint.sharded import BLOCK_BYTES, DTYPES

MAX_HEADER_BYTES = 100_000_000  # as the reference implementation has it


@dataclass(frozen=True)
class TensorPart:
    """A tensor of an open file, of which boxes can be read."""

    file: "TensorFile"  # which stays open as long as this
    key: str
    dtype_name: str
    shape: tuple[int, ...]
    start: int  # bytes from the start of the file

    def get_shape(self) -> list[int]:
        """The whole tensor's shape."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """The dtype as safetensors calls it."""
        return self.dtype_name

    def __getitem__(self, box: tuple[slice, ...]) -> torch.Tensor:
        """The elements of a box on the CPU; `box` has one plain slice for each axis. Raises `SafetensorError` or `OSError`."""
        if self.dtype_name not in DTYPES:
            raise SafetensorError(f"{self.key} is of type {self.dtype_name}; megarl reads {', '.join(sorted(DTYPES))}")
        spans = [part.indices(size)[:2] for part, size in zip(box, self.shape, strict=True)]
        out = torch.empty([stop - start for start, stop in spans], dtype=DTYPES[self.dtype_name])
        if out.numel() == 0:
            return out
        if all(span == (0, size) for span, size in zip(spans[1:], self.shape[1:], strict=True)):
            row_bytes = out.itemsize * math.prod(self.shape[1:])
            self._fill(out, self.start + (spans[0][0] * row_bytes if spans else 0))
            return out
        self._fill_by_rows(out, spans)
        return out

    def _fill_by_rows(self, out: torch.Tensor, spans: list[tuple[int, int]]) -> None:
        """Whole rows go through a small buffer, and only the asked columns are kept."""
        row_bytes = out.itemsize * math.prod(self.shape[1:])
        step = max(1, BLOCK_BYTES // row_bytes)
        columns = tuple(slice(start, stop) for start, stop in spans[1:])
        first, last = spans[0]
        for row in range(first, last, step):
            rows = torch.empty([min(step, last - row), *self.shape[1:]], dtype=out.dtype)
            self._fill(rows, self.start + row * row_bytes)
            out[row - first : row - first + len(rows)] = rows[(slice(None), *columns)]

    def _fill(self, tensor: torch.Tensor, offset: int) -> None:
        view = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
        while view:
            count = os.preadv(self.file.descriptor, [view[: 1 << 30]], offset)
            if count == 0:
                raise SafetensorError(f"{self.file.path} ends at byte {offset}; {self.key} needs {len(view)} more")
            view, offset = view[count:], offset + count


class TensorFile:
    """The tensors of a safetensors file, opened. Stands where `safetensors.safe_open` could: `keys`, `get_slice`.

    Raises `SafetensorError` when the header is not one, or does not describe exactly the bytes that follow.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.descriptor = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)
        self._entries, self.metadata, self._data_start = self._read_header()

    def keys(self) -> Iterable[str]:
        """Names of the tensors."""
        return self._entries.keys()

    def get_slice(self, key: str) -> TensorPart:
        """A tensor by its name. Raises `SafetensorError` when the file holds none."""
        if key not in self._entries:
            raise SafetensorError(f"{self.path} holds no tensor {key}")
        dtype_name, shape, begin = self._entries[key]
        return TensorPart(self, key, dtype_name, shape, self._data_start + begin)

    def _read_header(self) -> tuple[dict[str, tuple[str, tuple[int, ...], int]], dict[str, str], int]:
        size = os.fstat(self.descriptor).st_size
        length = int.from_bytes(os.pread(self.descriptor, 8, 0), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise SafetensorError(f"{self.path}: a header of {length} bytes does not fit in a file of {size}")
        try:
            header = json.loads(os.pread(self.descriptor, length, 8))
            metadata = header.pop("__metadata__", None) or {}
            entries = {key: _entry(value) for key, value in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SafetensorError(f"{self.path}: the header is damaged: {error}") from error
        end = 0
        for key, (dtype_name, shape, begin, stop) in sorted(entries.items(), key=lambda item: item[1][2:]):
            if begin != end or stop < begin:
                raise SafetensorError(f"{self.path}: {key} lies at {begin}:{stop}; expected it to start at {end}")
            if dtype_name in DTYPES and stop - begin != math.prod(shape) * DTYPES[dtype_name].itemsize:
                raise SafetensorError(f"{self.path}: {key} of type {dtype_name} and shape {list(shape)} cannot take {stop - begin} bytes")
            end = stop
        if 8 + length + end != size:
            raise SafetensorError(f"{self.path} has {size} bytes; its header describes {8 + length + end}")
        return {key: entry[:3] for key, entry in entries.items()}, metadata, 8 + length


def _entry(value: dict) -> tuple[str, tuple[int, ...], int, int]:
    dtype_name, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
    numbers = [*shape, begin, end]
    if not isinstance(dtype_name, str) or not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ValueError(f"an entry is {value!r}"[:200])
    return dtype_name, tuple(shape), begin, end
