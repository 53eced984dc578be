"""Files with adapters of several models: the parts of a pipeline, of which a base is one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from adapterkit.adapters.config import PARTS, AdapterConfig
from adapterkit.checkpoint.tensor import Renamed
from adapterkit.errors import AdapterError, TargetError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from adapterkit.adapters.adapter import Adapter
    from adapterkit.checkpoint.tensor import Tensor


def selected(adapter: Adapter, fit: Callable[[Adapter], object] | None) -> Adapter:
    """The adapter of one part: the one that fits the base as a whole, or the only one.

    Args:
        adapter: its config has, under `PARTS`, the config of each part, and the keys of its tensors begin with a part.
        fit: puts one part onto the base, and raises TargetError where it does not fit; None where there is no base.

    Raises:
        TargetError: no part fits the base, or several do.
        UsageError: several parts, and no base is given.
        AdapterError, UnsupportedAdapter: a part could not be merged into any base.
    """
    parts = list(adapter.config.raw[PARTS])
    if len(parts) == 1:
        return _of(adapter, parts[0])
    listed = ", ".join(part or "one without a name" for part in parts)
    if fit is None:
        raise UsageError(f"{adapter.ref} is for several parts of a pipeline ({listed})", "name one with --base")
    fitting, misfits = [], []
    for part in parts:
        try:
            fit(_of(adapter, part))
            fitting.append(part)
        except TargetError as error:
            misfits.append(f"of {part or 'the one without a name'}, {error.message.removeprefix(f'{adapter.ref}: ')}")
    if len(fitting) == 1:
        return _of(adapter, fitting[0])
    if fitting:
        raise TargetError(
            f"{adapter.source.name}: its parts {' and '.join(fitting)} have modules of the same names and shapes as the base",
            f"name the one to merge, as {adapter.ref}#{fitting[0]}, or several that go together, as "
            f"{adapter.ref}#{'+'.join(fitting)}",
        )
    raise TargetError(
        f"none of the parts of {adapter.source.name} fits the base: {'; '.join(misfits)}",
        "give the folder of one of these parts as the base",
    )


def named(adapter: Adapter, only: Sequence[str]) -> Adapter:
    """The adapter of the part that a user named.

    Raises:
        AdapterError: there is no such part, or several were named.
    """
    check_parts(only, adapter.config.raw[PARTS], adapter.ref)
    if len(only) > 1:
        raise AdapterError(f"{adapter.ref} names several parts of a diffusers file", "merge them one after the other")
    return _of(adapter, only[0])


def check_parts(only: Iterable[str], parts: Iterable[str], where: str) -> None:
    """Whether a file has the parts that a user named.

    Raises:
        AdapterError: it has not.
    """
    held = [part for part in parts if part]
    lost = next((part for part in only if part not in held), None)
    if lost is not None:
        hint = f"it holds {', '.join(held)}" if held else "its keys name no part of a pipeline; leave it out"
        raise AdapterError(f"{where}: the file has no part '{lost}'", hint)


def _of(adapter: Adapter, part: str) -> Adapter:
    lead = part + "." if part else ""
    parts = adapter.config.raw[PARTS]
    tensors: dict[str, Tensor] = {}
    for key, tensor in adapter.tensors.items():
        if max((one for one in parts if key.startswith(one + ".")), key=len, default="") == part:
            name = key.removeprefix(lead)
            tensors[name] = Renamed(name, tensor)
    return replace(adapter, config=AdapterConfig(dict(parts[part]), adapter.config.where), tensors=tensors)
