"""Which rows of a batch go through the model together: packed into microbatches by tokens, dealt to data ranks by work.

Pure plans over row lengths, the same on every rank that has the same lengths. Rows keep their identity: losses have global
denominators, so where a row is computed does not show.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Cost:
    """The work that a sequence of L tokens is for a model: L + `quadratic` * L^2, in units of what one token costs outside attention."""

    quadratic: float = 0.0

    def of(self, lengths: np.ndarray) -> np.ndarray:
        """f64[n, ...] of i64[n, Q] or i64[n]: the work of every sequence, those of a row added."""
        lengths = np.asarray(lengths, dtype=np.float64)
        work = lengths + self.quadratic * lengths**2
        return work if work.ndim == 1 else work.sum(axis=1)


def packed(tokens: Sequence[int], costs: Sequence[float], max_tokens: int, count_multiple: int = 1) -> list[np.ndarray]:
    """Every row in one of few bins of at most `max_tokens`, the bins' costs as even as a greedy choice makes them: ascending row numbers.

    The most expensive row goes first, each into the cheapest bin that has room for it (Graham 1969). The number of bins is the smallest
    for which that succeeds, and a multiple of `count_multiple`; bins may be empty only for its sake. Without rows: that many empty bins.
    """
    tokens, costs = np.asarray(tokens, dtype=np.int64), np.asarray(costs, dtype=np.float64)
    assert len(tokens) == 0 or int(tokens.max()) <= max_tokens, f"a row of {int(tokens.max())} tokens, expected at most {max_tokens}"
    count = _rounded_up(max(1, -(-int(tokens.sum()) // max_tokens)), count_multiple)
    while (bins := _filled(tokens, costs, max_tokens, count)) is None:
        count += count_multiple
    return [np.array(sorted(rows), dtype=np.int64) for rows in bins]


def dealt(costs: Sequence[float], num_ranks: int) -> np.ndarray:
    """The rank that gets each row, i64[n], so that the ranks' costs are even: they differ by at most the cost of one row."""
    costs = np.asarray(costs, dtype=np.float64)
    bins = _filled(np.zeros(len(costs), dtype=np.int64), costs, 1, num_ranks)
    ranks = np.empty(len(costs), dtype=np.int64)
    for rank, rows in enumerate(bins):
        ranks[rows] = rank
    return ranks


def _filled(tokens: np.ndarray, costs: np.ndarray, max_tokens: int, count: int) -> list[list[int]] | None:
    """Rows of `count` bins, or None when a row finds no room."""
    bins: list[list[int]] = [[] for _ in range(count)]
    room = [max_tokens] * count
    cheapest = [(0.0, index) for index in range(count)]  # a heap of (cost so far, bin)
    for row in np.argsort(-costs, kind="stable").tolist():
        too_full = []
        while cheapest and room[cheapest[0][1]] < tokens[row]:
            too_full.append(heapq.heappop(cheapest))
        if not cheapest:
            return None
        cost, index = cheapest[0]
        bins[index].append(row)
        room[index] -= int(tokens[row])
        heapq.heapreplace(cheapest, (cost + float(costs[row]), index))
        for entry in too_full:
            heapq.heappush(cheapest, entry)
    return bins


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
