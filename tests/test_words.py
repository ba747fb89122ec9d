"""The documents, the help and the messages use plain words: the standard nouns of the field, one for each concept."""

import ast
import re

import click
import pytest

from exporter.cli import cli, groups
from tests.conftest import ROOT

WORDS = {
    r"rounded layers?|layers? rounded": "quantized layer",
    r"eight bits": "int8",
    r"(kept|keep|keeps|keeping) back": "kept in higher precision",
    r"harms?|harmful": "sensitivity",
    r"rivals?(?!\.md|\.svg|-sizes)": "baseline",
    r"(?<!quantization\s)(?<!\.)plans?(?!\.\w)": "engine, or schedule",
    r"fell": "failed",
    r"told": "the name of the thing",
    r"(held|hold|holds|holding) (\w+ ){0,3}against": "compare with",
    r"does not pay|pays|must pay": "is slower than, is faster than",
    r"holds? what it must": "passed",
    r"what is (but|told|made|seen|found)": "the name of the thing",
    r"of ours": "of this tool",
    r"verbs?": "command",
}
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
SOURCES = sorted((ROOT / "exporter").rglob("*.py"))
DATA = ("check", "metric")


def faults(text, first=1):
    """Each unwanted word in a text that begins at line `first`, with its line and the word to use."""
    text = re.sub(r"`[^`\n]*`", "", text)
    found = [
        (first + text.count("\n", 0, match.start()), " ".join(match[0].split()), use)
        for pattern, use in WORDS.items()
        for match in re.finditer(rf"\b(?:{pattern})\b".replace(" ", r"\s+"), text, flags=re.I)
    ]
    return [f"line {line}: {word!r}, use: {use}" for line, word, use in sorted(found)]


def prose(path):
    """A document without its tables from stored results, the lines in their places."""
    return re.sub(
        r"<!-- (\S+) -->\n.*?<!-- /\1 -->",
        lambda table: "\n" * table[0].count("\n"),
        path.read_text(),
        flags=re.S,
    )


def strings(path):
    """Each string of a module with its line, except docstrings and the names of checks and metrics, which are data.

    An f-string is one string, without its expressions.
    """
    tree = ast.parse(path.read_text())
    data = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    data |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg in DATA}
    data |= {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            texts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            yield node.lineno, "".join(texts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in data:
            yield node.lineno, node.value


def commands():
    """Each command with its help."""
    parent = cli.make_context("convnext-export", [], resilient_parsing=True)
    yield "convnext-export", cli.get_help(parent)
    for name in (name for names in groups().values() for name in names):
        command = cli.get_command(parent, name)
        yield name, command.get_help(click.Context(command, info_name=name, parent=parent))


def test_unwanted_words_are_recognized():
    assert faults("2 rounded layers, kept\n  back") == [
        "line 1: 'kept back', use: kept in higher precision",
        "line 1: 'rounded layers', use: quantized layer",
    ]
    assert len(faults("The plan was told to hold every file against a rival.")) == 4
    assert faults("build/tiny.plan, `plan`, a quantization plan, plan.svg, explanation, foretold") == []


def test_all_documents_and_sources_are_read():
    assert len(DOCUMENTS) >= 8
    assert sum(1 for path in SOURCES for _ in strings(path)) > 2000
    assert len(dict(commands())) >= 14


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_use_plain_words(path):
    assert faults(prose(path)) == []


@pytest.mark.parametrize("name", dict(commands()))
def test_the_help_uses_plain_words(name):
    assert faults(dict(commands())[name]) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_messages_use_plain_words(path):
    assert [fault for line, text in strings(path) for fault in faults(text, line)] == []
