"""From weights that are off to sentences: what is the same mistake is one finding, and says where."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from adapterkit.errors import counted, option
from adapterkit.verbs.verify.hypotheses import Verdict, diagnose
from adapterkit.verbs.verify.report import ERROR, NOTE, RIGHT, ROUNDING, WARNING, Finding
from adapterkit.verbs.verify.suspect import NUMBER, Relatives, Suspect

if TYPE_CHECKING:
    from collections.abc import Iterable

    from adapterkit.verbs.verify.subject import Subject
    from adapterkit.verbs.verify.tensors import Judged

DIAGNOSED = 400  # weights that are looked at one by one; of more, some of every kind
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blk|block|blocks)\.(\d+)\.")
_LEFTOVER = re.compile(
    r"\.(lora_[A-Z]|lora_magnitude|base_layer|modules_to_save|original_module)\b|^base_model\.model\."
)


def findings(subject: Subject, judged: Sequence[Judged]) -> tuple[tuple[Finding, ...], dict[str, str]]:
    """Everything that is wrong with the weights, and for each weight the kind of its finding."""
    found = [*_structure(subject), *_values(subject, judged)]
    found.sort(key=lambda one: ((ERROR, WARNING, NOTE).index(one.severity), -len(one.tensors)))
    return tuple(found), {name: one.kind for one in reversed(found) for name in one.tensors}


def _values(subject: Subject, judged: Sequence[Judged]) -> list[Finding]:
    off = [one for one in judged if one.status not in RIGHT]
    family = Relatives(subject)
    groups: dict[tuple[str, str], tuple[Verdict, list[str]]] = {}
    chosen = _spread(off, DIAGNOSED)
    for one in chosen:
        suspect = Suspect(one, family)
        verdict = diagnose(suspect)
        suspect.release()
        groups.setdefault((verdict.kind, verdict.detail), (verdict, []))[1].append(one.item.name)
    touched = [one.item.name for one in judged if one.item.touched]
    right = {one.item.name for one in judged if one.status in RIGHT}
    found = [_finding(subject, verdict, names, touched, right) for verdict, names in groups.values()]
    if len(chosen) < len(off):
        text = f"{len(off)} weights are off, of which {len(chosen)} were looked at more closely"
        found.append(Finding("many", ERROR, text, tensors=tuple(one.item.name for one in off)))
    rounded = [one for one in judged if one.status == ROUNDING]
    odd = [one for one in judged if one.odd]
    if odd:
        count = sum(one.odd for one in odd)
        text = f"{count:,.0f} values of {counted(len(odd), 'tensor')} are NaN or infinite, and left out of the figures"
        hint = f"see whether base or adapter is damaged; inspect with {option('health', True)} looks at an adapter"
        found.append(Finding("not finite", WARNING, text, hint, tensors=tuple(one.item.name for one in odd)))
    if rounded:
        most = max(one.steps or 0.0 for one in rounded)
        words = "one rounding" if most <= 1.0 else f"{most:.1f} steps of their dtype"
        some = counted(len(rounded), "tensor is", "tensors are")
        text = f"{some} not the bytes that adapterkit writes, and within {words} of the formula"
        found.append(Finding("rounding", NOTE, text, "other tools round the delta once more, or sum in another order"))
    return found


def _spread(off: list[Judged], most: int) -> list[Judged]:
    return off if len(off) <= most else [off[i * len(off) // most] for i in range(most)]


def _finding(subject: Subject, verdict: Verdict, names: list[str], touched: list[str], right: set[str]) -> Finding:
    kind, hint = verdict.kind, verdict.hint
    words, layers = where(names, touched)
    if kind == "not applied" and layers and right & set(touched):
        kind, hint = "layer missing", "merge again: the adapter trained these layers too"
    text = f"{words} {_singular(verdict.says) if len(names) == 1 else verdict.alike or verdict.says}"
    return Finding(kind, verdict.severity, text, hint, tuple(names), verdict.figure)


_VERBS = {
    "hold": "holds",
    "equal": "equals",
    "are": "is",
    "were": "was",
    "have": "has",
    "differ": "differs",
    "lie": "lies",
}


def _singular(says: str) -> str:
    first, _, rest = says.partition(" ")
    return f"{_VERBS.get(first, first)} {rest}"


def where(names: Sequence[str], touched: Sequence[str]) -> tuple[str, bool]:
    """Words for a set of tensors, and whether it is made of whole layers."""
    chosen = set(names)
    if len(names) == 1:
        return f"'{names[0]}'", False
    if chosen == set(touched):
        return f"all {len(names)} tensors that the adapter changes", False
    layers = _layers(names)
    whole = [n for n in layers if {t for t in touched if _layer(t) == n} <= chosen]
    if (
        layers
        and len(whole) == len(layers)
        and all(_layer(name) is not None for name in names)
        and chosen <= set(touched)
    ):
        shown = _numbers(sorted(layers))
        return f"the {len(names)} tensors of layer{'s' if len(layers) > 1 else ''} {shown}", True
    kinds = sorted({NUMBER.sub("*", name) for name in names})
    if len(kinds) <= 3:
        shown = " and ".join(kinds)
        return f"{counted(len(names), 'tensor')} ({shown})", False
    return f"{counted(len(names), 'tensor')} (as '{names[0]}')", False


def _layer(name: str) -> int | None:
    found = _LAYER.search(name)
    return None if found is None else int(found[1])


def _layers(names: Iterable[str]) -> set[int]:
    return {layer for name in names if (layer := _layer(name)) is not None}


def _numbers(numbers: list[int]) -> str:
    """``0, 3 to 5``"""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]} to {r[-1]}" for r in runs)


# ------------------------------------------------------------------ names and shapes


def _structure(subject: Subject) -> list[Finding]:
    found = []
    added = set(subject.folded.added)
    missing, extra = list(subject.missing), list(subject.extra)
    heads = [name for name in missing if name in added]
    if heads and subject.folded.untied:
        text = (
            f"'{heads[0]}' is missing: the adapter changed one side of a tied pair, and MERGED has one tensor for both"
        )
        hint = "write both tensors, and tie_word_embeddings: false in config.json"
        found.append(Finding("tied head", ERROR, text, hint, tuple(heads)))
        missing = [name for name in missing if name not in heads]
    left = [name for name in extra if _LEFTOVER.search(name)]
    if left:
        text = f"{len(left)} tensors are an adapter's or have its wrapper's names (as '{left[0]}'): it was never merged"
        found.append(Finding("not merged", ERROR, text, "save the model after merge_and_unload", tuple(left)))
        extra = [name for name in extra if name not in left]
    if missing:
        words, _ = where(missing, subject.folded.touched)
        text = f"{words} {'is' if len(missing) == 1 else 'are'} missing"
        found.append(Finding("missing", ERROR, text, "merge or download again", tuple(missing)))
    if extra:
        words, _ = where(extra, ())
        text = f"{words} {'is' if len(extra) == 1 else 'are'} in MERGED and not in the base"
        found.append(Finding("extra", ERROR, text, "give the base that MERGED was made from", tuple(extra)))
    if subject.scales_lost:
        names = subject.scales_lost
        words, _ = where(names, subject.folded.touched)
        text = f"{words} {'has' if len(names) == 1 else 'have'} codes and no scales, so the values are lost"
        found.append(Finding("scales lost", ERROR, text, "merge again: codes mean nothing alone", tuple(names)))
    for kind, said in (("other group size", True), ("other format", False)):
        rows = [row for row in subject.layouts if (row[1].split()[0] == row[2].split()[0]) is said]
        if rows:
            names = tuple(row[0] for row in rows)
            words, _ = where(names, subject.folded.touched)
            text = (
                f"{words} {'is' if len(rows) == 1 else 'are'} stored in {rows[0][2]}, and in the base in {rows[0][1]}"
            )
            hint = (
                f"what no adapter touches was quantized again; merge with {option('quant')} keep to leave it as it is"
            )
            found.append(Finding(kind, WARNING, text, hint, names))
    if subject.misshapen:
        name, wanted, there = subject.misshapen[0]
        more = f" (and {len(subject.misshapen) - 1} more)" if len(subject.misshapen) > 1 else ""
        text = f"'{name}' is {list(there)} and should be {list(wanted)}{more}"
        names = tuple(name for name, _, _ in subject.misshapen)
        found.append(Finding("other shape", ERROR, text, "give the base that MERGED was made from", names))
    return found
