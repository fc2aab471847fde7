"""Mixtures of experts without ranks: where experts lie, what `--check` asks and counts, and the load-balancing loss against loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megarl.check import arithmetic, inspect
from megarl.config import PpoRun
from megarl.cross_check import cross_check, smallest_world
from megarl.errors import ConfigError, LayoutError
from megarl.models.family import spec_from_hf_config
from megarl.models.mixture import sequence_balance
from megarl.models.spec import padded_vocab
from megarl.parallel.layout import ParallelLayout
from megarl.planner.models import owned_of
from megarl.planner.shards import shards_of
from tests.tiny_hf import tiny_config
from tests.unit.tiny_run import write_run, write_shape

MIXTURE = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 6, "num_experts_per_tok": 2}
EXPERT = ("parallel.sequence=true", "parallel.expert=2")


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.data())
def test_experts_are_shared_out_inside_a_stage(tensor, pipeline, data, draw):
    stage = tensor * data
    expert = draw.draw(st.sampled_from([size for size in range(1, stage + 1) if stage % size == 0]))
    layout = ParallelLayout(tensor, pipeline, stage * pipeline, expert=expert)
    groups = {layout.at(rank).ranks_along("ep") for rank in range(layout.world_size)}
    assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
    for group in groups:
        assert [layout.at(rank).ep_rank for rank in group] == list(range(expert))
        assert len({layout.at(rank).pp_rank for rank in group}) == 1


def test_experts_that_do_not_fit_a_stage_are_refused():
    with pytest.raises(LayoutError, match=r"expert 3 does not divide the 4 ranks of a pipeline stage \(tensor 2 x context 1 x data 2\)"):
        ParallelLayout(2, 2, 8, expert=3)


def mixture_run(tmp_path, *overrides, models=("actor", "critic")):
    path = write_run(tmp_path)
    for model in models:
        write_shape(tmp_path / model, **MIXTURE)
    return inspect("ppo", path, overrides)


def test_a_mixture_that_fits(tmp_path):
    inspection = mixture_run(tmp_path, *EXPERT)
    assert str(inspection.layout) == "tp2 pp2 dp1 ep2"
    rows = dict(arithmetic(inspection))
    spec = inspection.specs["actor"]
    active = spec.num_parameters("actor") - 4 * 4 * 3 * 64 * 96  # four of six idle experts in four layers
    words = f"6 a layer, 3 on a rank, 2 for a token: {active:,} of {spec.num_parameters('actor'):,} parameters"
    assert rows["experts of actor"].startswith(words)


@pytest.mark.parametrize(
    ("overrides", "models", "words"),
    [
        (("parallel.sequence=true", "parallel.expert=4", "parallel.tensor=4"), ("actor",), "the 6 experts of actor: 1, 2, 3, 6"),
        (("parallel.expert=2",), ("actor",), "parallel.sequence: found false with parallel.tensor 2; expected true: actor is a mixture"),
        (EXPERT, (), "parallel.expert: found 2; expected 1: no model of this run is a mixture"),
        (("critic.optimizer.router_balance=0.1", "parallel.sequence=true"), ("actor",), "found 0.1; expected 0: critic is dense"),
    ],
)  # fmt: skip
def test_mixtures_that_do_not_fit_are_refused(tmp_path, overrides, models, words):
    with pytest.raises(ConfigError, match=words):
        mixture_run(tmp_path, *overrides, models=models)


def test_a_mixture_beside_dense_models_is_fine(tmp_path):
    assert mixture_run(tmp_path, *EXPERT, models=("critic",)).layout.expert == 2


def test_experts_are_counted_where_they_lie(tmp_path):
    run, spec = PpoRun.model_validate(mixture_run(tmp_path, *EXPERT).run), spec_from_hf_config(tiny_config("mixtral").to_dict())

    def memory(**parallel):
        changed = run.model_copy(update={"precision": "fp32", "parallel": run.parallel.model_copy(update={"pipeline": 1, **parallel})})
        tensor, expert = changed.parallel.tensor, changed.parallel.expert
        (shard,) = shards_of(spec, "actor", changed.parallel)
        return owned_of(changed, shard, ParallelLayout(tensor, 1, 4 * tensor, expert=expert), is_trained=True)

    experts = spec.num_expert_parameters()
    padding = 2 * (padded_vocab(spec.vocab_size, 1) - spec.vocab_size) * spec.hidden_size
    one, two = memory(tensor=1, expert=1), memory(tensor=1, expert=2)
    assert one.weights == 4 * (spec.num_parameters("actor") + padding)
    assert one.weights - two.weights == 4 * experts // 2
    assert abs(one.optimizer - two.optimizer) <= 1  # half the experts on half as many ranks that share them
    split, routers_and_norms = memory(tensor=2, expert=1), copied_parameters(spec)
    assert one.weights - split.weights == 4 * (spec.num_parameters("actor") + padding - routers_and_norms - experts) // 2
    assert smallest_world(run) == 4 and not cross_check(run, 8, {"actor": spec})


def copied_parameters(spec) -> int:
    """Elements that every tensor-parallel rank holds whole, apart from experts."""
    shapes = spec.table("actor").hf_shapes
    return sum(math.prod(shape) for name, shape in shapes.items() if "norm" in name or name.endswith("gate.weight"))


def loop(scores, chosen, sequence_of, k: int) -> float:
    """E sum_i f_i P_i, sequence by sequence."""
    total, count = 0.0, scores.shape[1]
    for number in set(sequence_of.tolist()) - {-1}:
        rows = [row for row, of in enumerate(sequence_of.tolist()) if of == number]
        for expert in range(count):
            load = sum(float(chosen[row, expert]) for row in rows) / (k * len(rows))
            total += count * load * sum(float(scores[row, expert]) for row in rows) / len(rows)
    return total


def test_the_balance_of_sequences_is_its_definition():
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(40, 6, generator=generator).softmax(-1).requires_grad_()
    chosen = torch.zeros(40, 6, dtype=torch.bool).scatter(1, scores.topk(2).indices, True)
    sequence_of = torch.tensor([0] * 7 + [1] * 12 + [-1] * 3 + [3] * 1 + [0] * 5 + [4] * 10 + [-1] * 2)  # number 2 is a dummy's
    loss = sequence_balance(scores, chosen, sequence_of, 2, None)
    assert loss.item() == pytest.approx(loop(scores.detach(), chosen, sequence_of, 2), rel=1e-5)
    loss.backward()
    assert scores.grad[sequence_of == -1].abs().max() == 0 and scores.grad[sequence_of >= 0].abs().min() >= 0
    parts = [sequence_balance(scores, chosen, torch.where(sequence_of == n, n, -1), 2, None) for n in range(5)]
    assert sum(parts).item() == pytest.approx(loss.item(), rel=1e-6)  # a sequence counts the same alone


def test_an_even_load_costs_one_and_nothing_costs_nothing():
    even = torch.full((12, 4), 0.25)
    chosen = torch.tensor([[True, True, False, False], [False, False, True, True]] * 6)
    assert sequence_balance(even, chosen, torch.zeros(12, dtype=torch.long), 2, None).item() == pytest.approx(1.0)
    assert sequence_balance(even, chosen, torch.full((12,), -1), 2, None).item() == 0.0
