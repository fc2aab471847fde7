"""A resumed run equals one that never stopped, bit for bit; what cannot be resumed is refused; a failed save harms nothing."""

import json
import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

from megarl.errors import CheckpointError, MegarlError
from tests.course.lesson_files import read_metrics, reward_run, sft_run, write_files
from tests.ranks import run_ranks

CASES = {
    "tp2": {"precision": "fp32", "parallel": {"tensor": 2, "sequence": True, "microbatch_size": 4}},
    "dp2": {"precision": "bf16", "parallel": {"microbatch_size": 4}},
    "pp2": {"precision": "bf16", "parallel": {"pipeline": 2, "microbatch_size": 4, "distributed_optimizer": False}},
    "cp2": {"precision": "bf16", "parallel": {"context": 2, "microbatch_size": 4}},
    "vpp2": {"precision": "fp32", "parallel": {"pipeline": 2, "virtual_pipeline": 2, "microbatch_size": 4}},
}
KEEP = {"every_steps": 3, "keep_last": 3}


def train(run):
    from megarl.course.reward_model import train_reward
    from megarl.course.sft import train_sft
    from megarl.parallel import groups

    return (train_reward if "reward" in run.output_dir.name else train_sft)(run, groups.initialize(run.parallel, run.seed))


def told(run) -> str:
    try:
        train(run)
    except MegarlError as error:
        return f"{type(error).__name__}: {error}"
    return "trained"


def on_rank_0(rank: int, work) -> None:
    if rank == 0:
        work()
    dist.barrier()


def stop_and_resume(rank: int, world_size: int, root: Path) -> None:
    for name, case in CASES.items():
        train(sft_run(root, f"{name}-whole", 6, checkpoint=KEEP, **case))
        step = root / f"{name}-whole" / "checkpoints" / "step-00000003"
        on_rank_0(rank, lambda step=step, name=name: shutil.copytree(step, root / f"{name}-resumed" / "checkpoints" / step.name))
        train(sft_run(root, f"{name}-resumed", 6, checkpoint=KEEP, **case))


def refuse(rank: int, world_size: int, root: Path) -> list[str]:
    whole, tp2 = "tp2-whole", CASES["tp2"]
    checkpoints = root / whole / "checkpoints"
    on_rank_0(rank, lambda: shutil.copytree(checkpoints, root / "reward" / "checkpoints"))
    messages = [
        told(sft_run(root, whole, 8, precision="fp32", parallel=CASES["dp2"]["parallel"])),
        told(sft_run(root, whole, 8, model={"path": root / "wide" / "shape", "random_init": True}, **tp2)),
        told(sft_run(root, whole, 8, checkpoint={"resume": False}, **tp2)),
        told(reward_run(root, "reward", 8, **tp2)),
        told(sft_run(root, whole, 6, **tp2)),  # finished: nothing to do, nothing refused
    ]

    def flip() -> None:
        path = root / "dp2-whole" / "checkpoints" / "step-00000006" / "actor" / "optimizer-00001.safetensors"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    on_rank_0(rank, flip)
    return [*messages, told(sft_run(root, "dp2-whole", 8, **CASES["dp2"]))]


def fail_while_saving(rank: int, world_size: int, root: Path) -> list[str]:
    """The disk of one rank fills up in the middle of its second checkpoint; the run is started again with room."""
    from megarl.checkpoint import sharded

    run = sft_run(root, "failing", 4, checkpoint={"every_steps": 2}, **CASES["tp2"])
    original, files = sharded._write_all, []

    def full(file, block) -> None:
        files.append(file.name)
        if rank == 1 and "step-00000004" in file.name and "optimizer" in file.name:
            raise OSError(28, "No space left on device", file.name)
        original(file, block)

    sharded._write_all = full
    try:
        first = told(run)
    finally:
        sharded._write_all = original
    newest = (root / "failing" / "checkpoints" / "latest").read_text()
    dist.barrier()
    return [first, newest, told(run)]


