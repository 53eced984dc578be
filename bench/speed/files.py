"""One LoRA file into one checkpoint file, of SDXL's and Flux's shapes, beside `cp`, diffusers and a plain loop in the same run.

    python -m bench speed files                       # a quarter of the models' width
    python -m bench speed files --width 1 --runs 3    # 6.6 GB (SDXL) and 24 GB (Flux); 4 times that in --dir

The base is a file in the original layout, with text encoders and VAE for SDXL, and the LoRA has kohya's keys: rank 16 on every
linear layer of the blocks. The loop does what kohya's `sdxl_merge_lora.py` does: load all, add `scale * up @ down` to each
weight, save all. diffusers takes the same weights as its own folder and the same LoRA in its own keys: `from_pretrained`,
`load_lora_adapter`, `fuse_lora`, `save_pretrained`; of SDXL the denoiser alone. Every run is a process of its own, seconds are
without imports, and the largest difference between our file and the loop's is shown in units in the last place.
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bench.common import results
from bench.common.shapes import HIGH_WATER
from bench.speed.merge import OURS, run

RANK, ALPHA = 16, 8.0
_BLOCKS = re.compile(r"\b(?:transformer_blocks|double_blocks|single_blocks)\.")

LOOP = (
    HIGH_WATER
    + """
import json, sys, time
from safetensors.torch import load_file, save_file
import torch
def merge(base, lora, out):
    tensors, factors = load_file(base), load_file(lora)
    flat = {n.removeprefix("model.diffusion_model.").removesuffix(".weight").replace(".", "_"): n for n in tensors}
    for key in factors:
        if key.endswith(".lora_down.weight"):
            module = key.removesuffix(".lora_down.weight")
            name, down, up = flat[module.removeprefix("lora_unet_")], factors[key], factors[module + ".lora_up.weight"]
            scale = float(factors[module + ".alpha"]) / down.shape[0]
            weight = tensors[name]
            tensors[name] = (weight.float() + scale * (up.float() @ down.float())).to(weight.dtype)
    save_file(tensors, out)
merge(sys.argv[4], sys.argv[5], sys.argv[6])
start = time.monotonic()
merge(sys.argv[1], sys.argv[2], sys.argv[3])
print(json.dumps({"imports": 0.0, "work": time.monotonic() - start, "memory": high_water()}))
"""
)

DIFFUSERS = (
    HIGH_WATER
    + """
import json, sys, time
import diffusers, torch
from safetensors.torch import load_file
def merge(base, lora, out, name):
    model = getattr(diffusers, name).from_pretrained(base, torch_dtype=torch.bfloat16)
    model.load_lora_adapter(load_file(lora), prefix=sys.argv[8])
    model.fuse_lora()
    model.unload_lora()
    model.save_pretrained(out)
merge(sys.argv[4], sys.argv[5], sys.argv[6], sys.argv[7])
start = time.monotonic()
merge(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[7])
print(json.dumps({"imports": 0.0, "work": time.monotonic() - start, "memory": high_water()}))
"""
)


def sdxl(width: float) -> tuple[str, dict[str, Any]]:
    channels = [max(32, int(c * width) // 32 * 32) for c in (320, 640, 1280)]
    return "UNet2DConditionModel", {
        "sample_size": 128,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": channels,
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [max(1, c // 64) for c in channels],
        "cross_attention_dim": max(32, int(2048 * width)),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }


def flux(width: float) -> tuple[str, dict[str, Any]]:
    heads = max(1, round(24 * width))
    said = {"num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": heads}
    return "FluxTransformer2DModel", {**said, "joint_attention_dim": 4096, "guidance_embeds": True}


def encoders(width: float) -> dict[str, tuple[int, ...]]:
    """Shapes of SDXL's text encoders and VAE under the leads of its file; they are only copied."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    one = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    two = CLIPTextConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280
    )
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    if width < 1:
        one.num_hidden_layers, two.num_hidden_layers = 1, 1
    with torch.device("meta"):
        models = {
            "conditioner.embedders.0.transformer.": CLIPTextModel(one),
            "conditioner.embedders.1.model.": CLIPTextModelWithProjection(two),
            "first_stage_model.": AutoencoderKL(block_out_channels=[128, 256, 512, 512], layers_per_block=2, **blocks),
        }
    return {lead + name: tuple(t.shape) for lead, model in models.items() for name, t in model.state_dict().items()}


