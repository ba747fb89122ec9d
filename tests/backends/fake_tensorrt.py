"""A TensorRT that remembers what it was asked, and has only the names which a real one has. `Meanings` adds what the
documentation says of profiles, versions and weights.

Made from `surfaces/`, which `surface.py` read out of the bindings of each library.
"""

import ctypes
import json
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace

import numpy as np

SURFACES = sorted((Path(__file__).parent / "surfaces").glob("*.json"))


class Fake:
    """An object of a class of the bindings: an unknown name, or a call with other arguments, is an error."""

    members: dict
    module: "FakeModule"

    def __init__(self, *args):
        self.__dict__["values"] = {}
        self.called("__init__", args)

    def called(self, name, args):
        overloads = self.members[name]
        fits = [one for one in overloads if len([a for a in one if "=" not in a]) <= len(args) <= len(one)]
        if overloads and not fits:
            raise TypeError(f"{type(self).__name__}.{name} takes {overloads}, not {len(args)} arguments")
        self.module.calls.append((f"{type(self).__name__}.{name}", args))

    def __getattr__(self, name):
        known = type(self).known()
        if name not in self.members:
            raise AttributeError(f"{known}.{name} is not in {self.module.__version__}")
        if name in self.values:
            return self.values[name]
        answer = self.module.answers.get(f"{known}.{name}")
        if self.members[name] is None:
            return answer

        def method(*args):
            self.called(name, args)
            return answer(*args) if callable(answer) else answer

        return method

    def __setattr__(self, name, value):
        if type(self).known() != type(self).__name__:  # a class of ours below one of theirs
            self.__dict__[name] = value
            return
        if name not in self.members:
            raise AttributeError(f"{type(self).known()}.{name} is not in {self.module.__version__}")
        self.module.calls.append((f"{type(self).__name__}.{name} =", (value,)))
        self.values[name] = value

    @classmethod
    def known(cls):
        return next(c.__name__ for c in cls.__mro__ if "members" in vars(c))


class FakeModule(SimpleNamespace):
    """The module: its classes, and what their methods answer."""

    def __init__(self, path: Path):
        told = json.loads(path.read_text())
        super().__init__(__version__=told["version"], calls=[], answers={})
        for name, members in told["classes"].items():
            constants = [m for m in members if m.isupper() or m.startswith("SM")]
            if constants and name != "ILogger":
                setattr(self, name, IntEnum(name, constants, start=0))
            else:
                setattr(self, name, type(name, (Fake,), {"members": members, "module": self}))
        self.ILogger.Severity = IntEnum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"], start=0)
        self.answers |= {
            "Builder.create_network": lambda flags: self.INetworkDefinition(),
            "Builder.create_builder_config": lambda: self.IBuilderConfig(),
            "Builder.create_optimization_profile": lambda: self.IOptimizationProfile(),
            "Builder.build_serialized_network": b"plan",
            "OnnxParser.parse_from_file": True,
            "IBuilderConfig.create_timing_cache": lambda content: self.ITimingCache(),
            "IBuilderConfig.set_timing_cache": True,
            "IBuilderConfig.get_timing_cache": lambda: self.ITimingCache(),
            "ITimingCache.serialize": b"timings",
            "INetworkDefinition.get_input": lambda index: SimpleNamespace(name="images"),
        }

    def asked(self, name):
        """The arguments of every call of a method, in order."""
        return [args for called, args in self.calls if called == name]

    def __hash__(self):
        return id(self)

    def __eq__(self, other):
        return self is other


