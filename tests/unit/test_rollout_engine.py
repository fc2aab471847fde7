"""Requests carry seeds that depend on nothing but their place in the run; answers that are no completions are refused by name."""

from dataclasses import replace

import pytest

from megarl.config import RolloutConfig
from megarl.errors import RolloutError
from megarl.records import Completion, Prompt, RolloutRequest, Sampling
from megarl.rollout.engine import check_completions, check_requests, make_greedy_requests, make_requests
from megarl.rollout.scripted import ScriptedEngine

PROMPTS = [Prompt(4, (1, 2, 3)), Prompt(9, (5,))]
ROLLOUT = RolloutConfig(samples_per_prompt=3, max_response_tokens=4, temperature=0.5)
REQUEST = RolloutRequest(4, 0, (1, 2), Sampling(max_tokens=3, stop_token_ids=(7,)), seed=1)
GOOD = Completion(4, 0, (5, 7), (-0.5, -0.25), "stop", 2)


def test_samples_of_a_prompt_lie_side_by_side_with_their_own_seeds():
    requests = make_requests(PROMPTS, ROLLOUT, (0, 7), seed=(1, 2))
    assert [(request.prompt_id, request.sample_index) for request in requests] == [(4, 0), (4, 1), (4, 2), (9, 0), (9, 1), (9, 2)]
    assert {request.sampling for request in requests} == {Sampling(max_tokens=4, temperature=0.5, stop_token_ids=(0, 7))}
    assert len({request.seed for request in requests}) == 6
    assert all(0 <= request.seed < 2**63 for request in requests)


def test_a_seed_depends_on_run_step_position_and_sample_only():
    whole = make_requests(PROMPTS, replace_samples(1), (), seed=(1, 2))
    second_rank = make_requests(PROMPTS[1:], replace_samples(2), (7,), seed=(1, 2), first_position=1)
    assert second_rank[0].seed == whole[1].seed
    others = [make_requests(PROMPTS[1:], ROLLOUT, (), seed, 1)[0].seed for seed in ((1, 3), (2, 2), (2, 1))]
    assert len({whole[0].seed, whole[1].seed, second_rank[1].seed, *others}) == 6


def test_a_prompt_that_stands_twice_in_a_step_is_sampled_twice():
    requests = make_requests([PROMPTS[0], PROMPTS[1], PROMPTS[0]], ROLLOUT, (), seed=(1, 2))
    assert len({request.seed for request in requests}) == 9


def test_a_response_that_ended_too_early_is_refused_and_one_that_was_begun_before_is_not():
    request = replace(REQUEST, sampling=replace(REQUEST.sampling, min_tokens=2))
    with pytest.raises(RolloutError, match="ended after 2 tokens; expected more than 2"):
        check_completions([request], [GOOD], vocab_size=8)
    check_completions([replace(request, num_sampled=1)], [GOOD], vocab_size=8)
    check_completions([request], [replace(GOOD, token_ids=(5, 6, 7), rollout_logprobs=(-1.0,) * 3)], vocab_size=8)


def test_all_requests_of_a_run_carry_its_smallest_length():
    rollout = ROLLOUT.model_copy(update={"min_response_tokens": 2})
    asked = [*make_requests(PROMPTS, rollout, (7,), (1, 2), with_greedy=True), *make_greedy_requests(PROMPTS, rollout, (7,))]
    assert {request.sampling.min_tokens for request in asked} == {2}


def replace_samples(number: int) -> RolloutConfig:
    return ROLLOUT.model_copy(update={"samples_per_prompt": number})


def test_greedy_requests_ask_once_at_temperature_zero():
    assert [(r.prompt_id, r.sampling.temperature) for r in make_greedy_requests(PROMPTS, ROLLOUT, ())] == [(4, 0.0), (9, 0.0)]


def test_good_completions_pass():
    check_completions([REQUEST], [GOOD], vocab_size=8)
    check_completions([REQUEST], [replace(GOOD, token_ids=(5, 5, 6), rollout_logprobs=(-1.0,) * 3, finish_reason="length")], vocab_size=8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_id": 5}, "answer to prompt 5"),
        ({"token_ids": (), "rollout_logprobs": ()}, "0 tokens; expected 1 to 3"),
        ({"token_ids": (5, 6, 5, 7), "rollout_logprobs": (-1.0,) * 4}, "4 tokens; expected 1 to 3"),
        ({"rollout_logprobs": (-0.5,)}, "1 log-probabilities for 2 tokens"),
        ({"token_ids": (8, 7)}, "token 8 is outside the vocabulary of 8"),
        ({"token_ids": (-1, 7)}, "token -1 is outside"),
        ({"rollout_logprobs": (-0.5, float("nan"))}, "log-probability nan"),
        ({"rollout_logprobs": (float("-inf"), -0.5)}, "log-probability -inf"),
        ({"rollout_logprobs": (0.5, -0.5)}, "log-probability 0.5"),
        ({"finish_reason": "abort"}, "finish reason 'abort'"),
        ({"finish_reason": "length"}, "finish reason 'length' after last token 7"),
        ({"token_ids": (5, 6)}, "finish reason 'stop' after last token 6"),
        ({"token_ids": (5, 6), "finish_reason": "length"}, "cut at 2 tokens; the limit is 3"),
    ],
)
def test_an_answer_that_is_no_completion_is_refused(changes, message):
    with pytest.raises(RolloutError, match="completion of prompt 4, sample 0") as caught:
        check_completions([REQUEST], [replace(GOOD, **changes)], vocab_size=8)
    assert message in str(caught.value)


def test_missing_answers_are_refused():
    with pytest.raises(RolloutError, match="0 completions for 1 requests"):
        check_completions([REQUEST], [], vocab_size=8)


def test_requests_that_do_not_fit_are_refused():
    check_requests([REQUEST], max_len=5)
    with pytest.raises(RolloutError, match="prompt 4 has 2 tokens and may get 3 more"):
        check_requests([REQUEST], max_len=4)
    with pytest.raises(RolloutError, match="prompt 4 has no tokens"):
        check_requests([replace(REQUEST, token_ids=())], max_len=5)


def test_the_scripted_engine_answers_in_order():
    engine = ScriptedEngine(lambda request: ((request.prompt_id, 7), (-1.0, -2.0)))
    requests = [REQUEST, replace(REQUEST, prompt_id=6)]
    completions = engine.generate(requests)
    check_completions(requests, completions, vocab_size=8)
    assert [completion.token_ids for completion in completions] == [(4, 7), (6, 7)]
