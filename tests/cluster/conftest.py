"""One small Slurm for all cluster tests; skipped with a reason where it cannot run."""

from collections.abc import Iterator

import pytest

from tests.cluster.slurm_cluster import Cluster, why_not


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(f"no Slurm on this machine: {reason}")
    started = Cluster(tmp_path_factory.mktemp("cluster"), num_nodes=3, kill_wait_s=30, with_parent=True)
    started.start()
    yield started
    started.stop()
