"""What an unpickled checkpoint may hold beside stubs: tensors, numpy arrays and numbers, and plain Python values.

Each constructor takes the place of one function or class that pickles name. None of them calls what it stands for, and
what they build is bounded by the bytes of the file. They raise TypeError, ValueError or LookupError over arguments of
another form, which makes a stub of the object; a tensor that does not fit its storage raises Damage.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from exporter.model.unpickler import Attributes, Constructor, Damage, Record, Storage, Stub, Unpickler

_DTYPES_BY_BYTES = {
    1: "float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu bool uint8 int8",
    2: "bfloat16 float16 uint16 int16",
    4: "float32 uint32 int32 complex32",
    8: "float64 uint64 int64 complex64",
    16: "complex128",
}
ELEMENT_BYTES = {name: count for count, names in _DTYPES_BY_BYTES.items() for name in names.split()}
STORAGES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
    "QInt8Storage": "int8",  # of quantized tensors, which stay stubs
    "QUInt8Storage": "uint8",
    "QInt32Storage": "int32",
    "QUInt4x2Storage": "uint8",
    "QUInt2x4Storage": "uint8",
}
_NUMPY_DTYPE = re.compile(r"[<>=|]?([biuf][1248]|f2|c8|c16|b1|\?|[SU]\d{1,5})")
_MAX_AXES = 32


@dataclass(frozen=True, eq=False)
class Pointer(Record):
    """A tensor that is not read yet: a strided view of a storage; strides and offset count elements."""

    storage: Storage
    dtype: str
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.size)

    @property
    def reach(self) -> int:
        """The number of elements of the storage from the first to the last of the tensor; it has at least one."""
        return 1 + sum((axis - 1) * step for axis, step in zip(self.size, self.stride, strict=True))

    @property
    def is_floating_point(self) -> bool:
        """Whether the elements are real numbers."""
        return self.dtype.startswith(("float", "bfloat"))


class Array(Record):
    """A numpy array or its dtype while its pickle is read; `values` is a numpy array once its state is there."""

    def __init__(self) -> None:
        self.values: Any = None

    def set_state(self, machine: Unpickler, state: Any) -> None:
        """Decode the numbers from the state of numpy.ndarray: (version, shape, dtype, is_fortran, bytes)."""
        _, shape, dtype, fortran, content = state
        self.values = _decode(machine, content, dtype, shape, bool(fortran))


class DType(Record):
    """A numpy dtype of numbers or text."""

    def __init__(self, code: str) -> None:
        self.code = code if _NUMPY_DTYPE.fullmatch(code) else ""  # "" for objects, structures and times

    def set_state(self, machine: Unpickler, state: Any) -> None:
        """Take the byte order from the state."""
        if self.code and isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">"):
            self.code = state[1] + self.code.lstrip("<>=|")


class Node(Record):
    """A value of OmegaConf, which keeps it in `_content` (containers) or `_val` (leaves)."""

    value: Any = None

    def set_state(self, machine: Unpickler, state: Any) -> None:
        """Keep the value, without type, parent and flags."""
        if isinstance(state, dict):
            self.value = state.get("_content", state.get("_val"))


def plain_name(name: str) -> str | None:
    """The plain value that a name stands for: dtypes, layouts and memory formats are their own names."""
    short = name.removeprefix("torch.")
    return name if short != name and (short in ELEMENT_BYTES or short in ("strided", "contiguous_format")) else None


def _whole(values: Any) -> tuple[int, ...]:
    whole = tuple(values)
    if len(whole) > _MAX_AXES or any(type(value) is not int or not 0 <= value < 1 << 62 for value in whole):
        raise Damage("a tensor of impossible shape")
    return whole


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, dtype: str) -> Pointer:
    if not isinstance(storage, Storage) or not isinstance(size, tuple | list) or not isinstance(stride, tuple | list):
        raise Damage("a tensor without a storage")
    (offset,), size, stride = _whole((offset,)), _whole(size), _whole(stride)
    available = storage.elements * ELEMENT_BYTES[storage.dtype] // ELEMENT_BYTES[dtype]
    elements = math.prod(size)
    if len(size) != len(stride):
        raise Damage("a tensor of impossible shape")
    last = offset + sum((axis - 1) * step for axis, step in zip(size, stride, strict=True))
    if elements > available or (elements and last >= available):
        raise Damage(f"a tensor of shape {size} that its storage of {available} elements cannot hold")
    return Pointer(storage, dtype, offset, size, stride)


def _tensor_v2(machine: Unpickler, arguments: tuple[Any, ...]) -> Any:
    storage, offset, size, stride, *rest = arguments
    if len(rest) > 2 and rest[2]:
        return Stub("torch.Tensor with a conjugate or negative bit")
    return _tensor(storage, offset, size, stride, storage.dtype if isinstance(storage, Storage) else "")


def _tensor_v3(machine: Unpickler, arguments: tuple[Any, ...]) -> Any:
    storage, offset, size, stride, _, _, dtype, *metadata = arguments
    if metadata and metadata[0]:
        return Stub("torch.Tensor with a conjugate or negative bit")
    return _tensor(storage, offset, size, stride, _dtype_name(dtype))


def _dtype_name(dtype: Any) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in ELEMENT_BYTES:
        raise Damage(f"a tensor of the unknown dtype {name[:40]}")
    return name


def _parameter(machine: Unpickler, arguments: tuple[Any, ...]) -> Any:
    if not isinstance(arguments[0], Pointer | Array):
        raise TypeError
    return arguments[0]


def _from_type(machine: Unpickler, arguments: tuple[Any, ...]) -> Any:
    """A tensor with attributes, or of a subclass: (function, type, its arguments, state)."""
    function, kind, inner, *_ = arguments
    if not (isinstance(kind, Stub) and kind.name in _TENSOR_TYPES and isinstance(function, Stub)):
        return Stub(kind.name if isinstance(kind, Stub) else "torch.Tensor")
    return CONSTRUCTORS[function.name](machine, inner) if function.name in _REBUILDS else Stub(function.name)


def _decode(machine: Unpickler, content: Any, dtype: Any, shape: Any, fortran: bool) -> Any:
    import numpy as np

    if not isinstance(dtype, DType) or not dtype.code or not isinstance(content, bytes | bytearray):
        return None
    kind, shape = np.dtype(dtype.code), _whole(shape)
    if not kind.itemsize or math.prod(shape) * kind.itemsize != len(content):
        return None
    machine.spend(len(content))
    return np.frombuffer(bytes(content), kind).reshape(shape, order="F" if fortran else "C")


def _array_from_buffer(machine: Unpickler, arguments: tuple[Any, ...]) -> Array:
    content, dtype, shape, order = arguments[:4]
    array = Array()
    array.values = _decode(machine, content, dtype, shape, order == "F")
    return array


def _scalar(machine: Unpickler, arguments: tuple[Any, ...]) -> Any:
    value = _decode(machine, arguments[1], arguments[0], (), False)
    return Stub("numpy scalar") if value is None else value.item()


def _encoded(machine: Unpickler, arguments: tuple[Any, ...]) -> bytes:
    text, encoding = arguments
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise TypeError
    machine.spend(len(text))
    return text.encode(encoding)


def _bytes(machine: Unpickler, arguments: tuple[Any, ...]) -> bytes:
    if arguments and isinstance(arguments[0], str):
        return _encoded(machine, arguments)
    if arguments and not isinstance(arguments[0], bytes | bytearray):
        raise TypeError  # a number would be a length
    return bytes(arguments[0]) if arguments else b""


def _members(machine: Unpickler, arguments: tuple[Any, ...]) -> list[Any]:
    members = arguments[0] if arguments else ()
    if not isinstance(members, list | tuple):
        raise TypeError
    machine.spend(len(members))
    return list(members)


def _mapping(machine: Unpickler, arguments: tuple[Any, ...]) -> dict[Any, Any]:
    """A dict or a subclass that is nothing else: from nothing, a dict, or pairs."""
    if not arguments or isinstance(arguments[0], Stub) or arguments[0] is None:  # the factory of a defaultdict
        return {}
    if isinstance(arguments[0], dict):
        machine.spend(len(arguments[0]))
        return dict(arguments[0])
    pairs = _members(machine, arguments)
    if any(not isinstance(pair, list | tuple) or len(pair) != 2 for pair in pairs):
        raise TypeError
    mapping: dict[Any, Any] = {}
    machine.add_entries(mapping, [member for pair in pairs for member in pair])
    return mapping


def _path(kind: type[PurePosixPath] | type[PureWindowsPath]) -> Constructor:
    def build(machine: Unpickler, arguments: tuple[Any, ...]) -> str:
        if not all(isinstance(part, str) for part in arguments):
            raise TypeError
        machine.spend(sum(map(len, arguments)))
        return str(kind(*arguments))

    return build


def _complex(machine: Unpickler, arguments: tuple[Any, ...]) -> complex:
    real, imaginary = arguments
    return complex(float(real), float(imaginary))


def _object(machine: Unpickler, arguments: tuple[Any, ...]) -> Any:
    """copyreg._reconstructor and __newobj__: an object of the class that is their first argument."""
    kind = arguments[0]
    machine.construct(kind, ())
    return machine.stack.pop()


def _text(machine: Unpickler, arguments: tuple[Any, ...]) -> str:
    if not all(isinstance(part, str | int) for part in arguments):
        raise TypeError
    return ":".join(str(part)[:100] for part in arguments)


def _dtype(machine: Unpickler, arguments: tuple[Any, ...]) -> DType:
    if not isinstance(arguments[0], str):
        raise TypeError
    return DType(arguments[0])


def _fresh(kind: Callable[[], Any]) -> Constructor:
    return lambda machine, arguments: kind()


_TENSOR_TYPES = {"torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"}
_REBUILDS: dict[str, Constructor] = {
    "torch._utils._rebuild_tensor": _tensor_v2,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
# Mappings of configuration libraries that are a dict and nothing else.
_DICT_NAMES = """
    builtins.dict collections.OrderedDict collections.defaultdict collections.Counter
    mmengine.config.config.ConfigDict mmcv.utils.config.ConfigDict addict.addict.Dict addict.Dict easydict.EasyDict
    munch.Munch yacs.config.CfgNode fvcore.common.config.CfgNode detectron2.config.config.CfgNode
    ml_collections.config_dict.config_dict.ConfigDict lightning_fabric.utilities.data.AttributeDict
    lightning.fabric.utilities.data.AttributeDict pytorch_lightning.utilities.parsing.AttributeDict
