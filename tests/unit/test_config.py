"""The schema, YAML and overrides: what is read is what was written, and every knob has a name, a type and a bound."""

import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megarl.config import PpoRun, RewardRun, SftRun
from megarl.config_file import RUNS, draft_run, load_run, to_yaml
from megarl.errors import ConfigError
from megarl.knobs import knobs, leaves, nearest
from megarl.yaml_document import parse_document, parse_value, read_document
from tests.unit.tiny_run import PPO, SFT, write_run

MOST_KNOBS = 200  # the whole configuration; when one is added, look for one to remove


def test_there_are_not_too_many_knobs():
    declared = {(knob.owner, knob.name.rpartition(".")[2]) for run_type in RUNS.values() for knob in leaves(run_type)}
    assert len(declared) <= MOST_KNOBS
    for run_type in (SftRun, RewardRun):
        assert len(leaves(run_type)) <= 80
    assert len({(knob.owner, knob.name.rpartition(".")[2]) for knob in leaves(PpoRun)}) <= 185


def test_every_knob_says_what_it_expects():
    for run_type in RUNS.values():
        for name, knob in knobs(run_type).items():
            assert knob.expected, name


def test_a_run_is_frozen(tmp_path):
    run = load_run("ppo", write_run(tmp_path))
    with pytest.raises(ValueError):
        run.seed = 3
    with pytest.raises(ValueError):
        run.ppo.kl.coef = 3.0


@pytest.mark.parametrize("kind, text", [("ppo", PPO), ("sft", SFT), ("reward", SFT)])
def test_the_resolved_run_reads_back_equal(tmp_path, kind, text):
    run = load_run(kind, write_run(tmp_path, text), ["seed=7", "precision=fp32"])
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(run))
    assert load_run(kind, again) == run
    assert run.seed == 7


@pytest.mark.parametrize(
    "override, name, value",
    [
        ("parallel.tensor=4", "parallel.tensor", 4),
        ("actor.optimizer.lr=1e-6", "actor.optimizer.lr", 1e-6),
        ("actor.optimizer={lr: 0.5, clip_grad: 0}", "actor.optimizer.clip_grad", 0.0),
        ("rewards.0.weight=2", "rewards.0.weight", 2.0),
        ("rewards.1={kind: exact, weight: -1}", "rewards.1.weight", -1.0),
        ("rewards=[{kind: exact}, {kind: exact, weight: 3}]", "rewards.1.weight", 3.0),
        ("ppo.value_clip=null", "ppo.value_clip", None),
        ("ppo.value_clip=", "ppo.value_clip", None),
        ("ppo.kl.target=0.1", "ppo.kl.target", 0.1),
        ("data.split=a=b", "data.split", "a=b"),
        ("data.split=yes", "data.split", "yes"),
        ("data.split='12'", "data.split", "12"),
        ("data.columns.prompt=question", "data.columns", {"prompt": "question"}),
        ("data.sources=[{path: a, weight: 2}]", "data.sources.0.weight", 2.0),
        ("eval={path: x.jsonl}", "eval.path", Path("x.jsonl")),
        ("eval.path=x.jsonl", "eval.path", Path("x.jsonl")),
        ("rollout.kv_cache_bytes=1_000_000", "rollout.kv_cache_bytes", 1_000_000),
    ],
)
def test_overrides_are_read_as_yaml(tmp_path, override, name, value):
    found = load_run("ppo", write_run(tmp_path), [override])
    for part in name.split("."):
        found = found[int(part)] if part.isdecimal() else getattr(found, part)
    assert found == value and type(found) is type(value) or isinstance(value, Path) and found == value


def test_a_later_override_wins(tmp_path):
    assert load_run("ppo", write_run(tmp_path), ["seed=1", "seed=2"]).seed == 2


def test_home_is_expanded_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", "elsewhere")
    run = load_run("ppo", write_run(tmp_path), ["output_dir=~/runs", "tokenizer=$PLACE/tokenizer"])
    assert run.output_dir == tmp_path / "runs"
    assert run.tokenizer == Path("$PLACE/tokenizer")


