"""R23: a run on one host that is hit at random, again and again, ends as in peace byte for byte; nothing grows in a long run.

Faults come for `MEGARL_SOAK_S` seconds (60); `tests/cluster/test_soak.py` does the same on several nodes.
"""

import contextlib
import os
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from megarl.operations import heartbeat, watching
from tests.course.lesson_files import write_files
from tests.faults.soak import FELT_S, KILL_LAUNCHER, STOP_RANK, half_written, lesson_keys, soak_seconds, strike_at_random, tell
from tests.faults.started import PATIENT, QUICK, Started, last_hashes, ppo_config, started, write_config

SOAK_S, SEED = soak_seconds(60), 1
MAX_GROWTH = 1.05  # of a rank's memory, the last quarter of a run against its second
LOOK_S, LOOKS = 0.1, 40  # at least, of a run in peace


@dataclass
class Watched:
    """Bytes, threads and open files of each rank over time, from outside."""

    seen: dict[int, list[tuple[int, int, int]]] = field(default_factory=dict)

    def look(self, run: Started) -> None:
        for rank, record in run.records().items():
            place = Path(f"/proc/{record['pid']}")
            with contextlib.suppress(OSError):  # it has just ended
                pages = int((place / "statm").read_text().split()[1])
                counts = len(list((place / "task").iterdir())), len(list((place / "fd").iterdir()))
                self.seen.setdefault(rank, []).append((pages * os.sysconf("SC_PAGE_SIZE"), *counts))

    def check(self, what: str) -> None:
        """Nothing is more in the last quarter than it was in the second."""
        for rank, looks in self.seen.items():
            assert len(looks) >= LOOKS, f"rank {rank}: {len(looks)} looks are too few: the run needs more steps"
            quarter = len(looks) // 4
            (memory, *before), (later, *after) = (
                [statistics.median(numbers) for numbers in zip(*looks[start : start + quarter])] for start in (quarter, 3 * quarter)
            )
            print(
                f"R23: {what}, rank {rank}: {memory / 2**20:.1f} then {later / 2**20:.1f} MiB, threads and open files {before} then"
                f" {after} ({len(looks)} looks)"
            )
            assert later < MAX_GROWTH * memory and all(last <= first for first, last in zip(before, after))


def hit(run: Started, mean_s: float, seed: int, least: int) -> Counter[str]:
    """Faults for a while, then the run is left alone until it has gone on and made `least` steps, and asked to stop."""

    def strike(action: str, where: float) -> bool:
        assert run.process.poll() is None, run.text()
        ranks = [record["pid"] for _, record in sorted(run.records().items())]
        pid = run.launcher() if action == KILL_LAUNCHER else ranks[int(where * len(ranks))] if ranks else None
        if pid is None:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP if action == STOP_RANK else signal.SIGKILL)
            return True
        return False

    run.wait_for(lambda: run.steps() > 0, 300, "first step")
    struck = strike_at_random(strike, SOAK_S, mean_s, seed)
    time.sleep(FELT_S)
    reached = max(run.steps(), least)
    run.wait_for(lambda: run.steps() > reached, 400, "step after the last fault")
    (run.run / "drain").write_text("the soak is over\n")
    assert run.wait(120) == 75, run.text()
    return struck


def in_peace(stage: str, config: Path, run: Path, patience: dict[str, str]) -> tuple[Started, Watched]:
    """The same steps without a fault, and what was seen of its ranks."""
    watched = Watched()
    with started(stage, config, run, 2, **patience) as state:
        state.wait_for(lambda: state.steps() >= 3, 300, "three steps")
        while state.process.poll() is None:
            watched.look(state)
            time.sleep(LOOK_S)
        assert state.wait() == 0, state.text()
    return state, watched


def soaked(
    stage: str, run: tuple[Path, Path], peace: Callable[[int], tuple[Path, Path]], patience: dict[str, str], mean_s: float, least: int
) -> None:
    """Hit the run, do as many steps in peace, and compare."""
    with started(stage, *run, 2, "attempts", **patience, MEGARL_MAX_FRUITLESS="20") as state:
        struck = hit(state, mean_s, SEED, least)
    tell(f"{stage} on one host", state.run, struck, SOAK_S)
    peaceful, watched = in_peace(stage, *peace(state.steps()), patience)
    assert state.reports() == peaceful.reports() and last_hashes(state.run) == last_hashes(peaceful.run)
    assert half_written(state.run) == []
    records = [heartbeat.read(path) for path in watching.MEMORY.glob(f"{watching.PREFIX}*/rank-*.json")]
    assert not [record for record in records if record and record["run"] == str(state.run)], "left by a launcher that was killed"
    watched.check(f"{state.steps()} steps of {stage} in peace")


@pytest.mark.slow
@pytest.mark.timeout(6 * SOAK_S + 900)
def test_a_lesson_hit_every_twenty_seconds(tmp_path):
    root = write_files(tmp_path)

    def lesson(name: str, steps: int) -> tuple[Path, Path]:
        return write_config(root / f"{name}.yaml", lesson_keys(root, name, steps, batch_size=16)), root / name

    soaked("sft", lesson("hit", 10**6), partial(lesson, "peace"), QUICK, 20, least=600)


@pytest.mark.slow
@pytest.mark.timeout(6 * SOAK_S + 1500)
def test_ppo_hit_every_minute(tmp_path):
    model = {"path": tmp_path / "data" / "model", "random_init": True, "optimizer": {"lr": 2e-3, "schedule": "constant"}}
    keys = {"actor": model, "critic": model, "checkpoint": {"every_steps": 5, "keep_last": 3}}

    def ppo(name: str, steps: int) -> tuple[Path, Path]:
        return ppo_config(tmp_path, name, steps, **keys)

    soaked("ppo", ppo("hit", 10**6), partial(ppo, "peace"), PATIENT, 60, least=60)
