"""The images that a user means: files, folders, patterns, arrays, manifests, Parquet files, addresses, standard
input."""

from __future__ import annotations

import glob
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO

from exporter.artifact.sidecar import Preprocessing
from exporter.backends import Array
from exporter.data import images
from exporter.data.classes import UNKNOWN
from exporter.data.fingerprint import fingerprint
from exporter.data.folders import images_in, mask_folders
from exporter.data.manifests import is_manifest, locate, read_manifest
from exporter.data.samples import Item, Samples, open_samples
from exporter.errors import BadRequest, nearest
from exporter.predict import parquet, remote
from exporter.predict.image_list import Images, digest_of, joined, of_names, state_of, unreadable
from exporter.predict.rows import of_rows, of_tables, path_of
from exporter.progress import note
from exporter.recipe import bundled

STDIN = "-"
MAX_STDIN_BYTES = 1 << 28


def open_images(words: Sequence[str], recipe: Preprocessing, stdin: IO[bytes] | None = None) -> Images:
    """The images of all sources, in order.

    Args:
        words: files, folders (with all below them), patterns such as `photos/*.jpg`, `file://` addresses, manifests,
            `.npz` files, bundled sets, `synthetic`, Parquet files (or folders of them), addresses in object storage,
            or `-`.
        recipe: how each image becomes an input.
        stdin: read for `-`: the bytes of one image, or the names of files, one a line or separated by NUL.

    Raises: BadRequest for a source that does not exist, or without an image; Unavailable where a package that reads it
        is not installed.
    """
    parts = [_open(word, recipe, stdin) for word in words]
    return joined(", ".join(words), parts)


def _open(word: str, recipe: Preprocessing, stdin: IO[bytes] | None) -> Images:
    if word == STDIN:
        return _from_stdin(recipe, stdin)
    if not word:
        raise BadRequest("a source is empty; give a file, a folder or a pattern")
    if remote.is_address(word):
        return _of_storage(word, recipe)
    return _open_here(path_of(word) if "://" in word else word, recipe)


def _open_here(word: str, recipe: Preprocessing) -> Images:
    """The images of a source of this machine."""
    path, split = locate(word)
    if path.is_dir():
        return _of_folder(word, path, split, recipe)
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise BadRequest(f"{word}: a pipe or device; pipe it to standard input and give -")
    is_pattern = glob.has_magic(word) and not path.exists()
    if not is_pattern and (is_manifest(path) or path.suffix.lower() == ".npz" or _is_a_set(word)):
        samples = open_samples(word, recipe, (), None, repeats=True)
        paths: Callable[[], Iterable[Path]] | None = partial(_listed, path, split) if is_manifest(path) else None
        if path.suffix.lower() == ".npz":
            samples = replace(samples, items=partial(_to_the_end, samples, path.name))
            paths = partial(_in_archive, path, samples.total)
        key = f"{samples.total} of {split} of {fingerprint(word)}"
        return Images(samples, key, paths=paths)
    if path.exists() and parquet.is_parquet(path.name):
        return of_tables(word, [of_rows(os.path.expanduser(_without(word, split)), split, recipe)])  # noqa: PTH111
    if path.exists() and split:
        raise BadRequest(f"{word}: {path} is one image; leave #{split} out")
    if path.exists():
        part = of_names([word], lambda _: partial(images.read, path, recipe), f"{word} {state_of(path)}")
        return replace(part, paths=lambda: [path])
    if is_pattern:
        return _of_pattern(word, split, recipe)
    near = nearest(path.name, [entry.name for entry in path.parent.iterdir()]) if path.parent.is_dir() else ""
    raise BadRequest(f"{word}: no such file or folder{f'; {near}' if near.startswith('did') else ''}")


def _in_archive(path: Path, total: int) -> Iterator[Path]:
    """A path for each image of an archive, which no image of another source has."""
    return (path.with_name(f"{path.name}[{index}]") for index in range(total))


def _listed(path: Path, split: str) -> list[Path]:
    """The paths of the images of a manifest, whose names are relative to its folder."""
    listed = read_manifest(path, split, repeats=True)
    return [listed.root / row["path"] for row in listed.rows]


def _without(word: str, split: str) -> str:
    return word.removesuffix(f"#{split}") if split else word


def _of_pattern(word: str, split: str, recipe: Preprocessing) -> Images:
    """The files that match a pattern; if all are Parquet files, their rows."""
    pattern = word if not parquet.is_parquet(_without(word, split)) else _without(word, split)
    matches = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))  # noqa: PTH111, PTH207  (as typed)
    names = [name for name in matches if Path(name).is_file()]
    if names and all(map(parquet.is_parquet, names)):
        return of_tables(word, [of_rows(name, split, recipe) for name in names])
    return _of_files(word, names, recipe)


def _of_folder(word: str, path: Path, split: str, recipe: Preprocessing) -> Images:
    """The images of a folder; if it has none, the rows of its Parquet files."""
    folder = os.path.expanduser(_without(word, split)).rstrip("/")  # noqa: PTH111  (as typed)
    may_be_column = bool(split) and mask_folders(path) is None
    names = [] if may_be_column else images_in(path, split)
    if names and (pair := mask_folders(path)):
        note(f"{word} has images and masks: only those in {pair[0]}/ are read")
    if not names and (tables := parquet.files_in(path)):
        return of_tables(word, [of_rows(f"{folder}/{name}", split, recipe) for name in tables])
    return _of_files(word, [f"{folder}/{name}" for name in names or images_in(path, split)], recipe)


