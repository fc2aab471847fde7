"""Policy, value and entropy losses against loops written from semantics sections 3 and 4; aggregation under any cut."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.config import CorrectionConfig, PpoConfig
from megarl.ppo.losses import aggregate, correction_weights, count_for, entropy_loss, policy_loss, value_loss

AGGREGATIONS = ["token_mean", "sequence_mean", "sequence_sum_fixed"]


def config(**changes) -> PpoConfig:
    return PpoConfig(total_steps=1, minibatch_size=1, **changes)


def tensors(seed: int, rows: int = 5, length: int = 7):
    """New and old log-probs (some far apart), advantages of both signs, a mask where every row has a response."""
    generator = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(rows, length, generator=generator)
    new = old + torch.randn(rows, length, generator=generator)
    advantages = torch.randn(rows, length, generator=generator)
    mask = torch.rand(rows, length, generator=generator) < 0.6
    mask[:, 0] = True
    return new, old, advantages, mask


@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_policy_loss_is_the_formula(dual_clip):
    new, old, advantages, mask = tensors(0)
    loss, diagnostics = policy_loss(new, old, advantages, mask, config(clip_low=0.2, clip_high=0.3, dual_clip=dual_clip))
    for b in range(len(mask)):
        for t in range(mask.shape[1]):
            expected = 0.0
            if mask[b, t]:
                ratio, advantage = math.exp(new[b, t] - old[b, t]), advantages[b, t].item()
                expected = max(-advantage * ratio, -advantage * min(max(ratio, 0.8), 1.3))
                if dual_clip and advantage < 0:
                    expected = min(expected, -dual_clip * advantage)
                assert diagnostics["ratio"][b, t].item() == pytest.approx(ratio, rel=1e-5)
                assert diagnostics["old_kl"][b, t].item() == pytest.approx(ratio - 1 - math.log(ratio), rel=1e-3, abs=1e-5)
            assert loss[b, t].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert all(not d[~mask].any() and not d.requires_grad for d in diagnostics.values())


def test_on_policy_gradient_is_minus_the_advantage():
    _, old, advantages, mask = tensors(1)
    new = old.clone().requires_grad_()
    policy_loss(new, old, advantages, mask, config())[0].sum().backward()
    torch.testing.assert_close(new.grad, -advantages * mask)


def test_the_clip_stops_the_gradient_only_in_the_direction_of_improvement():
    old = torch.zeros(1, 4)
    new = torch.tensor([[1.0, 1.0, -1.0, -1.0]], requires_grad=True)
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    loss, diagnostics = policy_loss(new, old, advantages, torch.ones(1, 4, dtype=torch.bool), config())
    loss.sum().backward()
    assert (new.grad != 0).tolist() == [[False, True, True, False]]
    assert diagnostics["clipped"].tolist() == [[1.0, 0.0, 0.0, 1.0]]


def test_far_log_ratios_stay_finite():
    new = torch.tensor([[200.0, -200.0]], requires_grad=True)
    loss, diagnostics = policy_loss(new, torch.zeros(1, 2), torch.tensor([[-1.0, 1.0]]), torch.ones(1, 2, dtype=torch.bool), config())
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(new.grad).all()
    assert all(torch.isfinite(d).all() for d in diagnostics.values())


def test_garbage_outside_the_mask_reaches_neither_loss_nor_gradient():
    new, old, advantages, mask = tensors(2)
    poison = torch.where(mask, 0.0, float("nan"))
    poisoned = (new + poison).requires_grad_()
    clean = new.clone().requires_grad_()
    poisoned_loss = policy_loss(poisoned, old + poison, advantages + poison, mask, config(dual_clip=3.0))[0]
    clean_loss = policy_loss(clean, old, advantages, mask, config(dual_clip=3.0))[0]
    torch.testing.assert_close(poisoned_loss, clean_loss)
    poisoned_loss.sum().backward()
    clean_loss.sum().backward()
    torch.testing.assert_close(poisoned.grad, clean.grad)


def test_sequence_ratio_is_the_geometric_mean_of_the_response():
    new, old, advantages, mask = tensors(8)
    advantages = advantages[:, :1].expand_as(advantages)
    loss, diagnostics = policy_loss(new, old, advantages, mask, config(ratio_level="sequence", clip_high=0.3))
    for b in range(len(mask)):
        log_ratios = [(new[b, t] - old[b, t]).item() for t in range(mask.shape[1]) if mask[b, t]]
        ratio, advantage = math.exp(sum(log_ratios) / len(log_ratios)), advantages[b, 0].item()
        expected = max(-advantage * ratio, -advantage * min(max(ratio, 0.8), 1.3))
        assert loss[b][mask[b]].tolist() == pytest.approx([expected] * len(log_ratios), rel=1e-5)
        assert diagnostics["ratio"][b][mask[b]].tolist() == pytest.approx([ratio] * len(log_ratios), rel=1e-5)
    assert not loss[~mask].any() and not diagnostics["ratio"][~mask].any() and not diagnostics["clipped"][~mask].any()


def test_sequence_ratio_gives_every_token_of_a_response_one_gradient():
    """That of the response's own loss: -A rho over its length, under the mean over sequences."""
    _, old, advantages, mask = tensors(9)
    advantages = advantages[:, :1].expand_as(advantages)
    new = (old + 0.1).requires_grad_()
    token_losses = policy_loss(new, old, advantages, mask, config(ratio_level="sequence"))[0]
    aggregate(token_losses, mask, "sequence_mean", count_for("sequence_mean", mask, 9)).backward()
    expected = -advantages * math.exp(0.1) / mask.sum(1, keepdim=True) / len(mask)
    torch.testing.assert_close(new.grad, torch.where(mask, expected, 0.0))


