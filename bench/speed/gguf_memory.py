"""Time and peak memory of quantizing a GGUF file of a 7B model's shape: ``python -m bench speed gguf_memory [FOLDER]``.

The F16 file is made sparse, 13 GB that take no room; the output (4 GB for Q4_K_M) is written in FOLDER (/dev/shm) and
deleted. A child process does the work, so that the peak is its own; its first call, which compiles the encoders where
no cache has them, is made by another child before.

    --mix MIX       Q4_K_M by default
    --layers N      32 by default; the memory does not depend on it
    --jobs N        threads (2)
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from adapterkit.gguf.metadata import f32, file_start, tensor_info, text, u32
from adapterkit.gguf.types import TYPES
from bench.common import results

WIDTH, INNER, HEADS, VOCABULARY = 4096, 11008, 32, 32000
LIMIT = 500e6

_CHILD = """
import sys
from adapterkit.verbs.convert import convert
from adapterkit.gguf.quantize import Quantization
convert(sys.argv[1], sys.argv[2], quantization=Quantization(sys.argv[3]), jobs=int(sys.argv[4]), force=True)
"""


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """The tensors of Llama-2-7B, the slowest dimension first."""
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCABULARY, WIDTH)}
    for layer in range(layers):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            found[f"blk.{layer}.{part}.weight"] = (WIDTH, WIDTH)
        for part in ("ffn_gate", "ffn_up"):
            found[f"blk.{layer}.{part}.weight"] = (INNER, WIDTH)
        found[f"blk.{layer}.ffn_down.weight"] = (WIDTH, INNER)
        for part in ("attn_norm", "ffn_norm"):
            found[f"blk.{layer}.{part}.weight"] = (WIDTH,)
    return found | {"output_norm.weight": (WIDTH,), "output.weight": (VOCABULARY, WIDTH)}


def write(path: Path, layers: int) -> int:
    """A sparse F16 file of that shape; the number of weights."""
    entries = [
        text("general.architecture", "llama"),
        u32("llama.block_count", layers),
        u32("llama.context_length", 4096),
        u32("llama.embedding_length", WIDTH),
        u32("llama.feed_forward_length", INNER),
        u32("llama.attention.head_count", HEADS),
        u32("llama.attention.head_count_kv", HEADS),
        f32("llama.attention.layer_norm_rms_epsilon", 1e-5),
    ]
    infos, offset, weights = [], 0, 0
    for name, shape in shapes(layers).items():
        kind = TYPES["F16" if len(shape) > 1 else "F32"]
        infos.append(tensor_info(name, kind, shape, offset))
        rows = shape[0] if len(shape) > 1 else 1
        size = rows * kind.row_bytes(shape[-1])
        offset += size + -size % 32
        weights += rows * shape[-1]
    head = b"".join([file_start(len(infos), len(entries)), *(one.data for one in entries), *infos])
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + -len(head) % 32 + offset)
    return weights


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="/dev/shm")
    parser.add_argument("--mix", default="Q4_K_M")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        base, out = Path(folder, "base.gguf"), Path(folder, "out.gguf")

        def run(layers: int) -> tuple[int, float]:
            weights = write(base, layers)
            command = [sys.executable, "-c", _CHILD, str(base), str(out), options.mix, str(options.jobs)]
            start = time.perf_counter()
            subprocess.run(command, check=True)
            return weights, time.perf_counter() - start

        run(1)
        # The largest of all children so far: the same work on one layer came before, and needs no more.
        weights, seconds = run(options.layers)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        size = out.stat().st_size
    print(
        f"{weights / 1e9:.2f}e9 weights to {options.mix}, {size / 1e9:.2f} GB, {options.jobs} threads: {seconds:.0f} s, "
        f"{weights / seconds / 1e6:.0f} M weights/s, peak memory {peak / 1e6:.0f} MB"
    )
    results.note(weights=weights, memory_mb=round(peak / 1e6))
    return int(peak > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
