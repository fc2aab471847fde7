"""The monitor of one node: `python -m megarl.operations.watchdog`, started by `megarl.launcher` beside torchrun.

It reads the heartbeats of the node's ranks once a second. A phase that takes much longer than it ever did in this run is a hang: the
stacks of all ranks are written down, the rank that the others wait for is named, and the ranks are killed, so that whoever started the
launcher starts again from the newest checkpoint. Ranks that compute much longer than the others are named as well, and left alone; those
whose launcher is gone are killed, and so are those that a job's SIGTERM finds waiting for a node that was lost. Monitors of one run tell
one another about their ranks through `watch/<host>.json` in the run's folder.
Imports nothing heavy.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megarl.operations import heartbeat, outcome, stacks
from megarl.operations.events import NAME, EventLog
from megarl.operations.stragglers import TELL_S, Comparison, read_note
from megarl.operations.verdict import Limits, Suspect, scoring_s, suspects

LOOK_S = 1.0
ENDING = Limits(floor_s=10.0, factor=3.0)  # what a phase may still take when the job is being ended: Slurm's KillWait is 30 s
LOST_S = 4.0  # for the other ranks to notice that one has died
STILL_S = 5.0  # longer than it wanted to sleep: this process stood still itself, as when a whole job is suspended
DUMPS_S = 20.0  # for the stacks of a node's ranks
OTHERS_FIRST_S = 5.0  # a host whose ranks all wait lets the host of the guilty one speak first


@dataclass
class Watch:
    """What one node's monitor knows. `is_killing` False: it warns and leaves the ranks alone."""

    folder: Path
    limits: Limits = Limits()
    is_killing: bool = True
    is_ending: bool = False  # the job has been sent SIGTERM
    host: str = field(default_factory=socket.gethostname)
    identities: dict[int, str] = field(default_factory=dict)
    records: dict[int, dict[str, Any]] = field(default_factory=dict)
    run: Path | None = None
    before: dict[str, float] = field(default_factory=dict)  # longest phases of earlier starts
    told: float = 0.0
    awake_since: float = 0.0  # when this monitor last stood still: what the ranks did before says nothing of them
    lost_since: float = 0.0
    hang: bool = False
    comparison: Comparison = field(default_factory=Comparison)
    _told_steps: dict[int, int] = field(default_factory=dict)

    def look(self) -> None:
        """Read the heartbeats; the first one says where the run's folder is."""
        for path in self.folder.glob("rank-*.json"):
            record = heartbeat.read(path)
            if record is None:
                continue
            self.records[record["rank"]] = record
            self.identities.setdefault(record["rank"], stacks.started(record["pid"]))
            if self.run is None:
                self.run = Path(record["run"])
                self.before = read_note(self._note_path()).get("longest", {})

    def running(self) -> list[dict[str, Any]]:
        """Records of ranks that have not left."""
        return [record for _, record in sorted(self.records.items()) if record["phase"] != heartbeat.ENDED]

    def gone(self) -> list[int]:
        """Ranks whose process has ended without leaving: their launcher's to notice."""
        begun = {record["rank"]: stacks.started(record["pid"]) for record in self.running()}
        return [rank for rank, start in begun.items() if not start or start != self.identities.get(rank, start)]

    def overdue(self, now: float, limits: Limits | None = None) -> list[tuple[dict[str, Any], float]]:
        """Ranks that live and are over their phase's limit, with the limit."""
        records, usual, gone = list(self.records.values()), limits is None, self.gone()
        limits, found = limits or self.limits, []
        for record in (one for one in self.running() if one["rank"] not in gone):
            limit = limits.of(record["phase"], records, self.before)
            found.append((record, max(limit, scoring_s(record)) if usual else limit))
        return [(record, limit) for record, limit in found if now - max(record["since"], self.awake_since) > limit]

    def lost(self, now: float) -> list[int]:
        """Ranks that died a while ago, where others of this host still run: those may wait for them where no closed connection tells."""
        gone = self.gone()
        self.lost_since = (self.lost_since or now) if 0 < len(gone) < len(self.running()) else 0.0
        return gone if self.lost_since and now - self.lost_since > LOST_S else []

    def cannot_stop(self, now: float) -> list[str]:
        """Ranks of a job that is being ended which will hardly reach the end of their step, in words.

        Their phase takes far longer than it ever did, as where they wait for a node that was lost. One that has not begun its first step
        has nothing to save, and need not try. One between phases may be at its last acts.
        """
        if not self.is_ending:
            return []
        late = {record["rank"] for record, _ in self.overdue(now, ENDING) if record["phase"]}
        return [
            f"rank {record['rank']}, {now - record['since']:.0f} s in phase {record['phase']} of step {record['step']}"
            for record in self.running()
            if record["rank"] in late or record["phase"].split(" ")[0] == "setup"
        ]

    # ---------------------------------------------------------------- a hang
    def report(self, now: float, limit: float) -> list[Suspect]:
        """Say who hangs, write everything down in `hangs/` of the run's folder, and return the suspects."""
        running = self.running()
        views = {record["rank"]: stacks.look(record["pid"]) for record in running}
        found = suspects(running, views, now)
        attempt = running[0]["attempt"]
        worst = found[0]
        outcome.record_hang(self.run, worst.rank, worst.phase, max(0, worst.step - 1), worst.words(), worst.is_certain)
        dumps = self._dumps(running, [suspect.rank for suspect in found])
        lines = [f"megarl: hang: {suspect.words()} (limit of this phase {limit:.0f} s)" for suspect in found]
        lines += [f"megarl: stack of rank {worst.rank} (pid {worst.pid}):", *_indented(dumps[worst.rank])]
        stated = {
            "host": self.host,
            "attempt": attempt,
            "time": time.time(),
            "limit_s": limit,
            "suspects": [suspect.to_json() for suspect in found],
            "ranks": [record | {"state": views[record["rank"]].state, "wchan": views[record["rank"]].wchan} for record in running],
            "stacks": {str(rank): text for rank, text in dumps.items()},
        }
        path = self.run / "hangs" / f"{_plain(attempt)}-{self.host}-{int(time.time())}.json"
        if _write(path, stated):
            lines.append(f"megarl: stacks of all {len(running)} ranks of this host: {path}")
            stacks.flight_records(self.folder, path.parent)
        print("\n".join(lines), file=sys.stderr, flush=True)
        first = {name: value for name, value in worst.to_json().items() if name not in ("sites", "is_certain")}
        self.events().write("hang", attempt=attempt, limit=round(limit, 1), report=str(path), **first)
        return found

    def _dumps(self, running: Sequence[dict[str, Any]], first: Sequence[int]) -> dict[int, str]:
        """Stacks by rank, those of the suspects first. Of the rest as many as fit: the job waits for them with its nodes."""
        found, deadline = {}, time.monotonic() + DUMPS_S
        for record in sorted(running, key=lambda record: record["rank"] not in first):
            found[record["rank"]] = stacks.dump(record) if not found or time.monotonic() < deadline else "no time was left for it"
        return found

    def kill(self) -> None:
        """End this node's ranks; torchrun sees it and ends."""
        for record in self.running():
            stacks.kill(record, self.identities.get(record["rank"], ""))

    def events(self) -> EventLog:
        is_first = 0 in self.records
        return EventLog(self.run / (NAME if is_first else f"events.{self.host}.jsonl"), host_of_monitor=self.host)

    # ---------------------------------------------------------------- stragglers
    def tell(self, now: float) -> None:
        """Leave this node's numbers for the other monitors and for the next start."""
        if self.run is None or now - self.told < TELL_S:
            return
        steps = {rank: record["step"] for rank, record in self.records.items()}
        if steps == self._told_steps:  # many hosts write to one file system, for days
            return
        self.told, self._told_steps = now, steps
        ranks = {str(rank): [record["step"], record["busy"]] for rank, record in self.records.items()}
        longest = dict(self.before)
        for record in self.records.values():
            for name, seconds in record["longest"].items():
                longest[name] = max(longest.get(name, 0.0), seconds)
        attempt = next(iter(self.records.values()))["attempt"]
        _write(self._note_path(), {"attempt": attempt, "ranks": ranks, "longest": longest})

    def straggling(self, now: float) -> list[str]:
        """Warnings, from the node of rank 0 alone, when some steps have passed since the last look."""
        if 0 not in self.records or self.run is None:
            return []
        found = self.comparison.stragglers(self._note_path(), self.records, now)
        for straggler in found:
            self.events().write("straggler", **straggler.to_json())
        return [straggler.words() for straggler in found]

    def _note_path(self) -> Path:
        return self.run / "watch" / f"{self.host}.json"


