"""Processes of one generator replica: started here, watched here, and gone when this process is.

A child dies with its parent by the kernel's doing (a signal at the parent's death), not only by closing sockets: a rank that is killed
leaves no generators behind.
"""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

WORKER = "megarl.rollout.worker"
LOOPBACK = ("tcp:127.", "tcp:localhost:", "tcp:::1:")
_PR_SET_PDEATHSIG = 1
_LAUNCHER_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE")


@dataclass(frozen=True)
class Replica:
    """Where the processes of one replica find the trainer and one another. `devices[rank]` is the accelerator of each."""

    number: int  # among the run's replicas
    devices: tuple[int, ...]
    address: str
    token_path: Path
    folder: Path  # of this user alone; for the rendezvous of the replica's processes


class Children:
    """The processes of one replica. Created in the thread that lives as long as the process: the kernel watches that thread."""

    def __init__(self, replica: Replica):
        self.replica = replica
        libc = ctypes.CDLL(None, use_errno=True)
        parent = os.getpid()

        def die_with_parent() -> None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)

        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", WORKER, *self._arguments(rank)],
                env=_environment(rank, replica.devices, replica.address),
                stdin=subprocess.DEVNULL,
                preexec_fn=die_with_parent,
            )
            for rank in range(len(replica.devices))
        ]

    def _arguments(self, rank: int) -> list[str]:
        replica = self.replica
        rendezvous = replica.folder / f"rendezvous-{replica.number}"
        values = {
            "control": replica.address,
            "token-file": replica.token_path,
            "replica": replica.number,
            "rank": rank,
            "rendezvous": rendezvous,
        }
        return [word for name, value in values.items() for word in (f"--{name}", str(value))]

    def ending(self, rank: int) -> str:
        """How a process ended, in words; empty while it runs."""
        code = self.processes[rank].poll()
        if code is None:
            return ""
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def wait_a_moment(self, rank: int, timeout_s: float = 2.0) -> str:
        """As `ending`, for a process whose connection has just broken: its end may be a moment away."""
        try:
            self.processes[rank].wait(timeout_s)
        except subprocess.TimeoutExpired:
            pass
        return self.ending(rank)

    def stop(self) -> None:
        """End them all, now."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()


def devices_of(replica: int, tensor: int, first: int, num_devices: int) -> tuple[int, ...]:
    """Accelerators of the replica-th replica of this host, behind the `first` that the trainer's ranks use.

    Where there are not enough, replicas share those of the trainer in turn. On a host without accelerators the numbers mean nothing.
    """
    return tuple((first + replica * tensor + rank) % max(1, num_devices) for rank in range(tensor))


def _environment(rank: int, devices: Sequence[int], address: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in _LAUNCHER_VARIABLES and not name.startswith("TORCHELASTIC_")}
    own_root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(part for part in (own_root, os.environ.get("PYTHONPATH", "")) if part)
    if address.startswith(LOOPBACK):
        kept.setdefault("GLOO_SOCKET_IFNAME", "lo")  # gloo would look the host name up, which need not resolve
    stated = {"RANK": rank, "LOCAL_RANK": devices[rank], "WORLD_SIZE": len(devices), "LOCAL_WORLD_SIZE": len(devices)}
    return kept | {name: str(value) for name, value in stated.items()} | {"PYTHONPATH": path}
