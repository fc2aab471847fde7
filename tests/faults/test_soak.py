"""R23: a run that is hit at random, again and again, ends as in peace byte for byte; nothing grows in a run that goes on for long.

`MEGARL_SOAK_S` says for how many seconds faults come: SIGKILL or SIGSTOP of a random rank, SIGKILL of the launcher, at random moments.
"""

import contextlib
import os
import random
import signal
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from megarl.operations import heartbeat
from megarl.operations.events import read_events
from megarl.operations.goodput import Goodput, goodput
from tests.course.lesson_files import settings, write_files
from tests.faults.started import PATIENT, QUICK, Started, last_hashes, ppo_config, started, write_config

SOAK_S = float(os.environ.get("MEGARL_SOAK_S", 100))
ACTIONS = ("kill a rank", "stop a rank", "kill the launcher")
MAX_GROWTH = 1.05  # of a rank's memory, second half of the run against the end of its first quarter
MEMORY = Path("/dev/shm")


@dataclass
class Watched:
    """Numbers of each rank over time, from outside."""

    bytes: dict[int, list[int]] = field(default_factory=dict)
    threads: dict[int, list[int]] = field(default_factory=dict)
    files: dict[int, list[int]] = field(default_factory=dict)

    def look(self, run: Started) -> None:
        for rank, record in run.records().items():
            place = Path(f"/proc/{record['pid']}")
            with contextlib.suppress(OSError):  # it has just ended
                pages = int((place / "statm").read_text().split()[1])
                counts = len(list((place / "task").iterdir())), len(list((place / "fd").iterdir()))
                for kept, number in zip((self.bytes, self.threads, self.files), (pages * os.sysconf("SC_PAGE_SIZE"), *counts)):
                    kept.setdefault(rank, []).append(number)

    def check(self, what: str) -> None:
        """Nothing is more in the last quarter than it was in the second."""
        for rank, numbers in self.bytes.items():
            quarter = len(numbers) // 4
            assert quarter >= 5, f"{len(numbers)} looks are too few"
            (memory, later), threads, files = (
                [statistics.median(values[rank][start : start + quarter]) for start in (quarter, 3 * quarter)]
                for values in (self.bytes, self.threads, self.files)
            )
            print(
                f"R23: {what}, rank {rank}: {memory / 2**20:.1f} then {later / 2**20:.1f} MiB, threads {threads}, open files {files}"
                f" ({len(numbers)} looks)"
            )
            assert later < MAX_GROWTH * memory and threads[1] <= threads[0] and files[1] <= files[0]


def strike(run: Started, rng: random.Random) -> str:
    """One fault from outside; empty where nothing was there to be hit."""
    action, ranks = rng.choice(ACTIONS), run.records()
    pid = run.launcher() if action == ACTIONS[2] else ranks[rng.choice(sorted(ranks))]["pid"] if ranks else None
    if pid is None:
        return ""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP if action == ACTIONS[1] else signal.SIGKILL)
    return action


def hit(run: Started, mean_s: float, rng: random.Random) -> list[str]:
    """Faults for `SOAK_S` seconds, on average one in `mean_s`; then the run is left alone until it stops as it is asked to."""
    until, done = time.monotonic() + SOAK_S, []
    while (now := time.monotonic()) < until:
        time.sleep(min(rng.expovariate(1 / mean_s), until - now))
        assert run.process.poll() is None, run.text()
        done.append(strike(run, rng))
    steps = run.wait_for(run.steps, 300, "step")
    run.wait_for(lambda: run.records() and run.steps() > steps + 1, 300, "step after the last fault")
    (run.run / "drain").write_text("the soak is over\n")
    assert run.wait(120) == 75, run.text()
    return [action for action in done if action]


def in_peace(stage: str, config: Path, run: Path, patience: dict[str, str]) -> Watched:
    """The same steps without a fault; what was seen of its ranks."""
    watched = Watched()
    with started(stage, config, run, 2, **patience) as state:
        state.wait_for(lambda: state.steps() >= 3, 300, "three steps")
        while state.process.poll() is None:
            watched.look(state)
            time.sleep(0.5)
        assert state.wait() == 0, state.text()
    return watched


def check(what: str, run: Started, done: list[str], peaceful: Path) -> None:
    found: Goodput = goodput(read_events(run.run))
    counts = ", ".join(f"{done.count(action)} x {action}" for action in ACTIONS)
    print(
        f"R23: {what}: {counts} in {SOAK_S:.0f} s and {run.steps()} steps; {found.starts} starts, {found.failures} failed,"
        f" goodput {found.share:.0%}, {found.lost_steps} steps done again, mean time to failure {found.mttf_s or 0:.0f} s"
    )
    assert last_hashes(run.run) == last_hashes(peaceful)
    assert [line["step"] for line in run.metrics()] == list(range(run.metrics()[0]["step"], run.steps() + 1))
    names = [path.name for path in (run.run / "checkpoints").iterdir()]
    assert not [name for name in names if name.startswith((".staging", ".trash"))], names
    records = [heartbeat.read(path) for path in MEMORY.glob("megarl-heartbeat-*/rank-*.json")]
    assert not [record for record in records if record and record["run"] == str(run.run)], "left by a launcher that was killed"


@pytest.mark.slow
@pytest.mark.timeout(6 * SOAK_S + 900)
def test_a_lesson_hit_every_twenty_seconds(tmp_path):
    root = write_files(tmp_path)

    def lesson(name: str, steps: int) -> tuple[Path, Path]:
        keys = settings(root, name, steps, checkpoint={"every_steps": 20, "keep_last": 3})
        keys["model"]["optimizer"]["schedule"] = "constant"
        keys["train"] |= {"total_steps": steps, "eval_every_steps": 0}
        return write_config(root / f"{name}.yaml", keys), root / name

    config, output = lesson("hit", 10**6)
    with started("sft", config, output, 2, "attempts", **QUICK, MEGARL_MAX_FRUITLESS="9") as run:
        done = hit(run, 20, random.Random(0))
    config, peaceful = lesson("peace", run.steps())
    watched = in_peace("sft", config, peaceful, QUICK)
    check("a lesson", run, done, peaceful)
    watched.check(f"{run.steps()} steps of a lesson in peace")


@pytest.mark.slow
@pytest.mark.timeout(6 * SOAK_S + 1200)
def test_ppo_hit_every_minute(tmp_path):
    model = {"path": tmp_path / "data" / "model", "random_init": True, "optimizer": {"lr": 2e-3, "schedule": "constant"}}
    keys = {"actor": model, "critic": model, "checkpoint": {"every_steps": 5, "keep_last": 3}}
    config, output = ppo_config(tmp_path, "hit", 10**6, **keys)
    with started("ppo", config, output, 2, "attempts", **PATIENT, MEGARL_MAX_FRUITLESS="9") as run:
        done = hit(run, 60, random.Random(1))
    config, peaceful = ppo_config(tmp_path, "peace", run.steps(), **keys)
    watched = in_peace("ppo", config, peaceful, PATIENT)
    check("PPO", run, done, peaceful)
    watched.check(f"{run.steps()} steps of PPO in peace")
