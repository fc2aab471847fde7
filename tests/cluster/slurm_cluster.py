"""A real, throw-away Slurm on one machine: slurmctld, munged and one slurmd a node, every node in namespaces of its own.

A node has its own host name, address, process table, mounts and shared memory; the nodes hang on a bridge inside one outer namespace,
which also holds the controller. The machine's own network and /etc are not touched. Files are shared, as on a cluster. Stopping kills the
first process of the outer namespace, and the kernel ends everything in it.

    python -m tests.cluster.slurm_cluster start DIRECTORY [--nodes 3]
    python -m tests.cluster.slurm_cluster run DIRECTORY sbatch slurm/smoke.sh      on the login node, in this directory
    python -m tests.cluster.slurm_cluster on DIRECTORY n2 ps ax                    inside a node
    python -m tests.cluster.slurm_cluster power-off DIRECTORY n2                   power-on, cut, heal, kill-daemon, start-daemon
    python -m tests.cluster.slurm_cluster stop DIRECTORY

Needs root and the packages slurmctld, slurmd, slurm-client, munge and iproute2. What a real cluster has and this one lacks: accounting,
cgroups, PMIx, containers, GPUs. Waiting times are shorter than a cluster's, see `CONFIG`.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "munged", "ip", "nsenter", "unshare")
SUBNET = "10.78.0"
NAMESPACES = ("--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
REAP = "while :; do wait -n 2>/dev/null || sleep 0.2; done"  # what the first process of a namespace does
START_TIMEOUT_S = 60
CONFIG = """\
ClusterName=test
SlurmctldHost=login({subnet}.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=200000,sched_interval=2,bf_interval=2
# Quicker than a cluster: a silent node is down after 20 s (300), a requeued job waits 5 s (cred_expire, 120), SIGKILL follows SIGTERM
# after 15 s (KillWait, 30).
SlurmdTimeout=20
SlurmctldTimeout=30
BatchStartTimeout=10
MessageTimeout=10
CompleteWait=0
KillWait={kill_wait}
MinJobAge=86400
ReturnToService=2
JobRequeue=1
GresTypes=gpu
NodeName=n[1-{nodes}] CPUs=8 RealMemory=65536 Gres=gpu:8 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=60 State=UP PreemptMode=REQUEUE
"""


def why_not() -> str:
    """Why a cluster cannot run on this machine; empty where it can."""
    missing = [name for name in PROGRAMS if _which(name) is None]
    if missing:
        return f"missing programs: {', '.join(missing)} (Debian: apt-get install slurmctld slurmd slurm-client munge iproute2)"
    if os.geteuid() != 0:
        return "needs root: namespaces with several users"
    tried = subprocess.run(["unshare", *NAMESPACES, "ip", "link", "add", "name", "br0", "type", "bridge"], capture_output=True, text=True)
    return "" if tried.returncode == 0 else f"namespaces are forbidden here: {tried.stderr.strip().splitlines()[-1:]}"


def _which(program: str) -> str | None:
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


@dataclass(frozen=True)
class Process:
    """A process that is told from a later one with the same number by its start time."""

    pid: int
    started: str

    @classmethod
    def of(cls, pid: int) -> "Process":
        return cls(pid, _start_time(pid))

    @property
    def is_alive(self) -> bool:
        try:
            return _start_time(self.pid) == self.started
        except OSError:
            return False

    def kill(self) -> None:
        """End it, and return when it is gone."""
        if self.is_alive:
            os.kill(self.pid, signal.SIGKILL)
        while self.is_alive:
            time.sleep(0.02)


def _start_time(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


@dataclass
class Cluster:
    """The cluster whose files are in `root`. `with_parent`: it ends with the thread that started it."""

    root: Path
    num_nodes: int = 2
    kill_wait_s: int = 15
    with_parent: bool = False

    @property
    def nodes(self) -> list[str]:
        return [f"n{number}" for number in range(1, self.num_nodes + 1)]

    # ---------------------------------------------------------------- life
    def start(self) -> None:
        """Start it and return when every node is idle."""
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir(parents=True)
        self._write_files()
        self._keep("login", self._new_namespace([], "login"))
        self._inside("login", "mount", "--bind", str(self.root / "hosts"), "/etc/hosts")
        self._inside("login", "mount", "--bind", str(self.root / "nsswitch.conf"), "/etc/nsswitch.conf")
        for number in range(8):
            self._inside("login", "mount", "--bind", "/dev/null", str(self.root / "dev" / f"gpu{number}"))
        for line in ("link set lo up", "link add name br0 type bridge", f"addr add {SUBNET}.1/24 dev br0", "link set br0 up"):
            self._inside("login", "ip", *line.split())
        munge = self.root / "munge"
        options = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._inside("login", "munged", "--force", *(f"--{option}={munge / name}" for option, name in options.items()))
        self._inside("login", "slurmctld", "-c", "-i")
        for node in self.nodes:
            self.power_on(node)
        self.wait_until_idle()

    def stop(self) -> None:
        """End every process of the cluster and of its jobs."""
        self._kept("login").kill()

    def wait_until_idle(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Returns when no node holds a job, and all answer."""
        self.wait_for(lambda: self.sinfo() == dict.fromkeys(self.nodes, "idle"), timeout_s, "idle nodes")

    def wait_for(self, condition, timeout_s: float, what: str):
        """The first true value of `condition()`, asked again and again."""
        end = time.monotonic() + timeout_s
        while not (found := condition()):
            assert time.monotonic() < end, (
                f"no {what} after {timeout_s} s; nodes: {self.sinfo()}; jobs:\n{self.run('squeue', check=False).stdout}"
            )
            time.sleep(0.2)
        return found

    # ---------------------------------------------------------------- use
    def run(self, *command: str, node: str = "login", check: bool = True, cwd: Path | None = None, **environment: str):
        """Run a command on the login node or inside a node; returns the completed process with its text."""
        done = subprocess.run(
            self._enter(node, command, cwd), env=self._environment() | environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        assert not check or done.returncode == 0, f"{' '.join(command)}: rc {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def sinfo(self) -> dict[str, str]:
        """State of every node; `*` marks one that does not answer."""
        done = self.run("timeout", "5", "sinfo", "-h", "-N", "-o", "%N %t", check=False)
        return dict(line.split() for line in done.stdout.splitlines())

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Reason, Restarts, BatchHost, NodeList, ExitCode ..."""
        words = self.run("scontrol", "show", "job", "-o", number).stdout.split()
        return dict(word.partition("=")[::2] for word in words if "=" in word)

    def pids(self, node: str, pattern: str) -> list[int]:
        """Processes of a node whose command line matches, by the numbers they have there."""
        return [int(pid) for pid in self.run("pgrep", "-f", pattern, node=node, check=False).stdout.split()]

    # ---------------------------------------------------------------- faults
    def power_on(self, node: str) -> None:
        """Create the node and start its daemon."""
        number = int(node[1:])
        self._inside("login", "ip", "link", "del", f"v{node}", check=False)
        pid = self._new_namespace(self._enter("login", (), None), node)
        self._keep(node, pid)
        inner = _namespace_pids(pid)[-2]  # its number in the outer namespace
        self._inside("login", "ip", "link", "add", f"v{node}", "type", "veth", "peer", "name", "eth0", "netns", str(inner))
        self._inside("login", "ip", "link", "set", f"v{node}", "master", "br0", "up")
        self._inside(node, "mount", "-t", "tmpfs", "-o", "size=50%", "tmpfs", "/dev/shm")
        for line in ("link set lo up", f"addr add {SUBNET}.{10 + number}/24 dev eth0", "link set eth0 up"):
            self._inside(node, "ip", *line.split())
        self.start_daemon(node)

    def power_off(self, node: str) -> None:
        """A power cut: the link falls silent, then every process of the node is gone. No other node hears a farewell."""
        self.cut(node)
        self._kept(node).kill()

    def cut(self, node: str) -> None:
        """Take the link away; the node lives on alone."""
        self._inside("login", "ip", "link", "set", f"v{node}", "down")

    def heal(self, node: str) -> None:
        """Give the link back."""
        self._inside("login", "ip", "link", "set", f"v{node}", "up")

    def kill_daemon(self, node: str) -> None:
        """Only slurmd dies; the processes of its job live on."""
        self._inside(node, "kill", "-KILL", (self.root / f"slurmd-{node}.pid").read_text().strip())

    def start_daemon(self, node: str) -> None:
        """Start slurmd on a node that has none."""
        self._inside(node, "slurmd", "-N", node)

    # ---------------------------------------------------------------- inside
    def _write_files(self) -> None:
        for name in ("munge", "state", "dev"):
            (self.root / name).mkdir()
        for path in (self.root, self.root / "munge"):
            path.chmod(0o755)
        key = self.root / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        addresses = [
            ("127.0.0.1", "localhost"),
            (f"{SUBNET}.1", "login"),
            *((f"{SUBNET}.{10 + int(node[1:])}", node) for node in self.nodes),
        ]
        (self.root / "hosts").write_text("".join(f"{address} {name}\n" for address, name in addresses))
        (self.root / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        for number in range(8):  # Slurm wants device files; null devices take their place
            (self.root / "dev" / f"gpu{number}").touch()
        (self.root / "gres.conf").write_text(f"Name=gpu File={self.root}/dev/gpu[0-7]\n")
        text = CONFIG.format(root=self.root, subnet=SUBNET, nodes=self.num_nodes, kill_wait=self.kill_wait_s)
        (self.root / "slurm.conf").write_text(text)

    def _new_namespace(self, enter: list[str], name: str) -> int:
        """A process that is number 1 in namespaces of its own; returns its number here."""
        leash = ["setpriv", "--pdeathsig", "KILL"] if self.with_parent and name == "login" else []
        first = ["sh", "-c", f"mount --make-rprivate / && hostname {name} && exec bash -c '{REAP}'"]
        with open(self.root / f"{name}.log", "ab") as log:
            started = subprocess.Popen(
                [*leash, *enter, "unshare", *NAMESPACES, *first],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=not leash,
            )
        depth, end = (3 if enter else 2), time.monotonic() + 10
        while True:
            for pid in _descendants(started.pid):
                numbers = _namespace_pids(pid)
                if len(numbers) == depth and numbers[-1] == 1 and self._is_named(pid, name):
                    return pid
            assert time.monotonic() < end and started.poll() is None, (self.root / f"{name}.log").read_text()
            time.sleep(0.02)

    def _is_named(self, pid: int, name: str) -> bool:
        done = subprocess.run(["nsenter", "-t", str(pid), "-u", "hostname"], capture_output=True, text=True)
        return done.stdout.strip() == name

    def _enter(self, node: str, command: tuple[str, ...], cwd: Path | None) -> list[str]:
        place = [] if not command else [f"--wdns={cwd or Path.cwd()}"]
        return ["nsenter", "-t", str(self._kept(node).pid), "-m", "-u", "-i", "-n", "-p", *place, "--", *command]

    def _inside(self, node: str, *command: str, check: bool = True) -> None:
        self.run(*command, node=node, check=check)

    def _environment(self) -> dict[str, str]:
        """That of a fresh login: what a test runner sets for its own processes stays outside."""
        kept = {name: os.environ[name] for name in ("HOME", "LANG", "USER", "TERM") if name in os.environ}
        path = os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/sbin:/sbin"
        return kept | {"PATH": path, "SLURM_CONF": str(self.root / "slurm.conf")}

    def _keep(self, name: str, pid: int) -> None:
        process = Process.of(pid)
        (self.root / f"{name}.process").write_text(json.dumps([process.pid, process.started]))

    def _kept(self, name: str) -> Process:
        try:
            return Process(*json.loads((self.root / f"{name}.process").read_text()))
        except FileNotFoundError:
            raise SystemExit(f"{name} is not running in {self.root}") from None


def _descendants(pid: int) -> list[int]:
    try:
        children = [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]
    except OSError:
        return []
    return [pid, *(found for child in children for found in _descendants(child))]


def _namespace_pids(pid: int) -> list[int]:
    """The numbers of a process, from ours to that in its own namespace."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return []
    return next([int(number) for number in line.split()[1:]] for line in lines if line.startswith("NSpid:"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="slurm_cluster", description=__doc__.splitlines()[0])
    parser.add_argument(
        "command", choices=["start", "stop", "run", "on", "power-off", "power-on", "cut", "heal", "kill-daemon", "start-daemon"]
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--nodes", type=int, default=2)
    own = len(sys.argv) if sys.argv[1:2] == ["start"] else 3  # the rest belongs to the command that is run
    parsed, words = parser.parse_args(sys.argv[1:own]), sys.argv[own:]
    cluster = Cluster(parsed.directory.resolve(), parsed.nodes)
    if parsed.command == "start":
        if reason := why_not():
            print(f"slurm_cluster: {reason}", file=sys.stderr)
            return 2
        cluster.start()
        print(f"{parsed.nodes} nodes are idle")
    elif parsed.command == "stop":
        cluster.stop()
    elif parsed.command in ("run", "on"):
        node, words = ("login", words) if parsed.command == "run" else (words[0], words[1:])
        return subprocess.run(cluster._enter(node, tuple(words), None), env=cluster._environment()).returncode
    else:
        getattr(cluster, parsed.command.replace("-", "_"))(words[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
