"""Files of packages of npm: from a folder `node_modules`, from this user's cache, or downloaded by npm.

Every file has to have the digest that this version of the tool was tested with, wherever it comes from.
"""

from __future__ import annotations

import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from exporter.artifact import sha256_file
from exporter.artifact.disk import cache_folder, locked, write_error
from exporter.backends import WebRuntime
from exporter.errors import Unavailable
from exporter.progress import step

DIST = "dist"
SECONDS = 300


def folder_of(web: WebRuntime) -> Path:
    """The folder that has the files of a package: `dist` in a `node_modules` of the working folder or above it, or the
    one in the cache, which npm downloads it to.

    Raises: Unavailable where npm is missing or downloads nothing, or other files than those of that version.
    """
    cached = cache_folder() / "npm" / f"{web.package}-{web.version}"
    for folder in (*_installed(web.package), cached):
        if _is_whole(folder, web):
            return folder
    _download(web, cached)
    return cached


def _installed(package: str) -> Iterator[Path]:
    here = Path.cwd()
    for above in (here, *here.parents):
        yield above / "node_modules" / package / DIST


def _is_whole(folder: Path, web: WebRuntime) -> bool:
    """Whether a folder has every file with its digest."""
    paths = {folder / name: digest for name, digest in web.files.items()}
    return all(path.is_file() for path in paths) and all(sha256_file(path) == paths[path] for path in paths)


def _download(web: WebRuntime, target: Path) -> None:
    """Download the files of a package to the cache."""
    npm, name = shutil.which("npm"), f"{web.package}@{web.version}"
    by_hand = f"without a network, copy node_modules/{web.package}/{DIST} of another machine to {target}"
    if npm is None:
        raise Unavailable(
            f"{name} is not here, and npm, which downloads it, is missing: apt-get install npm; {by_hand}"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.parent), tempfile.TemporaryDirectory(dir=target.parent) as temporary:
            if _is_whole(target, web):  # another process has downloaded it meanwhile
                return
            step(f"npm downloads {name}")
            unpacked = _unpack(_packed(npm, name, Path(temporary), by_hand), Path(temporary) / "new", web)
            if not _is_whole(unpacked, web):
                raise Unavailable(f"npm downloads other files as {name} than this version was tested with; {by_hand}")
            shutil.rmtree(target, ignore_errors=True)
            unpacked.rename(target)
    except OSError as error:
        raise write_error(error, target, "set XDG_CACHE_HOME to another folder") from None


def _packed(npm: str, name: str, folder: Path, by_hand: str) -> Path:
    """The archive of a package, downloaded without running anything of it."""
    words = [npm, "pack", name, "--ignore-scripts", "--silent", "--fetch-retries=1", f"--pack-destination={folder}"]
    try:
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=False)
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[0]
    except subprocess.TimeoutExpired:
        reason = f"no answer in {SECONDS} s"
    archives = sorted(folder.glob("*.tgz"))
    if not archives:
        raise Unavailable(f"npm cannot download {name} ({reason}); {by_hand}")
    return archives[0]


def _unpack(archive: Path, folder: Path, web: WebRuntime) -> Path:
    """The files of an archive that are needed, and nothing else of it."""
    folder.mkdir()
    with tarfile.open(archive) as opened:
        for name in web.files:
            with suppress(KeyError):
                content = opened.extractfile(f"package/{DIST}/{name}")
                if content is not None:
                    (folder / name).write_bytes(content.read())
    return folder
