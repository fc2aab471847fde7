"""R11: a rank that hangs is named with host, process, phase, seconds and stack soon after the limit, and the run ends for a restart."""

import json
import socket
import time

import pytest

from tests.course.lesson_files import settings, write_files
from tests.faults.started import QUICK, started, write_config

AFTER_LIMIT_S = 5.0


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("hangs"))


def lesson(root, output, **changes):
    keys = settings(root, output, 400, checkpoint={"every_steps": 2}, **changes)
    return write_config(root / f"{output}.yaml", keys), root / output


def check_named(run, rank, phase, seconds):
    """The monitor's report names the rank, and the run ended soon after the limit."""
    (path,) = (run.run / "hangs").glob("*.json")
    report = json.loads(path.read_text())
    (suspect,) = report["suspects"]
    pid = suspect["pid"]
    assert (suspect["rank"], suspect["phase"], suspect["host"]) == (rank, phase, socket.gethostname()), run.text()
    assert report["ranks"][rank]["pid"] == pid and report["stacks"][str(rank)]
    line = run.wait_for(lambda: next((line for line in run.said if line.startswith("megarl: hang:")), None), what="line")
    assert f"rank {rank} (host {socket.gethostname()}, pid {pid}) has been in phase {phase} of step" in line
    assert suspect["seconds"] < report["limit_s"] + AFTER_LIMIT_S
    assert run.wait() != 0
    print(f"R11: {line.strip()}; ended {seconds() - suspect['seconds']:.1f} s after the report")
    return suspect, report


FAULTS = {  # action: what the report says
    "stop": "it is stopped by a signal",
    "hang": "it is not in an exchange with other ranks",
    "gil": "native code holds the interpreter's lock",
}


def hang(root, action, rank, phase="learn", ranks=2, **environment):
    config, output = lesson(root, f"{action}-{phase}-{rank}")
    fault = {"MEGARL_FAULT": f"{phase}:{rank}:5:{action}", "MEGARL_ALLOW_FAULTS": "1"}
    with started("sft", config, output, ranks, **QUICK | fault | environment) as run:
        begun = run.wait_for(lambda: run.steps() >= 4 and time.monotonic(), what="four steps")
        run.wait_for(lambda: list((output / "hangs").glob("*.json")), 60, "report")
        suspect, report = check_named(run, rank, phase, lambda: time.monotonic() - begun)
        assert FAULTS[action] in suspect["why"], run.text()
        assert run.events("hang")[0]["rank"] == rank
    return suspect, report


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_named(root, rank):
    hang(root, "stop", rank)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("action", ["hang", "gil"])
def test_a_rank_that_hangs_by_itself_is_named(root, action, rank):
    suspect, report = hang(root, action, rank)
    stack = report["stacks"][str(rank)]
    assert "faults.py" in stack, stack


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "named"), [(3, [2]), (2, [0, 1])])  # of two that wait for one another nobody can tell
def test_a_rank_in_another_exchange_than_the_rest_is_named(root, ranks, named):
    changes = {"train": {"total_steps": 400, "batch_size": 12 * ranks, "eval_every_steps": 0}}
    config, output = lesson(root, f"deadlock-{ranks}", **changes)
    fault = {"MEGARL_FAULT": f"learn:{ranks - 1}:5:deadlock", "MEGARL_ALLOW_FAULTS": "1"}
    with started("sft", config, output, ranks, **QUICK | fault) as run:
        run.wait_for(lambda: list((output / "hangs").glob("*.json")), 90, "report")
        report = json.loads(next((output / "hangs").glob("*.json")).read_text())
        assert [suspect["rank"] for suspect in report["suspects"]] == named, report["suspects"]
        assert "waits in recv while others wait in" in report["suspects"][-1]["why"], report["suspects"]
        assert run.wait() != 0
        print("".join(line for line in run.said if line.startswith("megarl: hang:")))


@pytest.mark.slow
def test_an_exchange_that_a_rank_leaves_out_ends_the_run_at_once(root):
    config, output = lesson(root, "skip")
    fault = {"MEGARL_FAULT": "learn:1:5:skip-collective", "MEGARL_ALLOW_FAULTS": "1"}
    with started("sft", config, output, 2, **QUICK | fault) as run:
        assert run.wait(90) != 0 and run.steps() <= 5
        print(f"R11: skip-collective: {run.said[-1].strip()}")


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("phase", "rank", "iteration"), [("setup", 1, 0), ("save", 0, 4), ("evaluate", 1, 4)])
def test_a_rank_stopped_in_other_phases_is_named(root, phase, rank, iteration):
    config, output = lesson(root, f"stop-in-{phase}")
    fault = {"MEGARL_FAULT": f"{phase}:{rank}:{iteration}:stop", "MEGARL_ALLOW_FAULTS": "1"}
    first = {"MEGARL_HANG_FIRST": "60" if phase == "setup" else "240"}  # the start itself may take a while
    with started("sft", config, output, 2, **QUICK | fault | first) as run:
        run.wait_for(lambda: list((output / "hangs").glob("*.json")), 280, "report")
        (suspect,) = json.loads(next((output / "hangs").glob("*.json")).read_text())["suspects"]
        assert suspect["rank"] == rank and suspect["phase"].split(" ")[-1] == phase and run.wait() != 0, run.text()
