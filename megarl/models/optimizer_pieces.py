"""Adam's state and float32 masters as pieces in Hugging Face coordinates, like the weights they belong to.

Without the distributed optimizer a rank holds the state of its whole parameters, and every data-parallel replica the same. With it a rank
holds the state of a flat range of them, which rarely starts or ends at a row: such a range is cut into boxes. Either way a checkpoint
holds boxes of Hugging Face tensors, and a rank of any other layout reads those that it needs.
"""

import bisect
import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from megarl.bridge.boxes import Box, num_elements
from megarl.models.pieces import Piece

Slot = Literal["exp_avg", "exp_avg_sq", "main", "ema"]
SLOTS: tuple[Slot, ...] = ("exp_avg", "exp_avg_sq", "main", "ema")
"""Adam's first and second moment; float32 copies of weights that the model keeps in another dtype; the weights' moving average."""


@dataclass(frozen=True)
class Master:
    """What an optimizer updates for elements [start, start + count) of a flat parameter: `values` f32[count], live.

    The parameter's own elements, or a float32 copy of them.
    """

    param: Tensor
    start: int
    values: Tensor
    inner: Tensor  # as the inner optimizer knows it
    is_sharded: bool  # over data-parallel ranks

    @property
    def is_copy(self) -> bool:
        """True where the model keeps the weight in another dtype."""
        return _storage(self.values) != _storage(self.param)

    @property
    def weights(self) -> Tensor:
        """The elements of the parameter, in its dtype, live."""
        return self.param.view(-1)[self.start : self.start + self.values.numel()]


@dataclass(frozen=True)
class Held:
    """What an optimizer holds for elements [start, start + count) of a flat parameter: flat tensors by slot."""

    param: Tensor
    start: int
    count: int
    tensors: dict[Slot, Tensor]
    is_sharded: bool  # over data-parallel ranks


def optimizer_pieces(held: Sequence[Held], weights: Sequence[Piece]) -> dict[Slot, list[Piece]]:
    """The pieces of every slot, in a fixed order; views alias the optimizer's tensors. Slots that this optimizer lacks are left out.

    `weights` are the pieces of the model's parameters; parts of a parameter that no piece covers (padding of the vocabulary) get none.
    """
    by_storage: dict[int, list[tuple[int, Held]]] = defaultdict(list)
    for item in held:
        by_storage[_storage(item.param)].append((item.param.storage_offset() + item.start, item))
    for listed in by_storage.values():
        listed.sort(key=_start)
    found: dict[Slot, list[Piece]] = {}
    for piece in weights:
        assert piece.view.is_contiguous(), piece.hf_name
        first, size = piece.view.storage_offset(), piece.view.numel()
        listed = by_storage[_storage(piece.view)]
        at_or_before = max(0, bisect.bisect_right(listed, first, key=_start) - 1)
        for start, item in itertools.islice(listed, at_or_before, None):
            low, high = max(first, start), min(first + size, start + item.count)
            if start >= first + size:
                break
            if low >= high:
                continue
            is_owner = piece.is_shard_owner if item.is_sharded else piece.is_owner
            for box, offset in flat_boxes(piece.box, low - first, high - first):
                at = offset + first - start
                for slot, tensor in item.tensors.items():
                    view = tensor[at : at + num_elements(box)].view([size for _, size in box])
                    found.setdefault(slot, []).append(replace(piece, box=box, view=view, is_owner=is_owner))
    return found


def flat_boxes(box: Box, low: int, high: int) -> list[tuple[Box, int]]:
    """Elements [low, high) of `box`, counted row by row, as boxes and the number of each one's first element; 2 axes give at most 3."""
    if low >= high:
        return []
    (offset, _), rest = box[0], box[1:]
    row = num_elements(rest)
    if not rest or (low % row == 0 and high % row == 0):
        return [(((offset + low // row, (high - low) // row), *rest), low)]
    whole_from, whole_to = -(-low // row), high // row  # rows that lie wholly inside
    if whole_from > whole_to:  # all in one row
        return _in_row(box, low, high)
    head = _in_row(box, low, whole_from * row)
    body = [(((offset + whole_from, whole_to - whole_from), *rest), whole_from * row)] if whole_to > whole_from else []
    return [*head, *body, *_in_row(box, whole_to * row, high)]


def masters_of(optimizer: Any) -> Iterator[Master]:
    """What one of Megatron's optimizers (distributed, mixed-precision or float32) updates, in an order that is the same on every call."""
    is_sharded = hasattr(optimizer, "model_param_gbuf_map")
    for param, inner in _pairs(optimizer):
        start = optimizer._get_model_param_range_map(param)["param"].start if is_sharded else 0
        yield Master(param.detach(), start, inner.detach().view(-1), inner, is_sharded)


def held_by(optimizer: Any) -> Iterator[Held]:
    """What one of Megatron's optimizers holds, by parameter, in the order of `masters_of`. Adam's state must exist."""
    for master in masters_of(optimizer):
        state = optimizer.optimizer.state[master.inner]
        tensors: dict[Slot, Tensor] = {"exp_avg": state["exp_avg"].view(-1), "exp_avg_sq": state["exp_avg_sq"].view(-1)}
        if master.is_copy:
            tensors["main"] = master.values
        yield Held(master.param, master.start, master.values.numel(), tensors, master.is_sharded)


def _pairs(optimizer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """(parameter of the model, what the inner optimizer updates for it: a range, a float32 copy, or itself)."""
    if hasattr(optimizer, "model_param_gbuf_map"):
        groups = [
            *zip(optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups, strict=True),
            *zip(optimizer.model_fp32_groups, optimizer.shard_fp32_groups, strict=True),
        ]
    elif hasattr(optimizer, "fp32_from_float16_groups"):
        groups = [
            *zip(optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True),
            *zip(optimizer.fp32_from_fp32_groups, optimizer.fp32_from_fp32_groups, strict=True),
        ]
    else:
        groups = [(group["params"], group["params"]) for group in optimizer.param_groups]
    for params, inner in groups:
        yield from zip(params, inner, strict=True)


def _in_row(box: Box, low: int, high: int) -> list[tuple[Box, int]]:
    """As `flat_boxes`, for elements of one row."""
    (offset, _), rest = box[0], box[1:]
    row = num_elements(rest)
    index = low // row
    return [(((offset + index, 1), *part), at + index * row) for part, at in flat_boxes(rest, low - index * row, high - index * row)]


def _start(listed: tuple[int, Held]) -> int:
    return listed[0]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
