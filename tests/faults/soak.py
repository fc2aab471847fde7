"""What soaks share: faults at random moments for a while, what is told of them, and what must not be left behind."""

import os
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from megarl.operations.events import read_events
from megarl.operations.goodput import goodput
from tests.course.lesson_files import settings

FELT_S = 3.0  # after which a rank that was hit makes no more steps
KILL_RANK, STOP_RANK, KILL_LAUNCHER = ACTIONS = ("a rank killed", "a rank stopped", "a launcher killed")


def soak_seconds(default: float) -> float:
    """For how long faults come: MEGARL_SOAK_S, or what the test takes by itself."""
    return float(os.environ.get("MEGARL_SOAK_S") or default)


def lesson_keys(root: Path, name: str, steps: int, batch_size: int) -> dict:
    """A lesson whose steps do not depend on how many there will be, with a checkpoint after every 20."""
    keys = settings(root, name, steps, checkpoint={"every_steps": 20, "keep_last": 3})
    keys["model"]["optimizer"] = {"lr": 1e-4, "schedule": "constant"}
    keys["data"].pop("eval_path")
    return keys | {"train": {"total_steps": steps, "batch_size": batch_size}}


def strike_at_random(strike: Callable[[str, float], bool], seconds: float, mean_s: float, seed: int) -> Counter[str]:
    """One fault after another for `seconds`, exponential pauses of `mean_s` on average between them; how often each hit something.

    `strike(action, where)` does one, 0 <= where < 1, and says whether anything was there to be hit. What comes when is the seed's alone.
    """
    rng, struck, begun = random.Random(seed), Counter(), time.monotonic()
    moment = rng.expovariate(1 / mean_s)
    while moment < seconds:
        time.sleep(max(0.0, begun + moment - time.monotonic()))
        action = rng.choice(ACTIONS)
        struck[action] += strike(action, rng.random())
        moment += rng.expovariate(1 / mean_s)
    time.sleep(max(0.0, begun + seconds - time.monotonic()))
    assert struck.total(), "nothing was there to be hit"
    return struck


def tell(what: str, run: Path, struck: Counter[str], seconds: float) -> None:
    """One line of what the run made of it."""
    events = read_events(run)
    found, attempts = goodput(events), sum(event["event"] == "attempt" for event in events)
    counts = ", ".join(f"{struck[action]} x {action}" for action in ACTIONS)
    print(
        f"R23: {what}: {counts} in {seconds:.0f} s; {attempts} attempts, in {found.starts} of them rank 0 began, {found.failures}"
        f" of those failed ({found.hangs} by a hang); {found.steps} steps, {found.lost_steps} done again; mean time to failure"
        f" {found.mttf_s or 0:.0f} s; goodput {found.share:.1%} of {found.wall_s:.0f} s: useful {found.useful_s:.0f}, saves"
        f" {found.checkpoint_s:.0f}, setup {found.setup_s:.0f}, lost {found.lost_s:.0f}, between starts {found.down_s:.0f} s"
    )


def half_written(run: Path) -> list[str]:
    """What a save that did not end has left beside the checkpoints."""
    return [path.name for path in (run / "checkpoints").glob(".*") if path.name.startswith((".staging", ".trash"))]