"""
_OMEGACONF_NAMES = """
    dictconfig.DictConfig listconfig.ListConfig nodes.AnyNode nodes.StringNode nodes.IntegerNode nodes.FloatNode
    nodes.BooleanNode nodes.BytesNode nodes.PathNode nodes.EnumNode
"""
CONSTRUCTORS: dict[str, Constructor] = {
    **_REBUILDS,
    "torch.nn.parameter.Parameter": _parameter,
    "torch._utils._rebuild_device_tensor_from_numpy": _parameter,
    "torch._utils._rebuild_xla_tensor": _parameter,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _parameter,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.Size": lambda machine, arguments: tuple(_members(machine, arguments)),
    "torch.device": _text,
    "torch.serialization._get_layout": _text,
    **dict.fromkeys(_DICT_NAMES.split(), _mapping),
    **dict.fromkeys(("builtins.set", "builtins.frozenset", "builtins.list", "builtins.tuple"), _members),
    "collections.deque": _members,
    "builtins.complex": _complex,
    "builtins.bytes": _bytes,
    "builtins.bytearray": _bytes,
    "_codecs.encode": _encoded,
    "copyreg._reconstructor": _object,
    "copyreg.__newobj__": _object,
    **dict.fromkeys(("argparse.Namespace", "types.SimpleNamespace"), _fresh(Attributes)),
    **{
        f"{module}.{name}": _path(PureWindowsPath if "Windows" in name else PurePosixPath)
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PurePath", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
    },
    "numpy.dtype": _dtype,
    **{
        f"numpy.{core}.{name}": build
        for core in ("core", "_core")
        for name, build in (
            ("multiarray._reconstruct", _fresh(Array)),
            ("multiarray.scalar", _scalar),
            ("numeric._frombuffer", _array_from_buffer),
        )
    },
    **{f"omegaconf.{name}": _fresh(Node) for name in _OMEGACONF_NAMES.split()},
}
