"""R12: a rank that is five times as slow as the others is named within five steps, and left alone; slow runs are no hangs (R11)."""

import os
import random
import signal
import threading
import time

import pytest

from tests.course.lesson_files import settings, write_files
from tests.faults.started import QUICK, Started, started, write_config


def lesson(root, output, steps, **changes):
    keys = settings(root, output, steps, train={"total_steps": steps, "batch_size": 48, "eval_every_steps": 0}, **changes)
    return write_config(root / f"{output}.yaml", keys), root / output


def throttle(pid: int, share: float, until: threading.Event) -> None:
    """Let a process run for `share` of the time, as a busy neighbour on its core would."""
    period = 0.1
    while not until.is_set():
        try:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(period * (1 - share))
            os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            return
        time.sleep(period * share)


def warnings(run: Started) -> list[str]:
    return [line for line in run.said if "straggler" in line]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_throttled_rank_is_named(tmp_path, rank):
    root = write_files(tmp_path, hidden_size=256, intermediate_size=1024, num_hidden_layers=4)
    config, output = lesson(root, "throttled", 400)
    end = threading.Event()
    with started("sft", config, output, 2, **QUICK) as run:
        run.wait_for(lambda: run.steps() >= 8, what="eight steps")
        assert not warnings(run), run.text()
        first, pid = run.steps(), run.records()[rank]["pid"]
        thread = threading.Thread(target=throttle, args=(pid, 0.2, end))
        thread.start()
        try:
            warning = run.wait_for(lambda: warnings(run) and warnings(run)[0], 120, "warning")
        finally:
            end.set()
            thread.join()
        seen = run.events("straggler")[0]
        assert f"straggler: rank {rank} (" in warning and seen["rank"] == rank
        before = run.steps()
        run.wait_for(lambda: run.steps() > before + 1, what="more steps")
        assert not run.events("hang")
    print(f"R12: throttled to a fifth after step {first}, named in step {seen['step']}: {warning.strip()}")
    assert seen["step"] - first <= 8  # five steps, and those of a second that passes until the monitor looks


@pytest.mark.slow
def test_a_rank_that_sleeps_in_each_step_is_named_within_five(tmp_path):
    config, output = lesson(write_files(tmp_path), "sleepy", 400)
    with started("sft", config, output, 2, **QUICK, MEGARL_FAULT="learn:1:5:slow", MEGARL_ALLOW_FAULTS="1") as run:
        run.wait_for(lambda: run.events("straggler"), 120, "warning")
        (seen,) = run.events("straggler")
        assert seen["rank"] == 1 and 5 <= seen["step"] <= 10 and not run.events("hang"), run.text()
    print(f"R12: slow from step 5 on, named in step {seen['step']}: {warnings(run)[0].strip()}")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_pauses_shorter_than_the_limit_are_no_hangs(tmp_path):
    """Random ranks stand still for up to 3 of the 4 seconds they may, for MEGARL_SLOW_RUN_S [120] seconds."""
    seconds, rng = float(os.environ.get("MEGARL_SLOW_RUN_S", 120)), random.Random(0)
    config, output = lesson(write_files(tmp_path), "uneven", 10**6)
    with started("sft", config, output, 2, **QUICK) as run:
        run.wait_for(lambda: run.steps() >= 4, what="four steps")
        until, pauses = time.monotonic() + seconds, 0
        while time.monotonic() < until:
            assert run.process.poll() is None, run.text()
            pid = rng.choice(sorted(record["pid"] for record in run.records().values()))
            os.kill(pid, signal.SIGSTOP)
            time.sleep(rng.uniform(0.2, 3.0))
            os.kill(pid, signal.SIGCONT)
            time.sleep(rng.uniform(0.2, 2.0))
            pauses += 1
        assert not run.events("hang") and not [line for line in run.said if "hang" in line], run.text()
        print(f"R11: {pauses} pauses of up to 3 s in {seconds:.0f} s and {run.steps()} steps, limit 4 s: no false alarm")
