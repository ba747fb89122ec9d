"""Fields of records: types, bounds, help texts and defaults, for the YAML reader, the command line and the docs."""

from __future__ import annotations

import math
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from exporter.artifact.sidecar import Record


def about(help: str, **extra: Any) -> msgspec.Meta:
    """Metadata of a field.

    Args:
        help: one sentence for `--help`, the JSON schema and the docs.
        extra: `metavar`, the placeholder in `--help`; `path=True` for paths, which are relative to the recipe's file;
            `default`, a text that describes the default where it is None; `option`, the option's name where it is not
            the field's; `commas=True` for lists that are given as in `1,8`, and
            `repeats=True` where a value may stand in them twice.
    """
    return msgspec.Meta(description=help, extra=extra)


@dataclass(frozen=True)
class Field:
    """A field of a record. `hint` is its type with bounds, without the metadata of `about`."""

    name: str
    hint: Any
    default: Any
    help: str
    extra: dict[str, Any]

    @property
    def section(self) -> type[Record] | None:
        """The record that this field holds, or None."""
        for kind in kinds(self.hint):
            if isinstance(kind, type) and issubclass(kind, Record):
                return kind
        return None


@cache
def fields_of(kind: type[msgspec.Struct]) -> Mapping[str, Field]:
    """The fields of a record by name, in order."""
    hints = get_type_hints(kind, include_extras=True)
    fields = {}
    for info in msgspec.structs.fields(kind):
        hint, description = hints[info.name], ""
        extra: dict[str, Any] = {}
        if get_origin(hint) is Annotated:
            for meta in hint.__metadata__:
                description, extra = meta.description or description, dict(meta.extra or extra)
            limits = [meta for meta in hint.__metadata__ if not meta.description]
            hint = Annotated[(hint.__origin__, *limits)] if limits else hint.__origin__
        default = info.default if info.default_factory is msgspec.NODEFAULT else info.default_factory()
        fields[info.name] = Field(info.name, hint, default, description, extra)
    return MappingProxyType(fields)


def array_of(field: Field) -> type[msgspec.Struct] | None:
    """The record of a field that is a list of arrays with named places."""
    item = get_args(field.hint)[0] if get_origin(field.hint) is tuple else None
    if isinstance(item, type) and issubclass(item, msgspec.Struct) and item.__struct_config__.array_like:
        return item
    return None


def kinds(hint: Any) -> Sequence[Any]:
    """The alternatives of a union, or the type itself."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def bare(kind: Any) -> Any:
    """A type without its bounds."""
    return kind.__origin__ if get_origin(kind) is Annotated else kind


def is_pair(kind: Any) -> bool:
    """Whether a type is a pair, as of height and width."""
    limits = kind.__metadata__ if get_origin(kind) is Annotated else ()
    return any(isinstance(meta, msgspec.Meta) and meta.min_length == meta.max_length == 2 for meta in limits)


def choices(hint: Any) -> list[str]:
    """The words that a type allows."""
    return [str(word) for kind in kinds(hint) if get_origin(kind) is Literal for word in get_args(kind)]


_WORDS: dict[Any, str] = {
    int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"
}  # fmt: skip


def expected(hint: Any) -> str:
    """A type in words, bounds included."""
    words: list[str] = []
    for kind in kinds(hint):
        base = bare(kind)
        if get_origin(base) is Literal:
            words += [str(word) for word in get_args(base)]
        elif is_pair(kind):
            words.append("two of these (height, width)")
        elif get_origin(base) is tuple:
            words.append(f"a list, each {expected(get_args(base)[0])}")
        elif (names := getattr(base, "__struct_fields__", ())) and base.__struct_config__.array_like:
            words.append(f"[{', '.join(names)}]")
        elif get_origin(base) is dict or (isinstance(base, type) and issubclass(base, msgspec.Struct)):
            words.append("keys with values")
        else:
            words.append(
                _title(kind) or _WORDS.get(base, str(base)) + (f" {limits}" if (limits := bounds(kind)) else "")
            )
    return " or ".join([", ".join(words[:-1]), words[-1]] if words[:-1] else words)


def bounds(hint: Any) -> str:
    """The bounds of a number: `from 18 to 23`, `from 1`, `above 0`, `at most 1`; "" where there are none."""
    for kind in kinds(hint):
        for meta in kind.__metadata__ if get_origin(kind) is Annotated else ():
            if meta.gt is not None:
                end = f", at most {meta.le:g}" if meta.le is not None else ""
                return f"above {meta.gt:g}" + (f" and below {meta.lt:g}" if meta.lt is not None else end)
            if meta.ge is not None:
                return f"from {meta.ge:g}" + (f" to {meta.le:g}" if meta.le is not None else "")
            if meta.le is not None:
                return f"at most {meta.le:g}"
    return ""


def _title(kind: Any) -> str:
    """The words that a type is described with, or ""."""
    limits = kind.__metadata__ if get_origin(kind) is Annotated else ()
    return next((meta.title for meta in limits if meta.title), "")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has this type and is within its bounds; numbers that are not finite never are."""
    try:
        converted = msgspec.convert(msgspec.to_builtins(value), hint)
    except (msgspec.ValidationError, TypeError):
        return False
    return _is_within(converted, hint) and (not isinstance(converted, float) or math.isfinite(converted))


def _is_within(value: Any, hint: Any) -> bool:
    """Whether a number, or each number of a list, is within the bounds of its type. In a process that has converted
    many types, msgspec 0.22 sometimes forgets bounds."""
    if isinstance(value, tuple):
        lists = [kind for kind in map(bare, kinds(hint)) if get_origin(kind) is tuple]
        return any(all(_within(one, get_args(kind)[0]) for one in value) for kind in lists)
    numbers = [kind for kind in kinds(hint) if bare(kind) in (int, float)]
    return not numbers or any(_within(value, kind) for kind in numbers)


def _within(value: Any, hint: Any) -> bool:
    """Whether a number is within the bounds of its type."""
    limits = hint.__metadata__ if get_origin(hint) is Annotated and isinstance(value, int | float) else ()
    return all(
        (meta.gt is None or value > meta.gt)
        and (meta.ge is None or value >= meta.ge)
        and (meta.le is None or value <= meta.le)
        and (meta.lt is None or value < meta.lt)
        for meta in limits
    )


def problems(record: msgspec.Struct, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Each field of a record and of its sections whose value does not fit: its path, and what was expected."""
    for name, field in fields_of(type(record)).items():
        value, here = getattr(record, name), (*path, name)
        if isinstance(value, Record):
            yield from problems(value, here)
        elif not fits(value, field.hint):
            yield here, f"{'.'.join(here)}: expected {expected(field.hint)}, found {value!r}"


def differing(record: Record, default: Record) -> dict[str, Any]:
    """The fields of a record, as builtins, that differ from those of another."""
    values, defaults = msgspec.to_builtins(record), msgspec.to_builtins(default)
    return {name: value for name, value in values.items() if value != defaults[name]}
