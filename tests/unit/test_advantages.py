"""Token rewards, GAE and whitening against loops written from semantics sections 1 and 2."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.ppo.advantages import gae, last_true, token_rewards, whiten


def rollout(seed: int, rows: int = 4, length: int = 9):
    """Random rewards, values, truncation and response masks with holes (tool output); every row has a response."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, length, generator=generator) < 0.6
    mask[:, length // 2] = True
    rewards, values = (torch.randn(rows, length, generator=generator) * mask for _ in range(2))
    return rewards, values, mask, torch.rand(rows, generator=generator) < 0.5


def gae_of_one_sequence(rewards, values, gamma, lam, after_last):
    """The recursion of section 2 over response tokens alone."""
    advantages, running, next_value = [0.0] * len(rewards), 0.0, after_last
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * next_value - values[t]
        running = delta + gamma * lam * running
        advantages[t], next_value = running, values[t]
    return advantages, [a + v for a, v in zip(advantages, values)]


@pytest.mark.parametrize("bootstrap", [False, True])
@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.7, 0.0)])
def test_gae_is_the_recursion_over_response_tokens(gamma, lam, bootstrap):
    rewards, values, mask, truncated = rollout(seed=1)
    advantages, returns = gae(rewards, values, mask, truncated, gamma, lam, bootstrap)
    for b in range(len(mask)):
        chosen_rewards, chosen_values = rewards[b][mask[b]].tolist(), values[b][mask[b]].tolist()
        after_last = chosen_values[-1] if bootstrap and truncated[b] else 0.0
        expected = gae_of_one_sequence(chosen_rewards, chosen_values, gamma, lam, after_last)
        assert advantages[b][mask[b]].tolist() == pytest.approx(expected[0], abs=1e-5)
        assert returns[b][mask[b]].tolist() == pytest.approx(expected[1], abs=1e-5)
    assert not advantages[~mask].any() and not returns[~mask].any()


def test_lambda_one_gives_discounted_rewards_minus_value():
    rewards, values = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0.5, 0.25, 0.125]])
    advantages, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), torch.tensor([False]), 0.5, 1.0, False)
    assert returns.tolist() == [[1 + 1 + 1, 2 + 2, 4.0]]
    torch.testing.assert_close(advantages, returns - values)


def test_perfect_values_leave_no_advantage():
    rewards = torch.tensor([[0.0, 0.0, 1.0]])
    advantages, _ = gae(rewards, torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool), torch.tensor([False]), 1.0, 0.95, False)
    assert not advantages.any()


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_masked_positions_have_no_influence(seed):
    rewards, values, mask, truncated = rollout(seed)
    noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(seed))
    plain = gae(rewards, values, mask, truncated, 0.9, 0.8, True)
    noisy = gae(rewards + noise * ~mask, values + noise * ~mask, mask, truncated, 0.9, 0.8, True)
    for expected, got in zip(plain, noisy):
        torch.testing.assert_close(got, expected)


@given(st.permutations(range(4)))
@settings(deadline=None)
def test_permuting_sequences_permutes_results(order):
    rewards, values, mask, truncated = rollout(seed=3)
    order = list(order)
    plain = gae(rewards, values, mask, truncated, 0.9, 0.8, True)
    permuted = gae(rewards[order], values[order], mask[order], truncated[order], 0.9, 0.8, True)
    for expected, got in zip(plain, permuted):
        assert torch.equal(got, expected[order])


def test_reward_lands_on_the_last_response_token_only():
    mask = torch.tensor([[False, True, True, False, True, False], [True, False, False, False, False, False]])
    got = token_rewards(torch.tensor([2.0, -5.0]), torch.full((2, 6), 0.5), mask, kl_coef=0.1)
    expected = torch.tensor([[0, -0.05, -0.05, 0, 2 - 0.05, 0], [-5 - 0.05, 0, 0, 0, 0, 0]])
    torch.testing.assert_close(got, expected)


def test_an_empty_response_gets_no_reward():
    mask = torch.zeros(1, 3, dtype=torch.bool)
    assert not last_true(mask).any()
    assert not token_rewards(torch.tensor([1.0]), torch.zeros(1, 3), mask, 0.1).any()


def test_whitening_gives_mean_zero_and_unbiased_variance_one():
    _, values, mask, _ = rollout(seed=5, rows=8)
    got = whiten(3 * values + 7, mask, lambda sums: sums)
    assert got[mask].mean().item() == pytest.approx(0.0, abs=1e-5)
    assert got[mask].var(unbiased=True).item() == pytest.approx(1.0, abs=1e-5)
    assert not got[~mask].any()


@given(st.integers(0, 10_000), st.integers(1, 7))
@settings(max_examples=30, deadline=None)
def test_whitening_does_not_depend_on_how_ranks_hold_the_rollout(seed, cut):
    _, values, mask, _ = rollout(seed, rows=8)
    parts = [(values[:cut], mask[:cut]), (values[cut:], mask[cut:])]
    contributions = []
    for part in parts:
        whiten(*part, lambda sums: contributions.append(sums) or sums)
    together = torch.cat([whiten(*part, lambda sums: sum(contributions)) for part in parts])
    torch.testing.assert_close(together, whiten(values, mask, lambda sums: sums))


def test_whitening_survives_one_token_and_equal_advantages():
    lone = torch.tensor([[True, False]])
    assert whiten(torch.tensor([[3.0, 0.0]]), lone, lambda sums: sums).tolist() == [[0.0, 0.0]]
    assert not whiten(torch.full((2, 3), 4.0), torch.ones(2, 3, dtype=torch.bool), lambda sums: sums).any()
