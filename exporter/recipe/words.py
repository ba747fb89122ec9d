"""A recipe as the words of a command line: what `cli.options` reads, in reverse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, get_origin

import msgspec

from exporter.recipe.fields import Field, array_of, fields_of, is_pair, kinds


def words(record: msgspec.Struct) -> list[str]:
    """The options of a record whose values are not the defaults, as words of a command line."""
    differing = ((field, getattr(record, name)) for name, field in fields_of(type(record)).items())
    return [word for field, value in differing if value != field.default for word in _words(field, value)]


def _words(field: Field, value: Any) -> Iterator[str]:
    name = f"--{field.extra.get('option') or field.name.replace('_', '-')}"
    if isinstance(value, bool):
        yield name if value else f"--no-{name[2:]}"
    elif (array := array_of(field)) is not None:
        for row in value:
            for place in fields_of(array).values():
                yield from (f"--{place.extra['option']}", _text(getattr(row, place.name)))
    elif isinstance(value, tuple) and _is_repeated(field):
        for one in value:
            yield from (name, _text(one))
    else:
        yield from (name, ",".join(map(_text, value)) if isinstance(value, tuple) else _text(value))


def _is_repeated(field: Field) -> bool:
    """Whether each value of a list has the option before it."""
    lists: Sequence[Any] = [kind for kind in kinds(field.hint) if get_origin(kind) is tuple]
    return bool(lists) and not field.extra.get("commas") and not any(map(is_pair, kinds(field.hint)))


def _text(value: Any) -> str:
    return f"{value!r}" if isinstance(value, float) else str(value)
