"""A quantized base comes out in its own layout: three facts for every layout that is read, by family.

    python -m bench --save layouts proofs layouts [--only gptq ...]    # hqq and torchao are used where they are installed

For each layout a folder of two quantized layers, norms and embeddings in two files with an index, made by the format's own
library or by the published layout that the table names:

* an adapter that changes nothing gives the folder again, byte for byte, all files;
* an adapter on one layer leaves every other tensor, the config and the index as they are;
* the touched weight is what the library (or the published rule) makes of the float32 sum, byte for byte. Where the rule is
  not deterministic over libraries (bitsandbytes nests its offsets by a mean), numbers in JSON may differ by 1e-7.

Exits with 1 where one does not hold.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "codecs"))

import stored_formats as made
import test_keep as keep
import torch
from stored_formats import FORMATS, Format, Stored

from adapterkit import merge
from adapterkit.checkpoint.decoded import dequantized
from adapterkit.checkpoint.open import open_checkpoint
from bench.common import results

Layouts = dict[str, Format]


def some(*names: str) -> Layouts:
    """Layouts of the tests."""
    return {name: FORMATS[name] for name in names}


def changed(name: str, change: Callable[[Stored], Stored], config: dict[str, Any] | None = None) -> Format:
    """A layout of the tests with other names, shapes or config."""
    base = FORMATS[name]
    return replace(base, encode=lambda weight: change(base.encode(weight)), config=config or base.config)


def fp8() -> Layouts:
    def static(found: Stored) -> Stored:
        return {
            "weight": found["weight"],
            "weight_scale_inv": found["weight_scale"],
            "activation_scale": found["input_scale"],
        }

    return {
        **some("fp8 blocks", "fp8 short blocks", "fp8 rows", "fp8 tensor", "mxfp8"),
        "rows in a list": changed("fp8 rows", lambda f: {**f, "weight_scale": f["weight_scale"].view(-1)}),
        "one scale in a list": changed("fp8 tensor", lambda f: {**f, "weight_scale": f["weight_scale"].view(1)}),
        "static": changed("fp8 tensor", static, {"quant_method": "fp8", "activation_scheme": "static"}),
    }


def modelopt() -> Layouts:
    said = {"quant_method": "modelopt", "quant_algo": "FP8"}
    return {**some("modelopt nvfp4"), "modelopt fp8": changed("fp8 tensor", lambda found: found, said)}


def compressed() -> Layouts:
    found = some(*(name for name in FORMATS if name.startswith("ct ")))
    for bits in range(2, 9):
        for symmetric in (True, False):
            for grid, how in (
                ((1, 32), {"strategy": "group", "group_size": 32}),
                ((1, keep.IN), {"strategy": "channel"}),
            ):
                args = {"num_bits": bits, "type": "int", "symmetric": symmetric, **how}
                found[f"int{bits} {symmetric} {how['strategy']}"] = made.compressed("pack-quantized", grid, **args)
    return found


def gptq() -> Layouts:
    settings = [
        (bits, order, symmetric, version)
        for bits in (2, 3, 4, 8)
        for order in (False, True)
        for symmetric in (False, True)
        for version in (1, 2)
    ]
    found = {
        f"{bits} bits, order {order}, symmetric {symmetric}, version {version}": made.gptq(
            bits, order=order, symmetric=symmetric, version=version
        )
        for bits, order, symmetric, version in settings
    }
    return {**found, **some("gptq uneven")}


def bitsandbytes() -> Layouts:
    def blocks(kind: str, size: int, storage: torch.dtype) -> Format:
        def encode(weight: torch.Tensor) -> Stored:
            import bitsandbytes.functional as bnb

            codes, state = bnb.quantize_4bit(weight, quant_type=kind, blocksize=size, quant_storage=storage)
            state.dtype = torch.bfloat16
            return {
                "weight": codes,
                **{f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()},
            }

        config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
        return Format(encode, config)

    found = {f"nf4 {size}": blocks("nf4", size, torch.uint8) for size in (32, 128, 256, 512)}
    found["nf4 in bf16"] = blocks("nf4", 64, torch.bfloat16)
    found["fp4 in f32"] = blocks("fp4", 64, torch.float32)
    return {**some("nf4", "nf4 double", "fp4", "int8"), "fp4 double": made.bnb4("fp4", double=True), **found}


def hqq() -> Layouts:
    """Layers of hqq itself; none without it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
        except ImportError:
            return {}

    def layer(bits: int, axis: int) -> Format:
        def encode(weight: torch.Tensor) -> Stored:
            plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            plain.weight.data = weight.clone()
            how = BaseQuantizeConfig(nbits=bits, group_size=32, axis=axis)
            linear = HQQLinear(plain, how, compute_dtype=torch.float32, device="cpu")
            return {name: value for name, value in linear.state_dict().items() if isinstance(value, torch.Tensor)}

        return Format(encode, keep.HQQ)

    return {f"{bits} bits, axis {axis}": layer(bits, axis) for bits in (2, 3, 4, 8) for axis in (0, 1)}


