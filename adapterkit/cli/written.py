"""What the verbs that write have in common on the command line."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from adapterkit.cli.output import Progress, duration, file_count, note, say, size
from adapterkit.errors import counted
from adapterkit.requests.workers import WRITTEN_JOBS

if TYPE_CHECKING:
    from adapterkit.verbs.report import Forecast


def asked(request: Any, what: str, progress: Progress) -> dict[str, Any]:
    """The keywords of the verb's function for a request of the command line.

    Args:
        what: is made, for the error where nothing says its name.

    Raises:
        UsageError: no output is named, and something is to be written.
    """
    if request.out is None and request.writes:
        given = [str(one) for one in getattr(request, "adapters", ())]
        if len(given) > 1 and "/" not in given[-1].removeprefix("./") and not os.path.exists(given[-1]):
            last = given[-1]
            raise click.UsageError(f"Missing option '-o' / '--out': {what}. If {last} is the output: -o {last}")
        raise click.UsageError(f"Missing option '-o' / '--out': {what}.")
    return {name: getattr(request, name) for name in request.named} | {"progress": progress}


def told(report: Any, request: Any) -> bool:
    """Say what would be written, where nothing was; whether that was so."""
    if request.save_plan is not None:
        note(f"plan written to {request.save_plan}")
    if request.writes and getattr(request, "on", None) not in WRITTEN_JOBS:
        return False
    files = getattr(report, "files", ("adapter_model.safetensors",))
    say(f"would write {size(report.nbytes)} in {file_count(len(files))}, about {size(report.peak_memory)} of memory")
    foretold(getattr(report, "forecast", ()))
    return True


def foretold(rows: Sequence[Forecast]) -> None:
    """What workers would take, a line for each number of them."""
    if not rows:
        return
    first = rows[0]
    say(
        f"{counted(first.parts, 'part')}; reads {size(first.bytes_down)}, writes {size(first.bytes_up)}; by workers that move "
        f"{first.bandwidth * 8 / 1e9:g} Gb/s each way and have {counted(first.jobs, 'thread')} (planned, not run):"
    )
    say(f"  {'workers':>7} {'time':>10} {'busy':>5} {'money':>9}")
    for row in rows:
        say(f"  {row.workers:>7} {duration(row.seconds):>10} {row.busy:>5.0%} {row.money:>9.2f}")
