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
        self.exit_code = 2 if exit_code == 2 else 1  # 2: a mistake of the user, explained in the log
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
        if self.metrics is None:
            with console.status(f"{self.name} ...") if console.is_terminal else contextlib.nullcontext():
                process.wait()
            return
        terminal = Terminal(self.name, self.total_steps, self.headline, console)
        lines = follow(self.metrics)
        started, last_line = False, float("-inf")
        with console.status(f"{self.name}: starting its ranks ...") if console.is_terminal else contextlib.nullcontext() as status:
            try:
                while True:
                    is_running = process.poll() is None
                    for values in lines_now(lines):
                        if not started:
                            if status is not None:
                                status.stop()
                            terminal.start(values["step"])
                            started = True
                        is_last = values["step"] == self.total_steps
                        if console.is_terminal or is_last or time.monotonic() - last_line > PLAIN_LINE_EVERY_S:
                            terminal.write(values["step"], values)
                            last_line = time.monotonic()
                    if not is_running:
                        return
                    time.sleep(POLL_S)
            finally:
                terminal.close()


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
