"""Ranks that compute much longer than the others, from what the monitors of a run's nodes tell one another."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megarl.operations.verdict import stragglers

TELL_S = 5.0  # between two notes of a monitor to the others
WINDOW_STEPS = 3  # stragglers are looked for every so many steps
STRAGGLER_RATIO, STRAGGLER_S = 2.5, 0.5
REPEAT_STEPS = 50  # a straggler is named again after so many


@dataclass(frozen=True)
class Straggler:
    """A rank on `host` that computed `busy` seconds in the last steps before `step`, half of the others less than `typical`."""

    rank: int
    host: str
    step: int
    busy: float
    typical: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"busy": round(self.busy, 3), "typical": round(self.typical, 3)}

    def words(self) -> str:
        """One line."""
        return (
            f"megarl: warning: straggler: rank {self.rank} ({self.host}) computed {self.busy:.1f} s in the last steps before step"
            f" {self.step}, the others {self.typical:.1f} s and waited for it"
        )


@dataclass
class Comparison:
    """What the monitor of rank 0's node knows of all ranks."""

    _marks: dict[int, tuple[int, float]] = field(default_factory=dict)  # rank: (step, busy seconds) where the window began
    _named: dict[int, int] = field(default_factory=dict)  # straggler: the step it was named in
    _heard: dict[int, tuple[int, float]] = field(default_factory=dict)
    _hosts: dict[int, str] = field(default_factory=dict)
    _heard_at: float = -math.inf

    def stragglers(self, own_note: Path, records: Mapping[int, Mapping[str, Any]], now: float) -> list[Straggler]:
        """Those to be named now; `records` are this node's heartbeats by rank, `own_note` lies beside the notes of the others."""
        if now - self._heard_at >= TELL_S:
            self._heard_at = now
            self._hear(own_note, records[0]["attempt"])
        progress = self._heard | {rank: (record["step"], record["busy"]) for rank, record in records.items()}
        if any(rank not in self._marks or step < self._marks[rank][0] for rank, (step, _) in progress.items()):
            self._marks = dict(progress)
            return []
        if min(step - self._marks[rank][0] for rank, (step, _) in progress.items()) < WINDOW_STEPS:
            return []
        busy = {rank: seconds - self._marks[rank][1] for rank, (_, seconds) in progress.items()}
        step, self._marks = progress[0][0], dict(progress)
        found = []
        for rank in stragglers(busy, STRAGGLER_RATIO, STRAGGLER_S):
            if step - self._named.get(rank, -REPEAT_STEPS) >= REPEAT_STEPS:
                self._named[rank] = step
                others = sorted(seconds for other, seconds in busy.items() if other != rank)
                host = records[rank]["host"] if rank in records else self._hosts[rank]
                found.append(Straggler(rank, host, step, busy[rank], others[len(others) // 2]))
        return found

    def _hear(self, own_note: Path, attempt: str) -> None:
        """What the other monitors of this attempt have told."""
        self._heard = {}
        for path in own_note.parent.glob("*.json"):
            note = read_note(path)
            if path != own_note and note.get("attempt") == attempt:
                self._heard |= {int(rank): (step, busy) for rank, (step, busy) in note["ranks"].items()}
                self._hosts |= {int(rank): path.stem for rank in note["ranks"]}


def read_note(path: Path) -> dict[str, Any]:
    """A monitor's note; empty where there is none that can be read."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