def _of_storage(word: str, recipe: Preprocessing) -> Images:
    """The images at an address in object storage; if it has none, the rows of its Parquet files."""
    address, _, column = word.rpartition("#") if "#" in word else (word, "", "")
    try:
        files = remote.files_at(word)
    except BadRequest:
        if not column:
            raise
        files = remote.files_at(address)
    visible = [file for file in files if not any(part.startswith(".") for part in file.path.split("/"))]
    tables = [file for file in visible if parquet.is_parquet(file.path)]
    pictures = [file for file in visible if Path(file.path).suffix.lower() in images.SUFFIXES]
    if tables and (column or not pictures):
        return of_tables(word, [of_rows(file.address, column, recipe, file) for file in tables])
    if not pictures:
        raise BadRequest(f"{word}: no images in it; expected files such as .jpg and .png, or .parquet")
    by_name = {file.address: file for file in pictures}
    key = digest_of(f"{file.address} {file.state}" for file in pictures)
    part = of_names(list(by_name), lambda name: partial(_read_remote, by_name[name], recipe), key)
    return replace(part, content=lambda name: by_name[name].read() if name in by_name else None)


def _read_remote(file: remote.File, recipe: Preprocessing) -> Array:
    return images.read(io.BytesIO(file.read()), recipe)


def _to_the_end(samples: Samples, name: str, start: int = 0) -> Iterator[Item]:
    """The images of an archive from number `start` on; where it is damaged, the rest of them cannot be read."""
    return islice(_every(samples, name), start, None)


def _every(samples: Samples, name: str) -> Iterator[Item]:
    count = 0
    try:
        for item in samples.items():
            yield item
            count += 1
    except BadRequest as error:
        for index in range(count, samples.total):
            yield f"{name}[{index}]", UNKNOWN, partial(unreadable, str(error))


def refuse_source(out: Path, sources: Sequence[str]) -> None:
    """Refuse to replace a file that images are read from.

    Raises: BadRequest where the output is a source, or a Parquet file in a folder or of a pattern that is one.
    """
    if not out.is_file():
        return
    for word in sources:
        for text in (word, word.rpartition("#")[0]):
            local = path_of(text) if text.lower().startswith("file://") else os.path.expanduser(text)  # noqa: PTH111
            matches = [Path(one) for one in glob.glob(local, recursive=True)] if local else []  # noqa: PTH207
            read = [Path(local), *matches] if local else []
            if any(one.samefile(out) for one in read if one.is_file()) or _is_read_from(read, out, text != word):
                raise BadRequest(f"-o {out}: the images are read from there ({word}); give another name")


def _is_read_from(folders: Sequence[Path], out: Path, has_column: bool) -> bool:
    """Whether an output is a Parquet file whose rows `_of_folder` reads: one in a folder without images, or with a
    column that is named."""
    return out.suffix.lower() == ".parquet" and any(
        folder.is_dir() and folder.resolve() in out.resolve().parents and (has_column or not images_in(folder, ""))
        for folder in folders
    )


def _is_a_set(word: str) -> bool:
    return word == "synthetic" or word in bundled.sets()


def _from_stdin(recipe: Preprocessing, stdin: IO[bytes] | None) -> Images:
    content = stdin.read(MAX_STDIN_BYTES + 1) if stdin is not None else b""
    if len(content) > MAX_STDIN_BYTES:
        raise BadRequest(
            f"{STDIN}: more than {MAX_STDIN_BYTES >> 20} MiB on standard input; give a folder or a pattern"
        )
    if _is_image(content):
        part = of_names([STDIN], lambda _: partial(_read_bytes, content, recipe), hashlib.sha256(content).hexdigest())
        return replace(part, content=lambda name: content if name == STDIN else None)
    by_nul = b"\0" in content and (content.endswith(b"\0") or _is_text(content.replace(b"\0", b"\n")))
    lines = content.split(b"\0" if by_nul else b"\n")
    names = [os.fsdecode(line.rstrip(b"\r")) for line in lines if line.strip()]
    if not names or any("\0" in name for name in names):
        content_kind = "neither an image nor names of files" if names else "nothing"
        raise BadRequest(
            f"{STDIN}: {content_kind} on standard input; expected an image, or names of files, one a line or each with "
            "NUL behind it"
        )
    return _of_files(STDIN, names, recipe)


def _is_text(content: bytes) -> bool:
    """Whether bytes are text in UTF-8, in lines, as a damaged image is not."""
    text = content.decode("utf-8", "replace").replace("\n", "")
    return "\N{REPLACEMENT CHARACTER}" not in text and text.isprintable()


def _is_image(content: bytes) -> bool:
    """Whether Pillow knows the format."""
    from PIL import Image

    try:
        Image.open(io.BytesIO(content)).close()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
    return True


def _read_bytes(content: bytes, recipe: Preprocessing) -> Array:
    return images.read(io.BytesIO(content), recipe)


def _of_files(word: str, names: Sequence[str], recipe: Preprocessing) -> Images:
    if not names:
        raise BadRequest(f"{word}: no images in it; expected files such as .jpg and .png")
    key = digest_of(f"{name} {state_of(Path(name))}" for name in names)
    return of_names(names, lambda name: partial(images.read, Path(name), recipe), key)
