"""Scoring while others are being sampled: the same scores and errors as afterwards, sooner, and never for ever."""

import threading
import time
from dataclasses import replace

import pytest

from megarl.errors import RewardError
from megarl.records import Completion, Prompt, RolloutRequest, Sampling
from megarl.rewards.ahead import EarlyScores
from megarl.rewards.exact import ExactAnswer
from megarl.rewards.function import FunctionScorer
from megarl.rewards.scorer import Ahead, Term, WeightedSum
from megarl.rollout.scripted import ScriptedEngine

PROMPTS = [Prompt(number, (3, 4 + number), answer=str(number % 3), text=f"p{number}") for number in range(6)]
TOKEN = {10 + digit: str(digit) for digit in range(10)}
REQUESTS = [RolloutRequest(prompt.prompt_id, 0, prompt.token_ids, Sampling(4, stop_token_ids=(1,)), 7) for prompt in PROMPTS]


class Letters:
    """As much of a tokenizer as a reward needs."""

    def decode_response(self, token_ids):
        return "".join(TOKEN.get(token, "") for token in token_ids)


def find(prompt_id):
    return PROMPTS[prompt_id] if 0 <= prompt_id < len(PROMPTS) else None


def engine(pause_s=0.0):
    def script(request):
        time.sleep(pause_s)
        return (10 + request.prompt_id % 2, 1), (-0.5, -0.5)

    return ScriptedEngine(script)


def by_function(function, timeout_s=60.0, most=100, threads=1):
    return Term("function", 2.0, FunctionScorer("f", function, timeout_s), True, Ahead(threads, most, timeout_s))


def judged(terms, sampler, patience_s=60.0):
    """Rewards by way of both orders, which must agree, and the seconds after generation of the early one."""
    early = EarlyScores(terms, Letters(), find, patience_s)
    completions = sampler.generate(REQUESTS, early.take)
    began = time.monotonic()
    found = early.settle()
    rewards = WeightedSum(tuple(terms)).judge(PROMPTS, completions, Letters(), found=found)
    seconds = time.monotonic() - began
    plain = [replace(term, ahead=None) for term in terms]
    assert WeightedSum(tuple(plain)).judge(PROMPTS, completions, Letters()) == rewards
    return rewards, seconds


def test_what_is_finished_is_scored_while_others_are_sampled():
    calls = []

    def slow(prompts, responses, answers):
        calls.append((time.monotonic(), list(prompts)))
        time.sleep(0.05 * len(prompts))
        return [float(answer == response) for answer, response in zip(answers, responses)]

    rewards, seconds = judged([by_function(slow), Term("exact", 1.0, ExactAnswer())], engine(pause_s=0.06))
    assert [sum(trajectory.reward_parts.values()) for trajectory in rewards] == [2, 2, 0, 0, 0, 0]
    early = [prompts for _, prompts in calls[:-1]]  # the last call is the plain order's
    assert [prompt for prompts in early for prompt in prompts] == [prompt.text for prompt in PROMPTS] and len(early) > 1
    assert seconds < 0.3, "six responses at 0.05 s, of which at most the last ones were left"


def test_a_failure_names_its_prompts_and_comes_after_sampling():
    def picky(prompts, responses, answers):
        if "p3" in prompts:
            raise ValueError("no idea")
        return [0.0] * len(prompts)

    early = EarlyScores([by_function(picky, most=1)], Letters(), find, 60)
    completions = engine().generate(REQUESTS, early.take)
    with pytest.raises(RewardError, match="reward function f failed on prompt 3: ValueError: no idea"):
        WeightedSum((by_function(picky, most=1),)).judge(PROMPTS, completions, Letters(), found=early.settle())


@pytest.mark.parametrize("scores, message", [([], "returned 0 scores for 1"), ([float("nan")], "gave nan to completion 0 of prompt 0")])
def test_lies_are_refused(scores, message):
    term = by_function(lambda *_: scores, most=1)
    early = EarlyScores([term], Letters(), find, 60)
    completions = engine().generate(REQUESTS[:1], early.take)
    with pytest.raises(RewardError, match=message):
        WeightedSum((term,)).judge(PROMPTS[:1], completions, Letters(), found=early.settle())


def test_what_hangs_ends_by_the_clock():
    released = threading.Event()
    early = EarlyScores([by_function(lambda *_: released.wait(20), timeout_s=0.2, most=1)], Letters(), find, 60)
    engine().generate(REQUESTS, early.take)
    began = time.monotonic()
    try:
        found = early.settle()["function"]  # the call was given up by its own time, or the line by ours
        assert all(isinstance(entry, list) and "did not return within 0.2 s (prompt 0)" in entry[1] for entry in found.values())
    except RewardError as error:
        assert "no scores for prompt" in str(error) and "within 0.2 s after the last was sampled" in str(error)
    finally:
        released.set()
    assert time.monotonic() - began < 2


def test_a_line_that_is_too_slow_in_all_is_late():
    early = EarlyScores([by_function(lambda *_: time.sleep(0.15) or [1.0], timeout_s=0.2, most=1)], Letters(), find, 60)
    engine().generate(REQUESTS, early.take)
    with pytest.raises(RewardError, match=r"reward function: no scores for prompts [1-4], .* within 0.2 s after the last was sampled"):
        early.settle()


def test_other_sets_and_continuations_are_left_for_later():
    early = EarlyScores([by_function(lambda prompts, *_: [1.0] * len(prompts))], Letters(), find, 60)
    assert early.is_used and not EarlyScores([Term("exact", 1.0, ExactAnswer())], Letters(), find, 60).is_used
    early.take(replace(REQUESTS[0], prompt_id=99), Completion(99, 0, (10, 1), (0.0, 0.0), "stop", 0))
    early.take(replace(REQUESTS[0], token_ids=(3, 4, 10)), Completion(0, 0, (11, 1), (0.0, 0.0), "stop", 0))
    assert early.settle() == {"function": {}}
    rewards, _ = judged([by_function(lambda prompts, *_: [1.0] * len(prompts))], engine())
    assert [trajectory.reward for trajectory in rewards] == [2.0] * 6


def test_several_threads_score_side_by_side():
    together = threading.Barrier(3, timeout=20)
    term = Term("http", 1.0, FunctionScorer("f", lambda *_: together.wait() * 0.0 + 1.0 and [1.0], 30), True, Ahead(3, 1, 30))
    early = EarlyScores([term], Letters(), find, 60)
    engine().generate(REQUESTS[:3], early.take)
    assert list(early.settle()["http"].values()) == [1.0] * 3
