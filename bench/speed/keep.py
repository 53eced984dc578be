"""`merge --quant keep`: seconds over `cp`, and what one core decodes, adds to and encodes again, per format.

    python -m bench speed keep --shape 1b --runs 5       # needs llmcompressor and torchao for the columns beside

First a base in FP8 blocks and a LoRA on attention, then on all linear layers: the merge in one process (without what
Python and torch take to start, and with it), beside `cp -r` of the base; medians of alternating runs, in memory. Then one
layer's weights in each format with a LoRA on all of them: the processor time of the whole merge with one worker, as
Mweights/s, beside llm-compressor (compressed-tensors' `decompress`, the sum, `calibrate_weight` and `compress_module`),
torchao (`dequantize`, the sum, and its own function that quantizes) and bitsandbytes (`dequantize_4bit`,
`quantize_4bit`), each on one thread, of one 2048x2048 weight.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from adapterkit import convert, merge
from bench.common import results
from bench.common.shapes import SHAPES, linears, write_adapter, write_base
from bench.speed.merge import run
from bench.speed.process import whole

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FORMATS = ("fp8-block", "fp8", "int4", "nvfp4", "mxfp4", "nf4", "int8")
SCHEMES = {"fp8-block": "FP8_BLOCK", "int4": "W4A16", "nvfp4": "NVFP4A16", "mxfp4": "MXFP4A16"}
SIDE = 2048

MERGE = """
import json, sys, time
from adapterkit import merge
base, adapter, tiny, small, out = sys.argv[1:]
merge(tiny, [small], out + "-tiny", quant="keep", yes_lossy=True, force=True)
start, used = time.monotonic(), time.process_time()
merge(base, [adapter], out, quant="keep", yes_lossy=True)
print(json.dumps({"work": time.monotonic() - start, "used": time.process_time() - used}))
"""


def prepare(root: Path, shape: str) -> None:
    shutil.rmtree(root, ignore_errors=True)
    for folder, name in ((root, shape), (root / "tiny", "tiny")):
        write_base(folder / "plain", SHAPES[name])
        convert(folder / "plain", folder / "base", to="fp8-block")
        shutil.rmtree(folder / "plain")
        write_adapter(folder / "attention", SHAPES[name], modules=ATTENTION)
        write_adapter(folder / "all", SHAPES[name])


def beside_copy(root: Path, runs: int) -> None:
    """The merge and the copy in turn."""
    out, base = root / "out", root / "base"
    taken: dict[str, list[float]] = {}
    for _ in range(runs):
        start = time.monotonic()
        subprocess.run(["cp", "-r", str(base), str(out)], check=True)
        taken.setdefault("cp -r", []).append(time.monotonic() - start)
        shutil.rmtree(out)
        for name in ("attention", "all"):
            tiny = [str(root / "tiny" / one) for one in ("base", name)]
            found = run(MERGE, str(base), str(root / name), *tiny, str(out))
            taken.setdefault(name, []).append(found["work"])
            taken.setdefault(f"{name}, processors", []).append(found["used"])
            shutil.rmtree(out)
            command = [sys.executable, "-m", "adapterkit", "merge", str(base), str(root / name), "-o", str(out)]
            seconds, _ = whole([*command, "--quant", "keep", "--yes-lossy"])
            taken.setdefault(f"{name}, command", []).append(seconds)
            shutil.rmtree(out)
    median = {name: statistics.median(found) for name, found in taken.items()}
    copy = median["cp -r"]
    results.head("FP8 blocks", "seconds", "over `cp -r`", "processor seconds", "the whole command")
    results.row("`cp -r`", f"{copy:.2f}", "1.00", "", "")
    for name, words in (("attention", "LoRA on attention"), ("all", "LoRA on all linear layers")):
        ratio = statistics.median(a / b for a, b in zip(taken[name], taken["cp -r"], strict=True))
        used, command = median[f"{name}, processors"], median[f"{name}, command"]
        results.row(words, f"{median[name]:.2f}", f"{ratio:.2f}", f"{used:.2f}", f"{command:.2f}")
        results.note(**{f"{name}_ratio": round(ratio, 2), f"{name}_seconds": round(median[name], 2)})


def ours(root: Path, kind: str) -> float:
    """Mweights/s of one worker."""
    shape = replace(SHAPES["1b"], layers=1, vocab=1024)
    if not (root / "plain").exists():
        write_base(root / "plain", shape)
        write_adapter(root / "all", shape)
    base = root / kind
    convert(root / "plain", base, to=kind)
    weights = sum(rows * columns for rows, columns in linears(shape).values())
    rates = []
    for _ in range(3):
        used = time.process_time()
        merge(base, [root / "all"], root / "out", quant="keep", yes_lossy=True, jobs=1, force=True)
        rates.append(weights / (time.process_time() - used) / 1e6)
    shutil.rmtree(base)
    return statistics.median(rates)


def rate(work: Callable[[], object]) -> float:
    """Mweights/s of a function that does one weight."""
    work()
    used = []
    for _ in range(3):
        start = time.process_time()
        work()
        used.append(time.process_time() - start)
    return SIDE * SIDE / statistics.median(used) / 1e6


def compressor(kind: str, w: torch.Tensor, delta: torch.Tensor) -> Callable[[], object] | None:
    """llm-compressor and compressed-tensors."""
    if kind not in SCHEMES:
        return None
    from compressed_tensors.compressors import BaseCompressor, compress_module
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
    from llmcompressor.entrypoints.model_free.lifecycle import calibrate_weight, initialize_quantized_linear

    scheme = preset_name_to_scheme(SCHEMES[kind], ["Linear"])
    scheme.weights.observer = "memoryless_minmax"

    def made(weight: torch.Tensor) -> torch.nn.Module:
        module = initialize_quantized_linear(weight, scheme, "cpu")
        calibrate_weight(module)
        compress_module(module)
        return module

    module = made(w)
    state, form = dict(module.state_dict()), BaseCompressor.get_value_from_registry(module.quantization_scheme.format)
    return lambda: made((form.decompress(dict(state), scheme)["weight"].float() + delta).bfloat16())


def torchao(kind: str, w: torch.Tensor, delta: torch.Tensor) -> Callable[[], object] | None:
    """torchao: its nearest format, FP8 and int8 with a scale per row for blocks and for LLM.int8."""
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    if kind in ("fp8", "fp8-block", "int8"):
        how = Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig()

        def made(weight: torch.Tensor) -> torch.Tensor:
            linear = torch.nn.Linear(SIDE, SIDE, bias=False, dtype=torch.bfloat16)
            linear.weight = torch.nn.Parameter(weight.bfloat16(), requires_grad=False)
            quantize_(linear, how)
            return linear.weight

        stored = made(w)
        return lambda: made(stored.dequantize().float() + delta)  # type: ignore[operator]
    if kind == "nvfp4":
        from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

        four = NVFP4Tensor.to_nvfp4(w)
        return lambda: NVFP4Tensor.to_nvfp4((four.dequantize(torch.float32) + delta).bfloat16())
    if kind == "mxfp4":
        from torchao.prototype.mx_formats.mx_tensor import MXTensor

        mx = MXTensor.to_mx(w, torch.float4_e2m1fn_x2, 32)
        return lambda: MXTensor.to_mx((mx.dequantize(torch.float32) + delta).bfloat16(), torch.float4_e2m1fn_x2, 32)
    return None


def bitsandbytes(kind: str, w: torch.Tensor, delta: torch.Tensor) -> Callable[[], object] | None:
    import bitsandbytes.functional as bnb

    if kind == "int8":
        codes, scale, _ = bnb.int8_vectorwise_quant(w.half())
        return lambda: bnb.int8_vectorwise_quant((bnb.int8_vectorwise_dequant(codes, scale) + delta).half())
    if kind != "nf4":
        return None
    packed, state = bnb.quantize_4bit(w, quant_type="nf4", blocksize=64)
    return lambda: bnb.quantize_4bit(
        (bnb.dequantize_4bit(packed, state).float() + delta).bfloat16(), quant_type="nf4", blocksize=64
    )


PEERS = {"llm-compressor": compressor, "torchao": torchao, "bitsandbytes": bitsandbytes}


def per_core(root: Path, kinds: list[str]) -> None:
    w = (torch.randn(SIDE, SIDE) * 0.02).bfloat16()
    delta = torch.randn(SIDE, SIDE) * 1e-3
    results.head("Mweights/s of one core", "adapterkit, the whole merge", *PEERS)
    for kind in kinds:
        mine = ours(root, kind)
        cells = [f"{mine:.0f}"]
        for peer in PEERS.values():
            with quiet():
                try:
                    work = peer(kind, w, delta)
                except ImportError:
                    work = None
                found = None if work is None else rate(work)
            cells.append("" if found is None else f"{found:.0f}")
        results.row(kind, *cells)
        results.note(**{f"core_{kind.replace('-', '_')}": round(mine)})


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What libraries say while they are imported is no part of a result."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b")
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm/adapterkit-keep"))
    parser.add_argument("--runs", type=int, default=5, help="of the merge and the copy; 0 leaves them out")
    parser.add_argument("--formats", nargs="*", default=list(FORMATS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    try:
        if options.runs:
            prepare(options.dir, options.shape)
            beside_copy(options.dir, options.runs)
            print()
            shutil.rmtree(options.dir)
        per_core(options.dir, options.formats)
    finally:
        shutil.rmtree(options.dir, ignore_errors=True)


if __name__ == "__main__":
    main()
