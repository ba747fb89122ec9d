"""Cache key of a source of images, fast enough to compute before every run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from exporter.artifact import sha256_file
from exporter.data import samples
from exporter.data.folders import files_in
from exporter.data.manifests import is_manifest, locate, masks_of, read_manifest
from exporter.errors import BadRequest


def fingerprint(source: str, times: bool = True) -> str:
    """A digest of a source of images: the content of a file, or the names, sizes and, with `times`, mtimes of a
    folder's images and masks. Copies of a folder on other machines may have other mtimes.

    Raises: BadRequest for a source that does not exist.
    """
    if source == "synthetic":
        return source
    path, split = locate(source)
    if path.is_dir():
        return split + _of_files(path, [*files_in(path), *_in_links(path)], times)
    if not path.is_file():
        raise BadRequest(samples.no_such_data(source))
    if not is_manifest(path):
        return sha256_file(path)
    listed = read_manifest(path, split, repeats=True)
    if listed.generator:  # whose version is in its name, and its images' digests are in the file
        return sha256_file(path) + split
    try:
        masks = masks_of(path, listed)
    except BadRequest:  # refused where masks are used
        masks = []
    of_masks = _of_files(path.parent, masks, times) if masks else ""
    return sha256_file(path) + split + _of_files(listed.root, [row["path"] for row in listed.rows], times) + of_masks


def _in_links(folder: Path) -> list[str]:
    """The paths of the images in folders of classes, or of splits below images/, that are links, which `files_in` does
    not follow."""
    folders = [folder, *(entry for entry in sorted(folder.iterdir()) if entry.is_dir() and not entry.is_symlink())]
    links = [entry for one in folders for entry in sorted(one.iterdir()) if entry.is_symlink() and entry.is_dir()]
    return [(link.relative_to(folder) / name).as_posix() for link in links for name in files_in(link)]


def _of_files(root: Path, names: Iterable[str], times: bool) -> str:
    digest = hashlib.sha256()
    for name in names:
        try:
            found = (root / name).stat()
        except OSError:
            digest.update(f"{name}\0gone\n".encode("utf-8", "surrogateescape"))
        else:
            mtime = found.st_mtime_ns if times else 0
            digest.update(f"{name}\0{found.st_size}\0{mtime}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
