"""Every layout of the long list, up to eight ranks, computes what one rank computes. A quarter of an hour on two cores."""

import pytest

from tests.multi_rank.invariance.compare import compared, faults
from tests.multi_rank.invariance.layouts import FOUR, NIGHTLY


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_short_list_on_four_ranks_leaves_the_numbers_alone():
    lines = [line for layout, largest in compared(FOUR) for line in faults(layout, largest)]
    assert not lines, "\n".join(lines)


@pytest.mark.slow
@pytest.mark.timeout(2700)
@pytest.mark.parametrize("ranks", sorted({layout.ranks for layout in NIGHTLY}))
def test_all_layouts_leave_the_numbers_alone(ranks):
    found = compared([layout for layout in NIGHTLY if layout.ranks == ranks], timeout_s=2400)
    lines = [line for layout, largest in found for line in faults(layout, largest)]
    assert not lines, "\n".join(lines)
