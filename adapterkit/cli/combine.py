"""`adapterkit combine`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterkit.cli.attest import attest_option, attested
from adapterkit.cli.methods import NAMES, SPACES, MethodCommand, given, methods_flag
from adapterkit.cli.output import Progress, note, say, show_json, size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapterkit.verbs.report import ModuleRank


@click.command(name="combine", cls=MethodCommand, taken=("rank",), short_help="Make one adapter of several.")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The folder to make.")
@click.option("--method", type=NAMES, default="linear", show_default=True, help="See --methods.")
@methods_flag
@click.option("--weight", "weights", type=float, multiple=True, help="How strongly an adapter counts; once for each.")
@click.option("--rank", type=int, help="At most this rank in every layer.")
@click.option("--energy", type=float, help="The smallest rank that keeps this share of each layer's squared norm.")
@click.option("--lambda", "scale", type=float, default=1.0, help="Factor of the result.")
@click.option("--space", type=SPACES, help="Align the adapters there; --method is the rule inside.")
@click.option("--base", help="Their base, for methods whose change depends on the weights (DoRA, LoKr, ...).")
@click.option("--dtype", default="f32", show_default=True, help="Of the factors: f32, bf16 or f16.")
@click.option("--own-ranks", is_flag=True, help="Each layer keeps its own rank; vLLM and llama.cpp want one for all.")
@click.option("--jobs", type=click.IntRange(1), help="Worker threads; the result does not depend on it.")
@click.option("--residual-base", is_flag=True, help="The base is what training left behind, not the original model.")
@click.option("--allow-unknown", is_flag=True, help="Go on where a config has fields not known here.")
@attest_option
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(
    adapters: tuple[str, ...],
    out: Path,
    method: str,
    weights: tuple[float, ...],
    rank: int | None,
    energy: float | None,
    scale: float,
    space: str | None,
    base: str | None,
    dtype: str,
    own_ranks: bool,
    jobs: int | None,
    residual_base: bool,
    allow_unknown: bool,
    attest: bool,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Combine ADAPTERs into one plain LoRA adapter that PEFT, vLLM and llama.cpp load.

    The sum is the true sum of the deltas, all scalings folded in. Methods that give deltas of full rank need --rank or
    --energy, or a --space.

    \b
    Example:
      adapterkit combine ./math ./code -o both --method svd --rank 32 --weight 0.6 --weight 0.4
      adapterkit combine ./math ./code -o both --method ties --space core --lambda 0.8
    """
    from adapterkit.verbs.combine import combine

    progress = Progress("combining", enabled=not as_json)
    report = combine(
        adapters,
        out,
        method=method,
        weights=weights or None,
        scale=scale,
        space=space,
        rank=rank,
        energy=energy,
        base=base,
        dtype=dtype,
        own_ranks=own_ranks,
        jobs=jobs,
        force=force,
        residual_base=residual_base,
        allow_unknown=allow_unknown,
        progress=progress,
        **given(options),
    )
    progress.close()
    attested(attest, out, [base, *adapters])
    if as_json:
        show_json(report)
        return
    for text in report.notes:
        note(f"note: {text}")
    for used in report.adapters:
        say(f"{used.ref} ({used.method}){'' if used.weight == 1 else f' x {used.weight:g}'}")
    how = f"{report.method}{f' in {report.space}' if report.space else ''}"
    say(f"  by {how}: {len(report.modules)} layers, rank {report.rank}{' and others' if report.own_ranks else ''}")
    say(f"  {kept(report.modules)}")
    say(f"{report.out}: {size(report.nbytes)}, {report.seconds:.1f} s")


def kept(modules: Sequence[ModuleRank]) -> str:
    """What was kept over all layers, and where least of it was."""
    total = sum(row.norm**2 for row in modules)
    lost = sum((row.norm * row.error) ** 2 for row in modules)
    if not modules or not lost:
        return "nothing was cut"
    worst = max(modules, key=lambda row: row.error)
    return (
        f"{1 - lost / total:.2%} of the squared norm kept, error {(lost / total) ** 0.5:.3g}; "
        f"worst {worst.error:.3g} in {worst.module}"
    )
