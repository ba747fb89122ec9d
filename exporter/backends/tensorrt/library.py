"""TensorRT 10, TensorRT 11 and TensorRT-RTX: which of them is here, and what each can be asked for."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from exporter.backends import TargetOptions
from exporter.errors import BadRequest, Unavailable, first_line
from exporter.recipe.fields import about

Flavor = Literal["tensorrt", "tensorrt-rtx"]
MODULES: dict[str, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
Side = Annotated[int, Meta(ge=32)]
LOWEST = {"bf16": "8.0", "fp8": "8.9"}  # compute capability that has the arithmetic
OS = {"linux": "linux", "win32": "windows"}.get(sys.platform, sys.platform)


class Profile(msgspec.Struct, frozen=True, array_like=True):
    """The batch sizes of an optimization profile: it runs `least` to `most`, and is tuned for `best`."""

    least: Annotated[
        int,
        about("Smallest batch of a profile; may be repeated.", option="min-batch", metavar="N", default="1"),
    ]
    best: Annotated[
        int, about("Batch that a profile is tuned for.", option="opt-batch", metavar="N", default="the smallest")
    ]
    most: Annotated[
        int,
        about("Largest batch of a profile.", option="max-batch", metavar="N", default="16, or the tuned one if larger"),
    ]

    @classmethod
    def of(cls, least: int | None, best: int | None, most: int | None) -> Profile:
        """A profile from the options that were given."""
        least = 1 if least is None else least
        best = least if best is None else best
        return cls(least, best, max(16, best) if most is None else most)


class TensorRtOptions(TargetOptions, frozen=True):
    """What an engine is built for. Without `profiles` it is 1 to 16 images, tuned for 1. Height and width, where they
    are dynamic, are the same range in every profile."""

    flavor: Annotated[Flavor | None, about("Library; by default the one that is installed.")] = None
    profiles: tuple[Profile, ...] = ()
    min_size: Annotated[
        Side | None, about("Smallest height and width, with --imgsz dynamic.", metavar="N", default="64")
    ] = None
    opt_size: Annotated[
        Side | None,
        about(
            "Height and width that an engine is tuned for, with --imgsz dynamic.",
            metavar="N",
            default="the size of the preprocessing",
        ),
    ] = None
    max_size: Annotated[
        Side | None,
        about(
            "Largest height and width, with --imgsz dynamic.",
            metavar="N",
            default="512 or twice --opt-size, the larger",
        ),
    ] = None
    compute_capability: Annotated[
        tuple[str, ...],
        about("tensorrt-rtx: GPUs to build for, like 8.9; may be repeated.", metavar="X.Y", default="8.0 and above"),
    ] = ()
    workspace: Annotated[
        Annotated[float, Meta(gt=0)] | None, about("Memory for intermediate results of kernels, in GiB.", metavar="GIB")
    ] = None
    opt_level: Annotated[
        Annotated[int, Meta(ge=0, le=5)] | None,
        about("0 builds fastest, 5 runs fastest.", metavar="N", default="3"),
    ] = None
    timing_cache: Annotated[
        str | None,
        about("tensorrt: times of kernels from earlier builds, read and written.", metavar="FILE", path=True),
    ] = None
    tf32: Annotated[bool, about("Use TF32 for fp32 products: faster, with 10 bits of mantissa.")] = False
    version_compatible: Annotated[bool, about("tensorrt: the engine runs on later versions of TensorRT too.")] = False
    hardware_compat: Annotated[
        Literal["none", "ampere+", "same"], about("tensorrt: the engine runs on other GPUs too, more slowly.")
    ] = "none"
    strip_weights: Annotated[
        bool, about("tensorrt: leave the weights out; they are read from the ONNX file beside the engine.")
    ] = False


@dataclass(frozen=True)
class Library:
    """One of the three, imported."""

    flavor: str
    module: Any

    @property
    def version(self) -> str:
        """As the library gives it, `1.7.1.116`."""
        return str(self.module.__version__)

    @property
    def rtx(self) -> bool:
        """Whether it is TensorRT-RTX, which builds without a GPU and finishes its kernels where it runs."""
        return self.flavor == "tensorrt-rtx"

    def capabilities(self) -> dict[str, Any]:
        """The compute capabilities that it can build for, `8.9` to its name for it; none where it only builds for
        the GPU that it runs on."""
        if not self.rtx:
            return {}
        names = self.module.ComputeCapability.__members__
        return {f"{name[2:-1]}.{name[-1]}": value for name, value in names.items() if name.startswith("SM")}


def here() -> list[str]:
    """The flavors that are installed."""
    return [flavor for flavor, module in MODULES.items() if importlib.util.find_spec(module)]


def find(flavor: str | None = None) -> Library:
    """The flavor that was asked for, or the first that is installed.

    Raises: Unavailable with the line that installs it.
    """
    found = here()
    if flavor is not None and flavor not in found:
        other = f", or use --flavor {found[0]}, which is here" if found else ""
        raise Unavailable(f"{flavor} is not installed; pip install 'convnext-export[{flavor}]'{other}")
    if not found:
        raise Unavailable(
            "no TensorRT is installed; pip install 'convnext-export[tensorrt-rtx]' (builds without a GPU), or "
            "'convnext-export[tensorrt]'"
        )
    return _imported(flavor or found[0])


@cache
def _imported(flavor: str) -> Library:
    try:
        return Library(flavor, importlib.import_module(MODULES[flavor]))
    except (ImportError, OSError) as error:
        raise Unavailable(
            f"{flavor} is installed and does not load ({first_line(error)}); "
            f"pip install --force-reinstall 'convnext-export[{flavor}]'"
        ) from None


def check(library: Library, precision: str, batch: int | None, target: TensorRtOptions) -> None:
    """Refuse what this flavor or the target cannot do, before anything is done.

    Raises: BadRequest.
    """
    _check_profiles(batch, target)
    if target.opt_level is not None and not 0 <= target.opt_level <= 5:
        raise BadRequest(f"--opt-level {target.opt_level}: expected 0 (fastest build) to 5 (fastest engine)")
    if target.workspace is not None and not target.workspace > 0:
        raise BadRequest(f"--workspace {target.workspace:g}: expected GiB above 0")
    _check_capabilities(library, precision, target)
    levels = library.module.HardwareCompatibilityLevel
    if target.hardware_compat == "same" and not library.rtx and not hasattr(levels, "SAME_COMPUTE_CAPABILITY"):
        raise BadRequest(f"--hardware-compat same: TensorRT {library.version} lacks it; install 10.9 or later")
    if target.strip_weights and target.version_compatible:
        raise BadRequest(
            "--strip-weights: an engine for later versions (--version-compatible) runs on a runtime of its own, which "
            "cannot take weights; leave one of them out"
        )
    if library.rtx:
        _check_rtx(target)


def _check_profiles(batch: int | None, target: TensorRtOptions) -> None:
    for profile in target.profiles:
        if not 1 <= profile.least <= profile.best <= profile.most:
            raise BadRequest(
                f"profile of {profile.least}, {profile.best} and {profile.most} images: expected "
                "1 ≤ --min-batch ≤ --opt-batch ≤ --max-batch"
            )
        if batch is not None and (profile.least, profile.best, profile.most) != (batch,) * 3:
            raise BadRequest(
                f"--batch {batch} is fixed, and a profile asks for others; leave --min-batch, --opt-batch and "
                "--max-batch out, or --batch"
            )


def sizes(published: int, target: TensorRtOptions) -> tuple[int, int, int]:
    """Smallest, best and largest height and width of images, in pixels, where they are dynamic; `published` is the size
    of its preprocessing.

    Raises: BadRequest for sizes that are not in this order.
    """
    best = published if target.opt_size is None else target.opt_size
    least = min(64, best) if target.min_size is None else target.min_size
    most = max(512, 2 * best) if target.max_size is None else target.max_size
    if not least <= best <= most:
        raise _not_in_order(least, best, most)
    if not least <= published <= most:
        raise BadRequest(
            f"images of {least} to {most} pixels leave out {published}, the size of the preprocessing; set "
            "--min-size and --max-size around it"
        )
    return least, best, most


def _not_in_order(*pixels: int) -> BadRequest:
    return BadRequest(
        f"images of {', '.join(map(str, pixels))} pixels: expected --min-size ≤ --opt-size ≤ --max-size; give all three"
    )


def check_sizes(imgsz: object, target: TensorRtOptions) -> None:
    """Raises: BadRequest for a range of sizes where the size is fixed."""
    options = [name for name in ("min_size", "opt_size", "max_size") if getattr(target, name) is not None]
    if options and imgsz != "dynamic":
        option = f"--{options[0].replace('_', '-')}"
        raise BadRequest(f"{option}: the size of images is fixed; add --imgsz dynamic, or leave {option} out")
    known = [size for size in (target.min_size, target.opt_size, target.max_size) if size is not None]
    if known != sorted(known):
        raise _not_in_order(*known)


def _check_capabilities(library: Library, precision: str, target: TensorRtOptions) -> None:
    known = library.capabilities()
    for wanted in target.compute_capability:
        if not known:
            raise BadRequest(
                f"--compute-capability {wanted}: TensorRT builds for the GPU that it runs on; leave the option out, "
                "or use --flavor tensorrt-rtx, which builds for others"
            )
        if wanted not in known:
            more = "; --flavor tensorrt builds for it, on such a GPU" if wanted in ("9.0", "10.0", "10.3") else ""
            raise BadRequest(
                f"--compute-capability {wanted}: TensorRT-RTX {library.version} builds for {', '.join(known)}{more}"
            )
        lowest = _lowest(library, precision)
        if _number(wanted) < _number(lowest):
            raise BadRequest(
                f"--compute-capability {wanted}: {library.flavor} has no {precision} below {lowest}; build fp16 or "
                "int8 for it"
            )
    if not known and precision in LOWEST:
        _check_gpu(library, precision)


def default_capabilities(library: Library, precision: str) -> list[str]:
    """The compute capabilities that a plan runs on where none is named: those that TensorRT-RTX builds for and that
    have the arithmetic, without Turing's; or that of the GPU here."""
    if library.rtx:
        lowest = _number(_lowest(library, precision))
        return [one for one in library.capabilities() if one != "7.5" and _number(one) >= lowest]
    import torch

    return ["{}.{}".format(*torch.cuda.get_device_capability())] if torch.cuda.is_available() else []


