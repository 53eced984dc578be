"""`adapterkit combine`"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.cli.options import command as command_of
from adapterkit.cli.output import Progress, note, say, show_json, size
from adapterkit.cli.written import asked, told
from adapterkit.errors import counted
from adapterkit.requests.adapters import CombineRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapterkit.verbs.report import ModuleRank


@command_of(CombineRequest, name="combine", short_help="Make one adapter of several.")
def command(request: CombineRequest, as_json: bool) -> None:
    """Combine ADAPTERs into one plain LoRA adapter that PEFT, vLLM and llama.cpp load.

    The sum is the true sum of the deltas, all scalings folded in. Methods that give deltas of full rank need --rank or
    --energy, or a --space.

    With --method arrow the adapters stay apart: a folder that PEFT's create_arrow_model loads, with the prototypes by which it
    chooses between them for each token.

    \b
    Example:
      adapterkit combine ./math ./code -o both --method svd --rank 32 --weight 0.6 --weight 0.4
      adapterkit combine ./math ./code -o both --method ties --space core --lambda 0.8
    """
    from adapterkit.verbs.combine import combine

    with Progress("combining", enabled=not as_json) as progress:
        report = combine(**asked(request, "the folder to make", progress))
    if as_json:
        show_json(report)
        return
    for text in report.notes:
        note(f"note: {text}")
    for used in report.adapters:
        say(f"{used.ref} ({used.label or used.method}){'' if used.weight == 1 else f' x {used.weight:g}'}")
    how = f"{report.method}{f' in {report.space}' if report.space else ''}"
    if told(report, request):
        say(f"  by {how}, rank {report.rank} at most")
        return
    if not report.modules:  # the adapters stay apart
        say(f"  {how}, rank {report.rank}")
        say(f"{report.out}: {size(report.nbytes)}, {report.seconds:.1f} s")
        return
    say(
        f"  by {how}: {counted(len(report.modules), 'layer')}, rank {report.rank}{' and others' if report.own_ranks else ''}"
    )
    say(f"  {kept(report.modules)}")
    resumed = f", {report.reused} layers re-used" if report.reused else ""
    say(f"{report.out}: {size(report.nbytes)}, {report.seconds:.1f} s{resumed}")


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