class Meanings:
    """What an engine does with its calls, as NVIDIA's documentation says; the surfaces only know their names. Pages
    are below https://docs.nvidia.com/deeplearning/tensorrt/11.4.0/.

    The network gives for each image its mean, ten times. A rule that is broken is an error here, where a GPU would give
    wrong numbers or a message.

    Args:
        module: the fake library, whose answers are replaced.
        profiles: (least, best, most) images of each profile.
        version_compatible, stripped: how the engine was built.
        weights: the names of its weights, and those that the ONNX file has.
    """

    def __init__(
        self, module, profiles=((1, 1, 4),), version_compatible=False, stripped=False, weights=(("w",), ("w",))
    ):
        self.module, self.profiles, self.stripped = module, profiles, stripped
        self.names, self.supplied = weights
        self.version_compatible, self.profile, self.shape = version_compatible, 0, None
        self.addresses, self.enqueued = {}, []
        for name in ("ICudaEngine", "IExecutionContext", "IRuntimeConfig", "IRuntimeCache"):
            if hasattr(module, name):
                getattr(module, name).members["__init__"] = []
        module.Refitter, module.OnnxParserRefitter = self.refitter, self.parser
        module.answers |= {
            "Runtime.deserialize_cuda_engine": self.deserialize,
            "ICudaEngine.create_execution_context": lambda *config: module.IExecutionContext(),
            "ICudaEngine.create_runtime_config": lambda: module.IRuntimeConfig(),
            "ICudaEngine.num_io_tensors": 2,
            "ICudaEngine.num_optimization_profiles": len(profiles),
            "ICudaEngine.get_tensor_name": lambda index: ("logits", "images")[index],
            "ICudaEngine.get_tensor_mode": lambda name: getattr(
                module.TensorIOMode, "INPUT" if name == "images" else "OUTPUT"
            ),
            "ICudaEngine.get_tensor_profile_shape": lambda name, index: [
                (count, 3, 64, 64) for count in profiles[index]
            ],
            "IExecutionContext.set_optimization_profile_async": self.select,
            "IExecutionContext.set_input_shape": self.set_shape,
            "IExecutionContext.get_tensor_shape": lambda name: (self.shape[0], 10),
            "IExecutionContext.set_tensor_address": lambda name, address: self.addresses.update({name: address}),
            "IExecutionContext.execute_async_v3": self.execute,
            "IRuntimeConfig.create_runtime_cache": lambda: module.IRuntimeCache(),
            "IRuntimeCache.serialize": b"kernels",
            "IRuntimeCache.deserialize": lambda content: content == b"kernels",
        }

    def deserialize(self, plan):
        # inference-library/engine-compatibility.html, "Version Compatibility": a version-compatible plan holds host
        # code, and is only loaded by a runtime whose engine_host_code_allowed is true.
        allowed = self.module.asked("Runtime.engine_host_code_allowed =")
        if self.version_compatible != ((True,) in allowed):
            return None  # also the other way: other plans are not trusted with host code
        return self.module.ICudaEngine()

    def select(self, index, stream):
        # _static/python-api/infer/Core/ExecutionContext.html, set_optimization_profile_async: shapes of all dynamic
        # inputs have to be set anew after it.
        assert 0 <= index < len(self.profiles), f"no profile {index}"
        assert stream, "not the default stream"
        self.profile, self.shape = index, None
        return True

    def set_shape(self, name, shape):
        # _static/python-api/infer/Core/OptimizationProfile.html: dimensions outside the range of the selected profile,
        # by default profile 0, are an error.
        least, _, most = self.profiles[self.profile]
        self.shape = tuple(shape) if least <= shape[0] <= most and tuple(shape[1:]) == (3, 64, 64) else None
        return self.shape is not None

    def execute(self, stream):
        assert self.shape is not None, "enqueued without a shape that the selected profile takes"
        assert set(self.addresses) == {"images", "logits"}, "enqueued without addresses"
        # inference-library/refitting-engines.html: an engine without weights has to be refitted before it is run.
        assert not self.stripped, "enqueued without weights"
        count = self.shape[0]
        pixels = self.at("images", (count, 3 * 64 * 64))
        self.at("logits", (count, 10))[:] = pixels.mean(1, keepdims=True)
        self.enqueued.append((self.profile, count))
        return True

    def at(self, name, shape):
        """The memory that a tensor was given, as float32."""
        size = int(np.prod(shape))
        return np.ctypeslib.as_array((ctypes.c_float * size).from_address(self.addresses[name])).reshape(shape)

    def refitter(self, engine, logger):
        # _static/python-api/infer/Core/Refitter.html: refit_cuda_engine fails while get_missing_weights is not empty.
        def refit():
            self.stripped = bool(self.missing)
            return not self.missing

        self.missing = list(self.names)
        return SimpleNamespace(refit_cuda_engine=refit, get_missing_weights=lambda: self.missing)

    def parser(self, refitter, logger):
        # _static/python-api/parsers/Onnx/pyOnnx.html, OnnxParserRefitter: takes weights by the names of the ONNX file.
        def refit_from_file(path):
            assert Path(path).is_file()
            self.missing = [name for name in self.missing if name not in self.supplied]
            return True

        return SimpleNamespace(refit_from_file=refit_from_file)
