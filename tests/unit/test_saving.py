"""One rank's part of a save: what is written, what is said when the disk or the other ranks fail, and that an exit waits."""

import errno
import multiprocessing
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megarl.checkpoint import saving
from megarl.checkpoint.files import PlannedFile
from megarl.checkpoint.manifest import StoredFile, verify
from megarl.checkpoint.publish import NOT_WRITTEN, stored
from megarl.checkpoint.saving import Background, SaveJob, explain
from megarl.checkpoint.side_by_side import side_by_side
from megarl.errors import CheckpointError


def job_of(staging: Path, rank: int = 0, world_size: int = 1, timeout_s: float = 5.0, publish=None, size: int = 1000) -> SaveJob:
    """Two small files, one of a model, one of the rank itself."""
    staging.mkdir(exist_ok=True)
    (staging / "actor").mkdir(exist_ok=True)
    tensors = {"w": torch.arange(float(size)), "b": torch.ones(3, dtype=torch.bfloat16)}
    plan = [
        PlannedFile(f"actor/weights-{rank:05d}-0.safetensors", stored("weights", NOT_WRITTEN, model="actor", rank=rank), tensors),
        PlannedFile(f"random-{rank:05d}.safetensors", stored("random", NOT_WRITTEN, rank=rank), {"torch": torch.get_rng_state()}),
    ]
    return SaveJob("step-00000001", staging, plan, rank, world_size, timeout_s, publish)


def test_notes_of_all_ranks_become_one_list(tmp_path):
    found: list[dict[str, StoredFile]] = []
    first = job_of(tmp_path / "s", 0, 3, publish=found.append)
    others = [job_of(tmp_path / "s", rank, 3) for rank in (1, 2)]
    threads = [threading.Thread(target=job.write) for job in others]
    first.write()
    for thread in threads:
        thread.start()
    first.conclude()
    (files,) = found
    assert len(files) == 6 and {file.rank for file in files.values()} == {0, 1, 2}
    for path, file in files.items():
        verify(tmp_path / "s", path, file)
    assert not list((tmp_path / "s").glob("part-*")), "notes are taken away"
    assert torch.equal(load_file(tmp_path / "s" / "actor" / "weights-00002-0.safetensors")["w"], torch.arange(1000.0))


def test_late_ranks_are_named(tmp_path):
    job = job_of(tmp_path / "s", 0, 4, timeout_s=0.3, publish=lambda files: None)
    job.write()
    job_of(tmp_path / "s", 2, 4).write()
    with pytest.raises(CheckpointError, match=r"ranks \[1, 3\] have not written their files in checkpoint.timeout_s=0.3 s"):
        job.conclude()


def test_a_note_that_is_damaged_is_refused(tmp_path):
    job = job_of(tmp_path / "s", publish=lambda files: None)
    job.write()
    (tmp_path / "s" / "part-00000.json").write_text('{"a": 1')
    with pytest.raises(CheckpointError, match="part-00000.json is damaged"):
        job.conclude()


def test_waiting_ends_when_another_rank_failed(tmp_path):
    pending = Background(job_of(tmp_path / "s", 0, 2, timeout_s=60, publish=lambda files: None))
    pending.job.is_given_up.set()
    pending.wait()
    assert "given up" in str(pending.error) and not pending.is_running


def limited(staging: Path, sender) -> None:
    job = job_of(staging, size=100_000)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.RLIM_INFINITY))
    try:
        job.write()
        sender.send("written")
    except CheckpointError as error:
        sender.send(str(error))


def test_a_file_that_may_not_grow_says_how_much_is_needed(tmp_path):
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=limited, args=(tmp_path / "s", sender))
    process.start()
    said = receiver.recv()
    process.join()
    assert str(tmp_path / "s" / "actor" / "weights-00000-0.safetensors") in said and "File too large" in said
    assert "needs 40" in said and " are free" in said and "checkpoint.keep_last" in said
    assert not list((tmp_path / "s").glob("part-*"))


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, ["No space left", "needs 123 bytes", "are free", "keep_last"]),
        (errno.EDQUOT, ["quota", "needs 123 bytes", "are free"]),
        (errno.EROFS, ["Read-only", "make it writable, or move output_dir"]),
        (errno.ENOENT, ["No such file", "has vanished"]),
        (errno.ESTALE, ["Stale", "has vanished"]),
        (errno.EIO, ["Input/output error"]),
    ],
)
def test_disk_errors_name_path_cause_and_way_out(tmp_path, code, words):
    import os

    said = explain(OSError(code, os.strerror(code), str(tmp_path / "missing" / "x")), tmp_path, 123)
    assert str(tmp_path / "missing" / "x") in said and all(word in said for word in words)


SCRIPT = """
import sys, time
from pathlib import Path
from megarl.checkpoint import sharded
from megarl.checkpoint.saving import Background
from tests.unit.test_saving import job_of
place, hang, timeout = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
write = sharded._write_all
def slowly(file, block):
    time.sleep(hang)
    write(file, block)
sharded._write_all = slowly
Background(job_of(place / "s", timeout_s=timeout, publish=lambda files: (place / "published").touch()))
"""


@pytest.mark.parametrize(("hang", "timeout", "is_published"), [(0.1, 60, True), (30, 0.5, False)])
def test_an_exit_waits_for_the_thread_and_says_what_is_lost(tmp_path, hang, timeout, is_published):
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path), str(hang), str(timeout)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and (tmp_path / "published").exists() == is_published, done.stderr
    assert ("rank 0 exits without the checkpoint s: still writing" in done.stderr) == (not is_published), done.stderr
    assert time.monotonic() - began < 100


def test_files_are_worked_on_side_by_side():
    both = threading.Barrier(2, timeout=20)  # nobody passes alone
    assert side_by_side(lambda item: both.wait() and item or item, ["a", "b"], 2) == ["a", "b"]
    begun = []

    def fails(item: int) -> None:
        begun.append(item)
        raise ValueError(str(item))

    with pytest.raises(ValueError, match="0"):
        side_by_side(fails, list(range(50)), 1)
    assert begun == [0] and side_by_side(fails, [], 4) == []


def test_a_bug_behind_the_training_is_seen_in_front(tmp_path):
    def broken(files):
        raise ZeroDivisionError("ours")

    pending = Background(job_of(tmp_path / "s", publish=broken))
    with pytest.raises(ZeroDivisionError, match="ours"):
        pending.wait()
    assert pending.has_failed and saving.POLL_S[0] < saving.POLL_S[1]
