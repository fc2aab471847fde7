"""The losses of reward model, DPO, IPO and RRHF against plain loops written from the formulas (semantics section 5)."""

import math

import pytest
import torch

from megarl.config import DpoConfig, RrhfConfig
from megarl.course.dpo import preference_loss
from megarl.course.reward_model import comparison_loss, token_comparison_loss
from megarl.course.rrhf import ordering_loss
from megarl.data.batching import collate_lists, collate_preferences
from megarl.data.preferences import Preference
from megarl.records import RankedLists, ReferencedPairs

PAIRS = [
    Preference((5, 6, 7, 8), (5, 6, 9), 2, 0.5),
    Preference((5, 7), (5, 7, 7, 7, 1), 1, 0.0),  # one is the beginning of the other
    Preference((4, 4, 4, 1), (4, 4, 3, 1), 2, 1.5),
]
LISTS = [[(5, 6, 7), (5, 6, 8, 9), (5, 6)], [(4, 1), (4, 2)], [(3, 1, 1), (3, 2, 1), (3, 3, 1)]]
SCORES = [[0.1, 0.9, -0.3], [1.0, 1.0], [0.5, 0.2, 0.7]]


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def referenced_pairs(num_dummies: int = 0) -> ReferencedPairs:
    batch = collate_lists([(pair.chosen_ids, pair.rejected_ids) for pair in PAIRS], [pair.num_prompt_tokens for pair in PAIRS], 0)
    ref_logprobs = torch.tensor([[-1.0, -2.0], [-3.0, -1.5], [-0.5, -0.75]])
    return ReferencedPairs(batch.token_ids, batch.lengths, batch.response_mask, ref_logprobs).padded(len(PAIRS) + num_dummies)


def by_sequence(rows: list[list[float]], num_dummies: int = 0) -> torch.Tensor:
    """Numbers about the responses of each row as the model says them: first all first ones, 7 about dummies."""
    width = max(map(len, rows))
    full = [[*row, *[7.0] * (width - len(row))] for row in rows] + [[7.0] * width] * num_dummies
    return torch.tensor(full).t().flatten()


@pytest.mark.parametrize(
    "loss, smoothing, nll_coef", [("dpo", 0.0, 0.0), ("dpo", 0.2, 0.0), ("dpo", 0.1, 0.7), ("ipo", 0.0, 0.0), ("ipo", 0.0, 2.0)]
)
def test_dpo_and_ipo(loss, smoothing, nll_coef):
    said, beta = [[-0.5, -2.5], [-4.0, -1.0], [-0.5, -0.5]], 0.3
    total, nll = 0.0, 0.0
    rows = referenced_pairs(num_dummies=2)
    for i, (chosen, rejected) in enumerate(said):
        nll -= chosen / (len(PAIRS[i].chosen_ids) - PAIRS[i].num_prompt_tokens)
        ref_chosen, ref_rejected = rows.ref_logprobs[i].tolist()
        x = (chosen - ref_chosen) - (rejected - ref_rejected)
        if loss == "ipo":
            total += (x - 1 / (2 * beta)) ** 2
        else:
            total += -(1 - smoothing) * log_sigmoid(beta * x) - smoothing * log_sigmoid(-beta * x)
    total += nll_coef * nll
    config = DpoConfig(loss=loss, beta=beta, label_smoothing=smoothing, nll_coef=nll_coef)
    found, metrics = preference_loss(by_sequence(said, num_dummies=2), rows, 3.0, config)
    assert float(found) == pytest.approx(total / 3)
    values = {name: metric.value for name, metric in metrics.items()}
    assert values["loss"] == pytest.approx(total / 3) and values["pair_accuracy"] == pytest.approx(1 / 3)
    assert values["reward_chosen"] - values["reward_rejected"] == pytest.approx(values["margin"]) and values["nll"] == pytest.approx(
        nll / 3
    )


def test_a_policy_that_is_its_reference_has_log_2_and_learns_the_difference_alone():
    rows = referenced_pairs()
    said = rows.ref_logprobs.t().flatten().clone().requires_grad_()
    loss, _ = preference_loss(said, rows, 3.0, DpoConfig(beta=0.1))
    loss.backward()
    assert float(loss) == pytest.approx(math.log(2))
    torch.testing.assert_close(said.grad, torch.tensor([-1.0, -1, -1, 1, 1, 1]) * 0.1 * 0.5 / 3)


