"""Reads pickles without running anything that they name.

A pickle is a program: its opcodes name functions of any module and call them. This interpreter imports nothing and
calls nothing of theirs. A name is looked up in one table of our own constructors (`exporter.model.pickled`); every
other name becomes a `Stub`, an inert object that keeps only its name. A file that names a module that runs programs,
reads files or opens connections is refused whole, although nothing of it would run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Any, Literal

from exporter.model.harmful import GETATTR, Harmful, checked

MAX_MEMBERS = 1 << 22

_PLAIN_KEYS = (str, bytes, float, bool, type(None))


class Damage(Exception):
    """No sound pickle: truncated, malformed, or an attack by its size or structure."""


@dataclass(frozen=True, eq=False)
class Storage:
    """Where the numbers of tensors lie in the file: its key, the dtype of its elements and how many there are."""

    key: str
    dtype: str
    elements: int


class Stub:
    """An object of an unknown class, or that class: nothing but its name, whatever the pickle does with it.

    kind: `named` by an opcode, `made` by a call, or the method of an object that was made (`bound`).
    """

    __slots__ = ("is_module", "kind", "name")

    def __init__(self, name: str, kind: Literal["named", "made", "bound"] = "made") -> None:
        self.name = name
        self.is_module = False
        self.kind = kind


class Attributes(dict[str, Any]):
    """An object whose attributes are all that it is, such as argparse.Namespace."""


class Record:
    """An object that a constructor of ours builds and that a BUILD opcode completes."""

    def set_state(self, machine: Unpickler, state: Any) -> None:
        """Take the state; here it has nothing that is used."""


class Opaque:
    """A dictionary key that is no plain value: it is never hashed by its content nor compared."""

    __slots__ = ()


class _Bounded:
    """A file whose reads are never longer than what is left of it: a length in a pickle allocates nothing."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._size = file, size
        self.readline = file.readline

    def read(self, count: int) -> bytes:
        return self._file.read(count if 0 <= count < 4096 else max(0, min(count, self._size - self._file.tell())))


Constructor = Callable[["Unpickler", tuple[Any, ...]], Any]


