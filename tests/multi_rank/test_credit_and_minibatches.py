"""Credit, minibatches, judging and metrics over ranks: the same numbers and the same minibatches under every layout."""

from dataclasses import fields
from functools import partial

import pytest
import torch

from megarl.config import ParallelConfig, PpoConfig
from megarl.data.packing import Cost
from megarl.errors import RewardError, RolloutError
from megarl.metrics import StepMetrics, describe
from megarl.records import Completion, Experience, Prompt, RolloutBatch
from megarl.rewards.scorer import Term, WeightedSum
from tests.multi_rank.role_cases import Case, make_run
from tests.ranks import run_ranks

ROWS, LENGTH = 16, 6
LAYOUTS = {"tp4": {"tensor": 4}, "tp2dp2": {"tensor": 2}, "pp2dp2": {"pipeline": 2}, "pp4": {"pipeline": 4}, "dp4": {}}
CONFIG = PpoConfig(total_steps=1, minibatch_size=8, num_epochs=2, reward_clip=1.5, bootstrap_truncated=True, gamma=0.9)

GROUPWISE = ("rloo", "grpo", "dr_grpo", "reinforce_pp_baseline")


def whole_rollout() -> tuple[RolloutBatch, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The rollout of all data ranks, and what three models say about it; the same on every rank."""
    generator = torch.Generator().manual_seed(7)
    mask = torch.rand(ROWS, LENGTH, generator=generator) < 0.6
    mask[:, 2] = True
    old, ref, values, rollout = (torch.randn(ROWS, LENGTH, generator=generator) for _ in range(4))
    batch = RolloutBatch(
        token_ids=torch.randint(0, 50, (ROWS, LENGTH), generator=generator),
        lengths=torch.where(mask, torch.arange(1, LENGTH + 1), 0).amax(1),
        response_mask=mask,
        rollout_logprobs=rollout * mask,
        rewards=2 * torch.randn(ROWS, generator=generator),
        truncated=torch.rand(ROWS, generator=generator) < 0.5,
        group_ids=torch.arange(ROWS) // 2,
        sample_ids=torch.arange(ROWS),
        baselines=torch.randn(ROWS, generator=generator),
        baseline_truncated=torch.arange(ROWS) % 3 == 0,
        ages=torch.zeros(ROWS, LENGTH, dtype=torch.int64),
        must_go_on=mask & (torch.arange(LENGTH) < 3),
    )
    return batch, old, ref, values


def learn_under(layout) -> dict:
    """Experience, minibatches and metrics of this layout, put together from all data ranks in their order."""
    from megarl.parallel import collectives, groups
    from megarl.parallel.microbatches import Packing
    from megarl.ppo.credit import assign_credit
    from megarl.ppo.minibatches import minibatches

    group = groups.group(layout, "dp")
    share = ROWS // layout.data
    mine = torch.arange(layout.dp_rank * share, (layout.dp_rank + 1) * share)
    rollout, old, ref, values = whole_rollout()
    experience = assign_credit(rollout.rows(mine), old[mine], ref[mine], values[mine], CONFIG, 0.1, layout)
    together = partial(collectives.gather_rows, group=group)
    arguments = rollout.rows(mine), old[mine], ref[mine], values[mine]
    groupwise = {name: assign_credit(*arguments, CONFIG.model_copy(update={"advantage": name}), 0.1, layout) for name in GROUPWISE}
    pieces = list(minibatches(experience, CONFIG, seed=3, step=5, layout=layout))
    by_work = list(minibatches(experience, CONFIG, 3, 5, layout, Packing(max_tokens=64, cost=Cost(0.1))))
    metrics = StepMetrics(clock=lambda: 0.0)
    metrics += describe(experience, "k1", 0.1)
    return {
        "groupwise": {name: together(found.advantages) for name, found in groupwise.items()},
        "experience": {f.name: together(getattr(experience, f.name)) for f in fields(Experience)},
        "minibatches": [{f.name: together(getattr(piece, f.name)) for f in fields(Experience)} for piece in pieces],
        "by_work": [{f.name: together(getattr(piece, f.name)) for f in fields(Experience)} for piece in by_work],
        "work": [collectives.gather_json(Cost(0.1).of(piece.lengths.numpy()).sum(), group) for piece in by_work],
        "metrics": metrics.reduced(partial(collectives.gather_json, group=group)).values_by_name(),
    }


def check_judge(layout) -> dict:
    """What the judge packs when responses have different lengths on every data rank, and how failures on one rank end."""
    from megarl.ppo.judge import Judge
    from megarl.ppo.parity import ParityGate

    class Letters:
        pad_id = 0

        def decode_response(self, token_ids):
            return "x" * len(token_ids)

    class Lengths:
        def __init__(self, broken_rank=None):
            self.broken_rank = broken_rank

        def score(self, prompts, completions, texts):
            return [float("nan") if layout.rank == self.broken_rank else float(len(text)) for text in texts]

    prompts = [Prompt(10 * layout.dp_rank + i, (5, 6, 7)) for i in range(2)]
    response = tuple(range(1, 4 + layout.dp_rank))
    completions = [Completion(p.prompt_id, i, response, (-0.5,) * len(response), "stop", 0) for p in prompts for i in range(2)]
    judge = Judge(WeightedSum((Term("length", 2.0, Lengths()),)), Letters(), layout)
    places = range(2 * layout.dp_rank, 2 * layout.dp_rank + 2)
    batch = judge.pack(judge.trajectories(prompts, completions), places)
    with pytest.raises(RewardError, match=r"prompt \d+.*\(rank 3\)"):
        Judge(WeightedSum((Term("length", 2.0, Lengths(broken_rank=3)),)), Letters(), layout).trajectories(prompts, completions)
    run = make_run(Case(precision="bf16"))  # by default a mean gap of at most 0.2 nats
    gate = ParityGate(run, layout, *[None] * 6)  # of its parts the comparison at the start alone makes use
    passed = gate.check(batch, batch.rollout_logprobs + 0.1).values_by_name()
    assert passed == {
        "rollout/logprob_gap": pytest.approx(0.1),
        "rollout/logprob_gap_max": pytest.approx(0.1),
        "rollout/logprob_gap_p99": pytest.approx(0.1, rel=0.08),
        "rollout/ratio_outside": 0.0,
    }
    # Only the last data rank disagrees; every rank must stop, or the others would wait for it forever.
    off = batch.rollout_logprobs + (4.0 if layout.dp_rank == layout.data - 1 else 0.0)
    with pytest.raises(RolloutError, match=rf"parity_tolerance = 0.2 .*data ranks {layout.data - 1} of {layout.data} are off") as caught:
        gate.check(batch, off)
    assert "1 earlier comparisons were fine" in str(caught.value)
    return {"batch": {f.name: getattr(batch, f.name) for f in fields(RolloutBatch)}, "dp_rank": layout.dp_rank}


def on_every_layout(rank: int, world_size: int) -> dict:
    from megarl.parallel import groups

    results = {}
    for name, sizes in LAYOUTS.items():
        layout = groups.initialize(ParallelConfig(**sizes), seed=0)
        results[name] = learn_under(layout)
        if name in ("tp2dp2", "dp4"):
            results[name]["judge"] = check_judge(layout)
    return results


@pytest.fixture(scope="module")
def results() -> list[dict]:
    return run_ranks(on_every_layout, 4)


def test_credit_does_not_depend_on_the_layout(results):
    expected = results[0]["tp4"]["experience"]
    for ranks in results:
        for name in LAYOUTS:
            for field, tensor in expected.items():
                torch.testing.assert_close(ranks[name]["experience"][field], tensor)


def test_no_stage_judges_a_part_of_a_group(results):
    expected = results[0]["tp4"]["groupwise"]
    assert all(tensor.any() for tensor in expected.values())
    for ranks in results:
        for name in LAYOUTS:
            for estimator, tensor in expected.items():
                torch.testing.assert_close(ranks[name]["groupwise"][estimator], tensor)


def test_minibatches_hold_the_same_samples_under_every_layout(results):
    expected = results[0]["tp4"]["minibatches"]
    assert len(expected) == 4  # 2 epochs of 16 rows, 8 a minibatch
    for epoch in (expected[:2], expected[2:]):
        assert sorted(torch.cat([piece["sample_ids"] for piece in epoch]).tolist()) == list(range(ROWS))
    for ranks in results:
        for name in LAYOUTS:
            for piece, reference in zip(ranks[name]["minibatches"], expected, strict=True):
                assert torch.equal(piece["sample_ids"], reference["sample_ids"])


def test_rows_travel_whole(results):
    experience = results[0]["tp4"]["experience"]
    for name in LAYOUTS:
        for piece in results[1][name]["minibatches"]:
            for field, tensor in piece.items():
                torch.testing.assert_close(tensor, experience[field][piece["sample_ids"]])


def test_rows_dealt_by_work_are_the_same_minibatches(results):
    experience = results[0]["tp4"]["experience"]
    for name in LAYOUTS:
        found, expected = results[1][name]["by_work"], results[1][name]["minibatches"]
        for piece, reference in zip(found, expected, strict=True):
            assert sorted(piece["sample_ids"].tolist()) == sorted(reference["sample_ids"].tolist())
            for field, tensor in piece.items():
                torch.testing.assert_close(tensor, experience[field][piece["sample_ids"]])
        largest = Cost(0.1).of(experience["lengths"].numpy()).max()
        assert all(max(work) - min(work) <= largest for work in results[1][name]["work"])


def test_metrics_do_not_depend_on_the_layout(results):
    expected = results[0]["tp4"]["metrics"]
    for ranks in results:
        for name in LAYOUTS:
            assert ranks[name]["metrics"] == {key: pytest.approx(value, abs=1e-6) for key, value in expected.items()}


@pytest.mark.parametrize("name", ["tp2dp2", "dp4"])
def test_all_data_ranks_pad_alike_and_number_their_samples_on(results, name):
    batches = {ranks[name]["judge"]["dp_rank"]: ranks[name]["judge"]["batch"] for ranks in results}
    assert {batch["token_ids"].shape for batch in batches.values()} == {(4, 16)}  # longest of 7 under tp2 dp2, of 9 under dp4
    assert torch.cat([batches[i]["sample_ids"] for i in sorted(batches)]).tolist() == list(range(4 * len(batches)))
    assert torch.cat([batches[i]["group_ids"] for i in sorted(batches)]).tolist() == [i // 2 for i in range(4 * len(batches))]
    assert [batches[i]["rewards"].tolist() for i in sorted(batches)] == [[2.0 * (3 + i)] * 4 for i in sorted(batches)]
