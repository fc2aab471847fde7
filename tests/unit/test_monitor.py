"""The monitor's own process, beside a launcher that is only a shell, and what a rank tells it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megarl.operations import heartbeat

LAUNCHER = """
MEGARL_HEARTBEAT={folder} sleep 100 & echo $!; until [[ $(</proc/$!/comm) == sleep ]]; do :; done; kill -STOP $!
MEGARL_HEARTBEAT={folder}-of-another-run sleep 100 & echo $!
MEGARL_HEARTBEAT={folder} {python} -m megarl.operations.watchdog --folder {folder} --parent $$ & echo $!
wait
"""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_ranks_that_had_no_heartbeat_yet_go_with_their_launcher_too(tmp_path):
    """Stopped while it imported, such a rank held the output of its job open, and Slurm waited a minute for it."""
    folder = tmp_path / "heartbeats"
    folder.mkdir()
    script = LAUNCHER.format(folder=folder, python=sys.executable)
    with subprocess.Popen(["bash", "-c", script], stdout=subprocess.PIPE, text=True, start_new_session=True) as launcher:
        rank, other, monitor = (int(launcher.stdout.readline()) for _ in range(3))
        try:
            os.kill(launcher.pid, signal.SIGKILL)
            end = time.monotonic() + 20
            while any(map(is_alive, (rank, monitor))) and time.monotonic() < end:
                time.sleep(0.05)
            assert not is_alive(rank) and not is_alive(monitor) and not folder.exists()
            assert is_alive(other), "another run's"
        finally:
            os.killpg(launcher.pid, signal.SIGKILL)


@pytest.mark.parametrize("rank", [0, 3])
def test_the_monitor_of_any_host_learns_what_a_setup_takes(tmp_path, monkeypatch, rank):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv(heartbeat.FOLDER, str(tmp_path))
    with heartbeat.rank_of(tmp_path / "run"):
        time.sleep(0.02)
        heartbeat.step(7, is_first=True)
        record = heartbeat.read(tmp_path / f"rank-{rank}.json")
    assert record["longest"].keys() == {"setup"} and record["longest"]["setup"] >= 0.02 and record["step"] == 8


WATCHED = """
import os, time
from megarl.operations import heartbeat, watching
watching.LEFT_S, place = 0, {place!r}
watching.MEMORY = watching.Path(place)
with watching.watched():
    print(os.environ[heartbeat.FOLDER], flush=True)
    time.sleep({seconds})
"""


def test_heartbeats_of_a_launcher_that_was_killed_with_its_monitor_are_swept_and_no_others(tmp_path):
    """A shared memory that nobody empties: Slurm ends all processes of a step at once."""

    def launcher(seconds: float) -> tuple[subprocess.Popen, Path]:
        code = WATCHED.format(place=str(tmp_path), seconds=seconds)
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
        return process, Path(process.stdout.readline().strip())

    (killed, left), (alive, held) = launcher(100), launcher(100)
    try:
        os.killpg(killed.pid, signal.SIGKILL)
        killed.communicate()
        assert left.exists() and held.exists()
        last, own = launcher(0.1)
        last.communicate()
        assert last.returncode == 0 and list(tmp_path.iterdir()) == [held], "its own is gone as well"
        assert own.parent == tmp_path
    finally:
        os.killpg(alive.pid, signal.SIGKILL)
        alive.communicate()
