"""Held-out sets: names, seeds, requests, and what scores amount to, against counting by hand."""

import itertools

import pytest

from megarl.check import inspect
from megarl.config_file import load_run
from megarl.errors import ConfigError
from megarl.metrics import Metrics
from megarl.ppo.eval_sets import eval_sets, reported_names
from megarl.ppo.held_out import eval_requests, eval_seed, summary
from megarl.records import RolloutRequest, Sampling
from megarl.rewards.pass_at_k import pass_at_k, reported_ks
from tests.unit.tiny_run import write_run

SETS = """eval={{every_steps: 2, path: '{root}/prompts.jsonl', sets: [
  {{name: sums, data: {{path: '{root}/prompts.jsonl', max_prompt_tokens: 20}}, metrics: [{{kind: numeric}}, {{kind: length, target: 3}}],
   num_prompts: 5, samples: 3, temperature: 0.7}}]}}"""


def run_with_sets(root, *changes):
    return load_run("ppo", write_run(root), [SETS.format(root=root), *changes])


@pytest.mark.parametrize("n, right", [(1, 0), (1, 1), (5, 0), (5, 2), (6, 3), (6, 6)])
def test_pass_at_k_counts_sets_of_responses(n, right):
    for k in range(1, n + 1):
        drawn = list(itertools.combinations([True] * right + [False] * (n - right), k))
        assert pass_at_k(n, right, k) == pytest.approx(sum(any(chosen) for chosen in drawn) / len(drawn))


def test_reported_ks_are_powers_of_two_and_all():
    assert [reported_ks(n) for n in (0, 1, 2, 5, 8)] == [(), (1,), (1, 2), (1, 2, 4, 5), (1, 2, 4, 8)]


def test_names_say_set_and_metric(tmp_path):
    short, sums = eval_sets(run_with_sets(tmp_path))
    assert reported_names(short) == ["eval/response_length", "eval/truncated_share", "eval/accuracy"]
    names = ["response_length", "truncated_share", "numeric", "numeric/mean@3", "numeric/pass@1", "numeric/pass@2", "numeric/pass@3"]
    assert reported_names(sums) == [f"eval/sums/{name}" for name in (*names, "length", "length/mean@3")]
    assert short.data.max_prompt_tokens == 16 and sums.data.max_prompt_tokens == 20


def test_requests_are_greedy_first_and_seeds_know_set_prompt_and_sample(tmp_path):
    _, sums = eval_sets(run_with_sets(tmp_path))
    greedy = [RolloutRequest(number, 0, (3, 4), Sampling(16, 0.0, stop_token_ids=(1,)), 0) for number in (4, 7)]
    asked = eval_requests(sums, greedy)
    assert asked[::4] == greedy
    assert [(r.prompt_id, r.sample_index, r.sampling.temperature) for r in asked[1:4]] == [(4, index, 0.7) for index in (1, 2, 3)]
    assert all(r.sampling.stop_token_ids == (1,) and r.sampling.max_tokens == 16 for r in asked)
    assert len({r.seed for r in asked}) == 1 + 6
    assert asked[1].seed == eval_seed("sums", 4, 1) != eval_seed("other", 4, 1)
    assert eval_requests(sums, greedy[1:]) == asked[4:]  # whoever else is asked


def test_a_summary_is_what_counting_gives(tmp_path):
    _, sums = eval_sets(run_with_sets(tmp_path))
    # length, cut, numeric, length score: two prompts, a greedy response and three others each
    facts = [
        *([5.0, 0.0, 1.0, 0.0], [4.0, 0.0, 1.0, -0.5], [4.0, 0.0, 0.0, -0.25], [4.0, 1.0, 0.0, 0.0]),
        *([7.0, 1.0, 0.0, -1.0], [4.0, 0.0, 0.0, 0.0], [4.0, 0.0, 0.0, 0.0], [4.0, 0.0, 0.0, 0.0]),
    ]
    found = summary(sums, facts).values_by_name()
    assert set(found) == set(reported_names(sums))
    wanted = {
        "response_length": 6,
        "truncated_share": 0.5,
        "numeric": 0.5,
        "length": -0.5,
        "numeric/mean@3": 1 / 6,
        "length/mean@3": -0.125,
    }
    wanted |= {"numeric/pass@1": 1 / 6, "numeric/pass@2": 1 / 3, "numeric/pass@3": 0.5}
    assert found == pytest.approx({f"eval/sums/{name}": value for name, value in wanted.items()})
    assert isinstance(summary(sums, facts), Metrics)


@pytest.mark.parametrize(
    "change, message",
    [
        ("eval={}", "eval: found neither path nor sets"),
        ("eval.sets.0.name='a b'", "eval.sets.0.name: found 'a b'; expected a name of letters"),
        ("eval.sets.0.metrics=[]", "eval.sets.0.metrics: found an empty list"),
        ("eval.sets.0.metrics.0={kind: regex}", "eval.sets.0.metrics.0.pattern: missing"),
        ("eval.sets.1={name: sums, data: {path: x}, metrics: [{kind: exact}]}", "eval.sets.1.name: found 'sums' once more"),
        ("checkpoint.keep_best=eval/sums/exact", "checkpoint.keep_best: found eval/sums/exact; expected one of eval/response_length"),
        ("eval.sets.0.data.max_prompt_tokens=60", "eval.sets.0.data.max_prompt_tokens 60 + rollout.max_response_tokens 16 = 76 tokens"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, change, message):
    path = write_run(tmp_path)
    with pytest.raises(ConfigError) as caught:
        inspect("ppo", path, [SETS.format(root=tmp_path), change])
    assert message in str(caught.value)


def test_a_known_name_may_be_the_best(tmp_path):
    inspect("ppo", write_run(tmp_path), [SETS.format(root=tmp_path), "checkpoint.keep_best=eval/sums/numeric/pass@2"])


def test_a_set_that_is_not_there_is_said(tmp_path):
    notices = inspect("ppo", write_run(tmp_path), [SETS.format(root=tmp_path), "eval.sets.0.data.path=nowhere.jsonl"]).notices
    assert any("eval.sets.0.data.path: nowhere.jsonl does not exist" in notice for notice in notices)
