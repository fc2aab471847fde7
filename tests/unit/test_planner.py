"""Laws of the planner: it counts what the bridge's shapes say ranks hold, and what it proposes is accepted and fits."""

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from megarl import cli
from megarl.bridge.boxes import num_elements
from megarl.bridge.shapes import held
from megarl.check import inspect
from megarl.config import ParallelConfig
from megarl.models.family import spec_from_hf_config
from megarl.models.spec import Window, padded_vocab
from megarl.parallel.context import positions_of
from megarl.parallel.layout import ParallelLayout
from megarl.planner.activations import Microbatch, mask_bytes
from megarl.planner.command import kind_of
from megarl.planner.devices import GPUS, Assumptions, Gpu
from megarl.planner.memory import plan_memory
from megarl.planner.messages import layer_messages, ring_s
from megarl.planner.plan import Plan, faults_of, make_plan
from megarl.planner.search import remedies, search
from megarl.planner.shards import shards_of
from megarl.planner.step_time import Machines, longest_lengths
from tests.tiny_hf import tiny_config
from tests.unit.test_attention_window import make_attention

CONFIGS = Path(__file__).parents[2] / "configs"


def plan_of(monkeypatch, name: str, gpu: str, *overrides: str, world: int | None = None) -> Plan:
    monkeypatch.chdir(CONFIGS.parent)
    found = inspect(kind_of(CONFIGS / f"{name}.yaml"), CONFIGS / f"{name}.yaml", overrides, world)
    machines = Machines(GPUS[gpu], 45e9, 8, Assumptions())
    return make_plan(found.run, found.specs, found.world_size, machines, longest_lengths(found.run), with_sync=False)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mixtral"])
@pytest.mark.parametrize("role", ["actor", "critic"])
@pytest.mark.parametrize("tensor, pipeline, virtual", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1)])
def test_shards_are_what_ranks_hold_and_together_the_model(kind, role, tensor, pipeline, virtual):
    spec = spec_from_hf_config(tiny_config(kind).to_dict())
    layout = ParallelLayout(tensor, pipeline, tensor * pipeline)
    shards = shards_of(spec, role, ParallelConfig(tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual))
    pieces = held(spec, layout, role, virtual)
    padding = (padded_vocab(spec.vocab_size, tensor) - spec.vocab_size) * spec.hidden_size
    for stage, shard in enumerate(shards):
        ranks = [rank for rank in range(layout.world_size) if layout.at(rank).pp_rank == stage]
        vocabularies = {name for rank in ranks for name, _ in pieces[rank] if name.endswith(("embed_tokens.weight", "lm_head.weight"))}
        found = sum(num_elements(box) for rank in ranks for _, box in pieces[rank])
        assert shard.total * len(ranks) == found + padding * len(vocabularies)
    whole = {piece for rank in range(layout.world_size) for piece in pieces[rank]}
    assert sum(num_elements(box) for _, box in whole) == spec.num_parameters(role)


def test_more_of_an_axis_never_takes_more_memory(monkeypatch):
    for axis, sizes in {"tensor": (1, 2, 4, 8), "pipeline": (1, 2, 4, 8)}.items():
        plans = [plan_of(monkeypatch, "sft_70b", "h100-80gb", "parallel.tensor=1", "parallel.pipeline=1", "parallel.sequence=false",
                         f"parallel.{axis}={size}") for size in sizes]  # fmt: skip
        peaks = [plan.peak.total for plan in plans]
        assert peaks == sorted(peaks, reverse=True)


def test_offload_and_recompute_only_lower_the_peak(monkeypatch):
    peaks = [plan_of(monkeypatch, "ppo_8b", "h100-80gb", f"memory.offload={kind}").peak.total for kind in ("none", "frozen", "all")]
    assert peaks == sorted(peaks, reverse=True)
    kinds = ("none", "selective", "full")
    kept = [plan_of(monkeypatch, "sft_70b", "h100-80gb", f"parallel.recompute={kind}").peak.total for kind in kinds]
    assert kept == sorted(kept, reverse=True)