def torchao() -> Layouts:
    """The published rule, and torchao itself where it is installed."""
    found = some("torchao int8", "torchao float8")
    try:
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError:
        return found

    def saved(how: Any) -> Format:
        def encode(weight: torch.Tensor) -> Stored:
            linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight.data = weight.clone()
            model = torch.nn.Sequential(linear)
            quantize_(model, how())
            flat, _ = flatten_tensor_state_dict(model.state_dict())
            return {name.removeprefix("0."): tensor for name, tensor in flat.items()}

        return Format(encode, FORMATS["torchao int8"].config)

    return {**found, "saved int8": saved(Int8WeightOnlyConfig), "saved float8": saved(Float8WeightOnlyConfig)}


def mlx() -> Layouts:
    sizes = [(bits, size) for bits in (2, 3, 4, 5, 6, 8) for size in (32, 64)]
    return {
        **{f"{bits} bits, groups of {size}": made.mlx("affine", bits, size) for bits, size in sizes},
        **some("mlx mxfp4", "mlx mxfp8", "mlx nvfp4"),
    }


# family: what it is called, what made its folders, and its layouts
FAMILIES: dict[str, tuple[str, str, Callable[[], Layouts]]] = {
    "fp8": ("FP8 and MXFP8", "transformers (blocks, MXFP8); layouts of Qwen and fbgemm", fp8),
    "modelopt": ("FP8 and NVFP4 of ModelOpt", "layout of ModelOpt 0.47", modelopt),
    "compressed-tensors": ("compressed-tensors", "compressed-tensors 0.20", compressed),
    "gptq": ("GPTQ", "layout of AutoGPTQ and GPTQModel 7.7", gptq),
    "awq": ("AWQ", "layout of AutoAWQ 0.2.9", lambda: some("awq")),
    "bitsandbytes": ("bitsandbytes", "bitsandbytes 0.50", bitsandbytes),
    "hqq": ("HQQ", "hqq 0.2.8", hqq),
    "torchao": ("torchao", "torchao 0.18 and its layout", torchao),
    "comfyui": ("FP8 of ComfyUI", "layout of ComfyUI, quant_ops.py", lambda: some("comfy", "comfy scale_weight")),
    "mlx": ("MLX", "mlx 0.32", mlx),
}


def facts(name: str) -> Iterator[bool]:
    """The three facts of one layout of `FORMATS`, in order."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        base = keep.base_of(folder, name)
        rows, columns = keep.shape_of(base)
        (folder / "none").mkdir()
        nothing = keep.adapter_of(folder / "none", torch.zeros(rows, 4), columns)
        merge(base, [nothing], folder / "same", quant="keep", yes_lossy=True)
        yield bool(keep.raw(folder / "same") == keep.raw(base))
        b = torch.randn(rows, 4, generator=torch.Generator().manual_seed(8)) * 0.02
        tuned = keep.adapter_of(folder, b, columns)
        handle = dequantized(open_checkpoint(base))[f"{keep.TOUCHED}.weight"]
        w = handle.read_wide(0, handle.numel).view(rows, columns).float()
        key = f"base_model.model.{keep.TOUCHED}.lora_A.weight"
        a = keep.load_file(tuned / "adapter_model.safetensors")[key]
        merge(base, [tuned], folder / "out", quant="keep", yes_lossy=True)
        before, after = keep.stored(base), keep.stored(folder / "out")
        texts = all(
            (folder / "out" / file).read_bytes() == (base / file).read_bytes()
            for file in ("config.json", "model.safetensors.index.json")
        )
        rest = [one for one in before if not one.startswith(keep.TOUCHED)]
        yield texts and before.keys() == after.keys() and all(keep.same(after[one], before[one]) for one in rest)
        wanted = FORMATS[name].encode(torch.addmm(w, b, a))
        yield all(_alike(after[f"{keep.TOUCHED}.{leaf}"], tensor, leaf) for leaf, tensor in wanted.items())


def _alike(got: torch.Tensor, wanted: torch.Tensor, leaf: str) -> bool:
    if "quant_state" not in leaf:
        return bool(keep.same(got, wanted))
    said, meant = (json.loads(bytes(one.tolist())) for one in (got, wanted))
    near = abs(said.pop("nested_offset", 0) - meant.pop("nested_offset", 0)) <= 1e-7
    return bool(near and said == meant)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=FAMILIES, help="families")
    chosen = parser.parse_args().only or list(FAMILIES)
    torch.set_num_threads(1)
    failed: list[str] = []
    count = 0
    facts_of = ("nothing changed: the folder again", "other tensors untouched", "touched: as the library writes it")
    results.head("format", "made by", "layouts", *facts_of)
    for family in chosen:
        title, by, layouts = FAMILIES[family]
        found = layouts()
        held = [0, 0, 0]
        for name, layout in found.items():
            FORMATS[name] = layout
            count += 1
            for at, fact in enumerate(facts(name)):
                held[at] += fact
                if not fact:
                    failed.append(f"{family}, {name}, not so: {facts_of[at]}")
        results.row(title, by, str(len(found)), *map(str, held))
    results.note(layouts=count, failed=len(failed))
    for line in failed:
        print(line)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
