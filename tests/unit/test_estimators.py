"""Every advantage estimator against a loop written from semantics section 2, and the laws they share."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.config import PpoConfig
from megarl.ppo.algorithms import ADVANTAGES
from megarl.ppo.estimators import ESTIMATORS, Earnings, group_size

GROUPS, SAMPLES, LENGTH = 3, 4, 7


def config(**changes) -> PpoConfig:
    return PpoConfig(total_steps=1, minibatch_size=1, **{"gamma": 0.9, "lam": 0.8, **changes})


def earnings(seed: int) -> Earnings:
    """Random earnings with holes in the masks (tool output); every row has a response."""
    generator = torch.Generator().manual_seed(seed)
    rows = GROUPS * SAMPLES
    mask = torch.rand(rows, LENGTH, generator=generator) < 0.6
    mask[:, LENGTH // 2] = True
    rewards, values = (torch.randn(rows, LENGTH, generator=generator) * mask for _ in range(2))
    truncated = torch.rand(rows, generator=generator) < 0.5
    baselines = torch.randn(GROUPS, generator=generator).repeat_interleave(SAMPLES)
    return Earnings(rewards, values, mask, truncated, torch.arange(rows) // SAMPLES, baselines)


def of_response(name: str, score: float, group: list[float], last_value: float, greedy: float) -> float:
    """The advantage of a whole response; `group` holds the scores of all samples of its prompt, its own included."""
    if name == "remax":
        return score - greedy
    mean = sum(group) / len(group)
    if name == "rloo":
        return score - (sum(group) - score) / (len(group) - 1)
    if name == "grpo":
        return (score - mean) / ((sum((g - mean) ** 2 for g in group) / (len(group) - 1)) ** 0.5 + 1e-6)
    if name == "single_step":
        return score - last_value
    return score - mean


def from_here_on(rewards: list[float], gamma: float) -> list[float]:
    """Discounted sums from each token on."""
    sums = [0.0]
    for reward in reversed(rewards):
        sums.insert(0, reward + gamma * sums[0])
    return sums[:-1]


@pytest.mark.parametrize("name", [name for name in ADVANTAGES if name != "gae"])
def test_an_estimator_is_its_formula(name):
    found, settings_ = earnings(1), config(advantage=name)
    advantages, returns = ESTIMATORS[name](found, settings_)
    scores = found.token_rewards.sum(1).tolist()
    for b, mask in enumerate(found.mask):
        first = b // SAMPLES * SAMPLES
        group = scores[first : first + SAMPLES]
        rewards, values = found.token_rewards[b][mask].tolist(), found.values[b][mask].tolist()
        if name.startswith("reinforce_pp"):
            rewards[-1] -= sum(group) / SAMPLES if name.endswith("baseline") else 0.0
            expected = from_here_on(rewards, settings_.gamma)
        else:
            expected = [of_response(name, scores[b], group, values[-1], found.baselines[b].item())] * len(rewards)
        assert advantages[b][mask].tolist() == pytest.approx(expected, abs=1e-4)
        if name == "single_step":
            assert returns[b][mask].tolist() == pytest.approx([scores[b]] * len(rewards), abs=1e-5)
    assert not advantages[~found.mask].any() and not returns[~found.mask].any()


@pytest.mark.parametrize("name", ADVANTAGES)
@given(seed=st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_masked_positions_have_no_influence(name, seed):
    """Values there are what a critic says about tool output; token rewards are 0 there by contract."""
    found = earnings(seed)
    noise = torch.randn(found.mask.shape, generator=torch.Generator().manual_seed(seed)) * ~found.mask
    noisy = replace(found, values=found.values + noise)
    for expected, got in zip(ESTIMATORS[name](found, config()), ESTIMATORS[name](noisy, config())):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ADVANTAGES)
@given(order=st.permutations(range(GROUPS * SAMPLES)))
@settings(max_examples=15, deadline=None)
def test_permuting_sequences_permutes_results(name, order):
    found, order = earnings(3), list(order)
    permuted = Earnings(*(getattr(found, field)[order] for field in Earnings.__dataclass_fields__))
    for expected, got in zip(ESTIMATORS[name](found, config()), ESTIMATORS[name](permuted, config())):
        torch.testing.assert_close(got, expected[order], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ADVANTAGES)
@given(factor=st.floats(0.1, 10), seed=st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_rewards_and_values_in_another_unit(name, factor, seed):
    """All are linear but grpo, which knows no unit."""
    found = earnings(seed)
    units = {name: getattr(found, name) * factor for name in ("token_rewards", "values", "baselines")}
    scaled = replace(found, **units)
    plain, got = ESTIMATORS[name](found, config())[0], ESTIMATORS[name](scaled, config())[0]
    torch.testing.assert_close(got, plain if name == "grpo" else plain * factor, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", [name for name, needs in ADVANTAGES.items() if needs.group])
def test_a_group_of_equals_has_nothing_to_learn_and_every_group_is_centred(name):
    found = earnings(5)
    rewards = torch.zeros_like(found.token_rewards)
    rewards[:, LENGTH // 2] = 2.5  # in every mask
    mask = torch.zeros_like(found.mask)
    mask[:, LENGTH // 2] = True
    equal = replace(found, token_rewards=rewards, mask=mask)
    assert not ESTIMATORS[name](equal, config())[0].any()
    lone = replace(found, token_rewards=found.token_rewards * mask, mask=mask)
    per_group = ESTIMATORS[name](lone, config())[0].sum(1).view(GROUPS, SAMPLES)
    torch.testing.assert_close(per_group.sum(1), torch.zeros(GROUPS), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["rloo", "grpo", "dr_grpo"])
def test_a_lone_sample_learns_nothing(name):
    found = earnings(6)
    alone = replace(found, group_ids=torch.arange(len(found.mask)))
    assert not ESTIMATORS[name](alone, config())[0].any()


def test_every_estimator_has_its_needs():
    assert set(ESTIMATORS) == set(ADVANTAGES)
    assert group_size(torch.tensor([4, 4, 9, 9])) == 2 and group_size(torch.zeros(0, dtype=torch.int64)) == 1
