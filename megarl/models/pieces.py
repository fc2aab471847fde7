"""A model's weights as pieces in Hugging Face coordinates: which box of which tensor this rank holds, and the live view of it.

Import reads boxes into the views, export and checkpoints write each box by its owner, and the bridge plans copies between boxes.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megarl.bridge.boxes import Box, split, within
from megarl.errors import WeightMapError
from megarl.models.spec import WeightTable
from megarl.parallel import device

device.prepare()

from megatron.core.dist_checkpointing.mapping import (  # noqa: E402  (the host is prepared first)
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)

BLOCK_ELEMENTS = 16 << 20  # read at once: what a rank needs beside the model while it loads


@dataclass(frozen=True)
class Piece:
    """The box of a Hugging Face tensor that a view of this rank's parameters holds.

    `view` aliases the parameter, in the parameter's type. `is_owner` is True on exactly one rank for every element of the model,
    `is_shard_owner` on one rank of every data-parallel replica.
    """

    hf_name: str
    box: Box
    view: Tensor
    is_owner: bool
    hf_shape: tuple[int, ...]
    is_shard_owner: bool = True


class TensorSource(Protocol):
    """Weights by Hugging Face name, of which boxes can be read without the rest."""

    def names(self) -> Iterable[str]:
        """Every tensor there is."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole tensor's shape."""
        ...

    def read(self, name: str, box: Box) -> Tensor:
        """The elements of `box`, in the stored type, on the CPU."""
        ...


def source_pieces(chunks: Sequence[torch.nn.Module], table: WeightTable) -> list[Piece]:
    """The pieces of this rank's model chunks, in an order that is the same on every call.

    Take them after DDP and the optimizer are built (they move parameters into their buffers); from then on the views stay live.
    Raises `WeightMapError` for a parameter the table does not list.
    """
    pieces = []
    for chunk in chunks:
        while hasattr(chunk, "module"):
            chunk = chunk.module
        for shard in _shards(chunk):
            pieces.extend(_pieces_of(shard, table))
    return pieces


def load_pieces(pieces: Sequence[Piece], source: TensorSource) -> None:
    """Copy every piece's box from `source` into the model, cast to the parameter's type.

    Of a large box only a block is in memory at a time. Raises `WeightMapError` before the first copy when `source` lacks a tensor or has
    it in another shape.
    """
    names = set(source.names())
    for piece in pieces:
        if piece.hf_name not in names:
            raise WeightMapError(f"the weights lack {piece.hf_name}, which the model needs; found {len(names)} other tensors")
        shape = tuple(source.shape(piece.hf_name))
        if shape != piece.hf_shape:
            raise WeightMapError(f"{piece.hf_name} has shape {list(shape)} in the weights; the model needs {list(piece.hf_shape)}")
    with torch.no_grad():
        for piece in pieces:
            for block in split(piece.box, BLOCK_ELEMENTS):
                piece.view[within(block, piece.box)].copy_(source.read(piece.hf_name, block))


def _shards(chunk: torch.nn.Module) -> Iterator[ShardedTensor]:
    for entry in chunk.sharded_state_dict().values():
        if isinstance(entry, ShardedTensorFactory):  # a parameter that is stored as several tensors: gate and up projection
            yield from entry.build()
        elif isinstance(entry, ShardedTensor):
            yield entry


def _pieces_of(shard: ShardedTensor, table: WeightTable) -> Iterator[Piece]:
    prepended = shard.prepend_axis_num
    indices, offset = shard.global_offset[:prepended], shard.global_offset[prepended:]
    view, first_row = shard.data.detach(), offset[0]
    end_row = first_row + view.shape[0]
    columns = tuple(zip(offset[1:], view.shape[1:], strict=True))
    for rows in table.segments(shard.key, indices):
        low, high = max(first_row, rows.row), min(end_row, rows.row + rows.num_rows)
        if low >= high:
            continue
        yield Piece(
            hf_name=rows.hf_name,
            box=((rows.hf_row + low - rows.row, high - low), *columns),
            view=view[low - first_row : high - first_row],
            is_owner=is_main_replica(shard.replica_id),
            hf_shape=table.hf_shapes[rows.hf_name],
            is_shard_owner=is_main_replica(shard.replica_id[:-1]),  # the last entry counts data-parallel replicas
        )
