"""R21: a start that was cut off and comes back while a newer one is in charge, or has finished, publishes nothing and stops.

Every process of the older start stands still for a while, as on a host that lost its network or was suspended.
"""

import os
import signal
from pathlib import Path

import pytest

from tests.course.lesson_files import settings, write_files
from tests.faults.started import QUICK, Started, last_hashes, started, write_config

STEPS, EVERY, SEEN = 10, 2, 4
SLOWLY = {"MEGARL_FAULT": "learn:0:1:slow", "MEGARL_ALLOW_FAULTS": "1"}


def published(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("*"))


def stand_still(old: Started) -> list[int]:
    """The processes of a start in the middle of its steps, none of which runs any more."""
    old.wait_for(lambda: f"step-{SEEN:08d}" in published(old.run), what=f"checkpoint of step {SEEN}")
    pids = [old.process.pid, *old.descendants()]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    assert old.steps() < STEPS - EVERY
    return pids


def come_back(old: Started, pids: list[int]) -> None:
    """They go on, and find that they have been replaced."""
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    assert old.wait(90) == 75, old.text()
    assert "has taken over" in old.text() and "a newer attempt is in charge" in old.text(), old.text()


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("has_ended", [True, False], ids=["has-ended", "is-at-work"])
def test_a_start_that_comes_back_when_a_newer_one(tmp_path, has_ended):
    root, output = write_files(tmp_path), tmp_path / "out"
    config = write_config(root / "out.yaml", settings(root, "out", STEPS, checkpoint={"every_steps": EVERY, "keep_last": 9}))
    with started("sft", config, output, 2, "attempts", **QUICK | SLOWLY) as old:
        pids = stand_still(old)
        with started("sft", config, output, 2, "attempts", **QUICK | ({} if has_ended else SLOWLY)) as new:
            if has_ended:
                assert new.wait() == 0, new.text()
                names, hashes = published(output), last_hashes(output)
                come_back(old, pids)
                assert published(output) == names and last_hashes(output) == hashes
            else:
                new.wait_for(lambda: new.events("continue")[1:], what="newer start at work")
                come_back(old, pids)
                assert new.wait() == 0, new.text()
    attempts = {event["attempt"] for event in new.events("continue")}
    first, second = [event["step"] for event in new.events("continue")]
    assert len(attempts) == 2 and first == 0 and second == SEEN, "the newer start goes on from what the older one had published"
    assert [line["step"] for line in new.metrics()] == list(range(STEPS + 1))
    assert [name for name in published(output) if name.startswith("step-")] == [f"step-{n:08d}" for n in range(EVERY, STEPS + 1, EVERY)]
    assert not [name for name in published(output) if name.startswith((".staging", ".trash"))]
    told = "had finished" if has_ended else "was at work"
    print(f"R21: {len(pids)} processes of a start came back when a newer one {told}: fenced, nothing written")
