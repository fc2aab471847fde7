"""The station between the sampler and the models: rewards for completions, then one padded batch of the same T on every rank."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megarl.data.batching import pack, padded_length
from megarl.data.tokenizers import Tokenizer
from megarl.parallel import collectives, device, groups
from megarl.parallel.layout import ParallelLayout
from megarl.ppo.scoring import ScoredAhead, SharedScoring
from megarl.records import Completion, Prompt, RolloutBatch, Trajectory
from megarl.rewards.constant import ConstantAlarm
from megarl.rewards.scorer import WeightedSum
from megarl.rollout.engine import OnFinished

TOKENS_A_TENSOR_RANK = 8  # T is a multiple of this on every tensor-parallel rank: aligned for tensor cores


@dataclass(frozen=True)
class Judge:
    """Scores and packs the completions of one data-parallel replica. All methods but `samples` are entered by every rank of the world."""

    rewards: WeightedSum
    tokenizer: Tokenizer
    layout: ParallelLayout
    alarm: ConstantAlarm = field(default_factory=ConstantAlarm)
    ahead: ScoredAhead | None = None  # None: nothing is scored before all responses are there
    min_tokens: int = 0  # `rollout.min_response_tokens`

    @property
    def on_finished(self) -> OnFinished | None:
        """What the sampler shall call when a response is finished while others are not."""
        return self.ahead.early.take if self.ahead is not None else None

    def trajectories(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Trajectory]:
        """One trajectory a completion; completions come prompt by prompt, equally many for each. Data ranks may have more or fewer.

        Raises `RewardError` on every rank when any rank's reward is not finite, naming the prompt and the rank.
        """
        samples = len(completions) // max(1, len(prompts))
        repeated = [prompt for prompt in prompts for _ in range(samples)]
        found = self.ahead.gathered() if self.ahead is not None else {}
        shared = SharedScoring(self.layout)

        def run(runs_once: bool, work: Callable[[], list[float]]) -> list[float]:
            # Functions and servers are not asked about nothing. A reward model whose experts data ranks share computes along.
            return shared(runs_once, work if completions or not runs_once else list)

        return self.rewards.judge(repeated, completions, self.tokenizer, run, found)

    def watch(self, trajectories: Sequence[Trajectory]) -> None:
        """Warn of a reward that has been the same for all responses of many steps. Called once a step, with what is learned from."""
        spans = collectives.gather_json(self.alarm.spans(trajectories), groups.group(self.layout, "dp"))
        for warning in self.alarm.after_step(spans):
            if self.layout.rank == 0:
                print(f"megarl: warning: {warning}", file=sys.stderr)

    def pack(self, trajectories: Sequence[Trajectory], places: Sequence[int], policy_version: int = 0) -> RolloutBatch:
        """The padded batch on this rank's device; every data rank has equally many samples.

        `places` says of each prompt, in the order of the trajectories, where it stands among those of all data ranks; the ages of tokens
        count back from `policy_version`.
        """
        longest = max(len(t.prompt.token_ids) + len(t.completion.token_ids) for t in trajectories)
        lengths = collectives.gather_json(longest, groups.group(self.layout, "dp"))
        samples = len(trajectories) // len(places)
        sample_ids = [place * samples + index for place in places for index in range(samples)]
        length = padded_length(lengths, TOKENS_A_TENSOR_RANK * self.layout.tensor)
        group_ids = [sample_id // samples for sample_id in sample_ids]
        batch = collectives.together(
            lambda: pack(trajectories, self.tokenizer.pad_id, length, sample_ids, group_ids, policy_version, self.min_tokens),
            groups.group(self.layout, "world"),
        )
        return batch.to(device.device())

    def samples(self, trajectories: Sequence[Trajectory], count: int) -> list[dict]:
        """The first `count` trajectories as JSON objects, for people to read."""
        return [
            {
                "kind": "rollout",
                "prompt": t.prompt.text,
                "response": self.tokenizer.decode_response(t.completion.token_ids),
                "answer": t.prompt.answer,
                "finish_reason": t.completion.finish_reason,
                "policy_version": t.completion.policy_version,
                "reward": t.reward,
                **{f"reward/{name}": part for name, part in t.reward_parts.items()},
            }
            for t in trajectories[:count]
        ]
