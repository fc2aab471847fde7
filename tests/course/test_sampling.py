"""What is sampled and which rollouts are learned from, on real ranks with real vLLM."""

import json
import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from megarl.config import CheckpointConfig, PpoRun
from megarl.records import Trajectory
from tests.course.test_ppo import Wanted, ppo_run, read_metrics
from tests.ranks import run_ranks

PROMPTS, SAMPLES, TEXT = 8, 2, 9
ROLLOUT = {"prompts_per_step": PROMPTS, "samples_per_prompt": SAMPLES, "max_response_tokens": 6, "kv_cache_bytes": 8 << 20}


def sampling_run(
    root: Path, output: str, advantage: str = "grpo", steps: int = 3, data_ranks: int = 2, parallel: dict | None = None, **rollout
) -> PpoRun:
    return ppo_run(
        root,
        output,
        critic=None,
        parallel={"microbatch_size": PROMPTS * SAMPLES // data_ranks} | (parallel or {}),
        rollout={**ROLLOUT, **rollout},
        ppo={"total_steps": steps, "minibatch_size": PROMPTS * SAMPLES, "advantage": advantage, "kl": {"coef": 0.0}},
        eval=None,
        checkpoint={},
    )


class Recording:
    """A judge that writes down what is learned from."""

    def __init__(self, judge, steps):
        self._judge, self._steps = judge, steps

    def __getattr__(self, name):
        return getattr(self._judge, name)

    def pack(self, trajectories, places, policy_version=0):
        self._steps.append([[place, [row(t) for t in trajectories[i * SAMPLES : (i + 1) * SAMPLES]]] for i, place in enumerate(places)])
        return self._judge.pack(trajectories, places, policy_version)


def run_recorded(rank: int, world_size: int, runs: list[PpoRun], **judging) -> list[dict]:
    """For each run its last state and, for every step, what was learned from, in the order of the whole rollout's places.

    `judging` is what the judge shall have instead of what the run says.
    """
    from megarl.parallel import groups
    from megarl.ppo.assembly import build_parts
    from megarl.ppo.loop import train
    from megarl.rewards.scorer import Term, WeightedSum

    told = []
    for run in runs:
        layout = groups.initialize(run.parallel, run.seed)
        parts = build_parts(run, layout)
        judge = replace(parts.judge, rewards=WeightedSum((Term("exact", 1.0, Wanted()),)), ahead=None, **judging)
        steps = []
        state = train(run, layout, replace(parts, judge=Recording(judge, steps)))
        told.append({"state": state.to_json(), "steps": steps})
    return told


def row(t: Trajectory) -> list:
    greedy = None if t.greedy is None else [list(t.greedy.completion.token_ids), t.greedy.reward]
    c = t.completion
    return [t.prompt.prompt_id, list(c.token_ids), c.finish_reason, [c.policy_version, *c.later_versions], t.reward, greedy]


def learned(told: list[list[dict]], run: int, step: int) -> list[list]:
    """The groups of a step, in the order of the whole rollout, from what every data rank said."""
    places = sorted(place for rank in told for place in rank[run]["steps"][step])
    assert [place for place, _ in places] == list(range(PROMPTS))
    return [group for _, group in places]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    from megarl.quickstart.make_data import make_data

    root = tmp_path_factory.mktemp("sampling")
    make_data(root / "data", seed=0)
    config = root / "data" / "model" / "config.json"
    ends = {"eos_token_id": [1, TEXT]}  # the second is text to the tokenizer: it ends nothing, and is never barred
    config.write_text(json.dumps(json.loads(config.read_text()) | ends))
    return root


def test_remax_compares_with_the_greedy_response_and_does_not_learn_from_it(data):
    told = run_ranks(run_recorded, 2, [sampling_run(data, "remax", "remax", steps=2, min_response_tokens=2)])
    first = learned(told, 0, 0)
    assert all(len(group) == SAMPLES and len({json.dumps(sample[-1]) for sample in group}) == 1 for group in first)
    assert any(sample[5][1] for group in first for sample in group)
    assert told[0][0]["state"]["prompts_consumed"] == 2 * PROMPTS
    lines, rewards = read_metrics(data, "remax"), [sample[4] for group in first for sample in group]
    assert lines[0]["reward/mean"] == pytest.approx(sum(rewards) / len(rewards))
    assert lines[0]["reward/greedy"] == pytest.approx(sum(group[0][5][1] for group in first) / PROMPTS)
    assert lines[0]["advantage/mean"] != 0
    assert all(len(tokens) > 2 for group in first for sample in group for tokens in (sample[1], sample[5][0]))
    assert max(line["rollout/logprob_gap_max"] for line in lines) < 1e-3


@pytest.mark.slow
def test_groups_without_signal_are_refilled_and_the_position_stays_exact(data):
    plain = sampling_run(data, "unfilled", steps=2)
    refilled = sampling_run(data, "refilled", steps=2, refill={"rounds": 8})
    alone = sampling_run(data, "refilled_alone", steps=2, data_ranks=1, refill={"rounds": 8})
    told, one = run_ranks(run_recorded, 2, [plain, refilled]), run_ranks(run_recorded, 1, [alone])
    steps = [learned(told, 1, step) for step in range(2)]
    assert all(len({sample[4] for sample in group}) == 2 for step in steps for group in step)
    assert any(len({sample[4] for sample in group}) == 1 for group in learned(told, 0, 0))  # there was something to drop
    # What has signal in the first batch is kept, in its order; the rest of the batch are later prompts.
    kept = [group for group in learned(told, 0, 0) if len({sample[4] for sample in group}) == 2]
    assert steps[0][: len(kept)] == kept
    # One data rank chooses the same groups as two.
    assert [[s[0] for s in group] for group in learned(one, 0, 0)] == [[s[0] for s in group] for group in steps[0]]
    assert one[0][0]["state"]["prompts_consumed"] == told[0][1]["state"]["prompts_consumed"] > 2 * PROMPTS
    line = read_metrics(data, "refilled")[0]
    assert line["refill/rounds"] > 1 and 0 < line["refill/dropped_share"] < 1 and line["refill/idle_groups"] == 0


@pytest.mark.slow
def test_partial_responses_go_on_with_newer_weights_and_a_resumed_run_knows_them(data):
    # so many ends that enough groups are complete before the longest responses are
    chunks = {"partial": {"chunk_tokens": 2, "oversample": 2.0}, "stop_token_ids": [3, 4, 6, 7, 8, 10]}
    straight = sampling_run(data, "partial", steps=6, **chunks).model_copy(update={"checkpoint": CheckpointConfig(every_steps=3)})
    told = run_ranks(run_recorded, 2, [straight])
    responses = [sample for step in range(6) for group in learned(told, 0, step) for sample in group]
    mixed = [sample for sample in responses if len(sample[3]) > 1]
    assert mixed and all(start > 0 and version > sample[3][0] for sample in mixed for start, version in sample[3][1:])
    assert len({json.dumps([s[0], s[1], s[3]]) for s in responses}) > len(responses) // 2
    middle = "step-00000003"
    assert sorted(path.name for path in (data / "partial" / "checkpoints" / middle).glob("carried-*")) == [
        "carried-00000.safetensors",
        "carried-00001.safetensors",
    ]
    shutil.copytree(data / "partial" / "checkpoints" / middle, data / "continued" / "checkpoints" / middle)
    shutil.copy(data / "partial" / "metrics.jsonl", data / "continued" / "metrics.jsonl")
    resumed = run_ranks(run_recorded, 2, [straight.model_copy(update={"output_dir": data / "continued"})])
    assert [learned(resumed, 0, step) for step in range(3)] == [learned(told, 0, step) for step in range(3, 6)]
    assert resumed[0][0]["state"] == told[0][0]["state"]
    assert read_metrics(data, "continued") == read_metrics(data, "partial")


@pytest.mark.slow
def test_a_stop_string_ends_what_is_learned(data):
    run = sampling_run(
        data, "text", steps=1, max_response_tokens=16, stop_strings=["1", "2", "3"], length_schedule={"start": 8, "steps": 5}
    )
    told = run_ranks(run_recorded, 2, [run])
    from megarl.data.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(data / "data" / "tokenizer.model")
    responses = [sample for group in learned(told, 0, 0) for sample in group]
    stopped = [sample[1] for sample in responses if sample[2] == "stop" and sample[1][-1] != tokenizer.eos_id]
    assert stopped
    for tokens in stopped:
        assert set(tokenizer.decode(tokens)) & set("123") and not set(tokenizer.decode(tokens[:-1])) & set("123")
    assert all(len(sample[1]) == 8 for sample in responses if sample[2] == "length")


BARRED = {"min_response_tokens": 3, "stop_token_ids": [3, 4, 5, 6, 7], "temperature": 0.8}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_learner_leaves_out_the_ends_that_the_sampler_could_not_choose(data):
    layouts = {
        "plain": {},
        "tensor": {"parallel": {"tensor": 2, "sequence": True, "microbatch_size": 8}, "tensor_parallel": 2},
        "shared-head": {"parallel": {"pipeline": 2, "head": "sharded", "max_tokens_per_microbatch": 64}},
        "chunks": {"partial": {"chunk_tokens": 2, "oversample": 1.5}},
    }
    in_loss = {"kl": {"coef": 0.1, "place": "loss", "estimator": "k3"}, "entropy_coef": 0.01}
    runs = [sampling_run(data, name, steps=2, **BARRED, **layout) for name, layout in layouts.items()]
    runs = [run.model_copy(update={"ppo": run.ppo.model_validate(run.ppo.model_dump() | in_loss)}) for run in runs]
    for name, run in zip(layouts, runs, strict=True):
        told = run_ranks(run_recorded, 2, [run])  # a process has one vLLM layout
        steps = [step for rank in told for step in rank[0]["steps"]]
        responses = [sample for step in steps for _, group in step for sample in group]
        ended = [sample[1] for sample in responses if sample[2] == "stop"]
        assert ended and all(len(tokens) > 3 and not set(tokens[:3]) & {1, 3, 4, 5, 6, 7} for tokens in ended), name
        assert any(TEXT in sample[1][:3] for sample in responses), name
        lines = read_metrics(data, name)
        assert max(line["rollout/logprob_gap_max"] for line in lines) < 1e-3, name
        # Equal weights speak alike at first, of what could be chosen alone.
        assert abs(lines[0]["kl/token_mean"]) < 1e-5 and lines[0]["actor/entropy"] < math.log(16), name
    plain, tensor, shared = (read_metrics(data, name)[0] for name in ("plain", "tensor", "shared-head"))
    for name in ("actor/entropy", "actor/loss", "actor/grad_norm", "actor/kl"):
        assert tensor[name] == pytest.approx(plain[name], rel=1e-4, abs=1e-6), name
        assert shared[name] == pytest.approx(plain[name], rel=1e-4, abs=1e-6), name


@pytest.mark.slow
def test_a_learner_that_did_not_know_would_be_found_out(data):
    run = sampling_run(data, "unknowing", steps=1, **BARRED)
    with pytest.raises(AssertionError, match="sampler and trainer disagree"):
        run_ranks(partial(run_recorded, min_tokens=0), 2, [run])
