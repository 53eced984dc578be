"""What a merge keeps, by size of the change and format of the output; and what measuring it costs.

    python -m bench studies fidelity               # the table, on a 2048x2048 Gaussian weight and a rank-16 change
    python -m bench studies fidelity --markdown    # its retention, as in docs/quantized.md
    python -m bench studies fidelity --cost        # a merge with and without the report, in alternation

"from W16" folds the change onto the 16-bit weights; "from the grid" onto weights that sit on the output's grid already, as
a merge into a quantized base and back does. The sum is not rounded before it is encoded; NF4 and int8 are decoded to
bfloat16, the others to float32.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from adapterkit.codecs import blockwise
from adapterkit.codecs.fp8 import short_blocks
from adapterkit.dtypes import F32
from adapterkit.gguf.encode import decode, encode
from adapterkit.ops.fidelity import Fidelity, block_sums
from bench.common.shapes import SHAPES
from bench.speed.nf4 import ours, prepare

SIDE, RANK = 2048, 16
SIZES = (0.001, 0.003, 0.01, 0.03, 0.1)


def nf4(w: torch.Tensor) -> torch.Tensor:
    flat = w.reshape(-1)
    absmax = blockwise.absmax_of(flat, 64)
    codes = blockwise.encode_4bit(flat, absmax, "nf4", 64)
    return blockwise.decode_4bit(codes, absmax, "nf4", 64, flat.numel()).view(w.shape).bfloat16().float()


def int8(w: torch.Tensor) -> torch.Tensor:
    return blockwise.decode_int8(*blockwise.encode_int8(w)).bfloat16().float()


def fp8(w: torch.Tensor) -> torch.Tensor:
    codes, scales = short_blocks("w.weight", tuple(w.shape), F32, False).encode(0, w.reshape(-1), None)
    tiles = codes.float().view(-1, 128, w.shape[1] // 128, 128) * scales.view(-1, 1, w.shape[1] // 128, 1)
    return tiles.view(w.shape)


def gguf(kind: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Encoded by adapterkit (llama.cpp's bytes), decoded by the gguf package."""
    return lambda w: torch.from_numpy(decode(kind, encode(kind, w), w.shape[1]).copy())


FORMATS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "bf16": lambda w: w.bfloat16().float(),
    "f16": lambda w: w.half().float(),
    "fp8": fp8,
    "int8": int8,
    "Q8_0": gguf("Q8_0"),
    "nf4": nf4,
    "Q4_K": gguf("Q4_K"),
}


class Weights:
    """A Gaussian weight in bfloat16, and changes of it that have a rank and a size."""

    def __init__(self, side: int = SIDE) -> None:
        generator = torch.Generator().manual_seed(0)
        self.w16 = (torch.randn(side, side, generator=generator) * 0.02).bfloat16().float()
        self._change = torch.randn(side, RANK, generator=generator) @ torch.randn(RANK, side, generator=generator)

    def cell(self, name: str, size: float, *, on_grid: bool) -> Fidelity:
        """What is left of a change of this relative size in a format, from W16 or from weights on its grid."""
        through = FORMATS[name]
        base = through(self.w16) if on_grid else self.w16
        wanted = base + self._change * (size * base.norm() / self._change.norm())
        return Fidelity.of(block_sums(base, wanted, through(wanted)))


def table() -> None:
    weights = Weights()
    print(f"{'|D|/|W|':>8}  {'':<6} {'from W16':>28}   {'from the grid':>28}")
    print(f"{'':>8}  {'':<6} {'unmoved  retention  cosine':>28}   {'unmoved  retention  cosine':>28}")
    for size in SIZES:
        for name in FORMATS:
            cells = []
            for on_grid in (False, True):
                one = weights.cell(name, size, on_grid=on_grid)
                cells.append(f"{one.unmoved:>10.1%} {one.retention:>8.3f} {one.cosine:>8.3f}")
            print(f"{size:>8.3f}  {name:<6} {cells[0]:>28}   {cells[1]:>28}")


def markdown() -> str:
    """Retention as a table of docs/quantized.md, from W16 / from the grid."""
    weights = Weights()
    lines = [f"| \\|delta\\|/\\|W\\| | {' | '.join(FORMATS)} |", "|---" * (len(FORMATS) + 1) + "|"]
    for size in SIZES:
        pairs = [[weights.cell(name, size, on_grid=on).retention for on in (False, True)] for name in FORMATS]
        cells = [f"{one:.2f} / {round(two, 3) + 0.0:.3f}" for one, two in pairs]
        lines.append(f"| {size:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cost(options: argparse.Namespace) -> None:
    root = options.dir / options.shape
    prepare(root, options.shape)
    for name in ("base", "nf4"):
        pairs = []
        for index in range(options.runs + 1):
            pair = [ours(root, name, options.jobs, *told)["work"] for told in ([], ["fidelity"])]
            if index:  # the first round warms the caches
                pairs.append(pair)
        plain, reported = (statistics.median(pair[i] for pair in pairs) for i in (0, 1))
        ratios = [pair[1] / pair[0] for pair in pairs]
        print(f"{options.shape}, {name}: plain {plain:.2f} s, with the report {reported:.2f} s; pair by pair "
              f"{statistics.median(ratios) - 1:+.0%} ({min(ratios) - 1:+.0%} to {max(ratios) - 1:+.0%})")  # fmt: skip
    shutil.rmtree(root / "out", ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b")
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm/adapterkit-bench"))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    if options.cost:
        cost(options)
    elif options.markdown:
        print(markdown())
    else:
        table()


if __name__ == "__main__":
    main()