def test_cispo_is_the_formula_and_keeps_every_gradient():
    new, old, advantages, mask = tensors(10)
    variable = new.clone().requires_grad_()
    loss, diagnostics = policy_loss(variable, old, advantages, mask, config(loss="cispo", clip_low=0.5, clip_high=0.3))
    loss.sum().backward()
    for b in range(len(mask)):
        for t in range(mask.shape[1]):
            ratio = math.exp(new[b, t] - old[b, t])
            weight = min(max(ratio, 0.5), 1.3)
            slope = -weight * advantages[b, t].item() if mask[b, t] else 0.0
            assert variable.grad[b, t].item() == pytest.approx(slope, rel=1e-5)
            assert loss[b, t].item() == pytest.approx(slope * new[b, t].item(), rel=1e-5, abs=1e-6)
            assert diagnostics["clipped"][b, t].item() == float(weight != ratio and bool(mask[b, t]))


@pytest.mark.parametrize("kind", ["clip", "cispo"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_every_surrogate_obeys_the_laws(kind, ratio):
    """Linear in the advantages' scale, blind to what the mask hides, and a permutation of sequences permutes it."""
    new, old, advantages, mask = tensors(11)
    chosen = config(loss=kind, ratio_level=ratio)
    plain = policy_loss(new, old, advantages, mask, chosen)[0]
    torch.testing.assert_close(policy_loss(new, old, 3 * advantages, mask, chosen)[0], 3 * plain)
    order = [3, 0, 4, 2, 1]
    assert torch.equal(policy_loss(new[order], old[order], advantages[order], mask[order], chosen)[0], plain[order])
    poison = torch.where(mask, 0.0, float("nan"))
    poisoned, clean = (new + poison).requires_grad_(), new.clone().requires_grad_()
    found = policy_loss(poisoned, old + poison, advantages + poison, mask, chosen)[0]
    torch.testing.assert_close(found, plain)
    found.sum().backward()
    policy_loss(clean, old, advantages, mask, chosen)[0].sum().backward()
    torch.testing.assert_close(poisoned.grad, clean.grad)


@pytest.mark.parametrize("kind", ["tis", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_correction_weights_are_the_formula(kind, level):
    old, sampled, _, mask = tensors(5)
    mask[1] = False
    low, high = 0.4, 1.7
    weights, found = correction_weights(old, sampled, mask, CorrectionConfig(kind=kind, level=level, low=low, high=high))
    cut = 0
    for b in range(len(mask)):
        whole = sum((old[b, t] - sampled[b, t]).item() for t in range(mask.shape[1]) if mask[b, t])
        for t in range(mask.shape[1]):
            expected = 0.0
            if mask[b, t]:
                ratio = math.exp(whole if level == "sequence" else (old[b, t] - sampled[b, t]).item())
                expected = min(ratio, high) if kind == "tis" else ratio if low <= ratio <= high else 0.0
                cut += expected != ratio
                assert found["ratio"][b, t].item() == pytest.approx(ratio, rel=1e-5)
            assert weights[b, t].item() == pytest.approx(expected, rel=1e-5)
    assert found["cut"].sum().item() == cut > 0


@pytest.mark.parametrize("kind", ["tis", "mask"])
def test_a_correction_weight_is_a_factor_without_gradient(kind):
    """The gradient of the weighted loss is the weight times the loss's own, as if the weight were a number."""
    new, old, advantages, mask = tensors(6)
    sampled, poison = old + 0.3 * torch.randn(old.shape, generator=torch.Generator().manual_seed(0)), torch.where(mask, 0.0, float("nan"))
    variable = new.clone().requires_grad_()
    trainer = old.clone().requires_grad_()
    settings = CorrectionConfig(kind=kind, low=0.8, high=1.2)
    weights, _ = correction_weights(trainer + poison, sampled + poison, mask, settings)
    assert not weights.requires_grad and torch.isfinite(weights).all()
    (weights * policy_loss(variable, old, advantages, mask, config())[0]).sum().backward()
    plain = new.clone().requires_grad_()
    policy_loss(plain, old, advantages, mask, config())[0].sum().backward()
    torch.testing.assert_close(variable.grad, weights * plain.grad)
    assert trainer.grad is None


def test_equal_programs_need_no_correction():
    _, old, _, mask = tensors(7)
    for level in ("token", "sequence"):
        for kind in ("tis", "mask"):
            weights, found = correction_weights(old, old, mask, CorrectionConfig(kind=kind, level=level))
            assert torch.equal(weights, mask.float()) and not found["cut"].any()


@pytest.mark.parametrize("value_clip", [None, 0.2])
def test_value_loss_is_the_formula(value_clip):
    values, old_values, returns, mask = tensors(3)
    loss, _ = value_loss(values, old_values, returns, mask, value_clip)
    for b in range(len(mask)):
        for t in range(mask.shape[1]):
            v, old, ret = values[b, t].item(), old_values[b, t].item(), returns[b, t].item()
            held = v if value_clip is None else min(max(v, old - value_clip), old + value_clip)
            expected = 0.5 * max((v - ret) ** 2, (held - ret) ** 2) if mask[b, t] else 0.0
            assert loss[b, t].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_value_gradient_near_the_old_value_is_the_error():
    values = torch.tensor([[0.1, -0.1]], requires_grad=True)
    loss, _ = value_loss(values, torch.zeros(1, 2), torch.tensor([[1.0, 1.0]]), torch.ones(1, 2, dtype=torch.bool), 0.2)
    loss.sum().backward()
    torch.testing.assert_close(values.grad, values.detach() - 1.0)


def test_entropy_lowers_the_loss():
    mask = torch.tensor([[True, False]])
    assert entropy_loss(torch.tensor([[2.0, 5.0]]), mask, 0.01).tolist() == [[pytest.approx(-0.02), 0.0]]


def test_aggregations_in_closed_form():
    losses = torch.tensor([[1.0, 3.0, 99.0], [5.0, 99.0, 99.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    totals = {name: aggregate(losses, mask, name, count_for(name, mask, fixed_length=10)).item() for name in AGGREGATIONS}
    assert totals == {"token_mean": 3.0, "sequence_mean": 3.5, "sequence_sum_fixed": pytest.approx(9 / 20)}


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@given(seed=st.integers(0, 10_000), cuts=st.sets(st.integers(1, 7)))
@settings(max_examples=25, deadline=None)
def test_loss_and_gradient_do_not_depend_on_the_cut(aggregation, seed, cuts):
    new, old, advantages, mask = tensors(seed, rows=8)

    def loss_and_gradient(bounds):
        variable = new.clone().requires_grad_()
        denominator = sum(count_for(aggregation, mask[a:b], 7) for a, b in bounds)  # what the ranks add up
        total = 0.0
        for a, b in bounds:
            token_losses, _ = policy_loss(variable[a:b], old[a:b], advantages[a:b], mask[a:b], config())
            piece = aggregate(token_losses, mask[a:b], aggregation, denominator)
            piece.backward()
            total += piece.item()
        return total, variable.grad

    edges = [0, *sorted(cuts), 8]
    whole, cut = loss_and_gradient([(0, 8)]), loss_and_gradient(list(zip(edges[:-1], edges[1:])))
    assert cut[0] == pytest.approx(whole[0], rel=1e-4, abs=1e-6)
    torch.testing.assert_close(cut[1], whole[1])


def test_more_padding_changes_nothing():
    new, old, advantages, mask = tensors(4)
    pad = torch.nn.functional.pad
    for name in AGGREGATIONS:
        short = aggregate(policy_loss(new, old, advantages, mask, config())[0], mask, name, count_for(name, mask, 9))
        longer_mask = pad(mask, (0, 3))
        token_losses = policy_loss(pad(new, (0, 3)), pad(old, (0, 3)), pad(advantages, (0, 3)), longer_mask, config())[0]
        torch.testing.assert_close(aggregate(token_losses, longer_mask, name, count_for(name, longer_mask, 9)), short)
