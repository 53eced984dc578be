"""`adapterkit imatrix`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapterkit.cli.options import was_given
from adapterkit.cli.output import Progress, count, file_count, note, say, show_json
from adapterkit.cli.paths import FILE_THERE
from adapterkit.errors import UsageError, counted
from adapterkit.ops.device import CPU
from adapterkit.requests.groups import MODEL_WHERE
from adapterkit.requests.option import DEVICES

if TYPE_CHECKING:
    from adapterkit.places import Address


@click.command(name="imatrix", short_help="Measure which columns of the weights matter, for quantizing a model.")
@click.argument("model", required=False)
@click.option("--text", type=FILE_THERE, metavar="FILE", help="Text like the model's own.")
@click.option(
    "--in-file",
    "files",
    multiple=True,
    type=FILE_THERE,
    metavar="FILE",
    help="A matrix to add up with the others, in place of MODEL and --text; given twice or more.",
)
@click.option("-o", "--out", required=True, type=FILE_THERE, help="The .gguf file to make.")
@click.option("--chunk", type=click.IntRange(2), default=512, show_default=True, help="Tokens at a time.")
@click.option("--chunks", type=click.IntRange(1), help="At most so many; by default the whole text.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bf16", "f16", "f32"]),
    default="auto",
    show_default=True,
    help="To compute in. auto: float32 on the CPU, with weights in memory as they are stored; elsewhere the model's own.",
)
@click.option(
    "--device",
    default=CPU,
    show_default=True,
    metavar=DEVICES,
    help=MODEL_WHERE,
)
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(
    model: str | None,
    text: Path | Address | None,
    files: tuple[Path | Address, ...],
    out: Path | Address,
    chunk: int,
    chunks: int | None,
    dtype: str,
    device: str,
    force: bool,
    as_json: bool,
) -> None:
    """Run MODEL (a folder, merged if adapters belong to it, or a GGUF file) over a text and write an importance matrix.

    The file is llama-imatrix's: `--imatrix` here and llama-quantize take it. Needs transformers.

    \b
    Example:
      adapterkit imatrix ./merged --text calibration.txt -o imatrix.gguf
      adapterkit convert ./merged -o model-IQ4_XS.gguf --quant IQ4_XS --imatrix imatrix.gguf
      adapterkit imatrix --in-file english.gguf --in-file code.gguf -o both.gguf
    """
    from adapterkit.verbs.imatrix import added, imatrix

    if files:
        if model is not None or text is not None:
            raise UsageError("--in-file adds matrices up, and runs no MODEL", "leave MODEL and --text out")
        ctx = click.get_current_context()
        idle = next((name for name in ("chunk", "chunks", "dtype", "device") if was_given(ctx, name)), None)
        if idle is not None:
            raise UsageError(f"--{idle} has no meaning with --in-file", "leave it out")
        sums = added(files, out, force=force)
        if as_json:
            show_json(sums)
        else:
            over = f"{counted(sums.tensors, 'weight')} over {counted(sums.chunks, 'chunk')}"
            say(f"{sums.out}: {over}, {file_count(len(files))} added up")
        return
    if model is None or text is None:
        raise UsageError("MODEL and --text are missing", "give them, or matrices to add up with --in-file")
    progress = Progress("running over chunk", enabled=not as_json, form=count)
    report = imatrix(
        model,
        text,
        out,
        chunk=chunk,
        chunks=chunks,
        dtype=dtype,
        device=device,
        force=force,
        progress=progress,
    )
    progress.close()
    if as_json:
        show_json(report)
        return
    for said in report.notes:
        note(f"note: {said}")
    ran = f"{counted(report.chunks, 'chunk')} of {counted(report.chunk, 'token')}, computed in {report.computed}"
    say(f"{report.out}: {counted(report.tensors, 'weight')} over {ran}, {report.seconds:.1f} s")
