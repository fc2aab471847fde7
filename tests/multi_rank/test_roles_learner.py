"""The learner on two ranks: exact resume, skipped updates, clipping, weight decay, uneven shares, preference batches."""

from dataclasses import replace

import pytest
import torch

from megarl.metrics import Metric, Metrics
from megarl.models.family import spec_from_hf_config
from megarl.models.token_stats import ScoreHead
from megarl.parallel import groups
from megarl.parallel.layout import ParallelLayout
from megarl.ppo.roles import Actor, RewardModel, build_learner
from megarl.records import PreferenceBatch
from tests.multi_rank.role_cases import (
    NUM_ROWS,
    Case,
    DictSource,
    assembled,
    hf_config,
    make_experience,
    make_run,
    updated_weights,
    weights,
)
from tests.ranks import run_all

SPEC = spec_from_hf_config(hf_config())
TRAINING = {"lr": 0.01, "eps": 1e-5, "clip_grad": 0.5, "weight_decay": 0.1, "schedule": "linear", "warmup_steps": 1}
RESUMED = [
    Case({"distributed_optimizer": is_distributed} | parallel, optimizer=TRAINING, precision=precision, model=model)
    for is_distributed, parallel, precision, model in [
        (True, {}, "bf16", {}),
        (False, {}, "bf16", {}),
        (True, {"tensor": 2, "sequence": True}, "fp32", {}),
        (False, {"pipeline": 2}, "fp32", {"tie_word_embeddings": True}),
        (True, {}, "fp32", {}),
    ]
]


def start(case: Case) -> tuple[Actor, ParallelLayout]:
    run = make_run(case)
    layout = groups.initialize(run.parallel, seed=0)
    spec = spec_from_hf_config(hf_config(**case.model))
    return Actor(spec, run, layout, DictSource(weights(spec, "actor", 1))), layout


def share(layout: ParallelLayout, rows=None):
    size = NUM_ROWS // layout.data
    rows = rows or slice(layout.dp_rank * size, (layout.dp_rank + 1) * size)
    return make_experience().rows(rows)


def snapshot(actor: Actor) -> tuple[list, dict, dict]:
    tensors = {key: view.clone() for key, view in optimizer_views(actor).items()}
    return [piece.view.clone() for piece in actor.pieces], tensors, actor.learner.counts()


def optimizer_views(actor: Actor) -> dict[tuple, torch.Tensor]:
    slots = actor.learner.optimizer_pieces(actor.pieces)
    return {(slot, piece.hf_name, piece.box): piece.view for slot, pieces in slots.items() for piece in pieces}


def resume(rank: int, world_size: int, case: Case) -> dict:
    actor, layout = start(case)
    fresh = snapshot(actor)  # before the first step the state exists and is all zero
    assert all(not t.any() for key, t in fresh[1].items() if key[0] != "main")
    for _ in range(2):
        actor.update(share(layout))
    saved = snapshot(actor)
    straight = [actor.update(share(layout)).to_json() for _ in range(2)]
    expected = snapshot(actor)

    actor, layout = start(case)
    with torch.no_grad():
        for piece, view in zip(actor.pieces, saved[0], strict=True):
            piece.view.copy_(view)
    actor.learner.refresh_main_params()
    for key, view in optimizer_views(actor).items():
        view.copy_(saved[1][key])
    actor.learner.load_counts(saved[2])
    resumed = [actor.update(share(layout)).to_json() for _ in range(2)]
    found = snapshot(actor)
    assert resumed == straight
    assert found[2] == expected[2] and found[2]["num_steps"] == 4
    for a, b in zip(found[0], expected[0], strict=True):
        assert torch.equal(a, b)
    assert found[1].keys() == expected[1].keys() and all(torch.equal(found[1][name], expected[1][name]) for name in found[1])
    assert not all(torch.equal(a, b) for a, b in zip(saved[0], expected[0], strict=True)), "the test must train"
    return {"num_tensors": len(saved[1]), "main": any(key[0] == "main" for key in saved[1])}


def skip(rank: int, world_size: int) -> list[float]:
    """One replica's loss is infinite: both leave everything as it was, count the skip once, and go on."""
    actor, layout = start(Case({"distributed_optimizer": False}, optimizer=TRAINING))
    actor.update(share(layout))
    before = snapshot(actor)
    batch = share(layout)
    if layout.dp_rank == 1:
        batch = replace(batch, advantages=batch.advantages * float("inf"))
    metrics = actor.update(batch)
    after = snapshot(actor)
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert all(torch.equal(before[1][name], after[1][name]) for name in before[1])
    assert before[2]["num_updates"] == after[2]["num_updates"] == 1 and after[2]["num_steps"] == 2
    assert "actor/grad_norm" not in metrics
    again = actor.update(share(layout))
    assert torch.isfinite(torch.tensor(again["actor/grad_norm"].value))
    assert not torch.equal(snapshot(actor)[0][0], after[0][0])
    return [metrics["actor/skipped_updates"].value, again["actor/skipped_updates"].value]


