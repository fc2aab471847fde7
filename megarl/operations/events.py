"""`events.jsonl` of a run: one JSON object a line for every start, phase, save, hang and end. What `megarl goodput` counts with.

Lines are appended whole by one system call each, so several processes of a host may write the same file; monitors of other hosts than
the first have files of their own (`events.<host>.jsonl`). A killed run may leave half a line, which readers pass over.
"""

import json
import math
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

NAME = "events.jsonl"
SET_BACK_S = 5.0  # less is the difference between the clocks of hosts that write to one file
GOOD_END = "done"  # outcome of a rank that has finished, or stopped because it was asked to


class EventLog:
    """Appends to one file, which is made when the first event is written. Failing to write never stops a run: the file is a diary."""

    def __init__(self, path: Path, **constant: Any):
        self._path, self._constant = path, constant
        self._descriptor: int | None = None

    def write(self, event: str, **fields: Any) -> None:
        """One line: wall-clock seconds, the kind of event, what every line of this log says, and `fields`."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **self._constant, **fields}) + "\n"
        try:
            if self._descriptor is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                line = self._after_half_a_line() + line
            os.write(self._descriptor, line.encode())
        except OSError:
            self._descriptor = None

    def _after_half_a_line(self) -> str:
        """A line break where a process that was killed, or a host that lost power, left half a line."""
        with self._path.open("rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return ""
            file.seek(-1, os.SEEK_END)
            return "" if file.read(1) == b"\n" else "\n"

    def close(self) -> None:
        """Harmless when nothing was written."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def read_events(run: Path) -> list[dict[str, Any]]:
    """Every whole line of every host's events, by time."""
    found = [event for path in sorted(run.glob("events*.jsonl")) for event in _on_one_clock(_lines(path))]
    return sorted(found, key=lambda event: event["time"])


def _on_one_clock(events: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Lines of one file are in the order in which things happened: where a clock was set back, later ones are moved up to it."""
    behind, last = 0.0, -math.inf
    for event in events:
        when = event["time"] + behind
        if when < last - SET_BACK_S:
            behind += last - when
            when = last
        last = max(last, when)
        yield event | {"time": when}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_bytes().split(b"\n"):
        try:
            value = json.loads(line)
        except ValueError:  # half a line, zeros after a power cut, or the end
            continue
        if isinstance(value, dict) and isinstance(value.get("event"), str) and isinstance(value.get("time"), int | float):
            yield value
