"""A TensorRT that does nothing but remember what it was asked, and that has only the names which a real one has.

Made from `surfaces/`, which `surface.py` read out of the bindings of each library.
"""

import json
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace

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
