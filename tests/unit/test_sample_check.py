"""`megarl sample --check`: what the keys must agree on, and what is said of the work."""

import pytest

from megarl.check import arithmetic, inspect
from megarl.errors import ConfigError
from tests.unit.tiny_run import PPO, write_run

SAMPLE = PPO[: PPO.index("critic:")] + PPO[PPO.index("rewards:") : PPO.index("ppo:")]


def faults_of(path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        inspect("sample", path, overrides)
    return error.value.faults


def test_a_run_and_its_arithmetic(tmp_path):
    inspection = inspect("sample", write_run(tmp_path, SAMPLE), ["sample.num_prompts=5"])
    rows = dict(arithmetic(inspection))
    assert rows["block"] == "prompts 8 x samples 4 = 32 sequences; the first 5 prompts, all responses kept"
    assert rows["generators"].startswith("2 replicas x tensor 2") and set(inspection.specs) == {"actor"}


def test_responses_need_no_scores(tmp_path):
    assert inspect("sample", write_run(tmp_path, SAMPLE), ["rewards=[]"]).run.rewards == ()


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (["sample.greedy=true"], "rollout.samples_per_prompt: found 4 with sample.greedy true"),
        (["sample.keep=best", "rewards=[]"], "sample.keep: found best without rewards"),
        (["rollout.placement=separate"], "rollout.placement: found separate; expected colocated"),
        (["rollout.refill={}"], "rollout.refill: found a section; expected none"),
        (["rewards=[]", "reward_hook=a:b"], "reward_hook: found without rewards"),
        (["rollout.tensor_parallel=3"], "rollout.tensor_parallel: found 3"),
        (["sample.top_p=0"], "sample.top_p: found 0; expected more than 0"),
    ],
)
def test_what_does_not_fit_is_told(tmp_path, overrides, expected):
    assert any(expected in fault for fault in faults_of(write_run(tmp_path, SAMPLE), *overrides))
