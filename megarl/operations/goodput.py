"""Where a run's time went, from its `events.jsonl`: steps that were kept or done twice, setups, stalls, time to failure. Pure."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megarl.operations.events import GOOD_END


@dataclass
class Start:
    """One start of the run, from its first event to its last."""

    attempt: str
    began: float
    last: float
    resumed: float | None = None  # when the setup was over
    first_step: int = 0  # finished steps it continued from
    steps: list[tuple[int, float]] = field(default_factory=list)  # (finished step, when)
    saves: list[tuple[int, float]] = field(default_factory=list)  # (step, seconds the training stood still)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict)  # seconds by name
    hang: dict[str, Any] | None = None
    outcome: str = ""  # how its first rank ended; empty when it could not say

    @property
    def has_failed(self) -> bool:
        return self.outcome != GOOD_END


@dataclass(frozen=True)
class Goodput:
    """Seconds of wall-clock time and where they went; they add up to `wall_s`. A run that still goes on is counted to its last event."""

    wall_s: float
    useful_s: float  # steps whose result was kept, without saves and evaluations
    evaluation_s: float
    checkpoint_s: float  # the training stood still for a save
    setup_s: float  # from the start of the first rank to the first step: imports, model load, checkpoint load
    lost_s: float  # steps done again later, and the begun step that a failure ended
    down_s: float  # between two starts
    steps: int
    lost_steps: int
    starts: int
    failures: int
    hangs: int
    stragglers: int
    phases_s: dict[str, float]

    @property
    def share(self) -> float:
        """Useful time in all time: goodput."""
        return self.useful_s / self.wall_s if self.wall_s > 0 else 0.0

    @property
    def mttf_s(self) -> float | None:
        """Mean time to failure while the run was up; None without a failure."""
        return (self.wall_s - self.down_s) / self.failures if self.failures else None

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"goodput": self.share, "mttf_s": self.mttf_s}

    def rows(self) -> list[tuple[str, str]]:
        """Names and sentences for people."""
        parts = {
            "useful steps": self.useful_s,
            "evaluation": self.evaluation_s,
            "checkpoint stalls": self.checkpoint_s,
            "setup": self.setup_s,
            "lost to failures": self.lost_s,
            "between starts": self.down_s,
        }
        rows = [("goodput", f"{self.share:.1%} of {self.wall_s:.1f} s"), ("steps", f"{self.steps} kept, {self.lost_steps} done again")]
        rows += [(name, f"{seconds:.1f} s ({seconds / self.wall_s if self.wall_s else 0:.1%})") for name, seconds in parts.items()]
        mttf = f"{self.mttf_s:.0f} s" if self.mttf_s is not None else "no failure yet"
        rows += [
            ("starts", f"{self.starts}, of which {self.failures} failed, {self.hangs} of them by a hang"),
            ("mean time to failure", mttf),
        ]
        rows += [(f"phase {name}", f"{seconds:.1f} s") for name, seconds in sorted(self.phases_s.items(), key=lambda item: -item[1])]
        return rows


def starts_of(events: Sequence[dict[str, Any]]) -> list[Start]:
    """The starts of a run, from its events in order of time. What was said between two starts belongs to the first of them.

    A start that was cut off and comes back beside a newer one does nothing that counts: what it says then is left out.
    """
    found: list[Start] = []
    for event in events:
        if event["event"] == "start":
            found.append(Start(str(event.get("attempt")), event["time"] - event.get("age", 0.0), event["time"]))
        if found and found[-1].attempt == str(event.get("attempt")):
            _take(found[-1], event)
    return found


def _take(start: Start, event: dict[str, Any]) -> None:
    kind, when = event["event"], event["time"]
    if kind in ("continue", "step", "phase", "end", "hang"):
        start.last = max(start.last, when)
    if kind == "continue":
        start.resumed, start.first_step = when, event["step"]
    elif kind == "step" and event["step"] > start.first_step:
        start.steps.append((event["step"], when))
    elif kind == "phase":
        name = event["name"]
        if " " not in name:  # inner phases are part of outer ones
            start.phases[name] = start.phases.get(name, 0.0) + event["seconds"]
        if name in ("save", "evaluate") and start.resumed is not None:
            (start.saves if name == "save" else start.evaluations).append((event["step"], event["seconds"]))
    elif kind == "hang":
        start.hang = event
    elif kind == "end":
        start.outcome = event["outcome"]


def goodput(events: Sequence[dict[str, Any]]) -> Goodput | None:
    """The sum over all starts; None for a run that never started."""
    starts = starts_of(events)
    if not starts:
        return None
    kept = _kept(starts)
    has_failed = [start.has_failed and (start is not starts[-1] or start.outcome != "") for start in starts]  # the last may go on
    useful = evaluation = stall = setup = lost = 0.0
    steps = lost_steps = 0
    for index, start in enumerate(starts):
        setup += (start.resumed or start.last) - start.began
        if start.resumed is None:
            continue
        before = start.resumed
        for step, when in start.steps:
            saved = _of(step - 1, start.saves) if step - 1 > start.first_step else 0.0  # a save follows the end of its step
            examined = _of(step, start.evaluations)
            if step <= kept[index]:
                useful += when - before - saved - examined
                evaluation += examined
                stall += saved
                steps += 1
            else:
                lost += when - before
                lost_steps += 1
            before = when
        tail, saved = start.last - before, 0.0
        if start.steps:
            saved = min(tail, _of(start.steps[-1][0], start.saves))
        if has_failed[index]:
            lost += tail - saved
        else:
            useful += tail - saved
        stall += saved
    down = sum(max(0.0, after.began - start.last) for start, after in zip(starts, starts[1:]))
    wall = starts[-1].last - starts[0].began
    phases: dict[str, float] = {}
    for start in starts:
        for name, seconds in start.phases.items():
            phases[name] = round(phases.get(name, 0.0) + seconds, 3)
    return Goodput(
        wall_s=wall,
        useful_s=useful,
        evaluation_s=evaluation,
        checkpoint_s=stall,
        setup_s=setup,
        lost_s=lost,
        down_s=down,
        steps=steps,
        lost_steps=lost_steps,
        starts=len(starts),
        failures=sum(has_failed),
        hangs=sum(start.hang is not None for start in starts),
        stragglers=sum(event["event"] == "straggler" for event in events),
        phases_s=phases,
    )


def _kept(starts: Sequence[Start]) -> list[float]:
    """For each start the last step whose result counts: later ones are done again since a later start continued from before them."""
    found: list[float] = []
    bound = math.inf
    for start in reversed(starts):
        found.append(bound)
        if start.resumed is not None:
            bound = min(bound, start.first_step)
    return found[::-1]


def _of(step: int, seconds: Iterable[tuple[int, float]]) -> float:
    return sum(value for number, value in seconds if number == step)
