import re
import time

import numpy as np
import pytest
import torch

from megarl.errors import RewardError, SetupError
from megarl.rewards.function import FunctionHook, FunctionScorer, load_function
from megarl.rewards.scorer import UNPROCESSED, Term, WeightedSum, checked
from tests.unit.reward_samples import scorer_rows

FILE = """
import time

def lengths(prompts, responses, answers):
    return [len(r) for r in responses]

def hangs(prompts, responses, answers):
    time.sleep(20)

NUMBER = 3
"""


class Letters:
    def decode_response(self, token_ids):
        return "".join(map(chr, token_ids))


def test_a_function_is_found_in_a_file_or_a_module(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    function = load_function(f"{path}:lengths", "rewards.0.function")
    assert FunctionScorer("f", function, 5).score(*scorer_rows(["a", "bcd"])) == [1, 3]
    assert load_function("json:loads", "k")('{"a": 1}') == {"a": 1}


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("{}:other", FILE, "has no function other; expected one of lengths, hangs"),
        ("{}:NUMBER", FILE, "has no function NUMBER"),
        ("{}:f", "def f(:\n", "cannot be imported: SyntaxError"),
        ("{}:f", "1 / 0", r"cannot be imported: ZeroDivisionError: division by zero \(.*mine.py:1\)"),
        ("no.such.module:f", "", "no.such.module cannot be imported: ModuleNotFoundError"),
    ],
)
def test_a_function_that_is_not_there_is_named(tmp_path, name, text, reason):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(SetupError, match=rf"^rewards.0.function: .*{reason}"):
        load_function(name.format(tmp_path / "mine.py"), "rewards.0.function")


def test_a_function_that_raises_or_hangs_is_an_error_with_its_line_and_prompts(tmp_path):
    def fails(prompts, responses, answers):
        raise KeyError("x")

    with pytest.raises(RewardError, match=r"reward function f failed on prompts 10, 11: KeyError: 'x' \(.*test_rewards_function.py:\d+\)"):
        FunctionScorer("f", fails, 5).score(*scorer_rows(["a", "b"]))
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    start = time.monotonic()
    with pytest.raises(RewardError, match=r"did not return within 0.3 s \(prompt 10\); it is in .*mine.py:8"):
        FunctionScorer("f", load_function(f"{path}:hangs", "k"), 0.3).score(*scorer_rows(["a"]))
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "value", [np.array([1.0, 2.0]), torch.tensor([1.0, 2.0]), [np.float32(1), np.int64(2)], [torch.tensor(1.0), 2], (1, 2)]
)
def test_arrays_and_tensors_are_numbers(value):
    rows = scorer_rows(["a", "b"])
    assert checked("reward f", FunctionScorer("f", lambda *_: value, 5).score(*rows), rows[1]) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([1.0], "returned 1 scores for 2 completions (prompts 10, 11)"),
        ([], "returned 0 scores"),
        ([1.0, float("nan")], "gave nan to completion 0 of prompt 11"),
        ([float("-inf"), 1.0], "gave -inf to completion 0 of prompt 10"),
        ([1.0, "0.5"], "gave str '0.5' to completion 0 of prompt 11"),
        ([1.0, None], "gave NoneType 'None' to completion 0 of prompt 11"),
        (None, "returned NoneType 'None'; expected a list of 2 numbers"),
        ("ab", "returned str 'ab'"),
        (0.5, "returned 0.5"),
        ({"rewards": [1, 2]}, "returned dict"),
        (torch.ones(2, 1), "gave list '[1.0]'"),
    ],
)
def test_a_lie_is_an_error_that_names_the_prompt(value, reason):
    prompts, completions, _ = scorer_rows(["a", "b"])
    term = Term("mine", 1.0, FunctionScorer("f", lambda *_: value, 5))
    with pytest.raises(RewardError, match=re.escape(f"reward mine {reason}")):
        WeightedSum((term,)).judge(prompts, completions, Letters())


def test_the_hook_changes_the_sum_and_leaves_the_parts():
    prompts, completions, _ = scorer_rows(["a", "bcd"], ["x", "y"])
    seen = []

    def centred(prompts, responses, answers, rewards, parts):
        seen.append((prompts, responses, answers, list(rewards), parts))
        rewards[:] = [0.0, 0.0]  # a hook that writes into what it was given changes nothing by that
        return np.array([1.0, -1.0])

    term = Term("length", 2.0, FunctionScorer("f", lambda p, r, a: [len(x) for x in r], 5))
    first, second = WeightedSum((term,), FunctionHook("h", centred, 5)).judge(prompts, completions, Letters())
    assert (first.reward, second.reward) == (1.0, -1.0)
    assert first.reward_parts == {"length": 1.0, UNPROCESSED: 2.0} and second.reward_parts == {"length": 3.0, UNPROCESSED: 6.0}
    assert seen == [(["question 0: ", "question 1: "], ["a", "bcd"], ["x", "y"], [2.0, 6.0], {"length": [1.0, 3.0]})]
    with pytest.raises(RewardError, match="reward_hook returned 1 scores for 2 completions"):
        WeightedSum((term,), FunctionHook("h", lambda *_: [1.0], 5)).judge(prompts, completions, Letters())
