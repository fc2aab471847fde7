"""Tensors of a Megatron-LM `torch_dist` checkpoint, read as data: `.metadata` says where they lie in the `.distcp` files.

`common.pt` and every `_extra_state` are pickles of arbitrary objects and are never opened. Format: `torch.distributed.checkpoint` (torch
2.4 to 2.13), as Megatron-Core 0.7 to 0.16 writes it: each chunk of a tensor is a file of `torch.save` inside a `.distcp` file.
"""

import io
import json
import math
import os
import re
import weakref
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from megarl.bridge.boxes import Box, intersect, num_elements, within
from megarl.checkpoint import manifest as manifests
from megarl.checkpoint.pickle_data import Made, Name, Persistent, read_pickle
from megarl.checkpoint.sharded import DTYPE_NAMES
from megarl.checkpoint.tensor_file import TensorPart
from megarl.errors import CheckpointError

METADATA = ".metadata"
MAX_METADATA_BYTES = 1 << 30
MAX_TENSOR_PICKLE_BYTES = 1 << 16
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPE_NAMES}
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_DCP = "torch.distributed.checkpoint."
METADATA_NAMES = {
    *((_DCP + "metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING")),
    *((_DCP + "metadata", name) for name in ("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata")),
    *((_DCP + "planner", name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")),
    *((_DCP + "filesystem", name) for name in ("_StorageInfo", "_StoragePrefix", "SerializationFormat")),
    *(("torch.distributed._shard.sharded_tensor.metadata", name) for name in ("TensorProperties", "MEM_FORMAT_ENCODING")),
    *(("megatron.core.dist_checkpointing.strategies.torch", name) for name in ("MCoreMetadata", "MCoreSavePlan")),
    *(("torch", name) for name in ("Size", "strided", *_DTYPES, "float8_e4m3fn", "float8_e5m2")),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("collections", "OrderedDict"),
    ("collections", "defaultdict"),
}
TENSOR_NAMES = {
    ("torch._utils", "_rebuild_tensor_v2"),
    ("collections", "OrderedDict"),
    *(("torch", name) for name in _STORAGES),
}


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, and the bytes of a file that hold it."""

    box: Box
    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class DistTensor:
    """A tensor of the checkpoint, with the axes for layer and expert that Megatron puts in front."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


class DistCheckpoint:
    """The tensors of one checkpoint, by Megatron's names. Raises `CheckpointError` for whatever is missing, damaged or not plain data."""

    def __init__(self, directory: Path):
        self.directory = find_iteration(directory)
        self.tensors = read_metadata(self.directory)
        self._files: dict[str, _OpenFile] = {}
        self._located: dict[Chunk, TensorPart] = {}

    def read(self, name: str, box: Box) -> torch.Tensor:
        """The elements of `box`, put together from the chunks that hold them, on the CPU."""
        tensor = self.tensors[name]
        out, found = torch.empty([size for _, size in box], dtype=tensor.dtype), 0
        for chunk in tensor.chunks:
            if (shared := intersect(chunk.box, box)) is not None:
                out[within(shared, box)] = self._read(name, tensor, chunk, within(shared, chunk.box))
                found += num_elements(shared)
        if found != num_elements(box):
            raise CheckpointError(f"{self.directory}: {name} has {found} of the {num_elements(box)} elements in the box {box}")
        return out

    def _read(self, name: str, tensor: DistTensor, chunk: Chunk, where: tuple[slice, ...]) -> torch.Tensor:
        """Leading axes of which one position is asked are an offset, so that rows behind them are read without the rest."""
        try:
            part = self._locate(name, tensor, chunk)
            shape, axis, start = part.shape, 0, part.start
            while axis + 1 < len(shape) and where[axis].stop - where[axis].start == 1:
                start += where[axis].start * math.prod(shape[axis + 1 :]) * tensor.dtype.itemsize
                axis += 1
            rows = TensorPart(part.file, part.key, part.dtype_name, shape[axis:], start)[where[axis:]]
        except (OSError, SafetensorError, zipfile.BadZipFile, KeyError, ValueError) as error:
            raise CheckpointError(f"{self.directory / chunk.file}: {name}: {error}") from error
        return rows.view([part.stop - part.start for part in where])

    def _locate(self, name: str, tensor: DistTensor, chunk: Chunk) -> TensorPart:
        if chunk not in self._located:
            if chunk.file not in self._files:
                self._files[chunk.file] = _OpenFile(self.directory / chunk.file)
            sizes = tuple(size for _, size in chunk.box)
            self._located[chunk] = _saved_tensor(self._files[chunk.file], name, tensor.dtype, sizes, chunk)
        return self._located[chunk]


def find_iteration(directory: Path) -> Path:
    """The directory of one iteration: `directory` itself, or the one its `latest_checkpointed_iteration.txt` names."""
    tracker = directory / "latest_checkpointed_iteration.txt"
    if not (directory / METADATA).is_file() and tracker.is_file():
        named = tracker.read_text(errors="replace").strip()
        directory = directory / (f"iter_{int(named):07d}" if re.fullmatch(r"\d{1,9}", named) else "release")
    if (directory / METADATA).is_file():
        backend = _backend(directory / "metadata.json")
        if backend != "torch_dist":
            raise CheckpointError(f"{directory} is of the format {backend!r}; megarl reads 'torch_dist'")
        return directory
    if any(directory.glob("mp_rank_*")) or any(directory.glob("*.zarr")) or any(directory.glob("*/.zarray")):
        raise CheckpointError(f"{directory} is a Megatron-LM checkpoint of another format; save it with --ckpt-format torch_dist first")
    raise CheckpointError(f"{directory} holds no {METADATA}: expected a Megatron-LM checkpoint of the format torch_dist")


def read_metadata(directory: Path) -> dict[str, DistTensor]:
    """The tensors that `.metadata` lists, and where they lie."""
    path = directory / METADATA
    try:
        if path.stat().st_size > MAX_METADATA_BYTES:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes; megarl reads up to {MAX_METADATA_BYTES}")
        metadata = read_pickle(path.read_bytes(), METADATA_NAMES, str(path))
        return _tensors(metadata.state)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{path} is not the metadata of a torch_dist checkpoint: {type(error).__name__}: {error}") from error


def _tensors(state: dict[str, Any]) -> dict[str, DistTensor]:
    stored = {}
    for index, info in state["storage_data"].items():
        where = index.state
        stored[where["fqn"], _size(where["offset"]) if where.get("offset") is not None else None] = info.state
    tensors = {}
    for name, entry in state["state_dict_metadata"].items():
        if entry.name.name != "TensorStorageMetadata":
            continue  # a pickled object
        dtype = _DTYPES.get(_dtype_name(entry.state["properties"].state))
        chunks = []
        for chunk in entry.state["chunks"]:
            offsets, sizes = _size(chunk.state["offsets"]), _size(chunk.state["sizes"])
            info = stored[name, offsets]
            chunks.append(_chunk(name, tuple(zip(offsets, sizes, strict=True)), info))
        if dtype is not None:  # others (float8) are told when they are asked for
            tensors[name] = DistTensor(dtype, _size(entry.state["size"]), tuple(chunks))
    return tensors


def _chunk(name: str, box: Box, info: dict[str, Any]) -> Chunk:
    file, offset, length = info["relative_path"], info["offset"], info["length"]
    if not isinstance(file, str) or not manifests.is_inside(file) or "/" in file:
        raise CheckpointError(f"{METADATA} puts {name} in {file!r}; expected a file name in the checkpoint: refused")
    if info.get("transform_descriptors"):
        raise CheckpointError(f"{METADATA}: {name} is stored through {info['transform_descriptors']}; megarl reads plain tensors")
    if not all(isinstance(number, int) and number >= 0 for number in (offset, length)):
        raise ValueError(f"{name} lies at {offset}:{length}")
    return Chunk(box, file, offset, length)


def _size(made: Made) -> tuple[int, ...]:
    """`torch.Size((2, 3))` as it was pickled."""
    numbers = tuple(made.arguments[0]) if made.arguments else ()
    if made.name.name != "Size" or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"a size is {made.name} of {numbers}")
    return numbers


def _dtype_name(state: Any) -> str:
    dtype = state[0] if isinstance(state, tuple) else state["dtype"]
    return dtype.name if isinstance(dtype, Name) else ""


def _backend(path: Path) -> str:
    try:
        return str(json.loads(path.read_text())["sharded_backend"])
    except (OSError, ValueError, KeyError, TypeError):
        return "torch_dist"  # written by torch.distributed.checkpoint alone


class _OpenFile:
    """A `.distcp` file, opened."""

    def __init__(self, path: Path):
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)


