"""Is anything ever half done? Runs of a small model, killed at random moments, two at once in some, and full disks.

    python -m benchmarks.kill --kills 100 --rebuilds 500 --full 20 -o build/kill.json

After every kill a stock OpenVINO must read what an undisturbed run writes, or find no file; only then each artifact on
the disk must load (its digests are right, interrupted moves are completed), and the run that follows must complete and
give the bytes that an undisturbed run gives. Meanwhile another process reads the same file with a stock OpenVINO again
and again, and counts what it gets; so it does while the graph is replaced by one of other weights. The weights change
between trials, so that a result of the last weights would be seen. A full disk is a tmpfs of a random size (which needs
root), or where none can be mounted a limit on the size of files.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from benchmarks.provenance import environment
from exporter import artifact, report
from exporter.artifact.disk import write_file
from exporter.artifact.sidecar import Record
from exporter.errors import BadRequest, ExporterError

RECIPES = {
    "custom_int8.xml": "backend: openvino\nprecision: int8\nbench: null\n"
    "quantization: {calib: synthetic, calib_size: 4, even_if_slower: true}\n",
    "custom_fp16.onnx": "backend: onnxruntime\nprecision: fp16\nbench: null\n",
}
REST = "model: {weights: model.safetensors}\nexport: {imgsz: 64, batch: 1}\n"
CONTEXT = multiprocessing.get_context("forkserver")
LIBRARIES = [
    "torch", "torch._dynamo", "torch.export._trace", "torch.onnx._internal.exporter._core",
    "onnxscript.function_libs.torch_lib.ops", "onnxsim", "onnxruntime", "openvino", "safetensors.torch", "scipy.stats",
    "jinja2", "exporter.cli", "benchmarks.brief",
]  # fmt: skip


class Trial(Record, frozen=True):
    """One disturbance: what, after how many seconds or bytes, and what was wrong afterwards ("" is nothing)."""

    what: str
    after: float
    writers: int
    artifacts: int
    wrong: str = ""


class Result(Record, frozen=True):
    """All trials, the machine, and how often a stock reader got a whole model, no file, or something else."""

    trials: tuple[Trial, ...]
    environment: dict[str, Any]
    reads: dict[str, int] = msgspec.field(default_factory=dict)

    def table(self) -> str:
        """What was tried, and how often something was wrong."""
        rows = [
            "| interruption | trials | with two writers | artifacts checked | torn or stale |",
            "|---|--:|--:|--:|--:|",
        ]
        for what in dict.fromkeys(trial.what for trial in self.trials):
            mine = [trial for trial in self.trials if trial.what == what]
            two, looked = sum(t.writers > 1 for t in mine), sum(t.artifacts for t in mine)
            rows.append(f"| {what} | {len(mine)} | {two} | {looked} | {sum(bool(t.wrong) for t in mine)} |")
        counts = ", ".join(f"{count:,} × {what}" for what, count in self.reads.items())
        return "\n".join(rows) + "\n" + (f"\nA stock OpenVINO meanwhile read: {counts}.\n" if counts else "")


def prepare(desk: Path) -> list[Path]:
    """A checkpoint in two versions, and recipes of it."""
    from safetensors.torch import save_file

    from exporter.model.variants import Architecture
    from exporter.model.weights import _random_state

    desk.mkdir(parents=True, exist_ok=True)
    for seed in (0, 1):
        state = _random_state(Architecture(depths=(1, 1, 2, 1), dims=(16, 24, 32, 48)), seed)
        save_file(state, desk / f"version{seed}.safetensors")
    for name, text in RECIPES.items():
        (desk / f"{Path(name).stem}.yaml").write_text(text + REST)
    return [desk / f"{Path(name).stem}.yaml" for name in RECIPES]


def use(desk: Path, version: int) -> None:
    """Put a version of the weights in place."""
    write_file(desk / "model.safetensors", (desk / f"version{version}.safetensors").read_bytes())


def work(recipes: list[Path], out: Path, log: Path, most: int | None) -> None:
    """What is killed: all of a run, in a process of its own, timed as briefly as can be, with files of at most so many
    bytes. Its timing processes write no file; they end when their connection is closed."""
    import resource

    from exporter import run

    os.setsid()
    os.environ["XDG_CACHE_HOME"] = str(log.parent / "cache")
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    if most is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    vars(forkserver._forkserver)["ensure_running"] = lambda: None  # one server forks the runs and their processes
    os.chdir(recipes[0].parent)
    outcomes = run.run_all(run.read_all(recipes, out))
    for outcome in outcomes:
        print(outcome.error, file=sys.stderr)
    sys.exit(max(outcome.exit_code for outcome in outcomes))


def start(recipes: list[Path], out: Path, log: Path, most: int | None = None) -> Any:
    """A run begun; what it says goes into a log."""
    process = CONTEXT.Process(target=work, args=(recipes, out, log, most))
    process.start()
    return process


def kill(process: Any) -> None:
    """SIGKILL for a run and all that is in its group of processes."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()
    process.join()


