"""Models that mlx-lm quantized, held against mlx."""

from __future__ import annotations

import pytest
import torch
from codec_reads import check_ranges, wide

from adapterkit.checkpoint.decoded import dequantized
from adapterkit.errors import CheckpointError

mx = pytest.importorskip("mlx.core")

MODES = [("affine", bits, size) for bits in (2, 3, 4, 5, 6, 8) for size in (32, 64)]
MODES += [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]


def weight(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def to_torch(array: object) -> torch.Tensor:
    """Through numpy, which has no bfloat16."""
    import numpy as np

    if array.dtype == mx.bfloat16:  # type: ignore[attr-defined]
        return torch.from_numpy(np.array(array.astype(mx.float32))).bfloat16()  # type: ignore[attr-defined]
    return torch.from_numpy(np.array(array))


def stored(w: torch.Tensor, mode: str, bits: int, size: int, dtype: object = None) -> tuple[dict, torch.Tensor]:
    """What mlx stores of a weight, and what it decodes that to."""
    array = mx.array(w.numpy()).astype(dtype or mx.float32)
    made = mx.quantize(array, group_size=size, bits=bits, mode=mode)
    values = mx.dequantize(*made, group_size=size, bits=bits, mode=mode, dtype=dtype if mode != "affine" else None)
    names = ("weight", "scales", "biases")
    return {f"a.{n}": to_torch(t) for n, t in zip(names, made, strict=False)}, to_torch(values)


def config(mode: str, bits: int, size: int) -> dict:
    return {"group_size": size, "bits": bits, "mode": mode}


@pytest.mark.parametrize(("mode", "bits", "size"), MODES)
def test_decodes_as_mlx(store, mode: str, bits: int, size: int) -> None:
    for dtype in (mx.bfloat16, mx.float32):
        tensors, wanted = stored(weight(0, 24, 192), mode, bits, size, dtype)
        checkpoint = store({**tensors, "a.bias": torch.zeros(24)}, config(mode, bits, size))
        assert torch.equal(wide(checkpoint, "a.weight").float(), wanted.float())
        check_ranges(checkpoint, "a.weight")
        assert set(dequantized(checkpoint)) == {"a.weight", "a.bias"}
        assert "quantization_config" not in dequantized(checkpoint).config


def test_layers_of_other_sizes(store) -> None:
    one, first = stored(weight(0, 8, 128), "affine", 4, 64)
    two, second = stored(weight(1, 8, 128), "affine", 8, 32)
    tensors = {**one, **{name.replace("a.", "b."): tensor for name, tensor in two.items()}}
    said = {**config("affine", 4, 64), "b": {"group_size": 32, "bits": 8}, "c": False}
    checkpoint = store(tensors, said)
    assert torch.equal(wide(checkpoint, "a.weight"), first)
    assert torch.equal(wide(checkpoint, "b.weight"), second)


def test_what_does_not_fit(store) -> None:
    tensors, _ = stored(weight(0, 8, 128), "affine", 4, 64)
    for said, message in (
        (config("affine", 8, 64), "groups of 64 needs 8x1"),
        (config("affine", 7, 64), "no MLX weight of 7 bits"),
        (config("other", 4, 64), "mode 'other' is not known"),
    ):
        with pytest.raises(CheckpointError, match=message):
            dequantized(store(tensors, said))
    with pytest.raises(CheckpointError, match=r"a\.biases' is missing"):
        dequantized(store({n: t for n, t in tensors.items() if n != "a.biases"}, config("affine", 4, 64)))
    with pytest.raises(CheckpointError, match="no quantization_config"):
        dequantized(store(tensors))
