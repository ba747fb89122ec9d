"""What a configuration states about the network, by the names of timm, transformers and OpenCLIP.

Each key is read, or has no effect on the outputs, or is refused by name; see `Statements`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from exporter.errors import BadRequest, some

Keys = Mapping[str, tuple[str, Callable[[Any], Any]]]
"""For each key the field of the network and the function that reads its value."""


@dataclass
class Statements:
    """The statements of one file.

    file: named in errors; origin: named in `origins`.
    network: values by field; `origins` and `keys` say for each where it stands.
    """

    file: str
    origin: str
    network: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def refuse(self, key: str, value: object, reason: str = "not supported") -> BadRequest:
        """The error for a value that is not followed."""
        return BadRequest(f"{self.file}: {key} is {value!r}; {reason}")

    def state(self, name: str, value: object, key: str, shown: object, origin: str = "") -> None:
        """Add a value.

        Raises: BadRequest when another key states something else.
        """
        said = f"{key} is {shown!r}"
        if name in self.network and self.network[name] != value:
            raise BadRequest(f"{self.file}: {self.keys[name]}, but {said}; correct the one that is wrong")
        self.network.setdefault(name, value)
        self.origins.setdefault(name, origin or self.origin)
        self.keys.setdefault(name, said)

    def read(self, values: Mapping[str, Any], keys: Keys, prefix: str = "") -> None:
        """Read the keys that are there; null is not set.

        Raises: BadRequest for a value that is not supported.
        """
        for key, (name, convert) in keys.items():
            if (value := values.get(key)) is None:
                continue
            try:
                self.state(name, convert(value), prefix + key, value)
            except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
                raise self.refuse(prefix + key, value) from None

    def ignore(self, values: Mapping[str, Any], keys: Mapping[str, tuple[object, ...]], prefix: str = "") -> None:
        """Note the keys without effect that are set to something unusual."""
        for key, usual in keys.items():
            if usual and (value := values.get(key)) is not None and value not in usual:
                self.notes.append(f"{prefix}{key} {value}: has no effect on the outputs")


def one_of(words: Mapping[str, str]) -> Callable[[Any], str]:
    """A reader of words."""
    return lambda value: words[value.lower()]


def _whole(value: Any) -> int:
    if isinstance(value, (list, tuple)) and len(set(value)) == 1:
        value = value[0]
    if isinstance(value, bool) or int(value) != value or value < 0:
        raise ValueError
    return int(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _eps(value: Any) -> float:
    if isinstance(value, bool) or not 0 <= float(value) < 1:
        raise ValueError
    return float(value)


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    return float(value)


def _wholes(value: Any) -> tuple[int, ...]:
    return tuple(_whole(one) for one in value)


def _positive(value: Any) -> int:
    if (number := _whole(value)) < 1:
        raise ValueError
    return number


def _level(name: Any) -> int:
    """The number of a stage, from 0, for its name in transformers: `stage1` and on."""
    return _positive(int(str(name).removeprefix("stage"))) - 1


def _kernels(value: Any) -> tuple[int, ...]:
    """Odd kernel sizes of the four stages."""
    sizes = _wholes(value) if isinstance(value, (list, tuple)) else (_whole(value),) * 4
    if len(sizes) != 4 or any(size % 2 == 0 for size in sizes):
        raise ValueError
    return sizes


def _stride(value: Any) -> int:
    return {8: 8, 16: 16, 32: 32}[value]


_TIMM_ACTS = {name: name for name in ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu")} | {"swish": "silu"}
_TANH = ("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh")
_HF_ACTS = _TIMM_ACTS | {"gelu_python": "gelu"} | dict.fromkeys(_TANH, "gelu_tanh")
del _HF_ACTS["gelu_tanh"]  # no name of transformers
_NORMS = {"layernorm": "layer", "rmsnorm": "rms", "simplenorm": "simple"}
_POOLS = {name: name for name in ("avg", "max", "avgmax", "catavgmax", "none")} | {"": "none", "fast": "avg"}
_POOLS |= {f"fast{name}": name for name in ("avg", "max", "avgmax", "catavgmax")}
_STEMS = {name: name for name in ("patch", "overlap", "overlap_tiered", "overlap_act")}

MODEL_ARGS: Keys = {
    "act_layer": ("act", one_of(_TIMM_ACTS)),
    "conv_bias": ("conv_bias", _flag),
    "depths": ("depths", _wholes),
    "dims": ("dims", _wholes),
    "global_pool": ("pool", one_of(_POOLS)),
    "head_hidden_size": ("head_hidden", lambda value: _whole(value) or None),
    "head_norm_first": ("head_norm_first", _flag),
    "in_chans": ("in_chans", _whole),
    "kernel_sizes": ("kernels", _kernels),
    "ls_init_value": ("layer_scale", lambda value: _number(value) is not None),
    "norm_eps": ("norm_eps", _eps),
    "norm_layer": ("norm", lambda value: _NORMS[value.lower().removesuffix("2d")]),
    "num_classes": ("num_classes", _whole),
    "output_stride": ("output_stride", _stride),
    "patch_size": ("patch", _whole),
    "stem_type": ("stem", one_of(_STEMS)),
    "use_grn": ("grn", _flag),
}
# Keys of `timm.create_model` that change no output, with their usual values; the weights say conv_mlp.
_IDLE_ARGS: dict[str, tuple[object, ...]] = {
    "head_init_scale": (1.0,), "drop_rate": (0.0,), "drop_path_rate": (0.0,), "conv_mlp": (), "device": (), "dtype": (),
    "pretrained": (), "pretrained_cfg": (), "pretrained_strict": (), "checkpoint_path": (), "cache_dir": (),
    "scriptable": (), "exportable": (), "no_jit": (), "features_only": (),
}  # fmt: skip
# What the functions of timm set beyond the defaults of its ConvNeXt, where the weights cannot tell.
_TEST = {"norm_eps": 1e-5, "act_layer": "gelu_tanh"}
_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "convnext_zepto_rms": {"norm_layer": "simplenorm"},
    "convnext_zepto_rms_ols": {"norm_layer": "simplenorm", "stem_type": "overlap_act"},
    "convnext_atto_rms": {"norm_layer": "rmsnorm2d"},
    "convnext_tiny_hnf": {"head_norm_first": True},
    "convnext_xxlarge": {"norm_eps": 1e-5},
    "test_convnext": _TEST,
    "test_convnext2": _TEST,
    "test_convnext3": {**_TEST, "act_layer": "silu", "kernel_sizes": (7, 5, 5, 3)},
}


def read_timm(
    statements: Statements, architecture: str | None, args: Mapping[str, Any], prefix: str = "model_args."
) -> None:
    """Read the arguments of `timm.create_model`: of the file, and those that the architecture's name stands for.

    Raises: BadRequest for an argument that is unknown or not supported.
    """
    for key, value in args.items():
        if value is None or key in MODEL_ARGS or key in _IDLE_ARGS:
            continue
        if key != "out_indices" or list(value) != [0, 1, 2, 3]:
            raise statements.refuse(prefix + key, value)
    statements.read(args, MODEL_ARGS, prefix)
    statements.ignore(args, _IDLE_ARGS, prefix)
    name = (architecture or "").rpartition("/")[2].partition(".")[0]
    if name and "convnext" not in name:
        raise statements.refuse("architecture", architecture, "expected a ConvNeXt")
    own = {key: value for key, value in _ARCHITECTURES.get(name, {}).items() if args.get(key) is None}
    for key, value in own.items():
        target, convert = MODEL_ARGS[key]
        statements.state(target, convert(value), f"architecture {name}: {key}", value)


_HF: Keys = {
    "hidden_act": ("act", one_of(_HF_ACTS)),
    "num_channels": ("in_chans", _whole),
    "hidden_sizes": ("dims", _wholes),
    "depths": ("depths", _wholes),
    "num_labels": ("num_classes", _whole),
}
_PATCH: Keys = {"patch_size": ("patch", _whole)}
HF_TYPES = ("convnext", "convnextv2", "dinov3_convnext")
_IDLE_HF: dict[str, tuple[object, ...]] = {
    "drop_path_rate": (0.0,), "initializer_range": (), "image_size": (), "num_stages": (), "num_hidden_layers": (),
    "stage_names": (), "out_features": (), "out_indices": (), "problem_type": ("single_label_classification",),
    "id2label": (), "label2id": (),
}  # fmt: skip
# What every configuration of transformers has; it concerns loading, text, or training.
_BOOKKEEPING = (
    "_attn_implementation _commit_hash _name_or_path _out_features _out_indices add_cross_attention architectures "
    "attn_implementation bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward "
    "cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype early_stopping "
    "encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id "
    "forced_eos_token_id is_decoder is_encoder_decoder length_penalty max_length min_length model_type name_or_path "
    "no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states "
    "output_scores pad_token_id prefix pruned_heads remove_invalid_values repetition_penalty return_dict "
    "return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss "
    "tie_encoder_decoder tie_last_hidden_states tie_word_embeddings tokenizer_class top_k top_p torch_dtype "
    "torchscript transformers_version typical_p use_bfloat16 use_cache per_layer_config"
)
BOOKKEEPING = frozenset(_BOOKKEEPING.split())


def read_transformers(statements: Statements, config: Mapping[str, Any], prefix: str = "") -> None:
    """Read a configuration of transformers' ConvNext, ConvNextV2 or DINOv3ConvNext, or one without `model_type`.

    Raises: BadRequest for a value that is not supported.
    """
    kind = config.get("model_type")
    statements.read(config, _HF if kind in (None, "dinov3_convnext") else {**_HF, **_PATCH}, prefix)
    eps = config.get("layer_norm_eps")
    if kind is None:
        if eps is not None:
            raise statements.refuse(
                f"{prefix}layer_norm_eps", eps, "whose norms depends on model_type, which is not there; add it"
            )
    elif kind == "dinov3_convnext":
        statements.read(
            {"layer_norm_eps": 1e-6 if eps is None else eps}, {"layer_norm_eps": ("norm_eps", _eps)}, prefix
        )
    else:
        # The norm before the classifier; all others have 1e-6.
        default = {} if eps is not None else {"origin": f"default of {kind}"}
        value = _checked_eps(statements, f"{prefix}layer_norm_eps", 1e-12 if eps is None else eps)
        statements.state("norm_eps", 1e-6, "model_type", kind)
        statements.state("head_eps", value, f"{prefix}layer_norm_eps", value, **default)
        statements.state("grn", kind == "convnextv2", f"{prefix}model_type", kind)
        if config.get("hidden_act") is None:
            statements.state("act", "gelu", f"{prefix}hidden_act", "gelu", f"default of {kind}")
    if kind != "convnextv2" and (scale := config.get("layer_scale_init_value")) is not None:
        has_scale = kind == "dinov3_convnext" or scale > 0
        statements.state("layer_scale", has_scale, f"{prefix}layer_scale_init_value", scale)
    stages, depths = config.get("num_stages"), config.get("depths")
    if stages is not None and depths is not None and stages != len(depths):
        raise statements.refuse(f"{prefix}num_stages", stages, f"but depths has {len(depths)}")
    statements.ignore(config, _IDLE_HF, prefix)
    if config.get("auto_map"):
        raise statements.refuse(f"{prefix}auto_map", config["auto_map"], "code of the repository is not run")
    known = {*_HF, *_PATCH, *_IDLE_HF, *BOOKKEEPING, "layer_norm_eps", "layer_scale_init_value", "auto_map"}
    _note_unknown(statements, config, known, prefix)


def _checked_eps(statements: Statements, key: str, value: Any) -> float:
    try:
        return _eps(value)
    except (TypeError, ValueError):
        raise statements.refuse(key, value) from None


def _note_unknown(statements: Statements, config: Mapping[str, Any], known: Set[str], prefix: str = "") -> None:
    if unknown := sorted(config.keys() - known):
        names = some([prefix + key for key in unknown])
        statements.notes.append(f"{statements.origin}: {names}: no ConvNeXt reads them, so they have no effect")


_TOP: Keys = {
    "num_classes": ("num_classes", _whole),
    "num_labels": ("num_classes", _whole),
    "global_pool": ("pool", one_of(_POOLS)),
}
_TIMM_TOP = {
    *_TOP, "architecture", "num_features", "model_args", "pretrained_cfg", "label_names", "label_descriptions",
    "do_pooling", "initializer_range", "id2label", "label2id", "problem_type",
}  # fmt: skip
_PRETRAINED_CFG = (
    "url file state_dict hf_hub_id hf_hub_filename source architecture tag custom_load input_size test_input_size "
    "min_input_size fixed_input_size interpolation crop_pct test_crop_pct crop_mode mean std num_classes label_offset "
    "label_names label_descriptions pool_size test_pool_size first_conv classifier license description origin_url "
    "paper_name paper_ids notes"
)


def read_timm_config(statements: Statements, config: Mapping[str, Any]) -> None:
    """Read a `config.json` of timm or of transformers' TimmWrapper.

    Raises: BadRequest for a value that is not supported.
    """
    pretrained = config.get("pretrained_cfg") or {}
    if pretrained.get("label_offset"):
        raise statements.refuse("pretrained_cfg.label_offset", pretrained["label_offset"])
    architecture = config.get("architecture") or pretrained.get("architecture")
    read_timm(statements, architecture, config.get("model_args") or {})
    statements.read(config, _TOP)
    if config.get("do_pooling") is False:
        statements.notes.append("do_pooling False: has no effect on logits")
    _note_unknown(statements, config, _TIMM_TOP | BOOKKEEPING)
    _note_unknown(statements, pretrained, frozenset(_PRETRAINED_CFG.split()), "pretrained_cfg.")


UPERNET = "upernet"
_UPERNET: Keys = {
    "hidden_size": ("decoder_width", _whole),
    "pool_scales": ("pool_scales", lambda value: tuple(_positive(one) for one in value)),
    "num_labels": ("num_classes", _whole),
}
_LEVELS: Keys = {"out_features": ("decoder_levels", lambda names: tuple(_level(name) for name in names))}
_IDLE_UPERNET: dict[str, tuple[object, ...]] = {
    "auxiliary_channels": (), "auxiliary_concat_input": (), "auxiliary_in_channels": (), "auxiliary_loss_weight": (),
    "auxiliary_num_convs": (), "use_auxiliary_head": (), "loss_ignore_index": (), "initializer_range": (),
    "id2label": (), "label2id": (), "problem_type": (), "backbone_config": (), "use_timm_backbone": (), "backbone": (),
    "backbone_kwargs": (), "use_pretrained_backbone": (),
}  # fmt: skip


_TIMM_BACKBONE = {"in_chans": "num_channels", "output_stride": "output_stride"}


def read_segmenter(statements: Statements, config: Mapping[str, Any]) -> None:
    """Read the backbone of a configuration for detection or segmentation, and the head of UPerNet.

    Raises: BadRequest for a backbone that is no ConvNeXt, or a value that is not supported.
    """
    if config.get("model_type") == UPERNET:
        statements.read(config, _UPERNET)
        _note_unknown(statements, config, {*_UPERNET, *_IDLE_UPERNET, *BOOKKEEPING})
    inner = config.get("backbone_config") or {}
    kind = inner.get("model_type")
    if kind in HF_TYPES:
        if config.get("model_type") == UPERNET:
            statements.read(inner, _LEVELS, "backbone_config.")
        read_transformers(statements, {key: inner[key] for key in inner if key != "num_labels"}, "backbone_config.")
    elif kind == "timm_backbone" or config.get("use_timm_backbone"):
        args = dict(config.get("backbone_kwargs") or {})
        own = {key: (inner or config).get(name) for key, name in _TIMM_BACKBONE.items()}
        args = {**args, **own} if inner else {**own, **args}
        if config.get("use_timm_backbone") and config.get("dilation"):  # DETR and its relatives
            args["output_stride"] = args.get("output_stride") or 16
        args.pop("out_indices", None)
        read_timm(statements, inner.get("backbone") or config.get("backbone"), args, "backbone_config.")
    else:
        raise statements.refuse("backbone_config.model_type", kind, f"expected {', '.join(HF_TYPES)} or timm_backbone")


_VISION_IDLE: dict[str, tuple[object, ...]] = {
    "timm_model_pretrained": (), "timm_proj": (), "timm_proj_bias": (), "timm_drop": (0.0,),
    "timm_drop_path": (0.0,),
    "image_size": (), "patch_dropout": (0.0,), "layers": (), "width": (), "head_width": (), "patch_size": (),
}  # fmt: skip


def read_open_clip(statements: Statements, config: Mapping[str, Any]) -> None:
    """Read the vision tower of an `open_clip_config.json`.

    Raises: BadRequest for a tower that is no ConvNeXt, or a value that is not supported.
    """
    vision, prefix = config["model_cfg"]["vision_cfg"], "vision_cfg."
    name = vision.get("timm_model_name")
    if not name:
        raise statements.refuse(f"{prefix}timm_model_name", name, "expected a ConvNeXt of timm")
    for key, value in vision.items():
        if key not in _VISION_IDLE and key not in ("timm_model_name", "timm_pool"):
            raise statements.refuse(prefix + key, value)
    if vision.get("timm_proj") not in (None, "", "none", "linear", "mlp"):
        raise statements.refuse(f"{prefix}timm_proj", vision["timm_proj"])
    read_timm(statements, name, {})
    statements.read({"timm_pool": vision.get("timm_pool") or None}, {"timm_pool": ("pool", one_of(_POOLS))}, prefix)
    statements.ignore(vision, _VISION_IDLE, prefix)
