"""Rank arithmetic: laws that hold for every layout, and the refusals."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarl.errors import LayoutError
from megarl.parallel.layout import ParallelLayout, RolloutLayout

sizes = st.integers(1, 4)


@st.composite
def layouts(draw) -> ParallelLayout:
    tensor, pipeline, data, context = draw(sizes), draw(sizes), draw(sizes), draw(st.integers(1, 3))
    world = tensor * pipeline * data * context
    return ParallelLayout(tensor=tensor, pipeline=pipeline, world_size=world, rank=draw(st.integers(0, world - 1)), context=context)


@given(layouts())
def test_coordinates_and_rank_are_inverse(layout):
    assert layout.rank_at(tp=layout.tp_rank, cp=layout.cp_rank, dp=layout.dp_rank, pp=layout.pp_rank) == layout.rank
    coordinates = {(at.tp_rank, at.cp_rank, at.dp_rank, at.pp_rank) for at in map(layout.at, range(layout.world_size))}
    assert len(coordinates) == layout.world_size


@given(layouts(), st.sampled_from(["tp", "cp", "dp", "pp", "model"]))
def test_groups_of_an_axis_partition_the_world(layout, axis):
    groups = {layout.at(rank).ranks_along(axis) for rank in range(layout.world_size)}
    assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
    assert layout.rank in layout.ranks_along(axis)


@given(layouts())
def test_the_tensor_rank_changes_fastest_and_the_pipeline_rank_slowest(layout):
    order = [(at.pp_rank, at.dp_rank, at.cp_rank, at.tp_rank) for at in map(layout.at, range(layout.world_size))]
    assert order == sorted(order)


@given(layouts())
def test_one_stage_is_first_and_one_is_last_in_every_pipeline(layout):
    stages = [layout.at(rank) for rank in layout.ranks_along("pp")]
    assert [stage.is_first_stage for stage in stages] == [index == 0 for index in range(layout.pipeline)]
    assert [stage.is_last_stage for stage in stages] == [index == layout.pipeline - 1 for index in range(layout.pipeline)]


@given(layouts(), st.data())
def test_rollout_groups_partition_the_world_and_cut_no_replica(layout, data):
    divisors = [size for size in range(1, layout.world_size + 1) if layout.world_size % size == 0]
    rollout = RolloutLayout(layout, tensor=data.draw(st.sampled_from(divisors)))
    groups = rollout.groups()
    assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
    assert rollout.group in groups and layout.rank in rollout.group
    for group in groups:
        for rank in group:
            assert set(layout.at(rank).ranks_along("model")) <= set(group)
            first = rank - rank % rollout.tensor
            assert set(range(first, first + rollout.tensor)) <= set(group)
    assert sorted(r for group in groups for r in rollout.replicas_in(group)) == list(range(rollout.num_replicas))
    assert sorted(d for group in groups for d in rollout.data_ranks_in(group)) == list(range(layout.data))


def test_rollout_groups_are_smallest():
    layout = ParallelLayout(tensor=2, pipeline=1, world_size=8)
    assert RolloutLayout(layout, tensor=2).groups() == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert RolloutLayout(layout, tensor=4).groups() == ((0, 1, 2, 3), (4, 5, 6, 7))
    spread = ParallelLayout(tensor=1, pipeline=2, world_size=4)  # replica d holds the ranks d and d + 2
    assert RolloutLayout(spread, tensor=1).groups() == ((0, 2), (1, 3))
    assert RolloutLayout(spread, tensor=2).groups() == ((0, 1, 2, 3),)


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        (dict(tensor=2, pipeline=2, world_size=6), ["tensor 2 x pipeline 2", "world of 6", "parallel.tensor"]),
        (dict(tensor=0, pipeline=1, world_size=1), ["tensor is 0"]),
        (dict(tensor=1, pipeline=1, world_size=2, rank=2), ["rank 2 is outside"]),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(axes, words):
    with pytest.raises(LayoutError) as refusal:
        ParallelLayout(**axes)
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_a_generator_that_does_not_divide_the_world_is_refused():
    with pytest.raises(LayoutError, match="rollout.tensor_parallel is 3"):
        RolloutLayout(ParallelLayout(tensor=1, pipeline=1, world_size=4), tensor=3)
