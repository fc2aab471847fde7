"""What a row of a dataset holds under its keys, and the fault that names what is wrong with it."""

import difflib
import json
import math
from typing import Any

from megarl.config.data import COLUMNS


class LineFault(Exception):
    """Why one row cannot be used. Raised by parsers, collected by `read_rows`."""


def text_field(row: dict[str, Any], key: str, allow_empty: bool = False) -> str:
    """The text under `key`. Raises `LineFault` when it is missing, no text, empty or not encodable as UTF-8."""
    value = required(row, key)
    if not isinstance(value, str):
        raise LineFault(f"'{key}' is {kind_of(value)}; expected text")
    if not value and not allow_empty:
        raise LineFault(f"'{key}' is empty")
    _check_unicode(value, key)
    return value


def answer_field(row: dict[str, Any], key: str) -> str:
    """The answer under `key` as text; a JSON number is taken as it is written in Python."""
    value = required(row, key)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise LineFault(f"'{key}' is {kind_of(value)}; expected text or a number")
    if isinstance(value, str):
        _check_unicode(value, key)
        if not value.strip():
            raise LineFault(f"'{key}' is empty")
    return str(value)


def number_field(row: dict[str, Any], key: str) -> float:
    """The finite number under `key`. Raises `LineFault` for anything else."""
    value = required(row, key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise LineFault(f"'{key}' is {kind_of(value)}; expected a finite number")
    return float(value)


def messages_field(row: dict[str, Any], key: str) -> list[dict[str, str]]:
    """A chat: a list of `{"role": ..., "content": ...}` with roles system, user, assistant or tool."""
    return check_messages(required(row, key), key)


def check_messages(value: Any, key: str) -> list[dict[str, str]]:
    """`value` if it is a chat, else `LineFault`."""
    if not isinstance(value, list) or not value:
        raise LineFault(f"'{key}' is {kind_of(value)}; expected a list of messages with role and content")
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise LineFault(f"'{key}'[{i}] is {kind_of(message)}; expected an object with role and content")
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
    if key in COLUMNS and row and not near:
        hint += " (data.columns gives columns other names)"
    raise LineFault(f"missing key '{key}'{hint}")


def parse_object(text: str) -> dict[str, Any]:
    """The JSON object that a line holds. Raises `LineFault` for anything else."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise LineFault(f"not JSON: {error.msg} at column {error.colno}") from error
    except (RecursionError, ValueError) as error:
        raise LineFault(f"not JSON that can be read ({type(error).__name__})") from error
    return as_object(value)


def as_object(value: Any) -> dict[str, Any]:
    """`value` if it is an object, else `LineFault`."""
    if not isinstance(value, dict):
        raise LineFault(f"{kind_of(value)}; expected a JSON object")
    return value


def kind_of(value: Any) -> str:
    """What a value is, in words."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return "an empty list" if value == [] else names.get(type(value), f"a value of type {type(value).__name__}")


def _check_unicode(value: str, key: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise LineFault(f"'{key}' holds half a surrogate pair at character {error.start + 1}; not valid Unicode") from error
