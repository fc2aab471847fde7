"""`assign_credit` does what its knobs say: the estimator of the KL, its coefficient, no whitening, the value after a cut response."""

import math
from collections.abc import Iterator

import pytest
import torch

from megarl.config import ParallelConfig, PpoConfig
from megarl.parallel import groups
from megarl.parallel.layout import ParallelLayout
from megarl.ppo.credit import assign_credit, observe_rewards
from megarl.ppo.reward_shaping import Moments
from megarl.records import RolloutBatch

OLD, REF = [-1.0, -2.0, -0.5], [-1.5, -1.0, -0.5]
VALUES = [0.25, -0.5, 1.0]
ESTIMATES = {
    "k1": lambda x: x,
    "abs": abs,
    "k2": lambda x: x * x / 2,
    "k3": lambda x: math.exp(-x) - 1 + x,
}


def cut_response() -> RolloutBatch:
    """One sequence: two prompt tokens, three of a response that the length limit cut, one of padding."""
    return RolloutBatch(
        token_ids=torch.zeros(1, 6, dtype=torch.int64),
        lengths=torch.tensor([5]),
        response_mask=torch.tensor([[False, False, True, True, True, False]]),
        rollout_logprobs=torch.zeros(1, 6),
        rewards=torch.tensor([3.0]),
        truncated=torch.tensor([True]),
        group_ids=torch.tensor([0]),
        sample_ids=torch.tensor([0]),
        baselines=torch.tensor([2.0]),
        baseline_truncated=torch.tensor([False]),
        ages=torch.zeros(1, 6, dtype=torch.int64),
        must_go_on=torch.zeros(1, 6, dtype=torch.bool),
    )


def row(numbers: list[float], outside: float = 0.0) -> torch.Tensor:
    return torch.tensor([[outside, outside, *numbers, outside]])


@pytest.fixture(scope="module")
def alone() -> Iterator[ParallelLayout]:
    """A world of one rank, ended again for the tests that follow in this process."""
    yield groups.initialize(ParallelConfig(), seed=0)
    groups.shutdown()


@pytest.mark.parametrize("estimator", ESTIMATES)
@pytest.mark.parametrize("bootstrap", [False, True])
def test_credit_is_the_loop(estimator, bootstrap, alone):
    gamma, lam, coef = 0.9, 0.8, 0.5
    config = PpoConfig(
        total_steps=1,
        minibatch_size=1,
        gamma=gamma,
        lam=lam,
        whiten=False,
        reward_clip=2.0,
        bootstrap_truncated=bootstrap,
        kl={"estimator": estimator, "coef": 7.0},  # the start value; this step's is an argument
    )
    found = assign_credit(cut_response(), row(OLD, 9.0), row(REF, -9.0), row(VALUES, 9.0), config, coef, alone)
    rewards = [-coef * ESTIMATES[estimator](old - ref) for old, ref in zip(OLD, REF)]
    rewards[-1] += 2.0  # clipped from 3
    advantages, following, running = [], VALUES[-1] if bootstrap else 0.0, 0.0
    for reward, value in zip(reversed(rewards), reversed(VALUES)):
        running = reward + gamma * following - value + gamma * lam * running
        following = value
        advantages.insert(0, running)
    torch.testing.assert_close(found.token_rewards, row(rewards))
    torch.testing.assert_close(found.advantages, row(advantages))
    torch.testing.assert_close(found.returns, row([a + v for a, v in zip(advantages, VALUES)]))
    torch.testing.assert_close(found.values, row(VALUES))


def test_kl_in_the_loss_leaves_the_reward_alone(alone):
    config = PpoConfig(total_steps=1, minibatch_size=1, whiten=False, kl={"place": "loss"})
    found = assign_credit(cut_response(), row(OLD), row(REF), row(VALUES), config, 0.5, alone)
    torch.testing.assert_close(found.token_rewards, row([0.0, 0.0, 3.0]))


def test_rewards_are_scaled_by_all_that_the_run_has_seen(alone):
    config = PpoConfig(total_steps=1, minibatch_size=1, reward_scale="normal", missing_eos_penalty=0.5, kl={"coef": 0})
    seen = observe_rewards(Moments(count=2, mean=0.0, squares=2.0), cut_response(), config, alone)  # -1, 1 and now 3
    assert (seen.count, seen.mean, seen.squares) == pytest.approx((3, 1, 8))
    found = assign_credit(cut_response(), row(OLD), row(REF), row(VALUES), config, 0.0, alone, seen)
    torch.testing.assert_close(found.token_rewards, row([0.0, 0.0, (3 - 1) / 2 - 0.5]))
    assert found.rewards.tolist() == [3.0]  # what is told of stays as it was judged
    assert observe_rewards(Moments(), cut_response(), PpoConfig(total_steps=1, minibatch_size=1), alone) == Moments()


@pytest.mark.parametrize("advantage, is_white", [("grpo", False), ("dr_grpo", False), ("reinforce_pp", True), ("gae", True)])
def test_estimators_whiten_as_their_papers_do_unless_told(advantage, is_white, alone):
    two = cut_response().rows(torch.tensor([0, 0]))
    two.rewards[1] = -1.0
    for whiten, expected in ((None, is_white), (True, True), (False, False)):
        config = PpoConfig(total_steps=1, minibatch_size=1, advantage=advantage, whiten=whiten)
        answers = (tensor.expand(2, -1) for tensor in (row(OLD), row(REF), row(VALUES)))
        found = assign_credit(two, *answers, config, 0.0, alone)
        deviation = found.advantages[found.response_mask].std().item()
        assert (deviation == pytest.approx(1.0, abs=1e-4)) == expected
