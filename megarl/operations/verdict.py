"""Which rank a node's ranks are waiting for, from their heartbeats and the kernel's view of their processes. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

STALE_S = 3.0  # a pulse this old: the interpreter does not run
FAILED = "failed"  # the phase of a rank that an error has ended: all it has to do is leave
SCORING = {"generate", "score", "evaluate"}  # phases in which responses are scored, or scores waited for
GRACE_S = 30.0  # beyond the limit of a scorer
GENERATOR_WAIT = "rollout/control.py"


@dataclass(frozen=True)
class Process:
    """What /proc says: `state` as in ps (R S D T t Z, X for gone), `wchan` the kernel function a sleeper is in."""

    state: str
    wchan: str = ""
    children: tuple[tuple[int, str], ...] = ()  # (pid, state)


@dataclass(frozen=True)
class Suspect:
    """A rank that others wait for, and how one can tell."""

    rank: int
    pid: int
    host: str
    phase: str
    step: int
    seconds: float  # in this phase
    why: str
    sites: tuple[str, ...] = ()  # frames of megarl, outermost first
    is_certain: bool = True

    def words(self) -> str:
        """One line."""
        where = f" at {self.sites[-1]}" if self.sites else ""
        return (
            f"rank {self.rank} (host {self.host}, pid {self.pid}) has been {'in phase ' + self.phase if self.phase else 'between phases'}"
            f" of step {self.step} for {self.seconds:.0f} s: {self.why}{where}"
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def suspects(records: Sequence[Mapping[str, Any]], processes: Mapping[int, Process], now: float) -> list[Suspect]:
    """The ranks to blame for a hang, those nobody can doubt first; never empty for records of ranks that still run.

    A stopped process, one whose interpreter stands still, or one that is not in an exchange with others is what the others wait for. When
    all ranks wait, one of them left an exchange out or entered another one: the one whose place in the program few others share.
    """
    found = [(rank, reason) for rank in records if (reason := _own_fault(rank, processes.get(rank["rank"], Process("X")), now))]
    if found:
        return [_suspect(record, now, reason) for record, reason in found]
    return _odd_ones(records, now)


def _own_fault(record: Mapping[str, Any], process: Process, now: float) -> str:
    """Why this rank itself is what others wait for; empty for one that waits for others."""
    if process.state in "Tt":
        return "it is stopped by a signal (SIGSTOP or a debugger)"
    if process.state in "XZ":
        return "its process is gone"
    if now - record["pulse"] > STALE_S:
        if process.state == "D":
            return f"it sleeps in the kernel ({process.wchan or 'unknown'}): a device or file system does not answer"
        return f"native code holds the interpreter's lock for {now - record['pulse']:.0f} s (process state {process.state})"
    if any(GENERATOR_WAIT in site for site in record["sites"]):
        children = ", ".join(f"pid {pid}{' (stopped)' if state in 'Tt' else ''}" for pid, state in process.children)
        return f"it waits for its generators ({children or 'elsewhere'})"
    if not record["collective"]:
        return "it is not in an exchange with other ranks, the others wait for it"
    return ""


def _odd_ones(records: Sequence[Mapping[str, Any]], now: float) -> list[Suspect]:
    """All wait: those whose place in the program few others share."""
    places: dict[tuple, list[Mapping[str, Any]]] = {}
    for record in records:
        places.setdefault((record["step"], record["phase"], tuple(record["sites"])), []).append(record)
    if len(places) == 1:
        why = f"it waits in {records[0]['collective']}, as all ranks of this host do: see the report of the other hosts"
        return [_suspect(record, now, why, is_certain=False) for record in records]
    fewest = min(len(group) for group in places.values())
    few = [record for group in places.values() if len(group) == fewest for record in group]  # as with two ranks: each may be the one
    return [_suspect(record, now, _apart(record, records)) for record in sorted(few, key=lambda record: record["rank"])]


def _apart(record: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """How a rank's place differs from that of the most others."""
    others = [
        (other["collective"], other["sites"][-1] if other["sites"] else "?") for other in records if other["sites"] != record["sites"]
    ]
    exchange, site = max(others, key=others.count) if others else (record["collective"], "another step")
    return (
        f"it waits in {record['collective']} while others wait in {exchange} at {site}: it left an exchange out, or entered one that they"
        " did not"
    )


def _suspect(record: Mapping[str, Any], now: float, why: str, is_certain: bool = True) -> Suspect:
    names = ("rank", "pid", "host", "phase", "step")
    seconds = now - record["since"]
    sites = record["sites"] if record["pulse"] >= record["since"] else ()  # older ones are of another phase
    return Suspect(*(record[name] for name in names), seconds, why, tuple(sites), is_certain)


@dataclass(frozen=True)
class Limits:
    """Seconds a phase may take: at least `floor_s`, `factor` times its longest so far, `first_s` before it has ended once."""

    floor_s: float = 120.0
    factor: float = 5.0
    first_s: float = 1800.0

    def of(self, phase: str, records: Sequence[Mapping[str, Any]], before: Mapping[str, float]) -> float:
        """The limit of `phase`; `before` holds the longest phases of earlier starts of the run."""
        if phase in ("", FAILED):
            return self.floor_s
        seen = [longest[phase] for longest in (before, *(record["longest"] for record in records)) if phase in longest]
        return max(self.floor_s, self.factor * max(seen) if seen else self.first_s)


def scoring_s(record: Mapping[str, Any]) -> float:
    """Seconds that a rank may wait for scores: a run's scorers have limits of their own, and end it with a better message."""
    patience = record.get("patience", 0.0)
    return patience + GRACE_S if patience > 0 and not SCORING.isdisjoint(record["phase"].split(" ")) else 0.0


def stragglers(busy: Mapping[int, float], ratio: float, least_s: float) -> list[int]:
    """Ranks that computed `ratio` times as long as half of the others, and `least_s` seconds longer. `busy` is seconds by rank."""
    found = []
    for rank, seconds in busy.items():
        others = sorted(value for other, value in busy.items() if other != rank)
        if others:
            typical = others[len(others) // 2]
            if seconds > ratio * typical and seconds - typical > least_s:
                found.append(rank)
    return found
