"""GRPO on real ranks with real vLLM: no critic is held, saved or told of, and the KL in the loss and the rewards' scale come along."""

import json
from pathlib import Path

import pytest

from megarl.config import PpoRun
from tests.course.test_ppo import ppo_run, read_metrics, run_ppo
from tests.ranks import run_ranks

STEPS = 12


def grpo_run(root: Path) -> PpoRun:
    """Two pipeline stages, so that groups are dealt to stages."""
    return ppo_run(
        root,
        "grpo",
        critic=None,
        parallel={"microbatch_size": 8, "pipeline": 2},
        rollout={"prompts_per_step": 8, "samples_per_prompt": 4, "max_response_tokens": 4, "kv_cache_bytes": 8 << 20},
        ppo={
            "total_steps": STEPS,
            "minibatch_size": 16,
            "num_epochs": 2,
            "advantage": "grpo",
            "ratio_level": "sequence",
            "aggregation": "sequence_mean",
            "reward_scale": "std",
            "kl": {"coef": 0.001, "place": "loss", "estimator": "k3"},
        },
        checkpoint={},
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_without_a_critic_learns_and_holds_none(tmp_path: Path) -> None:
    from megarl.quickstart.make_data import make_data

    make_data(tmp_path / "data", seed=0)
    states = run_ranks(run_ppo, 2, grpo_run(tmp_path))
    assert states[0] == states[1] and states[0]["step"] == STEPS
    lines = [line for line in read_metrics(tmp_path, "grpo") if "reward/mean" in line]
    names = {name for line in lines for name in line}
    assert {"actor/kl", "kl/token_mean", "advantage/std"} <= names
    assert not [name for name in names if name.startswith(("critic/", "value/", "return/"))]
    rewards = [line["reward/mean"] for line in lines]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3, rewards
    assert states[0]["rewards_count"] == STEPS * 32
    assert states[0]["rewards_mean"] == pytest.approx(sum(rewards) / len(rewards), rel=1e-4)
    manifests = list((tmp_path / "grpo").rglob("manifest.json"))
    assert manifests and not list((tmp_path / "grpo").rglob("critic")), [json.loads(m.read_text()) for m in manifests]
