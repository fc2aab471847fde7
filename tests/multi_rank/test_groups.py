"""Process groups against the layout's arithmetic, random states, the refusals, and the test runner itself."""

import os

import pytest
import torch

from megarl.config import ParallelConfig
from tests.ranks import run_all, run_ranks


def test_groups_and_states_over_four_ranks():
    run_all([(_groups_are_the_layouts, ()), (_states_come_back, ()), (_a_world_that_does_not_fit, ())], 4)


def _groups_are_the_layouts(rank: int, world_size: int) -> None:
    import torch.distributed as dist

    from megarl.parallel import groups

    at_first = 0
    for tensor, pipeline, context in ((2, 2, 1), (1, 2, 1), (4, 1, 1), (1, 1, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4), (1, 1, 2)):
        layout = groups.initialize(ParallelConfig(tensor=tensor, pipeline=pipeline, context=context), seed=3)
        assert (layout.rank, layout.world_size) == (rank, world_size)
        for axis in ("tp", "pp", "cp", "dp"):
            assert tuple(dist.get_process_group_ranks(groups.group(layout, axis))) == layout.ranks_along(axis), (axis, layout)
        assert groups.group(layout, "world").size() == world_size
        at_first = at_first or _num_threads()
    assert _num_threads() < 1.5 * at_first, "a layout that was replaced left its groups' threads behind"
    halves = groups.new_group_of([(0, 3), (1, 2)])
    assert dist.get_process_group_ranks(halves) == ([0, 3] if rank in (0, 3) else [1, 2])


def _num_threads() -> int:
    """Of this process, those of libraries included; with gloo every group has some."""
    return len(os.listdir("/proc/self/task"))


def _states_come_back(rank: int, world_size: int) -> None:
    import random

    import numpy
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from megarl.parallel import device, groups

    def draw() -> list[float]:
        values = [random.gauss(0, 1), float(numpy.random.randn()), float(torch.rand(()))]
        with get_cuda_rng_tracker().fork():
            return [*values, float(torch.rand(()))]

    groups.initialize(ParallelConfig(tensor=2), seed=5)
    draw()
    states = device.random_states()
    expected = draw()
    with device.preserved_random_state():
        torch.manual_seed(99)
        draw()
    following = draw()
    device.restore_random_states(states)
    assert (draw(), draw()) == (expected, following)
    assert all(isinstance(state, torch.Tensor) for state in states.values())


def _a_world_that_does_not_fit(rank: int, world_size: int) -> None:
    from megarl.errors import LayoutError
    from megarl.parallel import groups

    with pytest.raises(LayoutError, match="does not divide the world of 4"):
        groups.initialize(ParallelConfig(tensor=3), seed=0)


def test_the_traceback_of_the_rank_that_failed_is_shown():
    with pytest.raises(AssertionError, match=r"rank 1 of 2 failed:(.|\n)*_one_fails(.|\n)*ZeroDivisionError"):
        run_ranks(_one_fails, 2, timeout_s=60)


def _one_fails(rank: int, world_size: int) -> float:
    if rank == 1:
        return 1 / 0
    import time

    time.sleep(600)
    return 0.0


def test_a_rank_that_hangs_or_dies_is_named():
    with pytest.raises(AssertionError, match=r"ranks \[0\] of 1 still busy after 0.5 s"):
        run_ranks(_one_fails, 1, timeout_s=0.5)
    with pytest.raises(AssertionError, match="rank 0 of 1 died with exit code 9"):
        run_ranks(_dies, 1)


def _dies(rank: int, world_size: int) -> None:
    os._exit(9)


def test_results_come_back_in_rank_order_with_tensors():
    results = run_ranks(_returns, 2)
    assert [result["rank"] for result in results] == [0, 1]
    assert torch.equal(results[1]["tensors"][0], torch.full((2, 3), 1.5, dtype=torch.bfloat16))


def _returns(rank: int, world_size: int) -> dict:
    return {"rank": rank, "tensors": [torch.full((2, 3), rank + 0.5, dtype=torch.bfloat16)]}
