"""`adapterkit extract`"""

from __future__ import annotations

from pathlib import Path

import click

from adapterkit.cli.attest import attest_option, attested
from adapterkit.cli.output import Progress, note, say, show_json, size
from adapterkit.cli.resize import show_ranks


@click.command(name="extract", short_help="Make an adapter of the difference of two checkpoints.")
@click.argument("base")
@click.argument("tuned")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The folder to make.")
@click.option("--rank", type=int, help="At most this rank in every layer; 32 if nothing else is said.")
@click.option(
    "--energy", type=float, help="The smallest rank that keeps this share of each layer's squared difference."
)
@click.option("--exact", is_flag=True, help="A dense SVD of every layer; slow, and at most 1 % better.")
@click.option("--dtype", default="f32", show_default=True, help="Of the factors: f32, bf16 or f16.")
@click.option("--own-ranks", is_flag=True, help="Each layer keeps its own rank; vLLM and llama.cpp want one for all.")
@click.option("--jobs", type=click.IntRange(1), help="Worker threads; the result does not depend on it.")
@attest_option
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(
    base: str,
    tuned: str,
    out: Path,
    rank: int | None,
    energy: float | None,
    exact: bool,
    dtype: str,
    own_ranks: bool,
    jobs: int | None,
    force: bool,
    attest: bool,
    as_json: bool,
) -> None:
    """Write what training made of BASE, TUNED - BASE, as a LoRA adapter; both checkpoints are streamed.

    \b
    Example:
      adapterkit extract meta-llama/Llama-3.2-1B ./my-finetune -o adapter --energy 0.99
    """
    from adapterkit.verbs.extract import extract
    from adapterkit.verbs.resize import total_kept

    progress = Progress("extracting", enabled=not as_json)
    report = extract(
        base,
        tuned,
        out,
        rank=rank,
        energy=energy,
        exact=exact,
        dtype=dtype,
        own_ranks=own_ranks,
        jobs=jobs,
        force=force,
        progress=progress,
    )
    progress.close()
    attested(attest, out, [base, tuned])
    if as_json:
        show_json(report)
        return
    for text in report.notes:
        note(f"note: {text}")
    show_ranks(report.modules)
    share, error = total_kept(report.modules)
    for name in report.saved:
        say(f"{'whole':>11} {'':>10} {'':>9} {'':>9}  {name}")
    say(f"in all: {share:.4%} of the squared difference kept, error {error:.4g}; {report.unchanged} tensors unchanged")
    say(f"{report.out}: rank {report.rank}, {size(report.nbytes)}, {report.seconds:.1f} s")
