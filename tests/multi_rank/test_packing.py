"""Packed microbatches give the numbers of padded ones under every layout: answers, gradients, updates, metrics; the lessons too."""

import pytest
import torch

from megarl.course.reward_model import comparison_loss
from megarl.course.sft import imitation_loss
from megarl.models.family import spec_from_hf_config
from megarl.models.token_stats import LogprobHead, ScoreHead
from megarl.parallel import groups
from megarl.ppo.roles import build_learner
from megarl.records import DemonstrationBatch, PreferenceBatch
from tests.multi_rank.role_cases import (
    NUM_ROWS,
    Case,
    DictSource,
    assembled,
    hf_config,
    make_experience,
    make_run,
    rows_of,
    run_cases,
    updated_weights,
    weights,
)
from tests.multi_rank.test_roles_invariance import QWEN2, QWEN3, assert_same, by_case, reference_of
from tests.ranks import run_all, run_ranks

SPEC = spec_from_hf_config(hf_config())
TIED = {"tie_word_embeddings": True}


def packing(max_tokens: int, **parallel) -> dict:
    return parallel | {"max_tokens_per_microbatch": max_tokens}


ON_ONE = [
    Case(packing(24)),
    Case(packing(16, logits_bytes=2000, recompute="selective"), model=QWEN3.model),
    Case(packing(1000, recompute="full"), model=QWEN2.model),
    Case(packing(40), ppo={"aggregation": "sequence_mean"}),
    Case(packing(24), precision="bf16", model=TIED),
]
ON_TWO = [
    Case(packing(24)),
    Case(packing(32, tensor=2)),
    Case(packing(32, tensor=2, sequence=True, recompute="selective")),
    Case(packing(24, pipeline=2)),
    Case(packing(32, context=2, recompute="selective")),
    Case(packing(16, pipeline=2), model=QWEN3.model | TIED),
    Case(packing(24, pipeline=2, virtual_pipeline=2), model={"num_hidden_layers": 5}),
]
ON_FOUR = [
    Case(packing(32, tensor=2, pipeline=2, sequence=True)),
    Case(packing(24, pipeline=2, recompute="full"), model=TIED),
    Case(packing(48, tensor=2, sequence=True), ppo={"aggregation": "sequence_sum_fixed"}),
]


@pytest.fixture(scope="module")
def one_rank() -> dict:
    """What one rank says, padded and packed."""
    padded = {repr(c): c for c in (Case(ppo=case.ppo, model=case.model, precision=case.precision) for case in [*ON_ONE, *ON_TWO, *ON_FOUR])}
    cases = padded | {repr(case): case for case in ON_ONE}
    return dict(zip(cases, by_case(run_ranks(run_cases, 1, list(cases.values()))), strict=True))


@pytest.mark.parametrize("case", ON_ONE, ids=str)
def test_packing_does_not_show_on_one_rank(case, one_rank):
    assert_same(one_rank[repr(case)], reference_of(case, one_rank), case)


@pytest.mark.parametrize("world_size, cases", [(2, ON_TWO), (4, ON_FOUR)])
def test_packing_does_not_show_under_any_layout(world_size, cases, one_rank):
    faults = []
    for case, found in zip(cases, by_case(run_ranks(run_cases, world_size, cases)), strict=True):
        try:
            assert_same(found, reference_of(case, one_rank), case)
        except AssertionError as fault:
            faults.append(f"{case}: {fault}")
    assert not faults, "\n".join(faults)


def lessons(rank: int, world_size: int, parallel: dict) -> dict:
    """One step of each supervised lesson, the rows dealt unevenly over data ranks, and what their models say before it."""
    run = make_run(Case(parallel))
    layout = groups.initialize(run.parallel, seed=0)
    whole = make_experience()
    cut = {1: [0, NUM_ROWS], 2: [0, 6, NUM_ROWS]}[layout.data]
    mine = slice(cut[layout.dp_rank], cut[layout.dp_rank + 1])
    rows = whole.rows(mine)
    demonstrations = DemonstrationBatch(rows.token_ids, rows.lengths, rows.response_mask)
    order = torch.arange(NUM_ROWS).flip(0)[mine]
    pairs = PreferenceBatch(rows.token_ids, rows.lengths, whole.token_ids[order], whole.lengths[order], torch.zeros(len(rows)))
    result = {"dp_rank": layout.dp_rank}
    for name, role, batch, head, loss, denominator in (
        ("sft", "actor", demonstrations, LogprobHead(run.parallel.logits_bytes, mask_field="loss_mask"), imitation_loss, 40.0),
        ("reward", "critic", pairs, ScoreHead(), comparison_loss, float(NUM_ROWS)),
    ):
        learner, pieces = build_learner(SPEC, role, run.actor, run, layout, DictSource(weights(SPEC, role, 5)), 1)
        stats = learner.forward(batch, head)
        result[f"{name}_stats"] = stats if name == "sft" else torch.stack(stats.chunk(2), dim=1)
        result[f"{name}_metrics"] = learner.step(batch, head, lambda s, r, loss=loss, d=denominator: loss(s, r, d)).to_json()
        result[f"{'actor' if role == 'actor' else 'critic'}_weights"] = updated_weights(pieces)
    return result


LESSONS_ON_TWO = [packing(32, tensor=2, sequence=True), packing(24, pipeline=2), packing(24)]


@pytest.fixture(scope="module")
def taught() -> tuple[list[dict], list[list[dict]]]:
    padded, *packed = run_all([(lessons, ({},)), (lessons, (packing(24),))], 1)
    return padded, [*packed, *run_all([(lessons, (parallel,)) for parallel in LESSONS_ON_TWO], 2)]


def test_packing_does_not_show_in_the_supervised_lessons(taught):
    expected, others = taught
    for found in others:
        for key in ("sft_stats", "reward_stats"):
            torch.testing.assert_close(rows_of(found, key), rows_of(expected, key), rtol=1e-5, atol=1e-5)
        for key, role in (("actor_weights", "actor"), ("critic_weights", "critic")):
            start, whole, whole_expected = weights(SPEC, role, 5), assembled(found, key, Case()), assembled(expected, key, Case())
            for name, before in start.items():
                step, expected_step = whole[name] - before, whole_expected[name] - before
                size = expected_step.abs().max().item()
                assert size > 1e-4, f"{key} {name} did not learn"
                assert (step - expected_step).abs().max().item() < 1e-4 * size, f"{key} {name}"
