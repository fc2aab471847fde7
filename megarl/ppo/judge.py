"""The station between the sampler and the models: rewards for completions, then one padded batch of the same T on every rank."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megarl.data.batching import pack, padded_length
from megarl.data.tokenizers import Tokenizer
from megarl.errors import MegarlError, error_kinds
from megarl.parallel import collectives, device, groups
from megarl.parallel.layout import ParallelLayout
from megarl.records import Completion, Prompt, RolloutBatch, Trajectory
from megarl.rewards.constant import ConstantAlarm
from megarl.rewards.scorer import WeightedSum

TOKENS_A_TENSOR_RANK = 8  # T is a multiple of this on every tensor-parallel rank: aligned for tensor cores


@dataclass(frozen=True)
class Judge:
    """Scores and packs the completions of one data-parallel replica. Both methods are entered by every rank of the world."""

    rewards: WeightedSum
    tokenizer: Tokenizer
    layout: ParallelLayout
    alarm: ConstantAlarm = field(default_factory=ConstantAlarm)

    def trajectories(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Trajectory]:
        """One trajectory a completion; completions come prompt by prompt, equally many for each.

        Raises `RewardError` on every rank when any rank's reward is not finite, naming the prompt and the rank.
        """
        samples = len(completions) // len(prompts)
        repeated = [prompt for prompt in prompts for _ in range(samples)]
        trajectories = self.rewards.judge(repeated, completions, self.tokenizer, self._scored)
        spans = collectives.gather_json(self.alarm.spans(trajectories), groups.group(self.layout, "dp"))
        for warning in self.alarm.after_step(spans):
            if self.layout.rank == 0:
                print(f"megarl: warning: {warning}", file=sys.stderr)
        return trajectories

    def _scored(self, runs_once: bool, work: Callable[[], list[float]]) -> list[float]:
        """What `work` returns: on each rank, or on the first rank of the replica, which tells the others. An error is raised everywhere."""
        # A reward model communicates inside its replica only, and all ranks of a replica fail alike.
        scoring = (lambda: self._once(work)) if runs_once else work
        return collectives.together(scoring, groups.group(self.layout, "world"))

    def _once(self, work: Callable[[], list[float]]) -> list[float]:
        scores, error = None, None
        if self.layout.rank == self.layout.ranks_along("model")[0]:
            try:
                scores = work()
            except MegarlError as failure:
                error = [type(failure).__name__, str(failure)]
        told = [scores, error]
        for axis in ("tp", "cp", "pp"):  # its neighbours along tp first, then those of all of them along cp, then pp
            told = collectives.broadcast_json(told, self.layout.ranks_along(axis)[0], groups.group(self.layout, axis))
        scores, error = told
        if error is not None:
            raise error_kinds()[error[0]](error[1])
        return scores

    def pack(self, trajectories: Sequence[Trajectory], num_prompts: int) -> RolloutBatch:
        """The padded batch on this rank's device. `num_prompts` of this data rank; every data rank has equally many samples."""
        longest = max(len(t.prompt.token_ids) + len(t.completion.token_ids) for t in trajectories)
        lengths = collectives.gather_json(longest, groups.group(self.layout, "dp"))
        samples, first = len(trajectories) // num_prompts, self.layout.data_offset(len(trajectories))
        sample_ids = range(first, first + len(trajectories))
        length = padded_length(lengths, TOKENS_A_TENSOR_RANK * self.layout.tensor)
        group_ids = [sample_id // samples for sample_id in sample_ids]
        batch = collectives.together(
            lambda: pack(trajectories, self.tokenizer.pad_id, length, sample_ids, group_ids), groups.group(self.layout, "world")
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
