"""Reads a pickle as data: the one file that knows the format, and it never runs what a pickle asks for.

`pickletools` only takes the opcodes apart. The small machine below puts plain values together from them; where a pickle names a class or a
function there stands a `Name`, and where it would call one a `Made` with the arguments, as a note. Names that are not in the
reader's list are refused as well, so that a file which asks for anything else is told at once instead of half understood.
"""

import pickletools
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, NoReturn

from megarl.errors import CheckpointError

VALUES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
CARRIED = {  # opcodes whose argument is the value
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
}
EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set, "EMPTY_TUPLE": tuple}
SHORT_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
PUTS, GETS = {"PUT", "BINPUT", "LONG_BINPUT"}, {"GET", "BINGET", "LONG_BINGET"}
IGNORED = {"PROTO", "FRAME"}


@dataclass(frozen=True)
class Name:
    """A class, function or constant that a pickle names. It is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Made:
    """What a pickle would make by calling `name` with `arguments`, and the state it would give it."""

    name: Name
    arguments: tuple
    state: Any = None
    items: dict = field(default_factory=dict)


@dataclass(eq=False)
class Persistent:
    """A reference to something outside the pickle, by its identifier."""

    identifier: Any


class _Mark:
    pass


def read_pickle(data: bytes, allowed: Collection[tuple[str, str]], where: str) -> Any:
    """The value that `data` describes, of numbers, texts, lists, tuples, sets, dictionaries, `Name`, `Made` and `Persistent`.

    Nothing is imported, looked up or called. Raises `CheckpointError` for a name outside `allowed` ((module, name) pairs), an opcode that
    no checkpoint needs, and data that is no pickle; `where` names the file.
    """
    return _Machine(allowed, where).run(data)


class _Machine:
    def __init__(self, allowed: Collection[tuple[str, str]], where: str):
        self.allowed, self.where = allowed, where
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        try:
            for opcode, argument, _ in pickletools.genops(data):
                if opcode.name == "STOP":
                    (value,) = self.stack
                    if value is _Mark:
                        raise ValueError("it ends in a mark")
                    return value
                self.step(opcode.name, argument)
        except CheckpointError:
            raise
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{self.where} is not a pickle that can be read as data: {error}") from error
        raise CheckpointError(f"{self.where} ends in the middle of a pickle")

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in IGNORED:
            return
        if name in VALUES:
            stack.append(VALUES[name])
        elif name in CARRIED:
            stack.append(argument)
        elif name in EMPTY:
            stack.append(EMPTY[name]())
        elif name in SHORT_TUPLES:
            count = SHORT_TUPLES[name]
            stack[-count:] = [tuple(stack[-count:])]
        elif name in PUTS:
            self.memo[argument] = stack[-1]
        elif name in GETS:
            stack.append(self.memo[argument])
        else:
            handler = getattr(self, f"on_{name.lower()}", None)
            if handler is None:
                self.refuse(f"uses the opcode {name}")
            handler(argument)

    def refuse(self, what: str) -> NoReturn:
        raise CheckpointError(f"{self.where} {what}, which a checkpoint of tensors has no need of: refused, and nothing of it was run")

    def to_mark(self) -> list[Any]:
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _Mark:
                items = self.stack[index + 1 :]
                del self.stack[index:]
                return items
        raise ValueError("no mark on the stack")

    def on_mark(self, _: Any) -> None:
        self.stack.append(_Mark)

    def on_memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def on_pop(self, _: Any) -> None:
        self.stack.pop()

    def on_pop_mark(self, _: Any) -> None:
        self.to_mark()

    def on_tuple(self, _: Any) -> None:
        self.stack.append(tuple(self.to_mark()))

    def on_frozenset(self, _: Any) -> None:
        self.stack.append(frozenset(self.to_mark()))

    def on_append(self, _: Any) -> None:
        item = self.stack.pop()
        self.add_to_list([item])

    def on_appends(self, _: Any) -> None:
        self.add_to_list(self.to_mark())

    def add_to_list(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise ValueError("items appended to what is no list")
        self.stack[-1].extend(items)

    def on_additems(self, _: Any) -> None:
        items = self.to_mark()
        if type(self.stack[-1]) is not set:
            raise ValueError("items added to what is no set")
        self.stack[-1].update(items)

    def on_setitem(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.add_to_dict([key, value])

    def on_setitems(self, _: Any) -> None:
        self.add_to_dict(self.to_mark())

    def add_to_dict(self, pairs: list[Any]) -> None:
        target = self.stack[-1].items if type(self.stack[-1]) is Made else self.stack[-1]
        if type(target) is not dict:
            raise ValueError("items set in what is no dictionary")
        target.update(zip(pairs[::2], pairs[1::2], strict=True))

    def on_global(self, argument: str) -> None:
        self.push_name(*argument.split(" ", 1))

    def on_stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.push_name(module, name)

    def push_name(self, module: Any, name: Any) -> None:
        if (module, name) not in self.allowed:
            self.refuse(f"names {module}.{name}")
        self.stack.append(Name(module, name))

    def on_reduce(self, _: Any) -> None:
        arguments, called = self.stack.pop(), self.stack.pop()
        self.push_made(called, arguments)

    def on_newobj(self, _: Any) -> None:
        self.on_reduce(_)

    def on_newobj_ex(self, _: Any) -> None:
        if self.stack.pop():
            raise ValueError("an object is made with named arguments")
        self.on_reduce(_)

    def push_made(self, called: Any, arguments: Any) -> None:
        if type(called) is not Name or type(arguments) is not tuple:
            raise ValueError("what is called is no name")
        self.stack.append(Made(called, arguments))

    def on_build(self, _: Any) -> None:
        state = self.stack.pop()
        if type(self.stack[-1]) is not Made:
            raise ValueError("state is given to what was not made")
        self.stack[-1].state = state

    def on_binpersid(self, _: Any) -> None:
        self.stack.append(Persistent(self.stack.pop()))
