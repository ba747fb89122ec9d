"""From what a user calls data to batches: a folder, a manifest, an `.npz` file, or `synthetic`.

Images are read as they are asked for, so memory does not grow with their number.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from exporter import machine
from exporter.artifact import sha256_file
from exporter.artifact.sidecar import COLORS, Preprocessing
from exporter.data import Batch, generators, images, synthetic
from exporter.data.arrays import open_npz
from exporter.data.classes import UNKNOWN, Label, check_arrays, classes_of, labels_of, of_folders
from exporter.data.folders import images_in, is_hidden
from exporter.data.manifests import is_manifest, locate, read_manifest
from exporter.errors import BadRequest, nearest, some
from exporter.progress import note
from exporter.recipe import SYNTHETIC, bundled

SYNTHETIC_COUNT = 16  # images, when no number is given
THREADS = min(8, machine.cores())  # that decode; each may hold a whole photograph

Item = tuple[str, Label | Callable[[], NDArray[np.int64]], Callable[[], NDArray[Any]]]


class Items(Protocol):
    """Iterates over images from number `start` on, without going through those before it where that is possible."""

    def __call__(self, start: int = 0, /) -> Iterator[Item]:
        """The images from number `start` on."""
        ...


@dataclass
class Samples:
    """Images to measure with.

    `items` yields (name, label, a function that makes the array) for each, in place of the label a function that reads
    a mask; `skipped` fills up with what could not be read, and why, as the batches go by. `identity` gives for a name
    what no other image has: a digest of its content, or the name where it is made from that.
    """

    source: str
    total: int
    items: Items
    labelled: bool
    skipped: list[str] = field(default_factory=list)
    synthetic: bool = False
    identity: Callable[[str], str] = str

    def first(self, count: int) -> Samples:
        """The first so many images, or all where there are fewer."""
        return self.between(0, count)

    def between(self, start: int, stop: int) -> Samples:
        """Those from number `start` up to `stop`, which is left out."""
        stop = min(stop, self.total)

        def items(skip: int = 0) -> Iterator[Item]:
            return islice(self.items(start + skip), max(0, stop - start - skip))

        return replace(self, total=stop - start, items=items, skipped=[])

    def after(self, start: int) -> Samples:
        """Those from number `start` on. Their total stays that of all."""

        def items(skip: int = 0) -> Iterator[Item]:
            return self.items(start + skip)

        return replace(self, items=items, skipped=[])

    def batches(self, size: int) -> Iterator[Batch]:
        """All images in batches of `size`; the last one may be smaller, and so is one with unreadable images."""
        for group in self.groups(size):
            good = [(read.name, read.label, read.array) for read in group if read.array is not None]
            if good:
                names, labels, arrays = zip(*good, strict=True)
                yield Batch(np.stack(arrays), np.asarray(labels, np.int64), names)

    def groups(self, size: int) -> Iterator[list[Read]]:
        """All images in lists of `size`, the last one may be shorter; up to 2 · `size` more are decoded ahead, or one
        for each thread."""
        pool = ThreadPoolExecutor(THREADS)
        try:
            reads = _read_ahead(pool, self.items(), max(2 * size, THREADS))
            while group := list(islice(reads, size)):
                self.skipped += [f"{_text(read.name)}: {read.reason}" for read in group if read.array is None]
                yield group
        finally:
            pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Read:
    """An image that was read: its name, its label, and its array (C, H, W), or (H, W, C) of a picture; or why it could
    not be read."""

    name: str
    label: Label | NDArray[np.int64]
    array: NDArray[Any] | None
    reason: str = ""


def _read_ahead(pool: ThreadPoolExecutor, items: Iterable[Item], count: int) -> Iterator[Read]:
    """The images in order; `count` of them are being read while the caller is at work."""
    waiting: deque[Future[Read]] = deque()
    for item in items:
        waiting.append(pool.submit(_read, item))
        if len(waiting) > count:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _read(item: Item) -> Read:
    name, label, make = item
    try:
        array = make()
        return Read(name, label() if callable(label) else label, array)
    except images.Unreadable as error:
        return Read(name, UNKNOWN, None, _text(str(error)))


def _text(name: str) -> str:
    """The name of a file as UTF-8 text; bytes that are none are replaced."""
    return os.fsencode(name).decode("utf-8", "replace")


def open_samples(
    source: str,
    recipe: Preprocessing,
    labels: tuple[str, ...],
    classes: int | None,
    most: int | None = None,
    multilabel: bool = False,
    repeats: bool = False,
) -> Samples:
    """The images a user means.

    Args:
        source: a folder with a sub-folder per class (or none: images without labels), a manifest (`.tsv`,
            `.csv` or `.txt`; `FILE#split` takes one split), an `.npz` file, the name of a bundled set, or `synthetic`.
        recipe: how each becomes an input.
        labels: the model's; sub-folders are matched to them.
        classes: how many the model has; None where its outputs are no classes, and labels are not read.
        most: at most so many images, evenly spread; None is all (of synthetic ones, 16).
        multilabel: whether an image may have several of the model's labels, or none. A folder then gives images without
            labels, as its sub-folders name one for each image.
        repeats: whether a manifest may list an image twice.

    Raises: BadRequest when there is nothing there, or a class the model does not have.
    """
    if source == "synthetic":
        return _synthetic(recipe, most or SYNTHETIC_COUNT)
    check_source(source)
    path, split = locate(source)
    if path.suffix.lower() == ".npz":
        if split:
            raise BadRequest(f"{source}: an .npz file has no splits; leave #{split} out")
        return _npz(path, recipe, classes, most, multilabel)
    root, generator, digests = path, "", dict[str, str]()
    entries: Sequence[tuple[str, Label]]
    if path.is_dir():
        entries = _folder(path, split, labels, None if multilabel else classes)
    elif is_manifest(path):
        listed = read_manifest(path, split, repeats)
        root, generator = listed.root, listed.generator
        entries = (labels_of if multilabel else classes_of)(path, listed, labels, classes)
        digests = {row["path"]: row["sha256"] for row in listed.rows if row.get("sha256")}
    else:
        raise BadRequest(f"{path}: expected a folder, a .tsv, .csv or .txt manifest, an .npz file or 'synthetic'")
    if most and most < len(entries):
        entries = [entries[index] for index in spread(len(entries), most)]
    if generator:
        return of_generator(source, generator, entries, recipe)
    return of_files(source, root, entries, recipe, digests)


def check_source(source: str) -> None:
    """Raises: BadRequest for a source of images that does not exist."""
    if source != SYNTHETIC and not locate(source)[0].exists():
        raise BadRequest(no_such_data(source))


def no_such_data(source: str) -> str:
    """What to say of a source that is neither there nor the name of a set."""
    near = nearest(source, [SYNTHETIC, *bundled.sets()])
    forms = "give a folder, a .tsv, .csv or .txt manifest, an .npz file, 'synthetic' or a bundled set"
    return f"{source}: no such data; {near if near.startswith('did') else forms}"


def is_synthetic(source: str) -> bool:
    """Whether a source is of images that show nothing real.

    Raises: BadRequest for a manifest that cannot be read.
    """
    if source == SYNTHETIC:
        return True
    path, split = locate(source)
    if not is_manifest(path) or not path.is_file():
        return False
    generator = read_manifest(path, split).generator
    return bool(generator) and generators.find(generator, path).synthetic


def spread(count: int, most: int) -> list[int]:
    """So many of the first `count` numbers, evenly spread."""
    return [round(index) for index in np.linspace(0, count - 1, most)]


def of_files(
    source: str,
    root: Path,
    found: Sequence[tuple[str, Label]],
    recipe: Preprocessing,
    digests: Mapping[str, str] = MappingProxyType({}),
) -> Samples:
    """Image files below a folder, each with its label; a file with another SHA-256 than in `digests` is skipped.

    Raises: BadRequest for a number of channels that image files do not have.
    """
    _check_channels(source, [name for name, _ in found], recipe.channels)
    stray = _stray_images(root) if any(label != UNKNOWN for _, label in found) and Path(source).is_dir() else []
    if stray:
        note(f"{source}: files beside the class folders are left out ({len(stray)}): {some(stray)}")

    def items(start: int = 0) -> Iterator[Item]:
        for index in range(start, len(found)):
            name, label = found[index]
            yield name, label, partial(read_file, root / name, recipe, digests.get(name, ""))

    return Samples(
        source,
        len(found),
        items,
        found[0][1] != UNKNOWN,
        identity=lambda name: sha256_file(root / name),
    )


def read_file(path: Path, recipe: Preprocessing, digest: str = "") -> NDArray[Any]:
    """The input of an image file, whose SHA-256 is `digest` where that is known.

    Raises: images.Unreadable for a file that is damaged, or another one.
    """
    array = images.read(path, recipe)
    if digest and sha256_file(path) != digest.lower():
        raise images.Unreadable(f"its SHA-256 is not the {digest[:12]}… of the manifest; restore the file")
    return array


def of_generator(source: str, generator: str, found: Sequence[tuple[str, Label]], recipe: Preprocessing) -> Samples:
    """Images that a generator makes, by number, each with its label.

    Raises: BadRequest for a number of channels that its images do not have.
    """
    maker = generators.find(generator, source)
    if not maker.sized:
        _check_channels(source, [generator], recipe.channels)

    def items(start: int = 0) -> Iterator[Item]:
        for path, label in islice(found, start, None):
            yield f"{generator} {path}", label, partial(maker.input, generators.number(path, source), recipe)

    return Samples(source, len(found), items, found[0][1] != UNKNOWN, synthetic=maker.synthetic)


def _check_channels(source: str, names: Sequence[str], channels: int) -> None:
    """Refuse image files for a number of channels that is neither grey nor RGB nor RGBA; pages of a TIFF may be."""
    other = next((name for name in names if Path(name).suffix.lower() not in (".tif", ".tiff")), None)
    if channels not in COLORS and other is not None:
        raise BadRequest(
            f"{source}: {other} does not have the {channels} channels of the network; give an .npz file with 'images' "
            f"as uint8 (N, H, W, {channels}) or float32 (N, {channels}, H, W), or TIFF files of {channels} pages"
        )


def _synthetic(recipe: Preprocessing, count: int) -> Samples:
    def items(start: int = 0) -> Iterator[Item]:
        for seed in range(start, count):
            yield f"dead leaves {seed}", -1, partial(generators.GENERATORS[synthetic.NAME].input, seed, recipe)

    return Samples(SYNTHETIC, count, items, labelled=False, synthetic=True)


def _npz(path: Path, recipe: Preprocessing, classes: int | None, most: int | None, multilabel: bool) -> Samples:
    arrays = open_npz(path, recipe, labelled=classes is not None)
    labels = arrays.labels
    if labels is not None and not multilabel and labels.shape[1:] == (1,):  # as Keras has them
        labels = labels[:, 0]
    if labels is not None and classes is not None:
        check_arrays(path, labels, classes, multilabel)
    total = min(arrays.count, most or arrays.count)
    wanted = set(spread(arrays.count, total)) if total < arrays.count else None

    def every() -> Iterator[Item]:
        for index, array in enumerate(arrays.rows()):
            if wanted is not None and index not in wanted:
                continue
            label: Label = UNKNOWN
            if labels is not None:
                label = tuple(labels[index].tolist()) if multilabel else int(labels[index])
            yield f"{path.name}[{index}]", label, partial(np.asarray, array)

    digest = cache(partial(sha256_file, path))

    def items(start: int = 0) -> Iterator[Item]:
        return islice(every(), start, None)

    return Samples(
        str(path), total, items, labels is not None, identity=lambda name: f"{digest()} {name.rpartition('[')[2]}"
    )


def _folder(path: Path, split: str, labels: tuple[str, ...], classes: int | None) -> list[tuple[str, int]]:
    folders = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not is_hidden(entry.name))
    if folders and classes is not None and not split:
        numbers = of_folders(folders, labels, classes, str(path))
        _check_listed(path / name for name in folders)
        labelled = [(f"{name}/{file}", numbers[name]) for name in folders for file in images_in(path / name)]
    else:
        labelled = [(file, -1) for file in images_in(path, split)]
    if not labelled:
        kinds = some(sorted(images.SUFFIXES))
        raise BadRequest(f"{path}: no images in it; expected a sub-folder per class with images ({kinds})")
    return labelled


def _check_listed(folders: Iterable[Path]) -> None:
    """Raises: BadRequest for a folder that cannot be listed, whose class would have no images."""
    for folder in folders:
        try:
            os.scandir(folder).close()
        except OSError as error:
            raise BadRequest(f"{folder}: cannot be listed ({error.strerror})") from None


def _stray_images(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file() and path.suffix.lower() in images.SUFFIXES)
