"""A resumed run equals one that never stopped, bit for bit; what cannot be resumed is refused; damage and failed saves harm nothing."""

import contextlib
import io
import json
import shutil
import time
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
    "plain": {"precision": "fp32", "parallel": {"microbatch_size": 4, "distributed_optimizer": False}},
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
        told(sft_run(root, whole, 8, precision="bf16", parallel=CASES["tp2"]["parallel"])),
        told(sft_run(root, whole, 8, model={"path": root / "wide" / "shape", "random_init": True}, **tp2)),
        told(sft_run(root, whole, 8, checkpoint={"resume": False}, **tp2)),
        told(reward_run(root, "reward", 8, **tp2)),
        told(sft_run(root, whole, 6, **tp2)),  # finished: nothing to do, nothing refused
    ]

    return messages


def flip(checkpoint: Path, pattern: str) -> Path:
    """One bit of the first file that matches."""
    path = sorted(checkpoint.glob(pattern))[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path


def fall_back(rank: int, world_size: int, root: Path) -> list[str]:
    """The newest checkpoint is damaged where rank 1 reads; then so are all."""
    checkpoints = root / "dp2-whole" / "checkpoints"

    def copy() -> None:
        for output in ("strict", "fallen", "lost"):
            shutil.copytree(checkpoints, root / output / "checkpoints")
            flip(root / output / "checkpoints" / "step-00000006", "actor/optimizer-00001-*")
        flip(root / "lost" / "checkpoints" / "step-00000003", "manifest.json")

    on_rank_0(rank, copy)
    case = CASES["dp2"]
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        told_all = [
            told(sft_run(root, "strict", 6, checkpoint=KEEP | {"strict": True}, **case)),
            told(sft_run(root, "fallen", 6, checkpoint=KEEP, **case)),
            told(sft_run(root, "lost", 6, checkpoint=KEEP, **case)),
        ]
    return [*told_all, said.getvalue()]


@contextlib.contextmanager
def writing(instead):
    """`instead(original, file, block)` is called where a block of a checkpoint is written."""
    from megarl.checkpoint import sharded

    original = sharded._write_all
    sharded._write_all = lambda file, block: instead(original, file, block)
    try:
        yield
    finally:
        sharded._write_all = original


def fail_while_saving(rank: int, world_size: int, root: Path, background: str) -> list[str]:
    """The disk of one rank fills up in the middle of its second checkpoint; the run is started again with room."""
    output = f"failing-{background}"

    def full(original, file, block) -> None:
        if rank == 1 and "step-00000004" in file.name and "optimizer" in file.name:
            raise OSError(28, "No space left on device", file.name)
        original(file, block)

    run = sft_run(root, output, 6, checkpoint={"every_steps": 2, "background": background}, **CASES["tp2"])
    with writing(full):
        first = told(run)
    newest = (root / output / "checkpoints" / "latest").read_text()
    lines = read_metrics(root, output)
    dist.barrier()
    survived = sft_run(
        root, output + "-survived", 6, checkpoint={"every_steps": 2, "background": background, "max_failures": 1}, **CASES["tp2"]
    )
    said = io.StringIO()
    with writing(full), contextlib.redirect_stderr(said):
        second = told(survived)
    return [first, newest, told(run), max(lines), second, said.getvalue()]


def wait_or_skip(rank: int, world_size: int, root: Path, policy: str) -> str:
    """Rank 1 needs far longer to write a checkpoint than a step takes."""

    def slowly(original, file, block) -> None:
        if rank == 1 and "weights-00001" in file.name and len(block) == 8:  # the first block: the size of the header
            time.sleep(1.0)
        original(file, block)

    said = io.StringIO()
    run = sft_run(root, f"slow-{policy}", 5, checkpoint={"every_steps": 1, "keep_last": 9, "background": policy}, **CASES["tp2"])
    with writing(slowly), contextlib.redirect_stderr(said):
        assert told(run) == "trained"
    return said.getvalue()


def miss_the_deadline(rank: int, world_size: int, root: Path) -> str:
    def hangs(original, file, block) -> None:
        if rank == 1 and "weights-00001" in file.name and len(block) == 8:  # the first block: the size of the header
            time.sleep(6.0)
        original(file, block)

    run = sft_run(root, "late", 4, checkpoint={"every_steps": 2, "timeout_s": 1}, **CASES["tp2"])
    with writing(hangs):
        return told(run)


def lose_the_directory(rank: int, world_size: int, root: Path) -> str:
    """Somebody removes the checkpoints while the run is between two of them."""
    from megarl.checkpoint.store import Checkpoints

    original = Checkpoints.due

    def removed(self, state, *measured) -> bool:
        if state.step == 3:
            on_rank_0(rank, lambda: shutil.rmtree(self.directory))
        return original(self, state, *measured)

    Checkpoints.due = removed
    try:
        return told(sft_run(root, "vanished", 6, checkpoint={"every_steps": 2, "background": "off"}, **CASES["tp2"]))
    finally:
        Checkpoints.due = original


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


def everything(rank: int, world_size: int, root: Path) -> dict:
    stop_and_resume(rank, world_size, root)
    return {
        "refused": refuse(rank, world_size, root),
        "fallen": fall_back(rank, world_size, root),
        "failed": {background: fail_while_saving(rank, world_size, root, background) for background in ("off", "wait")},
        "slow": {policy: wait_or_skip(rank, world_size, root, policy) for policy in ("wait", "skip")},
        "late": miss_the_deadline(rank, world_size, root),
        "vanished": lose_the_directory(rank, world_size, root),
        "full": start_on_a_full_disk(rank, world_size, root),
    }


def manifest(root: Path, output: str, step: int) -> dict:
    return json.loads((root / output / "checkpoints" / f"step-{step:08d}" / "manifest.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_resume_equals_no_stop(runs, case):
    root, _ = runs
    whole, resumed = (read_metrics(root, f"{case}-{kind}") for kind in ("whole", "resumed"))
    assert sorted(resumed) == [4, 5, 6]
    assert {step: whole[step] for step in resumed} == resumed, "metrics differ"
    whole, resumed = (manifest(root, f"{case}-{kind}", 6) for kind in ("whole", "resumed"))
    hashes = {path: file["blake3"] for path, file in whole["files"].items()}
    assert hashes == {path: file["blake3"] for path, file in resumed["files"].items()}, "weights, optimizer or random states differ"
    assert whole["state"] == resumed["state"]
    assert manifest(root, f"{case}-whole", 3)["files"]["actor/weights-00000-0.safetensors"]["blake3"] not in hashes.values()
    assert (whole["parent"], resumed["attempt"]) == ("step-00000003", 1)
    assert whole["metrics"]["loss"] == read_metrics(root, f"{case}-whole")[6]["loss"]


def test_each_element_is_written_once(runs):
    root, _ = runs

    def written(case: str, kind: str) -> list[str]:
        return [path for path in manifest(root, case, 6)["files"] if kind in path]

    assert written("dp2-whole", "weights") == ["actor/weights-00000-0.safetensors"], "the second replica owns nothing"
    assert len(written("pp2-whole", "weights")) == 2
    assert len(written("dp2-whole", "optimizer")) == 2, "the distributed optimizer: each replica its ranges"
    assert written("plain-whole", "optimizer") == ["actor/optimizer-00000-0.safetensors"], "without it: the first replica alone"


def test_what_cannot_be_resumed_is_refused_on_every_rank(runs):
    _, results = runs
    assert results[0]["refused"] == results[1]["refused"]
    precision, model, resume, course, finished = results[0]["refused"]
    assert all(message.startswith("CheckpointError") for message in (precision, model, resume, course))
    assert "written in precision fp32; this run has bf16" in precision
    assert "hidden_size 32 in the checkpoint, 64 in the run" in model
    assert "checkpoint.resume is false" in resume and "step-00000006" in resume
    assert "sft checkpoint of ['actor']" in course and "reward run of ['reward']" in course
    assert finished == "trained"


def test_a_damaged_checkpoint_is_left_aside_or_refused(runs):
    root, results = runs
    for strict, fallen, lost, _ in (result["fallen"] for result in results):
        assert strict.startswith("CheckpointError") and "optimizer-00001-0.safetensors has BLAKE3" in strict
        assert "its manifest says" in strict and "checkpoint.strict is true" in strict and "rank 1" in strict
        assert fallen == "trained"
        assert "all 2 checkpoints are damaged" in lost
    said = results[0]["fallen"][-1]
    assert "optimizer-00001-0.safetensors has BLAKE3" in said and "step-00000006 is left aside" in said
    assert "continuing from step-00000003" in said
    names = {path.name for path in (root / "fallen" / "checkpoints").iterdir() if not path.name.startswith(".")}
    assert names == {"latest", "step-00000003", "step-00000006", "damaged-2-step-00000006"}
    assert json.loads((root / "fallen" / "checkpoints" / "step-00000006" / "manifest.json").read_text())["attempt"] == 2
    assert read_metrics(root, "fallen")[6] == read_metrics(root, "dp2-whole")[6]


@pytest.mark.parametrize("background", ["off", "wait"])
def test_a_failed_save_leaves_the_previous_checkpoint(runs, background):
    root, results = runs
    for failed, newest, again, last_step, second, _ in (result["failed"][background] for result in results):
        assert failed.startswith(CheckpointError.__name__) and "No space left on device" in failed and "rank 1" in failed
        assert "optimizer-00001-0.safetensors" in failed and " bytes, " in failed and " are free" in failed
        assert newest == "step-00000002\n"
        assert last_step <= (4 if background == "off" else 5), "the failure is raised no later than at the next step"
        assert again == second == "trained"
    left = {path.name for path in (root / f"failing-{background}" / "checkpoints").iterdir() if not path.name.startswith(".attempt")}
    assert left == {"step-00000004", "step-00000006", "latest"}, "the failed attempt was swept away"
    assert sorted(read_metrics(root, f"failing-{background}")) == list(range(7))
    said = results[0]["failed"][background][-1]
    assert "step-00000004 was not saved" in said and "No space left" in said and "training goes on" in said
    left = {path.name for path in (root / f"failing-{background}-survived" / "checkpoints").iterdir()}
    assert left >= {"step-00000002", "step-00000006"} and "step-00000004" not in left


def test_a_second_save_waits_or_is_left_out(runs):
    root, results = runs

    def steps(policy: str) -> list[int]:
        return sorted(int(path.name[5:]) for path in (root / f"slow-{policy}" / "checkpoints").glob("step-*"))

    assert steps("wait") == [1, 2, 3, 4, 5] and "left out" not in results[0]["slow"]["wait"]
    assert set(steps("skip")) >= {1, 5} and len(steps("skip")) < 5
    for step in {2, 3, 4} - set(steps("skip")):
        assert f"step-{step:08d} is left out" in results[0]["slow"]["skip"]


def test_a_rank_that_is_late_is_named(runs):
    root, results = runs
    for result in results:
        assert "timeout_s=1 s" in result["late"] and result["late"].startswith("CheckpointError")
    assert not list((root / "late" / "checkpoints").glob("step-*"))


def test_a_directory_that_vanishes_is_named_and_not_made_anew(runs):
    root, results = runs
    for result in results:
        assert result["vanished"].startswith("CheckpointError") and "vanished" in result["vanished"]
        assert str(root / "vanished" / "checkpoints") in result["vanished"]
    assert not (root / "vanished" / "checkpoints").exists()


def test_a_disk_without_room_for_a_checkpoint_is_refused_before_training(runs):
    root, results = runs
    for result in results:
        assert result["full"].startswith("SetupError") and "a checkpoint needs" in result["full"]
    assert not list((root / "full").glob("metrics.jsonl")) or read_metrics(root, "full") == {}
