"""`adapterkit demo`"""

from __future__ import annotations

import click

from adapterkit.cli.output import note, say, show_json
from adapterkit.cli.paths import LocalPath


@click.command(name="demo", short_help="Make a tiny model, train an adapter, merge it, and show that it worked.")
@click.argument("folder", default="adapterkit-demo", metavar="[DIR]", type=LocalPath())
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(folder: str, as_json: bool) -> None:
    """Train a tiny base and an adapter in DIR, merge them, and show what each of the three says. Works offline.

    \b
    Example:
      adapterkit demo
    """
    from adapterkit.verbs.demo import demo

    report = demo(folder, note)
    if as_json:
        show_json(report)
        return
    say(f"{'prompt':<14} {'base':<8} {'base + adapter':<15} merged")
    for answer in report.answers:
        say(f"{answer.prompt:<14} {answer.base:<8} {answer.adapter:<15} {answer.merged}")
    say(
        f"largest logit difference, adapter against merged: {report.logit_difference:.1e} "
        f"(the logits' own spread is {report.logit_spread:.1f})"
    )
    say(f"merged in {report.seconds:.2f} s; every tensor recomputed and found right: {', '.join(report.verified)}")
    say(f"what to try next, all of it in {report.folder}: inspect, check, convert, combine, verify, register, ui")
