"""The keys of an adapter's file as module paths: without PEFT's prefix, wrappers of training, and the adapter's name.

A module that training wrapped is a module of the wrapper's in the state dict, so the wrapper's attribute stands in every
key below it. None of these attributes is a module of a model's own, so taking them out loses nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from adapterkit.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from adapterkit.adapters.method import Method

    Item = TypeVar("Item")

PREFIX = "base_model.model."

# Attribute of a wrapper, wherever it stands in a key -> what wraps so.
WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_fpw_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Lightning",
}
# Attributes that models use too, so they are wrappers only in front of the whole model.
LEADING = {"module": "data parallelism", "model": "a training class", "pretrained_model": "TRL's value head"}

# What Tinker and transformers call the output layer.
UNEMBED, OUTPUT = "unembed_tokens", "lm_head"

# Tensors that all modules share and that PEFT keeps several of: whether the name of one stands in front of the adapter's.
_SEVERAL = {"frod_V": True, "frod_s_indices": True, "frod_s_size": True, "tinylora_v": False}


def plain_keys(
    stored: Mapping[str, Item], where: str, method: Method | None = None
) -> tuple[dict[str, Item], tuple[str, ...]]:
    """The same values by module path and the part of the module, and what a user should know about the keys.

    Args:
        stored: by the keys of the file.
        where: the file, for errors.
        method: the adapter's, where it is known: in whose tensors' keys an adapter's name may stand.

    Raises:
        AdapterError: two keys mean the same.
    """
    unwrapped, wrappers = _unwrapped(stored)
    found: dict[str, Item] = {}
    bare, named, twice, tinker = 0, 0, 0, 0
    shared = () if method is None else tuple(name for name in method.shared if name not in method.ignored)
    for name, value in stored.items():
        key = unwrapped[name]
        if key.startswith(PREFIX):
            key = key.removeprefix(PREFIX)
            twice += key.startswith(PREFIX)
            while key.startswith(PREFIX):  # saved through a PeftModel in a PeftModel
                key = key.removeprefix(PREFIX)
        elif key.startswith("base_model."):
            key = key.removeprefix("base_model.")  # tensors shared by all modules lie one level higher
        else:
            bare += 1
        copied = next((name for name in shared if f".{name}." in key), None)
        if copied is not None:  # a state dict has what all modules share once more in each of them
            key = key[key.index(f".{copied}.") + 1 :]
        plain = _without_adapter_name(key, method)
        named += plain != key
        plain, renamed = _output_layer(plain)
        tinker += renamed
        if plain in found and shared and plain.startswith(shared):
            continue
        if plain in found:
            raise AdapterError(f"{where} holds two tensors for '{plain}'", "it mixes several adapters; save one alone")
        found[plain] = value
    notes = []
    if wrappers:
        words = ", ".join(f"{name} ({by})" for name, by in wrappers.items())
        notes.append(f"its keys carry the names of training wrappers, which were dropped: {words}")
    if tinker:
        notes.append(f"{tinker} keys call the output layer {UNEMBED}, as Tinker does; read as {OUTPUT}")
    if twice:
        notes.append(f"{twice} keys carry the prefix base_model.model. twice; read as once")
    if bare:
        notes.append(f"{bare} keys lack the prefix base_model.model.; read as module paths")
    if named:
        notes.append(f"{named} keys carry an adapter's name, as in lora_A.default.weight; it was dropped")
    return found, tuple(notes)


def _unwrapped(keys: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Each key without wrappers, and the wrappers that were found with what makes them."""
    seen: dict[str, str] = {}
    found = {}
    for key in keys:
        if not any(map(key.__contains__, WRAPPERS)):
            found[key] = key
            continue
        parts = key.split(".")
        seen.update((part, WRAPPERS[part]) for part in parts if part in WRAPPERS)
        found[key] = ".".join(part for part in parts if part not in WRAPPERS)
    leading = tuple(f"{name}." for name in LEADING)
    for key, now in found.items():
        if not now.startswith(leading):
            continue
        *leads, rest = _split_leads(now)
        if leads and rest.startswith(PREFIX):
            found[key] = rest
            seen.update((name, LEADING[name]) for name in leads)
    # A class of the trainer's around the PEFT model, under whatever name.
    around = {now.partition(PREFIX)[0] if PREFIX in now else None for now in found.values()}
    if len(around) == 1 and (outer := around.pop()):
        seen[outer.rstrip(".")] = "a training class"
        found = {key: now.removeprefix(outer) for key, now in found.items()}
    # Data parallelism inside PEFT's wrapper, or around a model whose keys lack the prefix.
    for lead in (PREFIX, ""):
        inner = f"{lead}module."
        while found and all(key.startswith(inner) for key in found.values()):
            seen["module"] = LEADING["module"]
            found = {key: lead + now.removeprefix(inner) for key, now in found.items()}
    return found, seen


def _split_leads(key: str) -> list[str]:
    """The attributes of `LEADING` that a key starts with, and the rest of it."""
    found: list[str] = []
    while True:
        first, dot, rest = key.partition(".")
        if not dot or first not in LEADING:
            return [*found, key]
        found.append(first)
        key = rest


def _output_layer(key: str) -> tuple[str, bool]:
    """A key with the output layer's name in transformers, and whether it had another."""
    path, found, rest = key.partition(f"{UNEMBED}.")
    return (f"{OUTPUT}.{rest}", True) if found and path in ("", "model.") else (key, False)


def _without_adapter_name(key: str, method: Method | None) -> str:
    """A key as PEFT saves it, of one as a state dict has it: ``lora_A.NAME.weight``, ``ia3_l.NAME``."""
    parts = key.split(".")
    if "modules_to_save" in parts:
        at = parts.index("modules_to_save")
        return ".".join([*parts[:at], *parts[at + 2 :]]) if len(parts) > at + 2 else key
    if method is None:
        return key
    if parts[0] in method.shared:
        return ".".join([parts[0], *_own_part(parts[0], parts[1:])])
    if any(key.endswith(f".{suffix}") for suffix in method.suffixes):
        return key
    for suffix in method.suffixes:
        wanted = suffix.split(".")
        # The name stands behind any one of the suffix's parts.
        for behind in range(1, len(wanted) + 1):
            lead, tail = wanted[:behind], wanted[behind:]
            at = len(parts) - len(wanted) - 1
            if at > 0 and parts[at : at + behind] == lead and parts[at + behind + 1 :] == tail:
                short = suffix.removesuffix(".weight")  # what is no module any more when PEFT saves it
                return ".".join([*parts[:at], short if short in method.suffixes else suffix])
    return key


def _own_part(name: str, rest: list[str]) -> list[str]:
    """What stands behind the name of a shared tensor, without the adapter's name."""
    if name not in _SEVERAL:
        return rest[1:] if len(rest) == 1 else rest
    if len(rest) != 2:
        return rest
    return rest[:1] if _SEVERAL[name] else rest[1:]
