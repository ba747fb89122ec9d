"""The public key layouts of ConvNeXt weights, and their conversion to the layout of this tool.

The layout of this tool is facebookresearch's, with flat vectors in GRN, `norm_pre` for a norm before the pooling,
`head_layers.N` for what stands between norm and head, and `stage_norms.I` for the norm of a stage's feature map.

A layout is found by its structure: the depthwise convolution of the first block, behind any prefix. What stands in
front of it (`module.`, `backbone.`, `visual.trunk.`) is the prefix; what does not begin with it and is no head belongs
to something else than the network, and is dropped by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from exporter.errors import BadRequest, nearest, some
from exporter.model import children, decoder, find_head, neck
from exporter.model import head as heads
from exporter.model.head import Head
from exporter.model.shapes import block_counts

if TYPE_CHECKING:
    from torch import Tensor

Rules = tuple[tuple[str, str], ...]

_STAGE_BLOCK = r"stages\.(\d+)\.(\d+)\."
_FACEBOOK: Rules = (
    (r"stem\.", r"downsample_layers.0.0."),
    (r"blocks\.", r"stages.0."),
    (r"(downsample_layers|stages|norm|norm_pre|stage_norms|head_layers|heads)\.", r"\1."),
    (r"norm(\d)\.", r"stage_norms.\1."),
)
_TIMM_BLOCK = r"stages[._](\d+)\.blocks\.(\d+)\."
_TIMM: Rules = (
    (r"stem[._]", r"downsample_layers.0."),
    (r"stages[._]0\.downsample\.0\.", r"downsample_layers.0.2."),
    (r"stages[._]0\.downsample\.1\.", r"downsample_layers.0.3."),
    (r"stages[._](\d+)\.downsample\.", r"downsample_layers.\1."),
    (_TIMM_BLOCK + r"conv_dw\.", r"stages.\1.\2.dwconv."),
    (_TIMM_BLOCK + r"mlp\.fc([12])\.", r"stages.\1.\2.pwconv\3."),
    (_TIMM_BLOCK + r"mlp\.grn\.weight$", r"stages.\1.\2.grn.gamma"),
    (_TIMM_BLOCK + r"mlp\.grn\.bias$", r"stages.\1.\2.grn.beta"),
    (_TIMM_BLOCK, r"stages.\1.\2."),
    (r"norm_pre\.", r"norm_pre."),
    (r"head\.norm\.", r"norm."),
)
_TORCHVISION: Rules = (
    (r"features\.0\.", r"downsample_layers.0."),
    (r"features\.(\d+)\.(\d+)\.block\.0\.", r"@stages.\1.\2.dwconv."),
    (r"features\.(\d+)\.(\d+)\.block\.2\.", r"@stages.\1.\2.norm."),
    (r"features\.(\d+)\.(\d+)\.block\.3\.", r"@stages.\1.\2.pwconv1."),
    (r"features\.(\d+)\.(\d+)\.block\.5\.", r"@stages.\1.\2.pwconv2."),
    (r"features\.(\d+)\.(\d+)\.layer_scale$", r"@stages.\1.\2.gamma"),
    (r"features\.(\d+)\.", r"@downsample_layers.\1."),
)
_HF_BLOCK = r"(?:encoder\.)?stages\.(\d+)\.layers\.(\d+)\."
_HUGGINGFACE: Rules = (
    (r"embeddings\.patch_embeddings\.", r"downsample_layers.0.0."),
    (r"embeddings\.layernorm\.", r"downsample_layers.0.1."),
    (_HF_BLOCK + r"layer_scale_parameter$", r"stages.\1.\2.gamma"),
    (_HF_BLOCK + r"layernorm\.", r"stages.\1.\2.norm."),
    (_HF_BLOCK + r"grn\.weight$", r"stages.\1.\2.grn.gamma"),
    (_HF_BLOCK + r"grn\.bias$", r"stages.\1.\2.grn.beta"),
    (_HF_BLOCK, r"stages.\1.\2."),
    (r"(?:encoder\.)?stages\.(\d+)\.downsampling_layer\.", r"downsample_layers.\1."),
    (r"hidden_states_norms\.stage(\d+)\.", r"-stage_norms.\1."),
    (r"layernorm\.", r"norm."),
)
_DINOV3_BLOCK = r"stages\.(\d+)\.layers\.(\d+)\."
_DINOV3: Rules = (
    (r"stages\.(\d+)\.downsample_layers\.", r"downsample_layers.\1."),
    (_DINOV3_BLOCK + r"depthwise_conv\.", r"stages.\1.\2.dwconv."),
    (_DINOV3_BLOCK + r"layer_norm\.", r"stages.\1.\2.norm."),
    (_DINOV3_BLOCK + r"pointwise_conv([12])\.", r"stages.\1.\2.pwconv\3."),
    (_DINOV3_BLOCK + r"gamma$", r"stages.\1.\2.gamma"),
    (r"layer_norm\.", r"norm."),
)
_OPENMMLAB: Rules = (
    (_STAGE_BLOCK + r"depthwise_conv\.", r"stages.\1.\2.dwconv."),
    (_STAGE_BLOCK + r"pointwise_conv([12])\.", r"stages.\1.\2.pwconv\3."),
    *_FACEBOOK[2:],
)
_FCMAE: Rules = (
    (_STAGE_BLOCK + r"dwconv\.", r"stages.\1.\2.dwconv."),
    (_STAGE_BLOCK + r"norm\.ln\.", r"stages.\1.\2.norm."),
    (_STAGE_BLOCK + r"(pwconv[12])\.linear\.", r"stages.\1.\2.\3."),
    (r"downsample_layers\.(\d+)\.(\d+)\.ln\.", r"downsample_layers.\1.\2."),
    (r"(downsample_layers|stages|norm)\.", r"\1."),
)


@dataclass(frozen=True)
class Layout:
    """How a library names the tensors of a ConvNeXt.

    block: the first block's depthwise weight, as an expression.
    rules: names of the network behind the prefix, and ours.
    outer: what the library puts in front of the network itself, outside of which the last norm may stand.
    dropped: names behind the prefix that have no effect on the outputs.
    """

    block: str
    rules: Rules
    outer: str = ""
    dropped: str = r"(?!)"


LAYOUTS: dict[str, Layout] = {
    "huggingface": Layout(r"(?:encoder\.)?stages\.0\.layers\.0\.dwconv\.weight", _HUGGINGFACE),
    "dinov3": Layout(r"stages\.0\.layers\.0\.depthwise_conv\.weight", _DINOV3, outer="model."),
    "torchvision": Layout(r"features\.1\.0\.block\.0\.weight", _TORCHVISION),
    "timm": Layout(r"stages[._]0\.blocks\.0\.conv_dw\.weight", _TIMM),
    "openmmlab": Layout(r"stages\.0\.0\.depthwise_conv\.weight", _OPENMMLAB),
    "fcmae": Layout(r"stages\.0\.0\.dwconv\.kernel", _FCMAE),
    "facebookresearch": Layout(
        r"(?:stages\.0\.0|blocks\.0)\.dwconv\.weight", _FACEBOOK, dropped=r"(norms|projectors)\."
    ),
}
# Copies of a network that training keeps beside it.
COPIES = re.compile(r"(^|[._])(ema|teacher|momentum|target|key|avg|shadow|averaged)([._]|$|_?(encoder|model|network))")


@dataclass(frozen=True)
class Choices:
    """What the user says where weights leave a choice; "" for none.

    prefix: in front of the network's names.
    head: name of the module that is the classifier, several by commas, or `none`.
    head_act: activation between two layers of a head (`head.classifier`).
    norm: kind of the norms that have no bias.
    """

    prefix: str = ""
    head: str = ""
    head_act: heads.Act = ""
    norm: str = ""


@dataclass
class Converted:
    """Weights in the layout of this tool, as views; the layout and prefix they had; the head; notes for the user.

    `modules` are the names of the modules in the file by ours, `others` the prefixes of other networks in it,
    `other_head` is the segmenter whose head is left out, `pool` the pooling in front of the head where the weights show
    it.
    """

    state: dict[str, Tensor]
    layout: str
    prefix: str
    head: Head = field(default_factory=Head)
    modules: dict[str, str] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    other_head: str = ""
    pool: str = ""


def to_ours(tensors: Mapping[str, Tensor], choices: Choices = Choices(), ordered: bool = True) -> Converted:
    """Convert weights to the layout of this tool.

    Args:
        tensors: by the names of the file.
        choices: what the user says.
        ordered: the tensors are in the order in which the modules were defined.

    Raises: BadRequest for weights of no known layout, unexpected names, or a choice that has to be made.
    """
    ordered = ordered and list(tensors) != sorted(tensors)  # else somebody sorted them by name
    numbered = children.named(tensors, any(any(_blocks(layout, tensors)) for layout in LAYOUTS.values()))
    tensors = {numbered.get(key, key): tensor for key, tensor in tensors.items()}
    layout, prefix, others = _recognise(list(tensors), choices.prefix)
    converted = Converted({}, layout, prefix, others=others)
    converted.notes += [f"the network's names begin with {prefix!r}"] if prefix else []
    if others:
        converted.notes.append(f"left out {' and '.join(map(repr, others))}: --prefix takes one of them")
    rest: dict[str, Tensor] = {}
    unknown = []
    for key, tensor in tensors.items():
        name = _name(key, LAYOUTS[layout], prefix)
        if name is None:
            rest[key] = tensor
        elif name in converted.state:
            unknown.append(key)
        else:
            converted.state[name] = _reshape(name, tensor, layout)
            converted.modules[name.rpartition(".")[0]] = key.rpartition(".")[0]
    _sort_norms(converted)
    if choices.head != "none":
        decoder.take(converted, rest)
        neck.take(converted, rest)
    find_head.take(converted, rest, choices, ordered)
    _norm_in_front_of_the_pooling(converted)
    inside: list[str] = []
    outside: list[str] = []
    for key in rest:
        belongs = key.startswith(prefix) and (prefix or _root(key) in _roots(layout))
        (inside if belongs else outside).append(key)
    dropped = [key for key in inside if re.match(LAYOUTS[layout].dropped, key.removeprefix(prefix))]
    unknown += [key for key in inside if key not in dropped]
    if unknown:
        raise BadRequest(f"unexpected keys in {layout} weights: {len(unknown)} ({some(unknown)})")
    converted.notes += _stored_colors({key: rest[key] for key in outside})
    if dropped or outside:
        groups = sorted({_group(key) for key in (*dropped, *outside)})
        converted.notes.append(f"{len(dropped) + len(outside)} tensors are not part of the network: {some(groups, 8)}")
    in_file = {named.rpartition(".")[0]: key.rpartition(".")[0] for key, named in numbered.items()}
    converted.modules = {ours: in_file.get(module, module) for ours, module in converted.modules.items()}
    return converted


def _stored_colors(tensors: Mapping[str, Tensor]) -> list[str]:
    """A note for each mean and standard deviation of colours, which a model may subtract and divide by itself."""
    colors = [
        (key, tensor.flatten().tolist())
        for key, tensor in tensors.items()
        if re.search(r"(^|[._])(?<!running_)(mean|std)$", key) and 1 <= tensor.numel() <= 4
    ]
    return [
        f"the file holds {key} = {','.join(f'{value:g}' for value in values)}; if the model normalizes with it, give "
        f"--{'mean' if key.endswith('mean') else 'std'}, of values from 0 to 1"
        for key, values in colors
    ]


def _recognise(keys: list[str], wanted: str) -> tuple[str, str, tuple[str, ...]]:
    """The layout and prefix of these names, and the prefixes of other networks.

    Raises: BadRequest, with the first names, when they match no layout, or several networks lie beside each other.
    """
    places = [(name, match[1]) for name, layout in LAYOUTS.items() for match in _blocks(layout, keys)]
    prefixes = sorted({prefix for _, prefix in places})
    if not places:
        raise BadRequest(
            f"no ConvNeXt weights: {len(keys)} keys ({some(keys)}), none of the layouts {', '.join(sorted(LAYOUTS))}; "
            "convert the checkpoint or check the file"
        )
    if wanted:
        chosen = [prefix for prefix in prefixes if prefix.rstrip(".") == wanted.rstrip(".")]
        if not chosen:
            raise BadRequest(f"--prefix {wanted}: no network behind it; {nearest(wanted, prefixes)}")
    else:
        chosen = [prefix for prefix in prefixes if not COPIES.search(prefix)] or prefixes
    if len(chosen) > 1:
        names = " or ".join(prefix or "." for prefix in chosen)
        raise BadRequest(f"{len(chosen)} networks lie in these weights; choose one: --prefix {names}")
    layout, prefix = next(place for place in places if place[1] == chosen[0])
    return layout, prefix, tuple(other for other in prefixes if other != prefix)


def _blocks(layout: Layout, keys: Iterable[str]) -> Iterable[re.Match[str]]:
    pattern = re.compile(rf"((?:[^.]+\.)*?){layout.block}")
    return filter(None, map(pattern.fullmatch, keys))


def _name(key: str, layout: Layout, prefix: str) -> str | None:
    """Our name of a tensor of the network, or None."""
    outer = prefix.removesuffix(layout.outer) if layout.outer else prefix
    for front in (prefix, outer):
        if key.startswith(front):
            name = _renamed(key.removeprefix(front), layout.rules)
            if name is not None and (front == prefix or name.startswith("norm.")):
                return name
    return None


def _renamed(key: str, rules: Rules) -> str | None:
    for pattern, ours in rules:
        if re.match(pattern, key):
            return _count(re.sub("^" + pattern, ours, key)).replace(".kernel", ".weight")
    return None


def _count(key: str) -> str:
    """Torchvision counts stages and downsampling in one row: stage s is features[2s+1], downsampling s [2s]. Hugging
    Face counts the norms of stages from 1."""
    if key[:1] not in "@-":
        return key
    kind, index, rest = key[1:].split(".", 2)
    return f"{kind}.{int(index) // 2 if key[0] == '@' else int(index) - 1}.{rest}"


def _reshape(name: str, tensor: Tensor, layout: str) -> Tensor:
    if layout == "fcmae":
        tensor = _dense(name, tensor)
    if name.endswith((".gamma", ".beta")):  # (1, 1, 1, C) and (C, 1, 1) in some layouts
        return tensor.reshape(-1)
    if re.search(r"pwconv[12]\.weight$", name) and tensor.shape[2:] == (1, 1):
        return tensor[:, :, 0, 0]  # a 1×1 convolution in some
    return tensor


def _dense(name: str, tensor: Tensor) -> Tensor:
    """A tensor of FCMAE's sparse convolutions as that of a dense one: kernels (k·k, in, out) or (k·k, C) hold their
    positions column by column, and vectors are (1, C)."""
    positions = tensor.shape[0] if tensor.ndim > 1 and ".kernel" not in name else 0
    if (
        tensor.ndim in (2, 3)
        and name.endswith(("dwconv.weight", ".1.weight"))
        and round(positions**0.5) ** 2 != positions
    ):
        raise BadRequest(f"a sparse kernel of {positions} positions at {name}: expected a square")
    if tensor.ndim == 3:
        side = round(tensor.shape[0] ** 0.5)
        return tensor.permute(2, 1, 0).reshape(tensor.shape[2], tensor.shape[1], side, side).transpose(3, 2)
    if name.endswith("dwconv.weight") and tensor.ndim == 2:
        side = round(tensor.shape[0] ** 0.5)
        return tensor.permute(1, 0).reshape(tensor.shape[1], 1, side, side).transpose(3, 2)
    return tensor.reshape(-1) if name.endswith(".bias") else tensor


def _sort_norms(converted: Converted) -> None:
    """A norm of the last stage alone is the last norm: OpenMMLab's classifiers call it `norm3`."""
    if converted.layout != "openmmlab":
        return
    state, stages = converted.state, len(block_counts(converted.state))
    norms = {key.split(".")[1] for key in state if key.startswith("stage_norms.")}
    if norms == {str(stages - 1)} and "norm.weight" not in state:
        for leaf in ("weight", "bias"):
            if (norm := state.pop(f"stage_norms.{stages - 1}.{leaf}", None)) is not None:
                state[f"norm.{leaf}"] = norm
        converted.modules["norm"] = converted.modules.pop(f"stage_norms.{stages - 1}")


