"""Options by themselves: kinds of values, bounds, choices, and what a caller named."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterkit.errors import UsageError
from adapterkit.requests.call import takes
from adapterkit.requests.option import FLAG, NUMBER, PAIRS, PATH, REF, WHOLE, Option, Request, opt


@dataclass(frozen=True)
class Toy(Request):
    VERB = "toy"

    src: str = field(metadata=opt("What to read.", REF, role="input"))
    size: int = field(default=3, kw_only=True, metadata=opt("How large.", WHOLE, low=1, high=9, role="bytes"))
    share: float | None = field(default=None, kw_only=True, metadata=opt("How much.", NUMBER, role="values"))
    names: tuple[str, ...] = field(default=(), kw_only=True, metadata=opt("Which.", many=True))
    loud: bool = field(default=False, kw_only=True, metadata=opt("Say more.", FLAG, needs=("share",)))


@takes(Toy)
def toy(request: Toy) -> Toy:
    """Do nothing."""
    return request


@pytest.mark.parametrize(
    ("kind", "value", "there"),
    [
        (WHOLE, 3, 3),
        (NUMBER, 3, 3.0),
        (PATH, "a/b", Path("a/b")),
        (REF, Path("a"), Path("a")),
        (PAIRS, {"a": "b"}, (("a", "b"),)),
        (PAIRS, ["a=b=c"], (("a", "b=c"),)),
        (PAIRS, [("a", "b")], (("a", "b"),)),
        (FLAG, True, True),
    ],
)
def test_values_of_each_kind(kind: str, value: Any, there: Any) -> None:
    assert Option("", kind).checked("x", value) == there


def test_the_last_sign_of_a_regular_expression_parts_it_from_its_type() -> None:
    assert Option("", PAIRS, metavar="REGEX=TYPE").checked("x", ["a=b=Q8_0"]) == (("a=b", "Q8_0"),)


@given(st.one_of(st.text(), st.binary(), st.lists(st.integers()), st.booleans(), st.floats()))
def test_a_whole_number_is_one(value: Any) -> None:
    with pytest.raises(UsageError, match="give a whole number"):
        Option("", WHOLE).checked("size", value)


@given(st.integers())
def test_bounds_hold(value: int) -> None:
    inside = 1 <= value <= 9
    if inside:
        assert toy("x", size=value).size == value
        return
    with pytest.raises(UsageError, match="give a number from 1 to 9"):
        toy("x", size=value)


def test_what_was_named_is_known_even_at_its_default() -> None:
    assert toy("x", size=3).named == {"src", "size"}
    assert toy("x").given() == {"src": "x"}
    assert toy("x", share=None).named == {"src"}


def test_one_value_is_a_sequence_of_one() -> None:
    assert toy("x", names="ab").names == ("ab",)
    assert toy("x", names=["a", "b"]).names == ("a", "b")


def test_an_option_without_what_it_needs_is_refused() -> None:
    with pytest.raises(UsageError, match="--loud means nothing here"):
        toy("x", loud=True)
    assert toy("x", loud=True, share=0.5).loud


@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [((), {}, "toy needs src"), (("a", "b"), {}, "options by name"), (("a",), {"src": "b"}, "given twice")],
)
def test_a_wrong_call_is_a_usage_error(args: tuple[Any, ...], kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        toy(*args, **kwargs)
