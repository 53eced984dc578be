"""Evidence in words: what was measured, of how many, when and by what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapterkit.registry import evaluation, verification
from adapterkit.registry.verification import Verification

# What a figure is called on a page, by its key in a record.
LABELS = {
    "retention": "share of the trained change that is there",
    "cosine": "direction of the change, 1 is as trained",
    "relative": "size of the change beside the weights",
    "unmoved": "share of entries that equal the base's",
    "error": "difference of outputs",
    "change": "what the adapter does to outputs",
    "inputs": "inputs that were tried",
    "kl": "mean KL divergence of answers",
    "kl_largest": "largest KL divergence",
    "top1": "same likeliest token",
    "tokens": "tokens that were compared",
    "prompts": "prompts that were compared",
    "perplexity": "perplexity",
    "runtime": "computed in",
    "worst": "furthest off",
    "format": "format",
    "equal": "tensors as a merge writes them, byte for byte",
    "touched": "tensors that adapters change",
    "findings": "findings",
}
LEVELS = {
    "tensors": "every tensor recomputed",
    "layers": "outputs of layers compared",
    "model": "answers compared",
    "load": "files read",
}
_NOT_TENSORS = frozenset({"touched"})


@dataclass(frozen=True)
class Said:
    """A sentence on a piece of evidence; ``good`` is None where it is neither."""

    text: str
    good: bool | None = None


def sentences(evidence: Mapping[str, Any]) -> list[Said]:
    """What the evidence of a version says, verdicts first."""
    said = [_level(level) for level in verification.read(evidence)]
    scores, wrong = evaluation.read_shown(evidence)
    if wrong:
        said.append(Said(wrong))
    own = [one for one in scores if one.subject == evaluation.SELF]
    others = {(one.label, one.subject): one for one in scores}
    for one in own:
        beside = [
            f"{name} {others[one.label, subject].value:.4g}"
            for subject, name in (("base", "base"), ("zeros", "zeros"), ("shuffled", "shuffled"))
            if (one.label, subject) in others
        ]
        text = f"{one.label} {evaluation.sentence(one).partition(';')[0]}"
        dated = f"; {one.when[:10]}" if one.when else ""
        held = f" ({', '.join(beside)})" if beside else ""
        said.append(Said(f"{text}{held}{dated}"))
    if isinstance(fidelity := evidence.get("fidelity"), Mapping) and isinstance(fidelity.get("retention"), float):
        said.append(Said(f"{fidelity['retention']:.2%} of the trained change is there after rounding"))
    return said


def _level(level: Verification) -> Said:
    figures = level.figures
    what = LEVELS.get(level.level, level.level)
    parts: list[str] = []
    counts = {key: value for key, value in figures.items() if type(value) is int and key not in _NOT_TENSORS}
    if level.level == "tensors":
        total = sum(counts.values())
        if "equal" in counts:
            parts.append(f"{counts['equal']:,} of {total:,} byte for byte")
        if isinstance(figures.get("retention"), float):
            parts.append(f"{figures['retention']:.2%} of the change is there")
    if level.level == "model":
        over, unit = next(((counts[key], key) for key in ("tokens", "prompts") if counts.get(key)), (0, ""))
        if isinstance(figures.get("top1"), float):
            parts.append(f"same likeliest token for {figures['top1']:.2%}" + (f" of {over:,} {unit}" if over else ""))
        if isinstance(figures.get("kl"), float):
            parts.append(f"KL {figures['kl']:.3g}" + _limit(level, "kl"))
    if isinstance(found := figures.get("findings"), tuple):
        parts.append(", ".join(map(str, found)))
    dated = f"; {level.when[:10]}" if level.when else ""
    return Said(f"{what}: {', '.join(parts) or ('held' if level.ok else 'did not hold')}{dated}", level.ok)


def _limit(level: Verification, name: str) -> str:
    limit = next((value for key, value in level.thresholds.items() if key.partition("_")[2] == name), None)
    return f" (limit {limit:g})" if isinstance(limit, (int, float)) else ""
