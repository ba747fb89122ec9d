"""Finds the state dict in what a checkpoint holds, and the plain values that lie beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from exporter.errors import BadRequest, some
from exporter.model.head import CLASSIFIERS
from exporter.model.pickled import Array, Node, Pointer
from exporter.model.unpickler import Stub

if TYPE_CHECKING:
    from pathlib import Path

# In the order of preference: trained weights before their moving average, a student before its teacher.
WRAPPERS = (
    *("state_dict", "model", "model_state_dict", "model_state", "net", "network", "module", "params", "weights"),
    *("student", "teacher", "state_dict_ema", "model_ema", "ema_state_dict", "ema"),
)
STATE_TENSORS = 4  # a mapping with so many tensors is taken for a state dict whatever its name
_NO_STATES = ("optim", "sched", "scaler", "rng", "grad")
_DTENSOR = "torch.distributed.tensor.DTensor"
_DEEPEST = 16
_MOST_PLAIN = 200_000


@dataclass(frozen=True)
class Part:
    """One state dict (with whatever else is in it), the plain values beside it, and notes for the user."""

    state: Mapping[Any, Any]
    beside: dict[str, Any]
    notes: tuple[str, ...]


def is_tensor(value: Any) -> bool:
    """Whether a value is a tensor, read or not yet read."""
    return isinstance(value, Pointer) or (hasattr(value, "is_floating_point") and hasattr(value, "layout"))


def take(path: Path, content: Any, part: str) -> Part:
    """Find the state dict of a checkpoint.

    Args:
        path: the file, for messages.
        content: what the file holds.
        part: a path of keys, parted by `.` or `/`; "" takes the preferred part of it.

    Raises: BadRequest when there is none, or several without a known name.
    """
    if not isinstance(content, dict):
        raise _no_state(path, content)
    notes: list[str] = []
    levels: list[tuple[Mapping[Any, Any], set[str]]] = []
    here = content
    for key in _follow(path, content, part):
        levels.append((here, {key}))
        here = here[key]
    for _ in range(_DEEPEST):
        keys, others = _next(path, here, notes)
        if not keys:
            break
        for index, key in enumerate(keys):
            levels.append((here, {key, *(others if index == 0 else ())}))
            here = here[key]
    if not _direct(here):
        raise _no_state(path, content)
    state = _with_classifier(here, levels, notes)
    beside: dict[str, Any] = {}
    for level, taken in [*levels, (state, set())]:
        for key, value in _plain_entries(level, taken).items():
            beside.setdefault(key, value)
    notes += _left_out(levels)
    if skipped := _skipped(content):
        notes.append(f"skipped {skipped.total()} objects of other programs: {some(skipped)}")
    return Part(state, beside, tuple(notes))


def _with_classifier(
    here: Mapping[Any, Any], levels: list[tuple[Mapping[Any, Any], set[str]]], notes: list[str]
) -> Mapping[Any, Any]:
    """A state dict, and that of a classifier that was saved beside it: `{"backbone": …, "head": …}`."""
    if not levels or len(levels[-1][1]) != 1:
        return here
    outer, taken = levels[-1]
    (name,) = taken
    others = [key for key in CLASSIFIERS if key != name]
    beside = [key for key in others if isinstance(outer.get(key), dict) and _direct(outer[key])]
    if len(beside) != 1:
        return here
    taken.add(beside[0])
    notes.append(f"{name} and {beside[0]} are read as one network")
    return {f"{part}.{key}": value for part in (name, beside[0]) for key, value in outer[part].items()}


def _no_state(path: Path, content: Any) -> BadRequest:
    modules = [value for value in _walk(content) if isinstance(value, Stub) and value.is_module]
    if modules:
        return BadRequest(
            f"{path}: a whole pickled module ({modules[0].name}), which cannot be read without running its code; save "
            f"its weights where it is trusted: torch.save(torch.load({path.name!r}, weights_only=False)"
            f"{'' if content is modules[0] else '[...]'}.state_dict(), 'weights.pth')"
        )
    if isinstance(content, Stub):
        return BadRequest(f"{path}: an object of {content.name}, expected a state dict")
    if not isinstance(content, dict):
        return BadRequest(f"{path}: a {type(content).__name__}, expected a state dict")
    if any(isinstance(value, Stub) and value.name == _DTENSOR for value in _walk(content)):
        return BadRequest(
            f"{path}: tensors of one process of several (DTensor, as of FSDP2); gather them before saving: "
            "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) of "
            "torch.distributed.checkpoint.state_dict"
        )
    if sum(isinstance(value, Array) for value in _walk(content)) >= STATE_TENSORS:
        return BadRequest(
            f"{path}: arrays of NumPy, expected tensors; save them as tensors: "
            "torch.save({k: torch.as_tensor(v) for k, v in state.items()}, 'weights.pth')"
        )
    keys = [str(key)[:60] for key in content]
    return BadRequest(f"{path}: not a state dict: no tensors in it; it has {some(keys) or 'nothing'}")


def _follow(path: Path, content: dict[Any, Any], part: str) -> list[str]:
    """The keys of a path; a key may itself hold a dot, so the longest that fits is taken."""
    keys: list[str] = []
    here, rest = content, part
    while rest:
        fits = [
            key
            for key, value in here.items()
            if isinstance(key, str) and key and isinstance(value, dict)
            and (rest == key or rest.startswith((key + ".", key + "/")))
        ]  # fmt: skip
        if not fits or len(keys) > _DEEPEST:
            names = [str(key) for key, value in content.items() if isinstance(value, dict) and _tensors_in(value)]
            names += [name for name in map("/".join, _states(content)) if name and name not in names]
            raise BadRequest(f"{path}: no part {part!r}; it has {some(names, 12) or 'none'}")
        key = max(fits, key=len)
        keys.append(key)
        here, rest = here[key], rest[len(key) + 1 :]
    return keys


def _next(path: Path, here: dict[Any, Any], notes: list[str]) -> tuple[tuple[str, ...], set[str]]:
    """The keys from a level to the state dict below it, and the names of those left; no keys when it is the level."""
    direct = len(_direct(here))
    named = [name for name in WRAPPERS if isinstance(here.get(name), dict) and _tensors_in(here[name]) > direct]
    if direct >= STATE_TENSORS and not named:
        return (), set()
    if named:
        if len(named) > 1:
            other = "the other" if len(named) == 2 else "another"
            notes.append(
                f"{path.name} holds {' and '.join(named)}; taking {named[0]} ({path.name}#{named[1]} takes {other})"
            )
        return (named[0],), set(named)
    states = list(_states(here))
    if len(states) == 1:
        notes.append(f"{path.name}: taking {'/'.join(states[0])}, the only part with weights")
        return states[0], set()
    if states and not direct:
        names = ["/".join(state) for state in states]
        raise BadRequest(
            f"{path}: {len(names)} parts with weights ({some(names, 6)}); take one as {path.name}#{names[0]}"
        )
    return (), set()


def _direct(here: Mapping[Any, Any]) -> list[str]:
    """The names of the tensors of a mapping that are no single numbers, such as a loss or a count."""
    return [key for key, value in here.items() if isinstance(key, str) and is_tensor(value) and _axes(value)]


def _axes(value: Any) -> int:
    return len(value.size) if isinstance(value, Pointer) else int(value.ndim)


def _states(content: dict[Any, Any]) -> Iterator[tuple[str, ...]]:
    """The paths of keys to mappings with enough tensors, but for those of optimizers and the like."""
    seen = {id(content)}
    waiting: list[tuple[tuple[str, ...], dict[Any, Any]]] = [((), content)]
    while waiting:
        keys, here = waiting.pop()
        if keys and len(_direct(here)) >= STATE_TENSORS:
            yield keys
            continue
        for key, value in reversed(here.items()):
            wanted = isinstance(key, str) and not any(word in key.lower() for word in _NO_STATES)
            if wanted and isinstance(value, dict) and id(value) not in seen and len(keys) < _DEEPEST:
                seen.add(id(value))
                waiting.append(((*keys, key), value))


def _walk(content: Any) -> Iterator[Any]:
    """Every value that can be reached, each once."""
    seen: set[int] = set()
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        if isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, list | tuple):
            waiting.extend(value)
        elif isinstance(value, Node):
            waiting.append(value.value)


def _tensors_in(content: Any) -> int:
    return sum(is_tensor(value) for value in _walk(content))


def _left_out(levels: list[tuple[Mapping[Any, Any], set[str]]]) -> list[str]:
    counts = {
        str(key): count
        for level, taken in levels
        for key, value in level.items()
        if key not in taken and (count := _tensors_in(value))
    }
    if not counts:
        return []
    names = some([f"{key} ({count})" for key, count in counts.items()], 6)
    return [f"left out {sum(counts.values())} tensors beside the weights: {names}"]


def _skipped(content: Any) -> Counter[str]:
    return Counter(value.name for value in _walk(content) if isinstance(value, Stub))


class _Omitted(Exception):
    """A value that is not plain."""


def _plain_entries(level: Mapping[Any, Any], taken: set[str]) -> dict[str, Any]:
    entries = {}
    left = [_MOST_PLAIN]
    for key, value in level.items():
        if isinstance(key, str) and key not in taken:
            try:
                entries[key] = _plain(value, left, 0)
            except _Omitted:
                continue
    return entries


def _plain(value: Any, left: list[int], depth: int) -> Any:
    """A value of builtin types; unknown objects in it are left out. `left` counts the values that may still come."""
    left[0] -= 1
    if left[0] < 0 or depth > _DEEPEST:
        raise _Omitted
    if isinstance(value, Node):
        return _plain(value.value, left, depth + 1)
    if isinstance(value, Array):
        if value.values is None or value.values.size > left[0]:
            raise _Omitted
        left[0] -= value.values.size
        return value.values.tolist()
    if isinstance(value, dict):
        keys = [key for key in value if isinstance(key, str | int)]
        entries = {key: plain for key in keys for plain in _kept(value[key], left, depth)}
        return _unless_emptied(value, entries)
    if isinstance(value, list | tuple):
        return _unless_emptied(value, [plain for member in value for plain in _kept(member, left, depth)])
    if value is None or isinstance(value, str | int | float | complex | bytes):
        return value
    raise _Omitted


def _unless_emptied(value: Any, plain: Any) -> Any:
    if value and not plain:
        raise _Omitted
    return plain


def _kept(value: Any, left: list[int], depth: int) -> Iterator[Any]:
    try:
        yield _plain(value, left, depth + 1)
    except _Omitted:
        return
