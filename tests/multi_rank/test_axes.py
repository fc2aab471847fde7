"""Context parallelism and virtual pipeline stages: the same answers, gradients, updates and metrics as one rank."""

import pytest

from tests.multi_rank.role_cases import Case, run_cases
from tests.multi_rank.test_moe import QWEN3_MOE
from tests.multi_rank.test_roles_invariance import QWEN3, assert_same, by_case
from tests.ranks import run_ranks

LLAMA5 = {"num_hidden_layers": 5}  # over four chunks: 2, 1, 1, 1
QWEN3_TIED = QWEN3.model | {"tie_word_embeddings": True, "num_hidden_layers": 4}
BALANCED = {"router_balance": 0.5}
ON_TWO = [
    Case({"context": 2}),
    Case({"context": 2, "recompute": "selective", "distributed_optimizer": False, "microbatch_size": 3}, model=QWEN3.model),
    Case({"pipeline": 2, "virtual_pipeline": 2}, model=LLAMA5),
    Case({"pipeline": 2, "virtual_pipeline": 2, "microbatch_size": 3, "recompute": "full"}, model=QWEN3_TIED),
]
ON_FOUR = [
    Case({"tensor": 2, "context": 2, "sequence": True, "microbatch_size": 3}, model=QWEN3.model),
    Case({"pipeline": 2, "context": 2, "microbatch_size": 3, "recompute": "full"}, model={"tie_word_embeddings": True}),
    Case({"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "sequence": True}, model=LLAMA5),
    Case({"context": 2, "microbatch_size": 2}),  # two replicas of two ranks
]
ON_FOUR_SLOW = [
    Case({"context": 4}),
    Case({"context": 4, "distributed_optimizer": False}, model=QWEN3.model),
    Case({"tensor": 2, "context": 2}),
    Case({"context": 2, "pipeline": 2, "virtual_pipeline": 2}, model=QWEN3_TIED),
    Case({"pipeline": 2, "virtual_pipeline": 2, "microbatch_size": 2}, model=LLAMA5),
    Case({"context": 2, "distributed_optimizer": False}, precision="bf16"),
    Case({"pipeline": 2, "virtual_pipeline": 2, "max_tokens_per_microbatch": 32}, model=LLAMA5),  # packed
    Case({"context": 2, "expert": 2, "microbatch_size": 3}, optimizer=BALANCED, model=QWEN3_MOE),
    Case({"pipeline": 2, "virtual_pipeline": 2, "expert": 2}, optimizer=BALANCED, model=QWEN3_MOE | {"num_hidden_layers": 4}),
    Case({"tensor": 2, "sequence": True, "context": 2, "expert": 4}, optimizer=BALANCED, model=QWEN3_MOE),
]


def on_one(case: Case) -> Case:
    return Case(ppo=case.ppo, optimizer=case.optimizer, model=case.model, precision=case.precision)


@pytest.fixture(scope="module")
def one_rank() -> dict:
    cases = {repr(on_one(case)): on_one(case) for case in [*ON_TWO, *ON_FOUR, *ON_FOUR_SLOW]}
    return dict(zip(cases, by_case(run_ranks(run_cases, 1, list(cases.values()))), strict=True))


@pytest.mark.parametrize(
    "world_size, cases", [(2, ON_TWO), (4, ON_FOUR), pytest.param(4, ON_FOUR_SLOW, marks=pytest.mark.slow)], ids=["2", "4", "4 slow"]
)
def test_axes_agree_with_one_rank(world_size, cases, one_rank):
    faults = []
    for case, found in zip(cases, by_case(run_ranks(run_cases, world_size, cases)), strict=True):
        try:
            assert_same(found, one_rank[repr(on_one(case))], case)
        except AssertionError as fault:
            faults.append(f"{case}: {fault}")
    assert not faults, "\n".join(faults)
