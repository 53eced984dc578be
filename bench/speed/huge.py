"""A 405B-shaped checkpoint: how long a plan takes, and what one part of it costs.

    python -m bench speed huge --dir /var/tmp/adapterkit-huge

The base (811 GB) and the adapter are sparse files: real headers, no data on disk. The plan is made from headers; one
part of it is then executed alone and the memory of that process is measured.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from bench.common import results

LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, VOCAB, RANK = 126, 16384, 53248, 128, 8, 128256, 16


def sparse(path: Path, tensors: dict[str, tuple[int, ...]], code: str, width: int) -> None:
    """A safetensors file of zeros that takes no room."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in tensors.items():
        end = position + width * (shape[0] * shape[1] if len(shape) == 2 else shape[0])
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + position)


def make(root: Path) -> None:
    kv = HIDDEN // HEADS * KV_HEADS
    linear = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (kv, HIDDEN),
        "self_attn.v_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (FFN, HIDDEN),
        "mlp.up_proj": (FFN, HIDDEN),
        "mlp.down_proj": (HIDDEN, FFN),
    }
    names: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    adapter: dict[str, tuple[int, ...]] = {}
    for layer in range(LAYERS):
        for name, (rows, columns) in linear.items():
            names[f"model.layers.{layer}.{name}.weight"] = (rows, columns)
            key = f"base_model.model.model.layers.{layer}.{name}"
            adapter[f"{key}.lora_A.weight"] = (RANK, columns)
            adapter[f"{key}.lora_B.weight"] = (rows, RANK)
        names[f"model.layers.{layer}.input_layernorm.weight"] = (HIDDEN,)
        names[f"model.layers.{layer}.post_attention_layernorm.weight"] = (HIDDEN,)
    names |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in names.items():
        nbytes = 2 * (shape[0] * shape[1] if len(shape) == 2 else shape[0])
        if groups[-1] and filled + nbytes > 5_000_000_000:
            groups.append({})
            filled = 0
        groups[-1][name] = shape
        filled += nbytes
    (root / "base").mkdir(parents=True)
    (root / "adapter").mkdir()
    weight_map = {}
    for index, group in enumerate(groups, 1):
        file = f"model-{index:05d}-of-{len(groups):05d}.safetensors"
        sparse(root / "base" / file, group, "BF16", 2)
        weight_map |= dict.fromkeys(group, file)
    (root / "base" / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
    }
    (root / "base" / "config.json").write_text(json.dumps(config))
    sparse(root / "adapter" / "adapter_model.safetensors", adapter, "F32", 4)
    fields = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "base_model_name_or_path": "base"}
    (root / "adapter" / "adapter_config.json").write_text(json.dumps(fields))


def timed(*arguments: str) -> tuple[float, int, str]:
    """Seconds, peak memory in bytes and output of one command."""
    start = time.monotonic()
    script = (
        "import sys, atexit\n"
        "def peak(): print(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')), file=sys.stderr)\n"
        "atexit.register(peak)\n"
        "from adapterkit.cli import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    seconds = time.monotonic() - start
    if done.returncode:
        sys.exit(done.stderr)
    peak = next(line for line in done.stderr.splitlines() if line.startswith("VmHWM"))
    return seconds, int(peak.split()[1]) * 1024, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description="A 405B-shaped checkpoint, planned and merged in part")
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp/adapterkit-huge"))
    parser.add_argument("--part", type=int, default=1)
    options = parser.parse_args()
    root: Path = options.dir
    shutil.rmtree(root, ignore_errors=True)
    make(root)
    base, adapter, plan = str(root / "base"), str(root / "adapter"), str(root / "plan.json")
    seconds, memory, said = timed("merge", base, adapter, "--dry-run")
    print(said.rstrip())
    print(f"merge --dry-run: {seconds:.2f} s, {memory / 1e6:.0f} MB")
    results.note(plan_s=round(seconds, 1))
    timed("merge", base, adapter, "--save-plan", plan)
    seconds, memory, said = timed("execute", plan, "-o", str(root / "out"), "--part", str(options.part))
    written = max(path.stat().st_size for path in (root / ".out.partial").glob("*.safetensors"))
    results.note(memory_mb=round(memory / 1e6))
    print(f"{said.rstrip()}: {written / 1e9:.2f} GB in {seconds:.1f} s, {memory / 1e6:.0f} MB")
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
