import time

import pytest

from megarl.errors import RewardError, SetupError
from megarl.rewards import math_answer
from megarl.rewards.math_answer import MathAnswer
from tests.unit.reward_samples import scorer_rows


@pytest.fixture(scope="module")
def scorer():
    pytest.importorskip("math_verify")
    scorer = MathAnswer(timeout_s=5)
    yield scorer
    scorer.close()


def test_answers_are_found_and_compared_as_mathematics(scorer):
    pairs = [
        ("1/2", r"so it is $\frac{1}{2}$", 1.0), ("42", r"The answer is \boxed{42}.", 1.0), ("x^2+2x+1", r"\boxed{(x+1)^2}", 1.0),
        (r"\frac{3}{4}", "0.75", 1.0), ("(1,2)", "$(1,2)$", 1.0), ("42", "41", 0.0), ("42", r"not 42 but \boxed{41}", 0.0), ("7", "", 0.0),
    ]  # fmt: skip
    answers, responses, expected = zip(*pairs)
    assert scorer.score(*scorer_rows(responses, answers)) == list(expected)
    assert scorer.score(*scorer_rows(["42"], "42", finish_reason="length")) == [0.0]


def test_a_response_that_cannot_be_decided_earns_0_aloud_and_the_next_is_scored(scorer, capsys, monkeypatch):
    monkeypatch.setattr(scorer, "timeout_s", 1.0)
    start = time.monotonic()
    assert scorer.score(*scorer_rows(["$9^{9^{9^{9}}}$"], "1")) == [0.0]
    assert time.monotonic() - start < 20
    assert "warning: reward math: a response to prompt 10 ('$9^{9^{9^{9}}}$') could not be decided within 1 s" in capsys.readouterr().err
    monkeypatch.setattr(scorer, "timeout_s", 20.0)
    assert scorer.score(*scorer_rows(["7"], "7")) == [1.0]


def test_an_answer_that_is_no_mathematics_is_an_error_of_the_data(scorer):
    with pytest.raises(RewardError, match="the answer '' of prompt 10 holds no mathematical expression"):
        scorer.score(*scorer_rows(["3"], ""))


def test_without_the_package_the_way_to_it_is_said(monkeypatch):
    monkeypatch.setattr(math_answer, "find_spec", lambda name: None)
    with pytest.raises(SetupError, match=r"run pip install 'megarl\[math\]'"):
        MathAnswer(5)
