"""Do sampler and trainer speak of one policy? Both say how likely the same sampled tokens were; the gate compares after every weight sync.

Digests (`bridge.verify`) prove that weights arrived; this proves that the two programs compute the same from them: weight tables, rotary
settings, packed copies, precision, temperature. Axis letters: B sequences of one data-parallel replica, T tokens of the padded batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megarl.checkpoint.train_state import TrainState
from megarl.config import PpoRun
from megarl.data.prompts import PromptSet
from megarl.errors import RolloutError
from megarl.metrics import Largest, Metric, Metrics
from megarl.parallel import collectives, groups
from megarl.parallel.layout import ParallelLayout
from megarl.parallel.memory import Phases
from megarl.ppo.disagreement import Disagreement, likely_causes
from megarl.ppo.judge import Judge
from megarl.ppo.roles import Actor
from megarl.records import RolloutBatch, Trajectory
from megarl.rollout.engine import Engine, make_requests

DEFAULT_TOLERANCE = {"fp32": 0.01, "bf16": 0.2}  # mean nats a token; docs/bridge.md shows what healthy runs measure
TAIL_FACTOR = 20  # the 99th percentile may be so many times the largest mean
RATIO_BAND = 1.25  # a probability ratio outside 1/1.25 to 1.25 is counted
START_PROMPTS, START_TOKENS = 8, 64  # of the comparison before the first step
BINS_PER_DECADE, DECADES = 32, (-9, 3)  # of the histogram that the percentile is read from: 7 % apart


@dataclass(frozen=True)
class Gap:
    """|sampler's - trainer's log-probability| of the response tokens of all data ranks, nats. `p99` is the edge of a histogram's bin."""

    num_tokens: int
    mean: float
    p99: float
    largest: float
    outside: float  # part of the tokens whose probability ratio leaves 1/RATIO_BAND to RATIO_BAND

    def __str__(self) -> str:
        numbers = f"mean {self.mean:.2g}, p99 {self.p99:.2g}, max {self.largest:.2g} nats"
        return f"{numbers}, {self.outside:.1%} of the ratios outside {1 / RATIO_BAND:g} to {RATIO_BAND:g} ({self.num_tokens} tokens)"

    def exceeds(self, tolerance: float) -> bool:
        """True when the mean is over `tolerance`, the 99th percentile over 20 times that, or either is no number."""
        return not (self.mean <= tolerance and self.p99 <= TAIL_FACTOR * tolerance)

    def metrics(self) -> Metrics:
        """Equal on all data ranks, and after their reduction."""
        return Metrics(
            {
                "rollout/logprob_gap": Metric(self.mean),
                "rollout/logprob_gap_p99": Largest(self.p99),
                "rollout/logprob_gap_max": Largest(self.largest),
                "rollout/ratio_outside": Metric(self.outside),
            }
        )


def measure(rollout_logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, group: collectives.Group) -> Gap:
    """The gap over all data ranks. Called by every rank of `group`, the data-parallel one. Shapes: three [B, T], `mask` bool."""
    gap = (old_logprobs - rollout_logprobs)[mask].double().abs().nan_to_num(nan=math.inf, posinf=math.inf)
    low, high = DECADES
    edges = torch.logspace(low, high, (high - low) * BINS_PER_DECADE + 1, dtype=torch.float64, device=gap.device)
    histogram = torch.bincount(torch.bucketize(gap, edges), minlength=len(edges) + 1).double()
    totals = torch.stack([gap.sum(), mask.sum().double(), (gap > math.log(RATIO_BAND)).sum().double()])
    totals = collectives.sum_over(torch.cat([totals, histogram]), group)
    largest = float(collectives.max_over(torch.cat([gap.new_zeros(1), gap]).max(), group))
    (total, count, outside), histogram = totals[:3].tolist(), totals[3:]
    num_tokens = max(count, 1.0)
    reached = int((histogram.cumsum(0) < 0.99 * count).sum())  # the first bin with 99 % of the tokens in and before it
    p99 = min(float(edges[reached]), largest) if reached < len(edges) else largest
    return Gap(int(count), total / num_tokens, p99, largest, outside / num_tokens)


class ParityGate:
    """Stops a run whose sampler and trainer disagree. Both checks are entered by every rank, and fail on all of them alike."""

    def __init__(
        self,
        run: PpoRun,
        layout: ParallelLayout,
        prompts: PromptSet,
        stop_token_ids: Sequence[int],
        engine: Engine,
        memory: Phases,
        judge: Judge,
        actor: Actor,
    ):
        self.tolerance = run.rollout.parity_tolerance or DEFAULT_TOLERANCE[run.precision]
        self._run, self._layout, self._group = run, layout, groups.group(layout, "dp")
        self._prompts, self._stops, self._engine, self._memory = prompts, stop_token_ids, engine, memory
        self._judge, self._actor = judge, actor
        self._num_passed = 0

    def at_start(self, state: TrainState) -> Gap:
        """Sample a handful of prompts with the weights that have just been pushed, compare, and say so in one line."""
        layout, run = self._layout, self._run
        count = math.ceil(START_PROMPTS / layout.data) * layout.data
        prompts = self._prompts.from_position(state.prompts_consumed, count, run.seed, layout)
        tokens = min(START_TOKENS, run.rollout.max_response_tokens)
        settings = run.rollout.model_copy(update={"samples_per_prompt": 1, "max_response_tokens": tokens})
        requests = make_requests(prompts, settings, self._stops, (run.seed, state.step), layout.data_offset(len(prompts)))
        with self._memory.generating():
            completions = self._engine.generate(requests)
        with self._memory.scoring():
            places = range(layout.data_offset(len(prompts)), layout.data_offset(len(prompts)) + len(prompts))
            rollout = self._judge.pack([Trajectory(p, c, 0.0) for p, c in zip(prompts, completions, strict=True)], places)
            gap = self._checked(rollout, self._actor.logprobs(rollout))
        if layout.rank == 0:
            print(f"megarl: sampler and trainer agree: |log-prob gap| {gap}; rollout.parity_tolerance {self.tolerance:g}", flush=True)
        return gap

    def check(self, rollout: RolloutBatch, old_logprobs: Tensor) -> Metrics:
        """Compare a step's own samples, f32[B, T] of the trainer's log-probs.

        Raises `RolloutError` with the likely causes, on all ranks alike.
        """
        return self._checked(rollout, old_logprobs).metrics()

    def _checked(self, rollout: RolloutBatch, old_logprobs: Tensor) -> Gap:
        mask = rollout.response_mask & (rollout.ages == 0)  # older weights chose the others
        gap = measure(rollout.rollout_logprobs, old_logprobs, mask, self._group)
        if gap.exceeds(self.tolerance):
            here = Disagreement.of(rollout.rollout_logprobs, old_logprobs, mask, self.tolerance)
            everywhere = [Disagreement.from_json(rank) for rank in collectives.gather_json(here.to_json(), self._group)]
            causes = likely_causes(everywhere, self.tolerance, self._num_passed)
            raise RolloutError(
                f"sampler and trainer disagree about the tokens just sampled: |log-prob gap| {gap}; expected a mean of at most"
                f" rollout.parity_tolerance = {self.tolerance:g} and a p99 of at most {TAIL_FACTOR} times that. Likely causes, likeliest"
                f" first: {' '.join(f'({number}) {cause};' for number, cause in enumerate(causes, 1)).rstrip(';')}"
            )
        self._num_passed += 1
        return gap
