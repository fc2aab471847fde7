"""Runs started as users start them: `launch/torchrun.sh`, real ranks, a monitor beside them, faults by the hook or from outside."""

import contextlib
import ipaddress
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megarl.operations import heartbeat
from megarl.operations.events import read_events

ROOT = Path(__file__).parents[2]
QUICK = {"MEGARL_HANG_FLOOR": "4", "MEGARL_HANG_FACTOR": "4", "MEGARL_HANG_FIRST": "90"}
PATIENT = {"MEGARL_HANG_FLOOR": "30", "MEGARL_HANG_FIRST": "300"}  # vLLM's start takes a while where cores are shared


@dataclass
class Started:
    """A run's launcher and what it has said so far."""

    process: subprocess.Popen
    run: Path
    said: list[str] = field(default_factory=list)
    wall_times: list[float] = field(default_factory=list)  # of each line

    def text(self) -> str:
        return "".join(self.said)

    def wait(self, timeout_s: float = 120) -> int:
        return self.process.wait(timeout_s)

    def wait_for(self, condition: Callable[[], Any], timeout_s: float = 120, what: str = "") -> Any:
        """What `condition()` returns once it is true. Fails with all output when it does not come, or the run ends before."""
        deadline = time.monotonic() + timeout_s
        while not (found := condition()):
            assert self.process.poll() is None, f"ended with {self.process.returncode} before {what}:\n{self.text()}"
            assert time.monotonic() < deadline, f"no {what} within {timeout_s} s:\n{self.text()}"
            time.sleep(0.05)
        return found

    def records(self) -> dict[int, dict]:
        """Heartbeats of the ranks."""
        folder = self.heartbeats()
        found = [heartbeat.read(path) for path in folder.glob("rank-*.json")] if folder else []
        return {record["rank"]: record for record in found if record}

    def heartbeats(self) -> Path | None:
        """The folder that the launcher made for the ranks' heartbeats, None between two attempts."""
        for pid in self.descendants():
            words = command_of(pid).split()
            if "megarl.operations.watchdog" in words:
                return Path(words[words.index("--folder") + 1])
        return None

    def launcher(self) -> int | None:
        """The process that started the ranks, None between two attempts."""
        return next((pid for pid in self.descendants() if "megarl.launcher" in command_of(pid)), None)

    def descendants(self) -> list[int]:
        """Every process of this run but the script itself."""
        return _descendants(self.process.pid)

    def steps(self) -> int:
        """Finished steps, by the metrics file."""
        path = self.run / "metrics.jsonl"
        return max([json.loads(line)["step"] for line in path.read_bytes().split(b"\n")[:-1]], default=0) if path.exists() else 0

    def metrics(self) -> list[dict]:
        """Every whole line of the metrics file."""
        return [json.loads(line) for line in (self.run / "metrics.jsonl").read_bytes().split(b"\n")[:-1]]

    def reports(self) -> list[dict]:
        """The metrics without what a clock says."""
        return [{name: value for name, value in line.items() if "seconds" not in name and "per_s" not in name} for line in self.metrics()]

    def events(self, kind: str) -> list[dict]:
        return [event for event in read_events(self.run) if event["event"] == kind]


def _descendants(pid: int) -> list[int]:
    try:
        children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [*children, *(below for child in children for below in _descendants(child))]


@contextlib.contextmanager
def started(stage: str, config: Path, run: Path, ranks: int = 2, script: str = "torchrun", **environment: str) -> Iterator[Started]:
    """The run under way, by `launch/torchrun.sh` or another script; whatever is left of it is gone afterwards, its ranks too."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MEGARL_", "SLURM_", "NPROC", "NNODES", "RANK"))}
    basic = {
        "MEGARL_VENV": "none",
        "MEGARL_PYTHON": sys.executable,
        "NPROC": str(ranks),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "MEGARL_HOST_GPUS": "0",
    }
    command = ["bash", str(ROOT / f"launch/{script}.sh"), stage, str(config)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=kept | basic | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    state = Started(process, run)

    def listen() -> None:
        for line in process.stdout:
            state.said.append(line)
            state.wall_times.append(time.time())

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        yield state
    finally:
        left, folder = _descendants(process.pid), state.heartbeats()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        listener.join(5)
        if folder is not None:  # the monitor, which would have removed it, was killed with the rest
            shutil.rmtree(folder, ignore_errors=True)


def once(marker: Path, *faults: str) -> dict[str, str]:
    """The environment of faults that strike once each."""
    return {"MEGARL_FAULT": ",".join(faults), "MEGARL_ALLOW_FAULTS": "1", "MEGARL_FAULT_ONCE": str(marker)}


def write_config(path: Path, settings: dict) -> Path:
    """A run's keys as the YAML file a user would have."""
    path.write_text(yaml.safe_dump(json.loads(json.dumps(settings, default=str))))
    return path


def ppo_config(root: Path, name: str, steps: int, **changes: Any) -> tuple[Path, Path]:
    """PPO on the quickstart's prompts, with vLLM and a checkpoint after every step: its file and its folder."""
    from megarl.quickstart.make_data import make_data
    from tests.course.test_ppo import ppo_run

    if not (root / "data").exists():
        make_data(root / "data", seed=0)
    keys = {"ppo": {"total_steps": steps, "minibatch_size": 16, "kl": {"coef": 0.01}}, "eval": None, "checkpoint": {"every_steps": 1}}
    run = ppo_run(root, name, **keys | changes)
    return write_config(root / f"{name}.yaml", run.model_dump(mode="json")), root / name


def last_hashes(run: Path) -> dict[str, Any]:
    """Hash by file of the newest checkpoint: every byte of weights, optimizer and random states."""
    newest = max((run / "checkpoints").glob("step-*"))
    manifest = json.loads((newest / "manifest.json").read_text())
    return {"step": newest.name, "state": manifest["state"], "models": manifest["models"]} | manifest["files"]


def command_of(pid: int) -> str:
    """The command line of a process, empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def environment_of(pid: int) -> dict[str, str]:
    """The variables a process was started with."""
    words = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(word.split("=", 1) for word in words if "=" in word)


def listening(pids: list[int]) -> list[tuple[str, str]]:
    """(command line, address) of every TCP socket that these processes listen on."""
    addresses = {}
    for line in [line for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]:
        fields = line.split()
        raw = bytes.fromhex(fields[1].split(":")[0])
        if fields[3] == "0A":
            words = b"".join(raw[i : i + 4][::-1] for i in range(0, len(raw), 4))
            addresses[fields[9]] = str(ipaddress.ip_address(words)).replace("::ffff:", "")
    found = []
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                inode = os.readlink(descriptor).removeprefix("socket:[").rstrip("]")
                if inode in addresses:
                    found.append((command_of(pid), addresses[inode]))
    return found
