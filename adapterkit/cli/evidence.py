"""`adapterkit evidence`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapterkit.cli.output import note, say, show_json
from adapterkit.cli.paths import FILE_THERE

if TYPE_CHECKING:
    from adapterkit.places import Address


@click.group(name="evidence", short_help="Add what an evaluation measured to a version, or show what is known of one.")
def command() -> None:
    """Figures that belong to the bytes of a version.

    \b
    Example:
      adapterkit evidence add my-adapter results_2026-05-02.json
      adapterkit evidence show my-adapter@prod
    """


@command.command(name="add", short_help="Read results files of harnesses into the record of a version.")
@click.argument("ref")
@click.argument("files", nargs=-1, required=True, type=FILE_THERE)
@click.option(
    "--of",
    "subject",
    default="self",
    type=click.Choice(["self", "base", "zeros", "shuffled"]),
    help="Whose figures these are: REF's own, or those of its base, of zeros, or of its shuffled values in its place.",
)
@click.option("--task", default="", help="The task, where a file states none.")
@click.option("--dry-run", is_flag=True, help="Show what would be added.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def add(ref: str, files: tuple[Path | Address, ...], subject: str, task: str, dry_run: bool, as_json: bool) -> None:
    """Add the figures in FILES to REF, which gets a new version with the same bytes; aliases stay where they are.

    FILES are results of lm-evaluation-harness, inspect-ai, lighteval or HELM, or a table {"acc": 0.71, "n": 500}. A file of
    another shape is refused.

    \b
    Example:
      adapterkit evidence add my-adapter@3 out/results_2026-05-02.json
      adapterkit evidence add my-adapter@3 base/results_2026-05-02.json --of base
    """
    from adapterkit.registry.evaluation import evidence_of, sentence
    from adapterkit.registry.evidence import attach_evaluation
    from adapterkit.results import read_results

    found = [one for file in files for one in read_results(file, subject=subject, task=task)]
    evidence_of(found)
    if dry_run:
        at = ref
    else:
        attached = attach_evaluation(ref, found)
        at = attached.ref or str(attached.path)
    if as_json:
        show_json({"ref": at, "added": [one.to_json() for one in found], "dry_run": dry_run})
        return
    for one in found:
        say(f"{one.key}: {sentence(one)}")
    if dry_run:
        say("nothing was added")
        return
    say(f"{at} carries {len(found)} figures{'' if attached.new else ', as it did'}")
    if attached.ref and attached.new and (older := _aliases_elsewhere(attached.ref)):
        note(
            f"note: {', '.join(older)} stay where they are; policies count this evidence for every version of the same bytes"
        )


def _aliases_elsewhere(ref: str) -> list[str]:
    from adapterkit.registry.home import open_home
    from adapterkit.registry.verbs import alias_now

    name = ref.partition("@")[0]
    return [alias for alias in open_home().alias_names(name) if alias_now(name, alias) is not None]


@command.command(name="show", short_help="Show every figure that is known of the bytes of a version.")
@click.argument("ref")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def show_(ref: str, as_json: bool) -> None:
    """Show every figure that policies know of REF, by the name that a condition calls it.

    \b
    Example:
      adapterkit evidence show my-adapter@3
    """
    from adapterkit.registry import resolve
    from adapterkit.registry.home import open_home
    from adapterkit.registry.policies import known_figures

    at = open_home()
    record = resolve.find(at, ref)
    own, others = known_figures(at, record, None)
    if as_json:
        plain = {
            "self": own,
            **{subject: list(found or ()) for subject, found in others.items() if subject != "current"},
        }
        show_json(
            {
                subject: [{**one.__dict__, "settings": dict(one.settings)} for one in found]
                for subject, found in plain.items()
            }
        )
        return
    rows = [("", one) for one in own]
    rows += [(f"{subject}: ", one) for subject, found in others.items() for one in found or ()]
    if not rows:
        note(f"nothing was measured of {record.ref}")
    for before, one in rows:
        value = f"{one.value:.6g}" if isinstance(one.value, float) else one.value
        spread = f" \N{PLUS-MINUS SIGN} {one.stderr:.2g}" if one.stderr is not None else ""
        say(f"{before}{one.name} {value}{spread}{f' ({one.about})' if one.about else ''}")
