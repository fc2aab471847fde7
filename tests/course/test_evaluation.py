"""Evaluation on held-out sets beside real PPO: training does not notice it, layouts agree on it, and the best step is saved by itself."""

import json
from pathlib import Path

import pytest

from megarl.config import PpoRun
from tests.course.test_ppo import ppo_run, read_metrics
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow

SETS = ("sums", "again")
STEPS = 4


def eval_section(root: Path) -> dict:
    data = {"path": root / "data" / "heldout.jsonl", "max_prompt_tokens": 6}
    sums = {"name": "sums", "data": data, "num_prompts": 7, "samples": 3, "temperature": 1.3}
    sums["metrics"] = [{"kind": "numeric"}, {"kind": "regex", "pattern": "[0-9]+"}, {"kind": "length", "target": 2}]
    again = {"name": "again", "data": data, "num_prompts": 3, "metrics": [{"kind": "exact"}]}
    return {"path": root / "data" / "heldout.jsonl", "every_steps": 2, "num_prompts": 7, "sets": [sums, again]}


def short_run(root: Path, output: str, **changes: object) -> PpoRun:
    ppo = {"total_steps": STEPS, "minibatch_size": 16, "kl": {"coef": 0.0}}
    best = {"every_steps": 3, "keep_last": 9, "keep_best": "eval/sums/response_length", "background": "off"}
    return ppo_run(
        root, output, **{"ppo": ppo, "eval": eval_section(root), "checkpoint": best, "rewards": [{"kind": "length", "target": 1}]} | changes
    )


def train_them(rank: int, world_size: int, runs: list[PpoRun]) -> None:
    from megarl.parallel import groups
    from megarl.ppo.assembly import build_parts
    from megarl.ppo.loop import train

    for run in runs:
        layout = groups.initialize(run.parallel, run.seed)
        train(run, layout, build_parts(run, layout))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    from megarl.quickstart.make_data import make_data

    root = tmp_path_factory.mktemp("evaluation")
    make_data(root / "data", seed=0)
    two = {"parallel": {"tensor": 2, "sequence": True, "microbatch_size": 8}}
    runs = [short_run(root, "dp2"), short_run(root, "plain", eval=None, checkpoint={"background": "off"}), short_run(root, "tp2", **two)]
    run_ranks(train_them, 2, runs)
    return root


def split(line: dict) -> tuple[dict, dict]:
    """What is said about training, and about held-out prompts."""
    held_out = {name: value for name, value in line.items() if name.startswith("eval/")}
    return {name: value for name, value in line.items() if name not in held_out}, held_out


def test_training_does_not_notice(trained):
    evaluated, plain = read_metrics(trained, "dp2"), read_metrics(trained, "plain")
    assert [split(line)[0] for line in evaluated[1:]] == plain
    assert not any(split(line)[1] for line in plain)


def test_every_set_reports_its_metrics_when_due(trained):
    lines = read_metrics(trained, "dp2")
    assert [line["step"] for line in lines if split(line)[1]] == [0, 2, 4]
    found = split(lines[-1])[1]
    names = ["numeric", "numeric/mean@3", "numeric/pass@1", "numeric/pass@2", "numeric/pass@3"]
    names += ["regex", "regex/mean@3", "regex/pass@1", "regex/pass@2", "regex/pass@3", "length", "length/mean@3"]
    wanted = {f"eval/sums/{name}" for name in (*names, "response_length", "truncated_share")}
    wanted |= {f"eval{name}" for name in ("/accuracy", "/response_length", "/truncated_share")}
    assert set(found) == wanted | {f"eval/again/{name}" for name in ("exact", "response_length", "truncated_share")}
    assert found["eval/sums/regex/pass@1"] <= found["eval/sums/regex/pass@2"] <= found["eval/sums/regex/pass@3"]
    assert len({line["eval/sums/length/mean@3"] for line in lines if "eval/sums/length" in line}) > 1  # the draws follow the policy


def test_layouts_agree_before_training_to_the_last_bit(trained):
    assert read_metrics(trained, "dp2")[0] == read_metrics(trained, "tp2")[0]


def test_samples_of_every_set_are_kept(trained):
    samples = [json.loads(line) for line in (trained / "dp2" / "samples.jsonl").read_text().splitlines()]
    told = [sample for sample in samples if sample["kind"] == "eval" and sample["step"] == 2]
    # the first two of rank 0, whose share of a set of three is one prompt
    expected = [(None, None), (None, None), ("sums", 0), ("sums", 1), ("again", 0)]
    assert [(sample.get("set"), sample.get("sample")) for sample in told] == expected
    assert {"prompt", "response", "answer", "numeric", "regex", "length"} <= told[2].keys() and "accuracy" in told[0]


def test_a_new_best_is_saved_between_the_saves(trained):
    lines = {line["step"]: line.get("eval/sums/response_length") for line in read_metrics(trained, "dp2")}
    expected = {3, STEPS} | ({2} if lines[2] > -1 else set())  # the first evaluation after a step is the best so far
    found = {int(path.name[5:]) for path in (trained / "dp2" / "checkpoints").glob("step-*")}
    assert found == expected
