"""The shared-memory ring between two processes: what is written is read, two slots at most, and nobody waits for the dead."""

import multiprocessing
import os
import secrets
import signal
import time

import pytest
import torch

from megarl.bridge.ring import SHARED_MEMORY, RingReader, RingWriter
from megarl.errors import RolloutError

SLOT_BYTES = 1024
SIZES = (1, 255, 256, 257, 2000, 0, 7)  # elements; several need more than one slot


def soon(seconds: float = 20.0) -> float:
    return time.monotonic() + seconds


def read_all(name: str, replies) -> None:
    """Another process: sums of what arrives, then sleep."""
    reader = RingReader(name, "trainer rank 4")
    replies.send("open")
    for number, size in enumerate(SIZES):
        target = torch.empty(size)
        reader.receive(number, target, soon())
        replies.send(target.tolist())
    replies.recv()


@pytest.fixture
def ring():
    name = f"megarl-test-{secrets.token_hex(6)}"
    writer = RingWriter(name, SLOT_BYTES, "generator 0")
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=read_all, args=(name, theirs))
    process.start()
    assert ours.recv() == "open"
    writer.meet_reader()
    writer.unlink()
    assert not (SHARED_MEMORY / name).exists()
    yield writer, ours, process
    writer.close()
    process.kill()
    process.join()


def test_messages_larger_than_the_ring_arrive_in_order(ring):
    writer, replies, _ = ring
    messages = [torch.rand(size) for size in SIZES]
    for number, message in enumerate(messages):
        writer.send(number, message, soon())
    writer.drained(soon())
    assert [replies.recv() for _ in messages] == [message.tolist() for message in messages]


@pytest.mark.parametrize("fate", [signal.SIGKILL, signal.SIGSTOP])
def test_a_writer_does_not_wait_for_a_reader_that_is_gone_or_stuck(ring, fate):
    writer, _, process = ring
    os.kill(process.pid, fate)
    start = time.perf_counter()
    what = "ended in the middle" if fate == signal.SIGKILL else "did not take its weights in time"
    with pytest.raises(RolloutError, match=f"generator 0 {what}"):
        for number in range(4):
            writer.send(number, torch.zeros(256), time.monotonic() + 0.5)
    assert time.perf_counter() - start < 10


def test_a_reader_hears_of_a_writer_that_gives_up_and_of_a_skipped_sync():
    name = f"megarl-test-{secrets.token_hex(6)}"
    writer = RingWriter(name, SLOT_BYTES, "generator 0")
    reader = RingReader(name, "trainer rank 4")  # in the same process: both ends may be
    writer.unlink()
    writer.send(7, torch.arange(3.0), soon())
    with pytest.raises(RolloutError, match="trainer rank 4 sent 12 bytes of weight sync 7; expected 12 bytes of sync 6"):
        reader.receive(6, torch.empty(3), soon())
    reader.receive(7, torch.empty(3), soon())
    writer.close()
    with pytest.raises(RolloutError, match="trainer rank 4 gave up"):
        reader.receive(8, torch.empty(3), soon())
    reader.close()


def test_a_ring_that_nobody_made_or_that_does_not_fit(monkeypatch, tmp_path):
    with pytest.raises(RolloutError, match="of trainer rank 0 cannot be opened"):
        RingReader("megarl-test-nothing", "trainer rank 0")
    monkeypatch.setattr(os, "posix_fallocate", lambda *arguments: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(RolloutError, match="cannot be had .No space left on device."):
        RingWriter("megarl-test-full", 1 << 20, "generator 0")
    assert not (SHARED_MEMORY / "megarl-test-full").exists()
