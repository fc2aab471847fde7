"""The shipped slurm/*.sh on a real Slurm: a job that is asked to stop saves and continues, and one that always fails stops for good."""

import pytest

from tests.cluster.jobs import lesson, now

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]


def test_a_job_that_is_told_of_its_end_saves_goes_back_into_the_queue_and_continues(cluster, tmp_path):
    job = lesson(cluster, tmp_path, "out", 100_000, every=10).submit()
    job.wait_for(lambda: job.newest() >= 10, 120, "first checkpoint")
    told = now()
    cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    job.wait_for(lambda: job.outcome().get("outcome") == "drained", 60, "drained run")
    stopped = job.outcome()["iteration"]
    assert job.newest() == stopped
    job.wait_for(lambda: job.restarts() == 1 and job.newest() > stopped, 120, "second start")
    print(f"R6: told to drained {job.events('outcome')[0]['time'] - told:.1f} s, training again {job.wait_for_training(told):.1f} s")
    cluster.run("scancel", job.number)  # SIGTERM to everything, SIGKILL later: the ranks save, and nobody requeues
    job.wait_for(lambda: job.outcome().get("outcome") == "drained", 60, "end")
    assert job.outcome()["reason"].startswith("SIGTERM") and job.newest() == job.outcome()["iteration"]
    job.wait("CANCELLED", 30)
    assert job.steps() == list(range(job.newest() + 1)), "no step is left out and none is repeated"
    cluster.wait_until_idle()


def test_a_job_that_always_fails_stops_for_good_and_cancels_those_that_wait_for_it(cluster, tmp_path):
    crash = {"MEGARL_FAULT": "learn:1:3:kill", "MEGARL_ALLOW_FAULTS": "1", "MEGARL_MAX_FRUITLESS": "2"}
    job = lesson(cluster, tmp_path, "out", 100_000, every=10).submit(**crash)
    waiting = cluster.run("sbatch", "--parsable", f"--dependency=afterany:{job.number}", "--wrap=true", cwd=tmp_path).stdout.strip()
    job.wait_for(lambda: job.outcome().get("outcome") == "no-progress", 150, "stop for good")
    job.wait("FAILED", 30)
    assert job.shown()["ExitCode"] == "93:0" and job.outcome()["rank"] == 1
    assert cluster.job(waiting)["JobState"] == "CANCELLED"
    assert len(job.events("attempt")) == 2
    cluster.wait_until_idle()