def filled(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).bfloat16() * 0.02
    found = {}
    for name, shape in shapes.items():
        count = torch.Size(shape).numel()
        found[name] = block.repeat(-(-count // len(block)))[:count].view(shape).clone()
    return found


def write(root: Path, kind: str, width: float) -> None:
    """A base in both layouts (`folder`, `base.safetensors`) and a LoRA in both styles of keys (`own.`, `lora.safetensors`)."""
    import diffusers

    import adapterkit

    name, said = (sdxl if kind == "sdxl" else flux)(width)
    root.mkdir(parents=True)
    with torch.device("meta"):
        model = getattr(diffusers, name)(**said)
    folder, base = root / "folder", root / "base.safetensors"
    folder.mkdir()
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    save_file(filled(shapes), folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    model.save_config(folder)
    adapterkit.convert(folder, base, to="comfyui")
    with safe_open(base, "pt") as file:
        names = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    if kind == "sdxl":
        whole = {f"model.diffusion_model.{key.removeprefix('model.diffusion_model.')}": key for key in names}
        with safe_open(base, "pt") as file:
            tensors = {new: file.get_tensor(key) for new, key in whole.items()}
        save_file(tensors | filled(encoders(width)), root / "all.safetensors")
        (root / "all.safetensors").replace(base)
        names = {new: names[key] for new, key in whole.items()}
    generator, factors = torch.Generator().manual_seed(1), {}
    for key, shape in names.items():
        if len(shape) == 2 and key.endswith(".weight") and _BLOCKS.search(key):
            module = key.removeprefix("model.diffusion_model.").removesuffix(".weight").replace(".", "_")
            factors[f"lora_unet_{module}.lora_down.weight"] = torch.randn(RANK, shape[1], generator=generator) * 0.05
            factors[f"lora_unet_{module}.lora_up.weight"] = torch.randn(shape[0], RANK, generator=generator) * 0.05
            factors[f"lora_unet_{module}.alpha"] = torch.tensor(ALPHA)
    save_file({key: tensor.half() for key, tensor in factors.items()}, root / "lora.safetensors")
    adapterkit.convert(root / "lora.safetensors", root / "own.safetensors", to="diffusers", base=folder)


def differs(one: Path, other: Path) -> float:
    """The largest difference of two bfloat16 files, in units in the last place of the larger value."""
    worst = 0.0
    with safe_open(one, "pt") as a, safe_open(other, "pt") as b:
        for name in a.keys():  # noqa: SIM118
            x, y = a.get_tensor(name).float(), b.get_tensor(name).float()
            step = torch.maximum(x.abs(), y.abs()).clamp(min=1e-30).log2().floor().exp2() * 2.0**-7
            worst = max(worst, float(((x - y).abs() / step).max()))
    return worst


def copied(base: Path, out: Path) -> dict[str, float]:
    start = time.monotonic()
    subprocess.run(["cp", base, out], check=True)
    return {"imports": 0.0, "work": time.monotonic() - start, "memory": 0.0}


def measured(root: Path, kind: str, width: float, runs: int) -> None:
    for folder, size in ((root / kind, width), (root / f"{kind}-first", min(width, 0.05))):
        if not folder.exists():
            write(folder, kind, size)
    here, first = root / kind, root / f"{kind}-first"
    out, loop, theirs = (here / name for name in ("out.safetensors", "loop.safetensors", "fused"))
    name, prefix = (sdxl if kind == "sdxl" else flux)(width)[0], "unet" if kind == "sdxl" else "transformer"

    def words(base: str, lora: str, target: Path, small: Path) -> list[str]:
        return [str(p) for p in (here / base, here / lora, target, first / base, first / lora, small)]

    small = first / "out.safetensors"
    kinds: dict[str, tuple[Callable[[], dict[str, float]], Path]] = {
        "cp": (lambda: copied(here / "base.safetensors", out), out),
        "adapterkit": (lambda: run(OURS, *words("base.safetensors", "lora.safetensors", out, small), "0"), out),
        "plain loop": (lambda: run(LOOP, *words("base.safetensors", "lora.safetensors", loop, small)), loop),
        f"diffusers {_version('diffusers')}, fuse_lora and save": (
            lambda: run(DIFFUSERS, *words("folder", "own.safetensors", theirs, first / "fused"), name, prefix),
            theirs,
        ),
    }
    times: dict[str, list[dict[str, float]]] = {word: [] for word in kinds}
    for _ in range(runs):
        for word, (go, made) in kinds.items():
            times[word].append(go())
            _removed(first / "fused", small, small.with_name(f"{small.name}.adapterkit.json"))
            if word in ("cp", f"diffusers {_version('diffusers')}, fuse_lora and save"):
                _removed(made)
        apart = differs(out, loop)
        _removed(out, out.with_name(f"{out.name}.adapterkit.json"), loop)
    size = (here / "base.safetensors").stat().st_size
    plain = statistics.median(one["work"] for one in times["cp"])
    for word, found in times.items():
        seconds = statistics.median(one["work"] for one in found)
        memory = max(one["memory"] for one in found) / 1e9
        shown = f"{memory:.2f}" if memory else ""
        results.row(f"{kind}, {size / 1e9:.2f} GB", word, f"{seconds:.2f}", f"{seconds / plain:.2f}", shown)
    results.note(**{f"{kind}_ulps": apart, f"{kind}_bytes": size})
    if apart > 1.0:
        raise SystemExit(f"{kind}: our file and the loop's are {apart} units in the last place apart")


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def _removed(*paths: Path) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--width", type=float, default=0.25, help="of the models' channels; 1 is their own size")
    parser.add_argument("--kinds", nargs="+", choices=["sdxl", "flux"], default=["sdxl", "flux"])
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm/adapterkit-files"))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--keep", action="store_true", help="leave the models for another run")
    options = parser.parse_args()
    results.head("file", "how", "seconds", "times cp", "peak memory, GB")
    for kind in options.kinds:
        measured(options.dir, kind, options.width, options.runs)
        if not options.keep:
            _removed(options.dir / kind, options.dir / f"{kind}-first")
    if not options.keep:
        _removed(options.dir)


if __name__ == "__main__":
    main()
