"""Runs started as users start them: `launch/torchrun.sh`, real ranks, a monitor beside them, faults by the hook or from outside."""

import contextlib
import json
import os
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


@dataclass
class Started:
    """A run's launcher and what it has said so far."""

    process: subprocess.Popen
    run: Path
    said: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # of each line

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
        """Heartbeats of the ranks, from the folder the launcher made for them."""
        environment = Path(f"/proc/{self.process.pid}/environ")
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for child in children:
            command = Path(f"/proc/{child}/cmdline")
            with contextlib.suppress(OSError):
                words = command.read_text().split("\0")
                if "megarl.operations.watchdog" in words:
                    folder = Path(words[words.index("--folder") + 1])
                    found = [heartbeat.read(path) for path in folder.glob("rank-*.json")]
                    return {record["rank"]: record for record in found if record}
        assert environment.exists(), self.text()
        return {}

    def steps(self) -> int:
        """Finished steps, by the metrics file."""
        path = self.run / "metrics.jsonl"
        return max([json.loads(line)["step"] for line in path.read_bytes().split(b"\n")[:-1]], default=0) if path.exists() else 0

    def events(self, kind: str) -> list[dict]:
        return [event for event in read_events(self.run) if event["event"] == kind]


@contextlib.contextmanager
def started(stage: str, config: Path, run: Path, ranks: int = 2, timeout_s: float = 200, **environment: str) -> Iterator[Started]:
    """The run under way; whatever is left of it is gone afterwards, its children too."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MEGARL_", "SLURM_", "NPROC", "NNODES", "RANK"))}
    basic = {
        "MEGARL_VENV": "none",
        "MEGARL_PYTHON": sys.executable,
        "NPROC": str(ranks),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "MEGARL_HOST_GPUS": "0",
    }
    command = ["bash", str(ROOT / "launch/torchrun.sh"), stage, str(config)]
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
            state.times.append(time.monotonic())

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        yield state
    finally:
        pids = [record["pid"] for record in state.records().values()] if process.poll() is None else []
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        listener.join(5)


def write_config(path: Path, settings: dict) -> Path:
    """A run's keys as the YAML file a user would have."""
    path.write_text(yaml.safe_dump(json.loads(json.dumps(settings, default=str))))
    return path


def last_hashes(run: Path) -> dict[str, str]:
    """Hash by file of the newest checkpoint: every byte of weights, optimizer and random states."""
    newest = max((run / "checkpoints").glob("step-*"))
    manifest = json.loads((newest / "manifest.json").read_text())
    return {"step": newest.name} | {path: entry["sha256"] for path, entry in manifest["files"].items()}
