"""Write ``adapterkit/adapters/mlx_models.json``: which tensors of a model type mlx-lm quantizes, and what it calls them.

For each model type that transformers and mlx-lm both have, a tiny random model (`bench.common.zoo`) is saved and loaded by
mlx-lm (MIT); its parameters are found again by their values, so nothing is read from its source. A type has a row when

* each tensor of the file is one parameter of mlx-lm's, as it is, under its own name or another, or one expert of a stack;
* each parameter of mlx-lm's comes from the file;
* what ``adapterkit convert --to mlx-4bit-g32`` writes is loaded by mlx-lm to the same parameters, byte for byte, as its own
  ``quantize_model`` gives.

The others are listed with the first of these that fails. Run it after a new release of mlx-lm, on a machine for which mlx has
a build:

    python tools/make_mlx_models.py [--only TYPE] [--check]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "adapterkit" / "adapters" / "mlx_models.json"
sys.path.insert(0, str(ROOT))

# MLX and torch each bring their own threads, so mlx-lm runs in a process of its own.
CHILD = """
import json, sys
from pathlib import Path
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, quantize_model

def params(model):
    return {name: value for name, value in tree_flatten(model.parameters())}

for line in sys.stdin:
    asked = json.loads(line)
    try:
        folder = Path(asked["folder"])
        model, config = load_model(folder)
        if "save" in asked:
            mx.save_safetensors(asked["save"], params(model))
        answer = {}
        if "quantized" in asked:
            predicate = getattr(model, "quant_predicate", None)
            modules = tree_flatten(model.leaf_modules(), is_leaf=lambda m: isinstance(m, nn.Module))
            layers = {}
            for path, module in modules:
                if hasattr(module, "to_quantized"):
                    layers[path] = True if predicate is None else predicate(path, module)
            answer["layers"] = layers
            model, config = quantize_model(model, config, 32, 4)
            mx.save_safetensors(asked["quantized"], params(model))
            answer["config"] = config["quantization"]
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"[:200]}
    print("ANSWER " + json.dumps(answer), flush=True)
