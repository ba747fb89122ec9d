"""The workflow that verifies in shards, run step by step: its runners share nothing but what they upload."""

import json
import os
import re
import shutil
import subprocess

import pytest
import yaml
from PIL import Image

from exporter.data import synthetic
from tests.conftest import ROOT, write_tiny

WORKFLOW = yaml.safe_load((ROOT / "docs/ci/github-shards.yml").read_text())["jobs"]
COUNT = 150


class Runners:
    """What GitHub does with a workflow, as far as this one needs it."""

    def __init__(self, repository, folder, program):
        self.repository, self.folder, self.program = repository, folder, program
        self.uploaded, self.number = folder / "uploaded", 0

    def run(self, job, values):
        """Run a job on a fresh runner, and return its outputs."""
        self.number += 1
        work, outputs = self.folder / f"runner{self.number}", {}
        work.mkdir()

        def value(text):
            return re.sub(r"\$\{\{ (.+?) \}\}", lambda match: str(values[match[1]]), str(text))

        for step in WORKFLOW[job]["steps"]:
            inputs = {key: value(one) for key, one in step.get("with", {}).items()}
            uses = step.get("uses", "run").partition("@")[0].removeprefix("actions/")
            if uses == "checkout":
                shutil.copytree(self.repository, work, dirs_exist_ok=True)
            elif uses == "upload-artifact":
                assert not (self.uploaded / inputs["name"]).exists(), "an artifact cannot be uploaded twice"
                target = self.uploaded / inputs["name"]
                path = work / inputs["path"]
                shutil.copytree(path, target) if path.is_dir() else shutil.copy(path, target)
            elif uses == "download-artifact":
                pattern = inputs.get("name") or inputs["pattern"]
                for artifact in sorted(self.uploaded.glob(pattern)):
                    shutil.copytree(artifact, work / inputs["path"], dirs_exist_ok=True)
            elif uses == "run" and not step["run"].startswith("pip install"):
                outputs |= self.bash(value(step["run"]), work)
            else:
                assert uses in ("run", "setup-python")
        return outputs

    def bash(self, script, work):
        file = self.folder / "output"
        file.write_text("")
        settings = os.environ | {"PATH": f"{self.program.parent}:{os.environ['PATH']}", "GITHUB_OUTPUT": str(file)}
        done = subprocess.run(
            ["bash", "-eo", "pipefail", "-c", script], cwd=work, env=settings, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return dict(line.split("=", 1) for line in file.read_text().splitlines())


@pytest.mark.slow
def test_the_workflow_gives_the_report_of_one_machine(installed, tmp_path):
    repository = write_tiny(tmp_path / "repository")
    for number in range(COUNT):
        folder = repository / "photos/val" / f"class {number % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(synthetic.dead_leaves(40, number)).save(folder / f"{number}.png")
    runners = Runners(repository, tmp_path, installed)
    numbers = json.loads(runners.run("plan", {})["numbers"])
    assert numbers == [0, 1, 2]
    for number in numbers[::-1]:
        runners.run("shard", {"matrix.number": number})
    runners.run("merge", {})
    report = json.loads((tmp_path / "uploaded/report").read_text())
    images = next(finding for finding in report["findings"] if finding["metric"] == "images")
    assert images["value"] == COUNT

    alone = tmp_path / "alone"
    shutil.copytree(tmp_path / "uploaded/plan", alone / "build")
    shutil.copytree(repository / "photos", alone / "photos")
    shutil.copy(repository / "model.safetensors", alone)
    shutil.copy(repository / "config.json", alone)
    runners.bash("convnext-export verify build/custom_fp16.xml --data photos/val", alone)
    assert (alone / "build/custom_fp16.xml.report.json").read_bytes() == (tmp_path / "uploaded/report").read_bytes()
