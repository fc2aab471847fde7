"""Tensors in rows, a bounded number of bytes at a time: how conversion copies and compares models that do not fit into memory."""

import math
from collections.abc import Iterable, Iterator, Mapping

import torch

from megarl.checkpoint.sharded import BLOCK_BYTES, TensorEntry, whole
from megarl.errors import CheckpointError, SetupError
from megarl.models.pieces import Box, TensorSource

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
MAX_SHARD_BYTES = 5_000_000_000


def wanted_dtype(name: str | None, stored: torch.dtype) -> torch.dtype:
    """The type a user asked for by its short name, or the stored one. Raises `SetupError`."""
    if name is None:
        return stored
    if name not in DTYPES:
        raise SetupError(f"dtype is {name!r}; expected one of {sorted(DTYPES)}")
    return DTYPES[name]


def plan_shards(entries: list[TensorEntry], max_shard_bytes: int) -> list[list[TensorEntry]]:
    """Consecutive tensors in files of at most `max_shard_bytes`; a larger tensor gets its own file."""
    shards: list[list[TensorEntry]] = [[]]
    room = max_shard_bytes
    for entry in entries:
        if entry.num_bytes > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(entry)
        room -= entry.num_bytes
    return shards


class CastSource:
    """The tensors of `source` as another directory holds them: every tensor rounded to its type in `dtypes`."""

    def __init__(self, source: TensorSource, dtypes: Mapping[str, torch.dtype]):
        self._source, self._dtypes = source, dtypes

    def names(self) -> Iterable[str]:
        """Every tensor there is."""
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole tensor's shape."""
        return self._source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """The type it is rounded to."""
        return self._dtypes[name]

    def read(self, name: str, box: Box) -> torch.Tensor:
        """The elements of `box`, rounded."""
        return self._source.read(name, box).to(self._dtypes[name])


def row_blocks(source: TensorSource, entry: TensorEntry, block_bytes: int = BLOCK_BYTES) -> Iterator[torch.Tensor]:
    """The rows of a tensor of `source` from first to last in `entry`'s dtype, in blocks of about `block_bytes`, one row at least.

    Raises `CheckpointError` for a number that `entry`'s dtype cannot hold: float16 ends at 65504.
    """
    if not entry.shape:
        yield _cast(source.read(entry.key, ()), entry)
        return
    rows, others = entry.shape[0], whole(entry.shape[1:])
    row_bytes = math.prod(entry.shape[1:]) * max(entry.dtype.itemsize, 4)  # what is read may be wider than what is asked for
    step = max(1, block_bytes // max(1, row_bytes))
    for row in range(0, rows, step):
        yield _cast(source.read(entry.key, ((row, min(step, rows - row)), *others)), entry)


def first_difference(expected: TensorSource, found: TensorSource, entries: Iterable[TensorEntry]) -> str:
    """What `found` holds otherwise than `expected` cast to the entries' dtypes, bit by bit; empty when nothing is. Reads both once."""
    for entry in entries:
        stored = found.dtype(entry.key)
        if stored != entry.dtype:
            return f"{entry.key} is of type {stored}; expected {entry.dtype}"
        row = 0
        for wanted, got in zip(row_blocks(expected, entry), row_blocks(found, entry), strict=True):
            if not same_bits(wanted, got):
                return f"{entry.key} differs in rows {row} to {row + len(wanted) - 1}"
            row += len(wanted) if wanted.dim() else 1
    return ""


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """True when two tensors of one dtype hold the same bytes: a NaN equals itself, -0 is not 0."""
    return a.shape == b.shape and torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)))


def _cast(block: torch.Tensor, entry: TensorEntry) -> torch.Tensor:
    cast = block.to(entry.dtype)
    if entry.dtype == torch.float16 and bool((cast.isinf() & block.isfinite()).any()):
        found, limit = block[block.isfinite()].abs().max().item(), torch.finfo(torch.float16).max
        raise CheckpointError(f"{entry.key} holds {found:.4g}; float16 ends at {limit:.0f}: export as bf16")
    return cast
