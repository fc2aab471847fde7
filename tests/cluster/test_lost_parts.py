"""R2 and R3: launchers, the batch shell, nodes, daemons and links are lost under a run, and it ends as if nothing had happened."""

import time
from collections.abc import Callable

import pytest

from tests.cluster.jobs import SLOWLY, START_S, Job, assert_equal, lesson, now
from tests.cluster.slurm_cluster import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
STEPS, EVERY = 14, 2
LONG = 40  # steps that outlast the time Slurm needs to miss a daemon: the run itself does not
HEALED_S = 150  # Slurm takes its time to trust a node again
RANKS, LAUNCHER, BATCH = "[-]m megarl sft", "megarl.launcher", "launch/attempts.sh"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("lost")


@pytest.fixture(scope="module")
def peace(cluster, root) -> Job:
    """The run that nobody disturbs."""
    job = lesson(cluster, root, "peace", STEPS, EVERY).submit()
    job.wait()
    return job


def under_way(cluster, root, name: str, steps: int = STEPS) -> tuple[Job, list[str]]:
    """A job that has published a checkpoint and takes 2 s a step; its nodes."""
    job = lesson(cluster, root, name, steps, EVERY).submit(**SLOWLY)
    job.wait_for(lambda: job.newest() >= EVERY, START_S, "first checkpoint")
    return job, job.nodes()


def ended_as_in_peace(job: Job, peace: Job, kept: int, what: str, since: float, down: float | None = None) -> None:
    """The next attempt continues at the newest checkpoint or later, and the end is that of the run in peace."""
    again = job.wait_for_training(since)
    resumed = [event["step"] for event in job.events("continue") if event["time"] > since]
    assert len(resumed) == 1 and resumed[0] >= kept, "nothing before the last checkpoint is lost"
    job.wait()
    assert_equal(job, peace)
    told = "" if down is None else f", {since + again - down:.1f} s after Slurm called it down"
    print(f"{what}: training again after {again:.1f} s{told}; continued at step {resumed[0]}, newest checkpoint before {kept}")


def kill(cluster, node: str, pattern: str) -> None:
    (pid, *_) = cluster.pids(node, pattern)  # the oldest
    cluster.run("kill", "-KILL", str(pid), node=node)


@pytest.mark.parametrize(("who", "pattern", "place"), [("head launcher", LAUNCHER, 0), ("other launcher", LAUNCHER, 1), ("rank", RANKS, 1)])
def test_a_part_of_an_attempt_is_killed(cluster, root, peace, who, pattern, place):
    job, nodes = under_way(cluster, root, who.replace(" ", "-"))
    since, kept = now(), job.newest()
    kill(cluster, nodes[place], pattern)
    job.wait_for_training(since)
    assert [len(cluster.pids(node, RANKS)) for node in nodes] == [1, 1], "no rank of the old attempt lives on"
    ended_as_in_peace(job, peace, kept, f"R2: {who} killed", since)
    assert job.restarts() == 0 and len(job.events("attempt")) == 2
    cluster.wait_until_idle()


def test_the_batch_shell_is_killed(cluster, root, peace):
    job, nodes = under_way(cluster, root, "batch-shell")
    kept = job.newest()
    kill(cluster, nodes[0], BATCH)
    job.wait("FAILED", 60)
    cluster.wait_until_idle()
    assert [cluster.pids(node, RANKS) for node in nodes] == [[], []]
    since = now()
    ended_as_in_peace(job.submit(), peace, kept, "R2: batch shell killed, submitted again", since)
    cluster.wait_until_idle()


def lost(job: Job, node: str, damage: Callable[[str], None]) -> tuple[float, int, float]:
    """Do the damage; (when, newest checkpoint then, when Slurm took the node for down)."""
    kept, since = job.newest(), now()
    damage(node)
    job.wait_for(lambda: job.cluster.sinfo().get(node, "").startswith("down"), 60, f"{node} down")
    down = now()
    job.wait_for(lambda: job.restarts() == 1, 120, "requeue")
    return since, kept, down


@pytest.mark.parametrize(("what", "place"), [("other node", 1), ("batch host", 0)])
def test_power_cut(cluster, root, peace, what, place):
    job, nodes = under_way(cluster, root, f"power-{place}")
    since, kept, down = lost(job, nodes[place], cluster.power_off)
    ended_as_in_peace(job, peace, kept, f"R3: power cut of the {what}", since, down)
    assert nodes[place] not in job.nodes()
    cluster.power_on(nodes[place])
    cluster.wait_until_idle()


def test_a_daemon_dies_and_the_ranks_of_its_node_live_on(cluster, root):
    peace = lesson(cluster, root, "long-peace", LONG, EVERY).submit()
    peace.wait()
    job, nodes = under_way(cluster, root, "daemon", LONG)
    since, kept, down = lost(job, nodes[1], cluster.kill_daemon)
    ended_as_in_peace(job, peace, kept, "R3: daemon dead for good", since, down)
    cluster.start_daemon(nodes[1])
    cluster.wait_until_idle(HEALED_S)


@pytest.mark.parametrize(
    ("what", "lose", "bring_back", "seconds"),
    [("daemon", Cluster.kill_daemon, Cluster.start_daemon, 5), ("link", Cluster.cut, Cluster.heal, 8)],
)
def test_what_comes_back_soon_costs_nothing(cluster, root, peace, what, lose, bring_back, seconds):
    job, nodes = under_way(cluster, root, f"{what}-back")
    lose(cluster, nodes[1])
    time.sleep(seconds)
    bring_back(cluster, nodes[1])
    job.wait()
    assert_equal(job, peace)
    assert job.restarts() == 0 and len(job.events("attempt")) == 1
    cluster.wait_until_idle()


@pytest.mark.parametrize(("what", "place"), [("other node", 1), ("batch host", 0)])
def test_a_link_is_cut_and_healed_late(cluster, root, peace, what, place):
    job, nodes = under_way(cluster, root, f"link-{place}")
    since, kept, down = lost(job, nodes[place], cluster.cut)
    job.wait_for_training(since)
    cluster.heal(nodes[place])  # what lives there finds that the run has gone on without it
    ended_as_in_peace(job, peace, kept, f"R3: link of the {what} cut", since, down)
    cluster.wait_until_idle(HEALED_S)
