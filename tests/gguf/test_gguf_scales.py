"""Types of one, two and four bits that came last: their values, and the numbers that stand beside weights in NVFP4."""

from __future__ import annotations

import ctypes
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")
import numpy as np
import torch
from gguf_oracle import library
from gguf_runtime import Tiny, far, live, logprobs, lora
from models import make_adapter, read_tensors

import adapterkit
from adapterkit.errors import AdapterkitError, CheckpointError, UsageError
from adapterkit.gguf.checkpoint import open_gguf
from adapterkit.gguf.encode import decode, encode
from adapterkit.gguf.quantize import Quantization
from adapterkit.gguf.types import TYPES
from adapterkit.verbs.convert import convert

SMALL = ("Q1_0", "Q2_0", "NVFP4")


@pytest.mark.parametrize("name", SMALL)
def test_values_are_those_of_ggml(name: str) -> None:
    kind = TYPES[name]
    rows = np.random.default_rng(0).standard_normal((5, 256)).astype(np.float32)
    data = encode(name, rows)
    found = decode(name, data, 256)
    expected = np.empty_like(rows)
    function = getattr(library(), f"dequantize_row_{name.lower()}")
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    function(data.ctypes.data, expected.ctypes.data, rows.size)
    np.testing.assert_array_equal(found, expected)
    # Every code, with every scale that is a number.
    noise = np.random.default_rng(1).integers(0, 256, (64, kind.row_bytes(256)), dtype=np.uint8)
    for half in kind.halves:
        noise.reshape(-1, kind.size)[:, half + 1] &= 0x3F
    expected = np.empty((64, 256), dtype=np.float32)
    function(noise.ctypes.data, expected.ctypes.data, expected.size)
    np.testing.assert_array_equal(decode(name, noise, 256), expected)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("NVFP4", 3000.0, "too large for NVFP4"), ("Q2_0", 1e6, "too large for Q2_0"), ("Q1_0", float("nan"), "Q1_0")],
)
def test_weights_that_do_not_fit_are_refused(name: str, value: float, message: str) -> None:
    rows = np.zeros((2, 128), dtype=np.float32)
    rows[1, 3] = value
    with pytest.raises(CheckpointError, match=f"row 1, column.*{message}|row 1.*{message}|{message}"):
        encode(name, rows)


def scaled(base: Path, out: Path, expert_scales: bool = False) -> Path:
    """A GGUF model with its matrices in NVFP4, as the converter of llama.cpp makes it of a ModelOpt checkpoint."""
    from adapterkit.checkpoint.write import Writing, write_together
    from adapterkit.gguf.lora import PlannedFactor
    from adapterkit.gguf.metadata import kept
    from adapterkit.gguf.plan import FileLayout, plan_gguf
    from adapterkit.gguf.tensors import Quantized

    opened = open_gguf(base)
    tensors: list[Any] = []
    for number, (name, tensor) in enumerate(opened.items()):
        parts = ("attn_q.", "attn_k.", "attn_v.", "attn_output.", "ffn_up.", "_exps.")
        if not any(part in name for part in parts) or tensor.shape[-1] % 64:
            tensors.append(tensor)
            continue
        count = tensor.shape[0] if len(tensor.shape) > 2 else 1
        scales = torch.tensor([0.25 + 0.125 * number + 0.5 * one for one in range(count)])
        values = tensor.read(0, tensor.numel).float().view(count, -1) / scales[:, None]
        tensors.append(Quantized(PlannedFactor(name, values.view(tensor.shape), ""), TYPES["NVFP4"]))
        stem = name.removesuffix("weight")
        tensors.append(PlannedFactor(f"{stem}scale", scales, ""))
        tensors.append(PlannedFactor(f"{stem}input_scale", torch.ones(count), ""))
    planned = plan_gguf(FileLayout(tensors, kept(opened.header), 32, opened.sources[0]), request={})
    write_together([Writing(planned, {one.name: one for one in tensors}, opened.sources, out)], force=[False])
    return out


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_adapters_are_merged_into_what_the_scales_make_of_nvfp4(
    kind: str, tiny: Callable[[str], Tiny], tmp_path: Path
) -> None:
    base = scaled(tiny(kind).gguf, tmp_path / "nvfp4.gguf")
    assert "blk.0.attn_q.scale" in open_gguf(base)

    # A folder of the values that the runtime uses.
    convert(base, tmp_path / "hf", to="hf", dtype="f32")
    folder = read_tensors(tmp_path / "hf")
    assert not any("scale" in name for name in folder)
    scale = open_gguf(base)["blk.0.attn_v.scale"].read(0, 1).item()
    raw = open_gguf(base)["blk.0.attn_v.weight"]
    values = decode("NVFP4", raw.read(0, raw.numel).numpy(), raw.shape[-1])
    np.testing.assert_array_equal(folder["model.layers.0.self_attn.v_proj.weight"].numpy(), values * np.float32(scale))

    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if kind == "qwen3_moe" else []
    modules = ["q_proj", "k_proj", "v_proj", "o_proj"] + ([] if experts else ["up_proj", "down_proj"])
    config = lora(target_modules=modules, **({"target_parameters": experts} if experts else {}))
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "hf", config, scale=0.1)
    expected = live(tmp_path / "hf", adapter)

    with pytest.raises(UsageError, match="coarser than what it learnt"):
        adapterkit.merge(base, [adapter], tmp_path / "coarse.gguf")
    wide = Quantization(keep_touched="F32")
    adapterkit.merge(base, [adapter], tmp_path / "merged.gguf", quantization=wide)
    assert far(logprobs(tmp_path / "merged.gguf")[0], expected) < 2e-5
    assert open_gguf(tmp_path / "merged.gguf")["blk.0.attn_q.scale"].read(0, 1) == open_gguf(base)[
        "blk.0.attn_q.scale"
    ].read(0, 1)
    report = adapterkit.verify(tmp_path / "merged.gguf", base=base, adapters=[adapter])
    assert report.ok

    # llama.cpp adds a LoRA after the scale; the factors are those of any other base.
    convert(adapter, tmp_path / "one.gguf", to="gguf-lora", base=base)
    convert(adapter, tmp_path / "other.gguf", to="gguf-lora", base=tmp_path / "hf")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "other.gguf").read_bytes()


def test_a_scale_of_another_size_or_of_nothing(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    base = scaled(tiny("llama").gguf, tmp_path / "nvfp4.gguf")
    data = bytearray(base.read_bytes())
    tensor = open_gguf(base)["blk.1.attn_v.scale"]
    assert tensor.extent is not None
    data[tensor.extent.offset : tensor.extent.offset + 4] = struct.pack("<f", 0.0)
    (tmp_path / "zero.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"'blk.1.attn_v.scale' is 0, which no weight can be multiplied with"):
        convert(tmp_path / "zero.gguf", tmp_path / "hf", to="hf")
    assert not (tmp_path / "hf").exists()
    with pytest.raises(
        AdapterkitError, match=r"'blk\.0\.attn_q\.scale' has 3 numbers, and 'blk.0.attn_q.weight' has 1 matr"
    ):
        from gguf_files import random_array, write_gguf

        write_gguf(
            tmp_path / "odd.gguf",
            {"token_embd.weight": random_array(8, 64), "blk.0.attn_q.weight": random_array(64, 64)}
            | {"blk.0.attn_q.scale": random_array(3), "output_norm.weight": random_array(64)},
            metadata={"llama.block_count": 1},
        )
        convert(tmp_path / "odd.gguf", tmp_path / "odd", to="hf")
