"""A response ends with the token that completes a stop string, wherever tokens and chunks happen to be cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarl.errors import RolloutError
from megarl.records import Completion, RolloutRequest, Sampling
from megarl.rollout.text_stops import TextStops, first_end

PIECES = ["a", "b", "ab", "abc", "\n", "#", "", "## "]  # text of token i; the empty one is a special token


class Pieces:
    def decode(self, token_ids):
        return "".join(PIECES[i] for i in token_ids)


class Answers:
    """A sampler that knows nothing of text."""

    policy_version = 3

    def __init__(self, tokens, reason="length", later=()):
        self.completion = Completion(1, 0, tuple(tokens), tuple(-0.5 - i for i in range(len(tokens))), reason, 3, later)

    def generate(self, requests, on_finished=None):
        return [self.completion] * len(requests)


def cut(tokens, strings, before=(), min_tokens=0, **kind) -> Completion:
    sampling = Sampling(max_tokens=20, stop_token_ids=(6,), stop_strings=strings, min_tokens=min_tokens)
    request = RolloutRequest(1, 0, (0, 1, *before), sampling, seed=0, num_sampled=len(before))
    return TextStops(Answers(tokens, **kind), Pieces()).generate([request])[0]


def test_the_token_that_completes_the_string_is_the_last_one():
    found = cut([4, 5, 5, 1, 1], ("##", "bb"), later=((2, 4), (4, 5)))
    assert (found.token_ids, found.rollout_logprobs) == ((4, 5, 5), (-0.5, -1.5, -2.5))
    assert found.finish_reason == "stop" and found.later_versions == ((2, 4),)


def test_a_token_may_say_more_than_the_string():
    assert cut([0, 3, 1], ("aa",)).token_ids == (0, 3)


def test_without_the_string_nothing_changes():
    assert cut([4, 5, 1], ("##",)) == Answers([4, 5, 1]).completion
    assert cut([4, 5, 6], ("##",), reason="stop").finish_reason == "stop"


def test_a_string_that_began_in_an_earlier_chunk_ends_the_response():
    assert cut([5, 1], ("##",), before=[4, 5]).token_ids == (5,)
    assert cut([1, 1], ("0",), before=[4]).finish_reason == "length"


def test_a_string_within_the_first_tokens_does_not_end_the_response():
    assert cut([0, 1, 0, 1, 0], ("ab",), min_tokens=2).token_ids == (0, 1, 0, 1)
    assert cut([0, 1, 0], ("ab",), min_tokens=1).token_ids == (0, 1)  # it ends behind them
    assert cut([0, 1], ("ab",), min_tokens=2) == Answers([0, 1]).completion
    assert cut([0, 0, 1], ("ab",), before=[0, 1], min_tokens=2).token_ids == (0, 0, 1)
    assert cut([0, 0], ("ab",), before=[0, 1], min_tokens=2).finish_reason == "length"


def test_the_prompt_is_no_part_of_the_response():
    assert cut([1, 0], ("ab",)).token_ids == (1, 0)  # the prompt is "ab"; the response says "ba"


def test_an_end_that_nobody_can_explain_is_refused():
    with pytest.raises(RolloutError, match="prompt 1, sample 0: the sampler stopped it"):
        cut([4, 5, 1], ("##",), reason="stop")


@given(st.lists(st.integers(0, 7), min_size=1, max_size=12), st.sampled_from([("##",), ("bab",), ("\n", "ca")]))
def test_it_is_the_shortest_beginning_with_a_string(tokens, strings):
    expected = next((n for n in range(1, len(tokens) + 1) if any(s in Pieces().decode(tokens[:n]) for s in strings)), len(tokens) + 1)
    assert first_end(tokens, 0, strings, Pieces()) == expected
