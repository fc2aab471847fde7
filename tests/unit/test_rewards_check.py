# ruff: noqa: E501 (expected lines stand as they are printed)
"""Wrong reward parts: one line each, before anything starts; and what every kind is built into."""

import json
import os
import re
from pathlib import Path

import pytest
import yaml

from megarl import cli
from megarl.config_file import load_run
from megarl.rewards.build import build_hook, build_scorer
from megarl.rewards.check import KNOBS, patience_s, reward_faults, url_fault
from megarl.rewards.scorer import Scorer
from tests.unit.reward_samples import scorer_rows
from tests.unit.tiny_run import write_run

FUNCTION = "package.module:function or path/to/file.py:function"
WRONG = {
    "[{kind: regex}]": "rewards.0.pattern: missing; expected the regular expression the whole response has to match for kind regex",
    "[{kind: regex, pattern: '(a'}]": "rewards.0.pattern: found '(a'; expected a regular expression of Python: missing ), unterminated subpattern at position 0",
    "[{kind: length}]": "rewards.0.target: missing; expected the number of response tokens that cost nothing for kind length",
    "[{kind: length, target: 16}]": "rewards.0.target: found 16; expected less than rollout.max_response_tokens 16, where the score is -1",
    "[{kind: exact, ngram: 2}]": "rewards.0.ngram: found 2 with kind exact; expected no ngram, or kind: repetition",
    "[{kind: exact}, {kind: exact, timeout_s: 9}]": "rewards.1.timeout_s: found 9 with kind exact; expected no timeout_s, or kind: math or function or http or code",
    "[{kind: function, function: mine}]": f"rewards.0.function: found 'mine'; expected {FUNCTION}",
    "[{kind: function, function: 'a b:c'}]": f"rewards.0.function: found 'a b:c'; expected {FUNCTION}",
    "[{kind: http}]": "rewards.0.urls: missing; expected the addresses of the reward server, such as [http://127.0.0.1:5000/score] for kind http",
    "[{kind: http, urls: ['http://example.org/x']}]": "rewards.0.urls.0: found 'http://example.org/x'; expected a host of this machine (localhost, 127.0.0.1, ::1) or one listed in hosts: add example.org there if it is meant",
    "[{kind: http, urls: ['file:///etc/passwd']}]": "rewards.0.urls.0: found 'file:///etc/passwd'; expected an address that starts with http:// or https://",
    "[{kind: http, urls: ['http://me:canary@localhost/']}]": "rewards.0.urls.0: found 'http://...@localhost/'; expected no user or password in an address: put a token into token_file or MEGARL_REWARD_TOKEN",
    "[{kind: http, urls: ['http://localhost/'], timeout_s: 600}]": "rewards.0.timeout_s: found 600; expected less than nine tenths of parallel.timeout_s 600: the other ranks wait",
    "[{kind: code, accept: [rot]}]": "rewards.0.accept.0: found 'rot'; expected one of 'root' or 'no_namespaces'",
    "[{kind: numeric, tolerance: -1}]": "rewards.0.tolerance: found -1; expected at least 0",
    "[{kind: exct}]": "rewards.0.kind: found 'exct'; expected one of 'exact', 'numeric', 'math', 'regex', 'length', 'repetition', 'function', 'http', 'code' or 'model'",
}
RIGHT = {
    "exact": "", "numeric": "tolerance: 0.01", "math": "", "regex": "pattern: a+", "length": "target: 3", "repetition": "ngram: 3",
    "function": "function: 'json:loads'", "http": "urls: ['http://localhost:5000/a']", "code": "accept: [root]",
}  # fmt: skip


@pytest.mark.parametrize("parts", WRONG)
def test_a_wrong_part_is_one_line(tmp_path, capsys, parts):
    assert cli.run(["ppo", str(write_run(tmp_path)), f"rewards={parts}", "--check"]) == 78
    assert capsys.readouterr().err.splitlines() == [f"megarl: error: command line: {WRONG[parts]}"]


