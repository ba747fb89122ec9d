"""Calibration sets: which images ranges are measured on, chosen once and frozen by content.

A manifest lists them: a header (source, seed, rule), then sha256, path and label, an image a line. Paths are relative
to the source, the source to the manifest. What is frozen is what is used: a file that changed is refused by name.
A manifest with a `generator` lists images that are made (`exporter.data.generators`): sha256 of the pixels at the size
`pixels`, and a number in place of a path.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import msgspec

from exporter.artifact import sha256_file
from exporter.artifact.disk import write_file
from exporter.artifact.sidecar import Preprocessing, Record
from exporter.data import Batch, generators, images, samples, synthetic
from exporter.data.folders import images_in
from exporter.data.manifests import CALIBRATION, locate, read_manifest
from exporter.data.samples import Samples, open_samples
from exporter.errors import BadRequest, nearest, some
from exporter.progress import note, track
from exporter.recipe import SYNTHETIC as SYNTHETIC
from exporter.recipe import bundled

SIZE = 256  # images when no number is given
SYNTHETIC_SIZE = 128  # with more, agreement of the trained atto networks with eager does not rise
DENSE_SIZE = 16  # for segmentation and pyramids, of whose maps every position is counted
COMPARED = 32  # synthetic images on which a quantized network is compared with PyTorch
COLUMNS = ("sha256", "path", "label")
RESTORE = "restore them, or copy them to this machine"


class Entry(Record, frozen=True):
    """One image: the digest of its file, its path below the source, and its class, if it has one."""

    sha256: str
    path: str
    label: str = ""


class Manifest(Record, frozen=True):
    """A frozen choice of images: files below the folder `source`, chosen by `rule` with `seed`. Those of a `generator`
    have digests of `pixels` × `pixels` pixels, and `source` says where they are from."""

    source: str
    rule: str
    entries: tuple[Entry, ...]
    seed: int = 0
    generator: str = ""
    pixels: int = 0
    license: str = ""

    @property
    def digest(self) -> str:
        """One digest for the same images, in whatever order and folder."""
        listed = "\n".join(sorted(entry.sha256 for entry in self.entries))
        return hashlib.sha256(listed.encode()).hexdigest()

    def classes(self) -> dict[str, int]:
        """How many images of each class."""
        counts: dict[str, int] = defaultdict(int)
        for entry in self.entries:
            counts[entry.label] += 1
        return dict(sorted(counts.items()))


@dataclass(frozen=True)
class CalibrationSet:
    """Images to calibrate with: where they are from, the digest of their contents, and the images as the network takes
    them (`samples`) and as a session of the artifact takes them (`compared`). `manifest` is None for an archive of
    arrays and for synthetic images."""

    source: str
    digest: str
    samples: Samples
    compared: Samples
    manifest: Manifest | None = None

    @property
    def ordered_digest(self) -> str:
        """A digest of the contents in their order."""
        if self.manifest is None:
            return self.digest
        return hashlib.sha256("\n".join(entry.sha256 for entry in self.manifest.entries).encode()).hexdigest()

    @property
    def total(self) -> int:
        """How many images."""
        return self.samples.total

    @property
    def synthetic(self) -> bool:
        """Whether they are generated, and no photographs."""
        return self.samples.synthetic

    @property
    def to_compare(self) -> Samples:
        """The images on which a quantized network is compared with PyTorch where there are no others. Synthetic ones
        show no loss of accuracy, only errors of outputs, for which `COMPARED` are enough."""
        return self.compared.first(COMPARED) if self.synthetic else self.compared

    def batches(self, size: int, first: int = 0, last: int | None = None) -> Iterator[Batch]:
        """The images from number `first` up to `last`, which is left out, in batches.

        Raises: BadRequest for an image that cannot be read: ranges must be those of the whole set.
        """
        part = self.samples.between(first, self.total if last is None else last)
        for batch in part.batches(size):
            self._refuse_skipped(part)
            yield batch
        self._refuse_skipped(part)

    def _refuse_skipped(self, part: Samples) -> None:
        if part.skipped:
            raise BadRequest(f"{self.source}: cannot calibrate with {some(part.skipped)}; leave out or replace them")


def freeze(source: str, size: int | None, seed: int, dense: bool = False) -> Manifest:
    """Choose images from a folder and note what they are.

    Of each class (sub-folder) the same number is drawn without replacement; what a small class lacks comes from the
    others.

    Args:
        source: a folder, with a sub-folder per class or without.
        size: how many images; None is `usual_size`, or all when there are fewer.
        seed: of the draw; the same seed and folder give the same images.
        dense: as for `open_calibration`.

    Raises: BadRequest for no images or too few of them, and for duplicates and unreadable files, by name.
    """
    folder, split = locate(source)
    if source == SYNTHETIC:
        raise BadRequest("synthetic images are made from seeds: they need no manifest; say --calib synthetic")
    if not folder.is_dir():
        raise BadRequest(f"{folder}: no such folder of images{_hint(source)}")
    by_class = _by_class(folder, split)
    count = sum(map(len, by_class.values()))
    wanted = _wanted(size, count, source, dense)
    chosen = stratified(by_class, wanted, random.Random(seed))
    entries = tuple(
        track((_entry(folder, name, label) for name, label in chosen), len(chosen), "images", lambda entry: 1)
    )
    _refuse_duplicates(source, entries)
    classes = len(by_class)
    rule = f"{wanted} of {count} images, " + (f"equally from {classes} classes" if classes > 1 else "at random")
    return Manifest(source=str(folder), seed=seed, rule=rule, entries=entries)


def _hint(source: str) -> str:
    """The set that ships whose name is near, if one is."""
    near = nearest(source, bundled.sets())
    return f"; {near}" if near.startswith("did") else ""


def _by_class(folder: Path, split: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for name in images_in(folder, split):
        found[name.partition("/")[0] if "/" in name else ""].append(name)
    if not found:
        raise BadRequest(f"{folder}: no images in it; expected {some(sorted(images.SUFFIXES))} files")
    return dict(found)


def _wanted(size: int | None, count: int, source: str, dense: bool) -> int:
    usual = usual_size(synthetic=False, dense=dense)
    if size is not None and size > count:
        raise BadRequest(f"{source}: {count} images, {size} were asked for; give more images or --calib-size {count}")
    wanted = size or min(usual, count)
    if wanted < usual:
        note(f"{source}: {wanted} images to calibrate on; {usual} or more are better")
    return wanted


def stratified(found: dict[str, list[str]], wanted: int, draw: random.Random) -> list[tuple[str, str]]:
    """So many (path, class), the smallest classes first, so that what they lack falls to the larger ones."""
    left, chosen = wanted, []
    order = sorted(found, key=lambda label: (len(found[label]), draw.random()))
    for rest, label in zip(range(len(order), 0, -1), order, strict=True):
        share = min(len(found[label]), left // rest)
        chosen += [(name, label) for name in draw.sample(found[label], share)]
        left -= share
    return sorted(chosen)


def _entry(folder: Path, name: str, label: str) -> Entry:
    try:
        content = (folder / name).read_bytes()
        images.read(io.BytesIO(content), Preprocessing())
    except (OSError, images.Unreadable) as error:
        raise BadRequest(f"{folder / name}: cannot be read ({error}); take it out of the folder") from None
    return Entry(sha256=hashlib.sha256(content).hexdigest(), path=name, label=label)


def _refuse_duplicates(source: str, entries: Iterable[Entry]) -> None:
    first: dict[str, str] = {}
    twice = [
        f"{entry.path} is {first[entry.sha256]}"
        for entry in entries
        if first.setdefault(entry.sha256, entry.path) != entry.path
    ]
    if twice:
        raise BadRequest(f"{source}: the same image twice: {some(twice)}; take one of each out of the folder")


def write(manifest: Manifest, path: Path) -> None:
    """Write a manifest; its source becomes relative to it.

    Raises: BadRequest for a path or class that no line of a manifest can hold.
    """
    odd = [
        e.path for e in manifest.entries if any(c in "\t\r\n" or "\ud800" <= c <= "\udfff" for c in e.path + e.label)
    ]
    if odd:
        raise BadRequest(
            f"{some(map(repr, odd))}: a name with a tab or line break, or that is no UTF-8, cannot be listed; rename it"
        )
    source = manifest.source if manifest.generator else os.path.relpath(manifest.source, path.parent)
    made = {"generator": manifest.generator, "pixels": manifest.pixels, "license": manifest.license}
    facts = {"source": source, **(made if manifest.generator else {}), "seed": manifest.seed, "rule": manifest.rule}
    head = [CALIBRATION, *(f"# {key}: {value}" for key, value in facts.items()), "\t".join(COLUMNS)]
    rows = ["\t".join((entry.sha256, entry.path, entry.label)) for entry in manifest.entries]
    write_file(path, "\n".join([*head, *rows, ""]).encode())


def refuse_other_set(path: Path, source: str) -> None:
    """Raises: BadRequest if `path` exists and is not a calibration set of `source`."""
    if not path.is_file():
        return
    with suppress(BadRequest):
        listed = read_manifest(path)
        if "seed" in listed.header and listed.root.resolve() == locate(source)[0].resolve():
            return
    raise BadRequest(f"{path}: exists, and is not a set of {source}; remove it, or give another file with -o")


def read(path: Path) -> Manifest:
    """Read a manifest and hold every file that it lists against its digest; images that are made are left to `check`.

    Raises: BadRequest for what is no manifest, and for files that changed or are missing, by name.
    """
    listed = read_manifest(path)
    rows = [Entry(**{column: row.get(column) or "" for column in COLUMNS}) for row in listed.rows]
    rows = [msgspec.structs.replace(entry, sha256=entry.sha256.lower()) for entry in rows]
    bare = [entry.path for entry in rows if len(entry.sha256) != 64]
    if bare:
        raise BadRequest(f"{path}: {bare[0]} has no sha256; freeze the set with `convnext-export calibrate FOLDER`")
    header, made = listed.header, bool(listed.generator)
    if not made:
        _check_files(path, listed.root, rows)
    _refuse_duplicates(str(path), rows)
    seed, pixels, most = header.get("seed", "0"), header.get("pixels", ""), generators.MAX_PIXELS
    if made and not (pixels.isdecimal() and len(pixels) < 9 and 1 <= int(pixels) <= most):
        raise BadRequest(f"{path}: '# pixels:' must say at which size the digests were taken, from 1 to {most}")
    return Manifest(
        source=header.get("source", "") if made else str(listed.root),
        rule=header.get("rule", f"{len(rows)} images"),
        seed=int(seed) if seed.removeprefix("-").isdecimal() else 0,
        entries=tuple(rows),
        generator=listed.generator,
        pixels=int(pixels) if made else 0,
        license=header.get("license", ""),
    )


def check(manifest: Manifest, where: object) -> None:
    """Make the images of a generated set and compare each with its digest.

    Raises: BadRequest for images that are others now; Unavailable without what makes them.
    """
    if not manifest.generator:
        return
    maker = generators.find(manifest.generator, where)
    numbers = [generators.number(entry.path, where) for entry in manifest.entries]
    digests = track((maker.digest(n, manifest.pixels) for n in numbers), len(numbers), "images", lambda digest: 1)
    changed = [e.path for e, digest in zip(manifest.entries, digests, strict=True) if e.sha256 != digest]
    if changed:
        raise BadRequest(
            f"{where}: {len(changed)} of {len(numbers)} images of {manifest.generator} are not those that were frozen "
            f"({some(changed)}); another version of the generator or of NumPy makes others: freeze images of your own"
        )


def _check_files(path: Path, root: Path, entries: Sequence[Entry]) -> None:
    if not root.is_dir():
        raise BadRequest(f"{path}: its images lie in {root}, and there is no such folder; put them there, or correct "
                         "the line '# source:'")  # fmt: skip
    missing = [entry.path for entry in entries if not (root / entry.path).is_file()]
    if missing:
        raise BadRequest(f"{path}: missing in {root}: {some(missing)}; bring them back or freeze the set again")
    changed = [entry.path for entry in entries if sha256_file(root / entry.path) != entry.sha256]
    if changed:
        raise BadRequest(f"{path}: changed since it was frozen: {some(changed)}; bring the old files back or freeze "
                         "the set again")  # fmt: skip


def check_source(source: str) -> None:
    """Raises: BadRequest for a source of calibration images that does not exist."""
    if source != SYNTHETIC and not locate(source)[0].exists():
        raise BadRequest(f"--calib {samples.no_such_data(source)}")


def usual_size(synthetic: bool, dense: bool) -> int:
    """The default number of images of a folder, or of synthetic ones; below it, a note asks for more."""
    return DENSE_SIZE if dense else SYNTHETIC_SIZE if synthetic else SIZE


def open_calibration(
    source: str,
    recipe: Preprocessing,
    classes: int | None,
    size: int | None = None,
    seed: int = 0,
    dense: bool = False,
) -> CalibrationSet:
    """The calibration set that a user means.

    Args:
        source: a manifest, a folder (frozen on the spot), an `.npz` file, the name of a set that ships, or `synthetic`.
        recipe: how each image becomes an input.
        classes: how many the model has, for an `.npz` file with labels; None where its outputs are no classes.
        size: how many images; None is all of a manifest, else `usual_size` or what there is.
        seed: of the draw from a folder.
        dense: whether the network has an output for each pixel or feature maps for a detector.

    Raises: BadRequest for data that cannot be used, or fewer images than were asked for.
    """
    path = bundled.find_images(source)
    if source == SYNTHETIC:
        total = size or usual_size(synthetic=True, dense=dense)
        digest = hashlib.sha256(f"{synthetic.NAME}, {total}".encode()).hexdigest()
    elif path.suffix.lower() == ".npz" and path.is_file():
        total = _wanted(size, open_samples(source, recipe, (), classes).total, source, dense)
        digest = hashlib.sha256(f"{sha256_file(path)} {total}".encode()).hexdigest()
    else:
        return of_manifest(source, _manifest_of(source, path, size, seed, dense), recipe)
    return _opened(source, digest, recipe, lambda recipe: open_samples(source, recipe, (), classes, total))


def of_manifest(source: str, manifest: Manifest, recipe: Preprocessing) -> CalibrationSet:
    """The images of a manifest, which are not compared with their digests."""
    listed = [(entry.path, -1) for entry in manifest.entries]
    if manifest.generator:
        opened = partial(samples.of_generator, source, manifest.generator, listed)
    else:
        opened = partial(samples.of_files, source, Path(manifest.source), listed)
    return replace(_opened(source, manifest.digest, recipe, opened), manifest=manifest)


def _opened(
    source: str, digest: str, recipe: Preprocessing, open_as: Callable[[Preprocessing], Samples]
) -> CalibrationSet:
    opened = open_as(recipe)
    of_network = open_as(recipe.of_network()) if recipe.input == "image" else opened
    return CalibrationSet(source, digest, of_network, opened)


def _manifest_of(source: str, path: Path, size: int | None, seed: int, dense: bool) -> Manifest:
    """The images that are chosen from a manifest or a folder."""
    if path.suffix.lower() in (".tsv", ".csv") and path.is_file():
        manifest = read(path)
        wanted = _wanted(size or len(manifest.entries), len(manifest.entries), source, dense)
        kept = [manifest.entries[index] for index in samples.spread(len(manifest.entries), wanted)]
        manifest = msgspec.structs.replace(manifest, entries=tuple(kept))
        check(manifest, source)
        return manifest
    if locate(source)[0].is_dir():
        return freeze(source, size, seed, dense)
    if locate(source)[0].is_file():
        raise BadRequest(f"--calib {source}: not a calibration set; freeze one with `convnext-export calibrate FOLDER`")
    raise BadRequest(f"--calib {samples.no_such_data(source)}")


def refuse_changed(source: str, manifest: Manifest, first: int, last: int) -> None:
    """Compare the files of a manifest from number `first` up to `last`, which is left out, with their digests.

    Raises: BadRequest for files that changed or are missing, by name.
    """
    root = Path(manifest.source)
    entries = () if manifest.generator else manifest.entries[first:last]
    if others := [entry.path for entry in entries if not _is_same(root / entry.path, entry.sha256)]:
        raise BadRequest(f"--calib {source}: not as when the command began: {some(others)}; {RESTORE}")


def _is_same(path: Path, sha256: str) -> bool:
    try:
        return sha256_file(path) == sha256
    except OSError:
        return False
