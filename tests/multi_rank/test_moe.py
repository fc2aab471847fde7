"""Mixtures of experts against transformers under expert, tensor, pipeline and data parallelism, and what the optimizer does with them."""

from pathlib import Path

import pytest
import torch

from megarl.config import ParallelConfig
from megarl.metrics import Metrics
from megarl.ppo.losses import aggregate, entropy_loss, policy_loss
from tests.multi_rank.role_cases import Case, assembled, hf_config, make_experience, make_run, run_cases
from tests.multi_rank.test_models import compare
from tests.multi_rank.test_roles_invariance import assert_same, by_case, weights_before
from tests.multi_rank.test_roles_learner import TRAINING, resume
from tests.ranks import run_all, run_ranks
from tests.tiny_hf import MIXTURES, as_on_disk, save_oracle, save_tiny

LAYOUTS = {
    2: [
        ParallelConfig(expert=2),
        ParallelConfig(tensor=2, sequence=True),
        ParallelConfig(tensor=2, sequence=True, expert=2),
        ParallelConfig(recompute="full"),
    ],
    4: [
        ParallelConfig(tensor=2, sequence=True, expert=2, recompute="full"),
        ParallelConfig(pipeline=2, expert=2),
        ParallelConfig(tensor=2, sequence=True, pipeline=2, expert=2),
        ParallelConfig(expert=4),
    ],
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[str, str]:
    """Every kind of tiny mixture with its oracle."""
    folder = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(1)
    token_ids = torch.randint(0, 101, (4, 12), generator=generator)
    coefficients = torch.randn(4, 12, 101, generator=generator)
    for kind in MIXTURES:
        save_oracle(save_tiny(kind, folder), token_ids, coefficients)
    return {kind: str(folder / kind) for kind in MIXTURES}


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_outputs_gradients_and_pieces_equal_transformers(directories, world_size):
    run_all([(compare_all, (directories,))], world_size, timeout_s=400)


def compare_all(rank: int, world_size: int, directories: dict[str, str]) -> None:
    from megarl.parallel import groups

    for parallel in LAYOUTS[world_size]:
        layout = groups.initialize(parallel, seed=0)
        for kind, directory in directories.items():
            try:
                compare(Path(directory), parallel, layout)
            except Exception as error:
                raise AssertionError(f"{kind} under {parallel}: {error}") from error


QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}
LEARNING = {"router_balance": 0.5, "clip_grad": 0.25}  # clipping shows whether the norm counts every expert once
ON_ONE = [{}, {"microbatch_size": 3}, {"max_tokens_per_microbatch": 32}]
ON_TWO = [
    {"expert": 2, "microbatch_size": 3},
    {"expert": 2, "distributed_optimizer": False, "recompute": "full"},
    {"expert": 2, "max_tokens_per_microbatch": 32},  # replicas pack into different numbers of microbatches
    {"tensor": 2, "sequence": True},
    {"tensor": 2, "sequence": True, "expert": 2, "distributed_optimizer": False, "recompute": "full", "microbatch_size": 2},
    {"pipeline": 2, "microbatch_size": 2, "recompute": "full"},
]
ON_FOUR = [
    {"pipeline": 2, "expert": 2, "microbatch_size": 2},
    {"tensor": 2, "sequence": True, "expert": 2},
    {"tensor": 2, "sequence": True, "pipeline": 2, "expert": 2, "microbatch_size": 3},
    {"tensor": 2, "sequence": True, "expert": 4, "distributed_optimizer": False},
]


def learning(parallel: dict) -> Case:
    return Case(parallel, optimizer=LEARNING, model=QWEN3_MOE)


@pytest.fixture(scope="module")
def one_rank() -> list[list[dict]]:
    cases = [learning({}), *map(learning, ON_ONE[1:]), Case(optimizer={"router_balance": 0.5}, model=QWEN3_MOE)]
    return by_case(run_ranks(run_cases, 1, cases))


