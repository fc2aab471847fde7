"""A PPO run whose generators are processes of their own is the run whose sampler shares the trainer's processes."""

import json

import pytest

from tests.course.test_ppo import ppo_run, read_metrics, run_ppo
from tests.ranks import run_ranks

SHORT = {"total_steps": 3, "minibatch_size": 16, "num_epochs": 1, "kl": {"coef": 0.01}}
ROLLOUT = {"prompts_per_step": 16, "samples_per_prompt": 2, "max_response_tokens": 4, "kv_cache_bytes": 8 << 20}


@pytest.mark.slow
def test_the_placement_does_not_show(tmp_path):
    from megarl.quickstart.make_data import make_data

    make_data(tmp_path / "data", seed=0)
    placements = {
        "colocated": {},
        "separate": {"placement": "separate", "replicas": 2},
        "wide": {"placement": "separate", "tensor_parallel": 2},
    }
    for name, placement in placements.items():
        run = ppo_run(tmp_path, name, ppo=SHORT, rollout=ROLLOUT | placement, checkpoint={})
        states = run_ranks(run_ppo, 2, run, timeout_s=280)
        assert states[0] == states[1] and states[0]["step"] == 3
    expected = read_metrics(tmp_path, "colocated")
    for name in ("separate", "wide"):
        found = read_metrics(tmp_path, name)
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4), (name, json.dumps(ours), json.dumps(theirs))
