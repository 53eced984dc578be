"""Whole merges of the heaviest methods on the 1B shape, beside PEFT's own merge of them in the same run.

    python -m bench speed method_merge [--methods dora vera loha lokr oft] [--shape 1b] [--runs 3]

The adapters have PEFT's own shapes (made on the meta device) and random values, on all linear layers. Every run is a process
of its own; what is printed are medians of the work without imports, and the peak memory of the process.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bench.common import results
from bench.common.shapes import SHAPES, write_base
from bench.common.shapes import write_adapter as write_plain_adapter
from bench.speed.merge import OURS, PEFT, run

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def configs() -> dict[str, Any]:
    import peft

    return {
        "dora": peft.LoraConfig(r=16, lora_alpha=32, use_dora=True, target_modules=LINEAR),
        "vera": peft.VeraConfig(r=256, target_modules=LINEAR),
        "loha": peft.LoHaConfig(r=16, alpha=32, target_modules=LINEAR),
        "lokr": peft.LoKrConfig(r=16, alpha=32, target_modules=LINEAR),
        "oft": peft.OFTConfig(r=0, oft_block_size=32, target_modules=LINEAR, use_cayley_neumann=True),
    }


def write_adapter(folder: Path, base: Path, config: Any) -> None:
    """The adapter that PEFT would save, with small random values."""
    from peft import get_peft_model, get_peft_model_state_dict
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
        tuned = get_peft_model(model, config)
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, tensor in get_peft_model_state_dict(tuned).items():
        small = torch.randn(tensor.shape, generator=generator) * 0.02
        tensors[name] = small.abs() + 0.5 if "magnitude" in name else small
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    said = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    (folder / "adapter_config.json").write_text(json.dumps(said, default=str))


def fresh(script: str, folders: tuple[Path, ...], *rest: str) -> dict[str, float]:
    """One run into folders that are not there."""
    for made in (folders[2], folders[5]):
        shutil.rmtree(made, ignore_errors=True)
    return run(script, *map(str, folders), *rest)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", nargs="*", default=sorted(configs()), choices=sorted(configs()))
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b")
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm/adapterkit-methods"))
    parser.add_argument("--runs", type=int, default=3, help="of ours; PEFT has one")
    options = parser.parse_args()
    base = options.dir / options.shape / "base"
    # A small merge first, as in bench/speed/merge.py: imports are paid before the clock starts.
    small = [options.dir / "first" / name for name in ("base", "adapter", "out")]
    for folder, shape in ((base, options.shape), (small[0], "tiny")):
        if not folder.exists():
            write_base(folder, SHAPES[shape])
    if not small[1].exists():
        write_plain_adapter(small[1], SHAPES["tiny"])
    results.head("", "seconds", f"PEFT {version('peft')}", "ratio", "peak memory", "PEFT's")
    for name in options.methods:
        adapter, out = options.dir / options.shape / name, options.dir / options.shape / "out"
        if not adapter.exists():
            write_adapter(adapter, base, configs()[name])

        folders = (base, adapter, out, *small)
        found = [fresh(OURS, folders, "0") for _ in range(options.runs)]
        theirs = fresh(PEFT, folders)
        work = statistics.median(one["work"] for one in found)
        memory = max(one["memory"] for one in found)
        sizes = (f"{one / 1e6:.0f} MB" for one in (memory, theirs["memory"]))
        results.row(name, f"{work:.1f}", f"{theirs['work']:.1f}", f"{theirs['work'] / work:.1f}", *sizes)
    shutil.rmtree(options.dir)


if __name__ == "__main__":
    main()