def start_on_a_full_disk(rank: int, world_size: int, root: Path) -> str:
    """Rank 0, which looks at the disk, finds room for the spare bytes and half a checkpoint."""
    from megarl.checkpoint import publish

    original = publish.shutil.disk_usage
    num_bytes = sum(path.stat().st_size for path in (root / "dp2-whole" / "checkpoints" / "step-00000003" / "actor").iterdir())
    publish.shutil.disk_usage = lambda path: original(path)._replace(free=publish.SPARE_BYTES + num_bytes // 2)
    try:
        return told(sft_run(root, "full", 4, **CASES["dp2"]))
    finally:
        publish.shutil.disk_usage = original


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = write_files(tmp_path_factory.mktemp("resume"), num_hidden_layers=4)
    write_files(root / "wide", hidden_size=64, num_hidden_layers=4)
    results = run_ranks(everything, 2, root)
    return root, results


def everything(rank: int, world_size: int, root: Path) -> list:
    stop_and_resume(rank, world_size, root)
    return [refuse(rank, world_size, root), fail_while_saving(rank, world_size, root), start_on_a_full_disk(rank, world_size, root)]


def manifest(root: Path, output: str, step: int) -> dict:
    return json.loads((root / output / "checkpoints" / f"step-{step:08d}" / "manifest.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_resume_equals_no_stop(runs, case):
    root, _ = runs
    whole, resumed = (read_metrics(root, f"{case}-{kind}") for kind in ("whole", "resumed"))
    assert sorted(resumed) == [4, 5, 6]
    assert {step: whole[step] for step in resumed} == resumed, "metrics differ"
    whole, resumed = (manifest(root, f"{case}-{kind}", 6) for kind in ("whole", "resumed"))
    hashes = {path: file["sha256"] for path, file in whole["files"].items()}
    assert hashes == {path: file["sha256"] for path, file in resumed["files"].items()}, "weights, optimizer or random states differ"
    assert whole["state"] == resumed["state"]
    assert manifest(root, f"{case}-whole", 3)["files"]["actor/weights-00000.safetensors"]["sha256"] not in hashes.values()


def test_each_element_is_written_once(runs):
    root, _ = runs
    written = [path for path in manifest(root, "dp2-whole", 6)["files"] if "weights" in path]
    assert written == ["actor/weights-00000.safetensors"], "the second replica owns nothing"
    assert len([path for path in manifest(root, "pp2-whole", 6)["files"] if "weights" in path]) == 2


def test_what_cannot_be_resumed_is_refused_on_every_rank(runs):
    _, results = runs
    assert results[0][0] == results[1][0]
    layout, model, resume, course, finished, flipped = results[0][0]
    assert all(message.startswith("CheckpointError") for message in (layout, model, resume, course, flipped))
    assert "tp2 pp1 dp1 fp32" in layout and "tp1 pp1 dp2 fp32" in layout
    assert "hidden_size 32 in the checkpoint, 64 in the run" in model
    assert "checkpoint.resume is false" in resume and "step-00000006" in resume
    assert "sft checkpoint of ['actor']" in course and "reward run of ['reward']" in course
    assert "optimizer-00001.safetensors has SHA-256" in flipped and "rank 1" in flipped
    assert finished == "trained"


def test_a_failed_save_leaves_the_previous_checkpoint(runs):
    root, results = runs
    for failed, newest, again in (result[1] for result in results):
        assert failed.startswith(CheckpointError.__name__) and "No space left on device" in failed and "rank 1" in failed
        assert newest == "step-00000002\n"
        assert again == "trained"
    left = {path.name for path in (root / "failing" / "checkpoints").iterdir()}
    assert left == {"step-00000002", "step-00000004", "latest"}, "the failed attempt was swept away"
    assert sorted(read_metrics(root, "failing")) == [0, 1, 2, 3, 4]


def test_a_disk_without_room_for_a_checkpoint_is_refused_before_training(runs):
    root, results = runs
    for _, _, refused in results:
        assert refused.startswith("SetupError") and "a checkpoint needs" in refused
    assert not list((root / "full").glob("metrics.jsonl")) or read_metrics(root, "full") == {}
