"""SentencePiece models: the few fields of ``sentencepiece_model.proto`` that a tokenizer needs, read and written.

Wire format: protobuf's own documentation ("Encoding"); field numbers: google/sentencepiece, ``sentencepiece_model.proto``.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterkit.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator

UNIGRAM, BPE = 1, 2
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_MODEL_TYPE, _BYTE_FALLBACK, _UNK_ID, _BOS_ID, _EOS_ID, _PAD_ID = 3, 35, 40, 41, 42, 43
_CHARSMAP, _DUMMY_PREFIX, _EXTRA_WHITESPACES, _ESCAPE = 2, 3, 4, 5
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class VocabularyPiece:
    text: str
    score: float
    type: int = 1


@dataclass(frozen=True)
class SentencePieceModel:
    """Pieces by id, and how text is made ready for them.

    Attributes:
        kind: `UNIGRAM` or `BPE`.
        charsmap: the compiled normalization, empty for none.
        prefix: a space is put before the text.
        trim: runs of spaces become one, and those at the ends go.
    """

    pieces: tuple[VocabularyPiece, ...]
    kind: int
    charsmap: bytes = b""
    prefix: bool = True
    trim: bool = True
    byte_fallback: bool = False


def parse(data: bytes, where: str) -> SentencePieceModel:
    """Read a model file.

    Raises:
        CheckpointError: the bytes are no SentencePiece model, or end early.
    """
    pieces: list[VocabularyPiece] = []
    numbers: dict[tuple[int, int], int] = {}
    charsmap = b""
    try:
        for number, value in _fields(data):
            if number == _PIECES and isinstance(value, bytes):
                pieces.append(_piece(value))
            elif number in (_TRAINER, _NORMALIZER) and isinstance(value, bytes):
                for inner, found in _fields(value):
                    if isinstance(found, int):
                        numbers[number, inner] = found
                    elif (number, inner) == (_NORMALIZER, _CHARSMAP):
                        charsmap = found
    except (IndexError, ValueError, struct.error):
        pieces = []
    kind = numbers.get((_TRAINER, _MODEL_TYPE), UNIGRAM)
    if not pieces or kind not in (UNIGRAM, BPE):
        what = "no SentencePiece model" if not pieces else f"a SentencePiece model of type {kind}, not unigram or BPE"
        raise CheckpointError(f"{where} is {what}", "copy the tokenizer's files again")
    return SentencePieceModel(
        tuple(pieces),
        kind,
        charsmap,
        bool(numbers.get((_NORMALIZER, _DUMMY_PREFIX), 1)),
        bool(numbers.get((_NORMALIZER, _EXTRA_WHITESPACES), 1)),
        bool(numbers.get((_TRAINER, _BYTE_FALLBACK), 0)),
    )


def serialize(model: SentencePieceModel, special: dict[str, int]) -> bytes:
    """The bytes of a model file.

    Args:
        special: ids of ``unk``, ``bos``, ``eos`` and ``pad``; -1 for none.
    """
    trainer = _number(_MODEL_TYPE, model.kind) + _number(_BYTE_FALLBACK, int(model.byte_fallback))
    for name, field in (("unk", _UNK_ID), ("bos", _BOS_ID), ("eos", _EOS_ID), ("pad", _PAD_ID)):
        trainer += _number(field, special.get(name, -1))
    normalizer = _string(1, b"identity" if not model.charsmap else b"user_defined")
    if model.charsmap:
        normalizer += _string(_CHARSMAP, model.charsmap)
    normalizer += _number(_DUMMY_PREFIX, int(model.prefix)) + _number(_EXTRA_WHITESPACES, int(model.trim))
    normalizer += _number(_ESCAPE, 1)
    pieces = b"".join(
        _string(
            _PIECES,
            _string(1, piece.text.encode())
            + _key(2, _FIXED32)
            + struct.pack("<f", piece.score)
            + _number(3, piece.type),
        )
        for piece in model.pieces
    )
    return pieces + _string(_TRAINER, trainer) + _string(_NORMALIZER, normalizer)


def _piece(data: bytes) -> VocabularyPiece:
    text, score, kind = "", 0.0, 1
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            text = value.decode()
        elif number == 2 and isinstance(value, bytes):
            score = struct.unpack("<f", value)[0]
        elif number == 3 and isinstance(value, int):
            kind = value
    return VocabularyPiece(text, score, kind)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field: varints as integers, everything else as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == _BYTES:
            size, at = _varint(data, at)
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            raise ValueError
        if at + size > len(data):
            raise ValueError
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError


def _key(number: int, wire: int) -> bytes:
    return _packed(number << 3 | wire)


def _number(number: int, value: int) -> bytes:
    return _key(number, _VARINT) + _packed(value & (1 << 64) - 1)


def _string(number: int, value: bytes) -> bytes:
    return _key(number, _BYTES) + _packed(len(value)) + value


def _packed(value: int) -> bytes:
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)
