"""A new runtime is one new file: the package is copied, one module is added to it, and every command knows it."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from exporter import backends
from tests import once
from tests.conftest import ROOT, write_tiny

MINE = '''
"""A runtime with files of its own: an ONNX graph behind four letters, run by ONNX Runtime."""

from contextlib import contextmanager
from typing import Annotated

from exporter.artifact import file_name, publish
from exporter.backends import Bound, Options, Runtime, Target, TargetOptions, as_taken
from exporter.recipe.fields import about

MAGIC = b"MINE"


class MineOptions(TargetOptions, frozen=True):
    level: Annotated[int, about("Level of optimization, 0 to 2.", metavar="N")] = 1


class Session:
    def __init__(self, inference, preprocessing):
        self.inference, self.preprocessing = inference, preprocessing
        self.facts, self.streams = {"device": "cpu", "arithmetic": "fp32"}, 1

    def __call__(self, images):
        name = self.inference.get_inputs()[0].name
        return tuple(self.inference.run(None, {name: as_taken(images, self.preprocessing)}))

    def bind(self, batches):
        runs, last = 0, ()

        def run():
            nonlocal runs, last
            last = self(batches[runs % len(batches)])
            runs += 1

        return Bound(run, lambda: last)


@contextmanager
def session(artifact, options):
    import onnxruntime

    graph = artifact.path.read_bytes().removeprefix(MAGIC)
    yield Session(onnxruntime.InferenceSession(graph), artifact.sidecar.preprocessing)


def build(artifact, precision, out, options):
    sidecar = artifact.sidecar.derived(backend="mine", precision=precision, target={"level": options.level})
    graph = artifact.path.read_bytes()
    return publish(out / file_name(sidecar, TARGET.suffix), sidecar, lambda file: file.write_bytes(MAGIC + graph))


RUNTIME = Runtime(
    name="mine",
    options=Options,
    probe=lambda: "mine 1.0",
    open=session,
    distributions=("click",),
    devices={"cpu": "CPU", "turbo": "CPU"},
    devices_here=lambda: "cpu, turbo",
)
TARGET = Target(
    name="mine",
    command="own",
    summary="→ a file of mine.",
    description="Build a file of mine.",
    examples=("own --variant tiny",),
    suffix=".mine",
    precisions={"fp32": "As the weights are."},
    options=MineOptions,
    form=lambda precision, batch: "conv",
    build=build,
)
'''
RECIPE = """\
backend: mine
precision: fp32
model:
  weights: weights
target:
  level: 2
checks:
  samples: 4
bench:
  duration: 0.5
"""


SERVER = """
import sys
from pathlib import Path
from tests import program
with program.installed(Path("bin")) as path:
    print(path, flush=True)
    sys.stdin.read()
