"""How every benchmark reports: a table on the terminal, and the same rows as JSON."""

import argparse
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any

Row = Mapping[str, Any]


def print_table(title: str, rows: Sequence[Row]) -> None:
    """The rows as a Markdown table; columns are the keys of the first row."""
    columns = list(rows[0])
    cells = [columns, *([_text(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    print(f"\n{title}\n")
    for number, line in enumerate(cells):
        print("| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")


def alternating(contenders: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Seconds of each contender: the median of `repeats` runs that take turns, after one turn to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if turn > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: median(times) for name, times in seconds.items()}


def main(
    name: str, description: str, measure: Callable[..., Mapping[str, Any]], options: Mapping[str, dict] = MappingProxyType({})
) -> None:
    """Command line of a benchmark: `python -m benchmarks.NAME [--quick] [--json PATH]`.

    `options` are further ones, by name, with argparse's settings. `measure(quick, **options)` returns what goes to JSON; entries that
    are lists of rows are also printed as tables, others as lines.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--quick", action="store_true", help="smaller and less exact")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    for option, settings in options.items():
        parser.add_argument(f"--{option}", **settings)
    arguments = parser.parse_args()
    result = dict(measure(arguments.quick, **{option: getattr(arguments, option) for option in options}))
    for key, value in result.items():
        if isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
            print_table(key, value)
    for key, value in result.items():
        if not isinstance(value, list | tuple | Mapping):
            print(f"{key}: {_text(value)}")
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        host = {"python": platform.python_version(), "machine": platform.machine()}
        arguments.json.write_text(json.dumps({"benchmark": name, "quick": arguments.quick, "host": host, **result}, indent=1) + "\n")


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
