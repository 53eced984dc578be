"""What the classes of embeddings in the installed ``transformers`` do besides a lookup, for ``tools/make_classes.py``.

Every subclass of ``torch.nn.Embedding`` in a modeling file is found by its source. An instance of it, from a tiny model,
is run on a batch of tokens: with weights W, with 2 W, and with W + D. What PEFT computes live for factors whose product is D
is the module's answer for W plus the rows of D (times ``embed_scale``, where the module has one), so that is compared with
the answer for W + D. Kinds:

* plain: both are the same;
* scaled: they are the same with ``embed_scale``;
* normed: the answer for 2 W is not twice that for W;
* row: they differ for the token alone whose number the module keeps (an attribute ``*_token_index``);
* positions: they differ for every token, or the module does not take tokens.
"""

from __future__ import annotations

import ast
import copy
import sys
from pathlib import Path
from typing import Any

TOKENS = 11


def subclasses() -> dict[str, str]:
    """Name of every subclass of ``nn.Embedding`` -> the folder of its modeling file."""
    import transformers.models

    found: dict[str, str] = {}
    for file in sorted(Path(transformers.models.__file__).parent.glob("*/modeling_*.py")):
        names = {"nn.Embedding", "torch.nn.Embedding", "Embedding"}
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and names & {ast.unparse(base) for base in node.bases}:
                names.add(node.name)
                found[node.name] = file.parent.name
    return found


def kind_of(module: Any) -> str:
    """The kind of an embedding, by running a copy of it."""
    import torch

    module = copy.deepcopy(module).to_empty(device="cpu").float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in (*module.parameters(), *module.buffers()):
            if value.is_floating_point():
                value.requires_grad_(False).normal_(1, 0.3, generator=generator)
    # A number that a tiny vocabulary has; ours are not the first ones, which may be padding.
    special = [name for name in vars(module) if name.endswith("_token_index")]
    for name in special:
        setattr(module, name, 5)
    ids = torch.arange(2, 2 + TOKENS)[None].flip(1)
    w, d = module.weight.detach().clone(), torch.randn(module.weight.shape, generator=generator)
    scale = getattr(module, "embed_scale", None)

    def answer(weight: Any) -> Any:
        module.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
        with torch.no_grad():
            return module(ids)

    try:
        one, twice, changed = answer(w), answer(2 * w), answer(w + d)
        live = one + d[ids] * (1 if scale is None else scale)
    except Exception:
        return "positions"  # it wants a shape, or more than tokens
    wrong = ~torch.isclose(live, changed, rtol=1e-4, atol=1e-5).all(-1)
    if not wrong.any():
        return "plain" if scale is None else "scaled"
    if special and bool((wrong == (ids == 5)).all()):
        return "row"
    return "positions" if torch.allclose(twice, 2 * one, rtol=1e-4, atol=1e-5) else "normed"


def embeddings() -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Class -> kind, and model type -> the last two names of a module's path -> class, of those that are not plain."""
    from make_names import meta, model_classes
    from transformers import PreTrainedModel

    known = subclasses()
    kinds: dict[str, str] = {}
    places: dict[str, dict[str, str]] = {}
    for name, cls in sorted(model_classes().items()):
        if cls.__module__.split(".")[2] not in set(known.values()):
            continue
        try:
            model = meta(cls)
        except Exception as error:
            print(f"make_classes: {name} not built ({type(error).__name__}: {str(error)[:80]})", file=sys.stderr)
            continue
        modules = dict(model.named_modules())
        owners = [path for path, module in modules.items() if isinstance(module, PreTrainedModel)]
        for path, module in modules.items():
            sort = type(module).__name__
            if sort not in known:
                continue
            if sort not in kinds:
                kinds[sort] = kind_of(module)
            if kinds[sort] == "plain":
                continue
            inside = [owner for owner in owners if not owner or path.startswith(owner + ".")]
            owner = modules[max(inside, key=len)]
            places.setdefault(owner.config.model_type, {})[".".join(path.split(".")[-2:])] = sort
    unseen = sorted(set(known) - set(kinds))
    if unseen:
        print(f"make_classes: embeddings in no model that was built: {', '.join(unseen)}", file=sys.stderr)
    return (
        dict(sorted({**dict.fromkeys(unseen, "unseen"), **kinds}.items())),
        {kind: dict(sorted(rows.items())) for kind, rows in sorted(places.items())},
    )
