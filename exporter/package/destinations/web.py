"""A page that runs the artifact in the browser, as a folder of static files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from exporter import backends
from exporter.data.masks import colors
from exporter.errors import BadRequest
from exporter.machine import may_begin_with_columns
from exporter.package import folder, npm
from exporter.package.contents import Contents
from exporter.package.destinations import Destination, DestinationOptions
from exporter.package.rendering import TEMPLATES, render

STATIC = ("page.js", "worker.js", "pixels.js", "style.css")
WRITTEN = ("index.html", "serve.py", "README.md")
KINDS = ("classes", "multilabel", "values", "pixel_classes")
CHANNELS = (1, 3)
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
MOST_BYTES = 1 << 31  # of a model in one message of protobuf, which WebAssembly has in memory twice


def check(contents: Contents, options: DestinationOptions) -> None:
    """Raises: BadRequest for an artifact that a browser does not run, or whose outputs a page does not show."""
    del options
    for problem in (_of_runtime(contents), _of_files(contents), _of_outputs(contents), _of_pixels(contents)):
        if problem:
            raise BadRequest(f"{contents.artifact.path}: {problem}")


def _of_runtime(contents: Contents) -> str:
    web = contents.serving.web
    if web is None:
        able = {name: backends.runtime(name).serving for name in backends.targets()}
        names = [name for name, serving in able.items() if serving is not None and serving.web is not None]
        titles = " or ".join(serving.title for name in names if (serving := able[name]) is not None)
        commands = " or ".join(f"convnext-export {backends.target(name).command}" for name in names)
        return f"built for {contents.serving.title}, and browsers run artifacts for {titles}; build it with {commands}"
    precision = contents.artifact.sidecar.precision
    if precision not in web.precisions:
        expected = " or ".join(web.precisions)
        return f"{precision}, and browsers run {expected}; package the artifact in {expected}"
    return ""


def _of_files(contents: Contents) -> str:
    files = contents.artifact.files
    if len(files) > 1 or contents.artifact.sidecar.bytes >= MOST_BYTES:
        size = contents.artifact.sidecar.bytes
        return (
            f"{len(files)} files with {size:,} bytes, and a browser opens one file below {MOST_BYTES:,} bytes; "
            "use a smaller variant"
        )
    return ""


def _of_outputs(contents: Contents) -> str:
    kinds = [output.kind for output in contents.outputs]
    if len(kinds) > 1 or kinds[0] not in KINDS:
        shown = " and ".join(dict.fromkeys(kinds))
        return f"it returns {shown}, and a page shows one of {', '.join(KINDS)}; use --for python"
    if contents.input.dtype not in ("float32", "uint8"):
        return f"an input of {contents.input.dtype}, and a page gives float32 or uint8; build it without --io fp16"
    if kinds == ["pixel_classes"]:
        return ""
    dtypes = {tensor.dtype for tensor in contents.tensors}
    if dtypes != {"float32"}:
        return f"outputs of {', '.join(sorted(dtypes))}, and a page takes float32; export it with float32 outputs"
    return ""


def _of_pixels(contents: Contents) -> str:
    channels = contents.preprocessing.channels
    if channels not in CHANNELS:
        return f"{channels} channels, and pictures in a browser have 1 or 3; use --for python"
    suffix = Path(contents.sample.name).suffix
    if suffix not in PICTURES:
        return f"a sample that ends in {suffix}, and browsers read {', '.join(PICTURES)}; give another --sample"
    return ""


def write(contents: Contents, options: DestinationOptions, out: Path) -> None:
    """Write the page, the artifact, and the runtime for browsers."""
    del options
    web = contents.serving.web
    assert web is not None
    dist = npm.folder_of(web)
    for name in web.files:
        folder.copy(dist / name, out / "runtime" / name)
    for file in contents.artifact.files:  # without the sidecar, which names folders of this machine
        folder.copy(file, out / file.name)
    for name in STATIC:
        folder.copy(TEMPLATES / "web" / name, out / name)
    for name in WRITTEN:
        folder.write(out / name, render(f"web/{name}", contents, web=web))
    folder.write(out / "model.json", json.dumps(_facts(contents), indent=1, ensure_ascii=False) + "\n")


def _facts(contents: Contents) -> dict[str, Any]:
    """Facts of the model for the page. The size of images is that of the preprocessing, also where any is taken."""
    expected, preprocessing = contents.expected, msgspec.to_builtins(contents.preprocessing)
    return {
        "file": contents.artifact.path.name,
        "input": {
            "name": contents.input.name,
            "dtype": contents.input.dtype,
            "shape": [contents.batch or 1, *contents.sides],
        },
        "output": {
            "name": contents.outputs[0].name,
            "kind": contents.outputs[0].kind,
            "holds": contents.outputs[0].holds,
        },
        "preprocessing": preprocessing | {"may_begin_with_columns": may_begin_with_columns()},
        "labels": contents.labels,
        "colors": colors()[: contents.classes].tolist() if contents.has_masks else None,
        "top": contents.top,
        "cut": contents.cut,
        "sample": contents.sample.name,
        "expected": None if expected is None else [array[0].tolist() for array in expected],
        "limit": contents.limit,
    }


DESTINATION = Destination(
    name="web",
    summary="a page that runs the artifact in the browser",
    check=check,
    write=write,
    selftest="web/selftest.py",
    segment_answers=("labels",),
)
