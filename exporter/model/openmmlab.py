"""What the configuration of OpenMMLab in a checkpoint says of the network and of the pixels that it takes.

It is a text of Python, which is parsed and never run.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

import msgspec

from exporter.artifact.sidecar import Preprocessing, as_size
from exporter.errors import BadRequest, first_line
from exporter.model import processors
from exporter.model.processors import RESAMPLING, Read, Unclear
from exporter.model.stated import Keys, Statements, one_of

ORIGIN = "configuration in the checkpoint"
MOST_TEXT = 10**6  # characters
ERRORS = (SyntaxError, ValueError, TypeError, RecursionError, MemoryError)
"""What `literals` raises."""
_DETECTOR = re.compile(r"\b(rpn_head|bbox_head)\b")
_DENSE = re.compile(r"\b(decode_head|rpn_head|bbox_head|panoptic_head|mask_head)\b")
_ACTS = {"gelu": "gelu", "relu": "relu", "silu": "silu", "swish": "silu"}
_BATCH_NORMS = ("BN", "BN2d", "SyncBN", "MMSyncBN")
_LAYER_NORM_EPS = 1e-5  # of torch.nn.LayerNorm, where norm_cfg has none
_BACKBONE: Keys = {
    "act_cfg": ("act", lambda value: one_of(_ACTS)(value["type"])),
    "norm_cfg": ("norm_eps", lambda value: _eps(**value)),
}
# Steps of a test pipeline that move no pixel.
_IDLE_STEPS = {"LoadImageFromFile", "PackInputs", "PackClsInputs", "Normalize", "ImageToTensor", "ToTensor", "Collect"}


def read(text: str, statements: Statements) -> Read | None:
    """Read what weights do not show, and the preprocessing; None where it says nothing of pixels.

    Raises: BadRequest for a network that takes BGR, and for settings that are not supported.
    """
    statements.network["configuration"] = text
    is_dense = _DENSE.search(text) is not None
    _note_unreadable(text, statements)
    _refuse_bgr(text)
    for backbone in _settings(text, "backbone"):
        if isinstance(backbone, dict) and "ConvNeXt" in str(backbone.get("type")):
            _read_backbone(backbone, is_dense, statements)
    values: dict[str, Any] = {
        name: tuple(value / 255 for value in numbers) for name in ("mean", "std") if (numbers := _numbers(text, name))
    }
    unclear: tuple[Unclear, ...] = ()
    base, default = Preprocessing(), "default"
    if "UPerHead" in text:
        base, default = processors.UPERNET, "published preprocessing of UPerNet"
        values |= _read_segmenter(text, statements)
    elif _DETECTOR.search(text):
        base, default = processors.DETECTOR, "published preprocessing of mmdet"
        values |= _detector_size(_test_pipeline(text))
    elif not is_dense and (pipeline := _test_pipeline(text)):
        try:
            values |= _geometry(pipeline, statements)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            reason = f"the test_pipeline in the {ORIGIN} is not followed ({error}); give --resize N --crop-mode "
            unclear = (Unclear(f"{reason}center|squash|border", ("resize", "crop_mode")),)
    elif not values:
        return None
    recipe = processors.checked(**{**msgspec.structs.asdict(base), **values})
    names = ("size", "resize", "crop", "interpolation", "mean", "std")
    return Read(recipe, {name: ORIGIN if name in values else default for name in names}, unclear)


def literals(text: str, key: str) -> list[Any]:
    """The values of every setting with this key: an assignment, an argument of a call, or an entry of a dictionary.

    Raises: one of `ERRORS` for a text that cannot be parsed, and for a value that is no literal.
    """
    return [_literal(value) for value in _expressions(text, key)]


def _expressions(text: str, key: str) -> list[ast.expr]:
    return [value for name, value in _assigned(text) if name == key]


@lru_cache(maxsize=1)
def _assigned(text: str) -> list[tuple[object, ast.expr]]:
    """Every name in a text with the expression of its value; parsed once for all settings that are read.

    Raises: as `literals` does.
    """
    if len(text) > MOST_TEXT:
        raise ValueError(f"it is longer than {MOST_TEXT:,} characters")
    values: list[tuple[object, ast.expr]] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.keyword):
            values += [(node.arg, node.value)]
        elif isinstance(node, ast.Assign):
            values += [(target.id, node.value) for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            values += [(name.value, value) for name, value in pairs if isinstance(name, ast.Constant)]
    return values


def _literal(node: ast.expr) -> Any:
    """The value of an expression of literals, among which `dict(key=value)` counts.

    Raises: ValueError for another expression.
    """
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        return {keyword.arg: _literal(keyword.value) for keyword in node.keywords}
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {ast.literal_eval(key) if key else None: _literal(value) for key, value in pairs}
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(one) for one in node.elts]
    return ast.literal_eval(node)


def _settings(text: str, key: str) -> list[Any]:
    """As `literals`, without the values that cannot be read, which `_note_unreadable` names."""
    values = []
    with suppress(*ERRORS):
        for expression in _expressions(text, key):
            with suppress(*ERRORS):
                values.append(_literal(expression))
    return values


def _note_unreadable(text: str, statements: Statements) -> None:
    """Note a configuration that cannot be parsed, or settings that are no literals."""
    for key in ("backbone", "data_preprocessor", "test_pipeline", "decode_head"):
        try:
            expressions = _expressions(text, key)
        except ERRORS as error:
            statements.notes.append(f"{ORIGIN}: cannot be read ({first_line(error)[:120]})")
            return
        try:
            for expression in expressions:
                _literal(expression)
        except ERRORS as error:
            statements.notes.append(f"{ORIGIN}: {key} cannot be read ({first_line(error)[:120]})")


def _refuse_bgr(text: str) -> None:
    """Raises: BadRequest where images are not turned from BGR, as OpenMMLab reads them, into RGB."""
    says_no = re.search(r"\b(bgr_to_rgb|to_rgb)\s*=\s*False", text)
    silent = any(
        isinstance(one, dict) and _is_color(one.get("mean")) and not {"bgr_to_rgb", "to_rgb"} & one.keys()
        for one in _settings(text, "data_preprocessor")
    )
    if says_no or silent:
        said = "says to_rgb False" if says_no else "has a data_preprocessor without to_rgb, which is False by default"
        raise BadRequest(
            f"the {ORIGIN} {said}: the network takes BGR, which is not supported; reverse the input channels of its "
            "first convolution, and mean and std, and set it to True"
        )


def _is_color(mean: Any) -> bool:
    return isinstance(mean, list) and len(mean) == 3


def _read_backbone(backbone: Mapping[str, Any], is_dense: bool, statements: Statements) -> None:
    """Read the settings of the network. Segmenters and detectors (`is_dense`) take its maps, which are not pooled."""
    if not is_dense and backbone.get("gap_before_final_norm") is False:
        raise statements.refuse("backbone.gap_before_final_norm", False)
    statements.read(backbone, _BACKBONE, "backbone.")
    statements.read(backbone, {"norm_cfg": ("stage_eps", _BACKBONE["norm_cfg"][1])}, "backbone.")


def _eps(type: str, eps: float = _LAYER_NORM_EPS, **more: Any) -> float:
    """The eps of a norm_cfg.

    Raises: ValueError for another norm than LayerNorm.
    """
    if type not in ("LN", "LN2d") or set(more) - {"requires_grad"} or not 0 <= float(eps) < 1:
        raise ValueError
    return float(eps)


def _test_pipeline(text: str) -> list[Any]:
    """The steps from a file to the network, [] where the configuration has none that is a list."""
    loaders = [one for one in _settings(text, "test_dataloader") if isinstance(one, dict)]
    datasets = [one["dataset"] for one in loaders if isinstance(one.get("dataset"), dict)]
    pipelines = [*_settings(text, "test_pipeline"), *(one.get("pipeline") for one in datasets)]
    return next((one for one in pipelines if isinstance(one, list) and one), [])


def _geometry(pipeline: Sequence[Any], statements: Statements) -> dict[str, Any]:
    """Size, resize, crop and interpolation of a test pipeline of mmpretrain.

    Raises: ValueError and others for steps that are not followed.
    """
    values: dict[str, Any] = {}
    for step in pipeline:
        kind = str(step["type"]).rpartition(".")[2]
        if kind in ("Resize", "ResizeEdge") and not values:
            values = _resize(kind, step)
            if step.get("backend", "cv2") != "pillow":
                statements.notes.append(f"{ORIGIN}: images were resized by OpenCV, and here by Pillow")
        elif kind == "CenterCrop" and values and set(step) <= {"type", "crop_size"}:
            values["size"] = _side(step["crop_size"])
        elif kind not in _IDLE_STEPS:
            raise ValueError(kind)
    if values.get("crop") == "squash":
        values.setdefault("size", values["resize"])
    if "size" not in values:
        raise ValueError("it has no CenterCrop" if values else "it has no Resize")
    return values


def _detector_size(pipeline: Sequence[Any]) -> dict[str, Any]:
    """The input size of a test pipeline of mmdet, short and long side, each rounded up to a multiple of 32; {} where it
    has none or several."""
    steps = [step for step in pipeline if isinstance(step, dict)]
    scales = [
        step.get("img_scale", step.get("scale")) for step in steps if step.get("keep_ratio") or "img_scale" in step
    ]
    scale = scales[0] if len(scales) == 1 else None
    if not isinstance(scale, list) or len(scale) != 2 or not all(type(side) is int and side > 0 for side in scale):
        return {}
    short, long = sorted(scale)
    return dict.fromkeys(("size", "resize"), as_size(*(-(-side // 32) * 32 for side in (short, long))))


def _resize(kind: str, step: Mapping[str, Any]) -> dict[str, Any]:
    """Of `ResizeEdge` (the short side), of `Resize` with a number (both sides), and of old ones with (N, -1)."""
    interpolation = step.get("interpolation", "bilinear")
    if interpolation not in RESAMPLING.values() or step.get("keep_ratio") or step.get("edge", "short") != "short":
        raise ValueError(f"{kind} with {dict(step)}")
    scale = step.get("scale", step.get("size"))
    short = kind == "ResizeEdge" or (isinstance(scale, list) and len(scale) == 2 and scale[1] == -1)
    side = _side(scale[0] if short and isinstance(scale, list) else scale)
    return {"resize": side, "crop": "center" if short else "squash", "interpolation": interpolation}


def _side(value: Any) -> int:
    """A side in pixels, from a number or two equal ones.

    Raises: ValueError for others.
    """
    sides = set(value) if isinstance(value, list) else {value}
    side = sides.pop()
    if sides or type(side) is not int or side < 1:
        raise ValueError(f"a size of {value}")
    return side


def _read_segmenter(text: str, statements: Statements) -> dict[str, Any]:
    """State what UPerNet's weights do not show; returns the size in the text, if it has one.

    Raises: BadRequest for layers of the head that are not supported.
    """
    for head in _settings(text, "decode_head"):
        if isinstance(head, dict) and "UPerHead" in str(head.get("type")):
            _check_head(head, statements)
    if re.search(r"\breduce_zero_label['\"]?\s*[=:]\s*True", text):
        statements.notes.append(f"reduce_zero_label is True in the {ORIGIN}: {processors.COUNT_FROM_1}")
    if scales := _numbers(text, "pool_scales"):
        statements.state("pool_scales", tuple(map(int, scales)), "pool_scales", scales, ORIGIN)
    statements.state("align_corners", "align_corners=True" in text.replace(" ", ""), "align_corners", "True", ORIGIN)
    tests = [match[0] for match in re.finditer(r"\btest_cfg\s*=\s*dict\((?:[^()]|\([^()]*\))*\)", text)]
    slides = next((test for test in tests if re.search(r"mode\s*=\s*['\"]slide", test)), "")
    windows = [int(side) for key in ("crop_size", "stride") for side in _numbers(slides, key)]
    if len(windows) == 4 and all(windows):
        statements.state("windows", tuple(windows), "test_cfg", windows, ORIGIN)
    crop = _numbers(text, "crop_size")
    return dict.fromkeys(("size", "resize"), as_size(int(crop[0]), int(crop[-1]))) if crop else {}


def _check_head(head: Mapping[str, Any], statements: Statements) -> None:
    """Raises: BadRequest for other layers than convolutions with a batch norm of the usual eps, and ReLU."""
    act, norm, conv = head.get("act_cfg", {}), head.get("norm_cfg") or {}, head.get("conv_cfg") or {}
    usual = {
        "act_cfg": act is not None and act.get("type", "ReLU") == "ReLU",
        "norm_cfg": norm.get("type", "BN") in _BATCH_NORMS and norm.get("eps", 1e-5) == 1e-5,
        "conv_cfg": conv.get("type", "Conv2d") in ("Conv", "Conv2d"),
    }
    for key, is_usual in usual.items():
        if not is_usual:
            raise statements.refuse(f"decode_head.{key}", head[key])


def _numbers(text: str, key: str) -> tuple[float, ...]:
    """The numbers of the first list or tuple with this key in a Python configuration, () where there is none."""
    match = re.search(rf"\b{key}\s*=\s*[\[(]([\d.,\s]+)[\])]", text)
    return tuple(float(number) for number in re.findall(r"[\d.]+", match[1])) if match else ()
