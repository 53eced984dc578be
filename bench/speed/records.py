"""A registry of many versions: what each verb takes there, in seconds of CPU and MB of memory.

    python -m bench speed records [COUNT] [--names N]

Each verb runs in a fresh Python, so its start and imports are in the figures. Records are written by the registry's own code,
four kinds of them under ``--names`` names, with blobs that are not stored, as those of models that are kept as a recipe.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from adapterkit.registry.home import Home
from bench.common import results
from bench.speed.registry import fill

PARTS = 16


def adapter(folder: Path) -> Path:
    """A small adapter, to be registered among the others."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    tensors = {
        "base_model.model.layers.0.q_proj.lora_A.weight": torch.ones(2, 8),
        "base_model.model.layers.0.q_proj.lora_B.weight": torch.ones(8, 2),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


# The kernel counts what this process holds as the child's most (`ru_maxrss` outlives `execve`); VmHWM is the child's own.
WATCHED = """
import atexit, os, runpy

def say_peak():
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM:"))
    os.write(PIPE, line.split()[1].encode())

atexit.register(say_peak)
runpy.run_module("adapterkit", run_name="__main__", alter_sys=True)
"""


def taken(root: Path, *words: str) -> tuple[int, float, float]:
    """Exit code, seconds of CPU and MB at most of a run of the command line."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.set_inheritable(write, True)
        code = WATCHED.replace("PIPE", str(write))
        os.execve(sys.executable, [sys.executable, "-c", code, *words], {**os.environ, "ADAPTERKIT_HOME": str(root)})
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        peak = int(pipe.read() or 0) / 1024
    _, status, usage = os.wait4(pid, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", nargs="?", type=int, default=50_000)
    parser.add_argument("--names", type=int, default=2_500)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as made:
        home = Home(Path(made) / "home")
        fill(home, given.count, given.names)
        new = adapter(Path(made) / "adapter")
        asked: dict[str, tuple[str, ...]] = {
            "the first `list`, which builds the index": ("list", "--json"),
            "`list --json`": ("list", "--json"),
            "`list`, filtered": ("list", "--method", "dora", "--tag", "prod"),
            "`show`": ("show", "adapter-5@prod"),
            "`lineage`": ("lineage", "chat-q4-7"),
            "`lineage` of a base with 200 adapters": ("lineage", "the-base"),
            "`register`": ("register", str(new), "--name", "new"),
            "`list --json` after it": ("list", "--json"),
            f"`fsck --part 1/{PARTS}`": ("fsck", "--part", f"1/{PARTS}"),
            "`fsck`": ("fsck",),
            "`gc`, which shows what it would free": ("gc",),
        }
        results.head("over all of them", "seconds of CPU", "MB")
        for what, words in asked.items():
            code, seconds, megabytes = taken(home.root, *words)
            if code:
                raise SystemExit(f"{' '.join(words)} ended with {code}")
            results.row(what, f"{seconds:.2f}", f"{megabytes:.0f}")
    results.note(records=given.count + 201, names=given.names)


if __name__ == "__main__":
    main()
