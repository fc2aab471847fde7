import json

import pytest

from megarl.config import LessonData, PromptData
from megarl.data.demonstrations import DemonstrationSet
from megarl.data.preferences import PreferenceSet
from megarl.data.prompts import PromptSet
from megarl.data.tokenizers import load_tokenizer
from megarl.quickstart.make_data import MODEL_CONFIG, make_data, train_tokenizer, written_sum


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_quickstart_data_is_what_its_description_says(tmp_path):
    make_data(tmp_path, seed=3)
    train, heldout = rows(tmp_path / "prompts.jsonl"), rows(tmp_path / "heldout.jsonl")
    assert (len(train), len(heldout)) == (8000, 1000)
    problems = {row["prompt"] for row in train}
    assert len(problems) == 8000 and not problems & {row["prompt"] for row in heldout}
    for row in train + heldout:
        a, b = row["prompt"].removesuffix("=").split("+")
        assert int(a) + int(b) == int(row["answer"]) and len(row["answer"]) == 3 and len(row["prompt"]) == 6
    demonstrations = rows(tmp_path / "sft.jsonl")
    assert {row["prompt"] for row in demonstrations} == problems
    assert all(len(row["response"]) == 3 for row in demonstrations)
    assert {row["prompt"] for row in rows(tmp_path / "preferences.jsonl")} == problems
    assert {row["prompt"] for row in rows(tmp_path / "heldout_preferences.jsonl")} == {row["prompt"] for row in heldout}
    answers = {row["prompt"]: row["answer"] for row in train}
    is_right = [row["response"] == answers[row["prompt"]] for row in demonstrations]
    assert 0.45 < sum(is_right) / 8000 < 0.6, "careless, but not hopeless"
    for row in rows(tmp_path / "preferences.jsonl"):
        assert row["chosen"] == answers[row["prompt"]] != row["rejected"] and len(row["rejected"]) == 3


def test_the_library_reads_the_quickstart_data_with_one_token_a_character(tmp_path):
    make_data(tmp_path, seed=0)
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    assert [tokenizer.encode(c) for c in "0123456789"] == [[3 + i] for i in range(10)]
    assert tokenizer.bos_id is None and tokenizer.vocab_size <= MODEL_CONFIG["vocab_size"]
    assert (tokenizer.eos_id, tokenizer.pad_id) == (MODEL_CONFIG["eos_token_id"], MODEL_CONFIG["pad_token_id"])
    prompts = PromptSet(PromptData(path=tmp_path / "prompts.jsonl", max_prompt_tokens=6), tokenizer, needs_answers=True)
    assert {len(p.token_ids) for p in prompts.prompts} == {6}
    lesson = DemonstrationSet(LessonData(path=tmp_path / "sft.jsonl", max_tokens=10), tokenizer)
    assert {len(row.token_ids) for row in lesson.demonstrations} == {10}
    assert len(PreferenceSet(LessonData(path=tmp_path / "preferences.jsonl", max_tokens=10), tokenizer)) == 8000


@pytest.mark.parametrize(
    ("problem", "written"),
    [((47, 85), {132, 22, 32, 122}), ((12, 34), {46}), ((15, 36), {51, 41}), ((90, 20), {110, 10}), ((45, 55), {100, 90, 0})],
)
def test_the_careless_writer_forgets_carries_and_nothing_else(problem, written):
    flags = [(ones, tens) for ones in (False, True) for tens in (False, True)]
    assert {written_sum(problem, *forgotten) for forgotten in flags} == written
    assert written_sum(problem, False, False) == sum(problem)


def test_the_same_seed_writes_the_same_bytes_and_another_seed_other_problems(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_data(tmp_path / name, seed)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(files) == 7
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    assert (tmp_path / "a" / "sft.jsonl").read_bytes() != (tmp_path / "c" / "sft.jsonl").read_bytes()
    train_tokenizer(tmp_path / "again.model")
    assert (tmp_path / "again.model").read_bytes() == (tmp_path / "c" / "tokenizer.model").read_bytes()
