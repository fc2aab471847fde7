"""The knobs of a command as a table of dotted names: what stands where, and which known name an unknown one comes nearest to."""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from megarl.config import Run, Section

_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
    tuple: "a list",
    dict: "names and values",
}
_PLACEHOLDERS: dict[Any, Any] = {int: 1, float: 1.0, bool: False, str: "?", Path: "?", tuple: [], dict: {}}
_NEAR = 0.6  # likeness below which a suggestion would only confuse
_DEPTH = 0.15  # what a section further down costs


@dataclass(frozen=True)
class Knob:
    """One name of the configuration. `type` is the plain Python type; `section` is set where other knobs live below this name."""

    name: str  # dotted; list items are `*`
    owner: type[Section]  # the section that declares it
    type: Any
    is_required: bool
    section: type[Section] | None = None

    @property
    def expected(self) -> str:
        """What a value must be, in words."""
        if self.section is not None and self.type is not tuple:
            return "a section with the keys " + ", ".join(self.section.model_fields)
        if get_origin(self.type) is Literal:
            return "one of " + ", ".join(map(str, get_args(self.type)))
        return _WORDS[self.type]

    @property
    def placeholder(self) -> Any:
        """Some value of the right type, for looking at the rest of a faulty file."""
        if get_origin(self.type) is Literal:
            return get_args(self.type)[0]
        return _PLACEHOLDERS.get(self.type, {})


@cache
def knobs(run_type: type[Run]) -> dict[str, Knob]:
    """Every section and leaf of a command's configuration by dotted name, in the order of the schema."""
    return {knob.name: knob for knob in _walk(run_type, "")}


def leaves(run_type: type[Run]) -> list[Knob]:
    """The knobs that hold a value themselves."""
    return [knob for knob in knobs(run_type).values() if knob.section is None]


def generic(name: str) -> str:
    """The name with list indexes replaced: `rewards.0.kind` is declared as `rewards.*.kind`."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def nearest(run_type: type[Run], name: str) -> list[str]:
    """Known names most like `name`, anywhere in the tree; several when equally near, none when nothing is near.

    A name is near when it is spelt alike as a whole or when its last part is; staying in the same section counts a little more, and each
    section further down a little less.
    """
    parent, _, last = generic(name).rpartition(".")
    scores: dict[str, float] = {}
    for known in knobs(run_type):
        known_parent, _, known_last = known.rpartition(".")
        if known_last == "*":
            continue
        alike = difflib.SequenceMatcher(None, last, known_last).ratio()
        whole = difflib.SequenceMatcher(None, generic(name), known).ratio()
        closeness = 0.1 if parent == known_parent else 0.05 if parent and known_parent.startswith(f"{parent}.") else 0.0
        likeness = max(alike + closeness, whole if alike > 0.4 else 0.0)
        if likeness >= _NEAR:
            scores[known] = likeness - _DEPTH * max(0, known.count(".") - name.count("."))
    best = max(scores.values(), default=0.0)
    found = [known for known, score in scores.items() if score >= best - 1e-9]
    indexes = [part for part in name.split(".") if part.isdecimal()]
    return [known.replace("*", indexes[0] if indexes else "0") for known in found[:2]]


def _walk(section: type[Section], prefix: str) -> Iterator[Knob]:
    for field_name, field in section.model_fields.items():
        owner = next(base for base in reversed(section.__mro__) if field_name in base.__dict__.get("__annotations__", {}))
        plain, below = _plain(field)
        name = prefix + field_name
        yield Knob(name, owner, plain, field.is_required(), below)
        if plain is tuple and below is not None:
            yield Knob(f"{name}.*", owner, below, False, below)
            yield from _walk(below, f"{name}.*.")
        elif below is not None:
            yield from _walk(below, f"{name}.")


def _plain(field: FieldInfo) -> tuple[Any, type[Section] | None]:
    """The type without Annotated and None, and the section below it."""
    kind = field.annotation
    options = [option for option in get_args(kind) if option is not NoneType]
    if NoneType in get_args(kind) and len(options) == 1:
        kind = options[0]
    while hasattr(kind, "__metadata__"):
        kind = kind.__origin__
    if get_origin(kind) is dict:
        return dict, None
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        return tuple, item if isinstance(item, type) and issubclass(item, Section) else None
    return kind, kind if isinstance(kind, type) and issubclass(kind, Section) else None
