"""R7: a disk that is full, too small, limited, read-only or gone. The message has the numbers, old checkpoints stay, training may go on."""

import ctypes
import errno
import os
import re
import resource
import shutil
import subprocess
from pathlib import Path

import pytest

from megarl.checkpoint import manifest as manifests
from megarl.checkpoint.inspection import verify_checkpoint
from megarl.errors import MegarlError
from tests.course.lesson_files import write_files
from tests.faults.workshop import Trap, forked, in_workshop, make_bench

CLONE_NEWNS = 0x20000
MIB = 1 << 20


def told(work) -> str:
    """The message of the user's mistake that `work` ends in; empty when it succeeds."""
    try:
        work()
    except MegarlError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def mount_tmpfs(directory: Path, num_bytes: int) -> None:
    """A file system of this size at `directory`, seen by this process alone. Raises `PermissionError` where that is forbidden."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS) != 0:
        raise PermissionError(os.strerror(ctypes.get_errno()))
    for command in (["mount", "--make-rprivate", "/"], ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(directory)]):
        if subprocess.run(command, capture_output=True).returncode:
            raise PermissionError(" ".join(command))


def remount_read_only(directory: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(directory)], check=True)


def state_of(directory: Path) -> dict:
    """The checkpoints that are left and whether each is what was written."""
    steps = manifests.step_directories(directory)
    return {path.name: [finding.found for finding in verify_checkpoint(path, 1).findings] for path in steps}


def on_a_small_disk(root: Path, fault: str, background: str) -> dict:
    """One checkpoint is saved, then `fault` strikes in the middle of the second; then it is lifted and the training goes on."""
    bench = make_bench(root, background=background, max_failures=1 if fault == "full, going on" else 0)
    bench.directory.mkdir(parents=True)

    def work() -> dict:
        from megarl.checkpoint import publish

        try:
            mount_tmpfs(bench.directory, 8 * MIB if fault == "too small" else 100 * MIB)
        except PermissionError as error:
            return {"skip": str(error)}
        if fault == "too small":
            return {"told": told(bench.restore), "left": bench.names()}
        state = bench.save(bench.restore())
        publish.SPARE_BYTES = 0
        filler = bench.directory / "filler"

        def strike() -> None:
            if fault == "read-only":
                remount_read_only(bench.directory)
                return
            with filler.open("wb", buffering=0) as file:
                while True:
                    try:
                        file.write(bytes(64 << 10))
                    except OSError as error:
                        assert error.errno == errno.ENOSPC
                        return

        trap = Trap(at_byte=200_000, act=strike) if fault != "read-only" else Trap(at_call=1, act=strike)
        message = told(lambda: bench.save(state))
        result = {"told": message, "left": state_of(bench.directory), "names": bench.names(), "struck": trap.num_bytes >= 200_000}
        if fault == "full, going on":
            filler.unlink()
            trap.at_byte = None
            result |= {"later": told(lambda: bench.save(state.advance(16))), "left later": state_of(bench.directory)}
        return result

    status, result = forked(work)
    assert status == 0, result
    return result


def in_the_middle(root: Path, fault: str) -> dict:
    """The same for faults that need no file system of their own."""
    bench = make_bench(root, background="off")

    def work() -> dict:
        state = bench.save(bench.restore())
        if fault == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
        elif fault == "vanished":
            Trap(at_byte=200_000, act=lambda: shutil.rmtree(bench.directory))
        else:
            Trap(at_byte=200_000, act=over_quota)
        return {"told": told(lambda: bench.save(state)), "left": state_of(bench.directory)}

    status, result = forked(work)
    assert status == 0, result
    return result


def over_quota() -> None:
    raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


def on_small_disk(tmp_path, fault, background="off") -> dict:
    result = in_workshop(on_a_small_disk, write_files(tmp_path), fault, background)
    if "skip" in result:
        pytest.skip(f"this host forbids mounts: {result['skip']}")
    return result


def test_a_disk_that_is_too_small_is_told_before_training(tmp_path):
    result = on_small_disk(tmp_path, "too small")
    assert re.search(r"SetupError: .*/checkpoints has \d+ bytes free; a checkpoint needs \d+: free some disk", result["told"]), result
    assert not [name for name in result["left"] if name.startswith(("step-", ".staging"))]


@pytest.mark.parametrize("background", ["off", "wait"])
def test_a_disk_that_fills_up_during_a_save(tmp_path, background):
    result = on_small_disk(tmp_path, "full", background)
    reason = r"CheckpointError: .*/checkpoints/.*: No space left on device: .*needs \d+ bytes, \d+ are free: free some disk"
    assert result["struck"] and re.search(reason, result["told"]), result
    assert result["left"] == {"step-00000001": []}
    assert not [name for name in result["names"] if name.startswith(".staging")]


def test_training_goes_on_when_told_to(tmp_path):
    result = on_small_disk(tmp_path, "full, going on", "wait")
    assert result["told"] == "" and result["left"] == {"step-00000001": []}
    assert result["later"] == "" and result["left later"] == {"step-00000001": [], "step-00000003": []}


def test_a_disk_that_becomes_read_only(tmp_path):
    result = on_small_disk(tmp_path, "read-only")
    assert re.search(r"CheckpointError: .*/checkpoints/.*: Read-only file system: make it writable, or move output_dir", result["told"])
    assert result["left"] == {"step-00000001": []}


def test_a_limit_on_the_size_of_files(tmp_path):
    result = in_workshop(in_the_middle, write_files(tmp_path), "limit")
    assert re.search(r"CheckpointError: .*: File too large: .*needs \d+ bytes, \d+ are free", result["told"])
    assert result["left"] == {"step-00000001": []}


def test_a_quota(tmp_path):
    """Quotas need a file system made for them: the error number is the kernel's, put where the write returns it."""
    result = in_workshop(in_the_middle, write_files(tmp_path), "quota")
    assert re.search(r"CheckpointError: .*: Disk quota exceeded: .*needs \d+ bytes, \d+ are free", result["told"])
    assert result["left"] == {"step-00000001": []}


def test_a_directory_that_vanishes(tmp_path):
    result = in_workshop(in_the_middle, write_files(tmp_path), "vanished")
    assert re.search(
        r"CheckpointError: .*/checkpoints/.*: No such file or directory: the directory of checkpoints has vanished", result["told"]
    )
    assert result["left"] == {}
