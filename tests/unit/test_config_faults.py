"""A corpus of wrong configurations: each gives exactly these lines, all at once, exit code 78, no traceback, and nothing is started."""

import json
import sys

import pytest

from megarl import cli
from tests.unit.config_faults import CASES
from tests.unit.tiny_run import PPO, SFT, write_run, write_shape, write_tokenizer


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_wrong_configuration_is_refused(tmp_path, monkeypatch, capsys, case):
    text = PPO if case.kind == "ppo" else SFT
    assert case.change[0] in text or case.change[0] == "FILE"
    path = write_run(tmp_path, text.replace(*case.change))
    write_shape(tmp_path / "wide", vocab_size=128)
    write_tokenizer(tmp_path / "wide", 130)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("not JSON")
    if case.change[0] == "FILE":
        path = tmp_path / case.change[1]
    if "wandb_project" in "".join(case.overrides):
        monkeypatch.setitem(sys.modules, "wandb", None)
        monkeypatch.setattr("megarl.run_files.find_spec", lambda name: None)
    loaded = set(sys.modules)
    code = cli.run([case.kind, str(path), *(word.replace("ROOT", str(tmp_path)) for word in case.overrides), *case.flags])
    output = capsys.readouterr()
    lines = [line.replace(str(tmp_path), "ROOT") for line in output.err.splitlines()]
    assert lines == [f"megarl: error: {line}" for line in case.expected]
    assert code == 78
    assert output.out == ""
    assert not {name for name in set(sys.modules) - loaded if name.split(".")[0] in ("torch", "megatron", "vllm")}


def test_the_corpus_is_large_enough():
    assert len(CASES) >= 30 and len({case.name for case in CASES}) == len(CASES)


def test_the_base_runs_are_right(tmp_path, capsys):
    """What the corpus spoils is otherwise whole: no case passes for another reason than its own."""
    for kind, text in (("ppo", PPO), ("sft", SFT), ("reward", SFT)):
        assert cli.run([kind, str(write_run(tmp_path / kind, text)), "--check"]) == 0
        output = capsys.readouterr()
        assert output.err == "" and "warning" not in output.out


def test_a_path_and_its_shape_may_differ_in_what_is_no_shape(tmp_path, capsys):
    path = write_run(tmp_path)
    write_shape(tmp_path / "longer", max_position_embeddings=4096, torch_dtype="bfloat16")
    assert cli.run(["ppo", str(path), f"actor.shape={tmp_path / 'longer'}", "--check"]) == 0
    config = json.loads((tmp_path / "actor" / "config.json").read_text())
    assert config["max_position_embeddings"] == 64, capsys.readouterr()
