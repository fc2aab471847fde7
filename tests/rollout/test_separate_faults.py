"""Generators and ranks that fail: everybody learns of it soon, by name, and no half-updated generator is ever used."""

import os
import signal
import time

import pytest

from megarl.errors import RolloutError
from tests.ranks import run_ranks
from tests.rollout.test_separate import TP2, Trainer
from tests.rollout.tiny_models import save_tiny

SOON_S = 20.0


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [save_tiny("llama", seed, folder) for seed in (0, 1)]


class Killer:
    """A wire that kills a generator process after its third message."""

    def __init__(self, wire, pid: int):
        self.wire, self.pid, self.count = wire, pid, 0

    def post(self, sends, receives):
        self.count += 1
        if self.count == 3:
            os.kill(self.pid, signal.SIGKILL)
        return self.wire.post(sends, receives)

    def __getattr__(self, name):
        return getattr(self.wire, name)


def refusal(work) -> tuple[str, float]:
    """The message of the RolloutError that `work` ends with, and after how many seconds."""
    start = time.perf_counter()
    with pytest.raises(RolloutError) as caught:
        work()
    return str(caught.value), time.perf_counter() - start


def start(folders, tensor: int, joint: bool, timeout_s: float):
    from megarl.rollout.engine import make_greedy_requests

    trainer = Trainer(folders, TP2, tensor, joint, timeout_s=timeout_s)
    trainer.load(folders[0])
    trainer.sync.push(trainer, 0)
    requests = make_greedy_requests(trainer.prompts(), trainer.rollout, stop_token_ids=())
    assert len(trainer.engine.generate(requests)) == len(requests)
    return trainer, requests


def die_in_a_sync(rank: int, world_size: int, folders, tensor: int, joint: bool) -> dict:
    trainer, requests = start(folders, tensor, joint, timeout_s=60)
    pids = [peer.pid for peer in trainer.engine.generators.peers]
    if rank == 0:
        trainer.sync.transport.wire = Killer(trainer.sync.wire, pids[-1])
    report = {"sync": refusal(lambda: trainer.sync.push(trainer, 1))}
    report["after"] = refusal(lambda: trainer.engine.generate(requests))
    report["version"] = trainer.engine.policy_version
    trainer.engine.close()
    report["left"] = [pid for pid in pids if is_alive(pid)]
    return report


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def die_while_generating(rank: int, world_size: int, folders) -> dict:
    trainer, requests = start(folders, 1, False, timeout_s=60)
    for peer in trainer.engine.generators.peers:
        os.kill(peer.pid, signal.SIGSTOP)  # so that it cannot have finished
    underway = trainer.engine.submit(requests)
    for peer in trainer.engine.generators.peers:
        os.kill(peer.pid, signal.SIGKILL)
    return {"generate": refusal(lambda: trainer.engine.collect(underway))}


def skip_a_sync(rank: int, world_size: int, folders) -> dict:
    trainer, requests = start(folders, 1, False, timeout_s=4)
    report = {"fault": refusal(lambda: trainer.sync.push(trainer, 1) if rank == 0 else trainer.engine.generate(requests))}
    trainer.engine.close()
    return report


@pytest.mark.parametrize(
    "tensor, joint", [(1, False), pytest.param(2, True, marks=pytest.mark.slow), pytest.param(2, False, marks=pytest.mark.slow)]
)
def test_a_generator_that_dies_in_the_middle_of_a_sync(models, tensor, joint):
    for report in run_ranks(die_in_a_sync, 2, models, tensor, joint, timeout_s=200):
        print(report)
        message, seconds = report["sync"]
        assert "generator 0" in message and seconds < SOON_S
        assert "no weights yet" in report["after"][0] and report["version"] is None
        assert report["left"] == []


@pytest.mark.slow
def test_a_generator_that_dies_while_generating(models):
    for report in run_ranks(die_while_generating, 2, models, timeout_s=200):
        message, seconds = report["generate"]
        assert "generator 0 was ended by SIGKILL" in message and seconds < SOON_S


@pytest.mark.slow
def test_a_rank_that_skips_a_sync(models):
    first, second = run_ranks(skip_a_sync, 2, models, timeout_s=200)
    assert "rank 1 did not come to weight sync 2 within 4 s" in first["fault"][0]
    assert "rank 0 did not come to generation 2 within 4 s" in second["fault"][0]
    assert max(first["fault"][1], second["fault"][1]) < SOON_S
