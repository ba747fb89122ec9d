"""A folder that is written whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from exporter.artifact.disk import check_space, flush, new_folder, write_error
from exporter.errors import BadRequest

SPARE_BYTES = 4 << 20  # for the files beside the artifact


@contextmanager
def staged(out: Path, needed: int) -> Iterator[Path]:
    """A new folder beside `out`, which becomes `out` when the block ends without an error, else it is removed.

    The next process removes the folder of a killed one.

    Args:
        out: a folder that is not there yet, or empty.
        needed: bytes of the artifact.

    Raises: BadRequest where `out` is a file or not empty, or cannot be written; Unavailable when the disk is full.
    """
    out = out.absolute()
    _refuse_filled(out)
    check_space(out, needed + SPARE_BYTES)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(out) as folder:
            folder.chmod(0o755)  # a server of another user reads it
            yield folder
            for path in folder.rglob("*"):
                flush(path)
            _refuse_filled(out)  # another process may have written it meanwhile
            if out.is_dir():
                out.rmdir()
            folder.rename(out)
            flush(out.parent)
    except OSError as error:
        raise write_error(error, out) from None


def _refuse_filled(out: Path) -> None:
    if out.is_dir() and (entry := next(out.iterdir(), None)):
        raise BadRequest(f"{out}: not empty ({entry.name} is in it); give -o a folder that is empty or not there")
    kinds = {"the working folder": out == Path.cwd(), "a link": out.is_symlink(), "a mount point": os.path.ismount(out)}
    if kind := next((kind for kind, holds in kinds.items() if holds), ""):
        raise BadRequest(
            f"{out}: {kind}, which cannot be replaced by the package; give -o a new folder, as {out / 'package'}"
        )
    if out.exists() and not out.is_dir():
        raise BadRequest(f"{out}: not a folder; give -o a folder that is empty or not there")


def copy(source: Path, target: Path) -> None:
    """Copy one file, with the folders above it.

    Raises: BadRequest where it cannot be read.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(source, os.R_OK):
        raise BadRequest(f"{source}: it cannot be read, or another process has removed it; run the same command again")
    shutil.copyfile(source, target)


def write(target: Path, content: str | bytes) -> None:
    """Write one file, with the folders above it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content.encode() if isinstance(content, str) else content)
