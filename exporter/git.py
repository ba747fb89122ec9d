"""Git commands."""

from __future__ import annotations

import shutil
import subprocess

from exporter.errors import BadRequest, Unavailable


def git(*words: str, failed: str) -> str:
    """Run git and return its output.

    Raises: Unavailable when it is not there; BadRequest, beginning with `failed`, when it refuses.
    """
    if shutil.which("git") is None:
        raise Unavailable("git is not installed; install it, or compare two artifacts")
    done = subprocess.run(["git", *words], capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:]
        raise BadRequest(f"{failed}{f' ({said[0]})' if said else ''}"[:400])
    return done.stdout.strip()
