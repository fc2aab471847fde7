"""R21: a start that was cut off and comes back while a newer one is in charge, or has finished, publishes nothing and stops.

Every process of the older start stands still for a while, as on a host that lost its network or was suspended.
"""

import os
import signal

import pytest

from tests.course.lesson_files import settings, write_files
from tests.faults.started import QUICK, last_hashes, started, write_config

STEPS = 8


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_start_that_comes_back_is_fenced(tmp_path):
    root, output = write_files(tmp_path), tmp_path / "out"
    config = write_config(root / "out.yaml", settings(root, "out", STEPS, checkpoint={"every_steps": 2}))
    slow = {"MEGARL_FAULT": "learn:0:5:slow", "MEGARL_ALLOW_FAULTS": "1"}
    with started("sft", config, output, 2, "attempts", **QUICK | slow) as old:
        old.wait_for(lambda: old.steps() >= 4 and (output / "checkpoints" / "step-00000004").exists(), what="four steps")
        pids = [old.process.pid, *old.descendants()]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        assert old.steps() < STEPS
        with started("sft", config, output, 2, "attempts", **QUICK) as new:
            assert new.wait() == 0, new.text()
        names, metrics, hashes = sorted((output / "checkpoints").iterdir()), new.metrics(), last_hashes(output)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        assert old.wait(60) == 75, old.text()
        assert "has taken over" in old.text() and "a newer attempt is in charge" in old.text(), old.text()
        assert sorted((output / "checkpoints").iterdir()) == names and last_hashes(output) == hashes
        assert new.metrics() == metrics and [line["step"] for line in metrics] == list(range(STEPS + 1))
    print(f"R21: {len(pids)} processes of a start that came back after a newer one had finished: fenced, nothing written")
