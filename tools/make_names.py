"""Write ``adapterkit/adapters/names.json``: how checkpoints name what a module tree calls otherwise.

The facts come from the installed ``transformers`` (Apache-2.0): its checkpoint conversion tables, and, for every model
class, which sub-models it holds (the tables are scoped to them), its ``base_model_prefix`` and its tied weights.
Classes are built on the meta device, so no weights are made. Run it after a new release of transformers, with pillow
and timm installed (what cannot be built is written as far as its class tells):

    python tools/make_names.py [--check]
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "adapterkit" / "adapters" / "names.json"
sys.path.insert(0, str(ROOT))


def needle(pattern: str) -> str:
    """The longest text that every match of ``pattern`` contains: a name without it needs no regex."""
    from re import _parser  # type: ignore[attr-defined]

    runs = [""]

    def walk(items: Any) -> None:
        for op, value in items:
            name = str(op)
            if name == "LITERAL":
                runs[-1] += chr(value)
            elif name == "SUBPATTERN":
                walk(value[3])
            elif name not in ("AT", "ASSERT", "ASSERT_NOT"):
                runs.append("")

    walk(_parser.parse(pattern))
    return max(runs, key=len)


def branches(transform: Any) -> list[list[str]]:
    """``[needle, regex, replacement]`` of each source of a renaming, in the order in which the loader tries them."""
    found = []
    for index, source in sorted(enumerate(transform.source_patterns), key=lambda item: -len(item[1])):
        regex = source.replace("*.", r".*\.")
        if re.search(r"[a-zA-Z0-9]$", regex):
            regex += r"(?!\w)"
        found.append([needle(regex), regex, transform.target_patterns[min(index, len(transform.target_patterns) - 1)]])
    return found


# Parts of a fused tensor that are sized as query, key and value heads, and those whose sizes the config says otherwise:
# each size is a sum of products. Checked against the module's own parameters when the table is made.
HEADS = {("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v")}
_KEYS, _VALUES = ["linear_num_key_heads", "linear_key_head_dim"], ["linear_num_value_heads", "linear_value_head_dim"]
SIZES = {
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"): [
        [[2, *_KEYS], _VALUES],
        [_VALUES],
        [["linear_num_value_heads"]],
        [["linear_num_value_heads"]],
    ]
}


def operation(op: Any, targets: list[str]) -> list[Any]:
    """An op as ``[name, *arguments]``; names are explained in ``adapterkit/adapters/layout.py``."""
    name = type(op).__name__
    if name == "MergeModulelist" and op.dim == 0:
        return ["stack"]
    if name == "Concatenate":
        return ["cat", op.dim]
    if name == "Chunk" and op.num_shards_attribute is None:
        return ["chunk", op.dim]
    if name == "Split":
        leaves = tuple(target.rpartition(".")[2] for target in targets)
        return ["split", op.dim] if leaves in HEADS else ["sizes", op.dim, SIZES[leaves]]
    if name == "Inkling2UnpadVocab" and not op.inverse:
        return ["first", "unpadded_vocab_size"]
    if name == "Inkling2LoopDequantizeExperts":
        return ["only"]
    if name == "Inkling2LoopMergeMessageQueries" and not op.inverse:
        return ["queries"]
    if name == "Interleave" and not op.inverse:
        return ["deinterleave", op.dim]
    if name == "Transpose":
        return ["transpose", op.dim0, op.dim1, op.check_dims]
    if name == "PermuteForRope" and not op.inverse:
        return ["rope", op.subconfig_key, op.permute_layer_names]
    if name == "ErnieFuseAndSplitTextVisionExperts" and (op.stack_dim, op.concat_dim) == (0, 1):
        return ["deal"]
    raise SystemExit(
        f"make_names: {name} {vars(op)} is a new kind of operation: teach it to adapterkit/adapters/layout.py"
    )


def rule(transform: Any) -> Any:
    """One table entry: a list for a renaming, an object for everything else."""
    name = type(transform).__name__
    if name == "WeightConverter":
        return {
            "from": [[needle(s), s] for s, *_ in sources(transform)],
            "to": list(transform.target_patterns),
            "ops": [operation(op, list(transform.target_patterns)) for op in transform.operations],
        }
    if name == "GroupWeightRename":
        return {"group": [[*branch] for branch in branches(transform)], "guard": transform.source_patterns[0]}
    if name == "Inkling2IndexOffsetWeightRename":
        (branch,) = branches(transform)
        return {"offset": transform.offset, "rename": branch}
    if name == "LayerPairCollapse":
        pattern = transform.pattern.pattern
        parts = [transform.rename_source_key(f"layers.{index}.mixer")[0].rpartition(".")[2] for index in (0, 1)]
        own = re.search(r"\(([\w|]+)\)\(\?=", pattern)
        leaves = own.group(1).split("|") if own else []
        renamed: dict[str, set[str]] = {}
        for leaf in leaves:
            made = (transform.rename_source_key(f"layers.{index}.{leaf}")[0] for index in (0, 1))
            renamed[leaf] = {one.rpartition(".")[2] for one in made}
        named = {leaf: there.pop() for leaf, there in renamed.items() if len(there) == 1}
        return {"rename": [needle(pattern), pattern, ""], "paired": parts, "named": named}
    if name not in ("WeightRenaming", "PrefixChange"):
        raise SystemExit(f"make_names: {name} is a new kind of transform: teach it to adapterkit/adapters/names.py")
    found = branches(transform)
    return found[0] if len(found) == 1 else {"any": [[n, r, transform.target_patterns[0]] for n, r, _ in found]}


def sources(transform: Any) -> list[tuple[str, str]]:
    found = []
    for source in transform.source_patterns:
        regex = source.replace("*.", r".*\.")
        found.append((regex + r"(?!\w)" if re.search(r"[a-zA-Z0-9]$", regex) else regex, source))
    return found


def model_classes() -> dict[str, Any]:
    """Every concrete model class of transformers, by name."""
    import transformers.models
    from transformers import PreTrainedModel

    found = {}
    for file in sorted(Path(transformers.models.__file__).parent.glob("*/modeling_*.py")):
        name = f"transformers.models.{file.parent.name}.{file.stem}"
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            print(f"make_names: {name} left out ({error})", file=sys.stderr)
            continue
        for key, value in vars(module).items():
            ours = isinstance(value, type) and issubclass(value, PreTrainedModel) and value.__module__ == name
            if ours and value.config_class is not None and not key.endswith("PreTrainedModel"):
                found[key] = value
    return found


def subconfig(config: Any, model_type: str, path: str) -> str:
    """The key of the sub-config that a sub-model at ``path`` was built from, '' when it is the parent's own."""
    keys = [k for k, v in vars(config).items() if getattr(v, "model_type", None) == model_type and k.endswith("config")]
    if len(keys) > 1:
        keys.sort(key=lambda k: -sum(word in path for word in k.removesuffix("_config").split("_")))
    return keys[0].removeprefix("_") if keys else ""


