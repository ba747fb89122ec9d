"""Hooks of mkdocs: README is the first page, and links that lead out of docs/ lead to the repository.

Pages are written for GitHub, where `../LICENSE` is a file of the repository. On the site there is no such file.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(\]\()([^)\s]+)(\))")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie beside docs/."""
    for source, name in PAGES.items():
        text = moved((ROOT / source).read_text(), "", config.repo_url)
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Lead links out of docs/ to the repository."""
    return markdown if page.file.src_uri in PAGES.values() else moved(markdown, "docs", config.repo_url)


def moved(markdown: str, folder: str, repository: str) -> str:
    """A page of a folder of the repository with the links that it has on the site."""

    def target(link: re.Match[str]) -> str:
        address, hash_, anchor = link[2].partition("#")
        if not address or re.match(r"[a-z]+:", address):
            return link[0]
        path = posixpath.normpath(posixpath.join(folder, address))
        if path in PAGES:
            address = PAGES[path]
        elif path.startswith("docs/"):
            address = path.removeprefix("docs/")
        else:
            kind = "tree" if (ROOT / path).is_dir() else "blob"
            address = f"{repository}/{kind}/main/{path}"
        return f"{link[1]}{address}{hash_}{anchor}{link[3]}"

    return LINK.sub(target, markdown)
