"""Each peer's artifact, made as its users would make it, in an environment of its own: their versions clash."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxsim
import torch
from safetensors.torch import save_file

from benchmarks.peers import ROOT
from exporter.artifact import Artifact
from exporter.artifact.disk import write_file
from exporter.bench import Plan, worker
from exporter.build import build, resolve
from exporter.build.int8.work import prepare
from exporter.model import weights
from exporter.recipe import Export, Model, Quantization, Recipe

HERE = Path(__file__).parent
ENVIRONMENTS = {"optimum-onnx": "optimum-onnx", "optimum-intel": "optimum-intel", "nncf": "optimum-intel"}
TOLD = ("optimum", "optimum-onnx", "optimum-intel", "transformers", "nncf", "openvino", "onnxruntime", "torch")
CALIBRATION = 16  # the speed of NNCF's default is compared, not its accuracy
Maker = Callable[[Path, Artifact], Path]


class Cannot(Exception):
    """A peer cannot make its artifact; the message is its own."""


def run(*words: str | Path) -> None:
    """Run a command of a peer's.

    Raises: Cannot with the last line of what it said.
    """
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, env=quiet, check=False)
    if done.returncode:
        raise Cannot([f"exit code {done.returncode}", *done.stderr.strip().splitlines()][-1][:300])


def environment(name: str) -> Path:
    """The folder of a peer's programs, made once."""
    stamp, requirements = _stamp(name), HERE / f"{name}.txt"
    folder, programs = stamp.parent, stamp.parent / "bin"
    if not stamp.exists() or stamp.read_text() != requirements.read_text():
        print(f"installing {name}", file=sys.stderr, flush=True)
        venv.create(folder, with_pip=True, clear=True)
        run(programs / "python", "-m", "pip", "install", "--quiet", "-r", requirements)
        try:
            run(programs / "python", "-c", "import torchvision")
        except Cannot:  # one that does not fit this torch; images are not transformed here
            run(programs / "python", "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision")
        stamp.write_text(requirements.read_text())
    return programs.absolute()


def _stamp(name: str) -> Path:
    """The file with the requirements that a peer's environment was installed from."""
    return Path(ROOT) / f"env-{name}" / "installed.txt"


def versions(name: str) -> dict[str, str]:
    """Versions of the packages that the report names; {} if the environment was not made yet."""
    if not _stamp(name).exists():
        return {}
    script = "from importlib.metadata import distributions as d; print(*(f'{x.name}={x.version}' for x in d()))"
    done = subprocess.run([environment(name) / "python", "-c", script], capture_output=True, text=True, check=True)
    found = dict(word.split("=", 1) for word in done.stdout.split())
    return {tool: found[tool] for tool in TOLD if tool in found}


def plain(folder: Path, ours: Artifact) -> Path:
    """`torch.onnx.export`, for the one shape that is run."""
    path = folder / "plain.onnx"
    if not path.exists():
        model, images = weights.reload(ours).model(), torch.from_numpy(inputs(ours, batch(folder))[0])
        torch.onnx.export(model, (images,), folder / "plain.new", dynamo=True, verbose=False, external_data=False)
        (folder / "plain.new").replace(path)
    return path


def simplified(folder: Path, ours: Artifact) -> Path:
    """That, through onnxsim."""
    path = folder / "onnxsim.onnx"
    if not path.exists():
        model, _ = onnxsim.simplify(onnx.load(plain(folder, ours)))
        write_file(path, model.SerializeToString())
    return path


def checkpoint(folder: Path, ours: Artifact) -> Path:
    """Our weights as optimum takes them."""
    made = folder / "huggingface"
    if not (made / "config.json").exists():
        state = {key: tensor.contiguous() for key, tensor in weights.reload(ours).state.items()}
        save_file(state, folder / "weights.safetensors")
        converter = HERE / "huggingface.py"
        run(environment("optimum-onnx") / "python", converter, folder / "weights.safetensors", made)
        (folder / "weights.safetensors").unlink()
    return made


def optimum_onnx(folder: Path, ours: Artifact) -> Path:
    """`optimum-cli export onnx`."""
    return _optimum(folder, ours, "onnx", "model.onnx")


def optimum_intel(folder: Path, ours: Artifact) -> Path:
    """`optimum-cli export openvino`, its weights as they are."""
    return _optimum(folder, ours, "openvino", "openvino_model.xml", "--weight-format", "fp32")


def _optimum(folder: Path, ours: Artifact, kind: str, name: str, *options: str) -> Path:
    out = folder / f"optimum-{kind}"
    if not (out / name).exists():
        program = environment("optimum-onnx" if kind == "onnx" else "optimum-intel") / "optimum-cli"
        model = checkpoint(folder, ours)
        run(program, "export", kind, "--model", model, "--task", "image-classification", *options, out)
    return out / name


def nncf(folder: Path, ours: Artifact) -> Path:
    """`nncf.quantize` with its defaults, of the plain export."""
    path = folder / "nncf.xml"
    if not path.with_suffix(".bin").exists():
        np.save(folder / "calibration.npy", inputs(ours, batch(folder), CALIBRATION // batch(folder)))
        script = HERE / "nncf_default.py"
        program = environment("optimum-intel") / "python"
        run(program, script, plain(folder, ours), folder / "calibration.npy", path)
    return path


def ort_static(folder: Path, ours: Artifact) -> Path:
    """`onnxruntime.quantization.quantize_static` with its defaults, of the plain export."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Images(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            name = onnx.load(plain(folder, ours), load_external_data=False).graph.input[0].name
            self.left = iter(inputs(ours, batch(folder), CALIBRATION // batch(folder)))
            self.name = name

        def get_next(self) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]] | None:
            images = next(self.left, None)
            return None if images is None else {self.name: images}

    path = folder / "ort-static.onnx"
    if not path.exists():
        quantize_static(plain(folder, ours), folder / "ort-static.new", Images())
        (folder / "ort-static.new").replace(path)
    return path


MAKERS: dict[str, Maker] = {
    "plain": plain,
    "onnxsim": simplified,
    "optimum-onnx": optimum_onnx,
    "optimum-intel": optimum_intel,
    "nncf": nncf,
    "ort-static": ort_static,
}


def inputs(ours: Artifact, size: int, count: int = 1) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Batches of preprocessed images, (count, N, 3, H, W)."""
    found = worker.inputs(Plan(arms=(), preprocessing=ours.sidecar.preprocessing, batch=size))
    return np.stack([np.roll(found[turn % len(found)], turn, axis=-1) for turn in range(count)])


def batch(folder: Path) -> int:
    """The batch size that a folder is for."""
    return int(folder.name.rpartition("-b")[2])


def ours(folder: Path, variant: str) -> dict[tuple[str, str], Artifact]:
    """Our own artifacts, by runtime and precision, built for the batch size as `--batch` does."""
    model, export = Model(variant=variant, weights="random:0"), Export(batch=batch(folder))
    out = folder / "ours"
    artifacts = {}
    for backend, precision in (("onnxruntime", "fp32"), ("openvino", "fp32"), ("openvino", "bf16")):
        recipe = Recipe(backend=backend, precision=precision, model=model, export=export)
        artifacts[backend, precision] = build(recipe, out).artifact
    for backend in ("onnxruntime", "openvino"):
        quantization = Quantization(calib_size=CALIBRATION)
        recipe = Recipe(backend=backend, precision="int8", model=model, export=export, quantization=quantization)
        with tempfile.TemporaryDirectory() as temporary:
            artifacts[backend, "int8"] = prepare(resolve(recipe, out), Path(temporary)).make((), out)
    return artifacts
