"""`convert` from every stored format that is read to every one that is written, without adapters.

Values are the float64 formula of the stored ones through the target's own encoder; sizes, names, dtypes and shapes are
planned from headers alone and are what is written.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from stored_formats import FORMATS, compressed
from test_quantized_bad_input import SOURCES

from adapterkit import convert
from adapterkit.checkpoint.decoded import dequantized
from adapterkit.checkpoint.open import open_checkpoint
from adapterkit.codecs.encode import InStep
from adapterkit.codecs.table import KINDS
from adapterkit.dtypes import BY_LABEL, DType
from adapterkit.errors import UsageError
from adapterkit.verbs.convert import plan_convert

MODULE = "model.layers.0.self_attn.q_proj"
SHAPE = (128, 256)
ROWS = {"num_bits": 8, "strategy": "channel"}
MADE = FORMATS | {  # those whose tiles are whole rows or the whole weight
    "ct int8 rows": compressed("int-quantized", (1, SHAPE[1]), type="int", **ROWS),
    "ct int8 asym": compressed("int-quantized", (1, SHAPE[1]), type="int", symmetric=False, **ROWS),
    "ct fp8 rows": compressed("float-quantized", (1, SHAPE[1]), type="float", **ROWS),
    "ct fp8 tensor": compressed("float-quantized", SHAPE, num_bits=8, type="float", strategy="tensor"),
}
# The same numbers in the same layout: nothing to convert.
SAME = {
    ("fp8 blocks", "fp8"),
    ("fp8 short blocks", "fp8"),
    ("nf4", "nf4"),
    ("nf4 double", "nf4"),
    ("fp4", "fp4"),
    ("int8", "int8"),
    ("ct nvfp4", "nvfp4"),
    ("ct mxfp4", "mxfp4"),
    ("mlx", "mlx-4bit"),
    ("mlx 3 bit", "mlx-3bit-g32"),
    ("mlx 5 bit", "mlx-5bit-g32"),
    ("mlx mxfp4", "mlx-mxfp4"),
    ("mlx mxfp8", "mlx-mxfp8"),
    ("mlx nvfp4", "mlx-nvfp4"),
}


def base_of(folder: Path, name: str) -> Path:
    made = MADE[name]
    w = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)) * 0.05
    tensors = {f"{MODULE}.{leaf}": tensor.contiguous() for leaf, tensor in made.encode(w).items()}
    tensors["model.norm.weight"] = torch.ones(SHAPE[1], dtype=torch.bfloat16)
    base = folder / "base"
    base.mkdir()
    save_file(tensors, base / "model.safetensors")
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "hidden_size": 256}
    if made.config is not None:
        config["quantization_config"] = made.config
    (base / "config.json").write_text(json.dumps(config))
    return base


def stored_values(folder: Path) -> tuple[torch.Tensor, DType]:
    """As they are decoded, before they are rounded; and the dtype that they are rounded to."""
    handle = dequantized(open_checkpoint(folder))[f"{MODULE}.weight"]
    return handle.read_wide(0, handle.numel).view(handle.shape).float(), handle.dtype


def through(kind: str, w: torch.Tensor, dtype: DType) -> torch.Tensor:
    """decode(encode(W)) by the encoder alone, which tests/codecs/test_new_formats.py and test_keep.py hold."""
    encoder = KINDS[kind].encoder("w.weight", tuple(w.shape), dtype, False)
    assert encoder is not None
    if isinstance(encoder, InStep):
        encoder.largest = lambda: float(w.abs().max())
    return encoder.values(0, encoder.encode(0, w.float().reshape(-1), None)).view(w.shape)


@pytest.mark.parametrize("name", MADE)
def test_from_each_to_each(tmp_path: Path, name: str) -> None:
    base = base_of(tmp_path, name)
    before, dtype = stored_values(base)
    for to in ("bf16", "f32", *KINDS):
        out = tmp_path / to
        if (name, to) in SAME:
            with pytest.raises(UsageError, match=f"is {to} already"):
                convert(base, out, to=to)
            continue
        planned = plan_convert(base, out, to=to)
        report = convert(base, out, to=to)
        written = load_file(out / "model.safetensors")
        assert {key: tuple(t.shape) for key, t in written.items()} == {n: t.shape for n, t in planned.tensors.items()}
        assert {key: t.dtype for key, t in written.items()} == {n: t.dtype.torch for n, t in planned.tensors.items()}
        assert planned.plan.nbytes == report.nbytes == (out / "model.safetensors").stat().st_size
        after, _ = stored_values(out)
        if to in KINDS:
            wanted = through(to, before, dtype)
            assert ((after - wanted).abs() <= wanted.abs() * 2.0**-8).all(), to  # some are decoded to bfloat16
            assert json.loads((out / "config.json").read_text())["quantization_config"]
        else:
            assert torch.equal(after, before.to(BY_LABEL[to].torch).float()), to
            assert "quantization_config" not in (out / "config.json").read_text()


def test_every_format_that_is_read_is_among_them() -> None:
    """The table of formats and this matrix name the same codecs; MXFP4 experts and HQQ have tests of their own."""
    methods = {(made.config or {}).get("quant_method", "none") for made in MADE.values()}
    assert {"bitsandbytes", "fp8", "compressed-tensors", "gptq", "awq", "torchao", "modelopt"} <= methods
    assert set(SOURCES) >= {"mxfp4"}