def faults(out: Path) -> tuple[int, str]:
    """How many artifacts lie in a folder, and what is wrong with one that does not load or a report that is torn."""
    sidecars = [path.with_suffix("") for path in out.glob("*.json") if not path.name.endswith(".report.json")]
    paths = [path for path in sidecars if path.suffix in (".onnx", ".xml")]
    bare = [path for path in out.glob("*.onnx") if path not in paths]
    if bare and not list(out.glob(".*.commit")):
        return len(paths), f"{bare[0].name} has no sidecar"
    for path in paths:
        try:
            artifact.load(path)
        except BadRequest as error:
            return len(paths), str(error)
    for path in out.glob("*.report.json"):
        try:
            report.load(path)
        except BadRequest as error:
            return len(paths), str(error)
    return len(paths), ""


def content(path: Path) -> str:
    """A digest of the facts, operators and weights that a stock OpenVINO reads; "" where it finds no file."""
    import openvino as ov

    try:
        model = ov.Core().read_model(path)
    except RuntimeError as error:
        # OpenVINO looks for the file first and opens it later; it may be gone at either time.
        absent = ("file_exists(path)", "Could not open the file", "ir_model != nullptr")
        if any(text in str(error) for text in absent):
            return ""
        return str(error)
    digest = hashlib.sha256(str(model.get_rt_info("convnext_export")).encode())
    for operator in model.get_ordered_ops():
        digest.update(f"{operator.get_type_name()} {operator.get_friendly_name()}\n".encode())
        if operator.get_type_name() == "Constant":
            digest.update(operator.data.tobytes())
    return digest.hexdigest()


def graphs(out: Path) -> list[Path]:
    """Where the OpenVINO graphs of a run are."""
    return [out / name for name in RECIPES if name.endswith(".xml")]


def read_on(path: Path, known: set[str], stop: Any, answers: Any) -> None:
    """Read a graph with a stock OpenVINO until `stop` is set or the benchmark is killed; put how often it was whole,
    absent, or anything else."""
    benchmark = multiprocessing.parent_process()
    assert benchmark is not None
    counts = {"a whole model": 0, "no file": 0, "a mixture or an error": 0}
    while not stop.is_set() and benchmark.is_alive():
        digest = content(path)
        counts["a whole model" if digest in known else "a mixture or an error" if digest else "no file"] += 1
        time.sleep(0.01)  # the runs that are killed need the processor too
    answers.put(counts)


@contextmanager
def reading(out: Path, known: set[str]) -> Iterator[dict[str, int]]:
    """Read the graph of a folder on and on in another process; the counts are there when the block has ended."""
    counts: dict[str, int] = {}
    stop, answers = CONTEXT.Event(), CONTEXT.Queue()
    readers = [CONTEXT.Process(target=read_on, args=(path, known, stop, answers)) for path in graphs(out)]
    for reader in readers:
        reader.start()
    try:
        yield counts
    finally:
        stop.set()
        for reader in readers:
            counts.update(answers.get(timeout=60))
            reader.join()


def digests(out: Path) -> dict[str, str]:
    """The bytes that a run's artifacts have."""
    return {name: artifact.load(out / name).sidecar.sha256 for name in RECIPES}


