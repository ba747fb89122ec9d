"""Pages lead to files and headings that are there, every message is on the page of messages, and the site builds."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from benchmarks import messages, readme
from tests.conftest import ROOT

TEXTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "calibration").glob("*.md")])
needs_mkdocs = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("mkdocs", "mkdocstrings", "mike"))),
    reason="mkdocs or mike is not installed: `make site` installs them",
)


def slugs(text):
    """The anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    titles = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title) for title in re.findall(r"^#+ (.*)$", text, flags=re.M)]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(path):
    """Each link to a file or heading of the repository."""
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", path.read_text(), flags=re.S | re.M)
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:", link)]


def test_links_lead_to_files_and_headings():
    count = 0
    for path in TEXTS:
        for link in links(path):
            name, _, anchor = link.partition("#")
            target = (path.parent / name).resolve() if name else path
            assert target.exists(), f"{path.name}: {link}"
            assert not anchor or anchor in slugs(target.read_text()), f"{path.name}: {link}"
            count += 1
    assert count > 120


def test_every_page_is_reached_from_the_readme():
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        targets = {(page.parent / link.partition("#")[0]).resolve() for link in links(page)}
        waiting += [target for target in targets - reached if target.suffix == ".md" and target not in waiting]
    assert {path for path in TEXTS if path.parent == ROOT / "docs"} <= reached


def test_every_message_has_an_area():
    files = {path.relative_to(messages.ROOT) for path in messages.ROOT.rglob("*.py") if messages.messages(path)}
    places = {place for several, _ in messages.AREAS.values() for place in several}
    assert {path.parts[0] for path in files} <= places
    assert len(files) > 80


def test_messages_of_errors_are_collected():
    assert {"BadRequest", "Unavailable", "CheckFailed", "NoClassifier"} <= messages.ERRORS
    texts = messages.messages(messages.ROOT)
    assert len(texts) > 400
    assert "unknown variant …; …" in texts
    assert messages.split("one image at a time; leave it out") == ("one image at a time", "leave it out")
    assert messages.split("unknown variant …; …") == ("unknown variant …", "")


def test_lines_are_left_out_of_a_command_visibly():
    assert readme.shortened("a\nb1\nb2\nc\n", ("^b",)) == "a\n…\nc"


def test_the_hooks_of_pre_commit_are_the_checks_of_make():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    makefile = (ROOT / "Makefile").read_text()
    for hook in hooks:
        assert hook["entry"].replace(".venv/bin/", "$(BIN)/") + "\n" in makefile, hook["id"]
    assert {hook["id"] for hook in hooks} == {"format", "lint", "types", "imports"}


def publish(folder, version, earlier_version):
    """Commit the site of a version to the branch gh-pages, where another version is, in a copy of the pages; return the
    files of that branch."""
    copy, published = folder / "copy", folder / "published"
    shutil.copytree(ROOT / "docs", copy / "docs")
    for name in ("mkdocs.yml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, copy)
    for name in ("exporter", "benchmarks"):
        (copy / name).symlink_to(ROOT / name)
    git_identity = {
        f"GIT_{who}_{what}": "t@example.com" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | git_identity | {"PATH": path, "NO_MKDOCS_2_WARNING": "1"}

    def run(*words):
        done = subprocess.run(words, cwd=copy, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    (copy / "versions.json").write_text(
        json.dumps([{"version": earlier_version, "title": earlier_version, "aliases": ["latest"]}])
    )
    run("git", "init", "--quiet", "--initial-branch", "gh-pages")
    run("git", "add", "versions.json")
    run("git", "commit", "--quiet", "-m", earlier_version)
    run("mike", "deploy", "--update-aliases", version, "latest")
    run("git", "clone", "--quiet", copy, published)
    return published


@needs_mkdocs
@pytest.mark.slow
def test_the_site_builds_next_to_earlier_versions_and_loads_nothing_from_elsewhere(tmp_path):
    """In strict mode: a link, an anchor or a name of the API that is not there is an error. With `--quiet`, mkdocs does
    not count warnings, and the strict mode passes."""
    begin = time.monotonic()
    published = publish(tmp_path, "0.1.0", earlier_version="0.0.1")
    assert time.monotonic() - begin < 60
    versions = json.loads((published / "versions.json").read_text())
    assert [(one["version"], one["aliases"]) for one in versions] == [("0.1.0", ["latest"]), ("0.0.1", [])]
    site = published / "0.1.0"
    assert '"version":{"provider":"mike"}' in (site / "index.html").read_text().replace(" ", "")
    pages = list(site.glob("*.html"))
    assert {f"{path.stem}.html" for path in (ROOT / "docs").glob("*.md")} <= {path.name for path in pages}
    assert (site / "search" / "search_index.json").exists()
    for page in pages:
        loaded = re.findall(r"<(?:script|img|link|iframe)\b[^>]*?(?:src|href)=\"?([^\"\s>]+)", page.read_text())
        foreign = [address for address in loaded if re.match(r"(https?:)?//", address)]
        assert [one for one in foreign if "canonical" not in one] == [], page.name
    assert "exporter.build.live.export" in (site / "api.html").read_text()
