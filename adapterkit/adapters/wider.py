"""`leaving`: which modules leave the grid of a quantized base together, and what its config says of them.

Servers run some projections as one: query, key and value; gate and up; the experts of a layer. They load such a module only
when all its parts are stored alike, so that where one leaves the grid the others have to leave it too.

How they find what is not quantized, by their own code (neither server was run; transformers, which the tests run, asks only
that the config names the modules):

* vLLM, quantization/utils/quant_utils.py and SGLang, quantization/utils.py, both `is_layer_skipped` (FP8, ModelOpt), and
  `should_ignore_layer` of compressed_tensors/utils.py: the parts of the fused module stand in the list, all or none.
* vLLM, quantization/bitsandbytes.py: `is_layer_skipped_bnb`; utils/gptq_utils.py: `get_dynamic_override`; SGLang,
  quantization/awq.py: `is_layer_skipped_awq`: the fused module itself has to be named.
* vLLM, bitsandbytes.py and mxfp4.py, `get_quant_method`: experts are always taken as quantized, whatever a list says.
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
from adapterkit.errors import UsageError
from adapterkit.foreign import json_value

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from adapterkit.checkpoint.checkpoint import Checkpoint, StoredForm

# Last words of modules that servers run as one, and what servers call that one. A group too many makes the output larger,
# nothing else.
TOGETHER: dict[tuple[str, ...], tuple[str, ...]] = {
    ("q_proj", "k_proj", "v_proj"): ("qkv_proj",),
    ("gate_proj", "up_proj"): ("gate_up_proj",),
    ("w1", "w3"): ("gate_up_proj", "w13"),
    ("q_a_proj", "kv_a_proj_with_mqa"): ("fused_qkv_a_proj", "fused_qkv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"): ("in_proj_qkvz",),
    ("in_proj_b", "in_proj_a"): ("in_proj_ba",),
    ("query", "key", "value"): ("qkv_proj", "qkv"),
}
_EXPERT = re.compile(r"(.*\bexperts)(?:\.\d+)?\..*")
ALWAYS = ("bitsandbytes", "mxfp4")  # methods in which vLLM has no list for experts
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


def fused_modules(names: Sequence[str]) -> list[str]:
    """What servers call the fused modules that weights are parts of."""
    found: dict[str, None] = {}
    for name in names:
        parent, _, leaf = name.removesuffix(".weight").rpartition(".")
        for group, ones in TOGETHER.items():
            if leaf in group:
                found.update({f"{parent}.{one}": None for one in ones})
    return list(found)


def not_in_vllm(method: str, names: Sequence[str]) -> str | None:
    """What vLLM does not load of a model in which these weights left the grid, in a sentence; None where it is nothing."""
    if method in ALWAYS and any(_EXPERT.fullmatch(name.removesuffix(".weight")) for name in names):
        return f"vLLM takes all experts of a {method} model as quantized, so it does not load these; transformers does"
    return None


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
    modules = [*modules_of(names), *(fused_modules(names) if codec.fused else ())]
    for part in (found, *(found.get(section) for section in SECTIONS)):
        for key in KEYS:
            if (
                isinstance(part, dict)
                and isinstance(part.get(key), dict)
                and quantization({key: part[key]}) is not None
            ):
                codec.leave(part[key], modules, plain)
    return found


def check_fp8(form: StoredForm, names: Sequence[str]) -> None:
    """Whether weights can be FP8 beside the format of the base.

    Raises:
        UsageError: its config has no word for that, or a server does not run it.
    """
    method = method_of(quantization(form.checkpoint.config) or {})
    how = next((form.weights[name].how for name in names if _is_wide(form.weights[name].how)), None)
    if how is not None:
        raise UsageError(f"{form.checkpoint.ref} is {how} already, which fp8 does not widen", "use bf16")
    if names and method.startswith("modelopt"):
        raise UsageError(
            "FP8 beside NVFP4 in ModelOpt's layout (MIXED_PRECISION) has one scale for a whole weight and a calibrated one for "
            "its inputs, which a merge has no text for",
            "use bf16",
        )
    if names and not method.startswith("compressed"):
        raise UsageError(
            f"a config of '{method}' cannot name FP8 for some modules beside its own format; that of compressed-tensors can",
            "use bf16",
        )
    expert = next((name for name in names if _EXPERT.fullmatch(name.removesuffix(".weight"))), None)
    if expert is not None:
        raise UsageError(f"'{expert}' is an expert, and servers run no FP8 experts with 16-bit inputs", "use bf16")


def _is_wide(how: str) -> bool:
    """Whether a format has eight bits already."""
    return how.startswith(("fp8", "f8", "mxfp8", "int8", "i8"))


def in_fp8(config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """A ``config.json`` of compressed-tensors that has a group of its own for modules in FP8 with a scale per row.

    vLLM (compressed_tensors.py: `get_scheme_dict`) and compressed-tensors (`match_targets`) take the name of a module
    before its class; each group says its format where the whole is ``mixed-precision``.
    """
    found = deepcopy(dict(config))
    for part in (found, *(found.get(section) for section in SECTIONS)):
        for key in KEYS:
            said = part.get(key) if isinstance(part, dict) else None
            if not isinstance(said, dict) or quantization({key: said}) is None:
                continue
            groups = said.setdefault("config_groups", {})
            for group in groups.values():
                if isinstance(group, dict) and group.get("format") is None:
                    group["format"] = said.get("format")
            number = next(n for n in range(len(groups), 2 * len(groups) + 1) if f"group_{n}" not in groups)
            groups[f"group_{number}"] = {
                "targets": modules_of(names),
                "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False},
                "input_activations": None,
                "output_activations": None,
                "format": "float-quantized",
            }
            said["format"] = "mixed-precision"
    return found


def patched_record(file: SideFile, names: Sequence[str]) -> SideFile:
    """ModelOpt's `hf_quant_config.json` with the modules that left the grid."""
    try:
        found = json_value(file.bytes())
    except ValueError:
        return file
    settings = found.get("quantization") if isinstance(found, dict) else None
    if not isinstance(settings, dict):
        return file
    said = settings.get("exclude_modules")
    before = [one for one in said if isinstance(one, str)] if isinstance(said, list) else []
    settings["exclude_modules"] = list(dict.fromkeys([*before, *modules_of(names)]))
    return SideFile(file.name, BytesFile(file.name, (json.dumps(found, indent=4) + "\n").encode()))