def watch(state: Watch, parent: int) -> Iterator[float]:
    """Look once a second until the launcher is gone or a hang was dealt with; yields the time of each look."""
    while os.getppid() == parent and not state.hang:
        now = time.monotonic()
        state.look()
        late = state.overdue(now)
        if late:
            _deal_with(state, late, now)
        if state.is_killing and (lost := state.lost(now)):
            names = ", ".join(map(str, lost))
            print(f"megarl: rank {names} is gone and others of this host still wait for it: they are ended", file=sys.stderr, flush=True)
            state.kill()
        if state.is_killing and (late := state.cannot_stop(now)):
            print(f"megarl: the job is being ended, and these cannot stop in time: {'; '.join(late)}", file=sys.stderr, flush=True)
            state.kill()
        state.tell(now)
        for warning in state.straggling(now):
            print(warning, file=sys.stderr, flush=True)
        yield now
        lay_down = time.monotonic()
        time.sleep(LOOK_S)
        if (now := time.monotonic()) - lay_down > LOOK_S + STILL_S:
            state.awake_since = now


def _deal_with(state: Watch, late: Sequence[tuple[dict[str, Any], float]], now: float) -> None:
    record, limit = max(late, key=lambda item: now - item[0]["since"] - item[1])
    views = {one["rank"]: stacks.look(one["pid"]) for one in state.running()}
    is_certain = any(suspect.is_certain for suspect in suspects(state.running(), views, now))
    if not is_certain and now - record["since"] < limit + OTHERS_FIRST_S:
        return
    state.report(now, limit)
    if state.is_killing:
        state.kill()
    state.hang = True


