"""In which order a dataset is read: a function of (seed, epoch, purpose) and the position, under every layout."""

from collections.abc import Sequence
from dataclasses import dataclass
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
    RANKINGS = 4


BLOCK = 1000  # rows in which every source of a mixture has exactly its share
BLOCKS, SOURCES = 50, 100  # added to a purpose for the orders of a mixture's blocks, and times its number for those of a source


@lru_cache(maxsize=32)
def epoch_order(size: int, seed: int, epoch: int, purpose: int) -> np.ndarray:
    """A permutation i64[size] for one epoch."""
    # Sorted raw 64-bit keys: numpy promises that a bit generator's stream never changes, which it does not for `permutation`.
    keys = np.random.PCG64(np.random.SeedSequence((seed, epoch, int(purpose)))).random_raw(size)
    return np.argsort(keys, kind="stable")


def rows_at(position: int, count: int, size: int, seed: int, purpose: int) -> list[int]:
    """Which rows stand at [position, position + count) when epoch after epoch of a `size`-row dataset is read."""
    rows: list[int] = []
    while len(rows) < count:
        epoch, start = divmod(position + len(rows), size)
        rows.extend(epoch_order(size, seed, epoch, purpose)[start : start + count - len(rows)].tolist())
    return rows


@dataclass(frozen=True)
class Mixture:
    """Rows of several sources, numbered through one after the other, as one endless stream.

    Without `weights` all rows are one dataset. With them, every block of `BLOCK` positions holds each source's share to the nearest row,
    and each source is read epoch by epoch on its own: all its rows come once before any comes twice, whatever the others do.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...] | None = None

    def rows_at(self, position: int, count: int, seed: int, purpose: Purpose) -> list[int]:
        """Which rows stand at [position, position + count): a function of these numbers alone."""
        if self.weights is None or len(self.sizes) == 1:
            return rows_at(position, count, sum(self.sizes), seed, purpose)
        shares = block_shares(self.weights)
        starts = np.cumsum([0, *self.sizes]).tolist()
        rows = []
        for at in range(position, position + count):
            block, offset = divmod(at, BLOCK)
            sources, ranks = _block(shares, seed, block, purpose)
            source = int(sources[offset])
            (row,) = rows_at(block * shares[source] + int(ranks[offset]), 1, self.sizes[source], seed, purpose + SOURCES * source)
            rows.append(starts[source] + row)
        return rows


def block_shares(weights: Sequence[float]) -> tuple[int, ...]:
    """How many rows of a block each source has: `BLOCK` in all, at least one each, largest remainders rounded up."""
    exact = [(BLOCK - len(weights)) * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder[: BLOCK - len(weights) - sum(shares)]:
        shares[i] += 1
    return tuple(share + 1 for share in shares)


@lru_cache(maxsize=4)
def _block(shares: tuple[int, ...], seed: int, block: int, purpose: Purpose) -> tuple[np.ndarray, np.ndarray]:
    """The source at each position of a block, and how many of its rows stand before it in the block: i64[BLOCK] each."""
    sources = np.repeat(np.arange(len(shares)), shares)[epoch_order(BLOCK, seed, block, purpose + BLOCKS)]
    ranks = np.empty(BLOCK, dtype=np.int64)
    for source, share in enumerate(shares):
        ranks[sources == source] = np.arange(share)
    return sources, ranks


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