def test_responses_are_masked_without_their_prompt():
    batch = referenced_pairs()
    assert batch.response_mask[0].tolist() == [[False, False, True, True, False], [False, False, True, False, False]]
    assert batch.sequences().token_ids[3].tolist() == [5, 6, 9, 0, 0]
    assert batch.sequence_mask[3].tolist() == batch.response_mask[0, 1].tolist()
    assert batch.by_row(torch.arange(6)).tolist() == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize("exponent, nll_coef", [(1.0, 1.0), (0.0, 0.5), (0.7, 0.0)])
def test_rrhf(exponent, nll_coef):
    said = [[-3.0, -8.0, -1.0], [-0.4, -0.2], [-2.0, -1.0, -1.5]]
    total = 0.0
    for responses, scores, logprobs in zip(LISTS, SCORES, said):
        p = [logprob / (max(1, len(ids) - 1)) ** exponent for ids, logprob in zip(responses, logprobs)]
        total += sum(max(0.0, p[i] - p[j]) for i in range(len(p)) for j in range(len(p)) if scores[i] < scores[j])
        total -= nll_coef * p[scores.index(max(scores))]
    batch = collate_lists(LISTS, [1, 1, 1], 0)
    padded = torch.tensor([[*scores, *[0.0] * (3 - len(scores))] for scores in SCORES])
    rows = RankedLists(batch.token_ids, batch.lengths, batch.response_mask, padded).padded(4)
    config = RrhfConfig(length_exponent=exponent, nll_coef=nll_coef)
    found, metrics = ordering_loss(by_sequence(said, num_dummies=1).requires_grad_(), rows, 3.0, config)
    found.backward()
    assert float(found.detach()) == pytest.approx(total / 3, rel=1e-5)
    assert metrics["pair_accuracy"].count == 6 and metrics["loss"].value == pytest.approx(total / 3, rel=1e-5)


@pytest.mark.parametrize("centring", [0.0, 0.2])
def test_reward_model_at_the_end(centring):
    said = [(0.5, -0.5), (0.1, 0.4), (2.0, 1.0)]
    total = sum(-log_sigmoid(c - r - pair.margin) + centring * (c + r) ** 2 for pair, (c, r) in zip(PAIRS, said))
    batch = collate_preferences(PAIRS, 0).padded(5)
    found, metrics = comparison_loss(by_sequence([list(row) for row in said], num_dummies=2), batch, 3.0, centring)
    assert float(found) == pytest.approx(total / 3) and metrics["pair_accuracy"].value == pytest.approx(2 / 3)


def test_reward_model_over_tokens_from_the_first_difference():
    batch = collate_preferences(PAIRS, 0, length=8).padded(4)
    said = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    total = 0.0
    for i, pair in enumerate(PAIRS):
        chosen, rejected = (row[: len(ids)].tolist() for row, ids in ((said[i], pair.chosen_ids), (said[4 + i], pair.rejected_ids)))
        longest = max(len(chosen), len(rejected))
        padded = [[*ids, *[-1] * (longest - len(ids))] for ids in (pair.chosen_ids, pair.rejected_ids)]
        chosen, rejected = ([*side, *side[-1:] * (longest - len(side))] for side in (chosen, rejected))
        first = next(t for t in range(longest) if padded[0][t] != padded[1][t])
        total += sum(-log_sigmoid(chosen[t] - rejected[t] - pair.margin) for t in range(first, longest)) / (longest - first)
    found, metrics = token_comparison_loss(said.flatten().view(8, 8), batch, 3.0)
    assert float(found) == pytest.approx(total / 3, rel=1e-5)
    ends = [said[i, len(pair.chosen_ids) - 1] > said[4 + i, len(pair.rejected_ids) - 1] for i, pair in enumerate(PAIRS)]
    assert metrics["pair_accuracy"].value == pytest.approx(sum(map(float, ends)) / 3)
