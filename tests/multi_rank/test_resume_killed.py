"""2N steps equal N steps, kill -9, N steps: every number that is logged and every byte of weights, optimizer and random states."""

import json
import os
import signal
from pathlib import Path

import pytest

from tests.course.lesson_files import reward_run, sft_run, write_files
from tests.multi_rank.role_cases import MIXTURE
from tests.ranks import run_ranks

STEPS = 8
PACKED = {"max_tokens_per_microbatch": 48}
EXPERTS = {"expert": 2, "microbatch_size": 4}

# (ranks, model, settings, the rank that is killed and the step in which it is)
CASES = {
    "dp2 distributed": (2, "dense", {"precision": "bf16", "parallel": {"microbatch_size": 4}}, 1, 6),
    "dp2 packed": (2, "dense", {"precision": "fp32", "parallel": {"microbatch_size": 4, **PACKED}}, 0, 5),
    "tp2 pp2": (4, "dense", {"precision": "fp32", "parallel": {"tensor": 2, "sequence": True, "pipeline": 2, "microbatch_size": 4}}, 3, 7),
    "tp2 pp2 bf16": (4, "dense", {"precision": "bf16", "parallel": {"tensor": 2, "pipeline": 2, "microbatch_size": 4}}, 0, 6),
    "mixture ep2": (2, "mixture", {"precision": "fp32", "parallel": EXPERTS}, 1, 5),
    "mixture ep2 pp2 packed": (
        4,
        "mixture",
        {"precision": "bf16", "parallel": {"pipeline": 2, **EXPERTS, **PACKED}},
        2,
        8,
    ),
}
SLOW = [name for name in CASES if name != "dp2 distributed"]


def train(rank: int, world_size: int, root: Path, output: str, settings: dict, kind: str, killed: int, at: int) -> None:
    """A lesson; rank `killed` dies in step `at`, after backward and before it has reported anything."""
    from megarl.course.reward_model import train_reward
    from megarl.course.sft import train_sft
    from megarl.models.learner import Learner
    from megarl.parallel import groups

    original = Learner._prepared_grad_norm

    def dying(self):
        if rank == killed and self.num_steps == at - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self)

    Learner._prepared_grad_norm = dying
    checkpoint = {"every_steps": 2, "keep_last": 9}
    if kind == "reward":
        model = {"path": root / "shape", "random_init": True, "optimizer": {"lr": 1e-2}}
        run = reward_run(root, output, STEPS, checkpoint=checkpoint, **settings | {"model": model})
        train_reward(run, groups.initialize(run.parallel, run.seed))
    else:
        run = sft_run(root, output, STEPS, checkpoint=checkpoint, **settings)
        train_sft(run, groups.initialize(run.parallel, run.seed))


def in_hex(root: Path, output: str) -> list[dict]:
    """Every logged line without what a clock says."""
    lines = [json.loads(line) for line in (root / output / "metrics.jsonl").read_text().splitlines()]
    return [{name: float(value).hex() for name, value in line.items() if not name.startswith("seconds/")} for line in lines]


def hashes(root: Path, output: str) -> dict[str, str]:
    manifest = json.loads((root / output / "checkpoints" / f"step-{STEPS:08d}" / "manifest.json").read_text())
    return {path: file["blake3"] for path, file in manifest["files"].items()} | {
        "counts": str(manifest["models"]),
        "state": str(manifest["state"]),
    }


def check(tmp_path: Path, name: str, kind: str = "sft") -> None:
    world_size, model, settings, killed, at = CASES[name]
    root = write_files(tmp_path, **MIXTURE if model == "mixture" else {"num_hidden_layers": 4})
    run_ranks(train, world_size, root, "whole", settings, kind, -1, 0)
    with pytest.raises(AssertionError, match=f"rank .* of {world_size} (died|failed)"):
        run_ranks(train, world_size, root, "killed", settings, kind, killed, at)
    last = in_hex(root, "killed")[-1]
    assert float.fromhex(last["step"]) == at - 1, "it died where it was told to"
    run_ranks(train, world_size, root, "killed", settings, kind, -1, 0)
    whole, resumed = in_hex(root, "whole"), in_hex(root, "killed")
    assert len(whole) == STEPS + 1 and resumed == whole
    assert hashes(root, "killed") == hashes(root, "whole")


def test_killed_and_resumed_equals_never_stopped(tmp_path):
    check(tmp_path, "dp2 distributed")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SLOW)
def test_killed_and_resumed_equals_never_stopped_under_other_layouts(tmp_path, name):
    check(tmp_path, name)


@pytest.mark.slow
def test_a_reward_lesson_resumes_exactly_too(tmp_path):
    check(tmp_path, "dp2 distributed", "reward")
