import pytest

from megarl.data.tokenizers import load_tokenizer
from megarl.errors import RewardError
from megarl.records import Completion, Prompt
from megarl.rewards.check import distinct_names
from megarl.rewards.exact import ExactAnswer, normalise
from megarl.rewards.model import ModelScorer
from megarl.rewards.scorer import Term, WeightedSum
from tests.unit.text_files import character_tokenizer_directory


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(character_tokenizer_directory(tmp_path_factory.mktemp("t")))


def samples(tokenizer, *responses, finish_reason="stop"):
    prompt = Prompt(0, tuple(tokenizer.encode("1+1=")), answer="2", text="1+1=")
    completions = []
    for i, response in enumerate(responses):
        ids = (*tokenizer.encode(response), tokenizer.eos_id)
        completions.append(Completion(0, i, ids, (0.0,) * len(ids), finish_reason, 0))
    return [prompt] * len(responses), completions


@pytest.mark.parametrize(
    ("found", "expected", "is_same"),
    [
        ("132", "132", True), (" 132\n", "132", True), ("012", "12", True), ("1,234", "1234", True), ("12.50", "12.5", True),
        ("-0", "0", True), ("Paris", "paris", True), ("a  b", "a b", True), ("132", "133", False), ("1,23", "123", False),
        ("", "0", False), ("1e2", "100", False), ("13 2", "132", False), ("-5", "5", False), ("9" * 40, "9" * 39 + "8", False),
    ],
)  # fmt: skip
def test_answers_are_compared_in_their_plain_form(found, expected, is_same):
    assert (normalise(found) == normalise(expected)) is is_same


def test_an_answer_counts_only_when_the_response_ended(tokenizer):
    prompts, completions = samples(tokenizer, "2", "02", "3", "")
    texts = [tokenizer.decode_response(c.token_ids) for c in completions]
    assert ExactAnswer().score(prompts, completions, texts) == [1.0, 1.0, 0.0, 0.0]
    prompts, completions = samples(tokenizer, "2", finish_reason="length")
    assert ExactAnswer().score(prompts, completions, ["2"]) == [0.0]


def test_the_reward_is_the_weighted_sum_and_keeps_each_part(tokenizer):
    prompts, completions = samples(tokenizer, "2", "35")
    reward = WeightedSum((Term("exact", 2.0, ExactAnswer()), Term("model", -0.5, ModelScorer(lambda rows: [float(len(r)) for r in rows]))))
    right, wrong = reward.judge(prompts, completions, tokenizer)
    assert right.reward_parts == {"exact": 1.0, "model": 6.0} and right.reward == 2.0 - 3.0
    assert wrong.reward_parts == {"exact": 0.0, "model": 7.0} and wrong.reward == -3.5
    assert wrong.completion is completions[1] and wrong.prompt is prompts[1]


def test_the_model_sees_prompt_and_response_with_its_end(tokenizer):
    prompts, completions = samples(tokenizer, "2")
    seen = []
    ModelScorer(lambda rows: seen.extend(rows) or [0.0]).score(prompts, completions, ["2"])
    assert seen == [[*tokenizer.encode("1+1=2"), tokenizer.eos_id]]


def test_scores_that_are_no_numbers_are_refused(tokenizer):
    prompts, completions = samples(tokenizer, "2", "3")
    for scores, reason in (([1.0], "1 scores for 2 completions"), ([0.0, float("nan")], "gave nan to completion 1 of prompt 0")):
        with pytest.raises(RewardError, match=f"reward judge .*{reason}|reward judge {reason}"):
            WeightedSum((Term("judge", 1.0, ModelScorer(lambda rows, s=scores: s)),)).judge(prompts, completions, tokenizer)


def test_parts_of_one_kind_get_distinct_names():
    assert distinct_names(["exact", "model", "model", "model"]) == ["exact", "model", "model_2", "model_3"]
    with pytest.raises(AssertionError):
        WeightedSum((Term("a", 1.0, ExactAnswer()), Term("a", 1.0, ExactAnswer())))
