"""`adapterkit inspect`"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from adapterkit.cli.output import count, file_count, note, say, show_json, size
from adapterkit.cli.paths import FILE_THERE
from adapterkit.errors import counted

if TYPE_CHECKING:
    from pathlib import Path

    from adapterkit.places import Address
    from adapterkit.verbs.compare import Pair
    from adapterkit.verbs.inspect import Inspection


@click.command(name="inspect", short_help="Show what an adapter or a checkpoint is, and how it is.")
@click.argument("refs", nargs=-1, required=True, metavar="ADAPTER|CHECKPOINT...")
@click.option("--base", help="The adapter's base, to give its share of the parameters.")
@click.option("--compare", "comparing", is_flag=True, help="Hold several adapters against each other.")
@click.option("--html", type=FILE_THERE, metavar="FILE", help="With --compare: also write a heat map.")
@click.option("--health", is_flag=True, help="Read the factors: NaN, untrained modules, norms, effective ranks.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    refs: tuple[str, ...], base: str | None, comparing: bool, html: Path | Address | None, health: bool, as_json: bool
) -> None:
    """Show what an ADAPTER or a CHECKPOINT is; only headers are read, also from the Hub.

    \b
    Example:
      adapterkit inspect ./my-adapter --base meta-llama/Llama-3.2-1B
      adapterkit inspect ./math ./code --compare --html fight.html
    """
    from adapterkit.verbs.inspect import inspect

    if comparing:
        _compare(refs, base, html, as_json)
        return
    if len(refs) > 1 or html is not None:
        raise click.UsageError("Several adapters and --html go with --compare.")
    found = inspect(refs[0], base=base, health=health)
    if as_json:
        show_json(found)
        return
    for text in found.notes:
        note(f"note: {text}")
    rows = _adapter_rows(found) if found.kind == "adapter" else _checkpoint_rows(found)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        say(f"{name:<{width}}  {value}")
    if found.health:
        _show_health(found)


def _compare(refs: tuple[str, ...], base: str | None, html: Path | Address | None, as_json: bool) -> None:
    from adapterkit.stores.files import deliver
    from adapterkit.verbs.compare import compare
    from adapterkit.verbs.heatmap import heat_map

    report = compare(refs, base=base)
    if html is not None:
        deliver(html, heat_map(report).encode())
        note(f"heat map written to {html}")
    if as_json:
        show_json(report)
        return
    for index, (ref, size_) in enumerate(zip(report.adapters, report.norms, strict=True), 1):
        say(f"{index}  {ref}, norm {size_:.4g}")
    say()
    say(f"{'pair':>7} {'cosine':>7} {'output overlap':>23} {'input overlap':>23} {'sign conflict':>14}")
    for pair in report.total:
        say(_pair_row(pair))
    for layer in report.layers:
        for pair in layer.pairs:
            say(f"{_pair_row(pair)}  {layer.module}")
    some = f"{report.shared} of {counted(len(report.layers), 'layer')}"
    say(f"{some} {'is' if report.shared == 1 else 'are'} changed by more than one adapter")


def _pair_row(pair: Pair) -> str:
    output = f"{pair.output_overlap:.3f} ({pair.expected_output:.3f} by chance)"
    read = f"{pair.input_overlap:.3f} ({pair.expected_input:.3f} by chance)"
    name = f"{pair.one + 1}, {pair.other + 1}"
    return f"{name:>7} {pair.cosine:>7.3f} {output:>23} {read:>23} {pair.sign_conflict:>14.1%}"


def _several(values: dict[str, int]) -> str:
    return ", ".join(name if len(values) == 1 else f"{name} ({times})" for name, times in values.items())


def _adapter_rows(found: Inspection) -> list[tuple[str, str]]:
    share = f", {found.share:.3%} of the base" if found.share is not None else ""
    rows = [
        ("adapter", found.ref),
        *found.details.items(),
        ("method", found.method),
        ("rank", _several(found.ranks)),
        ("scaling", _several(found.scalings)),
        ("targets", ", ".join(f"{name} x{times}" for name, times in found.targets.items())),
        ("whole", ", ".join(found.whole)),
        ("parameters", f"{count(found.parameters)}{share}"),
        ("size", f"{size(found.nbytes)} in {counted(found.tensors, 'tensor')} ({_several(found.dtypes)})"),
        ("base", " @ ".join(part for part in (found.base, found.revision) if part) or "not named"),
        ("peft", found.peft_version),
        ("commit", found.commit),
        ("mergeable", found.mergeable or "yes"),
    ]
    return [(name, value) for name, value in rows if value]


def _checkpoint_rows(found: Inspection) -> list[tuple[str, str]]:
    rows = [
        ("checkpoint", found.ref),
        ("architecture", found.architecture),
        *found.details.items(),
        ("parameters", count(found.parameters)),
        ("size", f"{size(found.nbytes)} in {counted(found.tensors, 'tensor')}, {file_count(len(found.files))}"),
        ("dtypes", _several(found.dtypes)),
        ("commit", found.commit),
    ]
    return [(name, value) for name, value in rows if value]


def _show_health(found: Inspection) -> None:
    say()
    say(f"{'norm':>10} {'rank':>5} {'effective':>9}  module")
    for row in found.health:
        problem = f"  <- {row.problem}" if row.problem else ""
        stack = f" ({row.experts} experts)" if row.experts else ""
        say(f"{row.norm:>10.4g} {row.rank:>5} {row.effective_rank:>9.2f}  {row.module}{stack}{problem}")
    bad = [row for row in found.health if row.problem]
    say(
        f"{len(bad)} of {counted(len(found.health), 'module')} {'has' if len(bad) == 1 else 'have'} a problem"
        if bad
        else f"{counted(len(found.health), 'module')}, all sound"
    )
