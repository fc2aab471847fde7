"""kill -9 at any moment of a save leaves a complete newest checkpoint, never older than the last one that was reported saved.

In the foreground a save is reported when it is published; in the background when the one before it is.
"""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from megarl.checkpoint import manifest as manifests
from megarl.checkpoint.sharded import whole
from megarl.checkpoint.sources import CheckpointSource
from tests.course.lesson_files import sft_run, write_files

NUM_KILLS = 3
NORM = "model.norm.weight"


def save_for_ever(root: Path, background: str, sender) -> None:
    """Checkpoint after checkpoint, each with the number of its step in every weight. Told through `sender` when a save returned."""
    from megarl.checkpoint.sources import open_start
    from megarl.checkpoint.store import Checkpoints
    from megarl.course.lesson import Student
    from megarl.data.tokenizers import load_tokenizer
    from megarl.parallel import groups
    from megarl.ppo.roles import build_learner

    run = sft_run(root, "run", 10_000, checkpoint={"background": background})
    layout = groups.initialize(run.parallel, run.seed)
    spec, source = open_start(run.model, "actor", 0)
    learner, pieces = build_learner(spec, "actor", run.model, run, layout, source, 10)
    students = {"actor": Student(spec, learner, pieces)}
    checkpoints = Checkpoints("sft", run, layout, load_tokenizer(run.tokenizer), 10_000)
    state = checkpoints.restore_or_start(students)
    sender.send(state.step)
    while True:
        state = state.advance(16)
        for piece in pieces:
            piece.view.fill_(float(state.step))
        checkpoints.due(state)
        checkpoints.save(state, students)
        sender.send(state.step)


@pytest.mark.parametrize("background", ["off", "wait"])
def test_a_killed_writer_leaves_a_complete_checkpoint(tmp_path, background):
    root, behind = write_files(tmp_path), int(background != "off")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megarl.checkpoint.store", "megarl.ppo.roles", "megarl.course.lesson"])
    rng, last_saved = random.Random(0), 0
    for _ in range(NUM_KILLS):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=save_for_ever, args=(root, background, sender), daemon=True)
        process.start()
        sender.close()
        resumed_at = receiver.recv()
        assert resumed_at >= last_saved - behind, "the run went on from its newest checkpoint"
        if resumed_at:
            last_saved = max(last_saved, resumed_at + behind)  # a report may have been lost with its writer
        if last_saved <= behind:
            last_saved = [receiver.recv() for _ in range(1 + behind)][-1]
        time.sleep(rng.uniform(0.0, 0.15))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        try:
            while True:
                last_saved = max(last_saved, receiver.recv())
        except EOFError:
            pass
        newest = manifests.find_checkpoint(root / "run")
        manifest = manifests.read_manifest(newest)
        for path, file in manifest.files.items():
            manifests.verify(newest, path, file)
        step = manifest.state["step"]
        assert last_saved - behind <= step <= last_saved + 1 and newest.name == f"step-{step:08d}"
        weights = CheckpointSource(newest, "actor").read(NORM, whole((32,)))
        assert torch.equal(weights, torch.full((32,), float(step))), "weights and progress are of the same step"
    left = [path.name for path in (root / "run" / "checkpoints").iterdir()]
    assert len([name for name in left if name.startswith("step-")]) <= 3 and len(left) <= 7, left
