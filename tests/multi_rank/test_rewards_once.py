"""Scorers that run once: one rank of a replica asks, every rank of it hears the same, and an error anywhere ends all ranks alike."""

import pytest

from megarl.config import ParallelConfig
from megarl.errors import RewardError
from megarl.records import Completion, Prompt
from megarl.rewards.scorer import Term, WeightedSum
from tests.ranks import run_ranks


class Letters:
    def decode_response(self, token_ids):
        return "x" * len(token_ids)


class Counting:
    """A scorer that never gives the same score twice."""

    def __init__(self, layout, broken_rank=None):
        self.layout, self.calls, self.broken_rank = layout, 0, broken_rank

    def score(self, prompts, completions, texts):
        self.calls += 1
        if self.layout.rank == self.broken_rank:
            raise RewardError(f"no scores for prompt {prompts[0].prompt_id}")
        return [100.0 * self.layout.rank + 10 * self.calls + i for i in range(len(texts))]


def on_both_layouts(rank: int, world_size: int) -> list[dict]:
    return [judge_twice(rank, sizes) for sizes in ({"tensor": 2}, {"tensor": 2, "pipeline": 2})]


def judge_twice(rank: int, sizes: dict) -> dict:
    from megarl.parallel import groups
    from megarl.ppo.judge import Judge

    layout = groups.initialize(ParallelConfig(**sizes), seed=0)
    prompts = [Prompt(10 * layout.dp_rank + i, (5,)) for i in range(2)]
    completions = [Completion(p.prompt_id, 0, (1, 2), (0.0, 0.0), "stop", 0) for p in prompts]
    once, everywhere, hooked = Counting(layout), Counting(layout), []

    def hook(prompts, completions, texts, rewards, parts):
        hooked.append(rank)
        return [reward + 0.5 * rank for reward in rewards]

    terms = (Term("everywhere", 0.0, everywhere), Term("once", 1.0, once, runs_once=True))
    judge = Judge(WeightedSum(terms, hook), Letters(), layout)
    rewards = [[t.reward for t in judge.trajectories(prompts, completions)] for _ in range(2)]
    last = layout.ranks_along("dp")[-1]
    leader = layout.at(last).ranks_along("model")[0]
    broken = Judge(WeightedSum((Term("once", 1.0, Counting(layout, broken_rank=leader), runs_once=True),)), Letters(), layout)
    with pytest.raises(RewardError, match=rf"no scores for prompt {10 * (layout.data - 1)} \(rank {leader}\)"):
        broken.trajectories(prompts, completions)
    return {
        "leader": layout.ranks_along("model")[0],
        "rewards": rewards,
        "calls": (everywhere.calls, once.calls, len(hooked)),
    }


def test_one_rank_of_a_replica_scores_for_all():
    for rank, layouts in enumerate(run_ranks(on_both_layouts, 4)):
        assert [found["leader"] for found in layouts] == [rank // 2 * 2, 0]
        for found in layouts:
            leader = found["leader"]
            base = [100.0 * leader + 0.5 * leader + 10 * call for call in (1, 2)]
            assert found["rewards"] == [[start, start + 1] for start in base], rank
            assert found["calls"] == ((2, 2, 2) if rank == leader else (2, 0, 0)), rank