def clip_and_decay(rank: int, world_size: int) -> dict:
    """lr 1, eps 1: the first update is -g / (|g| + 1), from which g can be read back."""
    result = {}
    for name, clip_grad in (("free", 0.0), ("clipped", 0.25)):
        actor, layout = start(Case(optimizer={"clip_grad": clip_grad}))
        metrics = actor.update(share(layout))
        result[name] = {"actor_weights": updated_weights(actor.pieces), "grad_norm": metrics["actor/grad_norm"].value}
    actor, layout = start(Case(ppo={"entropy_coef": 0.0}, optimizer={"lr": 0.5, "weight_decay": 0.5}))
    idle = share(layout)
    actor.update(replace(idle, advantages=torch.zeros_like(idle.advantages)))
    return result | {"decayed": {"actor_weights": updated_weights(actor.pieces)}}


def uneven(rank: int, world_size: int) -> list:
    """Replicas with different numbers of rows, one with none, learn the same as with equal shares."""
    result = []
    for cut in (5, 7, NUM_ROWS):
        actor, layout = start(Case({"microbatch_size": 3}))
        mine = share(layout, slice(0, cut) if layout.dp_rank == 0 else slice(cut, NUM_ROWS))
        logprobs = actor.logprobs(mine)
        assert logprobs.shape == mine.token_ids.shape
        actor.update(mine)
        result.append({"actor_weights": updated_weights(actor.pieces)})
    return result


def preferences(rank: int, world_size: int) -> dict:
    """Pairs keep together in microbatches, and scores come back chosen first, in order, under a pipeline."""
    run = make_run(Case({"pipeline": 2, "microbatch_size": 4}))
    layout = groups.initialize(run.parallel, seed=0)
    source = DictSource(weights(SPEC, "critic", 4))
    batch = make_experience()
    pairs = PreferenceBatch(batch.token_ids[:5], batch.lengths[:5], batch.token_ids[5:], batch.lengths[5:], torch.zeros(5))
    scores = RewardModel(SPEC, run, layout, source).scores(pairs)
    expected = RewardModel(SPEC, run, layout, source).scores(batch)
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-6)

    learner, _ = build_learner(SPEC, "critic", run.critic, run, layout, source, total_steps=1)
    seen = []

    def loss(stats, rows):
        chosen, rejected = stats.chunk(2)
        is_real = rows.chosen_lengths > 0
        seen.append(stats.detach())
        margins = torch.where(is_real, chosen - rejected, 0.0)
        total = torch.where(is_real, -torch.nn.functional.logsigmoid(margins), 0.0).sum()
        return total / 5, Metrics({"margin": Metric(margins.sum(), is_real.sum())})

    metrics = learner.step(pairs, ScoreHead(), loss)
    margin = (expected[:5] - expected[5:]).mean().item()
    assert metrics["margin"].value == pytest.approx(margin, rel=1e-4)
    assert [len(stats) for stats in seen] == ([4, 4, 4] if layout.is_last_stage else [])
    return {"grad_norm": metrics["grad_norm"].value}


@pytest.fixture(scope="module")
def on_two() -> list[list]:
    cases = [(resume, (case,)) for case in RESUMED]
    return run_all([*cases, (skip, ()), (clip_and_decay, ()), (uneven, ()), (preferences, ())], 2)


def test_resume_equals_no_stop_bit_for_bit(on_two):
    """The comparison happens on the ranks; here: float32 copies are saved where the weights are bf16, and nowhere else."""
    for case, ranks in zip(RESUMED, on_two, strict=False):
        assert [r["main"] for r in ranks] == [case.precision == "bf16"] * 2, case
        assert all(r["num_tensors"] > 10 for r in ranks)


def test_a_gradient_that_is_not_finite_skips_the_update_everywhere(on_two):
    assert on_two[-4] == [[1.0, 0.0], [0.0, 0.0]]  # counted by the first replica alone


def test_gradients_are_clipped_by_their_global_norm(on_two):
    ranks = on_two[-3]
    start = weights(SPEC, "actor", 1)
    free, clipped = (gradient(assembled([r[name] for r in ranks], "actor_weights", Case()), start) for name in ("free", "clipped"))
    norm = ranks[0]["free"]["grad_norm"]
    assert norm == pytest.approx(sum(g.square().sum().item() for g in free.values()) ** 0.5, rel=1e-4)
    assert ranks[0]["clipped"]["grad_norm"] == norm, "reported before clipping"
    for name in free:
        torch.testing.assert_close(clipped[name], free[name] * 0.25 / norm, rtol=1e-3, atol=1e-6)


def gradient(after: dict, before: dict) -> dict:
    steps = {name: before[name] - after[name] for name in before}
    return {name: step / (1 - step.abs()) for name, step in steps.items()}


def test_weight_decay_spares_norms(on_two):
    start, after = weights(SPEC, "actor", 1), assembled([r["decayed"] for r in on_two[-3]], "actor_weights", Case())
    for name, before in start.items():
        factor = 1.0 if name.endswith("norm.weight") else 0.75
        torch.testing.assert_close(after[name], before * factor)


def test_uneven_shares_learn_the_same(on_two):
    expected, *others = ([r[i] for r in on_two[-2]] for i in range(3))
    expected, start = assembled(expected, "actor_weights", Case()), weights(SPEC, "actor", 1)
    for other in others:
        other = assembled(other, "actor_weights", Case())
        for name in expected:
            size = (expected[name] - start[name]).abs().max()
            assert (other[name] - expected[name]).abs().max() < 1e-4 * size, name


def test_preference_batches_pass_in_pairs(on_two):
    first, second = on_two[-1]
    assert first["grad_norm"] == second["grad_norm"] > 0
