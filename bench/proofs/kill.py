"""Kill merges with SIGKILL at random moments and count what is left.

    python -m bench proofs kill [--kills 200] [--megabytes 60] [--seed 0] [--dir /dev/shm]

Each run works in a forked child on a base of its own making in a temporary folder. After every kill the target is either
absent or whole; after every third the run is resumed and compared byte for byte with an undisturbed one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import tempfile
import time
import warnings
from pathlib import Path

import torch

from adapterkit import merge
from adapterkit.checkpoint.publish import partial_folder
from bench.common import results

LAYERS, RANK = 8, 16


def save(folder: Path, name: str, tensors: dict[str, torch.Tensor], config: str, fields: dict[str, object]) -> Path:
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / config).write_text(json.dumps(fields))
    save_file(tensors, folder / name)
    return folder


def inputs(folder: Path, megabytes: int) -> tuple[Path, Path]:
    """A bf16 base of ``LAYERS`` square matrices and as many that no adapter touches, and LoRA on the first kind."""
    generator = torch.Generator().manual_seed(0)
    width = int((megabytes * 1e6 / 2 / (2 * LAYERS)) ** 0.5)
    base, factors = {}, {}
    for layer in range(LAYERS):
        module = f"model.layers.{layer}.self_attn.q_proj"
        base[f"{module}.weight"] = torch.randn(width, width, generator=generator).bfloat16()
        base[f"model.layers.{layer}.mlp.up_proj.weight"] = torch.randn(width, width, generator=generator).bfloat16()
        factors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(RANK, width, generator=generator)
        factors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(width, RANK, generator=generator)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK}
    return (
        save(folder / "base", "model.safetensors", base, "config.json", {"model_type": "llama"}),
        save(folder / "adapter", "adapter_model.safetensors", factors, "adapter_config.json", config),
    )


def start(base: Path, adapter: Path, out: Path) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            merge(base, [adapter], out, resume=True, jobs=2)
            os._exit(0)
        os._exit(1)
    return pid


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--megabytes", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", help="Where to work; /dev/shm keeps the disk out of it.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        folder = Path(name)
        base, adapter = inputs(folder, options.megabytes)
        out = folder / "work" / "out"
        out.parent.mkdir()
        started = time.monotonic()
        os.waitpid(start(base, adapter, out), 0)
        duration = time.monotonic() - started
        whole = contents(out)
        shutil.rmtree(out)
        print(f"base of {options.megabytes} MB, an undisturbed run takes {duration:.2f} s")
        kills = early = half = resumed = wrong = reused = 0
        while kills < options.kills:
            pid = start(base, adapter, out)
            time.sleep(chance.uniform(0, duration * 1.1))
            os.kill(pid, signal.SIGKILL)
            if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL:
                kills += 1
                early += not partial_folder(out).exists() and not out.exists()
            strays = {path.name for path in out.parent.iterdir()} - {out.name, partial_folder(out).name}
            half += bool(strays) or (out.exists() and contents(out) != whole)
            if out.exists() or kills % 3 == 0:
                if not out.exists():
                    reused += merge(base, [adapter], out, resume=True).reused
                    resumed += 1
                wrong += contents(out) != whole or len(list(out.parent.iterdir())) != 1
                shutil.rmtree(out)
    print(f"{kills} kills ({early} before the first byte), {half} half results seen")
    print(f"{resumed} runs resumed after kills, {reused} tensors re-used, {wrong} different from an undisturbed run")
    results.note(kills=kills, half=half, different=wrong)
    raise SystemExit(1 if half or wrong else 0)


if __name__ == "__main__":
    main()
