"""Commands about machines and runs: `megarl doctor`, `megarl goodput`. Their arguments, and what they print."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megarl.errors import ConfigError
from megarl.operations.doctor import Check, examine
from megarl.operations.events import NAME, read_events
from megarl.operations.goodput import goodput
from megarl.operations.submit import SUMMARY, add_submit, run_submit

PLAIN_WIDTH = 200  # columns of text that goes to a file
COLORS = {"ok": "green", "warning": "yellow", "fault": "red", "absent": "dim"}


def add_doctor(command: argparse.ArgumentParser) -> None:
    """Arguments of `megarl doctor`."""
    command.add_argument("--run", type=Path, default=Path(), metavar="DIR", help="the directory a run would write to [here]")
    command.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def run_doctor(parsed: argparse.Namespace) -> int:
    """Print what this host can do for a run; 1 when something would keep a run from working."""
    checks = examine(parsed.run)
    if parsed.json:
        print(json.dumps({check.name: check.to_json() for check in checks}, indent=1))
    else:
        _print_checks(checks)
    return int(any(check.status == "fault" for check in checks))


def _print_checks(checks: list[Check]) -> None:
    console = _console()
    table = Table(box=None, show_header=False, pad_edge=False)
    for _ in range(4):
        table.add_column(overflow="fold")
    for check in checks:
        table.add_row(check.name, f"[{COLORS[check.status]}]{check.status}[/]", check.found, check.advice)
    console.print(table)


def add_goodput(command: argparse.ArgumentParser) -> None:
    """Arguments of `megarl goodput`."""
    command.add_argument("run", metavar="RUN", type=Path, help="a run's output_dir")
    command.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def run_goodput(parsed: argparse.Namespace) -> int:
    """Print where a run's time went."""
    found = goodput(read_events(parsed.run)) if parsed.run.is_dir() else None
    if found is None:
        raise ConfigError(f"{parsed.run} holds no {NAME} with a start; expected the output_dir of a run that was started")
    if parsed.json:
        print(json.dumps(found.to_json(), indent=1))
        return 0
    table = Table(box=None, show_header=False, pad_edge=False)
    for row in found.rows():
        table.add_row(*row)
    _console().print(table)
    return 0


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)


COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]] = {
    "doctor": ("what this host can do for a run: packages, GPUs, disk, shared memory, clock, network", add_doctor, run_doctor),
    "goodput": ("where the time of a run went: useful share, lost steps, restarts, checkpoint stalls", add_goodput, run_goodput),
    "submit": (SUMMARY, add_submit, run_submit),
}
