"""What `megarl sample` writes: lines by prompt, the best alone, and files that an interrupted run goes on with."""

import json

import pytest

from megarl.config import LessonData, PromptData, SampleConfig
from megarl.data.demonstrations import DemonstrationSet
from megarl.data.prompts import PromptSet
from megarl.data.rankings import RankingSet
from megarl.data.tokenizers import load_tokenizer
from megarl.errors import ConfigError
from megarl.records import Completion, Prompt, Trajectory
from megarl.sampling.part_files import SampleFiles
from megarl.sampling.rows import row_of
from tests.unit.text_files import character_tokenizer_directory, write_lines


class Letters:
    """A tokenizer of one letter a token; 0 is end-of-text."""

    def decode_response(self, token_ids):
        return "".join(chr(96 + token) for token in token_ids if token)


def trajectory(tokens: tuple[int, ...], reward: float) -> Trajectory:
    prompt = Prompt(3, (7,), "b", "g")
    return Trajectory(prompt, Completion(3, 0, tokens, (0.0,) * len(tokens), "stop", 0), reward, {"exact": reward, "length": -reward})


def test_a_line_holds_all_responses_to_a_prompt():
    own = [trajectory((1, 0), 0.5), trajectory((2, 2, 0), 1.0), trajectory((3, 0), 1.0)]
    row = row_of(own[0].prompt, own, SampleConfig(), True, Letters())
    assert row == {
        "prompt_id": 3,
        "prompt": "g",
        "answer": "b",
        "responses": ["a", "bb", "c"],
        "num_tokens": [2, 3, 2],
        "finish_reasons": ["stop"] * 3,
        "scores": [0.5, 1.0, 1.0],
        "scores/exact": [0.5, 1.0, 1.0],
        "scores/length": [-0.5, -1.0, -1.0],
        "pass_rate": pytest.approx(2 / 3),
    }
    assert "scores" not in row_of(own[0].prompt, own, SampleConfig(), False, Letters())


def test_the_best_alone_is_the_first_of_the_highest_scores():
    own = [trajectory((1, 0), 0.5), trajectory((2, 2, 0), 1.0), trajectory((3, 0), 1.0)]
    row = row_of(own[0].prompt, own, SampleConfig(keep="best", pass_score=0.4), True, Letters())
    assert (row["response"], row["score"], row["score/length"], row["num_tokens"], row["finish_reason"]) == ("bb", 1.0, -1.0, 3, "stop")
    assert row["pass_rate"] == 1.0 and not {"responses", "scores"} & row.keys()


def test_a_chat_is_written_whole_and_read_as_it_was(tmp_path):
    tokenizer = load_tokenizer(character_tokenizer_directory(tmp_path))
    chat = [{"role": role, "content": text} for role, text in (("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"))]
    rows = [{"messages": chat}, {"prompt": chat[:2]}, {"prompt": chat[:1]}, {"prompt": "a"}, {"messages": chat[1:2]}]
    asked = PromptSet(PromptData(path=write_lines(tmp_path / "asked.jsonl", rows), chat_template=True), tokenizer).prompts
    answers = [
        [Trajectory(prompt, Completion(0, i, (*tokenizer.encode(text), 1), (), "stop", 0), i) for i, text in enumerate("xy")]
        for prompt in asked
    ]
    files = {}
    for keep in ("all", "best"):
        lines = [row_of(p, own, SampleConfig(keep=keep), True, tokenizer) for p, own in zip(asked, answers, strict=True)]
        assert [line["prompt"] for line in lines] == [chat, chat[:2], chat[:1], "a", "a"]
        files[keep] = write_lines(tmp_path / f"{keep}.jsonl", lines)
    again = PromptSet(PromptData(path=files["all"], chat_template=True), tokenizer).prompts
    lists = RankingSet(LessonData(path=files["all"], chat_template=True), tokenizer).rankings
    learned = DemonstrationSet(LessonData(path=files["best"], chat_template=True), tokenizer).examples
    assert [p.token_ids for p in again] == [p.token_ids for p in asked]
    for prompt, ranking, demonstration in zip(asked, lists, learned, strict=True):
        start = len(prompt.token_ids)
        assert ranking.num_prompt_tokens == start and {r[:start] for r in ranking.responses} == {prompt.token_ids}
        assert (
            demonstration.token_ids[:start] == prompt.token_ids
            and demonstration.loss_mask[start]
            and not any(demonstration.loss_mask[:start])
        )


def test_an_interrupted_run_goes_on_and_merges_in_order(tmp_path):
    settings = {"seed": 1, "data": {"path": "x"}}
    first, second = (SampleFiles(tmp_path, rank) for rank in (0, 1))
    assert first.start(settings) == set()
    first.append([{"prompt_id": 5, "prompt": "é"}, {"prompt_id": 0}])
    second.append([{"prompt_id": 2}])
    with open(tmp_path / "parts" / "rank-00001.jsonl", "ab") as file:
        file.write(b'{"prompt_id": 7, "pro')  # killed in the middle of a line
    alone = SampleFiles(tmp_path, 1)
    assert alone.start(settings) == {0, 2, 5}
    alone.append([{"prompt_id": 7, "prompt": "whole"}])
    assert alone.merge() == 4
    merged = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [row["prompt_id"] for row in merged] == [0, 2, 5, 7] and merged[2]["prompt"] == "é" and merged[3]["prompt"] == "whole"
    assert alone.start(settings) == {0, 2, 5, 7}


def test_samples_of_other_settings_are_not_mixed(tmp_path):
    SampleFiles(tmp_path, 0).start({"seed": 1, "data": {"path": "x"}, "sample": {}})
    with pytest.raises(ConfigError, match="output_dir.*another data, seed"):
        SampleFiles(tmp_path, 0).start({"seed": 2, "data": {"path": "y"}, "sample": {}})