def kill_once(
    desk: Path, recipes: list[Path], expected: list[dict[str, str]], known: set[str], longest: float, number: int
) -> Trial:
    """One run begun, killed, looked at, and run again to its end."""
    draw = random.Random(number)
    out, log = desk / "out", desk / "log"
    version, writers, after = number % 2, 2 if number % 5 == 4 else 1, draw.uniform(0, longest)
    use(desk, version)
    began = [start(recipes, out, log) for _ in range(writers)]
    time.sleep(after)
    kill(began[0])
    mixed = [path.name for path in graphs(out) if content(path) not in {"", *known}]  # before anything is repaired
    count, wrong = faults(out)
    wrong = f"a stock reader gets a mixture: {mixed}" if mixed else wrong
    for process in began[1:]:
        process.join()
        wrong = wrong or ("" if process.exitcode == 0 else f"the other writer ended with {process.exitcode}")
    again = start(recipes, out, log)
    again.join()
    wrong = wrong or ("" if again.exitcode == 0 else f"the run afterwards ended with {again.exitcode}")
    wrong = wrong or ("" if digests(out) == expected[version] else "stale: not what these weights give")
    left = [path.name for path in out.iterdir() if path.name.startswith(".")]
    return Trial(
        what="SIGKILL", after=after, writers=writers, artifacts=count, wrong=wrong or (f"left: {left}" if left else "")
    )


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """A file system of so many bytes, if one can be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = shutil.which("mount") and subprocess.run(words, capture_output=True, check=False).returncode == 0
    try:
        yield bool(mounted)
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def full_once(desk: Path, recipes: list[Path], expected: dict[str, str], most: int, number: int) -> Trial:
    """A run on a disk that fills up, then with more room."""
    size = random.Random(number).randrange(40_000, most)
    use(desk, 0)
    out = desk / f"full{number}"
    with small_disk(out, size) as mounted:
        process = start(recipes, out, desk / "log", None if mounted else size // 4)
        process.join()
        count, wrong = faults(out)
        said = (desk / "log").read_text()
        if "Traceback" in said or process.exitcode not in (0, 3):
            wrong = wrong or f"ended with {process.exitcode}: {said.strip().splitlines()[-1]}"
        if mounted:
            subprocess.run(["mount", "-o", f"remount,size={4 * most}", str(out)], check=True)
        again = start(recipes, out, desk / "log")
        again.join()
        wrong = wrong or ("" if again.exitcode == 0 else f"with room again it ended with {again.exitcode}")
        wrong = wrong or ("" if digests(out) == expected else "stale")
    return Trial(what="disk full", after=size, writers=1, artifacts=count, wrong=wrong)


def rebuild(desk: Path, number: int) -> Trial:
    """The graph of a run, replaced by that of the other weights as a build replaces it."""
    for path in graphs(desk / "out"):
        new = artifact.load(desk / f"clean{number % 2}" / path.name)

        def write(target: Path, files: list[Path] = new.files) -> None:
            for file in files:
                shutil.copy(file, target.with_name(file.name))

        with artifact.forced():
            artifact.publish(path, new.sidecar, write)
    return Trial(what="rebuilt", after=0, writers=1, artifacts=len(graphs(desk / "out")))


def measure(desk: Path, kills: int, rebuilds: int, full: int, keep: Callable[[Result], None]) -> Result:
    """All trials on a desk. The result so far is handed to `keep` after each."""
    CONTEXT.set_forkserver_preload(LIBRARIES)
    recipes = prepare(desk)
    expected, seconds = [], 0.0
    for version in (0, 1):
        use(desk, version)
        began = time.monotonic()
        clean = start(recipes, desk / f"clean{version}", desk / "log")
        clean.join()
        seconds = time.monotonic() - began
        if clean.exitcode != 0:
            raise ExporterError(f"an undisturbed run ends with {clean.exitcode}: {(desk / 'log').read_text()[-500:]}")
        expected.append(digests(desk / f"clean{version}"))
    result = Result(trials=(), environment=environment())

    def add(what: str, trial: Trial) -> None:
        nonlocal result
        print(f"{what}: {trial.wrong or 'sound'}", file=sys.stderr, flush=True)
        result = replace(result, trials=(*result.trials, trial))
        keep(result)

    known = {content(path) for version in (0, 1) for path in graphs(desk / f"clean{version}")}
    with reading(desk / "out", known) as reads:
        for number in range(kills):
            trial = kill_once(desk, recipes, expected, known, seconds, number)
            add(f"kill {number + 1} of {kills}, after {trial.after:.1f} s of {seconds:.1f}", trial)
        for number in range(rebuilds):
            add(f"rebuild {number + 1} of {rebuilds}", rebuild(desk, number))
    result = replace(result, reads=reads)
    most = sum(path.stat().st_size for path in (desk / "clean0").rglob("*") if path.is_file())
    for number in range(full):
        add(f"full disk {number + 1} of {full}", full_once(desk, recipes, expected[0], most, number))
    return result


def main() -> None:
    """Run the trials and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--rebuilds", type=int, default=500, help="Of the graph, while another process reads it.")
    parser.add_argument("--full", type=int, default=20)
    parser.add_argument("-o", type=Path, default=Path("build/kill.json"), help="Written after each trial.")
    options = parser.parse_args()

    def keep(result: Result) -> None:
        write_file(options.o, msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")

    with tempfile.TemporaryDirectory(prefix="convnext-export-kill-") as folder:
        result = measure(Path(folder) / "desk", options.kills, options.rebuilds, options.full, keep)
    keep(result)
    print(result.table())
    if any(trial.wrong for trial in result.trials) or result.reads.get("a mixture or an error"):
        sys.exit(1)


if __name__ == "__main__":
    main()
