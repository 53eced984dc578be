"""`adapterkit verify`"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterkit.adapters.experts import ORDERS
from adapterkit.cli.methods import NAMES, SPACES, MethodCommand, given, methods_flag
from adapterkit.cli.output import Progress, count, note, say, show_json

if TYPE_CHECKING:
    from adapterkit.verbs.verify.report import VerifyReport


@click.command(name="verify", cls=MethodCommand, short_help="Prove that a merged model is the trained one.")
@click.argument("merged")
@click.option("--base", required=True, metavar="BASE", help="What the adapters were folded onto.")
@click.option("--adapter", "adapters", multiple=True, required=True, metavar="ADAPTER", help="Once for each, in order.")
@click.option("--weight", "weights", type=float, multiple=True, help="How strongly an adapter counts; once for each.")
@click.option(
    "--level",
    type=click.Choice(["tensors", "layers", "model"]),
    help="How deep to look; each does the ones before it too. By default tensors, or model when --prompts, --max-kl or "
    "--min-top1 is given.",
)
@click.option(
    "--prompts", type=click.Path(path_type=Path), metavar="FILE", help="Text or JSON Lines; else a mixed set."
)
@click.option("--max-kl", type=float, metavar="X", help="Exit with 3 when the mean KL divergence is larger (nats).")
@click.option("--min-top1", type=float, metavar="Y", help="Exit with 3 when fewer tokens agree, as 0.99.")
@click.option("--min-retention", type=float, metavar="Z", help="Exit with 3 when less of the change survives [0.5].")
@click.option(
    "--on-purpose",
    "on_purpose",
    multiple=True,
    metavar="KEY",
    help="Metadata of a GGUF file that was set otherwise than the base's on purpose, as tokenizer.chat_template.",
)
@click.option("--method", type=NAMES, help="How the deltas of several adapters became one; see --methods.")
@methods_flag
@click.option("--lambda", "scale", type=float, help="Factor of the combined deltas.")
@click.option("--space", type=SPACES, help="The space in which the adapters were aligned.")
@click.option("--as-trained", metavar="GRID", help="nf4, fp4 or int8: the merge was folded onto what training saw.")
@click.option("--double-quant", is_flag=True, help="With --as-trained: nested scales.")
@click.option("--quant-dtype", help="With --as-trained: the dtype in which training loaded the base.")
@click.option(
    "--skip-module", "skip_modules", multiple=True, help="With --as-trained: a module that stayed in 16 bits."
)
@click.option("--base16", metavar="REF", help="The original of a quantized BASE, which was folded onto in its place.")
@click.option("--residual-base", is_flag=True, help="BASE is what training left behind, not the original model.")
@click.option("--expert-order", type=click.Choice(ORDERS), help="Of experts in a stacked lora_B; see merge.")
@click.option("--allow-unknown", is_flag=True, help="Go on where an adapter's config has fields not known here.")
@click.option("--jobs", type=click.IntRange(1), help="Worker threads.")
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Write the evidence as one HTML page.")
@click.option("--markdown", type=click.Path(path_type=Path), metavar="FILE", help="Write a summary as Markdown.")
@click.option("--step-summary", is_flag=True, help="Append that summary to $GITHUB_STEP_SUMMARY.")
@click.option(
    "--attach/--no-attach",
    default=None,
    help="Write the figures into MERGED's record. By default into the adapterkit.json beside an output, and not into a "
    "registered version, which would make a new one.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(
    merged: str,
    base: str,
    adapters: tuple[str, ...],
    weights: tuple[float, ...],
    level: str | None,
    prompts: Path | None,
    max_kl: float | None,
    min_top1: float | None,
    min_retention: float | None,
    on_purpose: tuple[str, ...],
    method: str | None,
    scale: float | None,
    space: str | None,
    as_trained: str | None,
    double_quant: bool,
    quant_dtype: str | None,
    skip_modules: tuple[str, ...],
    base16: str | None,
    residual_base: bool,
    expert_order: str | None,
    allow_unknown: bool,
    jobs: int | None,
    html: Path | None,
    markdown: Path | None,
    step_summary: bool,
    attach: bool | None,
    as_json: bool,
    **options: Any,
) -> int:
    """Compare MERGED with BASE and its adapters, tensor by tensor, and say what is wrong by name.

    Every tensor is recomputed and compared in a stream; nothing is loaded whole. Options of the merge are read from the
    adapterkit.json beside MERGED where it has one. The exit code is 3 when MERGED is not what was trained.

    \b
    Example:
      adapterkit verify merged --base meta-llama/Llama-3.2-1B --adapter ./my-adapter
      adapterkit verify merged-Q4_K_M.gguf --base Llama-3.2-1B-F16.gguf --adapter ./my-adapter --html report.html
      adapterkit verify merged --base BASE --adapter ./my-adapter --prompts prompts.txt --max-kl 0.01 --min-top1 0.99
    """
    from adapterkit.verbs.verify import verify

    deep = prompts is not None or max_kl is not None or min_top1 is not None
    progress = Progress("verifying", enabled=not as_json)
    how = {
        "weights": weights or None,
        "method": method,
        "scale": scale,
        "space": space,
        "parameters": given(options) or None,
        "as_trained": as_trained,
        "double_quant": double_quant or None,
        "quant_dtype": quant_dtype,
        "skip_modules": skip_modules or None,
        "base16": base16,
        "residual_base": residual_base or None,
        "expert_order": expert_order,
        "allow_unknown": allow_unknown or None,
    }
    report = verify(
        merged,
        base=base,
        adapters=adapters,
        level=level or ("model" if deep else "tensors"),
        prompts=prompts,
        max_kl=max_kl,
        min_top1=min_top1,
        min_retention=min_retention,
        on_purpose=on_purpose,
        jobs=jobs,
        progress=progress,
        **how,
    )
    progress.close()
    write(report, html, markdown, step_summary=step_summary)
    if attach or (attach is None and report.record and Path(merged).exists()):
        _attach(report, merged)
    if as_json:
        show_json(report)
    else:
        show(report)
    return 0 if report.ok else 3


def _attach(report: VerifyReport, merged: str) -> None:
    from adapterkit.verbs.verify.evidence import attach

    found = attach(report, merged)
    if found.new:
        note(f"evidence written to {found.ref or found.path}")


def write(report: VerifyReport, html: Path | None, markdown: Path | None, *, step_summary: bool = False) -> None:
    """The page and the summary, where they are wanted.

    Raises:
        OutputError: a file cannot be written.
        UsageError: there is no job to summarise.
    """
    from adapterkit.disk import deliver
    from adapterkit.errors import OutputError, UsageError
    from adapterkit.verbs.verify.summary import markdown as as_markdown

    try:
        if html is not None:
            from adapterkit.verbs.verify.page import html as as_page

            deliver(html, as_page(report).encode())
            note(f"page written to {html}")
        if markdown is not None:
            deliver(markdown, as_markdown(report).encode())
            note(f"summary written to {markdown}")
        if step_summary:
            summary = os.environ.get("GITHUB_STEP_SUMMARY")
            if not summary:
                raise UsageError("GITHUB_STEP_SUMMARY is not set", "leave out --step-summary outside of a job")
            with open(summary, "a", encoding="utf-8") as file:
                file.write(as_markdown(report))
    except OSError as error:
        raise OutputError(f"{error.filename} cannot be written ({error.strerror})", "check the path") from None


def show(report: VerifyReport) -> None:
    """The verdict, what is wrong, and the figures."""
    from adapterkit.verbs.verify.summary import distance

    for text in report.notes:
        note(f"note: {text}")
    tensors = report.tensors
    for one in report.findings:
        if one.severity == "note":
            note(f"note: {one.text}")
        else:
            say(f"{one.severity}: {one.kind}: {one.text}{'; ' + one.hint if one.hint else ''}")
    counts = ", ".join(f"{count(number)} {status}" for status, number in tensors.counts.items())
    say(f"tensors  {counts}; {count(tensors.touched)} of {count(tensors.total)} changed by adapters")
    say(
        f"         {tensors.retention:.2%} of the change is there (cosine {tensors.cosine:.5f}, |d|/|W| "
        f"{tensors.relative:.1e}, unmoved {tensors.unmoved:.1%}), {tensors.seconds:.1f} s"
    )
    if report.layers is not None:
        layers = report.layers
        say(
            f"layers   outputs off by {layers.error:.1e}, where the adapter changes them by {layers.change:.1e}; "
            f"worst: {layers.worst}"
        )
    if report.model is not None:
        model = report.model
        say(f"model    {model.tokens:,} tokens of {len(model.prompts)} prompts in {model.runtime}")
        say(f"         merged beside base + adapters: {distance(model.merged)}")
        say(f"         base beside base + adapters:   {distance(model.base)}")
        say("         perplexity: " + ", ".join(f"{name} {value:.3f}" for name, value in model.perplexity.items()))
    say(f"{'verified' if report.ok else 'not verified'}: {report.summary}")
