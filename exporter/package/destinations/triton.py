"""A model repository of Triton Inference Server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from exporter.artifact.sidecar import Tensor
from exporter.backends import TritonModel
from exporter.errors import BadRequest
from exporter.package import folder
from exporter.package.contents import Contents
from exporter.package.destinations import Destination, DestinationOptions
from exporter.package.protocol import DATATYPES
from exporter.package.rendering import render
from exporter.recipe.fields import about

MAX_BATCH = 16
WORDS = {"cpu": "KIND_CPU", "gpu": "KIND_GPU"}
Count = Annotated[int, msgspec.Meta(ge=1)]


class TritonOptions(DestinationOptions, frozen=True):
    """Options of a model repository."""

    max_batch: Annotated[
        Count | None,
        about(
            "Largest batch that Triton puts together, for an artifact of any batch size.",
            metavar="N",
            default="16; an engine's is that of its profiles",
        ),
    ] = None
    instances: Annotated[Count, about("Instances of the model that run at once.", metavar="N")] = 1
    on: Annotated[
        Literal["cpu", "gpu"] | None,
        about("Where they run.", default="gpu for engines, else cpu"),
    ] = None
    ensemble: Annotated[
        bool,
        about("Add models that take the bytes of image files, with the preprocessing in Triton's Python backend."),
    ] = False


def check(contents: Contents, options: DestinationOptions) -> None:
    """Raises: BadRequest for an artifact that Triton does not run, and for options that do not fit it."""
    model = _model(contents)
    assert isinstance(options, TritonOptions)
    if options.on is not None and options.on not in model.devices:
        raise BadRequest(f"--on {options.on}: Triton runs {contents.serving.title} on the {' or '.join(model.devices)}")
    if options.max_batch is not None and (contents.batch is not None or not model.batches or model.profiles):
        reason = (
            f"has a fixed batch of {contents.batch}" if contents.batch is not None
            else "has the batch sizes of its profiles" if model.profiles
            else f"is for {contents.serving.title}, for which Triton puts no requests together"
        )  # fmt: skip
        raise BadRequest(f"--max-batch {options.max_batch}: {contents.artifact.path} {reason}; leave it out")
    least = min((profile[0] for profile in model.profiles), default=1)
    if contents.batch is None and least > 1:
        raise BadRequest(
            f"{contents.artifact.path}: its profiles begin at {least} images, and Triton sends single ones; build it "
            "with --min-batch 1"
        )
    most = 0
    for smallest, _, largest in sorted(model.profiles):
        if contents.batch is None and most and smallest > most + 1:
            raise BadRequest(
                f"{contents.artifact.path}: none of its profiles has {most + 1} images, and Triton puts any number of "
                "requests together; build it with profiles without a gap"
            )
        most = max(most, largest)
    if options.ensemble and (contents.batch or 1) > 1:
        raise BadRequest(f"--ensemble: {contents.artifact.path} has a fixed batch of {contents.batch}; leave it out")


def _model(contents: Contents) -> TritonModel:
    if contents.serving.triton is None:
        raise BadRequest(f"{contents.artifact.path}: Triton does not run {contents.serving.title} artifacts")
    return contents.serving.triton(contents.artifact.sidecar)


def write(contents: Contents, options: DestinationOptions, out: Path) -> None:
    """Write the repository, a client and the README."""
    assert isinstance(options, TritonOptions)
    model, name = _model(contents), contents.name
    config = configuration(contents, model, options)
    repository = out / "models" / name
    for file in contents.files:
        folder.copy(file, repository / "1" / file.name)
    folder.write(repository / "config.pbtxt", text(config))
    if contents.labels:
        folder.copy(out / "labels.txt", repository / "labels.txt")
    if options.ensemble:
        _write_ensemble(contents, config, out / "models")
    client = "bytes_client.py" if options.ensemble else "client.py"
    served = f"{name}_pipeline" if options.ensemble else name
    facts = {"model": served, "program": "client", "port": 8000, "sends_files": options.ensemble}
    facts |= {"has_row_axis": config["max_batch_size"] > 0}  # each file in a row of its own
    folder.write(out / "client.py", render(client, contents, **facts))
    decodes = contents.has_masks or not options.ensemble
    folder.write(out / "requirements.txt", "numpy>=1.26\n" + ("Pillow>=10.3\n" if decodes else ""))
    server_options = "".join(f" {option}" for option in model.server_options)
    facts = {"triton": model, "config": config, "options": options, "server_options": server_options}
    folder.write(out / "README.md", render("triton.md", contents, **facts))


def _dims(tensor: Tensor, batched: bool) -> list[int]:
    """A shape as Triton has it: without the batch where it puts requests together; -1 for a dynamic axis."""
    shape = tensor.shape[1:] if batched else tensor.shape
    return [side if isinstance(side, int) else -1 for side in shape]


def configuration(contents: Contents, model: TritonModel, options: TritonOptions) -> dict[str, Any]:
    """The configuration of the model (`ModelConfig` of Triton's `model_config.proto`)."""
    batched = contents.batch is None and model.batches
    most = max((profile[2] for profile in model.profiles), default=options.max_batch or MAX_BATCH)
    outputs = [_described(tensor, batched) for tensor in contents.tensors]
    if contents.outputs[0].kind == "classes" and contents.labels:
        outputs[0]["label_filename"] = "labels.txt"
    group: dict[str, Any] = {"count": options.instances, "kind": Word(WORDS[options.on or model.devices[0]])}
    if len(model.profiles) > 1:
        group["profile"] = [str(number) for number in range(len(model.profiles))]
    best = sorted({profile[1] for profile in model.profiles if profile[1] > 1})
    config: dict[str, Any] = {
        "name": contents.name,
        "backend": model.backend,
        "default_model_filename": contents.artifact.path.name,
        "max_batch_size": most if batched else 0,
        "input": [_described(contents.input, batched)],
        "output": outputs,
        "instance_group": [group],
    }
    if batched and most > 1:
        config["dynamic_batching"] = {"preferred_batch_size": best} if best else {}
    if model.parameters:
        config["parameters"] = [
            {"key": key, "value": {"string_value": value}} for key, value in sorted(model.parameters.items())
        ]
    return config | {"model_warmup": [_warmup(contents, batched)]}


def _described(tensor: Tensor, batched: bool) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "data_type": Word(f"TYPE_{DATATYPES[tensor.dtype]}"),
        "dims": _dims(tensor, batched),
    }