class Unpickler:
    """The stack machine of one pickle.

    storage: makes a Storage of a persistent id.
    constructors: what is built, by dotted name; everything else is a Stub.
    budget: how many members may still be copied by constructors, so that a small file cannot grow without bound.
    """

    def __init__(
        self, storage: Callable[[Any], Storage], constructors: dict[str, Constructor], plain: Callable[[str], Any]
    ) -> None:
        self.storage, self.constructors, self.plain = storage, constructors, plain
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.budget = MAX_MEMBERS

    def load(self, file: IO[bytes], size: int) -> Any:
        """Read one pickle; the file is left behind its end.

        Raises: Harmful; Damage for anything else that is wrong with it.
        """
        import pickletools

        self.stack, self.marks, self.memo, self.budget = [], [], {}, MAX_MEMBERS + size
        try:
            for opcode, argument, _ in pickletools.genops(_Bounded(file, size)):  # type: ignore[arg-type]
                if opcode.name == "STOP":
                    return self.stack.pop()
                _OPCODES[opcode.name](self, argument)
        except (ValueError, LookupError, TypeError, ArithmeticError, MemoryError, RecursionError) as error:
            raise Damage(f"{type(error).__name__}: {str(error)[:120]}") from None
        raise Damage("a pickle without an end")

    def spend(self, members: int) -> None:
        """Count members that a constructor copies. Raises Damage beyond the budget."""
        self.budget -= members
        if self.budget < 0:
            raise Damage("it copies its own members more often than any checkpoint does")

    def push(self, value: Any) -> None:
        """Put a value that is part of the opcode on the stack."""
        self.stack.append(value)

    def pop(self) -> Any:
        """The top of the stack, which may not lie below the last mark."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise Damage("an empty stack")
        value = self.stack.pop()
        _refuse_getattr(value)
        return value

    def popped_function(self) -> Any:
        """Pop the function that REDUCE calls. Only here may `getattr` leave the stack."""
        self.top()  # refuses an empty stack
        return self.stack.pop()

    def top(self) -> Any:
        """The value that the next opcode changes."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise Damage("an empty stack")
        return self.stack[-1]

    def popped_mark(self) -> list[Any]:
        """What lies above the last mark; it is taken off with the mark."""
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        for item in items:
            _refuse_getattr(item)
        return items

    def add_entries(self, target: dict[Any, Any], items: Sequence[Any]) -> None:
        """Add keys and values in turn. A key that is no plain value is replaced: none is hashed by its members."""
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in _PLAIN_KEYS and not (type(key) is int and abs(key) < 1 << 60):
                key = Opaque()
            if isinstance(key, str) and key in target:
                raise Damage(f"two entries {key[:60]!r}")
            target[key] = value

    def names(self, module: str, name: str) -> None:
        """Push what a name of the pickle stands for, without looking it up anywhere but in our table."""
        dotted = checked(module, name)
        plain = self.plain(dotted)
        self.stack.append(Stub(dotted, "named") if plain is None else plain)

    def construct(self, function: Any, arguments: Any) -> None:
        """Push what our constructor of this name builds, or a stub."""
        if not isinstance(function, Stub):
            raise Damage(f"it calls a {type(function).__name__}")
        if function.name == GETATTR:
            self.stack.append(_inner(arguments))
            return
        handed = arguments if isinstance(arguments, tuple) else ()
        for stub in (function, *handed):
            if isinstance(stub, Stub) and stub.kind == "bound":  # which could call anything
                raise Harmful(stub.name)
        build = self.constructors.get(function.name)
        if build is None or not isinstance(arguments, tuple):
            self.stack.append(Stub(function.name))
            return
        try:
            self.stack.append(build(self, arguments))
        except (ValueError, LookupError, TypeError, ArithmeticError):  # of other arguments than the real one takes
            self.stack.append(Stub(function.name))


def _inner(arguments: Any) -> Stub:
    """What `getattr(CLASS, NAME)` names, as protocols below 4 pickle it, or the method of an object.

    Raises: Harmful for a harmful name, and for a getattr of anything else.
    """
    if not (isinstance(arguments, tuple) and list(map(type, arguments)) == [Stub, str]):
        raise Harmful(GETATTR)
    outer, attribute = arguments
    module, _, name = outer.name.rpartition(".")
    dotted = checked(module, f"{name}.{attribute}")
    if outer.kind == "bound":
        raise Harmful(dotted)
    return Stub(dotted, "named" if outer.kind == "named" else "bound")


def _refuse_getattr(value: Any) -> None:
    """Raises: Harmful if the value is `getattr`, which may only be called."""
    if isinstance(value, Stub) and value.name == GETATTR:
        raise Harmful(GETATTR)


def _global(machine: Unpickler, argument: str) -> None:
    module, _, name = argument.partition(" ")
    machine.names(module, name)


def _stack_global(machine: Unpickler, _: Any) -> None:
    name, module = machine.pop(), machine.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise Damage("a name that is no text")
    machine.names(module, name)


def _reduce(machine: Unpickler, _: Any) -> None:
    arguments, function = machine.pop(), machine.popped_function()
    machine.construct(function, arguments)


def _newobj_ex(machine: Unpickler, _: Any) -> None:
    keywords, arguments, function = machine.pop(), machine.pop(), machine.pop()
    machine.construct(function, arguments if not keywords else None)


def _inst(machine: Unpickler, argument: str) -> None:
    arguments = tuple(machine.popped_mark())
    _global(machine, argument)
    machine.construct(machine.pop(), arguments)


def _obj(machine: Unpickler, _: Any) -> None:
    function, *arguments = machine.popped_mark()
    machine.construct(function, tuple(arguments))


