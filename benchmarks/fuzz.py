"""Files spoilt at random, for as long as you like: is there ever anything but one clear error of ours?

    python -m benchmarks.fuzz --minutes 30 -o build/fuzz.json

Whole files of every kind that the tool reads are changed at random (bits, lengths, numbers, words of the format,
pieces of each other) and read. Anything raised but our own errors, a write outside the folder, a file written that was
not asked for, or memory beyond 2 GB is a fault; the file that did it is kept. The work is done in a process that may
die: what it was reading then is a fault too.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from benchmarks import fuzz_pickles
from benchmarks.provenance import environment
from exporter import artifact, build, discover, report
from exporter.artifact import sidecar
from exporter.artifact.disk import write_file
from exporter.artifact.sidecar import Preprocessing, Record
from exporter.errors import ExporterError
from exporter.recipe import file as recipe_file
from exporter.verify import inspect

MOST_BYTES = 2 * 2**30
WORDS = [
    b"..", b"/etc/passwd", b"\x00", b"\xff", b"!!python/object/apply:os.system [id]", b"&a [*a]", b"<script>", b"null",
    b"-1", b"1e999", b"NaN", b"9" * 40, b"[" * 200, b"{" * 200, b"}", b"\n", b"\t", b": ", b'"', b"\\u0000",
    *fuzz_pickles.WORDS,
    b"data.pkl", b"cos\nsystem\n(S'id'\ntR.", b"PK\x05\x06", b"\x80\x02", b"../../x", b"# source: /", b"sha256",
]  # fmt: skip


class Fault(Record, frozen=True):
    """What went wrong, over which file."""

    target: str
    what: str
    file: str


class Result(Record, frozen=True):
    """How many files of each kind were read, how many were taken for sound, the peak of memory, and the faults."""

    seconds: float
    read: dict[str, int]
    sound: dict[str, int]
    peak_bytes: int
    faults: tuple[Fault, ...]
    environment: dict[str, Any]

    def table(self) -> str:
        """The counts, for people."""
        rows = ["| kind of file | files read | accepted | faults |", "|---|--:|--:|--:|"]
        for name in self.read:
            faults = sum(fault.target == name for fault in self.faults)
            rows.append(f"| {name} | {self.read[name]:,} | {self.sound[name]:,} | {faults} |")
        return "\n".join(rows) + f"\n\n{self.seconds / 60:.0f} minutes, {self.peak_bytes / 2**20:.0f} MiB at most.\n"


def spoil(content: bytes, others: list[bytes], draw: random.Random) -> bytes:
    """A file with a few changes."""
    spoilt = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        at = draw.randrange(len(spoilt) + 1)
        kind = draw.randrange(7)
        if kind == 0 and at < len(spoilt):
            spoilt[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            spoilt[at:at] = draw.choice(WORDS)
        elif kind == 2:
            del spoilt[at : at + draw.choice((1, 4, 64, len(spoilt)))]
        elif kind == 3:
            spoilt[at : at + 8] = draw.choice((b"\xff" * 8, b"\x00" * 8, b"\x7f" + b"\xff" * 7, draw.randbytes(8)))
        elif kind == 4:
            other = draw.choice(others)
            start = draw.randrange(len(other) + 1)
            spoilt[at : at + draw.choice((0, 32))] = other[start : start + draw.choice((8, 64, 512))]
        elif kind == 5:
            spoilt[at:at] = spoilt[at : at + draw.choice((4, 64))] * draw.choice((2, 50))
        else:
            digits = [i for i, byte in enumerate(spoilt) if 48 <= byte <= 57]
            if digits:
                where = draw.choice(digits)
                spoilt[where : where + 1] = draw.choice((b"-1", b"0", b"99999999999", b"1e400", b"null"))
    return bytes(spoilt[: 4 * 2**20])


def _checkpoints(folder: Path) -> list[tuple[str, bytes]]:
    import torch
    from safetensors.torch import save

    from exporter.model.variants import Architecture
    from exporter.model.weights import _random_state

    state = _random_state(Architecture(depths=(1, 1, 1, 1), dims=(4, 4, 8, 8)), 0)
    state["head.weight"], state["head.bias"] = state["head.weight"][:4].clone(), state["head.bias"][:4].clone()
    zipped, legacy = io.BytesIO(), io.BytesIO()
    torch.save({"model": state}, zipped)
    torch.save(state, legacy, _use_new_zipfile_serialization=False)
    del folder
    return [("a.safetensors", save(state)), ("a.pth", zipped.getvalue()), ("a.pt", legacy.getvalue())]


def _recipes(folder: Path) -> list[tuple[str, bytes]]:
    from benchmarks import recipes

    del folder
    return [("a.yaml", content) for name, content in recipes.files().items() if name.endswith("tiny_int8.yaml")]


def _sidecars(folder: Path) -> list[tuple[str, bytes]]:
    """A sidecar beside the file that it speaks of."""
    from exporter.recipe import Model, Recipe

    weights = folder / "a.safetensors"
    weights.write_bytes(_checkpoints(folder)[0][1])
    recipe = Recipe(backend="onnxruntime", precision="fp32", model=Model(weights=str(weights)))
    built = build.build(recipe, folder / "made").artifact
    return [(f"made/{built.path.name}.json", artifact.sidecar_path(built.path).read_bytes())]


def _manifests(folder: Path) -> list[tuple[str, bytes]]:
    from PIL import Image

    from exporter.data import calibration, synthetic

    (folder / "images").mkdir()
    for index in range(3):
        Image.fromarray(synthetic.dead_leaves(16, index)).save(folder / "images" / f"{index}.png")
    calibration.write(calibration.freeze(str(folder / "images"), 3, 0), folder / "m.tsv")
    return [("m.tsv", (folder / "m.tsv").read_bytes()), ("m.csv", b"path,label\nimages/0.png,1\nimages/1.png,2\n")]


def _reports(folder: Path) -> list[tuple[str, bytes]]:
    del folder
    lasting = sorted((Path(__file__).parent / "results").glob("*/demo/*int8*.report.json"))
    short = [json.loads(path.read_text()) for path in lasting[:2]]
    for one in short:
        for finding in one["findings"]:
            finding["samples"], finding["launches"] = finding["samples"][:6], finding["launches"][:2]
    return [("a.report.json", json.dumps(one).encode()) for one in short]


def _read_checkpoint(path: Path) -> None:
    from exporter.model import weights

    weights.load(str(path))


def _read_recipe(path: Path) -> None:
    recipe = build.read(path)
    recipe_file.write(recipe, path, build.target_options(recipe.backend))


def _read_sidecar(path: Path) -> None:
    """Sealed again where it can be: what stands in it is looked at, not only that it was changed."""
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
        path.write_bytes(sidecar.encode(msgspec.json.decode(path.read_bytes(), type=sidecar.Sidecar)))
    made = artifact.load(path.with_suffix(""))
    inspect.inspect(made)


def _read_manifest(path: Path) -> None:
    from exporter.data.calibration import open_calibration
    from exporter.data.samples import open_samples

    preprocessing = Preprocessing(size=8, resize=8)
    samples = (
        open_calibration(str(path), preprocessing, 10, 2).samples
        if path.suffix == ".tsv"
        else open_samples(str(path), preprocessing, (), 10)
    )
    for _ in samples.batches(2):
        pass


def _read_report(path: Path) -> None:
    loaded = report.load(path)
    for name in discover.names("exporter.report.formats"):
        text = str(discover.load("exporter.report.formats", name, "RENDER")([loaded]))
        if name == "html" and "<script>alert" in text.lower():
            raise AssertionError("a script in a report")


TARGETS: dict[str, tuple[Callable[[Path], list[tuple[str, bytes]]], Callable[[Path], None]]] = {
    "checkpoint": (_checkpoints, _read_checkpoint),
    "pickle": (fuzz_pickles.seeds, fuzz_pickles.read),
    "recipe": (_recipes, _read_recipe),
    "sidecar": (_sidecars, _read_sidecar),
    "manifest": (_manifests, _read_manifest),
    "report": (_reports, _read_report),
}
_WRITTEN: list[str] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Every file that is opened for writing, and every command that is run; for pickles, everything that is run."""
    if fuzz_pickles.is_run(event, arguments):
        _WRITTEN.append(f"{event} {arguments[:1]}")
    if event == "open" and isinstance(arguments[0], str) and isinstance(arguments[2], int):
        if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            _WRITTEN.append(arguments[0])
    elif event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn"):
        _WRITTEN.append(event)


