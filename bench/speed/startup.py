"""How long the verbs that only read headers take, as whole processes, beside an empty Python and Click alone.

    python -m bench speed startup --runs 15

The base has 500 tensors, the adapter a LoRA on 336 of them. Medians of alternating runs, in milliseconds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.common import results
from bench.common.shapes import Shape, write_adapter, write_base

SHAPE = Shape(hidden=32, ffn=64, layers=55, heads=2, kv_heads=1, vocab=64)  # 55 * 9 + 3 = 498 tensors


def main() -> None:
    parser = argparse.ArgumentParser(description="Start-up times of the verbs that only read headers")
    parser.add_argument("--runs", type=int, default=15)
    options = parser.parse_args()
    cli = "from adapterkit.cli import main; main()"
    with tempfile.TemporaryDirectory() as folder:
        base, adapter = Path(folder) / "base", Path(folder) / "adapter"
        write_base(base, SHAPE, shard_layers=20)
        write_adapter(adapter, SHAPE, rank=2)
        commands = {
            "Python alone": ["-c", "pass"],
            "Python and Click alone": ["-c", "import click"],
            "`adapterkit --help`": ["-c", cli, "--help"],
            "`inspect`": ["-c", cli, "inspect", str(base)],
            "`inspect` of an adapter": ["-c", cli, "inspect", str(adapter)],
            "`check`": ["-c", cli, "check", str(base), str(adapter)],
            "`merge --dry-run`": ["-c", cli, "merge", str(base), str(adapter), "--dry-run"],
        }
        # An installed package has its bytecode beside it; the first, uncounted round writes it here.
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        found: dict[str, list[float]] = {name: [] for name in commands}
        for index in range(options.runs + 1):
            for name, arguments in commands.items():
                start = time.perf_counter()
                subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, env=environment)
                if index:
                    found[name].append(1000 * (time.perf_counter() - start))
    results.head("whole process", "milliseconds")
    for name, times in found.items():
        results.row(name, f"{statistics.median(times):.0f}")


if __name__ == "__main__":
    main()
