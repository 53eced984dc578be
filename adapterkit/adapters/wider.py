"""`leaving`: which modules leave the grid of a quantized base together, and what its config says of them.

Servers run some projections as one: query, key and value; gate and up; the experts of a layer. They load such a module only
when all its parts are stored alike, so that where one leaves the grid the others have to leave it too.

What servers run together is stated from how vLLM's and SGLang's documentation describes their fused layers; neither server
was run, and their sources were not read for it. transformers, which the tests run, asks only that the config names the modules.
"""

from __future__ import annotations

import json
import re
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.linear import linear_modules
from adapterkit.checkpoint.checkpoint import SideFile
from adapterkit.checkpoint.files import BytesFile
from adapterkit.codecs.table import CODECS, KEYS, SECTIONS, method_of, quantization

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from adapterkit.checkpoint.checkpoint import Checkpoint, StoredForm

# Last words of modules that servers run as one. A group too many makes the output larger, nothing else.
TOGETHER = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
    ("query", "key", "value"),
)
_EXPERT = re.compile(r"(.*\bexperts)(?:\.\d+)?\..*")
RECORD = "hf_quant_config.json"  # ModelOpt's own copy of its settings


def leaving(form: StoredForm, touched: Iterable[str]) -> list[str]:
    """The quantized weights that leave the grid when those of ``touched`` do, in the order of the checkpoint."""
    groups: dict[str, list[str]] = {}
    for name in form.weights:
        for group in groups_of(name):
            groups.setdefault(group, []).append(name)
    chosen = set(touched)
    for name in tuple(chosen):
        for group in groups_of(name):
            chosen.update(groups.get(group, ()))
    return [name for name in form.weights if name in chosen]


def fused_with(name: str) -> list[str]:
    """The fused projection that a weight is a part of in a server, if it is one; experts by themselves."""
    parent, _, leaf = name.removesuffix(".weight").rpartition(".")
    return [f"{parent} {'/'.join(group)}" for group in TOGETHER if leaf in group]


def groups_of(name: str) -> list[str]:
    """What a weight has to be stored alike with: the experts of its layer, or the parts of a fused projection."""
    module = name.removesuffix(".weight")
    expert = _EXPERT.fullmatch(module)
    if expert is not None:
        return [expert[1]]
    return fused_with(name)


def modules_of(names: Sequence[str]) -> list[str]:
    """The modules of weights, and the lists of experts that are among them."""
    found: dict[str, None] = {}
    for name in names:
        module = name.removesuffix(".weight")
        expert = _EXPERT.fullmatch(module)
        if expert is not None:
            found[expert[1]] = None
        found[module] = None
    return list(found)


def left_out(
    config: Mapping[str, Any], stored: Checkpoint, names: Sequence[str], weights: Iterable[str]
) -> dict[str, Any]:
    """A ``config.json`` that says which modules are not quantized.

    Args:
        config: of the base, with its ``quantization_config``.
        stored: the base.
        names: of the weights that leave the grid.
        weights: all that were quantized.
    """
    found = deepcopy(dict(config))
    said = quantization(found)
    if said is None:
        return found
    method = method_of(said)
    codec = next((codec for codec in CODECS if method in codec.methods), None)
    if codec is None or codec.leave is None:
        return found
    quantized = {name.removesuffix(".weight") for name in weights}
    plain = [module for module in linear_modules(stored.shapes, stored.config) if module not in quantized]
    modules = modules_of(names)
    for part in (found, *(found.get(section) for section in SECTIONS)):
        for key in KEYS:
            if (
                isinstance(part, dict)
                and isinstance(part.get(key), dict)
                and quantization({key: part[key]}) is not None
            ):
                codec.leave(part[key], modules, plain)
    return found


def patched_record(file: SideFile, names: Sequence[str]) -> SideFile:
    """ModelOpt's `hf_quant_config.json` with the modules that left the grid."""
    try:
        found = json.loads(file.bytes())
    except ValueError:
        return file
    settings = found.get("quantization") if isinstance(found, dict) else None
    if not isinstance(settings, dict):
        return file
    before = settings.get("exclude_modules") or []
    settings["exclude_modules"] = list(dict.fromkeys([*before, *modules_of(names)]))
    return SideFile(file.name, BytesFile(file.name, (json.dumps(found, indent=4) + "\n").encode()))
