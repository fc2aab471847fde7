"""Did what was sent arrive, in the right order and in the right place? Digests of both ends of every copy, compared on all ranks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megarl.bridge.plan import Op
from megarl.errors import RolloutError
from megarl.parallel.collectives import Group, sum_over

_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest(tensor: Tensor) -> Tensor:
    """An order-sensitive 64-bit digest of the raw bits of `tensor`, i64[]; equal for equal contents whatever the strides."""
    bits = tensor.detach().contiguous().reshape(-1).view(_INTEGER_OF_SIZE[tensor.element_size()]).to(torch.int64)
    positions = torch.arange(1, bits.numel() + 1, device=bits.device, dtype=torch.int64)
    # Odd multipliers are invertible modulo 2**64, so one changed element always changes the digest; wrapping is intended.
    mixed = (bits + 0x1E3779B97F4A7C15) * (positions * 2 * 0x2545F4914F6CDD1D + 1)
    return mixed.sum()


class Digests:
    """Digests of one sync on one rank. `compare` is entered by every rank of `group`."""

    def __init__(self, ops: Sequence[Op], device: torch.device):
        self.ops = ops
        self._number = {op: number for number, op in enumerate(ops)}
        self._sent = torch.zeros(len(ops), dtype=torch.int64, device=device)
        self._arrived = torch.zeros(len(ops), dtype=torch.int64, device=device)

    def sent(self, op: Op, tensor: Tensor) -> None:
        """`tensor` is the source slice after the cast."""
        self._sent[self._number[op]] = digest(tensor)

    def arrived(self, op: Op, tensor: Tensor) -> None:
        """`tensor` is the slice of the target after the copy, before the sampler transforms its layout."""
        self._arrived[self._number[op]] = digest(tensor)

    def compare(self, group: Group) -> None:
        """Raises `RolloutError` on all ranks naming every copy whose two ends differ (the first eight)."""
        # Every op has one source and one target, so a sum over ranks is a gather.
        differs = sum_over(self._sent, group) != sum_over(self._arrived, group)
        wrong = [self.ops[number] for number in differs.nonzero().flatten().tolist()]
        if wrong:
            named = "; ".join(f"{op.hf_name} {op.box} from rank {op.source_rank} to rank {op.target_rank}" for op in wrong[:8])
            raise RolloutError(f"{len(wrong)} of {len(self.ops)} weight slices arrived in the sampler altered: {named}")
