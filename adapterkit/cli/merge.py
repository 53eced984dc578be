"""`adapterkit merge`"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from adapterkit.cli.methods import NAMES, SPACES, given, method_options, methods_flag
from adapterkit.cli.output import Progress, count, note, say, show_json, size


@click.command(name="merge", short_help="Fold adapters into a base, in one streaming pass.")
@click.argument("base")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="The folder to make.")
@click.option("--weight", "weights", type=float, multiple=True, help="How strongly an adapter counts; once for each.")
@click.option("--method", type=NAMES, default="linear", show_default=True, help="How deltas become one; see --methods.")
@methods_flag
@click.option("--lambda", "scale", type=float, default=1.0, help="Factor of the combined deltas.")
@click.option("--space", type=SPACES, help="Align the adapters there; --method is the rule inside.")
@click.option("--dtype", default="auto", show_default=True, help="auto keeps every tensor's own; or bf16, f16, f32.")
@click.option("--max-shard-size", metavar="SIZE", help="Like 5GB; by default the base's own shards are kept.")
@click.option("--jobs", type=click.IntRange(1), help="Worker threads; the result does not depend on it.")
@click.option("--as-trained", metavar="GRID", help="nf4, fp4 or int8: fold onto the values that QLoRA training saw.")
@click.option("--double-quant", is_flag=True, help="With --as-trained: training used nested scales.")
@click.option("--quant-dtype", default="auto", help="With --as-trained: the dtype in which training loaded the base.")
@click.option(
    "--skip-module", "skip_modules", multiple=True, help="With --as-trained: a module that stayed in 16 bits."
)
@click.option("--base16", metavar="REF", help="The original of a quantized BASE, to fold onto in its place.")
@click.option("--residual-base", is_flag=True, help="BASE is what training left behind, not the original model.")
@click.option("--allow-unknown", is_flag=True, help="Go on where an adapter's config has fields not known here.")
@method_options
@click.option("--dry-run", is_flag=True, help="Show what would be done, from headers alone.")
@click.option("--save-plan", type=click.Path(path_type=Path), metavar="FILE", help="Write the plan and stop.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run; keep finished work if interrupted again.")
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(
    base: str,
    adapters: tuple[str, ...],
    out: Path | None,
    weights: tuple[float, ...],
    method: str,
    scale: float,
    space: str | None,
    dtype: str,
    max_shard_size: str | None,
    jobs: int | None,
    as_trained: str | None,
    double_quant: bool,
    quant_dtype: str,
    skip_modules: tuple[str, ...],
    base16: str | None,
    residual_base: bool,
    allow_unknown: bool,
    dry_run: bool,
    save_plan: Path | None,
    resume: bool,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Fold ADAPTERs into BASE and write a Hugging Face folder.

    The model is never loaded: weights stream through in blocks, untouched tensors are copied byte for byte, and the
    result appears whole or not at all.

    \b
    Example:
      adapterkit merge meta-llama/Llama-3.2-1B ./my-adapter -o merged --dry-run
      adapterkit merge meta-llama/Llama-3.2-1B ./my-adapter -o merged
      adapterkit merge meta-llama/Llama-3.2-1B ./math ./code -o merged --method ties --density 0.2
    """
    from adapterkit.merge import merge, plan_merge

    started = time.monotonic()
    if out is None and not (dry_run or save_plan):
        raise click.UsageError("Missing option '-o' / '--out': the folder to make.")
    how: dict[str, Any] = {
        "weights": weights or None,
        "method": method,
        "scale": scale,
        "space": space,
        "parameters": given(options),
        "dtype": dtype,
        "max_shard_size": max_shard_size,
        "jobs": jobs,
        "as_trained": as_trained,
        "double_quant": double_quant,
        "quant_dtype": quant_dtype,
        "skip_modules": skip_modules or None,
        "base16": base16,
        "residual_base": residual_base,
        "allow_unknown": allow_unknown,
    }
    if dry_run or save_plan is not None:
        planned = plan_merge(base, adapters, to_save=save_plan is not None, **how)
        if save_plan is not None:
            save_plan.write_text(planned.plan.to_json())
            note(f"plan of {len(planned.plan.files)} parts written to {save_plan}")
        report = planned.report(
            out or "", seconds=time.monotonic() - started, peak_memory=planned.plan.peak_memory, dry_run=True
        )
    else:
        assert out is not None
        progress = Progress("merging", enabled=not as_json)
        report = merge(base, adapters, out, force=force, resume=resume, progress=progress, **how)
        progress.close()
    if as_json:
        show_json(report)
        return
    for text in report.notes:
        note(f"note: {text}")
    for used in report.adapters:
        weight = "" if used.weight == 1 else f" x {used.weight:g}"
        say(f"{used.ref} ({used.method}){weight}")
    if report.method != "linear":
        say(f"  by {report.method}")
    say(f"  into {report.base}: {count(report.touched)} of {count(report.tensors)} tensors changed, the rest copied")
    for name in report.added:
        say(f"  new: {name}")
    if dry_run or save_plan is not None:
        say(
            f"would write {size(report.nbytes)} in {len(report.files)} files, about {size(report.peak_memory)} of memory"
        )
        return
    resumed = f", {report.reused} tensors re-used" if report.reused else ""
    say(f"{report.out}: {size(report.nbytes)} in {len(report.files)} files, {report.seconds:.1f} s{resumed}")
