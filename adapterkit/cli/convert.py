"""`adapterkit convert`"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from adapterkit.cli.attest import attest_option, attested
from adapterkit.cli.handover import checked, for_option, handed
from adapterkit.cli.output import Progress, count, note, say, show_json, size
from adapterkit.cli.quantization import quantization, quantization_options
from adapterkit.verbs.conversions.formats import FORMATS


@click.command(name="convert", short_help="Write a model or an adapter in another format.")
@click.argument("src")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="The file or folder to make.")
@click.option("--to", metavar="FORMAT", help=f"{', '.join(FORMATS)}; by default what OUT's suffix says.")
@click.option("--base", help="The adapter's base: a GGUF file or a Hugging Face folder.")
@click.option("--plain", is_flag=True, help="An adapter as plain LoRA: one rank, one alpha, whatever it was.")
@click.option("--rank", type=click.IntRange(1), help="Of what has to be decomposed: at most this rank.")
@click.option("--energy", type=float, help="Or the smallest rank that keeps this share of the squared norm.")
@quantization_options
@click.option("--double-quant", is_flag=True, help="Of nf4 and fp4: nested scales.")
@click.option(
    "--skip-module", "skip_modules", multiple=True, help="Of a quantized folder: a module to keep in 16 bits."
)
@click.option(
    "--calibration", type=click.Path(path_type=Path), metavar="FILE", help="Of awq and gptq: text like the model's own."
)
@click.option(
    "--compressor", type=click.Path(path_type=Path), metavar="PYTHON", help="The Python that has llm-compressor."
)
@click.option("--max-shard-size", metavar="SIZE", help="Like 5GB: write several files of at most this size.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bf16", "f16", "f32"]),
    default="auto",
    show_default=True,
    help="Float type of a GGUF made from a Hugging Face model.",
)
@click.option(
    "--mmproj",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Of a GGUF output: the vision tower to copy beside it.",
)
@click.option("--pre", metavar="NAME", help="Its pre-tokenizer, by llama.cpp's name, where it is not recognised.")
@click.option("--jobs", type=click.IntRange(1), help="Worker threads; the result does not depend on it.")
@click.option("--allow-pickle", is_flag=True, help="Load pickled weights (.bin), as tensors only, in another process.")
@attest_option
@for_option
@click.option("--dry-run", is_flag=True, help="Show what would be done, from headers alone.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run; keep finished work if interrupted again.")
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(
    src: str,
    out: Path | None,
    to: str | None,
    base: str | None,
    plain: bool,
    rank: int | None,
    energy: float | None,
    double_quant: bool,
    skip_modules: tuple[str, ...],
    calibration: Path | None,
    compressor: Path | None,
    dtype: str,
    pre: str | None,
    mmproj: Path | None,
    max_shard_size: str | None,
    jobs: int | None,
    allow_pickle: bool,
    attest: bool,
    server: str | None,
    dry_run: bool,
    resume: bool,
    force: bool,
    as_json: bool,
    **types: Any,
) -> None:
    """Write SRC in another format: a model in other types, an adapter for another trainer or server, or back.

    \b
    Example:
      adapterkit convert ./model -o model-Q4_K_M.gguf --quant Q4_K_M
      adapterkit convert model-F16.gguf -o model-Q4_K_M.gguf --quant Q4_K_M
      adapterkit convert ./merged --to nf4 --double-quant -o merged-nf4
      adapterkit convert ./model-gptq --to bf16 -o model
      adapterkit convert ./my-adapter --to gguf-lora --base model-F16.gguf -o my-adapter.gguf
      adapterkit convert my-adapter.gguf --to peft --base ./base -o my-adapter
      adapterkit convert ./my-dora --to peft --plain --base ./base --energy 0.999 -o my-lora
      adapterkit convert ./my-adapter --to mlx -o my-mlx-adapter
      adapterkit convert ./old-adapter --to peft --allow-pickle -o my-adapter
    """
    from adapterkit.cli.combine import kept
    from adapterkit.verbs.convert import convert, plan_convert

    started = time.monotonic()
    checked(server, out)
    asked = quantization(types)
    if out is None and not dry_run:
        raise click.UsageError("Missing option '-o' / '--out': the file or folder to make.")
    how: dict[str, Any] = {
        "to": to,
        "base": base,
        "plain": plain,
        "rank": rank,
        "energy": energy,
        "quantization": asked,
        "double_quant": double_quant,
        "skip_modules": skip_modules,
        "calibration": calibration,
        "compressor": compressor,
        "dtype": dtype,
        "pre": pre,
        "max_shard_size": max_shard_size,
        "jobs": jobs,
    }
    if dry_run:
        planned = plan_convert(src, out=out, **how)
        peak = planned.peak_memory
        report = planned.report(out or "", seconds=time.monotonic() - started, peak_memory=peak, dry_run=True)
    else:
        from adapterkit.gguf.projector import Projector

        assert out is not None
        progress = Progress("converting", enabled=not as_json)
        how |= {"allow_pickle": allow_pickle, "force": force, "resume": resume, "progress": progress}
        projector = Projector(mmproj, out, force=force)
        report = convert(src, out, **how)
        projector.copy()
        progress.close()
        attested(attest, out, [base, src])
        handed(server, out, src)
    if as_json:
        show_json(report)
        return
    for text in report.notes:
        note(f"note: {text}")
    kinds = ", ".join(f"{name} ({times})" for name, times in sorted(report.types.items(), key=lambda kv: -kv[1]))
    say(f"{report.src} to {report.to}: {count(report.tensors)} tensors, {count(report.copied)} copied; {kinds}")
    if report.modules:
        say(f"  {kept(report.modules)}")
    if dry_run:
        say(
            f"would write {size(report.nbytes)} in {len(report.files)} files, about {size(report.peak_memory)} of memory"
        )
        return
    resumed = f", {report.reused} tensors re-used" if report.reused else ""
    say(f"{report.out}: {size(report.nbytes)} in {len(report.files)} files, {report.seconds:.1f} s{resumed}")
