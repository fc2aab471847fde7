"""Rows of a file through a parser, every malformed one reported as `file:line: reason`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from megarl.data.fields import LineFault
from megarl.data.row_files import Place, scan
from megarl.errors import DataError

Row = TypeVar("Row")

MAX_LISTED_FAULTS = 10


@dataclass(frozen=True)
class Rows(Generic[Row]):
    """What became of a file: the parsed rows, and one line for each malformed one that was passed over."""

    rows: list[Row]
    faults: list[str]


def read_rows(
    path: Path,
    parse: Callable[[Place, dict[str, Any]], Row],
    split: str | None = None,
    malformed: Literal["refuse", "skip"] = "refuse",
) -> Rows[Row]:
    """Every row of a file through `parse(place, row)`.

    `parse` raises `LineFault` for a row it cannot use. Blank lines are passed over. Raises `DataError` when the file is missing or empty,
    or holds malformed rows that are not to be skipped, or nothing else; all rows are read first, so that one run shows all faults.
    """
    rows: list[Row] = []
    faults: list[str] = []
    for found in scan(path, split):
        try:
            if found.row is None:
                raise LineFault(found.fault)
            rows.append(parse(found.place, found.row))
        except LineFault as fault:
            faults.append(f"{found.place}: {fault}")
    if faults and (malformed == "refuse" or not rows):
        raise DataError("\n".join(listed(path, faults)))
    if not rows:
        raise DataError(f"{path}: no lines; expected one JSON object a line, or rows of a table")
    return Rows(rows, faults)


def listed(path: Path, faults: list[str]) -> list[str]:
    """The first few faults and the number of the others."""
    rest = len(faults) - MAX_LISTED_FAULTS
    more = [f"{path}: and {rest} more malformed lines ({len(faults)} in all)"] if rest > 0 else []
    return faults[:MAX_LISTED_FAULTS] + more
