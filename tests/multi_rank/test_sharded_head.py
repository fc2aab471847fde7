"""The head shared by all pipeline stages: the same answers, gradients and metrics as one rank, and never more logits than allowed."""

from functools import partial
from math import prod

import pytest
import torch

from megarl.course.reward_model import comparison_loss
from megarl.course.sft import imitation_loss
from megarl.models import vocabulary
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
    run_case,
    updated_weights,
    weights,
)
from tests.multi_rank.test_roles_invariance import TIED, assert_same, by_case
from tests.ranks import run_ranks

SHARED = {"pipeline": 2, "head": "sharded"}
SEQUENCE_MEAN = {"aggregation": "sequence_mean"}
ENDS = {"end_ids": (1, 60, 99)}  # on both halves of the padded vocabulary
LOGITS_BYTES = 4 * 128 * 3  # three tokens of the padded vocabulary

ON_TWO = [
    Case(SHARED | {"microbatch_size": 3}),
    Case(SHARED | {"microbatch_size": 3}, **ENDS),
    Case({"tensor": 2, "sequence": True, "microbatch_size": 3}, **ENDS),
    Case(SHARED | {"microbatch_size": 1}, ppo=SEQUENCE_MEAN),
    Case(SHARED | {"recompute": "full", "logits_bytes": LOGITS_BYTES}, model=TIED.model),
    Case(SHARED, precision="bf16", model=TIED.model),
    Case(SHARED | {"max_tokens_per_microbatch": 32, "microbatch_size": 1}),
    Case({"pipeline": 2, "head": "last_stage", "logits_bytes": LOGITS_BYTES}),
]
ON_FOUR = [
    Case(SHARED | {"tensor": 2, "sequence": True, "microbatch_size": 3}),
    Case(SHARED | {"tensor": 2, "microbatch_size": 2}, model=TIED.model),
    Case(SHARED | {"tensor": 2, "max_tokens_per_microbatch": 32}, **ENDS),
    Case(SHARED | {"microbatch_size": 2, "distributed_optimizer": False}, ppo=SEQUENCE_MEAN),
    Case(SHARED | {"context": 2, "microbatch_size": 3}, ppo=SEQUENCE_MEAN),
    Case(SHARED | {"context": 2, "max_tokens_per_microbatch": 32}, model=TIED.model),
    Case(SHARED | {"pipeline": 4, "microbatch_size": 1}, model={"num_hidden_layers": 4}),
    Case(SHARED | {"pipeline": 4, "microbatch_size": 3}, model={"num_hidden_layers": 5, "tie_word_embeddings": True}),
]
ON_EIGHT = [
    Case(SHARED | {"tensor": 2, "pipeline": 4, "sequence": True, "microbatch_size": 2}, model={"num_hidden_layers": 4}),
    Case(SHARED | {"pipeline": 8, "microbatch_size": 1}, model={"num_hidden_layers": 8, "tie_word_embeddings": True}),
    Case(SHARED | {"tensor": 2, "microbatch_size": 2}, ppo=SEQUENCE_MEAN),
    Case(SHARED | {"tensor": 4, "sequence": True}, model=TIED.model),
]


def alone(case: Case) -> Case:
    """The same work on one rank."""
    return Case(ppo=case.ppo, model=case.model, precision=case.precision, end_ids=case.end_ids)


def lessons(case: Case) -> dict:
    """One step of a reward model and one of fine-tuning on one replica: what they say afterwards, report, and their weights."""
    run = make_run(case)
    layout = groups.initialize(run.parallel, seed=0)
    spec = spec_from_hf_config(hf_config(**case.model))
    batch = make_experience()
    half = NUM_ROWS // 2
    pairs = PreferenceBatch(batch.token_ids[:half], batch.lengths[:half], batch.token_ids[half:], batch.lengths[half:], torch.zeros(half))
    demonstrations = DemonstrationBatch(batch.token_ids, batch.lengths, batch.response_mask)
    result = {}
    for name, role, head, examples, loss, denominator in (
        ("reward", "critic", ScoreHead(), pairs, comparison_loss, half),
        ("sft", "actor", LogprobHead(run.parallel.logits_bytes, mask_field="loss_mask"), demonstrations, imitation_loss, 20.0),
    ):
        learner, pieces = build_learner(spec, role, run.actor, run, layout, DictSource(weights(spec, role, 5)), total_steps=1)
        metrics = learner.step(examples, head, partial(loss, denominator=denominator))
        result[f"{name}_forward"] = learner.forward(examples, head)
        result[f"{name}_metrics"] = metrics.values_by_name()
        result[f"{name}_weights"] = updated_weights(pieces)
    return result


