"""`adapterkit resize`"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.cli.options import command as command_of
from adapterkit.cli.output import Progress, note, say, show_json, size
from adapterkit.cli.written import asked, told
from adapterkit.requests.adapters import ResizeRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapterkit.verbs.report import ModuleRank


@command_of(ResizeRequest, name="resize", short_help="Bring an adapter to another rank.")
def command(request: ResizeRequest, as_json: bool) -> None:
    """Bring ADAPTER to a smaller rank; each layer becomes the best approximation of that rank.

    \b
    Example:
      adapterkit resize ./my-adapter -o small --energy 0.99
      adapterkit resize ./my-adapter -o small --rank 8
    """
    from adapterkit.verbs.resize import resize, total_kept

    with Progress("resizing", enabled=not as_json) as progress:
        report = resize(**asked(request, "the folder to make", progress))
    if as_json:
        show_json(report)
        return
    for text in report.notes:
        note(f"note: {text}")
    if told(report, request):
        return
    show_ranks(report.modules)
    share, error = total_kept(report.modules)
    say(f"in all: {share:.4%} of the squared norm kept, error {error:.4g}")
    say(f"{report.out}: rank {report.rank}, {size(report.nbytes_before)} to {size(report.nbytes)}")


def show_ranks(modules: Sequence[ModuleRank]) -> None:
    """What was kept of each layer."""
    say(f"{'rank':>11} {'norm':>10} {'kept':>9} {'error':>9}  layer")
    for row in modules:
        ranks = f"{row.before} > {row.rank}" if row.before else f"{row.rank}"
        say(f"{ranks:>11} {row.norm:>10.4g} {1 - row.error**2:>9.4%} {row.error:>9.3g}  {row.module}")
