"""What no layout can compute is refused before anything starts, in a line that names the key; the rest is handled."""

import numpy as np
import pytest
import torch

from megarl.config import ParallelConfig, PpoRun, RewardRun, SftRun
from megarl.cross_check import cross_check
from megarl.data.pack_size import token_budget
from megarl.data.packing import packed
from megarl.errors import LayoutError
from megarl.models.family import spec_from_hf_config
from megarl.models.spec import check_layout
from megarl.parallel.token_shards import gathered_by_owner, owners_of_tokens
from tests.multi_rank.invariance.layouts import FAMILIES

LESSON = {"output_dir": "x", "tokenizer": "x", "model": {"path": "x"}, "train": {"total_steps": 1, "batch_size": 8}}
SPEC = spec_from_hf_config(FAMILIES["llama"] | {"num_hidden_layers": 3})  # 64 positions


def only_fault(run, world_size: int = 8, key: str = "model") -> str:
    (fault,) = cross_check(run, world_size, {key: SPEC})
    return str(fault)


@pytest.mark.parametrize("kind, row", [(SftRun, 1), (RewardRun, 2)])
def test_a_sequence_longer_than_the_context_is_refused(kind, row):
    run = kind(**LESSON, parallel={"microbatch_size": row}, data={"path": "x", "max_tokens": 65})
    assert "data.max_tokens: found 65; expected at most the 64 positions of model" in only_fault(run)


def test_a_rollout_longer_than_the_context_is_refused():
    run = PpoRun(
        output_dir="x",
        tokenizer="x",
        actor={"path": "x"},
        critic={"path": "x"},
        rewards=({"kind": "exact"},),
        data={"path": "x", "max_prompt_tokens": 40},
        rollout={"prompts_per_step": 8, "max_response_tokens": 30},
        parallel={"microbatch_size": 1, "tensor": 2, "context": 2},
        ppo={"total_steps": 1, "minibatch_size": 8},
    )
    assert "40 + rollout.max_response_tokens 30 = 70 tokens; expected at most the 64 positions" in only_fault(run, key="actor")


@pytest.mark.parametrize("kind, tensor, longest", [(SftRun, 1, 40), (SftRun, 4, 32), (RewardRun, 1, 20)])
def test_a_budget_smaller_than_one_sequence_is_refused(kind, tensor, longest):
    """What counts is what fits after padding to a whole tile a tensor-parallel rank, and a pair is two sequences."""

    def run(max_tokens: int):
        parallel = {"tensor": tensor, "max_tokens_per_microbatch": 40 + 8 * (tensor > 1)}
        return kind(**LESSON, parallel=parallel, data={"path": "x", "max_tokens": max_tokens})

    budget = token_budget(run(1).parallel)
    assert not cross_check(run(longest), 8, {"model": SPEC})
    assert "expected 0 (no packing) or at least" in only_fault(run(longest + 1))
    row = np.array([longest * (2 if kind is RewardRun else 1)])
    assert len(packed(row, row, budget)) == 1


@pytest.mark.parametrize("parallel", [{"pipeline": 4}, {"pipeline": 2, "virtual_pipeline": 2}])
def test_a_stage_without_layers_is_refused(parallel):
    run = SftRun(**LESSON, parallel=parallel | {"microbatch_size": 1}, data={"path": "x", "max_tokens": 8})
    assert "3 layers" in only_fault(run)
    config = ParallelConfig(**parallel)
    with pytest.raises(LayoutError, match="the model has 3 layers; choose at most 3"):
        check_layout(SPEC, 1, config.pipeline * config.virtual_pipeline)


@pytest.mark.parametrize("num_tokens", range(4))
def test_more_stages_than_tokens_are_dealt(num_tokens):
    """Every token has one owner; the other stages hold nothing. The layouts of the invariance suite compute such microbatches."""
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 1 : 1 + num_tokens] = True
    shares = gathered_by_owner(torch.where(mask, owners_of_tokens(mask, 8), -1).flatten(), 8)
    assert len(shares) == 8 and torch.equal(torch.cat(shares), mask.flatten().nonzero().squeeze(1))
