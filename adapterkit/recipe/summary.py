"""A build as Markdown, for a job summary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapterkit.errors import counted, size
from adapterkit.recipe.report import UNCHANGED, BuildPlan, BuildReport, BuiltOutput


def of_build(report: BuildReport) -> str:
    """What was made of what, with the digests."""
    done = f"{report.changed} of {counted(len(report.outputs), 'output')} made" if report.changed else "nothing to do"
    locked = " against the lock" if report.locked else ""
    lines = [f"### adapterkit build {report.recipe}", "", f"{done} in {report.seconds:.1f} s{locked}.", ""]
    lines += ["| output | | size | what was done | sha256 |", "|---|---|---|---|---|"]
    for row in report.outputs:
        what = "unchanged" if row.state == UNCHANGED else f"{row.verb} to {row.to}"
        told = "; ".join((what, *_told(row)))
        lines.append(f"| {row.name} | {cell(row.out)} | {size(row.nbytes)} | {cell(told)} | `{row.digest}` |")
    lines += ["", "| input | is | sha256 of its files |", "|---|---|---|"]
    for name, pin in report.inputs.items():
        files = "<br>".join(f"{cell(file)} `{digest[:16]}`" for file, digest in pin["files"].items())
        lines.append(f"| {name.removesuffix('.ref')} | {cell(pin['pin'])} | {files} |")
    lines += ["", *(f"* {cell(text)}" for text in report.notes), ""]
    return "\n".join(lines)


def of_plan(planned: BuildPlan) -> str:
    """What would be made of what."""
    lines = [f"### adapterkit build --plan {planned.recipe}", ""]
    lines += ["| output | | state | reads | size | memory | then |", "|---|---|---|---|---|---|---|"]
    for row in planned.outputs:
        written = "" if row.nbytes is None else size(row.nbytes)
        memory = "" if row.peak_memory is None else size(row.peak_memory)
        reads, then = cell(", ".join(row.reads)), cell("; ".join(row.then))
        lines.append(
            f"| {row.name} | {cell(row.out)} | {row.state}: {cell(row.why)} | {reads} | {written} | {memory} | {then} |"
        )
    return "\n".join([*lines, ""])


def _told(row: BuiltOutput) -> list[str]:
    found = []
    if row.report is not None and row.report.get("touched"):
        found.append(f"{row.report['touched']} tensors changed")
    after: Mapping[str, Any] = row.after
    if "verify" in after:
        found.append(f"verified: {after['verify']['summary']}")
    if "register" in after:
        found.append(f"registered as {after['register']['ref']}")
    if "push" in after:
        found.append(f"pushed to {after['push']['url']}")
    return found


def cell(text: str) -> str:
    """Text for a cell of a table."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