def _build(machine: Unpickler, _: Any) -> None:
    state, target = machine.pop(), machine.top()
    if isinstance(target, Stub):
        attributes = state if isinstance(state, dict) else {}
        target.is_module |= "_modules" in attributes and "_parameters" in attributes
    elif isinstance(target, Attributes):
        if isinstance(state, dict):
            machine.spend(len(state))
            target.update(state)
    elif isinstance(target, Record):
        target.set_state(machine, state)
    elif not isinstance(target, dict | str | list):
        raise Damage(f"a state for a {type(target).__name__}")


def _persistent(machine: Unpickler, _: Any) -> None:
    machine.stack.append(machine.storage(machine.pop()))


def _extend(machine: Unpickler, items: list[Any]) -> None:
    target = machine.top()
    if isinstance(target, list):
        target.extend(items)
    elif not isinstance(target, Stub):
        raise Damage(f"members for a {type(target).__name__}")


def _set_items(machine: Unpickler, items: list[Any]) -> None:
    target = machine.top()
    if isinstance(target, Stub):
        return
    if not isinstance(target, dict) or len(items) % 2:
        raise Damage(f"entries for a {type(target).__name__}")
    machine.add_entries(target, items)


def _get(machine: Unpickler, index: Any) -> None:
    machine.stack.append(machine.memo[int(index)])


def _put(machine: Unpickler, index: Any) -> None:
    machine.memo[int(index)] = machine.top()


def _tuple(count: int) -> Callable[[Unpickler, Any], None]:
    def put(machine: Unpickler, _: Any) -> None:
        items = [machine.pop() for _ in range(count)]
        machine.push(tuple(reversed(items)))

    return put


def _dict(machine: Unpickler, _: Any) -> None:
    items = machine.popped_mark()
    machine.push({})
    _set_items(machine, items)


def _set_item(machine: Unpickler, _: Any) -> None:
    value, key = machine.pop(), machine.pop()
    _set_items(machine, [key, value])


def _pop(machine: Unpickler, _: Any) -> None:
    if machine.marks and machine.marks[-1] == len(machine.stack):
        machine.marks.pop()
    else:
        machine.pop()


def _refuse(machine: Unpickler, argument: Any) -> None:
    raise Damage("an opcode that no checkpoint has")


def _literal(value: Callable[[], Any]) -> Callable[[Unpickler, Any], None]:
    return lambda machine, _: machine.push(value())


_VALUES = """
    INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE
    SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8
"""
_OPCODES: dict[str, Callable[[Unpickler, Any], Any]] = {
    **dict.fromkeys(_VALUES.split(), Unpickler.push),
    "NONE": _literal(lambda: None),
    "NEWTRUE": _literal(lambda: True),
    "NEWFALSE": _literal(lambda: False),
    "EMPTY_LIST": _literal(list),
    "EMPTY_TUPLE": _literal(tuple),
    "EMPTY_DICT": _literal(dict),
    "EMPTY_SET": _literal(list),  # sets become lists: no value of the pickle is hashed
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "POP": _pop,
    "POP_MARK": lambda machine, _: machine.popped_mark(),
    "DUP": lambda machine, _: machine.push(machine.top()),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.popped_mark())),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "LIST": lambda machine, _: machine.push(machine.popped_mark()),
    "FROZENSET": lambda machine, _: machine.push(machine.popped_mark()),
    "DICT": _dict,
    "APPEND": lambda machine, _: _extend(machine, [machine.pop()]),
    "APPENDS": lambda machine, _: _extend(machine, machine.popped_mark()),
    "ADDITEMS": lambda machine, _: _extend(machine, machine.popped_mark()),
    "SETITEM": _set_item,
    "SETITEMS": lambda machine, _: _set_items(machine, machine.popped_mark()),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _get),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _put),
    "MEMOIZE": lambda machine, _: _put(machine, len(machine.memo)),
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _reduce,
    "NEWOBJ": _reduce,
    "NEWOBJ_EX": _newobj_ex,
    "INST": _inst,
    "OBJ": _obj,
    "BUILD": _build,
    "BINPERSID": _persistent,
    **dict.fromkeys(("PERSID", "EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"), _refuse),
}
