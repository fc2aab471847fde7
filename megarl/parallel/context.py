"""Context parallelism: a sequence's tokens over several ranks, in Megatron's balanced order, and how they meet again.

The positions are cut into 2 x C equal chunks for C context-parallel ranks; rank c holds the chunks c and 2 C - 1 - c, so that causal
attention costs every rank the same, and rotary embeddings and Transformer Engine's attention expect exactly that (Megatron-Core's
`get_pos_emb_on_this_cp_rank`). Token ids, masks and everything else that speaks `[B, T]` stay whole on every rank; only
hidden states are cut, and what a head says about them is summed back to `[B, T]`. Every rank then computes the same loss from the
same numbers and takes the gradient of its own part, unsummed; the weights' gradients are sums over data and context ranks.

Axis letters: S positions of whole sequences (T tokens and padding), C context-parallel ranks, B sequences.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.parallel import device

device.prepare()

from megatron.core import parallel_state  # noqa: E402  (the host is prepared first)
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region  # noqa: E402


def padded_length(num_tokens: int, context: int, split_over_tensor: int = 1) -> int:
    """S for T = `num_tokens`: equal chunks on every rank, each rank's part divisible by `split_over_tensor` (sequence parallelism)."""
    multiple = split_over_tensor if context == 1 else context * math.lcm(2, split_over_tensor)
    return -(-num_tokens // multiple) * multiple


def positions_of(context_rank: int, context: int, num_positions: int) -> Tensor:
    """The positions that a context-parallel rank holds, ascending, i64[S / C]."""
    if context == 1:
        return torch.arange(num_positions)
    chunks = torch.arange(num_positions).view(2 * context, -1)
    return torch.cat([chunks[context_rank], chunks[2 * context - 1 - context_rank]])


def rank() -> int:
    """This rank among those that share its sequences."""
    return parallel_state.get_context_parallel_rank()


def own_positions(num_positions: int) -> Tensor:
    """The positions that this rank holds, i64[S / C] on its device."""
    return positions_of(rank(), parallel_state.get_context_parallel_world_size(), num_positions).to(device.device())


@dataclass(frozen=True)
class Holders:
    """Which context-parallel rank holds each hidden state of a microbatch, and its row among that rank's: i64[S B], flattened [S, B]."""

    rank: Tensor
    row: Tensor
    num_ranks: int
    own_rank: int


def holders(num_positions: int, width: int) -> Holders:
    """For `num_positions` of `width` sequences side by side."""
    num_ranks = parallel_state.get_context_parallel_world_size()
    rank_of, row_of = torch.zeros(2, num_positions, width, dtype=torch.int64)
    for number in range(num_ranks):
        held = positions_of(number, num_ranks, num_positions)
        rank_of[held] = number
        row_of[held] = torch.arange(len(held) * width).view(-1, width)
    where = device.device()
    return Holders(rank_of.flatten().to(where), row_of.flatten().to(where), num_ranks, rank())


def summed(tensor: Tensor) -> Tensor:
    """The sum over the context-parallel ranks, for ranks that go on alike: in backward each takes the gradient as it is, unsummed.

    Called by every rank of the group, with zeros where the numbers of another rank belong.
    """
    group = parallel_state.get_context_parallel_group()
    return tensor if group.size() == 1 else _Summed.apply(tensor, group)


def whole_sequence(own: Tensor) -> Tensor:
    """[S / C, ...] of this rank's positions -> [S, ...] on every context-parallel rank; backward takes the own part, unsummed."""
    size = parallel_state.get_context_parallel_world_size()
    if size == 1:
        return own
    num_positions = own.shape[0] * size
    empty = own.new_zeros((num_positions, *own.shape[1:]))
    return summed(empty.index_copy(0, own_positions(num_positions), own))


def gathered_for_attention(own: Tensor) -> Tensor:
    """[S / C, ...] of this rank's positions -> [S, ...] in order; backward sums every rank's gradient of the own part.

    The gradient is summed because every rank attends from other queries.
    """
    group = parallel_state.get_context_parallel_group()
    by_rank = gather_from_sequence_parallel_region(own, tensor_parallel_output_grad=True, group=group)
    chunks = by_rank.view(2 * group.size(), -1, *own.shape[1:]).unbind(0)
    return torch.cat([*chunks[::2], *reversed(chunks[1::2])])


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
