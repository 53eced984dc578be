"""`adapterkit merge`"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.cli.options import command as command_of
from adapterkit.cli.output import Progress, count, file_count, note, say, show_json, size
from adapterkit.cli.written import asked, told
from adapterkit.errors import counted
from adapterkit.requests.merge import MergeRequest

if TYPE_CHECKING:
    from adapterkit.adapters.fidelity import FidelityReport
    from adapterkit.verbs.report import MergeReport, ResidualReport


@command_of(MergeRequest, name="merge", short_help="Fold adapters into a base, in one streaming pass.")
def command(request: MergeRequest, as_json: bool) -> int:
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
    from adapterkit.verbs.merge import merge

    with Progress("merging", enabled=not as_json) as progress:
        report = merge(**asked(request, "the folder to make", progress))
    if as_json:
        show_json(report)
    else:
        show(report, request)
    return 0 if report.ok else 3


def show(report: MergeReport, request: MergeRequest) -> None:
    """The report, for readers."""
    for text in report.notes:
        note(f"note: {text}")
    for used in report.adapters:
        weight = "" if used.weight == 1 else f" x {used.weight:g}"
        say(f"{used.ref} ({used.label or used.method}){weight}")
    if report.method != "linear":
        say(f"  by {report.method}")
    values = "" if report.base_values == "as stored" else f" ({report.base_values})"
    rest = report.tensors - report.touched
    changed, total, copied = count(report.touched), count(report.tensors), count(report.copied)
    said = (
        f"{changed} of {counted(report.tensors, 'tensor')} changed, the rest copied"
        if report.copied == rest
        # The output has other tensors than the base then: stacks, scales, ...
        else f"{counted(report.touched, 'tensor')} changed; of the output's {total}, {copied} are copied, the others rewritten"
    )
    say(f"  into {report.base}{values}: {said}")
    for name in report.added:
        say(f"  new: {name}")
    if report.residual is not None:
        show_residual(report.residual)
    if told(report, request):
        return
    resumed = f", {report.reused} tensors re-used" if report.reused else ""
    say(f"{report.out}: {size(report.nbytes)} in {file_count(len(report.files))}, {report.seconds:.1f} s{resumed}")
    if report.fidelity is not None:
        show_fidelity(report.fidelity)
    for words in report.unmet:
        note(f"error: {words}")


def show_residual(found: ResidualReport) -> None:
    """What stands beside the output, and how the two are served."""
    held = "" if found.held is None else f", {found.held:.1%} of what rounding takes"
    say(f"{found.out or 'residual'}: rank {found.rank}, {counted(found.modules, 'weight')}, {size(found.nbytes)}{held}")
    for text in found.notes[:4]:
        note(f"note: {text}")
    if len(found.notes) > 4:
        note(f"note: and {len(found.notes) - 4} more weights like these")
    if found.command:
        say(f"  together: {found.command}")


def show_fidelity(found: FidelityReport) -> None:
    """What survives, and the tensors that keep least."""
    say(found.summary)
    trained = any(row.base_error is not None for row in found.tensors)
    say(
        f"  {'cosine':>7} {'error':>7} {'retention':>9} {'unmoved':>8} {'|d|/|W|':>8}{' |W-q|/|d|' if trained else ''}  tensor"
    )
    for row in found.tensors[:5]:
        error = f" {row.base_error:>9.2f}" if row.base_error is not None else " " * 10 * trained
        off = row.error if row.weighed is None else row.weighed
        kept = f"{row.cosine:>7.4f} {off:>7.2g} {row.retention:>9.1%} {row.unmoved:>8.1%} {row.relative:>8.1e}"
        say(f"  {kept}{error}  {row.name}")
    if found.base_error is not None:
        say(f"quantizing the base moved it {found.base_error:.2g} times as far as the adapter does (the median layer)")
    if found.advice:
        note(f"warning: {found.advice}")
