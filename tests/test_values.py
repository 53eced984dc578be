"""Our `dataclass` is the standard library's, for every class of the package that it makes."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from dataclasses import field
from functools import cached_property
from typing import Any

import pytest

from adapterkit.values import dataclass


def pair(kw_only: bool = False) -> tuple[Any, Any]:
    """The same class, made here and by the standard library."""
    found = []
    for maker in (dataclass, dataclasses.dataclass):

        class Base:
            """A class."""

            a: int
            b: str = "b"
            many: list[int] = field(default_factory=list)
            named: float = field(default=1.5, kw_only=True)
            aside: int = field(default=0, compare=False, repr=False)
            counted: int = field(default=7, init=False)

            @cached_property
            def double(self) -> int:
                return self.a * 2

        Base.__qualname__ = "Base"
        found.append(maker(frozen=True, kw_only=kw_only)(Base))
    return found[0], found[1]


@pytest.mark.parametrize("kw_only", [False, True])
def test_a_frozen_class_is_what_the_standard_library_makes(kw_only: bool) -> None:
    ours, theirs = pair(kw_only)
    seen, meant = (inspect.signature(one).parameters.values() for one in (ours, theirs))
    assert [(one.name, one.kind, one.annotation) for one in seen] == [
        (one.name, one.kind, one.annotation) for one in meant
    ]
    assert dataclasses.fields(ours)
    assert ours.__match_args__ == theirs.__match_args__
    for given in ({"a": 1}, {"a": 1, "b": "x", "many": [2], "named": 3.0, "aside": 4}):
        one, other = ours(**given), theirs(**given)
        assert vars(one) == vars(other)
        assert repr(one) == repr(other)
        assert dataclasses.asdict(one) == dataclasses.asdict(other)
        assert one == ours(**given)
        assert one != other
        assert one != ours(**{**given, "a": 2})
        assert one == dataclasses.replace(one, aside=9)  # it is not compared
        assert one.double == one.double == 2 * one.a
        assert copy.copy(one) == one
        with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'a'"):
            one.a = 3
        with pytest.raises(dataclasses.FrozenInstanceError, match="cannot delete field 'b'"):
            del one.b
    assert ours(a=1).many is not ours(a=1).many
    with pytest.raises(TypeError):
        ours()
    with pytest.raises(TypeError):
        ours(a=1, strange=2)


@dataclass(frozen=True)
class Point:
    x: int
    y: int = 0

    def __post_init__(self) -> None:
        if self.x < 0:
            raise ValueError("x")


@dataclasses.dataclass(frozen=True)
class Named(Point):
    name: str = ""


def test_values_are_hashed_pickled_and_inherited() -> None:
    assert len({Point(1), Point(1, 0), Point(2)}) == 2
    assert pickle.loads(pickle.dumps(Point(1, 2))) == Point(1, 2)
    assert Named(1, 2, "n") == Named(1, 2, "n")
    assert repr(Named(1)) == "Named(x=1, y=0, name='')"
    with pytest.raises(ValueError, match="x"):
        Point(-1)
    match Point(3, 4):
        case Point(x, y):
            assert (x, y) == (3, 4)


def test_what_a_class_writes_itself_stays() -> None:
    @dataclass(frozen=True)
    class Odd:
        x: int

        def __eq__(self, other: object) -> bool:
            return True

        def __hash__(self) -> int:
            return 3

        def __repr__(self) -> str:
            return "odd"

    assert Odd(1) == Odd(2)
    assert hash(Odd(1)) == 3
    assert repr(Odd(1)) == "odd"


@pytest.mark.parametrize("maker", [dataclass, dataclasses.dataclass])
def test_fields_of_any_name_and_what_is_hashed(maker: Any) -> None:
    @maker(frozen=True)
    class OddNames:
        self: int
        values: int = 2
        made: int = field(default=3, compare=True, hash=False)
        made_here: list[int] = field(default_factory=list, compare=False)

    odd: Any = OddNames
    assert vars(odd(4, 5)) == {"self": 4, "values": 5, "made": 3, "made_here": []}
    assert hash(odd(1)) == hash(odd(1, made=9)) == hash((1, 2))
    assert odd(1) != odd(1, made=9)

    @maker(frozen=True)
    class Own:
        x: int

        def __eq__(self, other: object) -> bool:
            return True

    made: Any = Own
    assert hash(made(1)) == hash((1,))
    said = made.__dataclass_params__
    assert (said.init, said.repr, said.eq, said.frozen) == (True, True, True, True)


def test_other_kinds_are_left_to_the_standard_library() -> None:
    @dataclass
    class Open:
        x: int = 0

    @dataclass(frozen=True, slots=True)
    class Slotted:
        x: int = 0

    one = Open()
    one.x = 5
    assert one == Open(5)
    assert Slotted.__slots__ == ("x",)
