"""The sliced vocabulary head against log_softmax written out."""

import pytest
import torch

from megarl.models.vocabulary import VocabularyShard, vocabulary_stats

NUM_TOKENS, WIDTH, VOCAB, PADDED = 7, 16, 53, 64


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM_TOKENS, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(PADDED, WIDTH, generator=generator) * 0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCAB, (NUM_TOKENS,), generator=generator)
    coefs = torch.randn(2, NUM_TOKENS, generator=generator)
    return hidden, weight, targets, coefs


def expected_stats(hidden, weight, targets, temperature):
    log_p = torch.log_softmax((hidden @ weight[:VOCAB].t()).float() / temperature, dim=1)
    return log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(1)


@pytest.mark.parametrize("rows_per_slice, keeps_slice", [(1, False), (3, False), (3, True), (100, False), (100, True)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_stats_and_gradients_equal_log_softmax(rows_per_slice, keeps_slice, temperature):
    hidden, weight, targets, coefs = inputs()
    shard = VocabularyShard(0, VOCAB, temperature, rows_per_slice, keeps_slice=keeps_slice)
    found = vocabulary_stats(hidden, weight, targets, shard, with_entropy=True)
    expected = expected_stats(hidden, weight, targets, temperature)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    found_grads = torch.autograd.grad((torch.stack(found) * coefs).sum(), (hidden, weight))
    expected_grads = torch.autograd.grad((torch.stack(expected) * coefs).sum(), (hidden, weight))
    for a, b in zip(found_grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b)
    assert found_grads[1][VOCAB:].abs().max() == 0, "padded columns must not learn"


@pytest.mark.parametrize("rows_per_slice, keeps_slice", [(3, False), (100, False), (100, True)])
def test_barred_tokens_are_out_of_the_distribution_where_a_caller_says_so(rows_per_slice, keeps_slice):
    hidden, weight, targets, coefs = inputs()
    barred, ends = torch.arange(NUM_TOKENS) % 2 == 0, [4, 52]
    targets[0], targets[1] = 5, 4  # where it is not barred an end may be chosen
    shard = VocabularyShard(0, VOCAB, 0.7, rows_per_slice, keeps_slice=keeps_slice, barred_ids=tuple(ends))
    found = vocabulary_stats(hidden, weight, targets, shard, True, barred)
    open_ids = torch.tensor([token for token in range(VOCAB) if token not in ends])
    narrow = expected_stats_over(open_ids, hidden, weight, torch.searchsorted(open_ids, targets).clamp(max=len(open_ids) - 1), 0.7)
    whole = expected_stats(hidden, weight, targets, 0.7)
    expected = [torch.where(barred, few, all_) for few, all_ in zip(narrow, whole, strict=True)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    found_grads = torch.autograd.grad((torch.stack(found) * coefs).sum(), (hidden, weight))
    for a, b in zip(found_grads, torch.autograd.grad((torch.stack(expected) * coefs).sum(), (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b)


def expected_stats_over(ids, hidden, weight, targets, temperature):
    log_p = torch.log_softmax((hidden @ weight[ids].t()).float() / temperature, dim=1)
    return log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(1)


def test_without_entropy_it_is_zero_and_gradients_stay_right():
    hidden, weight, targets, coefs = inputs()
    logprobs, entropy = vocabulary_stats(hidden, weight, targets, VocabularyShard(0, VOCAB, 1.0, 4), with_entropy=False)
    assert entropy.abs().max() == 0
    found = torch.autograd.grad((logprobs * coefs[0]).sum(), (hidden, weight))
    expected = torch.autograd.grad((expected_stats(hidden, weight, targets, 1.0)[0] * coefs[0]).sum(), (hidden, weight))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_entropy_alone_has_the_right_gradient():
    hidden, weight, targets, coefs = inputs()
    entropy = vocabulary_stats(hidden, weight, targets, VocabularyShard(0, VOCAB, 1.0, 4), with_entropy=True)[1]
    found = torch.autograd.grad((entropy * coefs[1]).sum(), (hidden, weight))
    expected = torch.autograd.grad((expected_stats(hidden, weight, targets, 1.0)[1] * coefs[1]).sum(), (hidden, weight))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_bf16_cut_does_not_change_forward_and_hardly_the_gradient():
    hidden, weight, targets, coefs = inputs(torch.bfloat16)
    results = []
    for rows_per_slice in (2, 100):
        logprobs, _ = vocabulary_stats(hidden, weight, targets, VocabularyShard(0, VOCAB, 1.0, rows_per_slice), with_entropy=False)
        results.append((logprobs, *torch.autograd.grad((logprobs * coefs[0]).sum(), (hidden, weight))))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][2], results[1][2], rtol=2e-2, atol=2e-2)
    assert results[0][1].dtype == torch.bfloat16


def test_extreme_logits_stay_finite():
    hidden, weight, targets, _ = inputs()
    logprobs, entropy = vocabulary_stats(hidden * 1e4, weight, targets, VocabularyShard(0, VOCAB, 1.0, 3), with_entropy=True)
    (logprobs.sum() + entropy.sum()).backward()
    assert torch.isfinite(logprobs).all() and torch.isfinite(entropy).all()
    assert torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all()