def work(name: str, folder: Path, seconds: float, seed: int, line: Any, most: float) -> None:
    """Spoil and read files of one kind, until the time is up or so many were read; the counts go down the line."""
    seeds, read = TARGETS[name][0](folder), TARGETS[name][1]
    read_sound(folder, seeds, read)
    sys.addaudithook(_watch)
    draw, count, sound = random.Random(seed), 0, 0
    contents = [content for _, content in seeds]
    until = time.monotonic() + seconds
    while time.monotonic() < until and count < most:
        file, content = draw.choice(seeds)
        path = folder / file
        path.write_bytes(spoil(content, contents, draw))
        _WRITTEN.clear()
        what = _fault(read, path)
        if what != "refused":
            sound += 1
        if what not in ("", "refused"):
            line.send(("fault", what, path.read_bytes()))
        count += 1
        if count % 50 == 0:
            line.send(("count", count, sound))
    line.send(("count", count, sound))
    line.send(("done", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, 0))


def read_sound(folder: Path, seeds: list[tuple[str, bytes]], read: Callable[[Path], None]) -> None:
    """The files as they are must be read, or the fuzzer would only ever see refusals."""
    for file, content in seeds:
        (folder / file).write_bytes(content)
        read(folder / file)


def _fault(read: Callable[[Path], None], path: Path) -> str:
    """ "" for a file that was read, "refused" for one that was refused as it should be, else what is wrong."""
    try:
        read(path)
    except ExporterError as error:
        return "refused" if str(error) else "an error without words"
    except BaseException as error:  # noqa: BLE001  (that is what is looked for)
        return f"{type(error).__name__}: {error}"[:300]
    if odd := [one for one in _WRITTEN if not one.startswith(("/dev/", str(path.parent.parent)))]:
        return f"wrote or ran {odd[0]}"
    return ""


