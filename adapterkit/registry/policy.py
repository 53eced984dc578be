"""What an alias asks of a version: conditions on its figures.

    verification=held, acc>=base-0.01, tickets/acc[*]>=0.8, kl<=0.02, acc>shuffled+2se, acc.n>=200

A condition is a figure, a comparison and a value. A figure is a name (see `figures.named`), with ``[slice]`` or ``[*]`` for
every slice, and with ``.n`` or ``.stderr`` for what is said about it. A value is a number, a percentage, a word, or a
figure of the same name of something else (``base``, ``zeros``, ``shuffled``, ``current``: where the alias is now), with an
offset that may be in standard errors of the difference (``2se``). Where a name means several figures, each has to hold.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from adapterkit.errors import CheckFailed, UsageError
from adapterkit.registry.evaluation import BASE, SELF, SHUFFLED, SUBJECTS, ZEROS
from adapterkit.registry.figures import FAILED, HELD, Figure, named

CURRENT = "current"
OTHERS = {
    BASE: SUBJECTS[BASE],
    ZEROS: SUBJECTS[ZEROS],
    SHUFFLED: SUBJECTS[SHUFFLED],
    CURRENT: "the version that the alias points to now",
}
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "!=": operator.ne,
    "==": operator.eq,
    "=": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}
_NUMBER = r"\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?"
_FIGURE = r"(?P<figure>[A-Za-z0-9][\w.+:/|-]*?)(?:\[(?P<slice>[^\]\[]{1,100})\](?P<rest>/[\w.+:-]+?)?)?(?P<about>\.n|\.stderr)?"
_CONDITION = rf"\s*{_FIGURE}\s*(?P<compare>>=|<=|==|!=|=|>|<)\s*(?P<value>\S.*?)\s*"
_VALUE = (
    rf"(?:(?P<other>[a-z]+)\s*(?:(?P<sign>[+-])\s*(?P<offset>{_NUMBER})\s*(?P<unit>se|%)?)?"
    rf"|(?P<number>-?(?:{_NUMBER}))(?P<percent>\s*%)?)"
)
_ABOUT = {"n": "the number of samples", "stderr": "the standard error"}
_FLAT = 1e-12  # what float arithmetic leaves of an offset: 0.7 - 0.01 is 0.69


@dataclass(frozen=True)
class Condition:
    """One line of a policy; ``text`` is how it was written, without spaces around it."""

    text: str
    figure: str
    slice: str
    about: str
    compare: str
    other: str
    number: float
    unit: str
    word: str


@dataclass(frozen=True)
class Judgement:
    """Whether a condition holds for one figure, and the sentence that says so with the figures."""

    held: bool
    sentence: str


def parse_policy(text: str) -> tuple[Condition, ...]:
    """The conditions in a text: divided by commas or line breaks, ``#`` begins a comment.

    Raises:
        UsageError: one cannot be read; or there is none.
    """
    lines = [line.partition("#")[0] for line in text.splitlines()]
    parts = [part.strip() for line in lines for part in re.split(r",(?![^\[]*\])", line)]
    found = tuple(parse_condition(part) for part in parts if part)
    if not found:
        raise UsageError("a policy without a condition asks for nothing", "say for example verification=held")
    return found


def parse_condition(text: str) -> Condition:
    """
    Raises:
        UsageError: the text is no condition.
    """
    hint = "write for example acc>=0.7, acc>=base-0.01, acc>shuffled+2se, verification=held or acc[lang=de]>=0.6"
    split = re.fullmatch(_CONDITION, text)
    if split is None:
        raise UsageError(f"'{text[:200]}' is no condition", hint)
    value = re.fullmatch(_VALUE, split["value"])
    if value is None:
        raise UsageError(f"'{split['value'][:100]}' in '{text[:200]}' is no value", hint)
    figure = split["figure"] + (split["rest"] or "")
    plain = Condition(
        text.strip(), figure, split["slice"] or "", (split["about"] or "")[1:], split["compare"], "", 0.0, "", ""
    )
    if value["number"] is not None:
        number = float(value["number"]) / (100 if value["percent"] else 1)
        return replace(plain, number=number)
    other = value["other"]
    if other in OTHERS:
        offset = float(value["offset"] or 0) * (-1 if value["sign"] == "-" else 1)
        unit = value["unit"] or ""
        return replace(
            plain, other=other, number=offset / 100 if unit == "%" else offset, unit="se" if unit == "se" else ""
        )
    if value["sign"] is not None or plain.compare not in ("=", "==", "!="):
        known = ", ".join(OTHERS)
        raise UsageError(f"'{other}' in '{text[:200]}' is nothing that a figure is held against", f"use one of {known}")
    return replace(plain, word=other)


def judge(
    conditions: Iterable[Condition], own: Sequence[Figure], others: Mapping[str, Sequence[Figure] | None]
) -> list[Judgement]:
    """Whether each condition holds; a figure that is not known does not.

    Args:
        own: the figures of the version.
        others: those of the base, of null adapters, and of the version that the alias points to now (None: of nothing).
    """
    return [verdict for condition in conditions for verdict in _judged(condition, own, others)]


def _judged(
    condition: Condition, own: Sequence[Figure], others: Mapping[str, Sequence[Figure] | None]
) -> list[Judgement]:
    found = named(own, condition.figure, condition.slice)
    if not found:
        return [Judgement(False, f"{condition.text}: {_unknown(condition.figure, condition.slice, SELF)}")]
    return [_one(condition, figure, others) for figure in found]


def _unknown(figure: str, part: str, subject: str) -> str:
    of = "" if subject == SELF else f" of {SUBJECTS.get(subject, OTHERS.get(subject, subject))}"
    sliced = f" for {'any slice' if part == '*' else f'the slice {part}'}" if part else ""
    return f"'{figure}'{sliced} was never measured{of}"


def _about(condition: Condition, figure: Figure) -> float | None:
    """What a condition asks about a figure; None where it is not stated."""
    return (float(figure.n) or None) if condition.about == "n" else figure.stderr


def _one(condition: Condition, figure: Figure, others: Mapping[str, Sequence[Figure] | None]) -> Judgement:
    value: float | str | None = figure.value
    name = figure.name
    if condition.about:
        value = _about(condition, figure)
        name = f"{name}.{condition.about}"
        if value is None:
            return Judgement(False, f"{condition.text}: {_ABOUT[condition.about]} of {figure.name} is not stated")
    if condition.word:
        word = {"failed": FAILED, "held": HELD}.get(condition.word, condition.word)
        right = (str(value) == word) != (condition.compare == "!=")
        dated = f" ({figure.about})" if figure.about else ""
        return Judgement(right, f"{condition.text}: {name} is {value}{dated}")
    if not isinstance(value, float):
        return Judgement(False, f"{condition.text}: {name} is '{value}' and no number")
    dated = f" ({figure.about})" if figure.about else ""
    if not condition.other:
        return _compared(condition, value, condition.number, f"{name} is {value:.6g}{dated}", f"{condition.number:g}")
    return _against(condition, figure, value, f"{name} is {value:.6g}{dated}", others)


def _against(
    condition: Condition, figure: Figure, value: float, said: str, others: Mapping[str, Sequence[Figure] | None]
) -> Judgement:
    known = others.get(condition.other)
    if known is None and condition.other == CURRENT:
        return Judgement(True, f"{condition.text}: {said}, and the alias points to nothing yet")
    match = next((one for one in known or () if one.name == figure.name), None)
    if match is None or not isinstance(match.value, float):
        return Judgement(False, f"{condition.text}: {_unknown(figure.name, '', condition.other)}")
    if differing := _settings(figure, match):
        return Judgement(
            False, f"{condition.text}: {figure.name} of {condition.other} was measured with another {differing}"
        )
    other = match.value
    if condition.about:
        stated = _about(condition, match)
        if stated is None:
            said = f"{_ABOUT[condition.about]} of {figure.name} of {condition.other}"
            return Judgement(False, f"{condition.text}: {said} is not stated")
        other = stated
    offset, spelled = condition.number, f"{condition.number:+g}" if condition.number else ""
    if condition.unit == "se":
        if figure.stderr is None or match.stderr is None:
            return Judgement(False, f"{condition.text}: the standard errors of {figure.name} are not both stated")
        offset *= math.hypot(figure.stderr, match.stderr)
        spelled = f"{condition.number:+g}se ({offset:+.4g})"
    dated = f" ({match.about})" if match.about else ""
    return _compared(condition, value, other + offset, said, f"{condition.other} {other:.6g}{dated} {spelled}".rstrip())


def _compared(condition: Condition, value: float, limit: float, said: str, spelled: str) -> Judgement:
    near = math.isclose(value, limit, rel_tol=_FLAT, abs_tol=_FLAT)
    right = (
        near
        if condition.compare in (">=", "<=", "=", "==") and near
        else (not near and _COMPARE[condition.compare](value, limit))
    )
    return Judgement(right, f"{said}, {'' if right else 'not '}{condition.compare} {spelled}")


def _settings(one: Figure, other: Figure) -> str:
    """A setting that both state and that differs."""
    return next((key for key in one.settings if key in other.settings and one.settings[key] != other.settings[key]), "")


def require_held(ref: str, alias: str, verdicts: Iterable[Judgement]) -> tuple[str, ...]:
    """The sentences of conditions that all hold.

    Raises:
        CheckFailed: one does not; each that does not is named.
    """
    found = list(verdicts)
    if failed := [one.sentence for one in found if not one.held]:
        more = f" (and {len(failed) - 5} more)" if len(failed) > 5 else ""
        raise CheckFailed(
            f"{ref} does not become {alias}: {'; '.join(failed[:5])}{more}",
            "evaluate, verify and evidence add measure what is missing; the alias stays where it is",
        )
    return tuple(one.sentence for one in found)
