"""How a ``tokenizer.json`` in SentencePiece's manner treats spaces: what its normalizer and pre-tokenizer come to."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterkit.errors import CheckpointError
from adapterkit.gguf.vocab.pretokenizers import steps
from adapterkit.gguf.vocab.sources import TOKENIZER
from adapterkit.gguf.vocab.table import SPACE

if TYPE_CHECKING:
    from collections.abc import Mapping

_RUNS = (" {2,}", r"\s{2,}", " +")
_SAME = ("NFKC", "Nmt")  # what SentencePiece's own normalization does beside its map


@dataclass
class Spaces:
    """What is done to a text before it is cut into pieces.

    Attributes:
        prefix: a space is put before it.
        each: before every stretch between added tokens, not only the first.
        trim: runs of spaces become one.
        ends: spaces at the ends go.
        words: pieces never reach over the start of a word.
        escaped: spaces become SentencePiece's mark.
        charsmap: its compiled map of characters.
        others: steps that GGUF has no word for.
    """

    prefix: bool = False
    each: bool = True
    trim: bool = False
    ends: bool = False
    words: bool = False
    escaped: bool = False
    charsmap: bytes = b""
    others: tuple[str, ...] = ()


def spaces(tokenizer: Mapping[str, Any]) -> Spaces:
    """Read the normalizer and the pre-tokenizer.

    Raises:
        CheckpointError: a character map that is not base64.
    """
    found = Spaces()
    for step in steps(tokenizer.get("normalizer"), "normalizers"):
        _normalize(step, found)
    for step in steps(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        _pre_tokenize(step, found)
    return found


def _normalize(step: dict[str, Any], found: Spaces) -> None:
    kind = str(step.get("type"))
    pattern = step.get("pattern") or {}
    if kind == "Prepend" and step.get("prepend") == SPACE:
        found.prefix = True
    elif kind == "Replace" and pattern.get("String") == " " and step.get("content") == SPACE:
        found.escaped = True
    elif kind == "Replace" and pattern.get("Regex") in _RUNS:
        found.trim = True
    elif kind == "Strip":
        found.ends = True
    elif kind == "Precompiled":
        try:
            found.charsmap = base64.b64decode(step.get("precompiled_charsmap") or "", validate=True)
        except (binascii.Error, TypeError):
            raise CheckpointError(f"{TOKENIZER} has a character map that is not base64", "copy it again") from None
    elif kind not in _SAME:
        found.others += (kind,)


def _pre_tokenize(step: dict[str, Any], found: Spaces) -> None:
    kind = str(step.get("type"))
    if kind == "Metaspace":
        scheme = step.get("prepend_scheme") or ("always" if step.get("add_prefix_space", True) else "never")
        found.prefix = found.prefix or scheme in ("always", "first")
        found.each = scheme != "first"
        found.words = bool(step.get("split", True))
        found.escaped = True
    elif kind == "WhitespaceSplit":
        found.trim = found.ends = found.words = True
    elif kind == "Split" and " " in (step.get("pattern") or {}).values() and found.escaped:
        pass  # no space is left to split at
    else:
        found.others += (kind,)
