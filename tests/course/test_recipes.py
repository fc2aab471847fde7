"""Every run in configs/ really trains: as its comment starts it, on toy models and data, shortened; and it leaves behind what it promises.

A recipe that starts from the results of others gets theirs, not stand-ins: runs/sft_8b, runs/reward_8b and so on fit together.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megarl.checkpoint.manifest import find_checkpoint
from megarl.config import LessonRun, PpoRun, Run, SampleRun
from megarl.config_file import load_run, to_yaml
from megarl.ppo.eval_sets import eval_sets, reported_names
from tests.recipes import RECIPES, ROOT, kind_of, shortened, write_world

LAYOUTS = {"gsm8k_grpo_8b": (1, 2), "gsm8k_ppo_8b": (2, 1)}  # tensor, pipeline; the others run on one rank
QUICK = ("configs/sft_8b.yaml",)
Trained = Callable[[Path], Run]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Trains a recipe, and before it those it starts from, once each; returns the shortened run with its output_dir made absolute."""
    root, done = write_world(tmp_path_factory.mktemp("recipes")), {}
    by_output = {load_run(kind_of(recipe), ROOT / recipe).output_dir.as_posix(): recipe for recipe in RECIPES}

    def train(recipe: Path) -> Run:
        if recipe not in done:
            tensor, pipeline = LAYOUTS.get(recipe.stem, (1, 1))
            run = load_run(kind_of(recipe), ROOT / recipe)
            overrides = shortened(run, tensor, pipeline)
            text = to_yaml(run).replace(f"output_dir: {run.output_dir}\n", "")
            for output in [output for output in by_output if output in text]:
                train(by_output[output])
            start(root, recipe, tensor * pipeline, overrides)
            done[recipe] = load_run(kind_of(recipe), ROOT / recipe, [*overrides, f"output_dir={root / run.output_dir}"])
        return done[recipe]

    return train


def start(root: Path, recipe: Path, ranks: int, overrides: list[str]) -> None:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MEGARL_", "RANK", "WORLD_SIZE"))}
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "torchrun.sh"), kind_of(recipe), str(ROOT / recipe), *overrides],
        env=own | {"MEGARL_VENV": "none", "MEGARL_PYTHON": sys.executable, "NPROC": str(ranks)},
        capture_output=True,
        text=True,
        cwd=root,
    )
    assert done.returncode == 0, f"{recipe} {' '.join(overrides)}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("recipe", [pytest.param(r, marks=[] if str(r) in QUICK else pytest.mark.slow, id=str(r)) for r in RECIPES])
def test_a_recipe_trains_and_leaves_what_it_promises(trained: Trained, recipe: Path) -> None:
    run = trained(recipe)
    assert json.loads((run.output_dir / "outcome.json").read_text())["outcome"] == "done"
    if isinstance(run, SampleRun):
        rows = [json.loads(line) for line in (run.output_dir / "samples.jsonl").read_text().splitlines()]
        assert len(rows) == 8 and all(len(row["responses"]) == len(row["scores"]) == 2 for row in rows)
        return
    lines = {line["step"]: line for line in map(json.loads, (run.output_dir / "metrics.jsonl").read_text().splitlines())}
    checkpoint = find_checkpoint(run.output_dir)
    assert checkpoint is not None and checkpoint.name == "step-00000002"
    assert bool(list(run.output_dir.rglob("events.out.tfevents.*"))) == run.log.tensorboard
    if isinstance(run, LessonRun):
        assert set(lines) >= {1, 2}
        assert any(name.startswith("eval/") for name in lines[2]) == (run.data.eval_path is not None), lines[2].keys()
        return
    assert isinstance(run, PpoRun) and {"rollout/logprob_gap", "reward/mean", "actor/loss"} <= lines[2].keys()
    assert ("critic/loss" in lines[2]) == (run.critic is not None)
    promised = {name for held_out in eval_sets(run) for name in reported_names(held_out)}
    of_average = {f"ema/{name}" for name in promised} if run.eval is not None and run.eval.ema else set()
    assert promised <= lines.get(0, {}).keys() and promised | of_average <= lines[1].keys() & lines[2].keys()
    assert run.checkpoint.keep_best is None or run.checkpoint.keep_best in promised
    assert ('"ema|' in (checkpoint / "manifest.json").read_text()) == (run.ppo.ema is not None)
    kinds = {json.loads(line)["kind"] for line in (run.output_dir / "samples.jsonl").read_text().splitlines()}
    assert kinds == {"rollout"} | ({"eval"} if promised else set()) | ({"ema eval"} if of_average else set())
