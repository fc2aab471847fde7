"""R1: a rank that is killed in any phase costs seconds: the attempt loop starts again, and every byte of the end is that of a run in peace.

The fault strikes once (`MEGARL_FAULT_ONCE`); `launch/attempts.sh` does the rest, as for a user.
"""

import os
import shutil
import signal
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest

from megarl.operations.events import read_events
from megarl.operations.faults import struck
from megarl.operations.goodput import goodput
from tests.course.lesson_files import settings, write_files
from tests.faults.started import (
    PATIENT,
    QUICK,
    Started,
    command_of,
    environment_of,
    last_hashes,
    listening,
    once,
    ppo_config,
    started,
    write_config,
)

STEPS, EVERY = 8, 2
CANARY = "7b1f5e0c9a"
SECRETS = ("MEGARL_REWARD_TOKEN", "WANDB_API_KEY", "HF_TOKEN", "OPENAI_API_KEY")


@dataclass(frozen=True)
class Stopped:
    """A run that was stopped and ended well: what was seen of it meanwhile."""

    run: Started
    sockets: list[tuple[str, str]]  # (command, address) of everything that listened
    commands: list[str]
    offline: set[str | None]  # HF_HUB_OFFLINE of the ranks
    seconds: float
    detected_s: float
    again_s: float


class Lessons:
    """The same short lesson as often as needed, once in peace."""

    def __init__(self, root: Path, ranks: int):
        self.root, self.ranks = write_files(root), ranks
        config, run = self.config("peace")
        with started("sft", config, run, ranks, script="attempts", **QUICK) as peace:
            assert peace.wait() == 0, peace.text()
        self.hashes = last_hashes(run)
        self.peaceful = run

    def config(self, name: str) -> tuple[Path, Path]:
        keys = settings(self.root, name, STEPS, checkpoint={"every_steps": EVERY})
        return write_config(self.root / f"{name}.yaml", keys), self.root / name


def seconds_until(run: Started, struck_at: float) -> tuple[float, float]:
    """(from the fault to the attempt's end, from the fault to the first step after it)."""
    failed = next((when for when, line in zip(run.wall_times, run.said) if when > struck_at and "failed (exit code" in line), None)
    again = next((event["time"] for event in run.events("step") if failed is not None and event["time"] > failed), None)
    assert failed is not None and again is not None, run.text()
    return failed - struck_at, again - struck_at


def check(lessons: Lessons, phase: str, rank: int, iteration: int, action: str = "kill") -> None:
    name = f"{phase}-{rank}-{action}"
    config, output = lessons.config(name)
    marker = lessons.root / f"{name}.struck"
    if phase == "load":
        shutil.copytree(lessons.peaceful / "checkpoints", output / "checkpoints", ignore=lambda _, names: [n for n in names if "8" in n])
        shutil.copy(lessons.peaceful / "metrics.jsonl", output)
    with started(
        "sft", config, output, lessons.ranks, script="attempts", **QUICK | once(marker, f"{phase}:{rank}:{iteration}:{action}")
    ) as run:
        code = run.wait(150)
        print(run.text())
        assert code == 0 and marker.exists(), run.text()
        detected, again = seconds_until(run, *struck(marker).values())
    assert last_hashes(output) == lessons.hashes
    steps = [line["step"] for line in run.metrics()]
    assert steps == sorted(set(steps)) and steps[-1] == STEPS
    print(f"R1: {action} of rank {rank} of {lessons.ranks} in {phase}: over after {detected:.1f} s, training after {again:.1f} s")


@pytest.fixture(scope="module")
def lessons(tmp_path_factory) -> Lessons:
    return Lessons(tmp_path_factory.mktemp("lessons"), 2)


@pytest.fixture(scope="module")
def stopped(lessons) -> Stopped:
    """A run with secrets in its environment and its files, one rank of which is stopped, found, and started again."""
    config, output = lessons.config("stopped")
    marker = lessons.root / "stopped.struck"
    secrets = {name: f"canary-{number}-{CANARY}" for number, name in enumerate(SECRETS)}
    began = time.monotonic()
    with started("sft", config, output, 2, script="attempts", **QUICK | secrets | once(marker, "learn:1:5:stop"), HF_HUB_OFFLINE="") as run:
        run.wait_for(marker.exists, what="fault")
        sockets, commands = listening(run.descendants()), [command_of(pid) for pid in run.descendants()]
        offline = {environment_of(record["pid"]).get("HF_HUB_OFFLINE") for record in run.records().values()}
        assert run.wait(150) == 0, run.text()
        return Stopped(run, sockets, commands, offline, time.monotonic() - began, *seconds_until(run, *struck(marker).values()))


