"""The evidence as one page: no network, no fonts, readable in the dark, on paper, and with a keyboard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import log10
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit._version import __version__
from adapterkit.errors import counted
from adapterkit.foreign import for_page, is_whole
from adapterkit.verbs.heatmap import place
from adapterkit.verbs.verify.report import EQUAL, RIGHT

if TYPE_CHECKING:
    from adapterkit.verbs.verify.report import Distance, Finding, LayerCheck, PromptCheck, TensorCheck, VerifyReport

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
LISTED = 60  # tensors of a finding that are listed
WORST = 12  # modules


@dataclass(frozen=True)
class Measure:
    """A figure of a tensor, and how it is drawn.

    Attributes:
        says: what the number is.
        text: as it stands in a cell.
        loss: from 0, all well, to 1.
    """

    name: str
    title: str
    says: str
    text: Callable[[float], str]
    loss: Callable[[float], float]


MEASURES = (
    Measure(
        "retention",
        "Retention",
        "how much of the change that was trained is there; 1 is all of it",
        lambda v: f"{v:.3f}",
        lambda v: abs(1 - v) * 2,
    ),
    Measure(
        "error",
        "Error",
        "what rounding or the format adds, as a part of the change",
        lambda v: f"{v:.1e}",
        lambda v: (log10(max(v, 1e-8)) + 3) / 4,
    ),
    Measure(
        "cosine",
        "Cosine",
        "1 when the change points where it was trained to",
        lambda v: f"{v:.3f}",
        lambda v: (1 - v) * 2,
    ),
    Measure("unmoved", "Unmoved", "share of entries that equal the base's", lambda v: f"{v:.0%}", lambda v: v),
    Measure(
        "relative",
        "Size of the change",
        "|delta| / |W|: how far training moved it",
        lambda v: f"{v:.1e}",
        lambda v: 0.0,
    ),
)


def html(report: VerifyReport, *, command: str = "", when: str = "") -> str:
    """The page.

    Args:
        command: the command line that made the report.
        when: UTC time, like ``2026-01-31T23:59:59Z``.
    """
    here = Path(__file__).parent
    style, script = ((here / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    title = f"{_name(report.merged)}: {'verified' if report.ok else 'not verified'}"
    return "".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{for_page(title)}</title><style>{style}</style></head><body>",
            '<a class="skip" href="#findings">To the findings</a><main>',
            *_head(report, command, when),
            *_findings(report),
            *_map(report),
            *_layers(report),
            *_model(report),
            *_inputs(report),
            f"<footer>adapterkit {__version__}, {report.seconds:.1f} s, {report.peak_memory / 1e6:,.0f} MB of memory.",
            '<a id="version" href=".." hidden>This version in the registry</a>',
            f"</footer></main><script>{script}</script></body></html>\n",
        ]
    )


def _name(ref: str) -> str:
    return ref.rstrip("/").rpartition("/")[2] or ref


# ------------------------------------------------------------------ the head


def _head(report: VerifyReport, command: str, when: str) -> Iterator[str]:
    tone, word = ("ok", "verified") if report.ok else ("error", "not verified")
    adapters = " and ".join(f"<code>{for_page(one)}</code>" for one in report.adapters)
    yield f'<header><span class="badge {tone}">{word}</span>'
    yield f"<h1>{for_page(_verdict(report))}</h1>"
    yield f"<p><code>{for_page(report.merged)}</code> beside <code>{for_page(report.base)}</code> with {adapters}</p>"
    if when:
        yield f'<p class="dim">{for_page(when[:16].replace("T", " "))} UTC</p>'
    if command:
        yield f"<p><code>{for_page(command)}</code></p>"
    yield '<dl class="figures">'
    for title, value, small in _figures(report):
        yield f"<div><dt>{for_page(title)}</dt><dd>{for_page(value)}<small>{for_page(small)}</small></dd></div>"
    yield "</dl></header>"


def _verdict(report: VerifyReport) -> str:
    if report.ok:
        return "What is deployed is what was trained"
    first = report.errors[0].kind
    return f"Not what was trained: {first}" + (f", and {len(report.errors) - 1} more" if len(report.errors) > 1 else "")


def _figures(report: VerifyReport) -> Iterator[tuple[str, str, str]]:
    tensors = report.tensors
    if tensors is None:
        yield "Compared", "headers", "config.json and the files beside the weights; no weight was read"
        return
    equal = tensors.counts.get(EQUAL, 0)
    right = sum(number for status, number in tensors.counts.items() if status in RIGHT)
    small = "byte for byte" if right == equal else f"{right - equal:,} more within rounding or the format"
    yield "Tensors as merge writes them", f"{equal:,} of {tensors.total:,}", small
    yield "Changed by adapters", f"{tensors.touched:,}", f"|delta|/|W| {tensors.relative:.1e} over all of them"
    beside = f"error beside it {tensors.error:.2g}; {tensors.retention:.2%} of it survives"
    yield "Cosine with the change", f"{tensors.cosine:.5f}", beside
    if report.pair is not None:
        beside = f"error {report.pair.error:.2g}; {report.pair.retention:.2%} of the change is there"
        yield f"With {report.residual}", f"{report.pair.cosine:.5f}", beside
    if report.layers is not None:
        lost = f"of what the adapter does; {report.layers.inputs} inputs"
        yield "Lost in the outputs", f"{report.layers.lost:.2%}", lost
    if report.model is not None:
        model = report.model
        yield (
            "Same likeliest token",
            f"{model.merged.top1:.1%}",
            f"{counted(model.tokens, 'token')}; base alone {model.base.top1:.1%}",
        )
        yield "KL from trained", f"{model.merged.mean_kl:.1e}", f"mean, in nats; base alone {model.base.mean_kl:.1e}"


# ------------------------------------------------------------------ findings


def _findings(report: VerifyReport) -> Iterator[str]:
    yield '<h2 id="findings">Findings</h2>'
    if not report.findings:
        yield "<p>Nothing to remark.</p>"
        return
    yield '<ul class="findings">'
    yield from map(_finding, report.findings)
    yield "</ul>"


def _finding(one: Finding) -> str:
    parts = [f'<li class="{one.severity}"><b>{for_page(one.kind)}</b> <span class="dim">{one.severity}</span><br>']
    parts.append(for_page(one.text))
    if one.hint:
        parts.append(f'<span class="hint">{for_page(one.hint)}</span>')
    if len(one.tensors) > 1:
        shown = "".join(f"<li><code>{for_page(name)}</code></li>" for name in one.tensors[:LISTED])
        more = f"<p>and {len(one.tensors) - LISTED} more</p>" if len(one.tensors) > LISTED else ""
        parts.append(
            f"<details><summary>{counted(len(one.tensors), 'tensor')}</summary><ul>{shown}</ul>{more}</details>"
        )
    return "".join(parts) + "</li>"


# ------------------------------------------------------------------ the map


def _map(report: VerifyReport) -> Iterator[str]:
    rows = [one for one in report.tensors.tensors if one.touched] if report.tensors is not None else []
    if not rows:
        return
    yield "<h2>Layer by layer</h2><p>Every tensor that adapters change. Arrow keys move between cells.</p>"
    yield '<fieldset class="switch"><legend>Measure</legend>'
    for number, measure in enumerate(MEASURES):
        checked = " checked" if not number else ""
        yield f'<label><input type="radio" name="measure" value="map-{measure.name}"{checked}>{measure.title}</label>'
    yield '</fieldset><div class="scroll">'
    columns, grid = _grid(rows)
    for number, measure in enumerate(MEASURES):
        yield _table(measure, columns, grid, hidden=number > 0)
    yield '</div><p class="told" aria-live="polite"></p>'


def _grid(rows: Sequence[TensorCheck]) -> tuple[list[str], dict[str, dict[str, TensorCheck]]]:
    columns: dict[str, None] = {}
    grid: dict[str, dict[str, TensorCheck]] = {}
    for one in rows:
        row, column = place(one.name)
        columns[column] = None
        grid.setdefault(row, {})[column] = one
    order = sorted(grid, key=lambda row: [int(n) if is_whole(n) else -1 for n in row.split(".")])
    return list(columns), {row: grid[row] for row in order}


def _table(measure: Measure, columns: Sequence[str], grid: dict[str, dict[str, TensorCheck]], *, hidden: bool) -> str:
    head = "".join(f'<th scope="col">{for_page(column)}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row">{for_page(row)}</th>{"".join(_cell(cells.get(column), measure) for column in columns)}</tr>'
        for row, cells in grid.items()
    )
    caption = f"<caption>{measure.title}: {for_page(measure.says)}</caption>"
    state = " hidden" if hidden else ""
    return (
        f'<table class="map" id="map-{measure.name}"{state}>{caption}'
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def _cell(one: TensorCheck | None, measure: Measure) -> str:
    if one is None:
        return '<td class="none">&ndash;</td>'
    value = getattr(one, measure.name)
    wrong = " wrong" if one.status not in RIGHT else ""
    told = for_page(_told(one))
    if value is None:
        return f'<td class="none{wrong}" title="{told}">{for_page(one.status)}</td>'
    loss = max(0.0, min(1.0, measure.loss(float(value))))
    tone, strength = ("bad", 0.08 + 0.5 * loss) if loss > 0.05 else ("good", 0.16)
    if measure.name == "relative":
        tone, strength = "link", 0.1
    style = f"--tone:var(--{tone});--a:{strength:.2f}"
    return f'<td class="{wrong.strip()}" style="{style}" title="{told}">{measure.text(float(value))}</td>'


def _told(one: TensorCheck) -> str:
    """All about one tensor, in a line."""
    parts = [f"{one.name}: {one.finding or one.status}"]
    for measure in MEASURES:
        value = getattr(one, measure.name)
        if value is not None:
            parts.append(f"{measure.title.lower()} {measure.text(float(value))}")
    return ", ".join([*parts, f"{one.dtype} {list(one.shape)}"])


# ------------------------------------------------------------------ layers and model


def _layers(report: VerifyReport) -> Iterator[str]:
    layers = report.layers
    if layers is None:
        return
    yield "<h2>Outputs of layers</h2>"
    yield (
        f"<p>The same {for_page(layers.inputs)} inputs through each module, as base with adapters and as merged: outputs "
        f"differ by {layers.error:.1e} of their size, where the adapter changes them by {layers.change:.1e}.</p>"
    )
    worst = sorted(layers.modules, key=lambda one: -one.lost)[:WORST]
    rows = "".join(map(_layer, worst))
    yield '<div class="scroll"><table class="list"><thead><tr><th>loses most</th><th class="num">error</th>'
    yield f'<th class="num">change</th><th class="num">lost</th></tr></thead><tbody>{rows}</tbody></table></div>'


def _layer(one: LayerCheck) -> str:
    numbers = (f"{one.error:.1e}", f"{one.change:.1e}", f"{one.lost:.2%}")
    return (
        f"<tr><td><code>{for_page(one.module)}</code></td>"
        + "".join(f'<td class="num">{n}</td>' for n in numbers)
        + "</tr>"
    )


def _model(report: VerifyReport) -> Iterator[str]:
    model = report.model
    if model is None:
        return
    yield "<h2>Answers</h2>"
    scored = f"{counted(len(model.prompts), 'prompt')}, {counted(model.tokens, 'scored token')}"
    yield (
        f"<p>{scored}. Merged runs in {for_page(model.runtime)}, base + adapters by "
        f"{for_page(model.trained)}; distances are from base + adapters.</p>"
    )
    yield '<div class="bars">'
    for name, found, tone in (("merged", model.merged, "link"), ("base alone", model.base, "bad")):
        yield _bar(name, found, tone)
    yield '</div><div class="scroll"><table class="list"><thead><tr><th></th><th class="num">perplexity</th>'
    yield "</tr></thead><tbody>"
    for name, value in model.perplexity.items():
        word = "base + adapters" if name == "trained" else name
        yield f'<tr><td>{word}</td><td class="num">{value:,.3f}</td></tr>'
    yield "</tbody></table></div><h3>KL along the prompts</h3>"
    top = max((kl for prompt in model.prompts for kl in prompt.kls), default=0.0)
    yield from (_prompt(prompt, top) for prompt in model.prompts)


def _bar(name: str, found: Distance, tone: str) -> str:
    """KL on a logarithmic scale from 1e-6 to 10 nats."""
    width = max(0.0, min(1.0, (log10(max(found.mean_kl, 1e-7)) + 6) / 7))
    told = f"KL {found.mean_kl:.1e}, top-1 {found.top1:.1%}"
    return (
        f'<span>{name}</span><span class="bar" style="--tone:var(--{tone})"><i style="width:{width:.1%}"></i></span>'
        f'<span class="told-bar">{told}</span>'
    )


def _prompt(prompt: PromptCheck, top: float) -> str:
    cut = ", cut" if prompt.truncated else ""
    parts = [f'<section class="prompt"><q>{for_page(prompt.text)}</q>']
    parts.append(
        f'<p class="dim">{prompt.tokens} tokens{cut}: KL mean {prompt.merged.mean_kl:.1e}, max {prompt.merged.max_kl:.1e}; '
        f"top-1 {prompt.merged.top1:.1%}</p>{_spark(prompt, top)}"
    )
    if prompt.partings:
        rows = "".join(
            f'<tr><td class="num">{one.at}</td><td><code>{for_page(one.before)}</code></td>'
            f'<td><mark class="ok">{for_page(one.trained)}</mark></td>'
            f'<td><mark class="error">{for_page(one.merged)}</mark></td>'
            f'<td class="num">{one.kl:.1e}</td></tr>'
            for one in prompt.partings
        )
        head = '<th class="num">at</th><th>after</th><th>trained says</th><th>merged says</th><th class="num">KL</th>'
        parts.append(
            f"<details open><summary>Where the two part ({len(prompt.partings)})</summary>"
            f'<table class="list"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></details>'
        )
    return "".join(parts) + "</section>"


def _spark(prompt: PromptCheck, top: float) -> str:
    """A bar for each position, as high as its KL."""
    if not prompt.kls or not top:
        return ""
    apart = {one.at for one in prompt.partings}
    count = len(prompt.kls)
    bars = []
    for number, (at, kl) in enumerate(zip(prompt.positions, prompt.kls, strict=True)):
        height = max(1.0, 30 * kl / top)
        kind = ' class="apart"' if at in apart else ""
        bars.append(f'<rect x="{number}" y="{32 - height:.1f}" width=".8" height="{height:.1f}"{kind}/>')
    label = f"KL at each of {count} positions, at most {max(prompt.kls):.1e}"
    return (
        f'<svg class="spark" viewBox="0 0 {max(count, 24)} 32" preserveAspectRatio="none" role="img" '
        f'aria-label="{label}">{"".join(bars)}</svg>'
    )


# ------------------------------------------------------------------ inputs


def _inputs(report: VerifyReport) -> Iterator[str]:
    yield "<h2>Inputs</h2><p>Everything that was read, by what it holds.</p>"
    yield '<div class="scroll"><table class="list"><thead><tr><th></th><th>what</th><th>digest</th></tr></thead><tbody>'
    for one in report.inputs:
        weight = f" &times; {one.weight:g}" if one.weight not in (None, 1.0) else ""
        commit = f" <span class='dim'>@{for_page(one.commit[:12])}</span>" if one.commit else ""
        method = f" <span class='dim'>({for_page(one.method)})</span>" if one.method else ""
        yield f"<tr><td>{one.role}</td><td><code>{for_page(one.ref)}</code>{commit}{method}{weight}</td>"
        yield f'<td class="mono">{for_page(one.digest)}</td></tr>'
    yield "</tbody></table></div>"
    if report.options:
        source = "from the record beside MERGED" if report.record else "as given"
        shown = ", ".join(
            f"<code>{for_page(name)}={for_page(str(value))}</code>" for name, value in report.options.items()
        )
        yield f"<p>Options of the merge, {source}: {shown}</p>"
