"""`adapterkit resize`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapterkit.cli.attest import attest_option, attested
from adapterkit.cli.output import Progress, note, say, show_json, size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapterkit.verbs.report import ModuleRank


@click.command(name="resize", short_help="Bring an adapter to another rank.")
@click.argument("adapter")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The folder to make.")
@click.option("--rank", type=int, help="At most this rank in every layer.")
@click.option("--energy", type=float, help="The smallest rank that keeps this share of each layer's squared norm.")
@click.option("--max-error", type=float, help="The smallest rank with at most this relative error in each layer.")
@click.option("--base", help="The adapter's base, where its factors do not tell the shapes.")
@click.option("--dtype", default="f32", show_default=True, help="Of the factors: f32, bf16 or f16.")
@click.option("--own-ranks", is_flag=True, help="Each layer keeps its own rank; vLLM and llama.cpp want one for all.")
@click.option("--jobs", type=click.IntRange(1), help="Worker threads; the result does not depend on it.")
@click.option("--allow-unknown", is_flag=True, help="Go on where the config has fields not known here.")
@attest_option
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(
    adapter: str,
    out: Path,
    rank: int | None,
    energy: float | None,
    max_error: float | None,
    base: str | None,
    dtype: str,
    own_ranks: bool,
    jobs: int | None,
    allow_unknown: bool,
    attest: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Bring ADAPTER to a smaller rank; each layer becomes the best approximation of that rank.

    \b
    Example:
      adapterkit resize ./my-adapter -o small --energy 0.99
      adapterkit resize ./my-adapter -o small --rank 8
    """
    from adapterkit.verbs.resize import resize, total_kept

    progress = Progress("resizing", enabled=not as_json)
    report = resize(
        adapter,
        out,
        rank=rank,
        energy=energy,
        max_error=max_error,
        base=base,
        dtype=dtype,
        own_ranks=own_ranks,
        jobs=jobs,
        force=force,
        allow_unknown=allow_unknown,
        progress=progress,
    )
    progress.close()
    attested(attest, out, [base, adapter])
    if as_json:
        show_json(report)
        return
    for text in report.notes:
        note(f"note: {text}")
    show_ranks(report.modules)
    share, error = total_kept(report.modules)
    say(f"in all: {share:.4%} of the squared norm kept, error {error:.4g}")
    say(f"{report.out}: rank {report.rank}, {size(report.nbytes_before)} to {size(report.nbytes)}")


def show_ranks(modules: Sequence[ModuleRank]) -> None:
    """What was kept of each layer."""
    say(f"{'rank':>11} {'norm':>10} {'kept':>9} {'error':>9}  layer")
    for row in modules:
        ranks = f"{row.before} > {row.rank}" if row.before else f"{row.rank}"
        say(f"{ranks:>11} {row.norm:>10.4g} {1 - row.error**2:>9.4%} {row.error:>9.3g}  {row.module}")