@pytest.mark.parametrize(
    "name, gpu, override",
    [
        ("ppo_8b", "a100-40gb", "memory.offload=none"),
        ("gsm8k_ppo_8b", "l40s-48gb", "seed=2"),  # more tensor-parallel ranks, but of one stage
        pytest.param("sft_70b", "a100-40gb", "parallel.tensor=2", marks=pytest.mark.slow),
    ],
)
def test_what_the_verdict_proposes_fits(monkeypatch, name, gpu, override):
    plan = plan_of(monkeypatch, name, gpu, override)
    found = remedies(plan)
    assert not plan.fits and found
    for one in found[:3]:
        again = plan_of(monkeypatch, name, gpu, override, *one.overrides)  # through the file, the overrides and all rules
        assert again.fits and again.peak.total == one.plan.peak.total


def test_a_search_proposes_only_what_the_rules_accept(monkeypatch):
    plan = plan_of(monkeypatch, "reward_8b", "h100-80gb")
    found = search(plan, most=4)
    assert found and [one.plan.time.total for one in found] == sorted(one.plan.time.total for one in found)
    for one in found:
        assert one.plan.fits and not faults_of(one.plan.run, plan.specs, 8)
    assert found[0].plan.time.total <= plan.time.total


def test_a_search_finds_the_sampler_that_the_run_lacks(monkeypatch):
    plan = plan_of(monkeypatch, "gsm8k_grpo_8b", "a100-40gb")
    assert plan.peak.phase == "generating"
    found = search(plan, most=2)
    assert found and all(one.plan.fits and one.plan.run.rollout.tensor_parallel > plan.run.rollout.tensor_parallel for one in found)


def test_what_the_verdict_says_of_larger_machines_is_so(monkeypatch, capsys):
    monkeypatch.chdir(CONFIGS.parent)
    assert cli.run(["plan", "configs/sft_8b.yaml", "--gpu", "l40s", "--gpus", "2"]) != 0
    lines = capsys.readouterr().out.splitlines()
    told = [line.split("  (")[0].removeprefix("  fits with ").split() for line in lines if line.startswith("  fits with ")]
    assert {words[0] for words in told} == {"--gpus", "--gpu"}
    for words in told:
        given = ["--gpu", "l40s", "--gpus", "2"]  # argparse lets the last one count
        assert cli.run(["plan", "configs/sft_8b.yaml", *given, *words]) == 0


def test_a_sampler_with_gpus_of_its_own_must_fit_them(monkeypatch):
    shape, apart = "actor.shape=configs/models/llama3-70b", "rollout.placement=separate"
    layout = ("parallel.tensor=8", "parallel.pipeline=4", "rollout.max_response_tokens=256")
    plan = plan_of(monkeypatch, "gsm8k_grpo_8b", "h100-80gb", shape, apart, *layout, "rollout.tensor_parallel=1", world=64)
    assert plan.memory.worst("learning").total < plan.limit_bytes and not plan.fits
    assert plan.peak.words == "on a generator's own GPU"
    halved = plan_of(monkeypatch, "gsm8k_grpo_8b", "h100-80gb", shape, apart, *layout, "rollout.tensor_parallel=4", world=64)
    assert halved.fits


@pytest.mark.parametrize(
    "words, told",
    [
        (["--gpu", "rtx4090"], "found 'rtx4090'; expected one of a100-40gb, a100-80gb, b200-180gb, h100-80gb"),
        (["--gpu", "a100"], "found 'a100'; expected one of a100-40gb, a100-80gb\n"),
        (["--network", "fast"], "found 'fast'; expected bytes or bits a second"),
        (["--gpus", "0"], "found '0'; expected a whole number of at least 1"),
    ],
)
def test_wrong_arguments_are_told_in_a_line(monkeypatch, capsys, words, told):
    monkeypatch.chdir(CONFIGS.parent)
    assert cli.run(["plan", "configs/sft_8b.yaml", *words]) == 2
    assert told in capsys.readouterr().err


def test_models_without_a_shape_are_named(monkeypatch, capsys):
    monkeypatch.chdir(CONFIGS.parent)
    assert cli.run(["plan", "configs/sft_8b.yaml", "model.shape=null", "model.path=nowhere"]) != 0
    assert "the shapes of model (nowhere) are not known" in capsys.readouterr().err
    assert cli.run(["plan", "configs/ppo_8b.yaml", "--gpu", "H100", "critic.shape=null", "critic.path=nowhere"]) == 0
    assert "left out, as no config.json tells their shapes: critic (nowhere)" in capsys.readouterr().err


