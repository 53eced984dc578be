"""What a record keeps of a verification: a few figures for each level, and whether it held."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.registry.verification import Verification
from adapterkit.verbs.verify.report import ERROR

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adapterkit.registry.evidence import Attached
    from adapterkit.verbs.verify.report import VerifyReport

_MODEL = frozenset({"max-kl", "min-top1"})  # findings about answers, not about tensors


def verifications(report: VerifyReport) -> tuple[Verification, ...]:
    """One for each level that was run."""
    return tuple(_levels(report))


def _levels(report: VerifyReport) -> Iterator[Verification]:
    wrong = [finding.kind for finding in report.findings if finding.severity == ERROR]
    apart = [kind for kind in wrong if kind not in _MODEL]
    tensors, limits = report.tensors, report.thresholds
    figures: dict[str, Any] = {}
    if apart:
        figures["findings"] = list(dict.fromkeys(apart))
    if tensors is None:
        yield Verification("load", not apart, figures)
        return
    figures = {
        **dict(sorted(tensors.counts.items())),
        "cosine": _short(tensors.cosine),
        "error": _short(tensors.error),
        "retention": _short(tensors.retention),
        "dead": len(tensors.dead),
        **figures,
    }
    if report.pair is not None:  # what the limits are of
        pair = report.pair
        figures["residual"] = {
            "cosine": _short(pair.cosine),
            "error": _short(pair.error),
            "retention": _short(pair.retention),
            "dead": len(pair.dead),
        }
    bounds = {
        "min_retention": limits.min_retention,
        "min_cosine": limits.min_cosine,
        "max_error": limits.max_error,
        "max_dead": limits.max_dead,
    }
    held = {name: limit for name, limit in bounds.items() if limit is not None}
    yield Verification("tensors", not apart, figures, held)
    if report.layers is not None:
        layers = report.layers
        figures = {"error": _short(layers.error), "change": _short(layers.change), "inputs": layers.inputs}
        yield Verification("layers", not apart, figures)
    if report.model is not None:
        model = report.model
        asked = {"max_kl": limits.max_kl, "min_top1": limits.min_top1}
        figures = {
            "kl": _short(model.merged.mean_kl),
            "kl_largest": _short(model.merged.max_kl),
            "top1": _short(model.merged.top1),
            "perplexity": {name: _short(value) for name, value in model.perplexity.items()},
            "tokens": model.tokens,
            "runtime": model.runtime,
        }
        ok = not _MODEL & set(wrong)
        yield Verification("model", ok, figures, {name: limit for name, limit in asked.items() if limit is not None})


def _short(value: float) -> float:
    """Six digits: the last ones differ from machine to machine."""
    return float(f"{value:.6g}")


def attach(report: VerifyReport, target: str | Path | None = None, *, page: bytes = b"") -> Attached:
    """Write the figures into the record of MERGED.

    Args:
        report: what was found.
        target: the output with its record beside it, or a registry name; MERGED by default.
        page: the report as HTML, which a registered version keeps.

    Raises:
        NotFound: it has no record.
        RegistryError, UsageError: see `adapterkit.registry.evidence.attach_verification`.
    """
    from adapterkit.registry.evidence import attach_verification

    return attach_verification(target if target is not None else report.merged, verifications(report), page=page)
