"""The workflow of docs/gate.md, pasted into a fresh repository, gates a pull request: run here step by step."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, write_tiny

WORKFLOW = re.search(r"<!-- workflow -->\n```yaml\n(.*?)```", (ROOT / "docs" / "gate.md").read_text(), flags=re.S)[1]
ACTION = "convnext-export/convnext-export@main"


class Runner:
    """What GitHub does with a job, as far as this workflow needs it: checkout, inputs, steps, outputs, expressions."""

    def __init__(self, origin: Path, folder: Path, program: Path, base: str, head: str):
        self.origin, self.folder, self.base, self.head = origin, folder, base, head
        self.program = program
        self.work, self.summary, self.log = folder / "work", folder / "summary.md", ""
        self.outputs, self.uploaded = {}, []
        folder.mkdir()
        self.summary.touch()

    def run(self, workflow: str, **changed: str) -> int:
        """The exit code of the first step that fails, or 0."""
        jobs = yaml.safe_load(workflow)["jobs"]
        code = 0
        for step in jobs["gate"]["steps"]:
            if code == 0 or step.get("if") == "always()":
                code = self.step(step, changed) or code
        return code

    def step(self, step, changed):
        uses = step["uses"]
        told = {key: str(value) for key, value in step.get("with", {}).items()}
        if uses.startswith("actions/checkout@"):
            subprocess.run(
                ["git", "clone", "-q", "--depth=1", "-b", self.head, f"file://{self.origin}", self.work], check=True
            )
            return 0
        if uses.startswith("actions/upload-artifact@"):
            folder = self.work / self.value(told["path"], {})
            self.uploaded = sorted(path.name for path in folder.iterdir())
            return 0
        if uses == ACTION:
            return self.action({**told, **changed}, step["id"])
        assert uses.startswith("actions/setup-python@")
        return 0

    def action(self, told, name):
        action = yaml.safe_load((ROOT / "action.yml").read_text())
        inputs = {key: told.get(key, self.value(one.get("default", ""), {})) for key, one in action["inputs"].items()}
        assert set(told) <= set(action["inputs"]), "the workflow gives what the action takes"
        assert all(inputs[key] for key, one in action["inputs"].items() if one.get("required"))
        results = {}
        for step in action["runs"]["steps"]:
            if step.get("if") == "inputs.install != 'no'" and inputs["install"] == "no":
                continue
            code, found = self.bash(step["run"], {k: self.value(v, inputs) for k, v in step.get("env", {}).items()})
            results[step.get("id")] = found
            if code:
                break
        for key, one in action["outputs"].items():
            step, output = re.fullmatch(r"\$\{\{ steps\.(\w+)\.outputs\.(\w+) \}\}", one["value"]).groups()
            self.outputs[f"steps.{name}.outputs.{key}"] = results.get(step, {}).get(output, "")
        return code

    def bash(self, script, env):
        file = self.folder / "output"
        file.write_text("")
        known = {
            "GITHUB_ACTION_PATH": str(ROOT),
            "GITHUB_STEP_SUMMARY": str(self.summary),
            "GITHUB_OUTPUT": str(file),
            "PATH": f"{self.program.parent}:{os.environ['PATH']}",
        }
        words = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", script]
        done = subprocess.run(
            words, cwd=self.work, env={**os.environ, **known, **env}, capture_output=True, text=True, check=False
        )
        self.log += done.stdout + done.stderr
        return done.returncode, dict(line.split("=", 1) for line in file.read_text().splitlines())

    def value(self, text, inputs):
        """The text with its `${{ … }}` as they are for a pull request."""
        known = {f"inputs.{key}": value for key, value in inputs.items()} | self.outputs
        names = ("base_ref", "event.merge_group.base_sha", "event.before", "event.repository.default_branch")
        known[" || ".join(f"github.{name}" for name in names)] = self.base
        return re.sub(r"\$\{\{ (.*?) \}\}", lambda found: known[found[1]], text)


def git(folder, *words):
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def origin(tmp_path):
    """A repository with weights and the workflow; a branch that changes nothing, and one whose network is larger."""
    path = tmp_path / "origin"
    write_tiny(path)
    (path / ".github" / "workflows").mkdir(parents=True)
    (path / ".github" / "workflows" / "convnext.yml").write_text(WORKFLOW)
    git(tmp_path, "init", "-q", "-b", "main", str(path))
    git(path, "add", "-A")
    git(path, "commit", "-q", "-m", "base")
    git(path, "checkout", "-q", "-b", "harmless")
    (path / "notes.txt").write_text("x")
    git(path, "add", "-A")
    git(path, "commit", "-q", "-m", "a note")
    git(path, "checkout", "-q", "-b", "larger", "main")
    shutil.rmtree(path / "model.safetensors", ignore_errors=True)
    write_tiny(path, dims=(64, 96, 128, 192))
    git(path, "add", "-A")
    git(path, "commit", "-q", "-m", "a larger network")
    return path


LIMITS = "p50_ms:20%\nbytes:1%"


@pytest.mark.slow
def test_the_workflow_passes_what_is_harmless_and_stops_what_is_slower(origin, installed, tmp_path):
    told = {"install": "no", "duration": "1", "fail-on": LIMITS}
    harmless = Runner(origin, tmp_path / "harmless", installed, "main", "harmless")
    assert harmless.run(WORKFLOW, **told) == 0, harmless.log
    assert "::notice title=custom_fp16.xml::all 2 checks passed" in harmless.log
    assert harmless.uploaded == ["compare.json", "junit.xml", "report.html"]

    larger = Runner(origin, tmp_path / "larger", installed, "main", "larger")
    assert larger.run(WORKFLOW, **told) == 6, larger.log
    assert "::error title=custom_fp16.xml%3A p50_ms%2C batch 1::" in larger.log
    assert "**regressed**" in larger.summary.read_text()
    assert larger.uploaded == ["compare.json", "junit.xml", "report.html"], "a report of a failure is worth most"


def test_a_build_that_fails_is_no_regression(origin, installed, tmp_path):
    runner = Runner(origin, tmp_path / "broken", installed, "main", "harmless")
    assert runner.run(WORKFLOW, install="no", build="echo no weights; exit 3") == 5
    assert "the build command ended with exit code 3: no weights" in runner.log


def test_the_first_push_of_a_branch_is_compared_with_the_default_branch(origin, installed, tmp_path):
    runner = Runner(origin, tmp_path / "new", installed, "0" * 40, "harmless")
    assert runner.run(WORKFLOW, install="no", build="echo no weights; exit 3") == 5
    assert "the build command ended with exit code 3: no weights" in runner.log


def test_the_other_files_to_copy_are_whole():
    gitlab = yaml.safe_load((ROOT / "docs" / "ci" / "gitlab-ci.yml").read_text())["convnext gate"]
    script = (ROOT / "docs" / "ci" / "gate.sh").read_text()
    for name in set(gitlab["variables"]) - {"PIP_EXTRA_INDEX_URL"}:
        assert f"${{{name}" in script, name
    history = yaml.safe_load((ROOT / "docs" / "ci" / "github-history.yml").read_text())
    commands = "\n".join(step.get("run", "") for step in history["jobs"]["history"]["steps"])
    assert "--history history/history.jsonl" in commands
    assert subprocess.run(["bash", "-n", ROOT / "docs" / "ci" / "gate.sh"], check=False).returncode == 0
