"""What a handle was resolved to, as a digest: every node that has a part in its values, with what decides them.

A handle is described by its class and all its attributes, down to the tensors as they lie in files: their names, types,
shapes and places. Functions count by their name and what they hold. Nothing is left out by choice, so a new kind of handle
is described as soon as there is one; what cannot be described (a handle that holds a whole checkpoint, say) has no digest,
and whoever wants one opens the whole plan.
"""

from __future__ import annotations

import functools
import hashlib
import threading
import types
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from adapterkit._version import __version__
from adapterkit.checkpoint.checkpoint import Checkpoint
from adapterkit.checkpoint.files import Source
from adapterkit.checkpoint.slices import GROUP, Slice, StepGroup, joined
from adapterkit.checkpoint.tensor import Stored, Tensor
from adapterkit.dtypes import DType

if TYPE_CHECKING:
    from collections.abc import Callable

    from adapterkit.checkpoint.cut import PlanPart
    from adapterkit.checkpoint.plan import Plan, PlannedFile
    from adapterkit.checkpoint.slices import Slices

MOST = 4096  # entries of one mapping: more are of a whole model, of which nobody knows what is used
DEEPEST = 60  # handles below each other
_PLAIN = frozenset({int, float, str, bool, bytes, complex, type(None), range, slice})
_LOCKS = (type(threading.Lock()), type(threading.RLock()), threading.Condition)

Leaf = tuple[str, int, int]  # an input, and bytes of it


class UndescribedError(Exception):
    """Something that decides values cannot be described."""


