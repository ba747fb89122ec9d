"""Files of arrays in a cache: whole and of their key, or not used."""

import io
from contextlib import contextmanager

import numpy as np
import pytest

from exporter.artifact import sealed
from exporter.progress import REPORTER, Silent

ARRAYS = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.asarray(7)}


class Notes(Silent):
    def __init__(self):
        self.lines = []

    def note(self, text):
        self.lines.append(text)


@contextmanager
def notes():
    noted = Notes()
    token = REPORTER.set(noted)
    yield noted.lines
    REPORTER.reset(token)


def test_arrays_come_back_in_their_order_with_type_and_shape(tmp_path):
    path = tmp_path / "new" / "file"
    size = sealed.write(path, b"key", ARRAYS)
    with notes() as lines:
        arrays = sealed.read(path, b"key", "again")
    assert size > 32, "the bytes of the numbers"
    assert list(arrays) == ["b", "a"]
    assert all(np.array_equal(arrays[name], ARRAYS[name]) for name in ARRAYS)
    assert [arrays[name].dtype for name in ARRAYS] == [array.dtype for array in ARRAYS.values()]
    assert lines == []


def test_arrays_are_read_without_the_parser_of_python(tmp_path, monkeypatch):
    """In some versions it fails at random where another thread parses too."""
    sealed.write(tmp_path / "file", b"key", ARRAYS)
    monkeypatch.setattr("ast.parse", None)
    monkeypatch.setattr("ast.literal_eval", None)
    assert list(sealed.read(tmp_path / "file", b"key", "again")) == ["b", "a"]


def test_a_file_of_an_earlier_version_is_noted_and_not_used(tmp_path):
    """It had NumPy's format."""
    buffer = io.BytesIO()
    np.savez(buffer, **ARRAYS)
    sealed.write_bytes(tmp_path / "file", b"key", buffer.getvalue())
    with notes() as lines:
        assert sealed.read(tmp_path / "file", b"key", "it is done again") == {}
    assert lines == [f"{tmp_path / 'file'} is of an earlier version; it is done again"]


def test_a_missing_file_is_no_news(tmp_path):
    with notes() as lines:
        assert sealed.read(tmp_path / "none", b"key", "again") == {}
    assert lines == []


@pytest.mark.parametrize(
    "spoil", [lambda c: b"", lambda c: c[:20], lambda c: c[:-9], lambda c: c[:99] + b"?" + c[100:]]
)
def test_a_damaged_file_is_noted_and_not_used(spoil, tmp_path):
    path = tmp_path / "file"
    sealed.write(path, b"key", ARRAYS)
    content = path.read_bytes()
    assert spoil(content) != content
    path.write_bytes(spoil(content))
    with notes() as lines:
        assert sealed.read(path, b"key", "it is done again") == {}
    assert lines == [f"{path} is damaged or has another key; it is done again"]


def test_a_file_of_another_key_is_noted_and_not_used(tmp_path):
    sealed.write(tmp_path / "file", b"key", ARRAYS)
    with notes() as lines:
        assert sealed.read(tmp_path / "file", b"other", "again") == {}
    assert len(lines) == 1


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    assert sealed.write(tmp_path / "file" / "below", b"key", ARRAYS) == 0
