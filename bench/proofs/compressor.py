"""New outputs in compressed-tensors' formats beside llm-compressor's own functions: error of the weights, and bytes.

    python -m bench proofs compressor [--side 512]    # needs llmcompressor (pip install --no-deps llmcompressor)

For each format: weights of bfloat16, Gaussian, heavy-tailed (Student's t with 5 degrees) and with a few large columns, as
`adapterkit convert` writes them and as `model_free_ptq` does (its `initialize_quantized_linear`, `calibrate_weight` and
compressed-tensors' `compress_module`), with each of its observers for weights; `memoryless_minmax` is what it takes where
nothing is said. Shown is |W - decoded| / |W|, the share of code bytes that are the same, and the processor time of both in
Mweights/s. llm-compressor computes in the dtype of the weights, adapterkit in float32, so that float32 weights show whether
the rule is the same. It fails where FP8 blocks of those are other bytes, or where our error is larger by more than 1e-4 of
itself (of FP8 blocks: than that of `memoryless_minmax`, whose rule they have).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import time
import warnings
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from adapterkit.codecs.encode import Encoder, InStep
from adapterkit.codecs.table import KINDS
from adapterkit.dtypes import BF16, F32
from bench.common import results

SIDE = 1024
SCHEMES = {"fp8-block": "FP8_BLOCK", "int4": "W4A16", "nvfp4": "NVFP4A16", "mxfp4": "MXFP4A16"}
OBSERVERS = ("memoryless_minmax", "memoryless_mse")
EXPANDED = "nvfp4_expanded_mse"
MORE = 1e-4


def weights(side: int) -> dict[str, torch.Tensor]:
    """Name: a weight ``[side, 2 * side]`` in bfloat16."""
    torch.manual_seed(0)
    plain = torch.randn(side, 2 * side) * 0.02
    columns = plain.clone()
    columns[:, ::97] *= 8
    tailed = torch.distributions.StudentT(5.0).sample((side, 2 * side)) * 0.02
    return {name: one.bfloat16() for name, one in (("Gaussian", plain), ("tails", tailed), ("columns", columns))}


def ours(kind: str, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Code bytes, decoded values, and seconds of the processor."""
    dtype = F32 if w.dtype is torch.float32 else BF16
    encoder: Encoder | None = KINDS[kind].encoder("w.weight", tuple(w.shape), dtype, False)
    assert encoder is not None
    if isinstance(encoder, InStep):
        encoder.largest = lambda: float(w.abs().max())
    started = time.process_time()
    encoded = encoder.encode(0, w.float().reshape(-1), None)
    spent = time.process_time() - started
    return encoded[0].contiguous().view(torch.uint8), encoder.values(0, encoded).view(w.shape), spent


def theirs(kind: str, w: torch.Tensor, observer: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The same by llm-compressor and compressed-tensors."""
    from compressed_tensors.compressors import BaseCompressor, compress_module
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
    from llmcompressor.entrypoints.model_free.lifecycle import calibrate_weight, initialize_quantized_linear

    scheme: Any = preset_name_to_scheme(SCHEMES[kind], ["Linear"])
    scheme.weights.observer = observer
    started = time.process_time()
    module = initialize_quantized_linear(w, scheme, "cpu")
    calibrate_weight(module)
    compress_module(module)
    spent = time.process_time() - started
    state = dict(module.state_dict())
    codes = state["weight_packed" if "weight_packed" in state else "weight"]
    decoded = BaseCompressor.get_value_from_registry(module.quantization_scheme.format).decompress(state, scheme)
    return codes.contiguous().view(torch.uint8).reshape(-1), decoded["weight"].float(), spent


def error(w: torch.Tensor, decoded: torch.Tensor) -> float:
    wide = w.double()
    return float((decoded.double() - wide).norm() / wide.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=SIDE, help="rows of a weight; it has twice as many columns")
    side = parser.parse_args().side
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(io.StringIO()):  # what its import says of the machine is no part of the result
        for kind in SCHEMES:
            theirs(kind, torch.randn(256, 256).bfloat16(), OBSERVERS[0])
    results.head("format", "weights", "llm-compressor's observer", "its error", "ours", "same code bytes")
    rates: dict[str, list[tuple[float, float]]] = {}
    larger = []
    for kind in SCHEMES:
        exact = {"Gaussian, float32": torch.randn(side, 2 * side)} if kind == "fp8-block" else {}
        for name, w in {**weights(side), **exact}.items():
            codes, values, spent = ours(kind, w)
            own = error(w, values)
            for observer in (*OBSERVERS, EXPANDED) if kind == "nvfp4" else OBSERVERS:
                other, decoded, took = theirs(kind, w, observer)
                its = error(w, decoded)
                same = float((codes == other).double().mean())
                results.row(kind, name, f"`{observer}`", f"{its:.5f}", f"{own:.5f}", f"{100 * same:.2f}%")
                if observer == "memoryless_mse":
                    rates.setdefault(kind, []).append((w.numel() / spent / 1e6, w.numel() / took / 1e6))
                usual = observer == OBSERVERS[0]
                if exact and name in exact and usual and same < 1:
                    larger.append(f"{kind}, {name}: {same:.4%} of the bytes are the same")
                if own > its * (1 + MORE) and (usual or not exact):
                    larger.append(f"{kind}, {name}: {own:.6f} where {observer} has {its:.6f}")
    for kind, found in rates.items():
        mine, other = (sum(column) / len(found) for column in zip(*found, strict=True))
        print(f"{kind}: {mine:.1f} Mweights/s of one processor beside {other:.1f} (memoryless_mse)")
    if larger:
        sys.exit("\n".join(["it does not hold:", *larger]))


if __name__ == "__main__":
    main()