class _Slice(io.RawIOBase):
    """Bytes [offset, offset + length) of an open file, as a file."""

    def __init__(self, file: _OpenFile, offset: int, length: int):
        self.file, self.offset, self.length, self.position = file, offset, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        self.position = max(0, base + offset)
        return self.position

    def readinto(self, buffer) -> int:
        count = max(0, min(len(buffer), self.length - self.position))
        data = os.pread(self.file.descriptor, count, self.offset + self.position)
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def _saved_tensor(file: _OpenFile, name: str, dtype: torch.dtype, sizes: tuple[int, ...], chunk: Chunk) -> TensorPart:
    """Where the elements of one `torch.save`d tensor lie: it is a zip archive whose members are not compressed."""
    with zipfile.ZipFile(io.BufferedReader(_Slice(file, chunk.offset, chunk.length))) as archive:
        (index,) = [member for member in archive.namelist() if member.endswith("/data.pkl")]
        if archive.getinfo(index).file_size > MAX_TENSOR_PICKLE_BYTES:
            raise ValueError(f"its description takes {archive.getinfo(index).file_size} bytes")
        made = read_pickle(archive.read(index), TENSOR_NAMES, f"{file.path}: {name}")
        prefix = index.removesuffix("data.pkl")
        if f"{prefix}byteorder" in archive.namelist() and archive.read(f"{prefix}byteorder") != b"little":
            raise ValueError("its byte order is not little")
        key, first, shape = _description(made, dtype)
        if shape != sizes:
            raise ValueError(f"its shape is {list(shape)}; {METADATA} says {list(sizes)}")
        member = archive.getinfo(f"{prefix}data/{key}")
        needed = (first + math.prod(shape)) * dtype.itemsize
        if member.compress_type != zipfile.ZIP_STORED or member.file_size < needed:
            raise ValueError(f"its data has {member.file_size} bytes, compressed by {member.compress_type}; expected {needed}, plain")
    header = os.pread(file.descriptor, 30, chunk.offset + member.header_offset)  # of the member: its name and extra field follow
    start = member.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if start + member.file_size > chunk.length:
        raise ValueError("its data leaves its part of the file")
    return TensorPart(file, name, DTYPE_NAMES[dtype], sizes, chunk.offset + start + first * dtype.itemsize)


def _description(made: Any, dtype: torch.dtype) -> tuple[str, int, tuple[int, ...]]:
    """(key of the storage, first element, shape) of a pickled tensor. Raises `ValueError` when it is no plain contiguous one."""
    if not isinstance(made, Made) or made.name.name != "_rebuild_tensor_v2":
        raise ValueError("it is no plain tensor")
    storage, first, shape, strides = made.arguments[:4]
    if not isinstance(storage, Persistent):
        raise ValueError("its storage is not in the archive")
    _, kind, key, _, _ = storage.identifier
    expected, contiguous = 1, True
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        contiguous &= size <= 1 or stride == expected
        expected *= size
    if not contiguous or _STORAGES.get(kind.name) != dtype or not re.fullmatch(r"\d+", key) or type(first) is not int or first < 0:
        raise ValueError(f"it is a {kind.name} with strides {strides}; expected a contiguous one of {dtype}")
    return key, first, tuple(shape)