def test_a_stopped_rank_is_found_and_the_run_ends_as_in_peace(lessons, stopped):
    run = stopped.run
    (hang,) = run.events("hang")
    assert (hang["rank"], hang["phase"], hang["step"]) == (1, "learn", 5) and hang["seconds"] < hang["limit"] + 5
    assert "stopped by a signal" in hang["why"]
    (why,) = [event["reason"] for event in run.events("outcome") if event["outcome"] == "retry"]
    assert why.startswith("hang: rank 1 (host ")
    assert last_hashes(run.run) == lessons.hashes
    print(f"R1, R11: attempt over {stopped.detected_s:.1f} s after the fault, training again after {stopped.again_s:.1f} s")


def test_goodput_tells_of_it(stopped):
    found = goodput(read_events(stopped.run.run))
    assert (found.starts, found.failures, found.hangs, found.steps) == (2, 1, 1, STEPS)
    assert found.lost_steps in (0, EVERY)  # the save of step 4 in the background may not have ended before the fault
    parts = (found.useful_s, found.evaluation_s, found.checkpoint_s, found.setup_s, found.lost_s, found.down_s)
    assert sum(parts) == pytest.approx(found.wall_s) and found.lost_s > 3 and found.setup_s > 1 and found.mttf_s < stopped.seconds


def test_only_torch_listens_beyond_this_host(stopped):
    beyond = [(command, address) for command, address in stopped.sockets if not address.startswith(("127.", "::1"))]
    assert all("megarl.launcher" in command for command, _ in beyond), beyond  # the rendezvous and the ranks' key-value store
    assert len(beyond) <= 2 and any(address.startswith("127.") for _, address in stopped.sockets), stopped.sockets


def test_files_of_a_run_are_for_its_owner_alone(stopped):
    paths = [stopped.run.run, *stopped.run.run.rglob("*")]
    assert len(paths) > 20 and not [path for path in paths if path.stat().st_mode & 0o077]


def test_secrets_are_in_no_file_no_log_and_no_command_line(stopped):
    found = [path for path in stopped.run.run.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]
    assert found == [] and CANARY not in stopped.run.text() and not [command for command in stopped.commands if CANARY in command]
    assert any(path.parent.name == "hangs" for path in stopped.run.run.rglob("*.json")), "the report with stacks is among them"


def test_ranks_stay_offline(stopped):
    assert stopped.offline == {"1"}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("phase", "iteration"), [("setup", 0), ("load", 0), ("learn", 5), ("save", 4), ("evaluate", 4)])
def test_killed_in_any_phase_of_a_lesson(lessons, phase, iteration, rank):
    check(lessons, phase, rank, iteration)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_launcher_that_is_killed_takes_its_ranks_along(lessons):
    """Ranks without a launcher would go on beside those of the next attempt."""
    config, output = lessons.config("launcher")
    marker = lessons.root / "launcher.struck"
    with started("sft", config, output, 2, script="attempts", **QUICK | once(marker, "learn:1:5:slow")) as run:
        run.wait_for(marker.exists, what="pause")
        pids, at = [record["pid"] for record in run.records().values()], time.time()
        os.kill(run.launcher(), signal.SIGKILL)
        run.wait_for(lambda: not any(map(command_of, pids)), 20, "end of the ranks")
        gone_s = time.time() - at
        assert run.wait(150) == 0, run.text()
        detected, again = seconds_until(run, at)
    assert len(pids) == 2 and gone_s < 5 and last_hashes(output) == lessons.hashes
    print(f"R1: launcher killed: ranks gone after {gone_s:.1f} s, attempt over after {detected:.1f} s, training after {again:.1f} s")


# ---------------------------------------------------------------- PPO, with vLLM
PPO_FAULTS = [f"{phase}:{rank}:{step}" for step, (phase, rank) in enumerate(product(("publish", "generate", "score", "learn"), (0, 1)), 2)]
PPO_FAULTS += ["save:0:10", "load:1:0"]
PPO_STEPS = 11


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_in_every_phase_of_ppo(tmp_path):
    """One run that is killed in one phase after another, in each by either rank."""
    config, peaceful = ppo_config(tmp_path, "peace", PPO_STEPS)
    with started("ppo", config, peaceful, 2, **PATIENT) as peace:
        assert peace.wait(400) == 0, peace.text()
    config, output = ppo_config(tmp_path, "killed", PPO_STEPS)
    marker = tmp_path / "struck"
    faults = once(marker, *(f"{fault}:kill" for fault in PPO_FAULTS))
    with started("ppo", config, output, 2, script="attempts", **PATIENT | faults, MEGARL_MAX_FRUITLESS="9") as run:
        assert run.wait(1200) == 0, run.text()
    times = struck(marker)
    assert set(times) == {f"{fault}:kill" for fault in PPO_FAULTS}, run.text()
    for name, at in times.items():
        detected, again = seconds_until(run, at)
        assert detected < 20, "found by the monitor, not by the patience of torchrun (30 s)"
        print(f"R1: PPO, {name} of 2 ranks: attempt over after {detected:.1f} s, training again after {again:.1f} s")
    assert last_hashes(output) == last_hashes(peaceful)
    assert run.reports() == peace.reports()
    print(f"R1: {goodput(read_events(output)).to_json()}")
