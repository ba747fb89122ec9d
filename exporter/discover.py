"""A folder is a registry: its modules are the names, and each holds one object.

A new backend, check or report format is one new file; nothing else changes.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any

from exporter.errors import BadRequest, nearest


def names(package: str) -> list[str]:
    """The public modules of a package, in order."""
    path = importlib.import_module(package).__path__
    return [module.name for module in pkgutil.iter_modules(path) if not module.name.startswith("_")]


def module(package: str, name: str) -> ModuleType:
    """A module of a package."""
    return importlib.import_module(f"{package}.{name}")


def load(package: str, name: str, attribute: str) -> Any:
    """The object called `attribute` in the module `name` of a package.

    Raises: BadRequest when the package has no such module, with the nearest that it has.
    """
    known = names(package)
    if name not in known:
        folder = package.rpartition(".")[2]
        kind = "report format" if folder == "formats" else folder.removesuffix("s")
        raise BadRequest(f"unknown {kind} {name!r}; {nearest(name, known)}")
    return getattr(module(package, name), attribute)
