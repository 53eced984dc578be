"""`adapterkit extract`"""

from __future__ import annotations

from adapterkit.cli.options import command as command_of
from adapterkit.cli.output import Progress, note, say, show_json, size
from adapterkit.cli.resize import show_ranks
from adapterkit.cli.written import asked, told
from adapterkit.requests.adapters import ExtractRequest


@command_of(ExtractRequest, name="extract", short_help="Make an adapter of the difference of two checkpoints.")
def command(request: ExtractRequest, as_json: bool) -> None:
    """Write what training made of BASE, TUNED - BASE, as a LoRA adapter; both checkpoints are streamed.

    \b
    Example:
      adapterkit extract meta-llama/Llama-3.2-1B ./my-finetune -o adapter --energy 0.99
    """
    from adapterkit.verbs.extract import extract
    from adapterkit.verbs.resize import total_kept

    with Progress("extracting", enabled=not as_json) as progress:
        report = extract(**asked(request, "the folder to make", progress))
    if as_json:
        show_json(report)
        return
    for text in report.notes:
        note(f"note: {text}")
    if told(report, request):
        return
    show_ranks(report.modules)
    share, error = total_kept(report.modules)
    for name in report.saved:
        say(f"{'whole':>11} {'':>10} {'':>9} {'':>9}  {name}")
    say(f"in all: {share:.4%} of the squared difference kept, error {error:.4g}; {report.unchanged} tensors unchanged")
    say(f"{report.out}: rank {report.rank}, {size(report.nbytes)}, {report.seconds:.1f} s")
