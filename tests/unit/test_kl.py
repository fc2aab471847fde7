"""KL estimators and the adaptive coefficient against semantics section 1."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megarl.config import KlConfig
from megarl.ppo.kl import kl_estimate, kl_loss, kl_of_sequences, next_kl_coef

FORMULAS = {
    "k1": lambda o, b: o - b,
    "abs": lambda o, b: abs(o - b),
    "k2": lambda o, b: (o - b) ** 2 / 2,
    "k3": lambda o, b: math.exp(b - o) - 1 - (b - o),
}


@pytest.mark.parametrize("estimator", FORMULAS)
def test_estimators_are_the_formulas_and_zero_outside_the_mask(estimator):
    generator = torch.Generator().manual_seed(0)
    old, ref = -3 * torch.rand(3, 5, generator=generator), -3 * torch.rand(3, 5, generator=generator)
    mask = torch.rand(3, 5, generator=generator) < 0.6
    got = kl_estimate(old, ref, mask, estimator)
    for b in range(3):
        for t in range(5):
            expected = FORMULAS[estimator](old[b, t].item(), ref[b, t].item()) if mask[b, t] else 0.0
            assert got[b, t].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("estimator", FORMULAS)
def test_garbage_outside_the_mask_does_not_reach_the_estimate(estimator):
    mask = torch.tensor([[True, False]])
    old, ref = torch.tensor([[-1.0, float("nan")]]), torch.tensor([[-2.0, float("inf")]])
    assert torch.isfinite(kl_estimate(old, ref, mask, estimator)).all()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_unbiased_estimators_average_to_the_kl_of_the_two_distributions(estimator):
    policy, reference = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    estimates = kl_estimate(policy.log()[None], reference.log()[None], torch.ones(1, 3, dtype=torch.bool), estimator)[0]
    assert (policy * estimates).sum().item() == pytest.approx((policy * (policy / reference).log()).sum().item(), abs=1e-6)


def test_k2_and_k3_are_never_negative():
    old, ref = torch.randn(4, 50), torch.randn(4, 50)
    mask = torch.ones(4, 50, dtype=torch.bool)
    assert (kl_estimate(old, ref, mask, "k2") >= 0).all()
    assert (kl_estimate(old, ref, mask, "k3") >= 0).all()


def test_kl_of_sequences_is_the_token_mean_of_each_sequence():
    kl = torch.tensor([[1.0, 3.0, 0.0], [4.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    assert kl_of_sequences(kl, mask).tolist() == [2.0, 4.0, 0.0]


def test_without_target_the_coefficient_stays():
    assert next_kl_coef(0.05, 99.0, 512, KlConfig(coef=0.05)) == 0.05


def test_adaptive_coefficient_follows_the_clipped_error():
    config = KlConfig(coef=0.1, target=6.0, horizon=10000)
    assert next_kl_coef(0.1, 6.6, 100, config) == pytest.approx(0.1 * (1 + 0.1 * 100 / 10000))
    assert next_kl_coef(0.1, 60.0, 100, config) == pytest.approx(0.1 * (1 + 0.2 * 100 / 10000))
    assert next_kl_coef(0.1, 0.0, 100, config) == pytest.approx(0.1 * (1 - 0.2 * 100 / 10000))


@given(st.floats(0, 100), st.floats(0.01, 10))
def test_adaptive_coefficient_moves_towards_the_target(observed, target):
    coef = next_kl_coef(0.1, observed, 64, KlConfig(target=target))
    assert (coef - 0.1) * (observed - target) >= 0 and coef > 0


@pytest.mark.parametrize("estimator", FORMULAS)
def test_kl_in_the_loss_has_the_estimators_value_and_a_gradient_towards_the_reference(estimator):
    policy = torch.tensor([[-1.0, -3.0, -2.0]], requires_grad=True)
    ref, mask = torch.tensor([[-2.0, -1.5, float("nan")]]), torch.tensor([[True, True, False]])
    loss = kl_loss(policy, ref, mask, estimator)
    torch.testing.assert_close(loss.detach(), kl_estimate(policy.detach(), ref, mask, estimator))
    loss.sum().backward()
    apart = torch.tensor([[1.0, -1.5, 0.0]])  # policy's less the reference's
    slopes = {"k1": apart, "abs": apart.sign(), "k2": apart, "k3": torch.where(mask, 1 - torch.exp(-apart), 0.0)}
    torch.testing.assert_close(policy.grad, slopes[estimator])