def children(model: Any) -> list[list[str]]:
    """``[path, class, sub-config key]`` of the sub-models of ``model`` that are not inside another sub-model."""
    from transformers import PreTrainedModel

    found: list[list[str]] = []
    for path, module in model.named_modules():
        if path and isinstance(module, PreTrainedModel) and not any(path.startswith(f[0] + ".") for f in found):
            found.append([path, type(module).__name__, subconfig(model.config, module.config.model_type, path)])
    return found


def stacked(model: Any) -> set[str]:
    """Leaf names of three-dimensional ``.weight`` parameters that are stacked matrices, not convolutions."""
    import torch

    conv = torch.nn.modules.conv._ConvNd
    return {
        ".".join(f"{path}.{name}".split(".")[-2:])
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and name == "weight" and not isinstance(module, conv)
    }


def ties(found: Any) -> dict[str, str]:
    """Start of a tied name (a pattern) -> start of the name it is stored under (text)."""
    made = {}
    for target, source in found.items() if isinstance(found, dict) else ():
        source = re.sub(r"\(\?!.*?\)$", "", source).removeprefix("^").removesuffix("$")
        if "(" in source:  # the same part of the module tree on both sides
            target, source = target[: target.index("(")], source[: source.index("(")]
        if "shared_transf" in source:  # Zamba: blocks that recur, where the config says; `*` is worked out with it
            block = "shared_transf" + source.partition("shared_transf")[2]
            target, source = rf"layers\.\d+\.{block}", f"layers.*.{block}"
        made[target.removeprefix("^")] = source.replace("\\", "")
    return made


def meta(cls: Any) -> Any:
    """An instance of ``cls`` without weights: tiny where the zoo can make it, else with its default config."""
    import torch

    from bench.common import zoo

    with torch.device("meta"):
        try:
            return zoo.make(cls)
        except Exception:
            return cls(cls.config_class())


