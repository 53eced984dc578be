"""`adapterkit merge`"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterkit.adapters.experts import ORDERS
from adapterkit.cli.attest import attest_option, attested
from adapterkit.cli.handover import checked, for_option, handed
from adapterkit.cli.methods import NAMES, SPACES, MethodCommand, given, methods_flag
from adapterkit.cli.output import Progress, count, note, say, show_json, size
from adapterkit.cli.quantization import NAMES as TYPES
from adapterkit.cli.quantization import quantization, quantization_options
from adapterkit.errors import UsageError

if TYPE_CHECKING:
    from adapterkit.adapters.fidelity import FidelityReport

FOLDER_FORMATS = ("nf4", "fp4", "int8", "fp8", "keep")
CALIBRATED = ("awq", "gptq")


@click.command(name="merge", cls=MethodCommand, short_help="Fold adapters into a base, in one streaming pass.")
@click.argument("base")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="The folder to make, or a .gguf file.")
@click.option("--weight", "weights", type=float, multiple=True, help="How strongly an adapter counts; once for each.")
@click.option("--method", type=NAMES, default="linear", show_default=True, help="How deltas become one; see --methods.")
@methods_flag
@click.option("--lambda", "scale", type=float, default=1.0, help="Factor of the combined deltas.")
@click.option("--space", type=SPACES, help="Align the adapters there; --method is the rule inside.")
@click.option("--dtype", default="auto", show_default=True, help="auto keeps every tensor's own; or bf16, f16, f32.")
@quantization_options
@click.option(
    "--mmproj",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Of a GGUF output: the vision tower to copy beside it.",
)
@click.option("--pre", metavar="NAME", help="Of a GGUF output: its pre-tokenizer, where it is not recognised.")
@click.option("--keep-touched", metavar="TYPE", help="Of a GGUF output: at least this type for what adapters change.")
@click.option(
    "--keep-below", type=float, metavar="X", help="Only where the change would come out with a cosine below X."
)
@click.option("--max-shard-size", metavar="SIZE", help="Like 5GB; by default the base's own shards are kept.")
@click.option("--jobs", type=click.IntRange(1), help="Worker threads; the result does not depend on it.")
@click.option("--device", default="cpu", show_default=True, metavar="cpu|cuda", help="Where blocks are computed.")
@click.option("--as-trained", metavar="GRID", help="nf4, fp4 or int8: fold onto the values that QLoRA training saw.")
@click.option("--double-quant", is_flag=True, help="With --as-trained or --quant nf4: nested scales.")
@click.option("--quant-dtype", default="auto", help="With --as-trained: the dtype in which training loaded the base.")
@click.option(
    "--skip-module", "skip_modules", multiple=True, help="With --as-trained: a module that stayed in 16 bits."
)
@click.option("--base16", metavar="REF", help="The original of a quantized BASE, to fold onto in its place.")
@click.option("--fidelity", is_flag=True, help="Measure, in the same pass, what of the change survives in the output.")
@click.option("--min-retention", type=float, metavar="X", help="Exit with 3 when less than this share survives.")
@click.option("--residual-base", is_flag=True, help="BASE is what training left behind, not the original model.")
@click.option(
    "--expert-order",
    type=click.Choice(ORDERS),
    help="Of experts in a stacked lora_B whose config does not say: fastest as in PEFT, slowest as Unsloth until 2026-09.",
)
@click.option("--allow-unknown", is_flag=True, help="Go on where an adapter's config has fields not known here.")
@click.option("--full-record", is_flag=True, help="Hash every byte of BASE and OUT for the adapterkit.json beside it.")
@attest_option
@for_option
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
    pre: str | None,
    mmproj: Path | None,
    max_shard_size: str | None,
    jobs: int | None,
    device: str,
    as_trained: str | None,
    double_quant: bool,
    quant_dtype: str,
    skip_modules: tuple[str, ...],
    base16: str | None,
    fidelity: bool,
    min_retention: float | None,
    residual_base: bool,
    expert_order: str | None,
    allow_unknown: bool,
    full_record: bool,
    attest: bool,
    server: str | None,
    dry_run: bool,
    save_plan: Path | None,
    resume: bool,
    force: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Fold ADAPTERs into BASE and write a Hugging Face folder, or a GGUF file where OUT ends in .gguf.

    The model is never loaded: weights stream through in blocks, untouched tensors are copied byte for byte, and the
    result appears whole or not at all.

    \b
    Example:
      adapterkit merge meta-llama/Llama-3.2-1B ./my-adapter -o merged --dry-run
      adapterkit merge meta-llama/Llama-3.2-1B ./my-adapter -o merged --fidelity
      adapterkit merge meta-llama/Llama-3.2-1B ./math ./code -o merged --method ties --density 0.2
      adapterkit merge meta-llama/Llama-3.2-1B ./my-adapter -o merged-Q4_K_M.gguf --quant Q4_K_M
      adapterkit merge Llama-3.2-1B-F16.gguf ./my-adapter -o merged-Q4_K_M.gguf --quant Q4_K_M
    """
    from adapterkit.verbs.merge import merge, plan_merge

    started = time.monotonic()
    checked(server, out)
    if out is None and not (dry_run or save_plan):
        raise click.UsageError("Missing option '-o' / '--out': the folder to make.")
    types = {name: options.pop(name) for name in (*TYPES, "keep_touched", "keep_below")}
    # `--quant` takes the formats of a folder too; the rest of its values are mixes of a GGUF file.
    folder_quant = types["mix"] if types["mix"] in FOLDER_FORMATS else None
    yes_lossy = types["yes_lossy"]
    if types["mix"] in CALIBRATED:
        raise UsageError(
            f"{types['mix']} needs a calibration, which a merge has no text for",
            f"merge to 16 bits, then convert that --to {types['mix']} --calibration FILE",
        )
    wider = types["keep_touched"] if folder_quant is not None else None
    if folder_quant is not None:
        types |= {"mix": None, "yes_lossy": False, "keep_touched": None}
    how: dict[str, Any] = {
        "weights": weights or None,
        "method": method,
        "scale": scale,
        "space": space,
        "parameters": given(options),
        "dtype": dtype,
        "pre": pre,
        "max_shard_size": max_shard_size,
        "jobs": jobs,
        "device": device,
        "as_trained": as_trained,
        "double_quant": double_quant and as_trained is not None,
        "quant": folder_quant,
        "quant_double": double_quant and folder_quant is not None,
        "keep_touched": wider,
        "quant_dtype": quant_dtype,
        "skip_modules": skip_modules or None,
        "base16": base16,
        "residual_base": residual_base,
        "expert_order": expert_order,
        "allow_unknown": allow_unknown,
        "quantization": quantization(types),
    }
    if dry_run or save_plan is not None:
        planned = plan_merge(base, adapters, out=out, fingerprints=save_plan is not None, **how)
        if save_plan is not None:
            from adapterkit.disk import deliver

            deliver(save_plan, planned.plan.to_json().encode())
            note(f"plan of {len(planned.plan.files)} parts written to {save_plan}")
        report = planned.report(
            out or "", seconds=time.monotonic() - started, peak_memory=planned.plan.peak_memory, dry_run=True
        )
    else:
        from adapterkit.gguf.projector import Projector

        assert out is not None
        progress = Progress("merging", enabled=not as_json)
        how |= {"fidelity": fidelity or min_retention is not None, "yes_lossy": yes_lossy, "full_record": full_record}
        projector = Projector(mmproj, out, force=force)
        report = merge(base, adapters, out, force=force, resume=resume, progress=progress, **how)
        projector.copy()
        progress.close()
        attested(attest, out, [base, base16, *adapters])
        handed(server, out, base)
    kept = report.fidelity is None or min_retention is None or report.fidelity.retention >= min_retention
    if as_json:
        show_json(report)
        return 0 if kept else 3
    for text in report.notes:
        note(f"note: {text}")
    for used in report.adapters:
        weight = "" if used.weight == 1 else f" x {used.weight:g}"
        say(f"{used.ref} ({used.method}){weight}")
    if report.method != "linear":
        say(f"  by {report.method}")
    values = "" if report.base_values == "as stored" else f" ({report.base_values})"
    say(
        f"  into {report.base}{values}: {count(report.touched)} of {count(report.tensors)} tensors changed, the rest copied"
    )
    for name in report.added:
        say(f"  new: {name}")
    if dry_run or save_plan is not None:
        say(
            f"would write {size(report.nbytes)} in {len(report.files)} files, about {size(report.peak_memory)} of memory"
        )
        return 0
    resumed = f", {report.reused} tensors re-used" if report.reused else ""
    say(f"{report.out}: {size(report.nbytes)} in {len(report.files)} files, {report.seconds:.1f} s{resumed}")
    if report.fidelity is not None:
        show_fidelity(report.fidelity)
    if not kept:
        note(f"error: less than {min_retention:.1%} of the change survives")
    return 0 if kept else 3


def show_fidelity(found: FidelityReport) -> None:
    """What survives, and the tensors that keep least."""
    say(found.summary)
    trained = any(row.base_error is not None for row in found.tensors)
    say(f"  {'retention':>9} {'cosine':>7} {'unmoved':>8} {'|d|/|W|':>8}{' |W-q|/|d|' if trained else ''}  tensor")
    for row in found.tensors[:5]:
        error = f" {row.base_error:>9.2f}" if row.base_error is not None else " " * 10 * trained
        say(f"  {row.retention:>9.1%} {row.cosine:>7.4f} {row.unmoved:>8.1%} {row.relative:>8.1e}{error}  {row.name}")
    if found.base_error is not None:
        say(f"quantizing the base moved it {found.base_error:.2g} times as far as the adapter does (the median layer)")
    if found.advice:
        note(f"warning: {found.advice}")
