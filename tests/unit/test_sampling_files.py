"""What `megarl sample` writes: lines by prompt, the best alone, and files that an interrupted run goes on with."""

import json

import pytest

from megarl.config import SampleConfig
from megarl.errors import ConfigError
from megarl.records import Completion, Prompt, Trajectory
from megarl.sampling.part_files import SampleFiles
from megarl.sampling.rows import row_of


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
