"""A batch cut into microbatches, and how a model reads one of them: rows side by side and padded, or one behind the other.

Packed, the sequences of a microbatch are one row of the model's input: positions start again with every sequence, attention stays
inside it, and the padding behind the last one is a sequence of its own that nobody reads. Rows, heads and losses keep `[B, T]`:
`TokenBatch.places` says where in the hidden states a token's numbers are.

Axis letters: B rows of a data-parallel rank, M rows of a microbatch, Q sequences of a microbatch, T tokens of a padded row, S positions of
the model's input.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megarl.data.packing import Cost, packed
from megarl.parallel import device
from megarl.records import PackedTokens, TokenBatch

device.prepare()

from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402  (the host is prepared first)

Rows = TypeVar("Rows")  # a record with rows and `sequences()`: TokenBatch and its kin, PreferenceBatch


@dataclass(frozen=True)
class Packing:
    """How sequences share a microbatch: up to `max_tokens` (`data.pack_size.token_budget`), the work even by `cost`."""

    max_tokens: int
    cost: Cost


@dataclass(frozen=True)
class Microbatches(Sequence[Rows], Generic[Rows]):
    """The microbatches in order. `order` i64[sum of M]: the row of the batch that each of their rows is; dummies lie beyond the batch."""

    parts: tuple[Rows, ...]
    order: Tensor
    is_packed: bool = False

    def __getitem__(self, index: Any) -> Any:
        return self.parts[index]

    def __len__(self) -> int:
        return len(self.parts)

    def sequences(self, rows: Rows) -> TokenBatch:
        """The sequences of one microbatch as the model reads them."""
        sequences = rows.sequences()
        return PackedTokens(sequences.token_ids, sequences.lengths) if self.is_packed else sequences

    @property
    def num_tokens(self) -> int:
        """Positions that every microbatch needs at least: T, or the tokens of the largest pack."""
        if not self.is_packed:
            return self.parts[0].sequences().token_ids.shape[1]
        return max(1, *(int(rows.sequences().lengths.sum()) for rows in self.parts))

    @property
    def width(self) -> int:
        """Sequences that lie side by side in the hidden states [S, width, H]."""
        return 1 if self.is_packed else len(self.parts[0].sequences())

    def filled(self, count: int) -> "Microbatches[Rows]":
        """The same with microbatches of dummies at the end until there are `count` of them."""
        last = self.parts[-1]
        size = 1 if self.is_packed else len(last)
        dummy = last.padded(len(last) + size).rows(slice(len(last), len(last) + size))
        missing = count - len(self)
        order = torch.cat([self.order, len(self.order) + torch.arange(missing * size)])
        return replace(self, parts=self.parts + (dummy,) * missing, order=order)

    def joined(self, results: Sequence[Tensor], sequences_per_row: int, num_rows: int) -> Tensor:
        """The microbatches' results [Q, ...] as one [sequences_per_row * num_rows, ...], sequence axis outside rows, without dummies."""
        by_row = torch.cat([result.view(sequences_per_row, -1, *result.shape[1:]) for result in results], dim=1)
        in_order = by_row.index_select(1, torch.argsort(self.order).to(by_row.device))
        return in_order[:, :num_rows].flatten(0, 1).contiguous()


def cut(batch: Rows, microbatch_size: int, multiple_of: int = 1, packing: Packing | None = None) -> Microbatches[Rows]:
    """The batch as microbatches, `multiple_of` of them or more: packed by tokens, or else of at most `microbatch_size` sequences.

    Without packing, sizes are equal (at least one row) and balanced, so that few rows are dummies; dummies stand at the end and have
    length 0 and masks that are False. With packing, a microbatch without rows holds one dummy.
    """
    if packing is not None:
        return _packed(batch, packing, multiple_of)
    most = max(1, microbatch_size // batch.sequences_per_row)
    count = max(1, -(-len(batch) // most))
    count = -(-count // multiple_of) * multiple_of
    size = max(1, -(-len(batch) // count))
    batch = batch.padded(count * size)
    parts = tuple(batch.rows(slice(start, start + size)) for start in range(0, count * size, size))
    return Microbatches(parts, torch.arange(count * size))


def row_lengths(batch: Any) -> np.ndarray:
    """Tokens of the sequences of each row: i64[B, sequences_per_row]."""
    return batch.sequences().lengths.view(batch.sequences_per_row, -1).t().cpu().numpy()


def _packed(batch: Rows, packing: Packing, multiple_of: int) -> Microbatches[Rows]:
    lengths = row_lengths(batch)
    bins = packed(lengths.sum(axis=1), packing.cost.of(lengths), packing.max_tokens, multiple_of)
    num_empty = sum(len(rows) == 0 for rows in bins)
    batch, dummy = batch.padded(len(batch) + num_empty), len(batch)
    order = []
    for rows in bins:
        order.append(torch.from_numpy(rows) if len(rows) else torch.tensor([dummy]))
        dummy += len(rows) == 0
    where = batch.sequences().lengths.device
    return Microbatches(tuple(batch.rows(rows.to(where)) for rows in order), torch.cat(order), is_packed=True)


@dataclass
class PackedSequences(PackedSeqParams):
    """Where the sequences of a packed row end, for Megatron's attention; `segments` are their lengths, for ours."""

    segments: tuple[int, ...] = ()


@dataclass(frozen=True)
class ModelInput:
    """What a chunk's `forward` takes: i64[1 or Q, S] tokens and positions, and where the sequences of a packed row end."""

    token_ids: Tensor
    position_ids: Tensor
    sequence_of: Tensor  # number of the sequence at each position, -1 where nothing stands: what a mixture's router balances over
    packed: PackedSequences | None


def model_input(sequences: TokenBatch, num_positions: int) -> ModelInput:
    """A microbatch's sequences as a model reads them, with padding up to S = `num_positions`."""
    token_ids, lengths = sequences.token_ids, sequences.lengths
    where = token_ids.device
    if not isinstance(sequences, PackedTokens):
        positions = torch.arange(num_positions, device=where)[None].expand(len(token_ids), -1)
        rows = torch.arange(len(token_ids), device=where)[:, None]
        sequence_of = torch.where(positions < lengths[:, None], rows, -1)
        return ModelInput(F.pad(token_ids, (0, num_positions - token_ids.shape[1])), positions, sequence_of, None)
    offsets = torch.arange(token_ids.shape[1], device=where)[None].expand_as(token_ids)
    is_token = offsets < lengths[:, None]
    tokens, positions = token_ids[is_token], offsets[is_token]
    missing = num_positions - len(tokens)
    tail = torch.arange(missing, device=where)
    segments = tuple(length for length in (*lengths.tolist(), missing) if length)
    sequence_of = F.pad(torch.repeat_interleave(torch.arange(len(lengths), device=where), lengths), (0, missing), value=-1)
    rows = (row[None] for row in (F.pad(tokens, (0, missing)), torch.cat([positions, tail]), sequence_of))
    return ModelInput(*rows, _packed_sequences(segments, where))


def _packed_sequences(segments: tuple[int, ...], where: torch.device) -> PackedSequences:
    ends = torch.tensor([0, *np.cumsum(segments)], dtype=torch.int32, device=where)
    return PackedSequences(
        # rotary embeddings are looked up by position (`DecoderChunk`), which also says "thd" to layers that take sequences one by one
        qkv_format="sbhd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=max(segments),
        max_seqlen_kv=max(segments),
        segments=segments,
    )
