"""Tensors on disk: safetensors files written one tensor at a time, and the check that pieces make up whole tensors.

Boxes are those of `bridge.plan`: one `(offset, size)` pair an axis, in Hugging Face coordinates of the named tensor.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from blake3 import blake3

from megarl.bridge.plan import Box, intersect, num_elements

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
BLOCK_BYTES = 16 << 20
READ_BYTES = 2 << 20  # at a time; several files are verified side by side


@dataclass(frozen=True)
class TensorEntry:
    """A tensor that a safetensors file will hold."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Hash(Protocol):
    """`hashlib`'s objects and BLAKE3's."""

    def update(self, data: bytes | memoryview, /) -> object: ...
    def hexdigest(self) -> str: ...


@dataclass(frozen=True)
class WrittenFile:
    """Size and hash of a file as it was written: BLAKE3 in checkpoints, SHA-256 in exports. Both in hex."""

    num_bytes: int
    digest: str


def whole(shape: Sequence[int]) -> Box:
    """The box that covers a tensor of this shape."""
    return tuple((0, size) for size in shape)


def cover_faults(shapes: Mapping[str, tuple[int, ...]], boxes: Iterable[tuple[str, Box]]) -> list[str]:
    """What is wrong when `boxes` should cover every element of every tensor in `shapes` exactly once. Empty when nothing is."""
    held: dict[str, list[Box]] = {name: [] for name in shapes}
    faults = []
    for name, box in boxes:
        if name not in held:
            faults.append(f"{name} is not in the table of this model")
        elif len(box) != len(shapes[name]) or any(o < 0 or n < 1 or o + n > size for (o, n), size in zip(box, shapes[name], strict=False)):
            faults.append(f"a piece of {name} has the box {box}, outside the shape {tuple(shapes[name])}")
        else:
            held[name].append(box)
    for name, pieces in held.items():
        expected, found = math.prod(shapes[name]), sum(num_elements(box) for box in pieces)
        if found < expected:
            faults.append(f"{name} has {found} of {expected} elements")
        elif found > expected or _overlap(pieces):
            faults.append(f"{name} has elements that are held twice")
    return faults


def _overlap(boxes: Sequence[Box]) -> bool:
    """True when two boxes share an element. In order of their first rows, only those that reach as far as the next are compared."""
    reaching: list[Box] = []
    for box in sorted(boxes):
        reaching = [other for other in reaching if sum(other[0]) > box[0][0]]
        if any(intersect(other, box) for other in reaching):
            return True
        reaching.append(box)
    return False


def write_tensors(
    path: Path,
    entries: Sequence[TensorEntry],
    produce: Callable[[TensorEntry], torch.Tensor | Iterable[torch.Tensor]],
    metadata: dict[str, str] | None = None,
    new_hash: Callable[[], Hash] = blake3,
) -> WrittenFile:
    """Write a safetensors file of `entries`, asking `produce` for one tensor after the other; returns its size and hash.

    `produce` gives a tensor whole, or its rows in blocks. Only one tensor or block is held at a time. The file is flushed to disk before
    this returns. Tensors of wide types come first, so that every tensor is aligned, then by name: equal tensors give equal files.
    Format: https://github.com/huggingface/safetensors#format
    """
    ordered = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.key))
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for entry in ordered:
        header[entry.key] = {"dtype": DTYPE_NAMES[entry.dtype], "shape": entry.shape, "data_offsets": [offset, offset + entry.num_bytes]}
        offset += entry.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = new_hash()
    with open(path, "wb", buffering=0) as file:
        for block in (len(text).to_bytes(8, "little"), text):
            _write_all(file, block)
            digest.update(block)
        for entry in ordered:
            num_bytes = 0
            for tensor in _blocks(produce(entry), entry):
                raw = memoryview(tensor.detach().to("cpu", entry.dtype).contiguous().reshape(-1).view(torch.uint8).numpy())
                for start in range(0, len(raw), BLOCK_BYTES):
                    block = raw[start : start + BLOCK_BYTES]
                    _write_all(file, block)
                    digest.update(block)
                num_bytes += len(raw)
            if num_bytes != entry.num_bytes:
                raise ValueError(f"{entry.key} came as {num_bytes} bytes; its entry says {entry.num_bytes}")
        _flush(file)
    return WrittenFile(8 + len(text) + offset, digest.hexdigest())


def _blocks(made: torch.Tensor | Iterable[torch.Tensor], entry: TensorEntry) -> Iterable[torch.Tensor]:
    if not isinstance(made, torch.Tensor):
        return made
    if tuple(made.shape) != tuple(entry.shape):
        raise ValueError(f"{entry.key} has the shape {tuple(made.shape)}; its entry says {entry.shape}")
    return (made,)


def write_text(path: Path, text: str) -> WrittenFile:
    """Write a small text file and flush it to disk."""
    return write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> WrittenFile:
    """Write a small file and flush it to disk."""
    with open(path, "wb", buffering=0) as file:
        _write_all(file, data)
        _flush(file)
    return WrittenFile(len(data), blake3(data).hexdigest())


def measure(path: Path) -> WrittenFile:
    """Size and BLAKE3 of a file as it is on disk now."""
    digest, num_bytes = blake3(), 0
    buffer = memoryview(bytearray(READ_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            num_bytes += count
    return WrittenFile(num_bytes, digest.hexdigest())


def sync(path: Path) -> None:
    """Flush a file, or a directory's entries, to disk, so that they survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(file, block: bytes | memoryview) -> None:
    """Unbuffered writes may be short; a full disk raises on the write that finds no room. The error names the file."""
    view = memoryview(block)
    try:
        while view:
            view = view[file.write(view) :]
    except OSError as error:
        error.filename = error.filename or file.name
        raise


def _flush(file) -> None:
    try:
        os.fsync(file.fileno())
    except OSError as error:
        error.filename = error.filename or file.name
        raise
