"""Did what was sent arrive, in the right order and in the right place? Digests of both ends of every copy, compared on all ranks.

The source is read again from the trainer's weights and the target from the tensor that the sampler is about to take over, so that a
fault of packing, of the wire, of unpacking or of staging shows. What the sampler makes of a target afterwards, digests do not see: the
log-prob parity gate (`ppo.parity`) does.
"""

import functools
import math
from collections.abc import Iterable, Iterator

import numpy
import torch
from torch import Tensor

from megarl.bridge.boxes import box_text
from megarl.bridge.plan import Op
from megarl.errors import RolloutError
from megarl.parallel.collectives import Group, exchange_rows, gather_json

BLOCK_WORDS = {"cpu": 1 << 16, "cuda": 1 << 22}  # 32-bit words at a time: what stays in a core's cache, and what fills a GPU
BLOCK_FACTOR = 0x5851F42D4C957F2D  # odd, so that no block is forgotten modulo 2**64
NAMED = 8  # copies that an error message names


def digest(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An order-sensitive 64-bit digest of the raw bits of `tensor`, cast to `dtype` if given: i64[], on its device.

    Equal contents in equal shapes give equal digests, whatever the strides. One changed element always changes it, any other change with
    probability 1 - 2**-32 (multilinear hashing: 32-bit words times random odd 64-bit numbers; Lemire and Kaser 2014). Works block by block:
    at most some 20 bytes for each word of a block are allocated, however large the tensor.
    """
    total = torch.full((), 1 + tensor.numel(), dtype=torch.int64, device=tensor.device)
    size = BLOCK_WORDS[tensor.device.type]
    factors = _factors(tensor.device, size)
    for block in _blocks(tensor.detach(), size):
        words = _words(block if dtype is None else block.to(dtype))
        for part in words.split(size):
            total.mul_(BLOCK_FACTOR).add_((part.to(torch.int64) * factors[: len(part)]).sum())
    return total


@functools.cache
def _factors(device: torch.device, count: int) -> Tensor:
    """Random odd numbers, the same everywhere: i64[count]."""
    drawn = numpy.random.PCG64(0).random_raw(count) | numpy.uint64(1)
    return torch.from_numpy(drawn.view(numpy.int64)).to(device)


def _blocks(tensor: Tensor, most: int) -> Iterator[Tensor]:
    """`tensor` in order, cut by its shape alone into parts of at most `most` elements, each of them whole rows where rows fit."""
    if tensor.numel() <= most:
        yield tensor
    elif len(tensor) == 1:
        yield from _blocks(tensor[0], most)
    else:
        for part in tensor.split(max(1, len(tensor) * most // tensor.numel())):
            yield from _blocks(part, most)


def _words(block: Tensor) -> Tensor:
    """The bits of `block` as i32[n]; zeros fill the last word."""
    flat = block.reshape(-1)
    missing = -flat.numel() % math.ceil(4 / flat.element_size())
    if missing:
        flat = torch.cat([flat, flat.new_zeros(missing)])
    return flat.contiguous().view(torch.int32)


class Digests:
    """Digests of one sync on one rank, which knows the ops of `plan_ops` that start or end at `rank`.

    The ops between two ranks stand in the same order on both; `compare` is entered by every rank of `group`, whose ranks are the plan's.
    """

    def __init__(self, plan_ops: Iterable[Op], rank: int, device: torch.device):
        ops = list(plan_ops)
        self._starting = {op: number for number, op in enumerate(op for op in ops if op.source_rank == rank)}
        ending = sorted((op for op in ops if op.target_rank == rank), key=lambda op: op.source_rank)  # stable: in order from each rank
        self._ending = {op: number for number, op in enumerate(ending)}
        self._sent = torch.zeros(len(self._starting), dtype=torch.int64, device=device)
        self._arrived = torch.zeros(len(ending), dtype=torch.int64, device=device)

    def sent(self, op: Op, tensor: Tensor, dtype: torch.dtype) -> None:
        """`tensor` is the source slice; `dtype` the sampler's, to which it is cast."""
        self._sent[self._starting[op]] = digest(tensor, dtype)

    def arrived(self, op: Op, tensor: Tensor) -> None:
        """`tensor` is the slice of the target once its parameter is complete, before the sampler transforms its layout."""
        self._arrived[self._ending[op]] = digest(tensor)

    def compare(self, group: Group) -> None:
        """Raises `RolloutError` on all ranks alike, naming the copies whose two ends differ (the first eight)."""
        targets = torch.tensor([op.target_rank for op in self._starting], dtype=torch.int64, device=self._sent.device)
        sent = exchange_rows({"digests": self._sent}, targets, group)["digests"]
        assert sent.shape == self._arrived.shape, "two ranks disagree about the plan"
        wrong = (sent != self._arrived).nonzero().flatten().tolist()
        ops = list(self._ending)
        named = [
            f"{op.hf_name} {box_text(op.box)} from rank {op.source_rank} to rank {op.target_rank}" for op in (ops[i] for i in wrong[:NAMED])
        ]
        found = gather_json([len(ops), len(wrong), named], group)
        count, num_wrong = sum(rank[0] for rank in found), sum(rank[1] for rank in found)
        if num_wrong:
            names = [name for rank in found for name in rank[2]]
            raise RolloutError(f"{num_wrong} of {count} weight slices arrived in the sampler altered: {'; '.join(names[:NAMED])}")