def _warmup(contents: Contents, batched: bool) -> dict[str, Any]:
    """One request before the model is ready, of an input of zeros."""
    height, width, channels = (
        contents.preprocessing.height,
        contents.preprocessing.width,
        contents.preprocessing.channels,
    )
    sides = [height, width, channels] if contents.preprocessing.layout == "NHWC" else [channels, height, width]
    value = {
        "data_type": Word(f"TYPE_{DATATYPES[contents.input.dtype]}"),
        "dims": sides if batched else [contents.batch or 1, *sides],
        "zero_data": True,
    }
    return {"name": "zeros", "batch_size": 1, "inputs": {"key": contents.input.name, "value": value}}


def _write_ensemble(contents: Contents, config: dict[str, Any], models: Path) -> None:
    """Write a model that decodes and preprocesses images in Triton's Python backend, and the chain of both."""
    batch, name, tensor = config["max_batch_size"], contents.name, contents.input.name
    files = {"name": "image", "data_type": Word("TYPE_STRING"), "dims": [1] if batch or contents.batch else [-1]}
    inputs = [{key: config["input"][0][key] for key in ("name", "data_type", "dims")}]
    preprocess = {
        "name": f"{name}_preprocess",
        "backend": "python",
        "max_batch_size": batch,
        "input": [files],
        "output": inputs,
        "instance_group": [{"count": 1, "kind": Word("KIND_CPU")}],
    }
    steps = [
        {
            "model_name": f"{name}_preprocess",
            "model_version": -1,
            "input_map": {"key": "image", "value": "image"},
            "output_map": {"key": tensor, "value": "preprocessed"},
        },
        {
            "model_name": name,
            "model_version": -1,
            "input_map": {"key": tensor, "value": "preprocessed"},
            "output_map": [{"key": output["name"], "value": output["name"]} for output in config["output"]],
        },
    ]
    pipeline = {
        "name": f"{name}_pipeline",
        "platform": "ensemble",
        "max_batch_size": batch,
        "input": [files],
        "output": config["output"],
        "ensemble_scheduling": {"step": steps},
    }
    folder.write(models / f"{name}_preprocess" / "config.pbtxt", text(preprocess))
    program = render("triton_model.py", contents, program="model")
    folder.write(models / f"{name}_preprocess" / "1" / "model.py", program)
    folder.write(models / f"{name}_pipeline" / "config.pbtxt", text(pipeline))
    (models / f"{name}_pipeline" / "1").mkdir()  # Triton wants a version, and git forgets a folder that is empty
    folder.write(
        models / f"{name}_pipeline" / "1" / "README", "An ensemble has no file: the steps are in config.pbtxt.\n"
    )
    if contents.labels and "label_filename" in config["output"][0]:
        folder.copy(models / name / "labels.txt", models / f"{name}_pipeline" / "labels.txt")


class Word(str):
    """A value of an enumeration, which is written without quotes."""


def text(message: dict[str, Any], indent: str = "") -> str:
    """A message of protobuf in its text format."""
    return "".join(_field(key, value, indent) for key, value in message.items())


def _field(key: str, value: Any, indent: str) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "".join(_field(key, one, indent) for one in value)
    if isinstance(value, dict):
        inner = text(value, f"{indent}  ")
        return f"{indent}{key} {{\n{inner}{indent}}}\n"
    return f"{indent}{key}: {_scalar(value)}\n"


def _scalar(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_scalar, value))}]"
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, (Word, int)) else json.dumps(value, ensure_ascii=False)


DESTINATION = Destination(
    name="triton",
    summary="a model repository of Triton Inference Server",
    check=check,
    write=write,
    options=TritonOptions,
    exact=lambda contents: _model(contents).exact,
    segment_answers=("labels", "logits"),
)
