"""R6: a run that is stopped again and again, by every way a cluster has, is at its end the run that was never stopped."""

import statistics
import time
from datetime import datetime

import pytest

from tests.cluster.jobs import SLOWLY, Job, assert_equal, lesson, now
from tests.course.test_ppo import ppo_run
from tests.faults.started import write_config

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
WARNING = "--signal=B:USR1@30"
REASONS = {"signal": "SIGUSR1", "requeue": "SIGTERM", "file": "asked to stop", "limit": "SIGUSR1"}


def stop(job: Job, way: str) -> None:
    """Ask the job to stop, as people and clusters do."""
    if way == "signal":
        job.cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    elif way == "requeue":
        job.scontrol("requeue", job.number)
    elif way == "file":
        (job.run / "drain").touch()
    elif way == "limit":  # the limit comes near: Slurm itself sends the signal of --signal, 30 to 60 s before
        job.scontrol("update", f"JobId={job.number}", f"EndTime={datetime.fromtimestamp(now() + 50).isoformat(timespec='seconds')}")
    else:
        raise ValueError(way)


def chained(job: Job, ways: list[str], apart: int) -> list[tuple[str, float, float]]:
    """Stop the job in each way, `apart` steps after it started again; (way, seconds until drained, until training again)."""
    measured = []
    for number, way in enumerate(ways, 1):
        job.wait_for_step(job.newest() + apart)
        began = now()
        stop(job, way)
        job.wait_for(lambda number=number: job.restarts() == number, 90, f"requeue after {way}")
        again = job.wait_for_training(began)
        drained = [event for event in job.events("outcome") if event["time"] > began and event["outcome"] == "drained"]
        assert len(drained) == 1, f"{way}: not drained; it said:\n{job.log()[-4000:]}"
        (continued,) = [event["step"] for event in job.events("continue")][number:]
        assert drained[0]["reason"].startswith(f"{REASONS[way]}: stopped after {continued} of"), "it goes on where it stopped"
        if way == "limit":  # that of the start that was stopped is gone
            job.scontrol("update", f"JobId={job.number}", "TimeLimit=30")
        measured.append((way, drained[0]["time"] - began, again))
        print(f"R6: {way}: drained after {measured[-1][1]:.1f} s, training again after {again:.1f} s")
    job.wait()
    assert job.steps() == list(range(job.steps()[0], job.step() + 1)), "no step is left out and none is repeated"
    assert job.outcome()["outcome"] == "done"
    return measured


@pytest.mark.parametrize(
    ("steps", "ways"),
    [
        (30, ["requeue", "file", "limit"]),
        pytest.param(110, [*["requeue", "signal", "file"] * 6, "limit", "signal"], marks=pytest.mark.timeout(2400)),
    ],
    ids=["every way", "twenty times"],
)
def test_a_lesson_that_is_stopped_ends_as_if_it_had_not_been(cluster, tmp_path, steps, ways):
    peace = lesson(cluster, tmp_path, "peace", steps).submit()
    peace.wait()
    job = lesson(cluster, tmp_path, "stopped", steps).submit(WARNING, MEGARL_LEAD_S="1", **SLOWLY)
    measured = chained(job, ways, 2)
    assert_equal(job, peace)
    for number, name in ((1, "drained"), (2, "training again")):
        seconds = sorted(row[number] for row in measured)
        print(f"R6: {len(ways)} of {len(ways)}; {name} after {statistics.median(seconds):.0f} s ({seconds[0]:.0f} to {seconds[-1]:.0f})")
    cluster.wait_until_idle()


def test_a_job_looks_at_its_own_time_limit(cluster, tmp_path):
    job = lesson(cluster, tmp_path, "timed", 1000).submit("--time=2", "--signal=B:CONT@1", MEGARL_LEAD_S="55", **SLOWLY)
    job.wait_for(lambda: job.restarts() == 1, 200, "requeue")
    job.wait_for_training(job.events("outcome")[0]["time"])
    cluster.run("scancel", job.number)
    cluster.wait_for(lambda: job.shown()["JobState"] == "CANCELLED", 60, "end")
    first = job.events("outcome")[0]
    spent = first["time"] - job.events("attempt")[0]["time"]
    print(f"R6: time limit of 120 s, to be told 55 s before: drained after {spent:.0f} s, {first['reason']}")
    assert first["reason"].startswith("the time limit comes near: stopped after") and spent < 120
    assert job.steps() == list(range(job.step() + 1)) and job.step() > 0
    cluster.wait_until_idle()


def ppo_job(cluster, root, name: str, steps: int) -> Job:
    """PPO with vLLM on the quickstart's prompts, without checkpoints but those of being stopped and of the end."""
    from megarl.quickstart.make_data import make_data

    if not (root / "data").exists():
        make_data(root / "data", seed=0)
    keys = {"ppo": {"total_steps": steps, "minibatch_size": 16, "kl": {"coef": 0.01}}, "eval": None, "checkpoint": {}}
    run = ppo_run(root, name, **keys).model_dump(mode="json")
    return Job(cluster, write_config(root / f"{name}.yaml", run), root / name, "ppo")


def test_ppo_stopped_three_times_ends_as_if_it_had_not_been(cluster, tmp_path):
    peace = ppo_job(cluster, tmp_path, "peace", 8).submit()
    began = time.monotonic()
    peace.wait(timeout_s=400)
    print(f"R6: PPO in peace {time.monotonic() - began:.0f} s")
    job = ppo_job(cluster, tmp_path, "stopped", 8).submit(**SLOWLY)
    chained(job, ["requeue", "signal", "requeue"], 1)
    assert_equal(job, peace)
    cluster.wait_until_idle()