def _write(path: Path, content: Mapping[str, Any]) -> bool:
    """False where the run's folder cannot be written: the report on stderr must not fail for it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(content, file)
        os.replace(temporary, path)
    except OSError:
        return False
    return True


def _indented(text: str) -> list[str]:
    return ["    " + line for line in text.splitlines()]


def _plain(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Watch the ranks whose heartbeats are in a folder until the parent process ends."""
    parser = argparse.ArgumentParser(prog="megarl.operations.watchdog")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--floor", type=float, default=Limits.floor_s)
    parser.add_argument("--factor", type=float, default=Limits.factor)
    parser.add_argument("--first", type=float, default=Limits.first_s)
    parser.add_argument("--warn-only", action="store_true")
    parser.add_argument("--parent", type=int, required=True)
    parsed = parser.parse_args(arguments)
    state = Watch(parsed.folder, Limits(parsed.floor, parsed.factor, parsed.first), not parsed.warn_only)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):  # what a whole job gets: it goes with the launcher
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: setattr(state, "is_ending", True))
    try:
        for _ in watch(state, parsed.parent):
            pass
    except OSError:  # the folder is gone: so is the launcher
        pass
    if os.getppid() != parsed.parent:  # the launcher was killed: nobody else would end its ranks, and another start may follow
        state.look()
        state.kill()
        stacks.kill_started(heartbeat.FOLDER, str(parsed.folder))  # those too that had no heartbeat yet
        shutil.rmtree(parsed.folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