def test_a_wrong_hook_is_one_line(tmp_path, capsys):
    assert cli.run(["ppo", str(write_run(tmp_path)), "reward_hook=shape", "--check"]) == 78
    assert capsys.readouterr().err.splitlines() == [f"megarl: error: command line: reward_hook: found 'shape'; expected {FUNCTION}"]


@pytest.mark.parametrize(
    ("parts", "more", "expected"),
    [
        ("[{kind: exact}, {kind: math}]", [], 0),
        ("[{kind: exact}, {kind: http, urls: ['http://127.0.0.1:9/']}]", [], 300),
        ("[{kind: http, urls: ['http://127.0.0.1:9/'], timeout_s: 50}]", ["reward_hook=math:dist"], 300),
        ("[{kind: http, urls: ['http://127.0.0.1:9/'], timeout_s: 400}]", ["reward_hook=math:dist"], 400),
        ("[{kind: code}]", ["parallel.timeout_s=1000"], 900),
    ],
)
def test_what_a_scorer_may_take_by_its_own_limits(tmp_path, parts, more, expected):
    assert patience_s(load_run("ppo", write_run(tmp_path), [f"rewards={parts}", *more])) == expected


def test_every_kind_that_is_no_model_is_built(tmp_path):
    assert set(RIGHT) == set(KNOBS) - {"model"}
    for kind, knobs in RIGHT.items():
        if kind == "math":
            pytest.importorskip("math_verify")
        run = load_run("ppo", write_run(tmp_path), [f"rewards=[{{kind: {kind}, {knobs}}}]", "reward_hook=json:loads"])
        scorer: Scorer = build_scorer("rewards.0", run.rewards[0], run)
        assert callable(scorer.score), kind
    assert build_hook(run) is not None


def test_what_this_machine_lacks_is_a_notice_for_a_check(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("megarl.rewards.check.find_spec", lambda name: None)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    parts = (
        "[{kind: math}, {kind: code}, {kind: function, function: 'no.py:f'}, {kind: http, urls: ['http://localhost/'], token_file: none}]"
    )
    assert cli.run(["ppo", str(write_run(tmp_path)), f"rewards={parts}", "reward_hook=gone.py:f", "--check"]) == 0
    warnings = [line.partition("command line: ")[2] for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert warnings == [
        "rewards.0.kind: math needs the package math-verify, which is not installed here; run pip install 'megarl[math]'",
        "rewards.1.kind: code runs responses as the user of this process, who is root: no limit on processes holds for root; expected another user, or rewards.1.accept: [root]",
        "rewards.2.function: no.py is no file; expected the Python file of the function",
        "rewards.3.token_file: none is no file; expected one that holds the token",
        "reward_hook: gone.py is no file; expected the Python file of the function",
    ]


@pytest.mark.parametrize(
    ("url", "is_allowed"),
    [
        ("http://127.0.0.1:5000/x", True), ("https://localhost/x", True), ("http://[::1]:80/", True), ("http://judge.lan/x", True),
        ("http://judge.lan.example.org/x", False), ("http://169.254.169.254/latest", False), ("http://localhost:99999999/", False),
        ("ftp://localhost/", False), ("http://", False), ("localhost:5000", False), ("http://localhost@example.org/", False),
        ("http://[::1/", False),
    ],
)  # fmt: skip
def test_only_listed_hosts_are_asked(url, is_allowed):
    assert (url_fault(url, ("judge.lan",)) == "") is is_allowed


def test_the_examples_of_the_docs_are_right(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "my_rewards.py").write_text(example)
    blocks = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        keys = yaml.safe_load(block.replace("my_rewards.py", str(tmp_path / "my_rewards.py")))
        overrides = [f"{name}={json.dumps(value)}" for name, value in keys.items()]
        run = load_run("ppo", write_run(tmp_path), [*overrides, "rollout.max_response_tokens=1024"])
        assert list(reward_faults(run)) == []
        if run.reward_hook is not None:
            rows = scorer_rows(["a" * 500, "a" * 1500])
            scores = build_scorer("rewards.0", run.rewards[0], run).score(*rows)
            assert scores == [-0.5, -1.5] and build_hook(run)(*rows, scores, {"function": scores}) == [0.5, -0.5]
