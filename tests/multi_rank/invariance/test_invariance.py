"""Every layout of the short list on one and two ranks computes what one rank computes; the rest of it is in `test_nightly`."""

import copy

import pytest

from tests.multi_rank.invariance.compare import computed_by, differences, faults
from tests.multi_rank.invariance.layouts import CI, Layout


@pytest.fixture(scope="module")
def results() -> dict[str, list[dict]]:
    references = {str(layout.reference): layout.reference for layout in CI}
    layouts = [*references.values(), *CI]
    return dict(zip(map(str, layouts), computed_by(layouts), strict=True))


@pytest.mark.timeout(600)  # the first one computes them all
@pytest.mark.parametrize("layout", CI, ids=str)
def test_a_layout_leaves_the_numbers_alone(layout: Layout, results):
    found = differences(layout, results[str(layout)], results[str(layout.reference)])
    assert not faults(layout, found), "\n".join(faults(layout, found))


def test_a_difference_is_named(results):
    layout = next(layout for layout in CI if layout.parallel == {"tensor": 2})
    wrong = copy.deepcopy(results[str(layout)])
    name, _, view = next(piece for piece in wrong[1]["learned"]["critic"]["gradient"] if "o_proj" in piece[0])
    view[0, 0] += 30.0
    (line,) = faults(layout, differences(layout, wrong, results[str(layout.reference)]))
    assert line.startswith(f"{layout}: gradient differs by ") and f"in {name} of critic" in line
