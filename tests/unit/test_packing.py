"""The plans that pack rows into microbatches and deal them to data ranks: every row once, budgets kept, work even."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.config import ParallelConfig
from megarl.data.pack_size import token_budget
from megarl.data.packing import Cost, dealt, packed

LENGTHS = st.lists(st.integers(1, 64), min_size=1, max_size=40)
QUADRATIC = st.sampled_from([0.0, 1e-3, 0.1])


@settings(deadline=None)
@given(LENGTHS, st.integers(64, 300), st.integers(1, 4), QUADRATIC)
def test_every_row_is_in_one_pack_and_no_pack_is_too_large(lengths, max_tokens, count_multiple, quadratic):
    lengths = np.array(lengths)
    packs = packed(lengths, Cost(quadratic).of(lengths), max_tokens, count_multiple)
    assert sorted(np.concatenate(packs).tolist()) == list(range(len(lengths)))
    assert all(lengths[rows].sum() <= max_tokens and list(rows) == sorted(rows) for rows in packs)
    assert len(packs) % count_multiple == 0


@settings(deadline=None)
@given(LENGTHS, st.integers(64, 300))
def test_packs_are_few(lengths, max_tokens):
    """Two of the packs of one count fewer could not have been filled: at most twice the smallest possible number, plus one."""
    packs = packed(lengths, lengths, max_tokens)
    assert len(packs) <= 2 * -(-sum(lengths) // max_tokens) + 1


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 4), QUADRATIC)
def test_packs_that_have_room_are_even(lengths, count, quadratic):
    """Where the budget does not bind, packs differ by at most one row's work."""
    lengths = np.array(lengths)
    costs = Cost(quadratic).of(lengths)
    packs = packed(lengths, costs, int(lengths.sum()), count)
    work = [costs[rows].sum() for rows in packs]
    assert max(work) - min(work) <= costs.max() + 1e-9


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 8), QUADRATIC)
def test_ranks_differ_by_at_most_one_rows_work(lengths, num_ranks, quadratic):
    costs = Cost(quadratic).of(np.array(lengths))
    ranks = dealt(costs, num_ranks)
    work = np.bincount(ranks, weights=costs, minlength=num_ranks)
    assert len(ranks) == len(lengths) and 0 <= ranks.min() and ranks.max() < num_ranks
    assert work.max() - work.min() <= costs.max() + 1e-9
    assert len(lengths) < num_ranks or np.bincount(ranks, minlength=num_ranks).min() >= 1, "a rank without rows"


def test_a_pair_costs_both_its_sequences():
    assert Cost(0.5).of(np.array([[2, 4], [1, 1]])).tolist() == [2 + 4 + 0.5 * (4 + 16), 3.0]


def test_a_row_that_fits_nowhere_is_a_mistake_of_the_caller():
    with pytest.raises(AssertionError, match="65 tokens"):
        packed([65, 3], [65, 3], max_tokens=64)


def test_no_rows_still_make_a_microbatch():
    assert [len(rows) for rows in packed([], [], 64, count_multiple=2)] == [0, 0]


@pytest.mark.parametrize("tensor, context, budget", [(1, 1, 104), (2, 1, 96), (2, 2, 96), (1, 4, 96), (4, 2, 64)])
def test_the_budget_is_what_fits_after_padding(tensor, context, budget):
    assert token_budget(ParallelConfig(tensor=tensor, context=context, max_tokens_per_microbatch=110)) == budget
