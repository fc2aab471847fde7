"""Who scores where several ranks hold or share a model: one rank of a replica asks for all of it, and nobody is asked about nothing."""

import pytest

from megarl.config import ParallelConfig
from megarl.errors import RewardError
from megarl.models.family import spec_from_hf_config
from megarl.records import Completion, Prompt
from megarl.rewards.model import ModelScorer
from megarl.rewards.scorer import Term, WeightedSum
from tests.multi_rank.test_moe import QWEN3_MOE
from tests.ranks import run_ranks

SHARES = ((3, 0, 1), (0, 7, 2))  # rows of each of two data ranks, call by call


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


class Recording:
    """A scorer that keeps what it was asked about."""

    def __init__(self):
        self.asked = []

    def score(self, prompts, completions, texts):
        self.asked.append([(prompt.prompt_id, completion.token_ids) for prompt, completion in zip(prompts, completions, strict=True)])
        return [float(len(completion.token_ids)) for completion in completions]


def rows_of(first: int, count: int) -> tuple[list[Prompt], list[Completion]]:
    prompts = [Prompt(first + i, (5, 7 + i)) for i in range(count)]
    ids = [tuple(range(11, 13 + (prompt.prompt_id % 5))) for prompt in prompts]
    return prompts, [Completion(p.prompt_id, 0, row, (0.0,) * len(row), "stop", 0) for p, row in zip(prompts, ids, strict=True)]


def judge_unequal_shares(rank: int, world_size: int) -> list[dict]:
    """A mixture as reward model, its experts shared by two data ranks or whole on each, beside two other scorers and a hook."""
    from megarl.parallel import groups
    from megarl.ppo.judge import Judge
    from megarl.ppo.roles import RewardModel
    from megarl.ppo.terms import SequenceScores
    from tests.multi_rank.role_cases import Case, DictSource, hf_config, make_run, weights

    spec, found = spec_from_hf_config(hf_config(**QWEN3_MOE)), []
    for expert in (1, 2):
        run = make_run(Case({"expert": expert, "microbatch_size": 2}))
        layout = groups.initialize(run.parallel, seed=0)
        model = SequenceScores(RewardModel(spec, run, layout, DictSource(weights(spec, "critic", 4))), pad_id=0)
        everywhere, once, hooked = Recording(), Recording(), Recording()

        def hook(prompts, completions, texts, rewards, parts, hooked=hooked):
            hooked.score(prompts, completions, texts)
            return rewards

        terms = (Term("model", 1.0, ModelScorer(model)), Term("function", 1.0, once, runs_once=True), Term("rule", 1.0, everywhere))
        judge = Judge(WeightedSum(terms, hook), Letters(), layout)
        told = [judge.trajectories(*rows_of(100 * rank, count)) for count in SHARES[rank]]
        found.append(
            {
                "scores": [[t.reward_parts["model"] for t in trajectories] for trajectories in told],
                "asked": {name: scorer.asked for name, scorer in (("once", once), ("rule", everywhere), ("hook", hooked))},
            }
        )
    return found


def test_a_scorer_sees_real_rows_alone_while_data_ranks_share_a_reward_model():
    for rank, (whole, shared) in enumerate(run_ranks(judge_unequal_shares, 2)):
        for count, expected, scores in zip(SHARES[rank], whole["scores"], shared["scores"], strict=True):
            assert len(scores) == count and scores == pytest.approx(expected, abs=1e-5)
        assert any(abs(score) > 1e-3 for scores in whole["scores"] for score in scores)
        own = [
            [(prompt.prompt_id, completion.token_ids) for prompt, completion in zip(*rows_of(100 * rank, count), strict=True)]
            for count in SHARES[rank]
        ]
        for found in (whole, shared):
            assert [rows for rows in found["asked"]["rule"] if rows] == [rows for rows in own if rows]
            for name in ("once", "hook"):
                assert found["asked"][name] == [rows for rows in own if rows], (rank, name)
