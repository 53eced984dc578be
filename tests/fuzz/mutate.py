"""Mutations of bytes: of any file, and of the words and numbers of a text."""

from __future__ import annotations

import re
from random import Random

_NUMBERS = (
    b"0",
    b"-1",
    b"1e400",
    b"-0.0",
    b"NaN",
    b"Infinity",
    b"9" * 30,
    b"9" * 5000,
    b"true",
    b"null",
    b'"x"',
    b"[]",
    b"{}",
)
_STRINGS = (
    *(
        b'""',
        b'"\\ud800"',
        b'"\\u0000"',
        b'"a\\nb"',
        b'"\\u001b[2J"',
        b'"../../x"',
        b'"' + b"x" * 5000 + b'"',
        b"7",
        b"null",
    ),
    *(b"[[[[[]]]]]", b'{"a": 1}', b"[" * 300 + b"]" * 300, b'"::error::x"', b'"(a|a?)+(.*)*z"'),
)
_WORD = re.compile(rb'-?\d+(?:\.\d+)?|"(?:[^"\\]|\\.)*"')


def mutated(data: bytes, random: Random) -> bytes:
    """A few changes of ``data``, most of them small."""
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        data = random.choice((_bits, _cut, _repeat, _insert, _word, _word, _length))(data or b"0", random)
    return data[:200_000]


def _bits(data: bytes, random: Random) -> bytes:
    at = random.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << random.randrange(8))]) + data[at + 1 :]


def _cut(data: bytes, random: Random) -> bytes:
    one, other = sorted((random.randrange(len(data) + 1), random.randrange(len(data) + 1)))
    return data[:one] + data[other:] if random.random() < 0.5 else data[:other]


def _repeat(data: bytes, random: Random) -> bytes:
    one = random.randrange(len(data))
    part = data[one : one + random.randrange(1, 64)]
    return data[:one] + part * random.choice((2, 3, 100)) + data[one:]


def _insert(data: bytes, random: Random) -> bytes:
    at = random.randrange(len(data) + 1)
    return (
        data[:at]
        + random.choice((b"\0", b"\xff" * 8, b"\x80", b"[", b"{", b'"', b"\xef\xbb\xbf", b"\n::error::"))
        + data[at:]
    )


def _length(data: bytes, random: Random) -> bytes:
    """A number of four or eight bytes becomes a large one."""
    at = random.randrange(len(data))
    number = random.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1, 10**9, 7))
    size = random.choice((4, 8))
    return data[:at] + (number % 2 ** (8 * size)).to_bytes(size, "little") + data[at + size :]


def _word(data: bytes, random: Random) -> bytes:
    """A number or a quoted text becomes another."""
    found = list(_WORD.finditer(data))
    if not found:
        return _bits(data, random)
    one = random.choice(found)
    new = random.choice(_STRINGS if one[0].startswith(b'"') and random.random() < 0.7 else _NUMBERS)
    return data[: one.start()] + new + data[one.end() :]
