"""The shipped slurm/*.sh on a real Slurm: a job that is asked to stop saves and continues, and one that always fails stops for good."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from tests.cluster.slurm_cluster import Cluster
from tests.course.lesson_files import settings, write_files

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"MEGARL_VENV": "none", "MEGARL_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "NPROC": "1", "PYTHONPATH": str(ROOT)}
OPTIONS = ["--nodes=2", "--gpus-per-node=0", "--cpus-per-task=1", "--time=30", "--exclusive"]


def write_run(root: Path, steps: int) -> Path:
    write_files(root)
    keys = settings(root, "out", steps, checkpoint={"every_steps": 10, "keep_last": 3})
    (root / "run.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(keys, default=str))))
    return root / "out"


def submit(cluster: Cluster, root: Path, *words: str, **environment: str) -> str:
    options = [f"--config={root / 'run.yaml'}", "--parsable", *OPTIONS, *words]
    command = [sys.executable, "-m", "megarl", "submit", "slurm/sft_70b.sh", *options]
    return cluster.run(*command, cwd=ROOT, **ENVIRONMENT, **environment).stdout.strip()


def outcome(run: Path) -> dict:
    path = run / "outcome.json"
    return json.loads(path.read_text()) if path.exists() else {}


def newest(run: Path) -> int:
    return max((int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")), default=0)


def test_a_job_that_is_told_of_its_end_saves_goes_back_into_the_queue_and_continues(cluster, tmp_path):
    run = write_run(tmp_path, 100_000)
    job = submit(cluster, tmp_path)
    cluster.wait_for(lambda: newest(run) >= 10, 120, "first checkpoint")
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.wait_for(lambda: outcome(run).get("outcome") == "drained", 60, "drained run")
    stopped = outcome(run)["iteration"]
    assert newest(run) == stopped
    cluster.wait_for(lambda: cluster.job(job)["Restarts"] == "1" and newest(run) > stopped, 120, "second start")
    cluster.run("scancel", job)  # SIGTERM to everything, SIGKILL later: the ranks save, and nobody requeues
    cluster.wait_for(lambda: outcome(run).get("outcome") == "drained", 60, "end")
    assert outcome(run)["reason"].startswith("SIGTERM") and newest(run) == outcome(run)["iteration"]
    cluster.wait_for(lambda: cluster.job(job)["JobState"] == "CANCELLED", 30, "cancelled job")
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(newest(run) + 1)), "no step is left out and none is repeated"
    cluster.wait_until_idle()


def test_a_job_that_always_fails_stops_for_good_and_cancels_those_that_wait_for_it(cluster, tmp_path):
    run = write_run(tmp_path, 100_000)
    crash = {"MEGARL_FAULT": "learn:1:3:kill", "MEGARL_ALLOW_FAULTS": "1", "MEGARL_MAX_FRUITLESS": "2"}
    job = submit(cluster, tmp_path, **crash)
    waiting = cluster.run("sbatch", "--parsable", f"--dependency=afterany:{job}", "--wrap=true", cwd=tmp_path).stdout.strip()
    cluster.wait_for(lambda: outcome(run).get("outcome") == "no-progress", 150, "stop for good")
    cluster.wait_for(lambda: cluster.job(job)["JobState"] == "FAILED", 30, "end of the job")
    assert cluster.job(job)["ExitCode"] == "93:0" and outcome(run)["rank"] == 1
    assert cluster.job(waiting)["JobState"] == "CANCELLED"
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert len([event for event in events if event["event"] == "attempt"]) == 2
    cluster.wait_until_idle()
