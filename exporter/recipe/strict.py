"""Strict YAML reader: every problem of a file at once, each with its line and column.

A scalar is read as the type of its field, never guessed: `8.10` in a text field is text. Tags, anchors and aliases are
refused, so that a file can neither run code nor expand.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, get_origin

import msgspec
import yaml

from exporter.errors import BadRequest, first_line, nearest
from exporter.recipe.fields import Field, choices, expected, fields_of, fits, is_pair, kinds

MAX_BYTES = 64 * 1024
MAX_DEPTH = 16
MOST_SHOWN = 20
_PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "map", "seq")}
_PLAIN_TAGS |= {"tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:merge", "tag:yaml.org,2002:value"}  # read as text

Path = tuple[str, ...]


@dataclass(order=True)
class Problem:
    """What is wrong, and where: a line and a column from 1, or an override; 0 is the file as a whole."""

    line: int
    column: int
    text: str
    source: str = ""

    def __str__(self) -> str:
        where = f"{self.source}:{self.line}:{self.column}" if self.line else self.source
        return f"{where}: {self.text}" if where else self.text


@dataclass
class Marks:
    """Where each key of a file stands, and what is wrong with it."""

    source: str
    places: dict[Path, yaml.Mark] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def add(self, mark: yaml.Mark | None, text: str) -> None:
        """A problem at a place."""
        if mark is None or mark.name != self.source:  # an override has no lines
            self.problems.append(Problem(0, 0, text, mark.name if mark else self.source))
        else:
            self.problems.append(Problem(mark.line + 1, mark.column + 1, text, self.source))

    def at(self, path: Path, text: str) -> None:
        """A problem with a key, or with the nearest section above it that is there."""
        while path and path not in self.places:
            path = path[:-1]
        self.add(self.places.get(path), text)

    def refuse(self) -> None:
        """Raises: BadRequest with all the problems, if there are any."""
        if not self.problems:
            return
        lines = [str(problem) for problem in sorted(self.problems)]
        more = [f"and {len(lines) - MOST_SHOWN} more"] if len(lines) > MOST_SHOWN else []
        raise BadRequest(*lines[:MOST_SHOWN], *more)


def parse(text: str, source: str, overrides: Iterable[str] = ()) -> tuple[yaml.Node | None, Marks]:
    """The nodes of a document, with `a.b=value` overrides put in.

    Raises: BadRequest for what is no YAML, or more than a recipe may be.
    """
    marks = Marks(source)
    root = _compose(text, source, marks)
    for override in overrides:
        _override(root, override, marks)
    return root, marks


def _compose(text: str, source: str, marks: Marks) -> yaml.Node:
    if len(text.encode("utf-8", "replace")) > MAX_BYTES:
        raise BadRequest(f"{source}: larger than {MAX_BYTES // 1024} KiB; a recipe has some thirty lines")
    try:
        depth = 0
        for event in yaml.parse(_named(text, source), Loader=yaml.SafeLoader):
            if getattr(event, "anchor", None) is not None:
                marks.add(event.start_mark, f"anchors and aliases are not taken (&{event.anchor}); write it out")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                marks.add(event.start_mark, f"nested more than {MAX_DEPTH} deep; a recipe has sections and keys")
                break
        marks.refuse()
        root = yaml.compose(_named(text, source), Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        marks.add(error.problem_mark, f"no YAML: {error.problem}")
        marks.refuse()
        raise
    except yaml.YAMLError as error:
        raise BadRequest(f"{source}: no YAML: {first_line(error)}") from None
    if not isinstance(root, yaml.MappingNode):
        raise BadRequest(f"{source}: expected sections and keys, as in 'model:'")
    return root


def _named(text: str, source: str) -> Any:
    stream = io.StringIO(text)
    stream.name = source
    return stream


def _override(root: yaml.Node, override: str, marks: Marks) -> None:
    """Put `a.b=value` into a document.

    Raises: BadRequest for what is no override.
    """
    name = f"--set {override}"
    keys, equals, value = override.partition("=")
    path = keys.strip().split(".")
    if not equals or not all(path):
        raise BadRequest(f"{name}: expected KEY=VALUE, as in --set quantization.calib_size=512")
    if " #" in f" {value}" and value.lstrip()[:1] not in ("'", '"', "[", "{"):  # which YAML would read as a comment
        value = json.dumps(value.strip(), ensure_ascii=False)
    found = _compose(f"value: {value}\n", name, Marks(name))
    assert isinstance(found, yaml.MappingNode)
    leaf = found.value[0][1]
    node = root
    for depth, key in enumerate(path):
        assert isinstance(node, yaml.MappingNode)
        here = next((pair for pair in node.value if pair[0].value == key), None)
        last = depth == len(path) - 1
        if here and not last and isinstance(here[1], yaml.MappingNode):
            node = here[1]
            continue
        new = leaf if last else yaml.MappingNode("tag:yaml.org,2002:map", [], leaf.start_mark, leaf.end_mark)
        node.value = [pair for pair in node.value if pair is not here]
        word = yaml.ScalarNode("tag:yaml.org,2002:str", key, leaf.start_mark, leaf.end_mark)
        node.value.append((word, new))
        node = new


def read(root: yaml.Node, kind: type[msgspec.Struct], marks: Marks, path: Path = ()) -> dict[str, Any]:
    """The keys of a section whose values fit the fields of a record; every problem goes into the marks."""
    known = fields_of(kind)
    values: dict[str, Any] = {}
    if not isinstance(root, yaml.MappingNode) or root.tag not in _PLAIN_TAGS:
        marks.add(root.start_mark, f"{'.'.join(path) or 'a recipe'}: expected keys with values, found {_text_of(root)}")
        return values
    for key, node in root.value:
        name = key.value if isinstance(key, yaml.ScalarNode) and key.tag in _PLAIN_TAGS else None
        if name is None:
            marks.add(key.start_mark, f"expected a key, found {_text_of(key)}")
        elif name in values or (*path, name) in marks.places:
            marks.add(key.start_mark, f"{name} is given twice")
        elif name not in known:
            where = f" in {'.'.join(path)}" if path else ""
            hint = nearest(name, known) if known else "no key is known here"
            marks.add(key.start_mark, f"unknown key {name!r}{where}; {hint}")
        else:
            marks.places[(*path, name)] = key.start_mark
            _read_field(values, node, known[name], marks, (*path, name))
    return values


def _read_field(values: dict[str, Any], node: yaml.Node, field: Field, marks: Marks, path: Path) -> None:
    name, hint = field.name, field.hint
    if field.section is not None and _is_null(node) and type(None) not in kinds(hint):
        values[name] = {}  # a section without keys
        return
    if field.section is not None and not _is_null(node):
        values[name] = read(node, field.section, marks, path)
        return
    if dict in [get_origin(kind) for kind in kinds(hint)] and isinstance(node, yaml.MappingNode):
        values[name] = node  # its record depends on another key
        return
    pair = _pair(node) if any(map(is_pair, kinds(hint))) else []
    for value, strict in [*_readings(node), *pair]:
        try:
            converted = msgspec.convert(value, hint, strict=strict)
        except msgspec.ValidationError:
            continue
        if fits(converted, hint):
            values[name] = converted
            return
    problem = f"{'.'.join(path)}: expected {expected(hint)}, found {_text_of(node)}{_near(node, hint)}"
    marks.add(node.start_mark, problem)


def _readings(node: yaml.Node) -> list[tuple[Any, bool]]:
    """What a node may stand for, and whether text is only text: nothing, the text as it is, or the number it says."""
    if not _is_plain(node):
        return []
    if _is_null(node):
        return [(None, True)]
    if isinstance(node, yaml.ScalarNode):
        return [(node.value, True)] if node.style in ("'", '"') else [(node.value, True), (node.value, False)]
    return [(_texts(node), True), (_numbers(node), True)] if isinstance(node, yaml.SequenceNode) else []


def _pair(node: yaml.Node) -> list[tuple[Any, bool]]:
    """The reading of text with a comma, as in `320,256`, as a list."""
    text = node.value if isinstance(node, yaml.ScalarNode) and _is_plain(node) else ""
    return [([part.strip() for part in text.split(",")], False)] if "," in text else []


def _is_plain(node: yaml.Node) -> bool:
    inner = node.value if isinstance(node, yaml.SequenceNode) else []
    return node.tag in _PLAIN_TAGS and all(map(_is_plain, inner))


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"


def _texts(node: yaml.Node) -> Any:
    return [_texts(one) for one in node.value] if isinstance(node, yaml.SequenceNode) else node.value


def _numbers(node: yaml.Node) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_numbers(one) for one in node.value]
    try:
        return msgspec.convert(node.value, float | int | bool, strict=False)
    except msgspec.ValidationError:
        return node.value


def _near(node: yaml.Node, hint: Any) -> str:
    words = choices(hint)
    clause = nearest(str(node.value), words) if words and isinstance(node, yaml.ScalarNode) else ""
    return f"; {clause}" if clause.startswith("did") else ""


def _text_of(node: yaml.Node) -> str:
    if node.tag not in _PLAIN_TAGS:
        return f"the tag {node.tag.replace('tag:yaml.org,2002:', '!!')[:60]}, and tags are not taken"
    if isinstance(node, yaml.ScalarNode):
        return repr(node.value[:60]) if node.value else "nothing"
    return f"{_texts(node)}"[:60] if isinstance(node, yaml.SequenceNode) else "keys with values"