def run_shared(rank: int, world_size: int, cases: list[Case]) -> list[dict]:
    """Every role's answers and updates, the lessons', and the largest block of logits this rank held."""
    largest = [0]
    original = vocabulary._tempered_logits

    def measured(*arguments):
        logits = original(*arguments)
        largest[0] = max(largest[0], logits.numel() * logits.element_size())
        return logits

    vocabulary._tempered_logits = measured
    results = []
    for case in cases:
        largest[0] = 0
        found = run_case(case)
        found["largest_logits"] = largest[0]
        has_all_ranks = prod(case.parallel.get(axis, 1) for axis in ("tensor", "pipeline", "context")) == world_size
        results.append(found | ({"lessons": lessons(case)} if has_all_ranks else {}))
    return results


def on_one_rank(of: list[Case]) -> dict[str, list[dict]]:
    cases = {repr(alone(case)): alone(case) for case in of}
    return dict(zip(cases, by_case(run_ranks(run_shared, 1, list(cases.values()))), strict=True))


@pytest.fixture(scope="module")
def one_rank() -> dict:
    return on_one_rank([*ON_TWO, *ON_FOUR])


def check(world_size: int, cases: list[Case], one_rank: dict) -> list[list[dict]]:
    faults, results = [], by_case(run_ranks(run_shared, world_size, cases))
    for case, found in zip(cases, results, strict=True):
        expected = one_rank[repr(alone(case))]
        try:
            assert_same(found, expected, case)
            if case.precision == "fp32" and "lessons" in found[0]:
                assert_same_lessons([rank["lessons"] for rank in found], expected[0]["lessons"], case)
        except AssertionError as fault:
            faults.append(f"{case}: {fault}")
    assert not faults, "\n".join(faults)
    return results


def assert_same_lessons(found: list[dict], expected: dict, case: Case) -> None:
    for name in ("reward", "sft"):
        for rank in found:
            torch.testing.assert_close(rank[f"{name}_forward"], expected[f"{name}_forward"], rtol=1e-5, atol=1e-4)  # after a step of lr 1
            assert rank[f"{name}_metrics"] == pytest.approx(expected[f"{name}_metrics"], rel=2e-5, abs=1e-6), name
        key = {"reward": "critic_weights", "sft": "actor_weights"}[name]
        whole = assembled([{key: rank[f"{name}_weights"]} for rank in found], key, case)
        whole_expected = assembled([{key: expected[f"{name}_weights"]}], key, case)
        for hf_name, tensor in whole_expected.items():
            assert (whole[hf_name] - tensor).abs().max() < 2e-5, f"{name} {hf_name}"


def test_ends_that_nobody_could_choose_make_the_others_likelier(one_rank):
    barred, plain = (one_rank[repr(Case(**kind))][0]["logprobs"] for kind in (ENDS, {}))
    mask, tokens = make_experience().must_go_on, make_experience().token_ids
    could_be = mask & ~torch.isin(tokens, torch.tensor(ENDS["end_ids"]))
    assert could_be.sum() > 10 and (barred > plain)[could_be].all() and torch.equal(barred[~mask], plain[~mask])


def test_two_stages_agree_with_one_rank(one_rank):
    results = check(2, ON_TWO, one_rank)
    for case, ranks in zip(ON_TWO, results, strict=True):
        allowed = case.parallel.get("logits_bytes", 256 << 20)
        assert all(rank["largest_logits"] <= allowed for rank in ranks), case
        is_shared = case.parallel.get("head") != "last_stage"
        assert (ranks[0]["largest_logits"] > 0) == is_shared, "every stage computes logits exactly when the head is shared"


@pytest.mark.slow
def test_four_ranks_agree_with_one_rank(one_rank):
    check(4, ON_FOUR, one_rank)


@pytest.mark.slow
def test_eight_ranks_agree_with_one_rank():
    check(8, ON_EIGHT, on_one_rank(ON_EIGHT))