"""

WIDE = dict.fromkeys(
    ("hidden_size", "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_hidden_size"),
    64,
) | dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_intermediate_size", "expert_ffn_hidden_size"), 64)
WIDE |= {"head_dim": 16}
# Fields without a default that published configs have and that transformers 5 does not write.
PUBLISHED: dict[str, dict[str, Any]] = {
    "apertus": {"mlp_bias": False, "post_norm": False, "qk_norm": True},
    "exaone4": {"rope_scaling": None},
    "glm4_moe": {"rope_scaling": None},
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.25},
}


class Mlx:
    """The child that runs mlx-lm."""

    def __enter__(self) -> Mlx:
        self.child = subprocess.Popen(
            [sys.executable, "-c", CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        return self

    def ask(self, **words: Any) -> dict[str, Any]:
        if self.child.poll() is not None:  # a model of mlx-lm's that ends the process
            self.__enter__()
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        self.child.stdin.write(json.dumps({key: str(value) for key, value in words.items()}) + "\n")
        self.child.stdin.flush()
        for line in self.child.stdout:
            if line.startswith("ANSWER "):
                answer: dict[str, Any] = json.loads(line[7:])
                return answer
        self.child.wait()
        raise RuntimeError("mlx-lm's process ended")

    def __exit__(self, *_: object) -> None:
        self.child.terminate()
        self.child.wait()


def types() -> list[str]:
    """Model types of causal language models that mlx-lm has a file for, under this name or one it maps it to."""
    import mlx_lm

    from bench.common import zoo

    folder = Path(mlx_lm.__file__).parent
    mapped = re.findall(r'^    "([\w-]+)": "[\w-]+",', (folder / "utils.py").read_text(), re.M)
    there = {file.stem for file in (folder / "models").glob("*.py")} | set(mapped)
    known = zoo.kinds()
    return sorted(name for name in known["causal"] if name in there)


def pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def row_of(stored: dict[str, Any], params: dict[str, Any], layers: dict[str, Any], tied: bool) -> dict[str, Any] | str:
    """The row of a type, or why it has none."""
    import torch

    def key(tensor: Any) -> tuple[Any, ...]:
        return (tuple(tensor.shape), tensor.double().sum().item(), tensor.flatten()[:3].double().tolist().__repr__())

    places: dict[Any, list[str]] = {}
    for name, value in stored.items():
        places.setdefault(key(value), []).append(name)
    renamed: dict[str, str] = {}
    stacked: dict[str, str] = {}
    used: set[str] = set()
    for name, value in params.items():
        own = places.get(key(value), [])
        if own:
            source = name if name in own else own[0]
            used.add(source)
            if source != name:
                renamed[pattern(source)] = pattern(name)
            continue
        if value.ndim == 3:
            found = [places.get(key(one), [""])[0] for one in value]
            if all(found):
                used.update(found)
                whole = {pattern(one) for one in found}
                if len(whole) > 1:
                    return f"'{name}' is put together of {sorted(whole)}"
                stacked[whole.pop()] = pattern(name)
                continue
        return f"'{name}' has values that no tensor of the file has"
    dropped = [name for name in stored if name not in used and not (tied and name == "lm_head.weight")]
    if dropped:
        return f"'{dropped[0]}' is left out"
    assert torch is not None
    apart = {pattern(path): how for path, how in layers.items() if how is not True}
    plain = sorted({pattern(path) for path, how in layers.items() if how is True})
    if set(plain) & set(apart):
        return "layers of one kind are quantized in several ways"
    row: dict[str, Any] = {"layers": plain}
    row.update({key: value for key, value in (("apart", apart), ("renamed", renamed), ("stacked", stacked)) if value})
    return row


def _older(file: Path, config: Any) -> None:
    """The fields that published configs have and that transformers 5 writes elsewhere, where mlx-lm looks for them."""
    said = json.loads(file.read_text(encoding="utf-8"))
    for part, holder in ((said, config), (said.get("text_config"), config.get_text_config())):
        if not isinstance(part, dict):
            continue
        rope = part.get("rope_parameters")
        more = {key: getattr(holder, key) for key in holder.attribute_map if hasattr(holder, key)}
        more |= {"head_dim": getattr(holder, "head_dim", None) or holder.hidden_size // holder.num_attention_heads}
        for key, value in {"rope_theta": 10000.0, **(rope if isinstance(rope, dict) else {}), **more}.items():
            if key != "rope_type" and isinstance(value, (int, float, str, list)):
                part.setdefault(key, value)
        for key, value in PUBLISHED.get(said["model_type"], {}).items():
            part.setdefault(key, value)
        for old, new in (("n_ctx", "n_positions"), ("num_experts", "num_local_experts")):
            if new in part:
                part.setdefault(old, part[new])
    file.write_text(json.dumps(said), encoding="utf-8")


def look(name: str, mlx: Mlx, folder: Path) -> dict[str, Any] | str:
    """What is found of one type."""
    import torch
    from safetensors.torch import load_file

    from bench.common import zoo

    model, config = zoo.build(name)
    model.to(torch.bfloat16).save_pretrained(folder)
    _older(folder / "config.json", config)
    (folder / "plain").mkdir()
    stored = {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}
    said = mlx.ask(folder=folder, save=folder / "plain" / "p.safetensors", quantized=folder / "plain" / "q.safetensors")
    if "error" in said:
        return f"mlx-lm: {said['error']}"
    tied = bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
    return row_of(stored, load_file(folder / "plain" / "p.safetensors"), said["layers"], tied)


def held(mlx: Mlx, folder: Path) -> str:
    """Why what adapterkit writes is not what mlx-lm writes; empty where it is."""
    import torch
    from safetensors.torch import load_file

    from adapterkit import convert

    out = folder.with_name("ours")
    shutil.rmtree(out, ignore_errors=True)
    try:
        convert(folder, out=out, to="mlx-4bit-g32")
    except Exception as error:
        return f"adapterkit: {error}"
    said = mlx.ask(folder=out, save=folder / "plain" / "o.safetensors")
    if "error" in said:
        return f"mlx-lm does not load what is written: {said['error']}"
    ours, theirs = load_file(folder / "plain" / "o.safetensors"), load_file(folder / "plain" / "q.safetensors")
    if set(ours) != set(theirs):
        return f"other parameters: {sorted(set(ours) ^ set(theirs))[:4]}"
    wrong = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
    return f"'{wrong[0]}' differs, and {len(wrong) - 1} more" if wrong else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--check", action="store_true", help="compare with the file, write nothing")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    before = json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {}
    rows, refused = dict(before.get("types", {})), dict(before.get("refused", {}))
    from bench.common import zoo

    zoo.SMALL.update(WIDE)  # groups of 64 are in some rows, whatever is asked
    with Mlx() as mlx:
        for name in asked.only or types():
            with tempfile.TemporaryDirectory() as place:
                scratch = Path(place) / "model"
                rows.pop(name, None)
                refused.pop(name, None)
                try:
                    found = look(name, mlx, scratch)
                except Exception as error:
                    found = f"{type(error).__name__}: {str(error)[:120]}"
                if isinstance(found, dict):
                    from adapterkit.adapters import mlx_models

                    mlx_models.rows.cache_clear()
                    mlx_models.GIVEN[name] = found
                    found = held(mlx, scratch) or found
                    mlx_models.GIVEN.clear()
                (rows if isinstance(found, dict) else refused)[name] = found
                print(name, "ok" if isinstance(found, dict) else found, flush=True)
    made = {
        "source": f"mlx-lm {version('mlx-lm')}, transformers {version('transformers')}; tools/make_mlx_models.py",
        "types": dict(sorted(rows.items())),
        "refused": dict(sorted(refused.items())),
    }
    if asked.check:
        sys.exit(0 if made["types"] == before.get("types") else "mlx_models.json differs")
    OUT.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
