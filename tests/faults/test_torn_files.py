"""R22: metrics of a run that was killed are readable to the last whole line, and a resumed run has every step once."""

import json
import os
import random
import signal
import time

from megarl.metrics.writers import JsonLines
from megarl.operations.events import EventLog, read_events
from tests.faults.workshop import forked

SAMPLE = {"text": "caf\u00e9 \u4f60\u597d\u2028next\u0085line \U0001f600", "n": 1.5}


def lines_of(path):
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def write_steps(path, first, last):
    log = JsonLines(path)
    log.start(first - 1)
    for step in range(first, last + 1):
        log.write(step, SAMPLE | {"step_again": step})
    log.close()


def test_a_file_cut_at_any_byte_is_continued(tmp_path):
    write_steps(tmp_path / "whole.jsonl", 1, 3)
    data = (tmp_path / "whole.jsonl").read_bytes()
    path = tmp_path / "metrics.jsonl"
    for end in range(len(data) + 1):
        path.write_bytes(data[:end])
        whole = data[:end].count(b"\n")
        write_steps(path, whole + 1, 4)
        assert [line["step"] for line in lines_of(path)] == [1, 2, 3, 4], end
        assert all(line["text"] == SAMPLE["text"] for line in lines_of(path))


def test_what_a_power_cut_leaves_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for left in (bytes(300), bytes(30) + b"\n", b'{"step": 3', b'{"step": 3}garbage\n', b"\xff\xfe\n", b"[1]\n", b'{"loss": 1}\n', b"\n\n"):
        write_steps(path, 1, 2)
        path.write_bytes(path.read_bytes() + left)
        write_steps(path, 3, 4)
        assert [line["step"] for line in lines_of(path)] == [1, 2, 3, 4], left


def test_steps_that_are_done_again_appear_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 9)
    write_steps(path, 6, 7)
    assert [line["step"] for line in lines_of(path)] == [1, 2, 3, 4, 5, 6, 7]


def test_a_killed_writer_leaves_whole_lines(tmp_path):
    """Killed at random moments, each time continued from a checkpoint some steps earlier."""
    path, rng, done = tmp_path / "metrics.jsonl", random.Random(0), 0
    for _ in range(20):
        resumed_at, seconds = rng.randint(max(0, done - 5), done), rng.uniform(0.0, 0.02)

        def run(first=resumed_at + 1, seconds=seconds):
            log, end = JsonLines(path), time.monotonic() + seconds
            log.start(first - 1)
            for step in range(first, first + 10**6):
                log.write(step, SAMPLE)
                if time.monotonic() > end:
                    os.kill(os.getpid(), signal.SIGKILL)

        assert forked(run)[0] == -signal.SIGKILL
        steps = [line["step"] for line in lines_of(path)]
        assert steps == list(range(1, len(steps) + 1)) and len(steps) > resumed_at
        done = len(steps)


def test_a_kill_while_the_file_is_rewritten_keeps_the_old_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 5)
    before = path.read_bytes()

    def run():
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        JsonLines(path).start(3)

    assert forked(run)[0] == -signal.SIGKILL
    assert path.read_bytes() == before
    write_steps(path, 4, 4)
    assert [line["step"] for line in lines_of(path)] == [1, 2, 3, 4]


def test_events_of_killed_processes_are_whole_and_in_order(tmp_path):
    """Each start is killed at a random moment; what the file was cut to by a host that lost power as well costs a line at most."""
    path, rng, told = tmp_path / "events.jsonl", random.Random(0), 0
    for attempt in range(20):
        seconds = rng.uniform(0.0, 0.02)

        def run(attempt=attempt, seconds=seconds):
            log, end = EventLog(path, attempt=str(attempt)), time.monotonic() + seconds
            for step in range(10**6):
                log.write("step", step=step, text=SAMPLE["text"])
                if time.monotonic() > end:
                    os.kill(os.getpid(), signal.SIGKILL)

        assert forked(run)[0] == -signal.SIGKILL
        lost = rng.choice((0, rng.randint(1, 60)))
        os.truncate(path, path.stat().st_size - lost)
        events = read_events(tmp_path)
        last = [event["step"] for event in events if event["attempt"] == str(attempt)]
        assert last == list(range(len(last))) and all(event["text"] == SAMPLE["text"] for event in events)
        assert len(events) >= told and len(path.read_bytes().splitlines()) - len(events) <= attempt + 1
        told = len(events)