def turned(model: Any) -> set[str]:
    """Leaf names of experts stored ``[experts, in, out]``, which is what transformers' ``is_transposed`` says."""
    return {
        ".".join(f"{path}.{name}".split(".")[-2:])
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if getattr(module, "is_transposed", False) and parameter.dim() == 3
    }


def build() -> dict[str, Any]:
    from transformers import conversion_mapping
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    same = dict(conversion_mapping._MODEL_TO_CONVERSION_PATTERN)
    table = conversion_mapping._build_checkpoint_conversion_mapping()
    rules = {key: [rule(t) for t in entries] for key, entries in table.items()}
    same = {key: base for key, base in same.items() if rules[key] == rules[base]}  # some have an entry of their own
    rules = {key: entries for key, entries in rules.items() if key not in same}

    classes: dict[str, Any] = {}
    prefixes: dict[str, str] = {}
    for name, cls in model_classes().items():
        entry: dict[str, Any] = {
            "type": cls.config_class.model_type,
            "prefix": cls.base_model_prefix,
            "in": [],
        }
        entry["tied"] = ties(cls._tied_weights_keys)
        try:
            model = meta(cls)
            entry["in"] = children(model)
            entry["tied"] = ties(model._tied_weights_keys)  # some classes fill it in for each instance
            entry["stacked"], entry["turned"] = sorted(stacked(model)), sorted(turned(model))
        except Exception as error:
            print(f"make_names: {name} not built ({type(error).__name__}: {str(error)[:100]})", file=sys.stderr)
            base = getattr(importlib.import_module(cls.__module__), re.sub(r"(For|With)[A-Z]\w*$", "Model", name), None)
            if base is not None and base is not cls and entry["prefix"]:
                entry["in"] = [[entry["prefix"], base.__name__, ""]]
        classes[name] = entry
        prefixes[entry["type"]] = prefixes.get(entry["type"]) or entry["prefix"]

    known = set(rules) | set(same)
    types = {}
    for model_type, value in MODEL_MAPPING_NAMES.items():
        auto = value if isinstance(value, str) else value[0]
        if auto in classes:
            types[model_type] = [auto, classes[auto]["prefix"] or prefixes[classes[auto]["type"]]]
    # keep what resolution needs: sub-models whose subtree has a rule or a tie, or whose class depends on the config
    needed: dict[str, bool] = {}

    def needs(name: str) -> bool:
        if name not in needed:
            entry = classes.get(name)
            needed[name] = False
            if entry is not None:
                needed[name] = (
                    name in known
                    or entry["type"] in known
                    or bool(entry["tied"])
                    or any(key or needs(child) for _, child, key in entry["in"])
                )
        return needed[name]

    packed: dict[str, list[Any]] = {}
    for name, entry in sorted(classes.items()):
        inside = [c for c in entry["in"] if c[2] or needs(c[1])]
        row = [entry["type"], entry["prefix"], inside, entry["tied"], entry.get("stacked", []), entry.get("turned")]
        while row and not row[-1]:
            row.pop()
        packed[name] = row
    # a class that says no more than its model type does is left out
    plain = {
        name
        for name, row in packed.items()
        if len(row) <= 2 and name not in known and classes[name]["type"] not in known
    }
    for name in sorted(plain):
        base, prefix = types.get(classes[name]["type"], ["", ""])
        if prefix == classes[name]["prefix"] and (base in plain or base not in packed):
            del packed[name]
    return {
        "about": {
            "source": f"transformers {version('transformers')}: conversion_mapping.py, core_model_loading.py, models/",
            "copyright": "The HuggingFace Inc. team",
            "license": "Apache-2.0",
            "made by": "tools/make_names.py",
        },
        "rules": rules,
        "same": same,
        "types": types,
        "classes": packed,
    }


def text(data: dict[str, Any]) -> str:
    """JSON with one entry a line, so that a new release of transformers gives a readable diff."""
    parts = []
    for key, value in data.items():
        if isinstance(value, dict):
            rows = ",\n".join(
                f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'), ensure_ascii=False)}" for k, v in value.items()
            )
            parts.append(f"{json.dumps(key)}: {{\n{rows}\n}}")
        else:
            parts.append(f"{json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail when the file is not what would be written")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    made = text(build())
    if arguments.check:
        return 0 if OUT.exists() and OUT.read_text(encoding="utf-8") == made else 1
    OUT.write_text(made, encoding="utf-8")
    print(f"{OUT.relative_to(ROOT)}: {len(made)} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
