"""Held-out examples of a mixture whose experts data ranks share: unequal shares neither hang nor show."""

import json
from pathlib import Path

import pytest

from tests.course.lesson_files import dpo_run, read_metrics, sft_run, write_files
from tests.ranks import run_ranks

MIXTURE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}
# Held-out rows: with blocks of 8 a rank has two of them and the other one; one row leaves a rank without any.
COUNTS = (17, 1)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = write_files(tmp_path_factory.mktemp("mixture"), **MIXTURE)
    lines = (root / "held_out.jsonl").read_text().splitlines(keepends=True)
    for count in COUNTS:
        (root / f"held_out-{count}.jsonl").write_text("".join(lines[:count]))
    return root


def runs(root: Path, name: str, parallel: dict) -> list:
    """Lessons on the held-out rows of each count, which are looked at before and after the one step."""
    made = []
    for count in COUNTS:
        data = {"path": root / "train.jsonl", "eval_path": root / f"held_out-{count}.jsonl", "max_tokens": 16}
        for lesson in (sft_run, dpo_run) if count > 1 else (sft_run,):
            kind = lesson.__name__.removesuffix("_run")
            made.append(lesson(root, f"{kind}-{count}-{name}", 1, parallel={"microbatch_size": 1} | parallel, data=data))
    return made


def teach(rank: int, world_size: int, lessons: list) -> list[int]:
    from megarl.config import DpoRun
    from megarl.course.dpo import train_dpo
    from megarl.course.sft import train_sft
    from megarl.parallel import groups

    steps = []
    for run in lessons:
        train = train_dpo if isinstance(run, DpoRun) else train_sft
        steps.append(train(run, groups.initialize(run.parallel, run.seed)).step)
    return steps


@pytest.mark.slow
def test_ranks_that_share_experts_evaluate_unequal_shares(root):
    shared, alone = runs(root, "shared", {"expert": 2}), runs(root, "alone", {})
    assert run_ranks(teach, 2, shared) == [[1] * len(shared)] * 2
    assert run_ranks(teach, 1, alone) == [[1] * len(alone)]
    for one, other in zip(shared, alone, strict=True):
        found, expected = (read_metrics(root, run.output_dir.name) for run in (one, other))
        assert json.dumps(sorted(found[0])) == json.dumps(sorted(expected[0])) and "eval/loss" in found[0]
        for step in (0, 1):
            held_out = {name: value for name, value in expected[step].items() if name.startswith("eval/")}
            assert {name: found[step][name] for name in held_out} == pytest.approx(held_out, rel=2e-3, abs=2e-4), (
                one.output_dir.name,
                step,
            )