"""


class Copy:
    """A copy of the package in a folder, to which a runtime was added, and of what the contract tests need."""

    def __init__(self, folder: Path):
        self.folder = folder
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "exporter", folder / "exporter", ignore=ignore)
        (folder / "exporter" / "backends" / "mine.py").write_text(MINE)
        for name in ("pyproject.toml", "tests/__init__.py", "tests/conftest.py", "tests/once.py", "tests/preloaded.py",
                     "tests/program.py", "tests/reference.py", "tests/backends/__init__.py",
                     "tests/backends/test_contract.py"):  # fmt: skip
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        write_tiny(folder / "weights")
        (folder / "tiny.yaml").write_text(RECIPE)
        (ROOT / "build").mkdir(exist_ok=True)
        (folder / "build").symlink_to(ROOT / "build")  # the traced graphs
        for name in ("bin", "graphs"):
            (folder / name).mkdir()
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(folder),
            "XDG_CACHE_HOME": str(folder / "cache"),
            once.GRAPHS: str(folder / "graphs"),
        }

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Start the copy's `convnext-export`."""
        pipe = subprocess.PIPE
        words = [sys.executable, "-c", SERVER]
        with subprocess.Popen(
            words, cwd=self.folder, env=self.environment, stdin=pipe, stdout=pipe, text=True
        ) as server:
            self.program = self.folder / server.stdout.readline().strip()
            yield
            server.stdin.close()

    def printed(self, *command: object) -> str:
        """What a command prints in the folder of the copy."""
        done = subprocess.run(
            [*map(str, command)], cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False,
            timeout=500,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def python(self, *words: object) -> str:
        """What a python process prints that finds the copy before any other."""
        return self.printed(sys.executable, *words)

    def run(self, *words: object) -> str:
        """What `convnext-export WORDS…` of the copy prints."""
        return self.printed(self.program, *words)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    made = Copy(tmp_path_factory.mktemp("copy"))
    with made.serving():
        yield made


@pytest.fixture(scope="module")
def built(copy):
    facts = json.loads(copy.run("own", "--weights", "weights", "--level", 2, "-o", "out", "--json"))
    return copy.folder / facts["artifact"]["path"]


def test_the_copy_is_what_runs_and_differs_by_one_file(copy):
    found = copy.python("-c", "import exporter; print(exporter.__file__)").strip()
    assert found == str(copy.folder / "exporter" / "__init__.py")
    paths = {
        folder: {path.relative_to(folder) for path in folder.rglob("*") if path.suffix == ".py"}
        for folder in (copy.folder / "exporter", ROOT / "exporter")
    }
    assert paths[copy.folder / "exporter"] - paths[ROOT / "exporter"] == {Path("backends/mine.py")}


def test_help_has_its_command_its_options_and_its_devices(copy):
    assert re.search(r"^  own +→ a file of mine\.$", copy.run("--help"), flags=re.M)
    shown = copy.run("own", "--help")
    assert "Build a file of mine." in shown
    assert "convnext-export own --variant tiny" in shown
    assert "--level N" in shown
    assert "--int8" not in shown, "it takes fp32 alone"
    assert "cpu or turbo on mine" in " ".join(copy.run("verify", "--help").split())


def test_doctor_knows_it(copy):
    facts = {fact["what"]: fact for fact in json.loads(copy.run("doctor", "--json"))}
    assert (facts["backend mine"]["mark"], facts["backend mine"]["found"]) == ("✓", "mine 1.0, for fp32")
    assert facts["devices of mine"]["found"] == "cpu, turbo"


def test_its_command_builds_a_file_of_its_own_that_inspect_reads(copy, built):
    assert built.name == "custom_fp32.mine"
    assert built.read_bytes().startswith(b"MINE")
    facts = json.loads(copy.run("inspect", built, "--json"))["artifact"]
    assert (facts["backend"], facts["target"], facts["recipe"]["export"]["form"]) == ("mine", {"level": 2}, "conv")
    assert "click" in facts["versions"], "the versions of its distributions are recorded"
    assert "fp32, for mine" in copy.run("inspect", built)


@pytest.mark.slow
def test_a_recipe_builds_verifies_and_times_it_and_report_shows_it(copy):
    copy.run("run", "tiny.yaml", "-o", "runs")
    report = json.loads((copy.folder / "runs" / "custom_fp32.mine.report.json").read_text())
    found = {finding["metric"]: finding["value"] for finding in report["findings"]}
    assert report["passed"]
    assert found["cosine"] > 0.99999
    assert found["p50_ms"] > 0
    page = copy.run("report", "runs/custom_fp32.mine.report.json", "--format", "html")
    assert "custom_fp32.mine" in page
    assert "mine fp32" in page


@pytest.mark.slow
def test_bench_has_a_row_of_it_beside_another(copy, built):
    copy.run("onnx", "--weights", "weights", "-o", "out")
    shown = copy.run("bench", built, "out/custom_fp32.onnx", "--duration", 0.5)
    (row,) = [line for line in shown.splitlines() if line.startswith("custom_fp32.mine")]
    setting, numbers = row.removeprefix("custom_fp32.mine").split("latency", 1)
    assert setting.strip().startswith("cpu, ")
    assert numbers.split()[0] == "1", "the batch"
    assert float(numbers.split()[1]) > 0
    assert numbers.split()[7] == "–", "of a peak that it does not have"


def test_the_page_shows_the_code_of_null():
    code = (ROOT / "exporter" / "backends" / "null.py").read_text()
    shown = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "new-runtime.md").read_text(), flags=re.S)
    assert [block in code for block in shown] == [True, True, False]
    assert shown[-1].startswith("class MyOptions(TargetOptions")


def test_the_worked_example_stays_short_and_out_of_the_way():
    assert len((ROOT / "exporter" / "backends" / "null.py").read_text().splitlines()) <= 120
    assert not backends.runtime("null").opens_onnx, "it would check traced graphs, slowly"
    assert not list((ROOT / "recipes").glob("null/*"))


@pytest.mark.slow
def test_the_contract_holds_for_it(copy):
    shown = copy.python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/backends/test_contract.py", "-k", "mine")
    assert int(shown.rpartition("\n")[0].rpartition("\n")[2].split()[0]) > 20
    assert " failed" not in shown