class Describer:
    """Describes handles; what several of them share is described once."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[object, str, tuple[Leaf, ...]]] = {}
        self._how: dict[type, Callable[[Any, list[Leaf], int], str]] = {}
        self._attributes: dict[type, tuple[str, frozenset[str], tuple[str, ...]]] = {}

    def digest(self, handles: Sequence[Tensor]) -> tuple[str, list[Leaf]]:
        """Of some handles in this order, and the bytes that they are made of.

        Raises:
            UndescribedError
        """
        leaves: list[Leaf] = []
        said = "\n".join([__version__, *(self._of(handle, leaves, 0) for handle in handles)])
        return _hashed(said)[:16], leaves

    def _of(self, value: Any, leaves: list[Leaf], depth: int) -> str:
        kind = type(value)
        if kind in _PLAIN:
            return repr(value)
        if kind is Stored:
            leaves.append((value.source.name, value.offset, value.offset + value.nbytes))
            return f"<{value.name} {value.dtype.code} {value.shape} {value.source.name} {value.offset}>"
        if kind is tuple or kind is list:
            if kind is tuple and set(map(type, value)) == {int}:
                return repr(value)
            parts = [repr(one) if type(one) in _PLAIN else self._of(one, leaves, depth) for one in value]
            return f"({','.join(parts)})"
        if kind is DType:
            return str(value.code)
        known = self._known.get(id(value))
        if known is not None:
            leaves.extend(known[2])
            return known[1]
        if depth > DEEPEST:
            raise UndescribedError(f"{kind.__qualname__} holds itself")
        how = self._how.get(kind)
        if how is None:
            how = self._how[kind] = self._way(value, kind)
        own: list[Leaf] = []
        said = how(value, own, depth + 1)
        if len(said) > 40:
            said = _hashed(said)
        self._known[id(value)] = (value, said, tuple(own))
        leaves.extend(own)
        return said

    def _way(self, value: Any, kind: type) -> Callable[[Any, list[Leaf], int], str]:
        """How values of a class are described."""
        if issubclass(kind, Source):
            return lambda value, leaves, depth: f"@{value.name}"
        if issubclass(kind, (PurePath, Enum)):
            return lambda value, leaves, depth: f"{kind.__qualname__}:{value}"
        if issubclass(kind, _LOCKS):
            return lambda value, leaves, depth: ""
        if issubclass(kind, Checkpoint):
            return self._refused
        if issubclass(kind, (set, frozenset)):
            return self._set
        if issubclass(kind, (dict, types.MappingProxyType)):
            return self._mapping
        if issubclass(kind, type):
            return lambda value, leaves, depth: f"{value.__module__}.{value.__qualname__}"
        if issubclass(kind, types.ModuleType):
            return lambda value, leaves, depth: f"module:{value.__name__}"
        if issubclass(kind, functools.partial):
            return lambda value, leaves, depth: (
                f"partial{self._of((value.func, value.args, value.keywords), leaves, depth)}"
            )
        if issubclass(kind, types.MethodType):
            return lambda value, leaves, depth: (
                f"{value.__func__.__qualname__}.{self._of(value.__self__, leaves, depth)}"
            )
        if issubclass(kind, types.FunctionType):
            return self._function
        if hasattr(value, "__wrapped__"):
            return lambda value, leaves, depth: self._of(value.__wrapped__, leaves, depth)
        if issubclass(kind, types.BuiltinFunctionType):
            return self._builtin
        if kind.__module__.partition(".")[0] in ("torch", "numpy"):
            return lambda value, leaves, depth: _values(value)
        if hasattr(kind, "resolved"):
            name = f"{kind.__module__}.{kind.__qualname__}"
            return lambda value, leaves, depth: f"{name}{self._of(value.resolved(), leaves, depth)}"
        return self._object

    def _refused(self, value: Any, leaves: list[Leaf], depth: int) -> str:
        raise UndescribedError("a whole checkpoint")

    def _set(self, value: Any, leaves: list[Leaf], depth: int) -> str:
        return f"{{{','.join(sorted(self._of(one, leaves, depth) for one in value))}}}"

    def _mapping(self, value: Any, leaves: list[Leaf], depth: int) -> str:
        if len(value) > MOST:
            raise UndescribedError("a whole model")
        parts = [f"{self._of(key, leaves, depth)}:{self._of(held, leaves, depth)}" for key, held in value.items()]
        return f"[{','.join(parts)}]"

    def _object(self, value: Any, leaves: list[Leaf], depth: int) -> str:
        kind = type(value)
        if kind not in self._attributes:
            cached = {name for one in kind.__mro__ for name, held in vars(one).items() if _is_cached(held)}
            slots = tuple(name for one in kind.__mro__ for name in _slots(one) if name != "__dict__")
            self._attributes[kind] = (f"{kind.__module__}.{kind.__qualname__}", frozenset(cached), slots)
        name, cached_names, slot_names = self._attributes[kind]
        if (not slot_names and not hasattr(value, "__dict__")) or _is_built_in(kind):
            raise UndescribedError(name)
        if isinstance(value, Stored):  # of a kind of its own
            leaves.append((value.source.name, value.offset, value.offset + value.nbytes))
        held = (
            value.__dict__
            if not slot_names
            else {
                **{one: getattr(value, one) for one in slot_names if hasattr(value, one)},
                **getattr(value, "__dict__", {}),
            }
        )
        parts = [
            f"{one}={repr(inner) if type(inner) in _PLAIN else self._of(inner, leaves, depth)}"
            for one, inner in sorted(held.items())
            if one not in cached_names
        ]
        return f"{name}({';'.join(parts)})"

    def _builtin(self, value: Any, leaves: list[Leaf], depth: int) -> str:
        if value.__self__ is not None and not isinstance(value.__self__, types.ModuleType):
            raise UndescribedError(repr(value))
        return f"{value.__module__}.{value.__qualname__}"

    def _function(self, value: Any, leaves: list[Leaf], depth: int) -> str:
        name = f"{value.__module__}.{value.__qualname__}:{value.__code__.co_firstlineno}"
        if value.__closure__ is None and value.__defaults__ is None and value.__kwdefaults__ is None:
            return name
        try:
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
        except ValueError:
            raise UndescribedError(name) from None
        if any(hasattr(one, "pieces") for one in cells):
            raise UndescribedError(f"{name} reads another parameter")
        held = ([one for one in cells if one is not value], value.__defaults__, value.__kwdefaults__)
        return f"{name}{self._of(held, leaves, depth)}"


def _is_built_in(kind: type) -> bool:
    """Whether values of a class hold something beside their attributes, as those of a class made of ``str`` do."""
    return any(one is not object and one.__module__ == "builtins" for one in kind.__mro__)


def _is_cached(held: Any) -> bool:
    return isinstance(held, functools.cached_property)


def _slots(kind: type) -> Sequence[str]:
    found = vars(kind).get("__slots__", ())
    return (found,) if isinstance(found, str) else tuple(found)


def _values(value: Any) -> str:
    """An array that was computed already, or a word of the library (a dtype)."""
    if hasattr(value, "numpy"):
        value = value.detach().cpu().contiguous()
        import torch

        data = value.view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
        return f"{value.dtype}{tuple(value.shape)}{hashlib.blake2b(data, digest_size=12).hexdigest()}"
    if hasattr(value, "tobytes"):
        return f"{value.dtype}{value.shape}{hashlib.blake2b(value.tobytes(), digest_size=12).hexdigest()}"
    return repr(value)


def _hashed(said: str) -> str:
    return hashlib.blake2b(said.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


def slices_of(plan: Plan, tensors: Mapping[str, Tensor]) -> Slices:
    """The groups of tensors that are computed, by output file."""
    describer = Describer()
    return {file.name: groups for file in plan.files if (groups := _groups(plan, file, tensors, describer))}


def _groups(
    plan: Plan, file: PlannedFile, tensors: Mapping[str, Tensor], describer: Describer
) -> tuple[StepGroup, ...]:
    computed = [index for index, step in enumerate(file.steps) if step.source is None]
    found = []
    for some in _alike(file, computed, tensors, describer):
        digest, leaves = described([file.steps[index].tensor for index in some], tensors, describer)
        if not {name for name, _, _ in leaves} <= plan.inputs.keys():
            digest = ""  # of bytes that are in no file
        found.append(StepGroup(some[0], some[-1] + 1 - some[0], digest, joined(leaves)))
    return tuple(found)


def _alike(
    file: PlannedFile, computed: Sequence[int], tensors: Mapping[str, Tensor], describer: Describer
) -> Iterator[list[int]]:
    """Steps that follow each other and are made of files in the same folders, at most `GROUP` of them. What cannot be said of a
    tensor, or what an adapter brings, is so not asked of those around it."""
    some: list[int] = []
    before: object = None
    for index in computed:
        digest, leaves = described([file.steps[index].tensor], tensors, describer)
        folders: object = frozenset(_folder(name) for name, _, _ in leaves) if digest else None
        if some and (folders is None or folders != before or len(some) == GROUP):
            yield some
            some = []
        some.append(index)
        before = folders
    if some:
        yield some


def described(
    names: Sequence[str], tensors: Mapping[str, Tensor], describer: Describer | None = None
) -> tuple[str, list[Leaf]]:
    """The digest of some tensors by name, and what they are made of; an empty one where that cannot be said."""
    try:
        return (describer or Describer()).digest([tensors[name] for name in names])
    except (UndescribedError, KeyError, RecursionError):
        return "", []


def slice_of(plan: Plan, part: PlanPart) -> tuple[Slice, list[StepGroup]] | None:
    """What to open for a part, and the groups whose tensors it computes; None where the plan does not say that."""
    groups = _groups_of(plan, part.file, part)
    if groups is None:
        return None
    wanted = [(step.source, step.source_offset, step.source_offset + step.nbytes) for step in part.steps if step.source]
    wanted += [(name, *one) for group in groups for name, ranges in group.reads.items() for one in ranges]
    # An adapter that has no part in these tensors is opened too, for a change of its own: without any it would be none.
    folders = {_folder(name) for name, _, _ in wanted}
    for group in (one for groups_of in plan.slices.values() for one in groups_of):
        for name in group.reads:
            if _folder(name) not in folders:
                folders |= set(map(_folder, group.reads))
                wanted += [(other, *one) for other, ranges in group.reads.items() for one in ranges]
                break
    return Slice(frozenset(plan.inputs), joined(wanted)), groups


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _groups_of(plan: Plan, file: PlannedFile, part: PlanPart) -> list[StepGroup] | None:
    held = plan.slices.get(file.name)
    if held is None or file.verbatim is not None:
        return None
    places = [index for index, step in enumerate(file.steps) if part.start <= step.offset < part.stop]
    computed = [index for index in places if file.steps[index].source is None]
    if part.whole:
        computed = [index for index, step in enumerate(file.steps) if step.source is None]
    if not computed:
        return []
    low, high = computed[0], computed[-1] + 1
    groups = [group for group in held if group.overlaps(low, high)]
    covered = {index for group in groups for index in range(group.first, group.first + group.count)}
    return groups if covered >= set(computed) and all(group.digest for group in groups) else None