@pytest.mark.parametrize("world_size, layouts", [(1, ON_ONE), (2, ON_TWO), pytest.param(4, ON_FOUR, marks=pytest.mark.slow)])
def test_an_update_is_the_same_under_every_layout(world_size, layouts, one_rank):
    """Balance loss, norm and clipping included: they depend neither on the layout nor on how the minibatch was cut."""
    cases, faults = [learning(parallel) for parallel in layouts], []
    results = one_rank[: len(cases)] if world_size == 1 else by_case(run_ranks(run_cases, world_size, cases))
    for case, found in zip(cases, results, strict=True):
        try:
            assert_same(found, one_rank[0], case, smallest_update=1e-4)  # a rare expert learns little
        except AssertionError as fault:
            faults.append(f"{case}: {fault}")
    assert not faults, "\n".join(faults)


def test_the_balance_loss_is_its_definition(one_rank):
    """Metric and gradient: policy loss + coefficient x mean over sequences, sum over layers, of E sum_i f_i P_i, from transformers."""
    import transformers

    case = Case(optimizer={"router_balance": 0.5}, model=QWEN3_MOE)
    run, batch = make_run(case), make_experience()
    start = weights_before("actor_weights", case)
    model = model_on(transformers, start)
    outputs = model(batch.token_ids, output_router_logits=True)
    log_p = torch.nn.functional.pad((outputs.logits[:, :-1] / run.rollout.temperature).log_softmax(-1), (0, 0, 1, 0))
    logprobs, entropy = log_p.gather(2, batch.token_ids[..., None]).squeeze(2), -(log_p.exp() * log_p).sum(2)
    mask = batch.response_mask
    losses = policy_loss(logprobs * mask, batch.old_logprobs, batch.advantages, mask, run.ppo)[0]
    loss = aggregate(losses + entropy_loss(entropy, mask, run.ppo.entropy_coef), mask, run.ppo.aggregation, mask.sum())
    balance = torch.zeros(())
    for logits in outputs.router_logits:
        for row, length in zip(logits.view(len(batch), -1, 4), batch.lengths.tolist(), strict=True):
            probabilities = row[:length].softmax(-1)
            load = torch.zeros(4)
            for token in range(length):
                load[probabilities[token].topk(2).indices] += 1 / (2 * length)
            balance = balance + 4 * (load * probabilities.mean(0)).sum() / len(batch)
    (loss + 0.5 * balance).backward()
    logged = one_rank[-1][0]["actor_metrics"]
    assert Metrics.from_json(logged)["actor/router_balance"].value == pytest.approx(balance.item() / len(outputs.router_logits), rel=1e-5)
    gradients = as_on_disk({name: parameter.grad for name, parameter in model.named_parameters()}, "qwen3_moe")
    after = assembled(one_rank[-1], "actor_weights", case)
    for name, before in start.items():
        expected = -gradients[name] / (gradients[name].abs() + 1)
        assert (after[name] - before - expected).abs().max() < 1e-4 * expected.abs().max(), name


def model_on(transformers, tensors: dict[str, torch.Tensor]):
    """transformers' model with these weights, through a directory: only so does it read one tensor an expert."""
    import json
    import tempfile

    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, f"{folder}/model.safetensors")
        Path(folder, "config.json").write_text(json.dumps(hf_config(**QWEN3_MOE)))
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def test_experts_and_the_rest_resume_exactly():
    optimizer = TRAINING | {"router_balance": 0.01}
    cases = [
        Case({"expert": 2}, optimizer=optimizer, model=QWEN3_MOE),
        Case({"tensor": 2, "sequence": True, "distributed_optimizer": False}, optimizer=optimizer, model=QWEN3_MOE, precision="bf16"),
    ]
    for reports in run_all([(resume, (case,)) for case in cases], 2):
        assert all(report["num_tensors"] > 0 for report in reports)
