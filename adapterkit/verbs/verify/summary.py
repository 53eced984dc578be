"""A report as Markdown, for a job's summary."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.errors import counted
from adapterkit.verbs.verify.report import ERROR, WARNING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adapterkit.verbs.verify.report import Distance, VerifyReport

_SIGN = {ERROR: "❌", WARNING: "⚠️"}


def markdown(report: VerifyReport) -> str:
    """The page: verdict, findings, figures of each level, inputs."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: VerifyReport) -> Iterator[str]:
    yield f"## {'✅ verified' if report.ok else '❌ not what was trained'}: {_text(report.merged)}"
    yield ""
    yield _text(report.summary)
    yield ""
    shown = [one for one in report.findings if one.severity in _SIGN]
    if shown:
        yield "| | finding | where and what | what to do |"
        yield "|---|---|---|---|"
        yield from (
            f"| {_SIGN[one.severity]} | {_text(one.kind)} | {_text(one.text)} | {_text(one.hint)} |" for one in shown
        )
        yield ""
    tensors = report.tensors
    yield "| level | figure | |"
    yield "|---|---|---|"
    if tensors is None:
        yield "| load | headers, config and the files beside them | |"
    else:
        counts = ", ".join(f"{number:,} {status}" for status, number in tensors.counts.items())
        yield f"| tensors | compared | {counts} |"
        yield f"| | changed by adapters | {tensors.touched:,} of {tensors.total:,} |"
        yield f"| | cosine | {tensors.cosine:.5f} |"
        yield f"| | error beside the change | {tensors.error:.2g} |"
        yield f"| | retention | {tensors.retention:.2%} |"
    if report.pair is not None:
        pair = report.pair
        yield f"| with {_text(report.residual)} | cosine | {pair.cosine:.5f} |"
        yield f"| | error beside the change | {pair.error:.2g} |"
        yield f"| | retention | {pair.retention:.2%} |"
    if report.layers is not None:
        layers = report.layers
        yield f"| layers | error of the outputs | {layers.error:.2e} (the adapter changes them by {layers.change:.2e}) |"
        yield f"| | loses most | {_text(layers.worst)} |"
    if report.model is not None:
        model = report.model
        ran = f"{counted(model.tokens, 'token')} of {counted(len(model.prompts), 'prompt')}"
        yield f"| model | runtime | {_text(model.runtime)}, {ran} |"
        yield f"| | merged beside base + adapters | {distance(model.merged)} |"
        yield f"| | base beside base + adapters | {distance(model.base)} |"
        perplexity = ", ".join(f"{name} {value:.3f}" for name, value in model.perplexity.items())
        yield f"| | perplexity | {perplexity} |"
    yield ""
    yield "| input | | digest |"
    yield "|---|---|---|"
    for one in report.inputs:
        weight = "" if one.weight in (None, 1.0) else f" × {one.weight:g}"
        yield f"| {one.role} | {_text(one.ref)}{weight} | `{one.digest[:32]}` |"


def distance(found: Distance) -> str:
    """``top-1 99.8 %, KL mean 0.0001, max 0.02``"""
    return f"top-1 {found.top1:.1%}, KL mean {found.mean_kl:.2e}, max {found.max_kl:.2e}"


def _text(text: str) -> str:
    """Text that cannot end a cell or become markup."""
    plain = "".join(c if c.isprintable() else " " for c in text)
    for mark in "\\`*_[]<>|":
        plain = plain.replace(mark, "\\" + mark)
    return plain
