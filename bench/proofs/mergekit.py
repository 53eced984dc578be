"""Recipes of mergekit, merged by mergekit itself and by `adapterkit build`, and compared tensor by tensor.

    python -m bench proofs mergekit [--only WORD]

Needs mergekit (0.1.5; `pip install --no-deps mergekit immutables` beside the test extra). Models are tiny Llamas, one base
and three moved from it, in float32. Printed is the largest difference as a part of the largest change. Methods with random
masks are not here: their masks differ by design.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from bench.common import results

LIMIT = 1e-5  # of a difference, as a part of the largest change
GRADIENT = [0, 0.5, 0.3, 0.7, 1]
BY_FILTER = [
    {"filter": "self_attn", "value": GRADIENT},
    {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
    {"value": 0.5},
]
WEIGHTS = [0.5, 1.0, 0.3]


def recipe(method: str, *, count: int = 3, base: bool = True, each: Any = None, **shared: Any) -> dict[str, Any]:
    """A recipe of ``count`` models; ``each`` gives the parameters of model k."""
    models = [{"model": f"m{k + 1}", "parameters": {} if each is None else each(k)} for k in range(count)]
    found: dict[str, Any] = {"merge_method": method, "models": models, "dtype": "float32"}
    if base:
        found["base_model"] = "base"
    if shared:
        found["parameters"] = shared
    return found


def weighted(k: int) -> dict[str, Any]:
    return {"weight": WEIGHTS[k]}


def cases() -> dict[str, dict[str, Any]]:
    """Name: recipe."""
    found = {
        "linear": recipe("linear", base=False, each=weighted),
        "linear, gradients that add up to 1": recipe(
            "linear", count=2, base=False, each=lambda k: {"weight": [0.2, 0.9] if k else [0.8, 0.1]}
        ),
        "task_arithmetic": recipe("task_arithmetic", each=weighted, **{"lambda": 0.7}),
        "task_arithmetic, normalized": recipe("task_arithmetic", each=weighted, normalize=True),
        "task_arithmetic, weights by layer and filter": recipe(
            "task_arithmetic", each=lambda k: {"weight": BY_FILTER if k else [0.1, 0.9]}
        ),
        "ties": recipe("ties", each=lambda k: {**weighted(k), "density": 0.4}),
        "ties, a density for each, not normalized": recipe(
            "ties", each=lambda k: {**weighted(k), "density": [0.3, 0.6, 0.9][k]}, normalize=False
        ),
        "ties, densities by layer": recipe("ties", each=lambda k: {**weighted(k), "density": [1, 0.7, 0.1]}),
        "breadcrumbs": recipe("breadcrumbs", each=lambda k: {**weighted(k), "density": 0.7, "gamma": 0.05}),
        "breadcrumbs, density 1": recipe("breadcrumbs", each=weighted),
        "breadcrumbs_ties": recipe("breadcrumbs_ties", each=lambda k: {**weighted(k), "density": 0.7}),
        "model_stock": recipe("model_stock"),
        "model_stock, by rows": recipe("model_stock", filter_wise=True),
        "sce": recipe("sce", select_topk=0.3),
        "sce, all": recipe("sce"),
        "slerp": recipe("slerp", count=1, t=0.4),
        "slerp, by layer and filter": recipe("slerp", count=1, t=BY_FILTER),
        "nuslerp": recipe("nuslerp", count=2, each=weighted),
        "multislerp": recipe("multislerp", each=weighted),
        "nuslerp of whole weights": recipe("nuslerp", count=2, base=False, each=weighted),
        "multislerp of whole weights": recipe("multislerp", base=False, each=weighted),
        "multislerp of whole weights, by layer": recipe(
            "multislerp", base=False, each=lambda k: {"weight": [[0.2, 1], 0.5, [1, 0]][k]}
        ),
        "karcher": recipe("karcher", base=False),
        "karcher, with a base": recipe("karcher", max_iter=5),
        "nearswap": recipe("nearswap", count=1, t=0.01),
        "arcee_fusion": recipe("arcee_fusion", count=1),
        "ram": recipe("ram", epsilon=0.03),
        "ramplus_tl": recipe("ramplus_tl", epsilon=0.03),
    }
    slices = recipe("slerp", count=1, t=0.5)
    sources = [{"model": name, "layer_range": [0, 4]} for name in ("base", "m1")]
    del slices["models"]
    found["slerp, as slices"] = {**slices, "slices": [{"sources": sources}]}
    return found


def make_models(folder: Path) -> None:
    """``base`` and ``m1`` to ``m3``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    base.save_pretrained(folder / "base")
    common = [0.02 * torch.randn(p.shape) for p in base.parameters()]
    for k in range(3):
        model = LlamaForCausalLM.from_pretrained(folder / "base")
        with torch.no_grad():
            for parameter, shared in zip(model.parameters(), common, strict=True):
                parameter.add_(shared + 0.03 * torch.randn(parameter.shape))
        model.save_pretrained(folder / f"m{k + 1}")


def by_mergekit(file: Path, out: Path) -> None:
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    config = MergeConfiguration.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    run_merge(config, str(out), MergeOptions(copy_tokenizer=False, quiet=True))


def compared(folder: Path, data: dict[str, Any]) -> tuple[float, int]:
    """The largest difference as a part of the largest change, and how many tensors there are."""
    import yaml
    from safetensors.torch import load_file

    import adapterkit

    file = folder / "recipe.yml"
    text = yaml.safe_dump(data)
    file.write_text(text, encoding="utf-8")
    absolute = folder / "absolute.yml"  # a name without a folder is a repository to mergekit
    names = re.compile(r"\b(base|m[123])$", re.MULTILINE)
    absolute.write_text(names.sub(lambda found: str(folder / found[0]), text), encoding="utf-8")
    by_mergekit(absolute, folder / "theirs")
    adapterkit.build(file, force=True)
    ours, theirs, base = (load_file(folder / name / "model.safetensors") for name in ("merged", "theirs", "base"))
    if ours.keys() != theirs.keys():
        raise SystemExit(f"other tensors: {ours.keys() ^ theirs.keys()}")
    change = max(float((theirs[name] - base[name]).abs().max()) for name in base)
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours) / change, len(ours)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="cases with this word")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print("| recipe | largest difference |")
    print("|---|---|")
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        make_models(folder)
        found = {}
        for name, data in cases().items():
            if options.only in name:
                found[name], _ = compared(folder, data)
                print(f"| {name} | {found[name]:.1e} |", flush=True)
    results.note(recipes=len(found), within=sum(off < LIMIT for off in found.values()))


if __name__ == "__main__":
    main()
