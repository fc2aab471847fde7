"""A YAML file as a tree of plain values that remembers its line numbers.

Scalars follow YAML 1.2: `yes` and `on` are text, `1e-6` is a number, `010` and `1:30` are text, dates stay text. Duplicate keys, tags
that name Python objects and anchors that contain themselves are refused. The loader of PyYAML (YAML 1.1) gets all of these wrong
for a configuration.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megarl.errors import ConfigError

_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2's core schema (and `_` between digits)."""

    yaml_implicit_resolvers: dict = {}


_DIGITS = r"[0-9]+(?:_[0-9]+)*"
_INTEGER = re.compile(r"^[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(
    rf"^[-+]?(?:{_DIGITS}\.(?:{_DIGITS})?(?:[eE][-+]?[0-9]+)?|\.{_DIGITS}(?:[eE][-+]?[0-9]+)?|{_DIGITS}[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$"
    r"|^\.(?:nan|NaN|NAN)$"
)


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int | str:
    try:
        return int(node.value.replace("_", ""), 0)
    except ValueError:  # more digits than Python converts, or an explicit !!int tag on text
        return node.value


def _float(loader: _Loader, node: yaml.ScalarNode) -> float | str:
    try:
        return loader.construct_yaml_float(node)
    except ValueError:
        return node.value


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INTEGER, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^(?:<<)$"), ["<"])
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
_Loader.add_constructor("tag:yaml.org,2002:float", _float)


@dataclass
class Document:
    """What a YAML file says. `lines` maps dotted names (list items by their index) to line numbers, `faults` are one sentence each."""

    tree: Any
    lines: dict[str, int] = field(default_factory=dict)
    faults: list[tuple[int, str]] = field(default_factory=list)


def read_document(path: Path) -> Document:
    """The mapping in the file `path`. Raises ConfigError, one line with `file:line`, for a file that cannot be read or parsed."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; expected the YAML file of a run, such as one in configs/") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8 text (byte {error.start})"
        raise ConfigError(f"{path}: cannot be read: {reason}") from None
    document = parse_document(text, str(path))
    if document.tree is None:
        raise ConfigError(f"{path}: empty; expected keys such as output_dir, tokenizer and data")
    if not isinstance(document.tree, dict):
        raise ConfigError(f"{path}: found {describe(document.tree)}; expected keys and values (output_dir: ...)")
    return document


def parse_document(text: str, source: str) -> Document:
    """The tree written in `text`; `source` names it in errors. Raises ConfigError for one line of wrong syntax."""
    loader = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        document = Document(None)
        if root is not None:
            document.tree = _value(loader, root, "", (), document)
        return document
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}" if mark else source
        problem = " ".join(str(error.problem or error.context).split())
        raise ConfigError(f"{where}: not valid YAML: {problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    finally:
        if loader is not None:
            loader.dispose()


def parse_value(text: str) -> Any:
    """The value of one override, read as YAML. Raises ConfigError with the reason alone."""
    document = parse_document(text, "value")
    if document.faults:
        raise ConfigError(document.faults[0][1])
    return document.tree


def describe(value: Any) -> str:
    """A value as a user wrote it, short enough for one line."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a section with the keys " + ", ".join(map(str, value)) if value else "an empty section"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _value(loader: _Loader, node: yaml.Node, name: str, ancestors: tuple[yaml.Node, ...], document: Document) -> Any:
    line = node.start_mark.line + 1
    if any(node is ancestor for ancestor in ancestors):
        document.faults.append((line, f"{name}: an anchor that contains itself; expected a tree of values"))
        return None
    inside = (*ancestors, node)
    prefix = f"{name}." if name else ""
    if node.tag not in _TAGS:
        document.faults.append((line, f"{name}: found the tag {node.tag}; expected a plain value"))
        return None
    if isinstance(node, yaml.SequenceNode):
        items = []
        for index, item in enumerate(node.value):
            document.lines.setdefault(f"{prefix}{index}", item.start_mark.line + 1)
            items.append(_value(loader, item, f"{prefix}{index}", inside, document))
        return items
    if isinstance(node, yaml.MappingNode):
        _note_duplicates(node, prefix, document)
        loader.flatten_mapping(node)
        tree = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is None:
                fault = f"{prefix}?: a key that is itself a list or section; expected a name"
                document.faults.append((key_node.start_mark.line + 1, fault))
                continue
            document.lines[f"{prefix}{key}"] = key_node.start_mark.line + 1
            tree[key] = _value(loader, value_node, f"{prefix}{key}", inside, document)
        return tree
    try:
        return loader.construct_object(node)
    except (ValueError, KeyError):  # an explicit tag on a scalar that is something else, as in !!int text
        document.faults.append((line, f"{name}: found {describe(node.value)} with the tag {node.tag}; expected a value of that kind"))
        return None


def _note_duplicates(node: yaml.MappingNode, prefix: str, document: Document) -> None:
    first: dict[str, int] = {}
    for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
        if key.value in first:
            text = f"{prefix}{key.value}: written twice, first on line {first[key.value]}; expected one value"
            document.faults.append((key.start_mark.line + 1, text))
        else:
            first[key.value] = key.start_mark.line + 1