def test_the_command_tells_by_its_exit_code(monkeypatch, capsys):
    monkeypatch.chdir(CONFIGS.parent)
    assert cli.run(["plan", "configs/ppo_8b.yaml", "--gpu", "h100-80gb", "--network", "45GB/s"]) == 0
    assert "fits: " in capsys.readouterr().out
    assert cli.run(["plan", "configs/ppo_8b.yaml", "--gpu", "l40s-48gb", "parallel.recompute=none", "memory.offload=none"]) != 0
    assert "does not fit: " in capsys.readouterr().out


# ---------------------------------------------------------------- what does not learn, and what learns beside
def is_still(name: str, frozen_layers: int) -> bool:
    layer = re.search(r"layers\.(\d+)\.", name)
    return int(layer[1]) < frozen_layers if layer else name.endswith("embed_tokens.weight")


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parametrize("tensor, pipeline, virtual", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 2, 2)])
@pytest.mark.parametrize("frozen", [1, 2])
def test_frozen_elements_are_those_of_the_embedding_and_the_lowest_layers(kind, tensor, pipeline, virtual, frozen):
    spec = spec_from_hf_config(tiny_config(kind).to_dict() | {"num_hidden_layers": 4})
    layout = ParallelLayout(tensor, pipeline, tensor * pipeline)
    shards = shards_of(spec, "actor", ParallelConfig(tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual), frozen)
    pieces = held(spec, layout, "actor", virtual)
    padding = (padded_vocab(spec.vocab_size, tensor) - spec.vocab_size) * spec.hidden_size
    for stage, shard in enumerate(shards):
        ranks = [rank for rank in range(layout.world_size) if layout.at(rank).pp_rank == stage]
        found = sum(num_elements(box) for rank in ranks for name, box in pieces[rank] if is_still(name, frozen))
        assert (shard.total - shard.learned) * len(ranks) == found + (padding if stage == 0 else 0)


def test_what_is_frozen_has_no_gradients_no_moments_and_no_backward(monkeypatch):
    plans = [plan_of(monkeypatch, "sft_70b", "h100-80gb", f"model.frozen_layers={count}") for count in (0, 10, 20, 40)]
    for before, after in pairwise(plans):
        learned, fewer = (sum(one.owned[0].gradients + one.owned[0].optimizer for one in plan.memory.models) for plan in (before, after))
        assert fewer < learned or learned == 0
        assert after.time.seconds["learning"] <= before.time.seconds["learning"]
    assert plans[2].memory.models[0].is_trained and plans[2].memory.models[0].owned[0].gradients == 0  # a whole stage of it
    weights = {one.owned[0].weights for plan in plans for one in plan.memory.models}
    assert len(weights) == 1


def test_layers_below_the_first_that_learns_keep_nothing(monkeypatch):
    def activations(*overrides: str) -> int:
        plan = plan_of(monkeypatch, "reward_8b", "h100-80gb", "parallel.pipeline=1", "parallel.recompute=none", *overrides)
        (learning,) = (one for one in plan.memory.phases if one.phase == "learning")
        return learning.parts["activations"]

    every, half = activations(), activations("model.frozen_layers=16")
    assert 0.45 < half / every < 0.6


PTX = "ppo.ptx={data: {path: text.jsonl, max_tokens: 2048}, batch_size: 64}"


def test_text_in_the_policy_loss_takes_its_time_and_room(monkeypatch):
    without = plan_of(monkeypatch, "ppo_8b", "h100-80gb", "rollout.max_response_tokens=256", "data.max_prompt_tokens=256")
    beside = plan_of(monkeypatch, "ppo_8b", "h100-80gb", "rollout.max_response_tokens=256", "data.max_prompt_tokens=256", PTX)
    assert beside.memory.worst("learning").total > without.memory.worst("learning").total
    assert beside.memory.worst("scoring").total == without.memory.worst("scoring").total
    assert beside.time.seconds["learning"] > without.time.seconds["learning"]


