"""What the verbs that write have in common on the command line."""

from __future__ import annotations

from typing import Any

import click

from adapterkit.cli.output import Progress, note, say, size


def asked(request: Any, what: str, progress: Progress) -> dict[str, Any]:
    """The keywords of the verb's function for a request of the command line.

    Args:
        what: is made, for the error where nothing says its name.

    Raises:
        UsageError: no output is named, and something is to be written.
    """
    if request.out is None and request.writes:
        raise click.UsageError(f"Missing option '-o' / '--out': {what}.")
    return {name: getattr(request, name) for name in request.named} | {"progress": progress}


def told(report: Any, request: Any) -> bool:
    """Say what would be written, where nothing was; whether that was so."""
    if request.save_plan is not None:
        note(f"plan written to {request.save_plan}")
    if request.writes:
        return False
    files = getattr(report, "files", ("adapter_model.safetensors",))
    say(f"would write {size(report.nbytes)} in {len(files)} files, about {size(report.peak_memory)} of memory")
    return True
