"""R20 in jobs: a node without room for shared memory is named before models are loaded, and left out from then on."""

import json
import re

import pytest

from tests.cluster.jobs import lesson

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def resize_shared_memory(cluster, node: str, size: str) -> None:
    """A run needs 256 MiB of it on every node."""
    cluster.run("mount", "-o", f"remount,size={size}", "/dev/shm", node=node)


def test_a_bad_node_is_named_and_left_out_and_a_shortage_of_nodes_is_told(cluster, tmp_path):
    resize_shared_memory(cluster, "n2", "64m")
    job = lesson(cluster, tmp_path, "out", 8).submit()
    job.wait_for(lambda: job.shown()["NodeList"] == "n[1-2]", 30, "start")
    job.wait()
    assert job.restarts() == 1 and job.nodes() == ["n1", "n3"] and job.shown()["ExcNodeList"] == "n2"
    named, done = job.events("outcome")
    assert named["bad_hosts"] == ["n2"] and re.search(r"n2: only 6\d MiB of shared memory are free", named["reason"])
    assert done["outcome"] == "done" and (job.run / "bad_nodes").read_text() == "n2\n"
    seconds = json.loads((job.run / "preflight.json").read_text())["seconds"]
    first, second = job.events("attempt")
    again = next(event["time"] for event in job.events("step"))
    print(
        f"R20: named {named['time'] - first['time']:.1f} s after the start, training on other nodes {again - named['time']:.1f} s later;"
        f" preflight of two nodes {seconds:.1f} s"
    )
    assert seconds < 20

    waiting = lesson(cluster, tmp_path, "out", 8).submit("--hold")  # a later submission of the same run knows it too
    assert waiting.shown()["ExcNodeList"] == "n2"
    cluster.run("scancel", waiting.number)

    resize_shared_memory(cluster, "n3", "64m")
    short = lesson(cluster, tmp_path, "short", 8)
    short.run.mkdir(mode=0o700)
    (short.run / "bad_nodes").write_text("n2\n")
    short.submit().wait("FAILED")
    assert short.shown()["ExitCode"] == "75:0" and short.restarts() == 0 and len(short.events("attempt")) == 1
    assert "needs 2 nodes and main has too few besides n2,n3: not requeued" in short.log()
    for node in ("n2", "n3"):
        resize_shared_memory(cluster, node, "50%")
    cluster.wait_until_idle()
