"""The layouts of other projects, as they are, and what they become."""

import json

import pytest

from megarl import cli
from megarl.config import LessonData, PromptData
from megarl.data.demonstrations import DemonstrationSet
from megarl.data.fields import LineFault
from megarl.data.layouts import canonical
from megarl.data.preferences import PreferenceSet
from megarl.data.prompts import PromptSet
from megarl.data.tokenizers import load_tokenizer
from tests.unit.text_files import character_tokenizer_directory, write_lines

HH = {"chosen": "\n\nHuman: 1+1?\n\nAssistant: 2", "rejected": "\n\nHuman: 1+1?\n\nAssistant: 3"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(character_tokenizer_directory(tmp_path_factory.mktemp("t")))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "response": "a"},
        {"prompt": "q", "completion": "a"},
        {"input": "q", "output": "a"},
        {"instruction": "q", "input": "", "output": "a"},
        {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    ],
)
def test_demonstrations_of_every_layout_are_one(tmp_path, tokenizer, row):
    path = write_lines(tmp_path / "d.jsonl", [row])
    (found,) = DemonstrationSet(LessonData(path=path, chat_template=True), tokenizer).demonstrations
    learned = [i for i, is_learned in zip(found.token_ids, found.loss_mask) if is_learned]
    assert learned == tokenizer.encode("a<|im_end|>")
    assert list(found.token_ids)[: len(tokenizer.encode("<|im_start|>user\nq"))] == tokenizer.encode("<|im_start|>user\nq")


@pytest.mark.parametrize("has_chat", [False, True])
def test_hh_dialogues_share_their_turns(tmp_path, tokenizer, has_chat):
    path = write_lines(tmp_path / "p.jsonl", [HH])
    (pair,) = PreferenceSet(LessonData(path=path, chat_template=has_chat), tokenizer).preferences
    start = "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n" if has_chat else "\n\nHuman: 1+1?\n\nAssistant:"
    answers = ("2<|im_end|>", "3<|im_end|>") if has_chat else (" 2<|im_end|>", " 3<|im_end|>")
    assert [list(ids) for ids in (pair.chosen_ids, pair.rejected_ids)] == [tokenizer.encode(start + answer) for answer in answers]
    assert pair.num_prompt_tokens == len(tokenizer.encode(start))
    (prompt,) = PromptSet(PromptData(path=path, chat_template=has_chat), tokenizer).prompts
    assert list(prompt.token_ids) == tokenizer.encode(start)


@pytest.mark.parametrize(
    ("row", "purpose", "reason"),
    [
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "f"}]}, "demonstration", "tool calls"),
        ({"conversations": [{"from": "bot", "value": "q"}]}, "demonstration", "from 'bot'; expected human"),
        ({"prompt": "q", "completion": "a", "label": True}, "demonstration", "unpaired preference"),
        ({"chosen": "abc", "rejected": "xyz"}, "preference", "begin differently"),
        ({"instruction": "", "output": "a"}, "demonstration", "'instruction' is empty"),
        (HH | {"rejected": "\n\nHuman: 2?\n\nAssistant: 3"}, "preference", "begin differently"),
    ],
)
def test_rows_that_do_not_fit_say_why(row, purpose, reason):
    with pytest.raises(LineFault, match=reason):
        canonical(row, "auto", {}, purpose, has_chat=True)


def test_what_is_learned_is_a_choice(tmp_path, tokenizer):
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))]
    path = write_lines(tmp_path / "d.jsonl", [{"messages": turns}])

    def learned(learn):
        (row,) = DemonstrationSet(LessonData(path=path, chat_template=True, learn=learn), tokenizer).demonstrations
        return [token for token, is_learned in zip(row.token_ids, row.loss_mask) if is_learned]

    assert learned("responses") == tokenizer.encode("b<|im_end|>d<|im_end|>")
    assert learned("last_response") == tokenizer.encode("d<|im_end|>")
    assert learned("all") == tokenizer.render_chat(turns, add_generation_prompt=False)


def test_inspect_lists_every_malformed_row(tmp_path, capsys):
    path = write_lines(tmp_path / "d.jsonl", [{"prompt": "a", "response": "b"}, *["?"] * 12])
    assert cli.run(["data", "inspect", str(path)]) == 65
    printed = capsys.readouterr()
    assert "a⟦b<end>⟧" in printed.out and printed.out.count(f"{path}:") == 12
    assert "12 of 13 rows are malformed" in printed.err
    write_lines(path, [{"prompt": "a", "response": "b"}])
    assert cli.run(["data", "inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lengths"] == [3]


def test_scored_responses_become_pairs_and_lists(tmp_path, capsys):
    rows = [{"prompt": "a", "response": text, "score": score} for text, score in (("x", 1), ("y", 0), ("z", 0.5))]
    path = write_lines(tmp_path / "s.jsonl", [*rows, {"prompt": "b", "responses": ["x", "y"], "scores": [1, 1]}])
    out = tmp_path / "out.jsonl"
    assert cli.run(["data", "pairs", str(path), "--out", str(out), "--per-prompt", "2"]) == 0
    pairs = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(pair["chosen"], pair["rejected"], pair["margin"]) for pair in pairs] == [("x", "y", 1.0), ("x", "z", 0.5)]
    assert "1 prompts left out" in capsys.readouterr().out
    assert cli.run(["data", "pairs", str(path), "--out", str(out)]) == 65, "an existing file is never overwritten"
    assert cli.run(["data", "pairs", str(path), "--out", str(tmp_path / "r.jsonl"), "--write", "rankings"]) == 0
    assert json.loads((tmp_path / "r.jsonl").read_text())["responses"] == ["x", "z", "y"]
