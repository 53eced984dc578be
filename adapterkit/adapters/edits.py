"""From an adapter's keys to edits of a base: every tensor is used, declared ignorable, or an error that names it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.change import replace
from adapterkit.adapters.config import COMMON_FIELDS
from adapterkit.adapters.heads import ADDED, may_resize
from adapterkit.adapters.method import GIVE_BASE, Context, Edit, Method, Module
from adapterkit.adapters.methods import METHODS, UNMERGEABLE
from adapterkit.adapters.orientation import check_squares
from adapterkit.adapters.target import Piece, Target
from adapterkit.errors import AdapterError, TargetError, UnsupportedAdapter, option

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adapterkit.adapters.adapter import Adapter
    from adapterkit.adapters.names import Names
    from adapterkit.checkpoint.tensor import Tensor

WRAPPED = "base_layer"
TOKEN_WRAPPED = "token_adapter.base_layer"


def method_of(adapter: Adapter) -> Method:
    """The method of an adapter.

    Raises:
        UnsupportedAdapter: it cannot be folded into weights.
        AdapterError: it is not one we know.
    """
    kind = adapter.config.peft_type
    if kind in UNMERGEABLE:
        why, instead = UNMERGEABLE[kind]
        raise UnsupportedAdapter(f"{adapter.ref} cannot be merged ({kind}): {why}", instead)
    if kind not in METHODS:
        known = ", ".join(sorted(METHODS))
        raise AdapterError(f"{adapter.ref} is of unknown type {kind!r}", f"adapterkit knows {known}; update it")
    return METHODS[kind]


def check_config(adapter: Adapter, *, residual_base: bool = False, allow_unknown: bool = False) -> Method:
    """The method, once the config says nothing that we do not understand.

    Raises:
        UnsupportedAdapter, AdapterError
    """
    method = method_of(adapter)
    reason = method.refuse(adapter.config, residual_base)
    if reason is not None:
        raise UnsupportedAdapter(f"{adapter.ref} cannot be merged: {reason[0]}", reason[1])
    unknown = adapter.config.unknown_fields(method.fields | COMMON_FIELDS)
    if unknown and not allow_unknown:
        version = adapter.config.get("peft_version", "unknown")
        raise AdapterError(
            f"{adapter.config.where} has fields that may change the formula and are not known here: "
            f"{', '.join(unknown[:5])} (PEFT {version})",
            f"update adapterkit, or add {option('allow_unknown', True)} if you know that they do not matter",
        )
    return method


def group_modules(adapter: Adapter, method: Method) -> tuple[tuple[Module, ...], dict[str, Tensor]]:
    """The adapter's tensors by module, and those that are whole parameters of the model."""
    modules: dict[tuple[str, int], dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    suffixes = sorted(method.suffixes, key=len, reverse=True)
    ends, ignored = tuple(f".{suffix}" for suffix in suffixes), tuple(f".{part}." for part in method.ignored)
    for key, tensor in adapter.tensors.items():
        if (method.shared and is_shared(key, method)) or (ignored and any(part in f".{key}." for part in ignored)):
            continue
        suffix = next((suffix for suffix, end in zip(suffixes, ends, strict=True) if key.endswith(end)), None)
        if suffix is None:
            whole[key] = tensor
            continue
        path, depth = _unwrapped(key[: -len(suffix) - 1])
        name = "lora_magnitude_vector" if suffix == "lora_magnitude_vector.weight" else suffix
        modules.setdefault((path, depth), {})[name] = tensor
    found = []
    for (path, depth), tensors in modules.items():
        for name in ("weight", "bias"):
            inner = whole.get(f"{path}.{WRAPPED}.{name}")
            if inner is not None:
                tensors[f"{WRAPPED}.{name}"] = inner
        found.append(Module(path, depth, tensors))
    return tuple(found), whole


def is_shared(key: str, method: Method) -> bool:
    """Whether a tensor belongs to all modules of the method."""
    return any(key == name or key.startswith(name + ".") for name in method.shared)


def _check_one_method(whole: Mapping[str, Tensor], method: Method, adapter: Adapter) -> None:
    """Whether every tensor is this method's own or a parameter of the model, not another method's.

    Raises:
        AdapterError: the file mixes methods, or its config belongs to other weights.
    """
    for key in whole:
        for other in METHODS.values():
            for name in (*other.suffixes, *other.shared):
                if key == name or key.endswith("." + name):
                    raise AdapterError(
                        f"{adapter.source.name}: '{key}' belongs to {other.peft_type} and the config says "
                        f"{method.peft_type}",
                        "save each method as an adapter of its own, with its own config",
                    )


def _unwrapped(path: str) -> tuple[str, int]:
    """A module path without PEFT's wrappers, and how many stood at its end."""
    if WRAPPED not in path:
        return path, 0
    parts = path.split(".")
    depth = 0
    while parts and parts[-1] == WRAPPED:
        parts.pop()
        depth += 1
    return ".".join(part for part in parts if part != WRAPPED), depth


def settle(adapter: Adapter, names: Names | None, config: Mapping[str, Any]) -> Adapter:
    """An adapter of a single file as it goes onto the base with these ``names``; any other as it is.

    Raises:
        TargetError, UsageError: see `adapterkit.adapters.formats.parts.settled`.
    """
    if adapter.contents is None:
        return adapter
    from adapterkit.adapters.formats.parts import settled

    if names is None:
        return settled(adapter, None)
    # What a user has to allow is asked when the part is merged.
    return settled(
        adapter, names, lambda part: adapter_edits(part, names, config, residual_base=True, allow_unknown=True)
    )


def adapter_edits(
    adapter: Adapter,
    names: Names,
    config: Mapping[str, Any],
    *,
    residual_base: bool = False,
    allow_unknown: bool = False,
) -> list[Edit]:
    """Every edit that an adapter makes.

    Raises:
        TargetError: a tensor has no target, or the shapes do not fit.
        AdapterError, UnsupportedAdapter: see `check_config`.
    """
    adapter = settle(adapter.fitted(names, config), names, config)
    method = check_config(adapter, residual_base=residual_base, allow_unknown=allow_unknown)
    if not adapter.tensors:
        raise AdapterError(f"{adapter.source.name} holds no tensors", "save the adapter again")
    modules, whole = group_modules(adapter, method)
    _check_one_method(whole, method, adapter)
    shared = {key: one for key, one in adapter.tensors.items() if is_shared(key, method)} if method.shared else {}
    context = Context(adapter, names, str(config.get("model_type", "")), residual_base, modules, shared)
    edits = [_whole_edit(key, tensor, context, config) for key, tensor in whole.items()]
    unresolved: list[TargetError] = []
    for module in modules:
        try:
            edits += method.edits(module, context)
        except TargetError as error:
            unresolved.append(error)
    if unresolved:
        first = unresolved[0]
        more = f" (and {len(unresolved) - 1} more modules)" if len(unresolved) > 1 else ""
        # One weight of another size has many reasons; that none of several fits has one.
        other = 1 < len(modules) == len(unresolved) and all(one.hint == GIVE_BASE for one in unresolved)
        raise TargetError(first.message + more, "this adapter was trained on another base" if other else first.hint)
    check_squares(context, edits)
    return edits


def _whole_edit(key: str, tensor: Tensor, context: Context, config: Mapping[str, Any]) -> Edit:
    """A parameter that the adapter stores whole: `modules_to_save`, trained biases, a resized embedding."""
    wrapped = f".{WRAPPED}." in key
    plain = key.replace(f".{TOKEN_WRAPPED}.", ".")
    parameter = ".".join(part for part in plain.split(".") if part != WRAPPED)
    saved = context.config.names("modules_to_save")
    asked = any(_within(parameter, module) for module in saved)
    try:
        target = context.target(parameter, key)
    except TargetError:
        if not asked:
            raise
        # A head that the base does not have, trained from nothing.
        name = context.names.stored_name(parameter, "")
        target = Target(parameter, tensor.shape, (Piece(name, max(tensor.shape[0] if tensor.shape else 1, 1)),))
        return Edit(target, replace(tensor, ADDED), override=True)
    sized = asked and may_resize(parameter, target.shape, tensor.shape, context.adapter, config)
    if target.shape != tensor.shape and not sized and not _grown(target.shape, tensor.shape, config):
        raise TargetError(
            f"{context.where}: '{key}' is {list(tensor.shape)} and {parameter} is {list(target.shape)}",
            "this adapter was trained on another base",
        )
    # PEFT saves some base tensors by itself (a resized embedding, say): they replace the base's. Tensors of modules in
    # modules_to_save were trained.
    return Edit(target, replace(tensor), override=wrapped or not asked)


def _within(parameter: str, module: str) -> bool:
    return re.search(rf"(?:^|\.){re.escape(module)}\.", parameter) is not None


def _grown(old: tuple[int, ...], new: tuple[int, ...], config: Mapping[str, Any]) -> bool:
    """Whether the difference is a vocabulary of another size: only the first dimension, and only where it counts tokens."""
    sizes = {part.get("vocab_size") for part in (config, *config.values()) if hasattr(part, "get")}
    sizes = {size for size in sizes if isinstance(size, int)}
    return len(old) == len(new) and old[1:] == new[1:] and any(old[0] >= size > 0 for size in sizes)
