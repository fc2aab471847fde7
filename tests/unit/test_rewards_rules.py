import re
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarl.rewards.rules import Length, NumericAnswer, Pattern, Repetition, last_number
from tests.unit.reward_samples import scorer_rows


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7", "7"), ("#### 1,234", "1234"), ("-5", "-5"), ("10-3", "3"), ("x = -2.50", "-2.50"), ("1e3", "1000"), (".5", "0.5"),
        ("1,23", "23"), ("about 7.", "7"), ("2/3", "3"), ("", None), ("no number", None), ("$12", "12"), ("(4)-1", "1"), ("1e9999", "9"),
        ("10 - 3", "3"), ("a-1", "1"), ("= +6", "6"),
    ],
)  # fmt: skip
def test_the_last_number_of_a_text(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


def test_numbers_are_compared_within_the_tolerance():
    prompts, completions, texts = scorer_rows(["it is 42", "42.0", "41", "none", "1,000,000"], ["42", "#### 42", "42", "42", "1000001"])
    assert NumericAnswer().score(prompts, completions, texts) == [1.0, 1.0, 0.0, 0.0, 1.0]
    assert NumericAnswer(tolerance=0.0).score(prompts, completions, texts) == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert NumericAnswer(tolerance=0.05).score(prompts, completions, texts) == [1.0, 1.0, 1.0, 0.0, 1.0]
    assert NumericAnswer().score(*scorer_rows(["42"], "42", finish_reason="length")) == [0.0]


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9))
def test_a_number_equals_itself_however_it_is_written(number):
    assert NumericAnswer(0.0).score(*scorer_rows([f"The answer is {number:,}"], str(number))) == [1.0]


def test_a_pattern_has_to_match_the_whole_response():
    scorer = Pattern(re.compile(r"<think>.*</think>\s*<answer>\d+</answer>", re.DOTALL))
    responses = ["<think>a\nb</think>\n<answer>3</answer>", "<answer>3</answer>", "<think></think><answer>3</answer> and more"]
    assert scorer.score(*scorer_rows(responses)) == [1.0, 0.0, 0.0]


def test_length_costs_nothing_up_to_the_target_and_all_at_the_limit():
    assert Length(4, 8).score(*scorer_rows(["x" * n for n in (1, 4, 5, 6, 8, 9)])) == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]


def test_repetition_counts_ngrams_that_came_before():
    assert Repetition(2).score(*scorer_rows(["abcdef", "abab", "aaaaa", "a", ""])) == [
        0.0,
        pytest.approx(-1 / 3),
        pytest.approx(-3 / 4),
        0.0,
        0.0,
    ]


@given(st.text(min_size=1, max_size=40), st.integers(1, 5))
def test_repetition_is_at_most_0_and_more_than_minus_1_and_blind_to_renaming(text, ngram):
    (score,) = Repetition(ngram).score(*scorer_rows([text]))
    assert -1 < score <= 0
    assert Repetition(ngram).score(*scorer_rows(["".join(chr(ord(letter) + 1) for letter in text)])) == [score]