def test_yaml_1_2_scalars():
    values = parse_document(
        "a: 1e-6\nb: yes\nc: 010\nd: 1:30\ne: 2024-01-01\nf: 1_000\ng: -3\nh: .5\ni: ~\nj: 0x10\nk: 1_\nl: off\nm: 1.\nn: '3'", "x"
    ).tree
    assert values == {
        "a": 1e-6,
        "b": "yes",
        "c": "010",
        "d": "1:30",
        "e": "2024-01-01",
        "f": 1000,
        "g": -3,
        "h": 0.5,
        "i": None,
        "j": 16,
        "k": "1_",
        "l": "off",
        "m": 1.0,
        "n": "3",
    }
    assert math.isinf(parse_value(".inf")) and math.isnan(parse_value(".nan"))
    assert parse_value("9" * 5000) == "9" * 5000


def test_merge_keys_and_anchors_work():
    document = parse_document("x: &a {b: 1, c: 2}\ny:\n  <<: *a\n  b: 3\n", "x")
    assert document.tree["y"] == {"b": 3, "c": 2} and not document.faults
    assert document.lines["y.b"] == 4


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text("abc: -#'\"é\n", max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abcxyz", min_size=1, max_size=3), inner, max_size=3),
        max_leaves=8,
    )
)
def test_what_safe_dump_writes_is_read_back(value):
    assert parse_document(yaml.safe_dump({"value": value}, allow_unicode=True), "x").tree == {"value": value}


@given(st.text(max_size=60))
def test_any_text_is_a_tree_or_one_line(text):
    try:
        parse_document(text, "x")
    except ConfigError as error:
        assert "\n" not in str(error) and str(error).startswith("x")


@pytest.mark.parametrize(
    "name, near",
    [
        ("parallel.tensr", ["parallel.tensor"]),
        ("microbatch_size", ["parallel.microbatch_size"]),
        ("ppo.microbatch_size", ["parallel.microbatch_size"]),
        ("ppo.batch_size", ["ppo.minibatch_size"]),
        ("lr", ["actor.optimizer.lr", "critic.optimizer.lr"]),
        ("actor.lr", ["actor.optimizer.lr"]),
        ("rollout.max_tokens", ["rollout.max_response_tokens"]),
        ("rewards.3.wieght", ["rewards.3.weight"]),
        ("train.total_steps", ["ppo.total_steps"]),
        ("clip_grad_norm", ["actor.optimizer.clip_grad", "critic.optimizer.clip_grad"]),
        ("qqqqqqqq", []),
    ],
)
def test_the_nearest_known_name(name, near):
    assert nearest(PpoRun, name) == near


def test_every_misspelt_knob_finds_its_way_home():
    """One letter lost anywhere in a last part still leads to the knob or to a name that is spelt the same."""
    for knob in leaves(PpoRun):
        parent, _, last = knob.name.replace("*", "0").rpartition(".")
        for index in range(len(last)) if len(last) > 4 else ():
            wrong = f"{parent}.{last[:index]}{last[index + 1 :]}".strip(".")
            if wrong.replace("0", "*") not in knobs(PpoRun):
                assert knob.name.replace("*", "0") in nearest(PpoRun, wrong), wrong


def test_a_faulty_run_is_still_known_elsewhere(tmp_path):
    draft = draft_run("ppo", write_run(tmp_path), ["seed=x", "ppo.total_steps=x", "actor.pth=y", "data=3"])
    assert len(draft.faults) == 4
    assert draft.run.seed == 0 and draft.run.ppo.minibatch_size == 16 and draft.run.parallel.tensor == 2


@pytest.mark.parametrize(
    "content, reason",
    [
        (None, "no such file"),
        (b"", "empty"),
        (b"# only a comment\n", "empty"),
        (b"- 1\n- 2\n", "found a list of 2"),
        (b"just text\n", "found 'just text'"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"a: [1, 2\nb: 3\n", "run.yaml:2: not valid YAML"),
        (b"a: 1\n\tb: 2\n", "run.yaml:2: not valid YAML"),
        (b"a: b: c\n", "run.yaml:1: not valid YAML"),
        (b"a: 1\n---\nb: 2\n", "run.yaml:2: not valid YAML"),
        (b"a: *nowhere\n", "run.yaml:1: not valid YAML"),
    ],
)
def test_a_file_without_a_run_is_one_line(tmp_path, content, reason):
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as raised:
        read_document(path)
    assert reason in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "value", ["!!python/object/apply:os.system [x]", "!!set {a: null}", "!!int text", "!!bool maybe", "!!timestamp 2024-01-01"]
)
def test_tags_run_nothing(value):
    document = parse_document(f"a: 1\nb: {value}\n", "x")
    assert document.tree["b"] in (None, "text") and (document.faults or document.tree["b"] == "text")


def test_a_directory_is_not_a_configuration(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_document(tmp_path)
