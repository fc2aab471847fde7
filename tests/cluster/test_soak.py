"""R23: a job on three nodes whose ranks and launchers are hit at random, again and again, ends as in peace byte for byte.

Faults come for `MEGARL_SOAK_S` seconds (120), one in 20 s on average; `tests/faults/test_soak.py` does the same on one host.
"""

import time

import pytest

from tests.cluster.jobs import START_S, Job, assert_equal
from tests.cluster.slurm_cluster import Cluster
from tests.course.lesson_files import write_files
from tests.faults.soak import FELT_S, KILL_LAUNCHER, STOP_RANK, half_written, lesson_keys, soak_seconds, strike_at_random, tell
from tests.faults.started import QUICK, write_config

SOAK_S, MEAN_S, SEED = soak_seconds(120), 20, 1
RANKS, LAUNCHER = "[-]m megarl sft", "[-]m megarl.launcher"
OPTIONS = ("--nodes=3", "--time=120")
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(6 * SOAK_S + 1200)]


def lesson(cluster: Cluster, root, name: str, steps: int) -> Job:
    return Job(cluster, write_config(root / f"{name}.yaml", lesson_keys(root, name, steps, batch_size=12)), root / name)


def striker(cluster: Cluster):
    """One fault on a random node, where there is anything to be hit."""

    def strike(action: str, where: float) -> bool:
        node = cluster.nodes[int(where * len(cluster.nodes))]
        signal, pattern = "STOP" if action == STOP_RANK else "KILL", LAUNCHER if action == KILL_LAUNCHER else RANKS
        pids = cluster.pids(node, pattern)
        return bool(pids) and cluster.run("kill", f"-{signal}", str(pids[0]), node=node, check=False).returncode == 0

    return strike


def left_over(cluster: Cluster) -> list[str]:
    """Processes of runs, and their heartbeats, on nodes that no job uses any more."""
    found = [
        f"{node}: {pattern}" for node in cluster.nodes for pattern in (RANKS, LAUNCHER, "megarl.operations") if cluster.pids(node, pattern)
    ]
    files = {node: cluster.run("ls", "/dev/shm", node=node).stdout.split() for node in cluster.nodes}
    return found + [f"{node}: /dev/shm/{name}" for node, names in files.items() for name in names if name.startswith("megarl")]


def test_a_lesson_hit_every_twenty_seconds(cluster, tmp_path):
    write_files(tmp_path)
    job = lesson(cluster, tmp_path, "hit", 10**6).submit(*OPTIONS, **QUICK, MEGARL_MAX_FRUITLESS="50")
    job.wait_for_step(1, 3 * START_S)
    struck = strike_at_random(striker(cluster), SOAK_S, MEAN_S, SEED)
    time.sleep(FELT_S)
    job.wait_for_step(job.step() + 1, 3 * START_S)
    cluster.run("scancel", job.number)
    job.wait("CANCELLED", 90)
    assert job.outcome()["outcome"] == "drained" and job.restarts() == 0, job.outcome()
    tell("a lesson in a job on three nodes", job.run, struck, SOAK_S)
    peace = lesson(cluster, tmp_path, "peace", job.newest()).submit(*OPTIONS)
    peace.wait(timeout_s=3 * START_S + 2 * SOAK_S)
    assert_equal(job, peace)
    assert [line["step"] for line in job.metrics()] == list(range(job.steps()[0], peace.newest() + 1)), "no step twice, none left out"
    assert half_written(job.run) == [] and left_over(cluster) == []
    cluster.wait_until_idle()
