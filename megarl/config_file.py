"""A run from its YAML file and its `a.b=c` overrides: parse, place, validate, and say every fault in one line each."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megarl.config import DpoRun, PpoRun, RewardRun, RrhfRun, Run, SampleRun, SftRun
from megarl.errors import ConfigError
from megarl.knobs import generic, knobs, nearest
from megarl.yaml_document import describe, parse_value, read_document

RUNS: dict[str, type[Run]] = {
    "ppo": PpoRun,
    "sft": SftRun,
    "reward": RewardRun,
    "dpo": DpoRun,
    "rrhf": RrhfRun,
    "sample": SampleRun,
}

_EXPECTED = {  # limits, by pydantic's name of the error
    "greater_than_equal": "at least {ge:g}",
    "greater_than": "more than {gt:g}",
    "less_than_equal": "at most {le:g}",
    "less_than": "less than {lt:g}",
    "literal_error": "one of {expected}",
    "finite_number": "a finite number",
}


@dataclass(frozen=True)
class Fault:
    """Something wrong with a run. `keys` are the dotted names it speaks about, `text` one sentence: found, expected, what to change."""

    keys: tuple[str, ...]
    text: str

    def touches(self, names: Sequence[str]) -> bool:
        """True when one of the keys is, holds, or lies inside one of `names`."""
        return any(f"{key}.".startswith(f"{name}.") or f"{name}.".startswith(f"{key}.") for key in self.keys for name in names)


@dataclass(frozen=True)
class Draft:
    """A run as far as its file can be understood.

    With faults, `run` holds defaults or placeholders at the faulty keys (None when not even that is possible), so that the rest can
    still be checked: everything wrong is said at once.
    """

    source: Path
    run: Any
    faults: tuple[Fault, ...]
    lines: dict[str, int]
    overridden: tuple[str, ...]

    @property
    def faulty(self) -> tuple[str, ...]:
        """Names whose value in `run` is not what the user meant; what follows from them alone is not worth saying."""
        return tuple(key for fault in self.faults for key in fault.keys)

    def located(self, fault: Fault) -> str:
        """The fault as one line that starts with where its first key was written (the command line when it has none)."""
        return f"{self.where(fault.keys[0]) if fault.keys else 'command line'}: {fault.text}"

    def where(self, key: str) -> str:
        """`file:line` of a dotted name or of the nearest section that was written, `command line` for an override."""
        if any(f"{key}.".startswith(f"{name}.") for name in self.overridden):
            return "command line"
        while key:
            if key in self.lines:
                return f"{self.source}:{self.lines[key]}"
            key = key.rpartition(".")[0]
        return str(self.source)


def load_run(kind: str, path: Path | str, overrides: Sequence[str] = ()) -> Any:
    """The frozen run of `kind` (a key of `RUNS`) in `path`.

    Raises ConfigError with every fault of the file and the overrides. Whether the run fits a world, its models and its files is
    `megarl.cross_check`.
    """
    draft = draft_run(kind, path, overrides)
    if draft.faults:
        raise ConfigError([draft.located(fault) for fault in draft.faults])
    return draft.run


def draft_run(kind: str, path: Path | str, overrides: Sequence[str] = ()) -> Draft:
    """The run together with everything wrong in its keys and values. Raises ConfigError only for a file without a readable tree."""
    run_type, source = RUNS[kind], Path(path)
    document = read_document(source)
    tree, lines = document.tree, dict(document.lines)
    faults = []
    for line, text in document.faults:
        name = text.partition(":")[0]
        lines[name] = line
        faults.append(Fault((name,), text))
    overridden = []
    for override in overrides:
        try:
            overridden.append(_place(tree, override))
        except ConfigError as error:
            faults.append(Fault((), str(error)))
    try:
        run = _validate(run_type, tree)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        broken = [name for _, text in document.faults if (name := text.partition(":")[0])]
        found = [fault for item in errors for fault in _faults(run_type, item)]
        faults += [fault for fault in found if not fault.touches(broken)]
        run = _repaired(run_type, tree, errors)
    return Draft(source, run, tuple(faults), lines, tuple(overridden))


def to_yaml(run: Run) -> str:
    """The resolved run as YAML that `load_run` reads back to an equal run."""
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False, width=140)


def _validate(run_type: type[Run], tree: Any) -> Run:
    # JSON's strict mode knows exactly the types a YAML file can hold: no "8" for 8, no 1 for true.
    return run_type.model_validate_json(json.dumps(tree), strict=True)


def _place(tree: dict, override: str) -> str:
    """Puts the value of `a.b=c` into the tree and returns the dotted name. Lists are reached by index, one past the end appends."""
    name, equals, text = override.partition("=")
    if not equals or not name.strip(".") or any(not part for part in name.split(".")):
        raise ConfigError(f"found {override!r}; expected key=value, such as parallel.tensor=2")
    try:
        value = parse_value(text)
    except ConfigError as error:
        raise ConfigError(f"{name}: {str(error).partition(': ')[2] or error}") from None
    *sections, last = name.split(".")
    here, passed = tree, ""
    for part in sections:
        passed = f"{passed}.{part}" if passed else part
        following = _get(here, part, passed)
        if following is None:
            following = {}
            _set(here, part, following, passed)
        if not isinstance(following, (dict, list)):
            raise ConfigError(f"{name}: {passed} is {describe(following)}; expected a section or a list there")
        here = following
    _set(here, last, value, name)
    return name


def _get(here: dict | list, part: str, name: str) -> Any:
    if isinstance(here, dict):
        return here.get(part)
    index = _index(here, part, name)
    return here[index] if index < len(here) else None


def _set(here: dict | list, part: str, value: Any, name: str) -> None:
    if isinstance(here, dict):
        here[part] = value
        return
    index = _index(here, part, name)
    here[index : index + 1] = [value]


def _index(items: list, part: str, name: str) -> int:
    if not part.isdecimal() or int(part) > len(items):
        raise ConfigError(f"{name}: the list has {len(items)} entries; expected an index from 0 to {len(items)}, found {part}")
    return int(part)


def _faults(run_type: type[Run], item: dict[str, Any]) -> list[Fault]:
    name = ".".join(map(str, item["loc"]))
    if item["type"] == "extra_forbidden" and isinstance(item["input"], dict) and item["input"] and not nearest(run_type, name):
        # a section of another command: its keys may have a home here
        return [_fault(run_type, item | {"loc": (*item["loc"], key), "input": value}) for key, value in item["input"].items()]
    return [_fault(run_type, item)]


def _fault(run_type: type[Run], item: dict[str, Any]) -> Fault:
    name = ".".join(map(str, item["loc"]))
    found, error = item["input"], item["type"]
    knob = knobs(run_type).get(generic(name))
    if error == "extra_forbidden":
        return Fault((name, *nearest(run_type, name)), _unknown(run_type, name))
    if error == "missing":
        return Fault((name,), f"{name}: missing; expected {knob.expected if knob else 'a value'}")
    if error == "value_error":
        expected = item["msg"].partition(", ")[2]
    elif error in _EXPECTED:
        expected = _EXPECTED[error].format(**item.get("ctx", {}))
    else:
        expected = knob.expected if knob else item["msg"]
    return Fault((name,), f"{name}: found {describe(found)}; expected {expected}")


def _unknown(run_type: type[Run], name: str) -> str:
    near = nearest(run_type, name)
    if name in near:  # the right name, written with dots where YAML wants a section
        section, _, last = name.rpartition(".")
        return f"{name}: a dotted name is for the command line; expected `{last}:` inside the section `{section}:`"
    if near:
        return f"{name}: unknown key; did you mean {' or '.join(near)}?"
    parent = knobs(run_type).get(generic(name.rpartition(".")[0]))
    known = parent.section.model_fields if parent and parent.section else run_type.model_fields
    return f"{name}: unknown key; expected one of {', '.join(known)}"


def _repaired(run_type: type[Run], tree: dict, errors: list[dict[str, Any]]) -> Run | None:
    """The run with defaults or placeholders where the tree is wrong. A placeholder section may lack keys in turn, hence the rounds."""
    for _ in range(5):
        for item in errors:
            _repair(run_type, tree, item)
        try:
            return _validate(run_type, tree)
        except ValidationError as error:
            errors = error.errors(include_url=False)
    return None


def _repair(run_type: type[Run], tree: dict, item: dict[str, Any]) -> None:
    *sections, last = item["loc"]
    here: Any = tree
    for part in sections:
        here = here[part]
    knob = knobs(run_type).get(generic(".".join(map(str, item["loc"]))))
    if item["type"] == "extra_forbidden" or knob is None or not (knob.is_required or isinstance(here, list)):
        here.pop(last, None) if isinstance(here, dict) else None
    else:
        here[last] = knob.placeholder
