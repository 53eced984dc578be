"""What a chat template writes around each turn, found by rendering conversations of marked turns.

A template is a program; most of them come to fixed texts before and after the content of each role. Those texts are read
off, and then tried: where they give what the template gives on longer conversations, it is that simple, else it is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterkit.gguf.vocab.render import Turn, render

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SYSTEM, USER, ANSWER = "system", "user", "assistant"
_U, _A, _S = "Uqx{}zu", "Aqx{}za", "Sqx0zs"


@dataclass(frozen=True)
class Turns:
    """Fixed texts around contents.

    Attributes:
        start: before everything.
        default: after ``start``, where no system turn is given.
        before, after: by role; a template that takes no system turn has none for it.
        answer: what the assistant's next turn begins with.
        inside: the system's text stands inside the first user turn, which then has no beginning of its own.
    """

    start: str
    default: str
    before: Mapping[str, str]
    after: Mapping[str, str]
    answer: str
    inside: bool = False

    def text(self, turns: Sequence[Turn], more: bool) -> str:
        """What the template would write."""
        system = bool(turns) and turns[0][0] == SYSTEM
        written = self.start + ("" if system else self.default)
        for number, (role, content) in enumerate(turns):
            opens = not (self.inside and system and number == 1)
            written += (self.before[role] if opens else "") + content + self.after[role]
        return written + (self.answer if more else "")


def turns_of(template: str, tokens: Mapping[str, str]) -> Turns | None:
    """The texts, or None for a template that does more than put texts around turns.

    Args:
        tokens: the special tokens that templates name, as ``bos_token``.
    """
    users = [(USER, _U.format(number)) for number in range(3)]
    answers = [(ANSWER, _A.format(number)) for number in range(3)]
    system = (SYSTEM, _S)
    talk = [turn for pair in zip(users, answers, strict=True) for turn in pair]
    probes: list[tuple[list[Turn], bool]] = [
        (users[:1], False),
        (users[:1], True),
        (talk[:2], False),
        (talk[:3], True),
        ([system, users[0]], True),
        ([system, *talk[:5]], True),
        (talk[:5], True),
        ([system, *talk[:2]], False),
    ]
    shown = render(template, probes, tokens)
    if shown is None or any(text is None for text in shown[:4]):
        return None
    found = _read_off([text or "" for text in shown[:4]], shown[4], users, answers)
    if found is None:
        return None
    for (turns, more), text in zip(probes, shown, strict=True):
        if text is not None and found.text(turns, more) != text:
            return None
    return found


def _read_off(
    shown: list[str], with_system: str | None, users: Sequence[Turn], answers: Sequence[Turn]
) -> Turns | None:
    alone, asked, answered, again = shown
    (u0, u1), a0 = (users[0][1], users[1][1]), answers[0][1]
    counts = (alone.count(u0), answered.count(a0), again.count(u1), again.count(a0))
    if counts != (1, 1, 1, 1) or not asked.startswith(alone):
        return None
    head, after_user = alone.split(u0)
    before_answer = answered.partition(u0)[2].partition(a0)[0]
    after_answer = answered.partition(a0)[2]
    between = again.partition(a0)[2].partition(u1)[0]
    if not before_answer.startswith(after_user) or not between.startswith(after_answer):
        return None
    before_answer = before_answer[len(after_user) :]
    before_user = between[len(after_answer) :]
    if not head.endswith(before_user):
        return None
    default = head[: len(head) - len(before_user)]
    before = {USER: before_user, ANSWER: before_answer}
    after = {USER: after_user, ANSWER: after_answer}
    answer = asked[len(alone) :]
    if with_system is None or with_system.count(_S) != 1:
        return Turns(default, "", before, after, answer)
    first, _, rest = with_system.partition(_S)
    joined = rest.partition(u0)[0]
    inside = not joined.endswith(before_user) or not before_user
    start = _common(default, first)
    before[SYSTEM] = first[len(start) :]
    after[SYSTEM] = joined if inside else joined[: len(joined) - len(before_user)]
    return Turns(start, default[len(start) :], before, after, answer, inside)


def _common(one: str, other: str) -> str:
    """What both begin with."""
    size = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:size]