def _lowest(library: Library, precision: str) -> str:
    """The smallest compute capability that has the arithmetic."""
    return LOWEST.get(precision, "8.0" if library.rtx and precision == "fp32" else "0.0")


def _check_gpu(library: Library, precision: str) -> None:
    """TensorRT builds for the GPU here: it has to have the arithmetic."""
    import torch

    if torch.cuda.is_available():
        here = "{}.{}".format(*torch.cuda.get_device_capability())
        if _number(here) < _number(LOWEST[precision]):
            raise BadRequest(
                f"this GPU has compute capability {here}: {library.flavor} has no {precision} below "
                f"{LOWEST[precision]}; build fp16 or int8"
            )


def _number(capability: str) -> tuple[int, ...]:
    return tuple(map(int, capability.split(".")))


def _check_rtx(target: TensorRtOptions) -> None:
    reasons = {
        "--version-compatible": (target.version_compatible, "its engines run only on the version that built them"),
        "--hardware-compat": (target.hardware_compat != "none", "name the GPUs with --compute-capability instead"),
        "--timing-cache": (target.timing_cache is not None, "its kernels are compiled on the GPU that runs the engine"),
        "--strip-weights": (target.strip_weights, "it needs a GPU to build and to refit such an engine"),
    }
    for option, (asked, why) in reasons.items():
        if asked:
            raise BadRequest(f"{option}: not available in TensorRT-RTX: {why}; leave it out, or use --flavor tensorrt")
