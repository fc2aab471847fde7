"""Small runs as jobs of the shipped scripts: their files, how they are submitted, and what is seen of them."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarl.operations.events import read_events
from tests.cluster.slurm_cluster import Cluster
from tests.course.lesson_files import settings, write_files
from tests.faults.started import last_hashes, write_config

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"MEGARL_VENV": "none", "MEGARL_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "NPROC": "1", "PYTHONPATH": str(ROOT)}
OPTIONS = ("--nodes=2", "--gpus-per-node=0", "--cpus-per-task=1", "--time=30", "--exclusive")
SLOWLY = {"MEGARL_FAULT": "learn:0:1:slow", "MEGARL_ALLOW_FAULTS": "1"}  # a pause of 2 s in every step: time to break something in
START_S = 150  # a job on shared cores may need that long until its first step


@dataclass
class Job:
    """One job, or several after one another, of one run."""

    cluster: Cluster
    config: Path
    run: Path
    stage: str = "sft"
    number: str = ""

    def submit(self, *words: str, **environment: str) -> "Job":
        """By `megarl submit` with the stage's own script."""
        options = [f"--config={self.config}", "--parsable", *OPTIONS, *words]
        command = [sys.executable, "-m", "megarl", "submit", f"slurm/{self.stage}_70b.sh", *options]
        self.number = self.cluster.run(*command, cwd=ROOT, **ENVIRONMENT, **environment).stdout.strip()
        return self

    # ---------------------------------------------------------------- what Slurm says
    def shown(self) -> dict[str, str]:
        return self.cluster.job(self.number)

    def restarts(self) -> int:
        return int(self.shown()["Restarts"])

    def nodes(self) -> list[str]:
        return self.cluster.run("scontrol", "show", "hostnames", self.shown()["NodeList"]).stdout.split()

    def scontrol(self, *words: str) -> None:
        self.cluster.run("scontrol", *words)

    def wait_for(self, condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
        """The first true value of `condition()`; what the job said is told when none comes."""
        try:
            return self.cluster.wait_for(condition, timeout_s, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\njob {self.number} said:\n{self.log()[-6000:]}") from None

    def wait(self, state: str = "COMPLETED", timeout_s: float = 2 * START_S) -> None:
        """Until the job has ended, which must be in this state."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait_for(lambda: self.shown()["JobState"] in ended, timeout_s, "end of the job")
        assert self.shown()["JobState"] == state, f"{self.shown()}\n{self.log()}"

    # ---------------------------------------------------------------- what the run's folder says
    def outcome(self) -> dict:
        path = self.run / "outcome.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def newest(self) -> int:
        return max((int(path.name[5:]) for path in (self.run / "checkpoints").glob("step-*")), default=0)

    def metrics(self) -> list[dict]:
        path = self.run / "metrics.jsonl"
        return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []

    def steps(self) -> list[int]:
        return [line["step"] for line in self.metrics()]

    def step(self) -> int:
        """The last finished one."""
        return max(self.steps(), default=0)

    def events(self, kind: str) -> list[dict]:
        return [event for event in read_events(self.run) if event["event"] == kind] if self.run.exists() else []

    def log(self) -> str:
        """Everything the jobs of the run have said."""
        return "\n".join(path.read_text(errors="replace") for path in sorted((self.run / "logs").glob("*.log")))

    def wait_for_step(self, step: int, timeout_s: float = START_S) -> None:
        self.wait_for(lambda: self.step() >= step, timeout_s, f"step {step}")

    def wait_for_training(self, since: float, timeout_s: float = START_S) -> float:
        """Seconds from `since` to the end of the first step of a later attempt than the one of that time."""

        def again() -> float:
            begun = next((event["time"] for event in self.events("attempt") if event["time"] > since), None)
            return next((event["time"] for event in self.events("step") if begun and event["time"] > begun), 0.0)

        return self.wait_for(again, timeout_s, "training again") - since


def lesson(cluster: Cluster, root: Path, name: str, steps: int, every: int = 0) -> Job:
    """A few steps of SFT on a tiny model; `every` steps a checkpoint, 0: at the end, and when asked to stop."""
    if not (root / "shape").exists():
        write_files(root)
    keys = settings(root, name, steps, checkpoint={"every_steps": every, "keep_last": 3})
    return Job(cluster, write_config(root / f"{name}.yaml", keys), root / name)


def numbers(job: Job) -> list[dict[str, str]]:
    """All metrics of all steps, every float in hex, but those that a clock made."""
    return [
        {name: value.hex() if isinstance(value, float) else str(value) for name, value in line.items() if not is_clock(name)}
        for line in job.metrics()
    ]


def is_clock(name: str) -> bool:
    return "seconds" in name or "per_s" in name


def assert_equal(job: Job, peace: Job) -> None:
    """The end of a run, and every number on the way, are those of the run that nobody disturbed."""
    assert numbers(job) == numbers(peace)
    assert last_hashes(job.run) == last_hashes(peace.run)


def now() -> float:
    return time.time()
