"""One stage of the quickstart: a command in a process group of its own, its log, and what its metrics say while it runs."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from megarl.errors import MegarlError
from megarl.metrics.terminal import Terminal

POLL_S = 0.25
PLAIN_LINE_EVERY_S = 15.0  # where the output is not a terminal
PATIENCE_S = 10.0  # between asking a stage to end and ending it


class StageFailed(MegarlError):
    """A stage ended with an exit code other than 0. The message names the stage, its last words and its log."""

    def __init__(self, stage: "Stage", exit_code: int):
        self.exit_code = exit_code if exit_code in (2, 65, 78) else 1  # those: mistakes of the user, explained in the log
        super().__init__(f"stage {stage.name} failed (exit code {exit_code}): {last_words(stage.log)}; log: {stage.log}")


@dataclass(frozen=True)
class Stage:
    """A command to run. With `metrics` and `total_steps` its progress is shown: `headline` maps a label to the name of a metric."""

    name: str
    command: Sequence[str]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    metrics: Path | None = None
    total_steps: int = 0
    headline: Mapping[str, str] = field(default_factory=dict)

    def run(self, console: Console) -> float:
        """Run to the end; the seconds it took. Raises `StageFailed`; an interrupt ends the whole process group."""
        started = time.monotonic()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environment},
                start_new_session=True,
            )
        try:
            self._watch(process, console)
        finally:
            _end(process)
        if process.returncode != 0:
            raise StageFailed(self, process.returncode)
        return time.monotonic() - started

    def _watch(self, process: subprocess.Popen, console: Console) -> None:
        display = Display(self, console)
        lines = follow(self.metrics) if self.metrics is not None else iter(lambda: None, 0)
        try:
            is_running = True
            while is_running:
                is_running = process.poll() is None  # asked first: what it wrote last is still shown
                for values in lines_now(lines):
                    display.say(values)
                time.sleep(POLL_S if is_running else 0)
        finally:
            display.close()


class Display:
    """A stage's live line. Where the output is not a terminal: a line now and then, with all that was new since the one before."""

    def __init__(self, stage: Stage, console: Console):
        self._terminal = Terminal(stage.name, stage.total_steps, stage.headline, console)
        self._is_live, self._total_steps = console.is_terminal, stage.total_steps
        self._waiting = console.status(f"{stage.name} starts ..." if stage.metrics else f"{stage.name} ...") if self._is_live else None
        if self._waiting is not None:
            self._waiting.start()
        self._is_started = False
        self._said_at = float("-inf")
        self._unsaid: dict = {}

    def say(self, values: dict) -> None:
        """The metrics of one step, `step` among them."""
        if not self._is_started:
            self._stop_waiting()
            self._terminal.start(values["step"])
            self._is_started = True
        self._unsaid |= values
        if self._is_live or values["step"] == self._total_steps or time.monotonic() - self._said_at > PLAIN_LINE_EVERY_S:
            self._terminal.write(values["step"], self._unsaid)
            self._said_at, self._unsaid = time.monotonic(), {}

    def close(self) -> None:
        """Leave the terminal as it should be."""
        self._stop_waiting()
        self._terminal.close()

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.stop()
            self._waiting = None


def follow(path: Path) -> Iterator[dict | None]:
    """The objects of a growing JSON-lines file as they are completed; None whenever there is nothing new yet."""
    while not path.exists():
        yield None
    with path.open(encoding="utf-8") as file:
        half = ""
        while True:
            line = file.readline()
            if not line:
                yield None
            elif not line.endswith("\n"):
                half += line
            else:
                yield json.loads(half + line)
                half = ""


def lines_now(lines: Iterator[dict | None]) -> Iterator[dict]:
    """Everything `follow` has up to now."""
    while (values := next(lines)) is not None:
        yield values


def last_words(log: Path) -> str:
    """The line of a log that explains its end: the last one megarl wrote for people, else the last error, else the last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    for is_wanted in (lambda line: line.startswith("megarl: ") and "see its message" not in line, lambda line: "Error" in line, bool):
        if wanted := [line for line in lines if is_wanted(line)]:
            return wanted[-1].removeprefix("megarl: ").removeprefix("error: ")[:500]
    return "it said nothing"


def _end(process: subprocess.Popen) -> None:
    """End what is left of the stage's process group."""
    for wish in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, wish)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE_S)
