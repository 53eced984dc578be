"""What `--quant keep` keeps of a change, by format and size of the change, beside `--keep-touched bf16` and `--base16`.

    python -m bench proofs kept    # the table of docs/quantized.md, on a 2048x2048 Gaussian weight and a rank-16 change

Retention <got, wanted>/|wanted|^2 and cosine in brackets. The base sits on the format's grid; before the stroke base + delta
is written there again, behind it W16 + delta (`--base16`); the last two columns write base + delta, of an INT4 base, in FP8
with a scale per row and in bfloat16.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

from adapterkit.codecs.compressed import new_rows
from adapterkit.codecs.encode import InStep
from adapterkit.codecs.table import KINDS
from adapterkit.codecs.tiles import Tiles
from adapterkit.dtypes import BF16
from adapterkit.ops.fidelity import Fidelity, block_sums
from bench.common import results

SIDE, RANK = 2048, 16
SHOWN = ("fp8-block", "int4", "nvfp4", "mxfp4", "nf4", "int8")
SIZES = (0.001, 0.003, 0.01, 0.03, 0.1)


def through(kind: str, w: torch.Tensor, *, again: bool = False) -> torch.Tensor:
    """decode(encode(W)) of a whole weight; ``again``: by the rule for a stored one, whose scales are not searched."""
    encoder = KINDS[kind].encoder("w.weight", tuple(w.shape), BF16, False)
    assert encoder is not None
    if isinstance(encoder, InStep):
        encoder.largest = lambda: float(w.abs().max())
    tiles = getattr(encoder, "_tiles", encoder)
    if again and isinstance(tiles, Tiles):
        rule = tiles.number
        tiles.number = lambda: replace(rule(), search=(), finer=())
    return encoder.values(0, encoder.encode(0, w.reshape(-1), None)).view(w.shape).float()


def cell(base: torch.Tensor, wanted: torch.Tensor, written: torch.Tensor) -> str:
    found = Fidelity.of(block_sums(base, wanted, written))
    return f"{found.retention:.2f} ({found.cosine:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=SIDE, help="rows and columns of the weight")
    side = parser.parse_args().side
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(side, side, generator=generator) * 0.02
    delta = torch.randn(side, RANK, generator=generator) @ torch.randn(RANK, side, generator=generator)
    delta *= w.norm() / delta.norm()
    results.head("\\|delta\\|/\\|W\\|", *SHOWN, "`--keep-touched fp8`", "`--keep-touched bf16`")
    for size in SIZES:
        cells = []
        for kind in SHOWN:
            base = through(kind, w)
            new = base + size * delta
            original = w + size * delta
            kept = cell(base, new, through(kind, new, again=True))
            cells.append(f"{kept} / {cell(w, original, through(kind, original))}")
        base = through("int4", w)
        new = base + size * delta
        rows = new_rows("w.weight", tuple(w.shape), BF16)
        eight = rows.values(0, rows.encode(0, new.reshape(-1), None)).view(w.shape)
        results.row(str(size), *cells, cell(base, new, eight), cell(base, new, new.bfloat16().float()))


if __name__ == "__main__":
    main()
