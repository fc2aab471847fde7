"""Pipeline schedules: every order can be executed with blocking receives, keeps its bound, and reaches the floor."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.parallel.schedule import (
    Operation,
    Schedule,
    StageCosts,
    floor,
    in_flight_bounds,
    last_stage_costs,
    needs,
    plan_schedule,
    sharded_costs,
    simulate,
)

STAGES, MICROBATCHES = st.integers(1, 9), st.integers(1, 24)
COST = st.floats(0.1, 10.0)


@st.composite
def any_costs(draw) -> StageCosts:
    """Uneven stages; with or without a sharded head, with or without backward."""
    num_stages = draw(STAGES)
    forward, head, backward = (tuple(draw(COST) for _ in range(num_stages)) for _ in range(3))
    kinds = draw(st.sampled_from(["FHB", "FB", "FH"]))
    nothing = (0.0,) * num_stages
    return StageCosts(forward, head if "H" in kinds else nothing, backward if "B" in kinds else nothing)


@settings(max_examples=80, deadline=None)
@given(any_costs(), MICROBATCHES, st.integers(0, 2), st.floats(0.0, 5.0))
def test_every_schedule_runs_keeps_its_bound_and_is_no_faster_than_the_floor(costs, num_microbatches, extra, latency):
    bounds = in_flight_bounds(costs.num_stages, extra)
    schedule = plan_schedule(costs, num_microbatches, bounds)
    for order in schedule.orders:
        for kind in costs.kinds:
            assert [op.microbatch for op in order if op.kind == kind] == list(range(num_microbatches))
        assert len(order) == num_microbatches * len(costs.kinds)
    for delay in (0.0, latency):  # simulate asserts that no order waits for ever
        timeline = simulate(schedule, costs, delay)
        assert all(held <= bound for held, bound in zip(timeline.in_flight, bounds, strict=True))
        assert timeline.makespan >= floor(costs, num_microbatches) * (1 - 1e-9)


@settings(max_examples=80, deadline=None)
@given(st.integers(2, 9), MICROBATCHES, st.floats(0.5, 20.0), st.floats(1.5, 3.2), st.floats(0.05, 1.5))
def test_equal_stages_reach_the_floor(num_stages, extra_microbatches, forward, backward_ratio, head_ratio):
    """From as many microbatches as stages on; the head's share is at most one and a half of a stage's forward."""
    costs = StageCosts((forward,) * num_stages, (head_ratio * forward,) * num_stages, (backward_ratio * forward,) * num_stages)
    num_microbatches = num_stages + extra_microbatches
    timeline = simulate(plan_schedule(costs, num_microbatches), costs)
    assert timeline.makespan <= 1.001 * floor(costs, num_microbatches)


@settings(max_examples=60, deadline=None)
@given(any_costs(), MICROBATCHES, st.randoms(use_true_random=False))
def test_an_order_is_executable_whatever_the_stages_speed(costs, num_microbatches, luck):
    """Ranks run at their own pace: started in any order, each doing the next operation of its list as soon as its needs are met."""
    schedule = plan_schedule(costs, num_microbatches)
    done, position = set(), [0] * costs.num_stages
    left = sum(map(len, schedule.orders))
    while left:
        ready = []
        for stage, order in enumerate(schedule.orders):
            if position[stage] < len(order):
                op = order[position[stage]]
                if all(event in done for event in needs(op.kind, stage, op.microbatch, costs)):
                    ready.append((op.kind, stage, op.microbatch))
        assert ready, f"all stages wait at {position}"
        event = luck.choice(ready)
        done.add(event)
        position[event[1]] += 1
        left -= 1


def test_one_microbatch_less_in_flight_is_not_enough():
    """Why the bound is P - p + 1: with 1F1B's own the sharded head is slower than stock."""
    costs, count = sharded_costs((7.0,) * 4, 3.5), 32
    stock = last_stage_costs((7.0,) * 4, 3.5)
    stock_time = simulate(plan_schedule(stock, count, in_flight_bounds(4, 0), "BHF"), stock).makespan
    assert stock_time == pytest.approx(1071)
    assert simulate(plan_schedule(costs, count), costs).makespan == pytest.approx(819)
    assert simulate(plan_schedule(costs, count, in_flight_bounds(4, 0)), costs).makespan > stock_time


def test_a_wrong_order_is_found():
    costs = sharded_costs((1.0, 1.0), 1.0)
    head_first = (Operation("H", 0), Operation("F", 0), Operation("B", 0))
    with pytest.raises(AssertionError, match="deadlock"):
        simulate(Schedule((head_first, head_first), 1), costs)


def test_the_same_costs_give_the_same_order_everywhere():
    """Every stage plans for itself: the plan is a function of its arguments alone."""
    rng = random.Random(3)
    costs = StageCosts(*(tuple(rng.uniform(1, 9) for _ in range(5)) for _ in range(3)))
    assert plan_schedule(costs, 17) == plan_schedule(costs, 17)
