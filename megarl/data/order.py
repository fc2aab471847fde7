"""In which order a dataset is read: a function of (seed, epoch, purpose) and the position, under every layout."""

from collections.abc import Sequence
from enum import IntEnum
from functools import lru_cache

import numpy as np

from megarl.data.packing import Cost, dealt
from megarl.errors import LayoutError
from megarl.parallel.layout import ParallelLayout


class Purpose(IntEnum):
    """Keeps the orders of different datasets of one run apart."""

    PROMPTS = 1
    DEMONSTRATIONS = 2
    PREFERENCES = 3


@lru_cache(maxsize=4)
def epoch_order(size: int, seed: int, epoch: int, purpose: Purpose) -> np.ndarray:
    """A permutation i64[size] for one epoch."""
    # Sorted raw 64-bit keys: numpy promises that a bit generator's stream never changes, which it does not for `permutation`.
    keys = np.random.PCG64(np.random.SeedSequence((seed, epoch, int(purpose)))).random_raw(size)
    return np.argsort(keys, kind="stable")


def rows_at(position: int, count: int, size: int, seed: int, purpose: Purpose) -> list[int]:
    """Which rows stand at [position, position + count) when epoch after epoch of a `size`-row dataset is read."""
    rows: list[int] = []
    while len(rows) < count:
        epoch, start = divmod(position + len(rows), size)
        rows.extend(epoch_order(size, seed, epoch, purpose)[start : start + count - len(rows)].tolist())
    return rows


def equal_share(count: int, layout: ParallelLayout, key: str) -> slice:
    """This data rank's contiguous part of `count` rows. Raises `LayoutError` naming `key` when they do not divide evenly."""
    if count % layout.data:
        raise LayoutError(f"{key} is {count}; expected a multiple of the {layout.data} data-parallel replicas of {layout}")
    share = count // layout.data
    return slice(layout.dp_rank * share, (layout.dp_rank + 1) * share)


def step_share(lengths: Sequence[Sequence[int]], layout: ParallelLayout, key: str, cost: Cost | None) -> list[int]:
    """Positions in a step's global batch of the rows that this data rank learns from, ascending.

    Args: `lengths` of the sequences of every row of the batch; `cost` None: ranks get equally many rows, else rows of equal work.
    Raises `LayoutError` naming `key` when the batch does not divide over the data ranks.
    """
    share = equal_share(len(lengths), layout, key)
    if cost is None:
        return list(range(len(lengths)))[share]
    return np.flatnonzero(dealt(cost.of(np.array(lengths)), layout.data) == layout.dp_rank).tolist()


def contiguous_share(count: int, layout: ParallelLayout) -> slice:
    """This data rank's contiguous part of `count` rows; sizes differ by at most one. For evaluation sets."""
    return slice(count * layout.dp_rank // layout.data, count * (layout.dp_rank + 1) // layout.data)
