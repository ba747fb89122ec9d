"""How servers run a TensorRT engine."""

from __future__ import annotations

from exporter.artifact.sidecar import Sidecar
from exporter.backends import Serving, TritonModel
from exporter.errors import BadRequest


def triton(sidecar: Sidecar) -> TritonModel:
    """The settings in Triton, with the profiles of the engine.

    Raises: BadRequest for an engine of TensorRT-RTX, of which Triton knows nothing, and for one without its weights.
    """
    flavor, name = sidecar.target.get("flavor", "tensorrt"), sidecar.files[0].name
    if flavor != "tensorrt":
        raise BadRequest(
            f"{name}: an engine of {flavor}, and Triton opens those of TensorRT; build it with --flavor tensorrt"
        )
    if sidecar.target.get("strip_weights"):
        raise BadRequest(f"{name}: built without weights, and Triton puts none in; build it without --strip-weights")
    profiles = tuple((least, best, most) for least, best, most in sidecar.target.get("profiles", ()))
    version = sidecar.target.get("version", "")
    remark = f"The engine is of TensorRT {version}: use the release of Triton that has "
    server_options: tuple[str, ...] = ()
    if sidecar.target.get("version_compatible"):
        remark += "this version, or a later one of the same major version."
        server_options = ("--backend-config=tensorrt,version-compatible=true",)
    else:
        remark += "this version."
    return TritonModel("tensorrt", devices=("gpu",), profiles=profiles, remark=remark, server_options=server_options)


SERVING = Serving(title="TensorRT", requirement="tensorrt", triton=triton)
