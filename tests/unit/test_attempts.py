"""Two starts of one run alive at once: only the newer one publishes, whatever the moment."""

import multiprocessing
import os
import random
import time

import pytest

from megarl.checkpoint.attempts import Attempt, newest, sweep
from megarl.checkpoint.manifest import FORMAT, Manifest, StoredLayout, read_manifest
from megarl.checkpoint.publish import publish
from megarl.checkpoint.sharded import write_text
from megarl.checkpoint.train_state import TrainState
from megarl.errors import FencedError

TRIALS = 50


def write_step(attempt: Attempt, step: int) -> None:
    """What `Checkpoints` does on one rank, small."""
    attempt.check()
    try:
        write_and_publish(attempt, step)
    except OSError:  # swept while it was written
        attempt.check()
        raise


def write_and_publish(attempt: Attempt, step: int) -> None:
    staging = attempt.staging(f"step-{step:08d}")
    staging.mkdir()
    write_text(staging / "a.txt", f"step {step}")
    state = TrainState(step=step).to_json()
    manifest = Manifest(
        format=FORMAT, course="sft", state=state, layout=StoredLayout(), models={}, files={}, run={"attempt": attempt.number}
    )
    publish(staging, attempt.directory / f"step-{step:08d}", manifest, attempt.check)


def publish_for_ever(attempt: Attempt, first: int, sender) -> None:
    """Step after step, until it is told that it lost its turn."""
    step = first
    while True:
        try:
            write_step(attempt, step)
        except FencedError as error:
            sender.send(("fenced", str(error)))
            return
        except OSError as error:  # swept, and yet no newer start: must not be
            sender.send(("failed", repr(error)))
            return
        step += 1


def steps(directory) -> set[str]:
    return {path.name for path in directory.glob("step-*")}


def test_an_older_start_never_publishes_after_a_newer_one_looked(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # more steps in the same time: the order of events is what counts
    context, rng = multiprocessing.get_context("fork"), random.Random(0)
    old, first = Attempt.take(tmp_path), 1
    for trial in range(TRIALS):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=publish_for_ever, args=(old, first, sender), daemon=True)
        process.start()
        time.sleep(rng.uniform(0.0, 0.02))
        new = Attempt.take(tmp_path)
        sweep(tmp_path)
        seen = steps(tmp_path)
        told, message = receiver.recv()
        process.join()
        assert told == "fenced", message
        assert f"start {new.number} of this run" in message and "has taken over" in message
        assert steps(tmp_path) == seen, f"trial {trial}: a fenced start has published"
        for name in seen:
            read_manifest(tmp_path / name)
        old, first = new, max((int(name[5:]) for name in seen), default=0) + 1
    assert first > 1, "the older start did publish before"
    assert len(list(tmp_path.glob(".attempt-*"))) == 1 and newest(tmp_path) == TRIALS + 1


def test_numbers_are_taken_once(tmp_path):
    numbers = [Attempt.take(tmp_path).number for _ in range(3)]
    assert numbers == [1, 2, 3]
    Attempt(tmp_path, 3).check()
    with pytest.raises(FencedError, match="start 3 of this run .process .* has taken over; this is start 2"):
        Attempt(tmp_path, 2).check()


def test_a_sweep_takes_left_overs_and_follows_no_link(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("x")
    directory = tmp_path / "checkpoints"
    (directory / ".staging-1-step-00000001" / "actor").mkdir(parents=True)
    (directory / ".staging-1-step-00000001" / "link").symlink_to(outside)
    (directory / ".staging-2-step-00000002").symlink_to(outside)
    (directory / ".trash-step-00000001").mkdir()
    (directory / "step-00000003").mkdir()
    sweep(directory)
    assert [path.name for path in directory.iterdir()] == ["step-00000003"] and (outside / "kept").exists()
