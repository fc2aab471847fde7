"""Clip, running scale and the penalty for a cut response, against semantics section 1."""

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megarl.checkpoint.train_state import TrainState
from megarl.config import PpoConfig
from megarl.ppo.reward_shaping import Moments, clip_rewards, power_sums, shape_rewards


def config(**changes) -> PpoConfig:
    return PpoConfig(total_steps=1, minibatch_size=1, **changes)


def moments_of(batches: list[list[float]]) -> Moments:
    seen = Moments()
    for batch in batches:
        seen = seen.joined(*power_sums(torch.tensor(batch, dtype=torch.float64)).tolist())
    return seen


@given(st.lists(st.lists(st.floats(-100, 100), max_size=5), max_size=6))
def test_moments_are_those_of_all_rewards_together(batches):
    everything, seen = [reward for batch in batches for reward in batch], moments_of(batches)
    assert seen.count == len(everything)
    if len(everything) > 1:
        assert seen.mean == pytest.approx(statistics.fmean(everything), abs=1e-9)
        assert seen.squares == pytest.approx(statistics.variance(everything) * (len(everything) - 1), abs=1e-6)


def test_shaping_in_its_order():
    rewards, truncated = torch.tensor([9.0, -1.0, 3.0]), torch.tensor([True, False, True])
    seen = Moments(count=11, mean=0.5, squares=40.0)  # a standard deviation of 2
    changes = {"reward_clip": 5.0, "missing_eos_penalty": 0.25}
    assert shape_rewards(rewards, truncated, config(**changes), seen).tolist() == [4.75, -1, 2.75]
    assert shape_rewards(rewards, truncated, config(reward_scale="std", **changes), seen).tolist() == [2.25, -0.5, 1.25]
    assert shape_rewards(rewards, truncated, config(reward_scale="normal", **changes), seen).tolist() == [2.0, -0.75, 1.0]
    assert shape_rewards(rewards, truncated, config(), seen).tolist() == rewards.tolist()
    assert clip_rewards(rewards, config(reward_clip=2.0)).tolist() == [2, -1, 2]


def test_equal_rewards_have_no_scale():
    assert moments_of([[3.0, 3.0], [3.0]]).deviation == 1.0 and Moments().deviation == 1.0


@given(st.floats(0.01, 100), st.floats(-10, 10))
def test_normal_rewards_know_neither_unit_nor_zero(factor, shift):
    rewards = torch.tensor([0.0, 1.0, 4.0, -2.0], dtype=torch.float64)
    plain, changed = (
        shape_rewards(r, torch.zeros(4), config(reward_scale="normal"), moments_of([r.tolist()]))
        for r in (rewards, rewards * factor + shift)
    )
    torch.testing.assert_close(plain, changed, atol=1e-5, rtol=1e-5)


def test_a_checkpoint_keeps_them():
    state = TrainState().advance(8, rewards_seen=moments_of([[-1.0, -3.5]]))
    assert state.rewards_seen.mean < 0 and TrainState.from_json(state.to_json()) == state
    assert TrainState.from_json(TrainState(step=2).to_json()).rewards_seen == Moments()
