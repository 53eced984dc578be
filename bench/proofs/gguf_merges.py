"""Adapters merged into GGUF bases, beside the same base with the adapter live, in llama.cpp.

For each kind of model: a random one of width 256 as F16 and Q8_0, an adapter by PEFT on all linear layers (and stacks of
experts), merged to F16, Q8_0 and Q4_K_M. Numbers are the largest difference of a log-probability (over the whole
vocabulary) for F16, and the Kullback-Leibler divergence for the others, each from the base's values with the adapter as
a GGUF LoRA beside them. Those values are in F16 for both bases, since the runtime rounds activations too where weights
are Q8_0. The adapter's own effect is the divergence of the base without it, and PEFT is its model in float32. It ends
with 1 when an F16 merge is further away than 1e-2.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import adapterkit
from adapterkit.gguf.quantize import Quantization
from adapterkit.verbs.convert import convert
from bench.common import results

KINDS = ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3", "phi3", "gpt_oss"]
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
MORE = {"qwen3_moe": {"moe_intermediate_size": 256}, "gemma2": {"query_pre_attn_scalar": 64}}
MORE["gemma3"] = MORE["gemma2"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = {
    "target_modules": ATTENTION,
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}
MIXES = ["F16", "Q8_0", "Q4_K_M"]
LIMIT = 1e-2


def measure(kind: str, folder: Path) -> list[dict[str, Any]]:
    """One row for each base."""
    import gguf_zoo as zoo
    from gguf_runtime import divergence, far, live, logprobs, lora
    from models import make_adapter

    other = {**WIDE, **MORE.get(kind, {})}
    zoo.build(folder / "hf", kind, scale=0.06, **other)
    bases = {"F16": zoo.to_gguf(folder / "hf", kind, folder / "f16.gguf", "float16", **other)}
    bases["Q8_0"] = folder / "q8_0.gguf"
    convert(bases["F16"], bases["Q8_0"], quantization=Quantization("Q8_0"))
    values = {"F16": bases["F16"], "Q8_0": folder / "decoded.gguf"}
    convert(bases["Q8_0"], values["Q8_0"], quantization=Quantization("F16"))
    config = lora(r=8, lora_alpha=16, **(EXPERTS if kind in ("qwen3_moe", "gpt_oss") else {}))
    adapter = make_adapter(folder / "adapter", folder / "hf", config, scale=0.15)
    peft = live(folder / "hf", adapter)
    rows = []
    for name, base in bases.items():
        beside_file = folder / "lora.gguf"
        convert(adapter, beside_file, to="gguf-lora", base=base, force=True)
        beside = logprobs(values[name], lora=beside_file)[0]
        row: dict[str, Any] = {"kind": kind, "base": name}
        row["adapter"], row["peft"] = divergence(beside, logprobs(values[name])[0]), far(beside, peft)
        for mix in MIXES:
            out = folder / f"{name}-{mix}.gguf"
            adapterkit.merge(base, [adapter], out, quantization=Quantization(mix))
            found = logprobs(out)[0]
            row[mix] = far(beside, found) if mix == "F16" else divergence(beside, found)
        rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"all by default: {' '.join(KINDS)}")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    columns = ["adapter", "peft", *MIXES]
    print("| model | base | adapter, KL | live from PEFT, max | to F16, max | to Q8_0, KL | to Q4_K_M, KL |")
    print("|---|---|---|---|---|---|---|")
    merges, worst = 0, 0.0
    for kind in options.kinds or KINDS:
        with tempfile.TemporaryDirectory() as folder:
            for row in measure(kind, Path(folder)):
                cells = " | ".join(f"{row[column]:.1e}" for column in columns)
                print(f"| {row['kind']} | {row['base']} | {cells} |", flush=True)
                merges, worst = merges + 1, max(worst, row["F16"])
    print(f"largest difference of an F16 merge: {worst:.1e}")
    results.note(merges=merges, within=int(worst < LIMIT))
    return int(not worst < LIMIT)


if __name__ == "__main__":
    sys.exit(main())
