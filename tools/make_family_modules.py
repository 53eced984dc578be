"""Make `adapterkit/adapters/families/modules.json`: what adapters train in each family, with the sizes that were published.

For every class of diffusers that a family names: its modules with a matrix, how many blocks there are, and the rows and columns
of each in every published size. An adapter without a base is told by them where its names are those of several families.

    python tools/make_family_modules.py [--check]

Models are made on the meta device: no value is loaded. The sizes beside a class's defaults are those of its published configs.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from pathlib import Path
from typing import Any

from adapterkit.adapters.families.names import FAMILIES

OUT = Path(__file__).parents[1] / "adapterkit" / "adapters" / "families" / "modules.json"
NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")

# Published sizes, where they are not the class's defaults.
SIZES: dict[str, list[dict[str, Any]]] = {
    "FluxTransformer2DModel": [{"guidance_embeds": True}],
    "Flux2Transformer2DModel": [
        {},  # dev
        {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680},  # klein 4B
        {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288},  # klein 9B
    ],
    "HunyuanVideoTransformer3DModel": [{}, {"in_channels": 33}],
    "WanTransformer3DModel": [
        {},
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},  # 1.3B
        {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48},  # 5B
        {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},  # image to video
    ],
    "WanVACETransformer3DModel": [
        {},
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30, "vace_layers": list(range(0, 30, 2))},
    ],
    "LTXVideoTransformer3DModel": [
        {},
        {"attention_head_dim": 128, "cross_attention_dim": 4096, "num_layers": 48},  # 13B
    ],
    "SD3Transformer2DModel": [
        {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
        {
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
    ],
    "CosmosTransformer3DModel": [
        {"num_attention_heads": 16, "num_layers": 28},
        {"num_attention_heads": 40, "num_layers": 36},
        {"num_attention_heads": 32, "num_layers": 28},
    ],
    "HiDreamImageTransformer2DModel": [
        {
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "caption_channels": [4096, 4096],
            "llama_layers": [*range(32), *[31] * 16],
            "max_resolution": (128, 128),
        }
    ],
    "SanaTransformer2DModel": [
        {},
        {"num_layers": 60},
        {
            "num_attention_heads": 36,
            "num_layers": 28,
            "num_cross_attention_heads": 16,
            "cross_attention_head_dim": 72,
            "cross_attention_dim": 1152,
        },
    ],
}


def shapes_of(kind: Any, config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Rows and columns of every module with a matrix."""
    import torch

    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model = kind(**config)
    print(kind.__name__, file=sys.stderr)
    return {
        name.removesuffix(".weight"): (tensor.shape[0], tensor.shape[1])
        for name, tensor in model.state_dict().items()
        if name.endswith(".weight") and tensor.dim() > 1
    }


def gathered(models: list[dict[str, tuple[int, int]]]) -> dict[str, list[Any]]:
    """Modules with ``{}`` for a number that counts blocks: how many there are, and every size."""
    seen: dict[str, set[tuple[int, ...]]] = {}
    for name in (name for model in models for name in model):
        seen.setdefault(NUMBER.sub("#", name), set()).add(tuple(int(found) for found in NUMBER.findall(name)))
    found: dict[str, list[Any]] = {}
    for model in models:
        for name, shape in model.items():
            numbers = [int(one) for one in NUMBER.findall(name)]
            every = list(zip(*seen[NUMBER.sub("#", name)], strict=True))
            words = ["{}" if len(set(every[at])) > 1 else str(number) for at, number in enumerate(numbers)]
            pattern = "".join(text + word for text, word in zip(NUMBER.split(name), [*words, ""], strict=True))
            entry = found.setdefault(pattern, [0])
            counted = [number for at, number in enumerate(numbers) if len(set(every[at])) > 1]
            entry[0] = max(entry[0], *(number + 1 for number in counted)) if counted else 0
            if list(shape) not in entry[1:]:
                entry.append(list(shape))
    return dict(sorted(found.items()))


def made() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
    found: dict[str, Any] = {}
    for family in FAMILIES:
        models = [
            shapes_of(kind, config)
            for name in family.classes
            if (kind := getattr(diffusers, name, None)) is not None and not name.startswith(("CLIP", "UNet"))
            for config in SIZES.get(name, [{}])
        ]
        if models:
            found[family.name] = gathered(models)
    return found


def main() -> int:
    lines = []
    for family, modules in made().items():
        rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in modules.items())
        lines.append(f"{json.dumps(family)}: {{\n{rows}\n }}")
    text = "{\n " + ",\n ".join(lines) + "\n}\n"
    if "--check" in sys.argv:
        return int(OUT.read_text(encoding="utf-8") != text)
    OUT.write_text(text, encoding="utf-8")
    print(f"{OUT.name}: {len(lines)} families, {len(text)} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
