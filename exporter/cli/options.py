"""Command-line options, derived from the fields of records."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import click
import msgspec

from exporter import backends
from exporter.recipe.fields import Field, array_of, bare, bounds, choices, expected, fields_of, fits, is_pair, kinds

F = TypeVar("F", bound=Callable[..., Any])
R = TypeVar("R", bound=msgspec.Struct)


class Value(click.ParamType[Any]):
    """A parameter type that reads text as the type of a field."""

    def __init__(self, field: Field) -> None:
        self.hint = Union[tuple(kind for kind in kinds(field.hint) if kind is not type(None))]  # noqa: UP007
        self.percent, self.commas = bool(field.extra.get("percent")), bool(field.extra.get("commas"))
        self.repeats = bool(field.extra.get("repeats"))
        self.pair = any(map(is_pair, kinds(self.hint)))
        self.name = field.extra.get("metavar") or "value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The value of a text; a usage error where it does not fit."""
        if not isinstance(value, str):
            return value
        if not value:
            self.fail("it is empty; give a value or leave the option out", param, ctx)
        text = value.strip().removesuffix("%") if self.percent else value
        parts = [part.strip() for part in text.split(",")] if self.commas or (self.pair and "," in text) else text
        try:
            converted = msgspec.convert(parts, self.hint, strict=False)
        except msgspec.ValidationError:
            converted = math.nan
        if not fits(converted, self.hint):
            self.fail(f"{value!r}: expected {expected(self.hint)}", param, ctx)
        return tuple(dict.fromkeys(converted)) if self.commas and not self.repeats else converted


def add(options: Sequence[Callable[[F], F]]) -> Callable[[F], F]:
    """A decorator that adds options to a command, in order."""

    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def options_of(
    record: type[msgspec.Struct],
    *,
    skip: Sequence[str] = (),
    words: Mapping[str, Sequence[str]] | None = None,
    more: Mapping[str, str] | None = None,
    prefix: str = "",
) -> list[Callable[[F], F]]:
    """The options of a record, one for each field.

    Args:
        record: its fields carry the metadata of `about`.
        skip: fields that are no options.
        words: the choices of text fields, where they are known.
        more: sentences that go after the help texts of fields.
        prefix: goes before each help text.
    """
    return [
        _option(_with(field, (more or {}).get(field.name, "")), (words or {}).get(field.name, ()), prefix)
        for field in _fields(record)
        if field.name not in skip
    ]


def _with(field: Field, sentence: str) -> Field:
    return replace(field, help=f"{field.help} {sentence}") if sentence else field


def _fields(record: type[msgspec.Struct]) -> Iterator[Field]:
    """The fields of a record; a list of arrays has one option for each of the array's places, which may be repeated."""
    for field in fields_of(record).values():
        if (array := array_of(field)) is None:
            yield field
        else:
            for place in fields_of(array).values():
                hint = tuple[place.hint, ...]  # type: ignore[name-defined]
                yield Field(f"{field.name}_{place.name}", hint, (), place.help, place.extra)


def _option(field: Field, words: Sequence[str], prefix: str) -> Callable[[F], F]:
    name = field.extra.get("option") or field.name.replace("_", "-")
    help = prefix + (field.help[:1].lower() + field.help[1:] if prefix else field.help)
    if field.hint is bool:
        declaration = f"--{name}/--no-{name}" if field.default else f"--{name}"
        default = "  [default: " + name + "]" if field.default else ""
        return click.option(declaration, field.name, default=field.default, is_flag=True, help=help + default)
    is_list = get_origin(field.hint) is tuple and not field.extra.get("commas")
    only_words = all(get_origin(bare(kind)) is Literal or kind is type(None) for kind in kinds(_item(field)))
    kind: click.ParamType[Any]
    if words or only_words:
        kind = click.Choice(words or choices(_item(field)))
    else:
        kind = Value(Field(field.name, _item(field), None, "", field.extra))
    return click.option(
        f"--{name}",
        field.name,
        type=kind,
        multiple=is_list,
        default=field.default,
        metavar=None if isinstance(kind, click.Choice) else field.extra.get("metavar"),
        help=help + _extras(field),
    )


def _item(field: Field) -> Any:
    """The type of one value of an option."""
    if get_origin(field.hint) is tuple and not field.extra.get("commas"):
        return get_args(field.hint)[0]
    return field.hint


def _extras(field: Field) -> str:
    """Bounds and default, for the end of a help text."""
    limits = bounds(_item(field))
    default = field.extra.get("default") or (
        f"{field.default:g}" if isinstance(field.default, float) else str(field.default or "")
    )
    if field.default == 0 and not isinstance(field.default, bool):
        default = "0"
    parts = [limits] if limits else []
    parts += [f"default: {default}"] if default else []
    return f"  [{'; '.join(parts)}]" if parts else ""


def take(record: type[R], values: dict[str, Any], skip: Sequence[str] = ()) -> R:
    """A record from the values of its options, which are removed from `values`.

    Raises: click.UsageError for arrays whose places are given an unequal number of times.
    """
    taken: dict[str, Any] = {}
    for field in fields_of(record).values():
        if field.name in skip:
            continue
        array = array_of(field)
        taken[field.name] = values.pop(field.name) if array is None else _arrays(field, array, values)
    return record(**taken)


def _arrays(field: Field, array: type[msgspec.Struct], values: dict[str, Any]) -> tuple[Any, ...]:
    places = list(fields_of(array).values())
    columns = [values.pop(f"{field.name}_{place.name}") for place in places]
    count = max(map(len, columns))
    if any(len(column) not in (0, count) for column in columns):
        given = [f"{len(column)} of --{place.extra['option']}" for column, place in zip(columns, places, strict=True)]
        listed = f"{', '.join(given[:-1])} and {given[-1]}"
        raise click.UsageError(f"{listed}: give each of them once for every profile, or leave it out")
    rows = [[column[index] if column else None for column in columns] for index in range(count)]
    return tuple(array.of(*row) for row in rows)  # type: ignore[attr-defined]


def devices() -> str:
    """The words of `--device`, for each runtime that has a choice."""
    words = {name: list(backends.runtime(name).devices) for name in backends.targets()}
    listed = [f"{', '.join(some[:-1])} or {some[-1]} on {name}" for name, some in words.items() if len(some) > 1]
    return f"{'; '.join(listed)}."
