"""Builds an artifact at a git revision."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from exporter import artifact as artifacts
from exporter.artifact import Artifact
from exporter.errors import BadRequest, CheckFailed
from exporter.git import git
from exporter.progress import step


@contextmanager
def built_at(revision: str, command: str, path: Path) -> Iterator[Artifact]:
    """The artifact that `command` builds at `path` in a checkout of the revision, which is removed after the block.

    Args:
        revision: a commit, branch or tag.
        command: a shell command, run in the user's working folder of the checkout.
        path: the artifact, relative to that folder.

    Raises: Unavailable without git; BadRequest outside a repository or for an unknown revision; CheckFailed when the
        command fails.
    """
    if path.is_absolute():
        raise BadRequest(
            f"{path}: with --base-rev the artifact is named relative to here, as the build command leaves it"
        )
    commit = git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}", failed=_unknown(revision))
    here = git("rev-parse", "--show-prefix", failed="not a git repository; run this inside the one to compare")
    with tempfile.TemporaryDirectory(prefix="convnext-export-") as folder:
        checkout = Path(folder) / "base"
        git("worktree", "add", "--detach", "--quiet", str(checkout), commit, failed="git cannot check it out")
        try:
            if not (checkout / here).is_dir():
                raise BadRequest(
                    f"--base-rev {revision}: it has no folder {here}; run this in a folder that both revisions have"
                )
            yield build(command, checkout / here, path, f"{revision} ({commit[:12]})")
        finally:
            git("worktree", "remove", "--force", str(checkout), failed="git cannot remove its checkout")


def _unknown(revision: str) -> str:
    return (
        f"--base-rev {revision}: no such commit in this repository; in a shallow clone fetch it first: "
        f"git fetch --depth=1 origin {revision.removeprefix('origin/')}"
    )


def build(command: str, folder: Path, path: Path, what: str) -> Artifact:
    """Run a build command in a folder and open the artifact that it builds.

    Raises: CheckFailed when the command fails; BadRequest when it builds no artifact there.
    """
    step(f"building {what}: {command}")
    done = subprocess.run(
        command, shell=True, cwd=folder, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["it printed nothing"]
        raise CheckFailed(f"{what}: the build command ended with exit code {done.returncode}: {last[0][:300]}")
    if not (folder / path).is_file():
        raise BadRequest(f"{what}: the build command left no {path}; name what it builds, relative to here")
    return artifacts.load(folder / path)