def _norm_in_front_of_the_pooling(converted: Converted) -> None:
    """A classifier behind a backbone that normalizes its maps takes the last of these."""
    state = converted.state
    stage_norm = f"stage_norms.{len(block_counts(state)) - 1}"
    has_other = any(key.startswith(("norm.", "norm_pre.", "decode_head.", "neck.")) for key in state)
    if converted.head.state and not has_other and f"{stage_norm}.weight" in state:
        state |= {f"norm_pre.{leaf}": state[f"{stage_norm}.{leaf}"] for leaf in ("weight", "bias")}
        converted.modules["norm_pre"] = converted.modules[stage_norm]
        converted.notes.append("the norm of the last stage's map is in front of the pooling")


def _roots(layout: str) -> set[str]:
    """First words of a layout's names."""
    patterns = [pattern.partition(r"\.")[0] for pattern, _ in LAYOUTS[layout].rules]
    return {word for pattern in patterns for word in re.findall("[a-z]+", pattern)} | {"features", *heads.CLASSIFIERS}


def _root(key: str) -> str:
    return re.split(r"[^a-z]", key)[0]


def _group(key: str) -> str:
    """The first two words of a name: `optimizer.state`, `decode_head.conv_seg`."""
    return ".".join(key.split(".")[:2]).removesuffix(".weight").removesuffix(".bias")
