"""Read JSONL files with every malformed line reported as `file:line: reason`."""

import difflib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from megarl.errors import DataError

Row = TypeVar("Row")

MAX_LISTED_FAULTS = 10


class LineFault(Exception):
    """Why one line cannot be used. Raised by parsers, collected by `read_rows`."""


class Faults:
    """The malformed lines of one file: counted all, kept the first few."""

    def __init__(self, path: Path):
        self.path = path
        self.count = 0
        self.listed: list[str] = []

    def add(self, line: int, reason: str) -> None:
        """Note that `line` (counted from 1) is malformed."""
        self.count += 1
        if len(self.listed) < MAX_LISTED_FAULTS:
            self.listed.append(f"{self.path}:{line}: {reason}")

    def raise_if_any(self) -> None:
        """Raise `DataError` with the first faults and their number."""
        if not self.count:
            return
        rest = self.count - len(self.listed)
        more = [f"{self.path}: and {rest} more malformed lines ({self.count} in all)"] if rest else []
        raise DataError("\n".join(self.listed + more))


def read_rows(path: Path, parse: Callable[[int, dict[str, Any]], Row]) -> list[Row]:
    """Every object of a JSONL file through `parse(line_number, object)`, read line by line.

    `parse` raises `LineFault` for an object it cannot use. Blank lines are passed over. Raises `DataError` when the file is
    missing, empty or holds malformed lines; all lines are read first, so that one run shows all faults.
    """
    faults = Faults(path)
    rows: list[Row] = []
    for line, text in _lines(path, faults):
        try:
            rows.append(parse(line, _object(text)))
        except LineFault as fault:
            faults.add(line, str(fault))
    faults.raise_if_any()
    if not rows:
        raise DataError(f"{path}: no lines; expected one JSON object a line")
    return rows


def text_field(row: dict[str, Any], key: str, allow_empty: bool = False) -> str:
    """The text under `key`. Raises `LineFault` when it is missing, no text, empty or not encodable as UTF-8."""
    value = required(row, key)
    if not isinstance(value, str):
        raise LineFault(f"'{key}' is {_kind(value)}; expected text")
    if not value and not allow_empty:
        raise LineFault(f"'{key}' is empty")
    _check_unicode(value, key)
    return value


def answer_field(row: dict[str, Any], key: str) -> str:
    """The answer under `key` as text; a JSON number is taken as it is written in Python."""
    value = required(row, key)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise LineFault(f"'{key}' is {_kind(value)}; expected text or a number")
    if isinstance(value, str):
        _check_unicode(value, key)
        if not value.strip():
            raise LineFault(f"'{key}' is empty")
    return str(value)


def messages_field(row: dict[str, Any], key: str) -> list[dict[str, str]]:
    """A chat: a list of `{"role": ..., "content": ...}` with roles system, user, assistant or tool."""
    return check_messages(required(row, key), key)


def check_messages(value: Any, key: str) -> list[dict[str, str]]:
    """`value` if it is a chat, else `LineFault`."""
    if not isinstance(value, list) or not value:
        raise LineFault(f"'{key}' is {_kind(value)}; expected a list of messages with role and content")
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise LineFault(f"'{key}'[{i}] is {_kind(message)}; expected an object with role and content")
        role = text_field(message, "role")
        if role not in ("system", "user", "assistant", "tool"):
            raise LineFault(f"'{key}'[{i}] has role '{role}'; expected system, user, assistant or tool")
        text_field(message, "content", allow_empty=True)
    return value


def required(row: dict[str, Any], key: str) -> Any:
    """The value under `key`; a `LineFault` that names the nearest present key when it is missing."""
    if key in row:
        return row[key]
    near = difflib.get_close_matches(key, row.keys(), n=1)
    hint = f"; did you mean '{near[0]}'?" if near else f"; the line has {', '.join(map(repr, sorted(row))) or 'no keys'}"
    raise LineFault(f"missing key '{key}'{hint}")


def _lines(path: Path, faults: Faults) -> Iterator[tuple[int, str]]:
    try:
        with open(path, "rb") as file:
            for line, raw in enumerate(file, start=1):
                try:
                    text = raw.decode("utf-8-sig" if line == 1 else "utf-8").strip()
                except UnicodeDecodeError as error:
                    faults.add(line, f"not UTF-8 (byte {error.start + 1} of the line)")
                    continue
                if text:
                    yield line, text
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); expected a JSONL file") from error


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise LineFault(f"not JSON: {error.msg} at column {error.colno}") from error
    except (RecursionError, ValueError) as error:
        raise LineFault(f"not JSON that can be read ({type(error).__name__})") from error
    if not isinstance(value, dict):
        raise LineFault(f"{_kind(value)}; expected a JSON object")
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return "an empty list" if value == [] else names[type(value)]


def _check_unicode(value: str, key: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise LineFault(f"'{key}' holds half a surrogate pair at character {error.start + 1}; not valid Unicode") from error
