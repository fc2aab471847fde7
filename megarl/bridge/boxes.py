"""Boxes of Hugging Face tensors: one (offset, size) pair for each axis. Both sides of the bridge describe what they hold in them."""

import math
from collections.abc import Sequence
from typing import NamedTuple

Box = tuple[tuple[int, int], ...]
SourceMeta = Sequence[Sequence[tuple[str, Box]]]  # [rank][piece]: (Hugging Face name, box)


class TargetBox(NamedTuple):
    """One box of a Hugging Face tensor and where it lies in a parameter of one generator rank. Both boxes have equal sizes."""

    hf_name: str
    hf_box: Box
    parameter: str
    parameter_box: Box


def num_elements(box: Box) -> int:
    return math.prod(size for _, size in box)


def intersect(first: Box, second: Box) -> Box | None:
    """The box both have in common, or None."""
    common = []
    for (a, n), (b, m) in zip(first, second, strict=True):
        low, high = max(a, b), min(a + n, b + m)
        if low >= high:
            return None
        common.append((low, high - low))
    return tuple(common)


def within(box: Box, outer: Box) -> tuple[slice, ...]:
    """The slices that cut `box` out of a tensor that holds `outer`."""
    return tuple(slice(offset - start, offset - start + size) for (offset, size), (start, _) in zip(box, outer, strict=True))


def split(box: Box, limit: int) -> list[Box]:
    """`box` cut along its first axis (then the next) so that no part has more than `limit` elements, at least 1."""
    count = num_elements(box)
    if count <= limit:
        return [box]
    axis = next(axis for axis, (_, size) in enumerate(box) if size > 1)
    offset, size = box[axis]
    rows = max(1, size * limit // count)
    parts = []
    for start in range(0, size, rows):
        parts += split((*box[:axis], (offset + start, min(rows, size - start)), *box[axis + 1 :]), limit)
    return parts


def join(first: Box, second: Box) -> Box | None:
    """The box that both make up when they lie next to each other along one axis, first before second; or None."""
    axes = [axis for axis, (a, b) in enumerate(zip(first, second, strict=True)) if a != b]
    if len(axes) != 1:
        return None
    (low, size), (high, more) = first[axes[0]], second[axes[0]]
    return (*first[: axes[0]], (low, size + more), *first[axes[0] + 1 :]) if low + size == high else None


def box_text(box: Box) -> str:
    """As in an array's index: [0:4, 8:16]."""
    return "[" + ", ".join(f"{offset}:{offset + size}" for offset, size in box) + "]"