def fuzz(
    seconds: float,
    kept: Path,
    seed: int = 0,
    names: tuple[str, ...] = tuple(TARGETS),
    most: Mapping[str, int] | None = None,
) -> Result:
    """Fuzz every target for its share of the seconds, or for `most` files of its kind; what did harm is kept in a
    folder."""
    read, sound, peak = dict.fromkeys(names, 0), dict.fromkeys(names, 0), 0
    faults: list[Fault] = []
    began = time.monotonic()
    for name in names:
        for event in _events(name, seconds / len(names), seed, (most or {}).get(name, math.inf)):
            if event[0] == "count":
                read[name], sound[name] = event[1], event[2]
            elif event[0] == "done":
                peak = max(peak, event[1])
            else:
                file = kept / f"{name}-{len(faults)}"
                write_file(file, event[2])
                faults.append(Fault(target=name, what=event[1], file=file.name))
        print(f"{name}: {read[name]:,} files, {len(faults)} faults so far", file=sys.stderr, flush=True)
    if peak > MOST_BYTES:
        faults.append(Fault(target="all", what=f"{peak} bytes of memory", file=""))
    return Result(
        seconds=time.monotonic() - began, read=read, sound=sound, peak_bytes=peak, faults=tuple(faults),
        environment=environment(),
    )  # fmt: skip


def _events(name: str, seconds: float, seed: int, most: float) -> Iterator[tuple[Any, ...]]:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="convnext-export-fuzz-") as folder:
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(name, Path(folder), seconds, seed, theirs, most))
        process.start()
        theirs.close()
        with contextlib.suppress(EOFError):
            while True:
                yield ours.recv()
        process.join()
        if process.exitcode != 0:
            last = max(Path(folder).rglob("*.*"), key=lambda path: path.stat().st_mtime_ns)
            yield "fault", f"its process ended with {process.exitcode}", last.read_bytes()


def main() -> None:
    """Fuzz and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=tuple(TARGETS), action="append", help="one kind of file; may be given again")
    parser.add_argument("-o", type=Path, default=Path("build/fuzz.json"))
    arguments = parser.parse_args()
    result = fuzz(60 * arguments.minutes, arguments.o.with_suffix(""), arguments.seed, tuple(arguments.only or TARGETS))
    write_file(arguments.o, msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    print(result.table())
    for fault in result.faults:
        print(f"{fault.target}: {fault.what} ({fault.file})")
    if result.faults:
        sys.exit(1)


if __name__ == "__main__":
    main()