def test_a_judge_named_twice_is_held_once_and_those_of_held_out_sets_too(monkeypatch):
    base = plan_of(monkeypatch, "ppo_8b", "h100-80gb")
    (judge,) = (part for part in base.run.rewards if part.kind == "model")
    again = f"{{kind: model, path: {judge.path}, shape: {judge.shape}}}"
    twice = plan_of(monkeypatch, "ppo_8b", "h100-80gb", f"rewards=[{again}, {again}]")
    assert twice.memory.worst("scoring").total == base.memory.worst("scoring").total
    other = f"{{kind: model, path: weights/other, shape: {judge.shape}}}"
    examined = f"eval={{every_steps: 5, sets: [{{name: held, data: {{path: held.jsonl}}, metrics: [{again}, {other}]}}]}}"
    held_out = plan_of(monkeypatch, "ppo_8b", "h100-80gb", examined)
    weights = sum(size for name, size in held_out.memory.worst("scoring").parts.items() if name.startswith("eval."))
    assert weights == sum(size for name, size in held_out.memory.worst("scoring").parts.items() if name.startswith("rewards."))
    assert held_out.time.seconds["scoring"] == base.time.seconds["scoring"]


def test_a_reduce_scatter_and_a_gather_are_what_an_all_reduce_is(monkeypatch):
    """Megatron's sequence parallelism moves the same bytes as tensor parallelism without it (Korthikanti et al. 2022), forward."""
    split, whole = (plan_of(monkeypatch, "sft_70b", "h100-80gb", f"parallel.sequence={value}") for value in ("true", "false"))
    spec = split.specs["model"]
    (gathered, _), (reduced, _) = (layer_messages(plan.run, spec, 4096) for plan in (split, whole))
    assert gathered["all-gather", "tp"] == gathered["reduce-scatter", "tp"] == reduced["all-reduce", "tp"]
    assert reduced["all-reduce", "tp"] == 2 * 4096 * spec.hidden_size * 2
    links = {"tp": (8, 1e9)}
    assert ring_s(gathered, links) == pytest.approx(ring_s(reduced, links))


# ---------------------------------------------------------------- bytes of passes
@pytest.mark.parametrize("context", [2, 4])
@pytest.mark.parametrize("prompt, response", [(8, 24), (16, 48), (48, 16), (60, 4), (0, 64)])
def test_the_context_parallel_rank_with_most_response_tokens(context, prompt, response):
    positions = 64 if prompt + response > 32 else 32
    starts = range(positions - response + 1)  # prompts may be shorter than the longest
    chosen = [[start <= place < start + response for place in range(positions)] for start in starts]
    most = max(sum(mask[place] for place in positions_of(rank, context, positions)) for mask in chosen for rank in range(context))
    assert Microbatch(positions, 3, 3 * response).selected_on(context) == 3 * most


@pytest.mark.parametrize("positions", [32, 96])
def test_masks_are_those_that_attention_through_windows_keeps(positions):
    window = Window(32, (True,), None)
    attention = make_attention(32)
    kept: list[torch.Tensor] = []
    heads = torch.randn(positions, 1, 2, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        attention(heads, heads, heads)
    masks = sum(tensor.nbytes for tensor in kept if tensor.dim() == 2)
    spec = replace(spec_from_hf_config(tiny_config("llama").to_dict()), num_layers=1, window=window)
    assert mask_bytes(spec, ParallelConfig(), "local", "fp32", positions) == pytest.approx(masks, rel=1 / 32)


def test_gloo_reduces_a_copy_of_the_gradients_and_nccl_none(monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)

    def learning(gpu: Gpu | None, *overrides: str) -> dict[str, int]:
        found = inspect("sft", CONFIGS / "sft_8b.yaml", overrides, 8)
        plan = plan_memory(found.run, found.specs, found.layout, gpu, Assumptions())
        return plan.worst("learning").parts

    parts = learning(None, "data.max_tokens=64")
    assert parts["gradients that gloo reduces"] == parts["model gradients"]
    assert "gradients that gloo reduces" not in learning(None, "data.max_tokens=64", "parallel.distributed_optimizer=false")
    assert "gradients that gloo reduces" not in learning(GPUS["h100-80gb"], "data.max_tokens=64")


def test_the_embedding_s_gradient_comes_when_the_activations_have_gone(monkeypatch):
    """Of a critic on one stage: either the activations of all layers, or the gradient of the embedding, is what it takes on top."""
    packs = (("data.max_tokens=64", f"parallel.max_tokens_per_microbatch={size}") for size in (8192, 128))
    long, short = (plan_of(monkeypatch, "reward_8b", "h100-80gb", *pack) for pack in packs)
    assert "gradient of the embedding" not in long.memory.worst("learning").parts
    spec = short.specs["model"]
    assert short.memory.worst("learning").parts["gradient of the embedding"] == (
        padded_vocab(spec.vocab_size, short.layout.tensor) // short.layout.tensor * spec.hidden_size * 2
    )
