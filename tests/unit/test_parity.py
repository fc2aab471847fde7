"""The gap between sampler and trainer in numbers, and what its patterns are taken for."""

import math
from collections.abc import Iterator

import pytest
import torch

from megarl.config import ParallelConfig
from megarl.parallel import groups
from megarl.parallel.layout import ParallelLayout
from megarl.ppo.disagreement import Disagreement, likely_causes
from megarl.ppo.parity import TAIL_FACTOR, Gap, measure

TOLERANCE, ROWS, WIDTH, VOCAB = 1e-3, 32, 64, 50


@pytest.fixture(scope="module")
def alone() -> Iterator[ParallelLayout]:
    """A world of one rank, ended again for the tests that follow in this process."""
    yield groups.initialize(ParallelConfig(), seed=0)
    groups.shutdown()


def sampled(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits f64[B, T, V], the log-probabilities f32[B, T] of tokens drawn from them, and where responses are."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2.0 * torch.randn(ROWS, WIDTH, VOCAB, generator=generator, dtype=torch.float64)
    mask = (torch.arange(WIDTH) >= 5) & (torch.arange(WIDTH) < torch.randint(20, WIDTH + 1, (ROWS, 1), generator=generator))
    tokens = torch.multinomial(logits.softmax(-1).view(-1, VOCAB), 1, generator=generator).view(ROWS, WIDTH)
    return logits, tokens, mask


def logprob(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1).gather(2, tokens[..., None]).squeeze(2).float()


def noise(scale: float, seed: int = 1) -> torch.Tensor:
    return scale * torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed))


def first_cause(sampler: torch.Tensor, trainer: torch.Tensor, mask: torch.Tensor, num_passed: int = 0) -> str:
    return likely_causes([Disagreement.of(sampler, trainer, mask, TOLERANCE)], TOLERANCE, num_passed)[0]


def test_the_gap_is_the_loop(alone):
    logits, tokens, mask = sampled()
    ours, theirs = logprob(logits, tokens), logprob(logits, tokens) + noise(0.2) ** 3
    gaps = sorted(abs(float(ours[b, t]) - float(theirs[b, t])) for b in range(ROWS) for t in range(WIDTH) if mask[b, t])
    gap = measure(theirs, ours, mask, groups.group(alone, "dp"))
    assert gap.num_tokens == len(gaps) and gap.mean == pytest.approx(sum(gaps) / len(gaps)) and gap.largest == pytest.approx(gaps[-1])
    assert gap.p99 == pytest.approx(gaps[math.ceil(0.99 * len(gaps)) - 1], rel=0.08)
    assert 0 < gap.outside == sum(abs(g) > math.log(1.25) for g in gaps) / len(gaps)
    equal = measure(ours, ours, mask, groups.group(alone, "dp"))
    assert (equal.mean, equal.p99, equal.largest, equal.outside) == (0.0, 0.0, 0.0, 0.0)
    nothing = measure(ours, theirs, torch.zeros_like(mask), groups.group(alone, "dp"))
    assert nothing.num_tokens == 0 and not nothing.exceeds(TOLERANCE)


def test_what_stops_a_run(alone):
    def gap(mean: float = 0.0, p99: float = 0.0) -> Gap:
        return Gap(100, mean, p99, p99, 0.0)

    assert not gap(TOLERANCE, TAIL_FACTOR * TOLERANCE).exceeds(TOLERANCE)
    assert gap(1.01 * TOLERANCE).exceeds(TOLERANCE)
    assert gap(p99=1.01 * TAIL_FACTOR * TOLERANCE).exceeds(TOLERANCE)  # a few tokens far off hide in a mean
    logits, tokens, mask = sampled()
    ours = logprob(logits, tokens)
    for wrong in (float("nan"), float("inf"), -float("inf")):
        poisoned = ours.clone()
        poisoned[0, 7] = wrong
        assert measure(ours, poisoned, mask, groups.group(alone, "dp")).exceeds(TOLERANCE)
        outside = torch.where(mask, ours, wrong)
        assert not measure(ours, outside, mask, groups.group(alone, "dp")).exceeds(TOLERANCE)


def test_patterns_are_told_apart():
    logits, tokens, mask = sampled()
    ours = logprob(logits, tokens)
    others = logprob(sampled(seed=9)[0], tokens)
    position = torch.arange(WIDTH).float() / WIDTH
    few = torch.zeros_like(ours)
    few[3, 6:9] = 2.0
    shifted = torch.cat([logits, logits.logsumexp(-1, keepdim=True)], dim=2)  # one token that the other side does not count
    words = {
        "temperature": logprob(logits / 0.7, tokens),
        "padding of the vocabulary": logprob(shifted, tokens) + noise(0.01),
        "other weights": others,
        "another precision": ours + noise(0.01),
        "rope_theta": ours + noise(1.0) * position**6,
        "embedding": ours + few,
        "no numbers": ours.where(ours < -0.5, float("nan")),
    }
    for word, trainer in words.items():
        assert word in first_cause(ours, trainer, mask), word
    assert "3 earlier comparisons were fine" in first_cause(ours, others, mask, num_passed=3)


def test_a_replica_alone_is_named():
    logits, tokens, mask = sampled()
    ours = logprob(logits, tokens)
    fine, wrong = Disagreement.of(ours, ours, mask, TOLERANCE), Disagreement.of(ours, ours + 1.0, mask, TOLERANCE)
    causes = likely_causes([fine, fine, Disagreement.from_json(wrong.to_json())], TOLERANCE, 0)
    assert "data ranks 2 of 3" in causes[0]
    assert "data ranks" not in likely_causes([wrong, wrong], TOLERANCE, 0)[0]


def test_there_is_always_something_to_say():
    nothing = Disagreement.of(torch.zeros(1, 8), torch.zeros(1, 8), torch.zeros(1, 8, dtype=torch.bool), TOLERANCE)
    assert likely_causes([nothing], TOLERANCE, 0)
    one = torch.zeros(1, 8, dtype=torch.bool)
    one[0, 3] = True
    assert likely_causes([Disagreement.of(torch.zeros(1, 8), -torch.ones(1, 8), one, TOLERANCE)], TOLERANCE, 0)
