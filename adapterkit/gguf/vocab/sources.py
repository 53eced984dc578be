"""The files of a Hugging Face tokenizer, read as they stand: JSON and bytes, no library that guesses a class."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from adapterkit.checkpoint.json_data import parse_json
from adapterkit.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

TOKENIZER, SETTINGS, SPECIAL_MAP, ADDED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
TEKKEN, WORDS, VOCABULARY, MERGES = "tekken.json", "vocab.txt", "vocab.json", "merges.txt"
SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
GENERATION = "generation_config.json"

# What llama.cpp's converter takes for a control token although its file does not call it special.
_SPECIAL_TEXTS = frozenset(("<pad>", "<mask>", "<2mass>", "[@BOS@]"))
_SPECIAL_ENDS = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))


@dataclass(frozen=True)
class AddedToken:
    """A token that was added to a vocabulary: found in the text before anything else is done to it."""

    id: int
    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False

    @property
    def control(self) -> bool:
        """Whether llama.cpp is to treat it as a control token."""
        return self.special or looks_special(self.content)


def looks_special(text: str) -> bool:
    return text in _SPECIAL_TEXTS or any(text.startswith(a) and text.endswith(b) for a, b in _SPECIAL_ENDS)


@dataclass(frozen=True)
class Sources:
    """Side files by name, and the model's config.

    Raises:
        CheckpointError: on access, when a file is not the JSON it should be.
    """

    files: Mapping[str, bytes]
    config: Mapping[str, Any]

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def json(self, name: str) -> dict[str, Any]:
        """A JSON object; empty when there is no such file."""
        data = self.files.get(name)
        if data is None:
            return {}
        found = parse_json(data, name)
        if not isinstance(found, dict):
            raise CheckpointError(f"{name} holds a {type(found).__name__} and no object", _AGAIN)
        return found

    @cached_property
    def tokenizer(self) -> dict[str, Any]:
        return self.json(TOKENIZER)

    @cached_property
    def settings(self) -> dict[str, Any]:
        return self.json(SETTINGS)

    @cached_property
    def special_map(self) -> dict[str, Any]:
        return self.json(SPECIAL_MAP)

    @cached_property
    def generation(self) -> dict[str, Any]:
        return self.json(GENERATION)

    @cached_property
    def model(self) -> dict[str, Any]:
        """The model of ``tokenizer.json``."""
        found = self.tokenizer.get("model")
        if TOKENIZER in self and not isinstance(found, dict):
            raise CheckpointError(f"{TOKENIZER} has no model", _AGAIN)
        return found if isinstance(found, dict) else {}

    @property
    def model_kind(self) -> str:
        """``BPE``, ``WordPiece``, ``Unigram``, ``WordLevel`` or nothing; old files do not name it."""
        model = self.model
        named = str(model.get("type") or "")
        if named or not model:
            return named
        if "merges" in model:
            return "BPE"
        return "Unigram" if isinstance(model.get("vocab"), list) else "WordPiece"

    def text_config(self) -> Mapping[str, Any]:
        """The part of the config that describes the language model."""
        for key in ("text_config", "llm_config"):
            part = self.config.get(key)
            if isinstance(part, dict):
                return part
        return self.config

    @cached_property
    def model_types(self) -> frozenset[str]:
        """Names that the model goes by: of the whole and of its text part."""
        names = (self.config.get("model_type"), self.text_config().get("model_type"))
        return frozenset(str(name) for name in names if name)

    @cached_property
    def added(self) -> dict[int, AddedToken]:
        """Added tokens by id, from every file that lists them.

        Raises:
            CheckpointError: two files give an id to different tokens, or a token to different ids.
        """
        found: dict[int, AddedToken] = {}
        places: dict[int, str] = {}
        ids: dict[str, int] = {}
        for token, where in self._listed():
            there = found.setdefault(token.id, token)
            places.setdefault(token.id, where)
            if there.content != token.content:
                raise CheckpointError(
                    f"{places[token.id]} calls token {token.id} {there.content!r} and {where} {token.content!r}",
                    "keep the files of one tokenizer",
                )
            if ids.setdefault(token.content, token.id) != token.id:
                raise CheckpointError(
                    f"{where} gives token {token.content!r} the id {token.id}, another file {ids[token.content]}",
                    "keep the files of one tokenizer",
                )
        return dict(sorted(found.items()))

    @cached_property
    def decoded(self) -> frozenset[int]:
        """Ids of the added tokens that ``tokenizer_config.json`` lists: it alone is asked for scores by the converter."""
        listed = self.settings.get("added_tokens_decoder") or {}
        return frozenset(number for number in self.added if str(number) in listed)

    def _listed(self) -> Iterator[tuple[AddedToken, str]]:
        for entry in self.tokenizer.get("added_tokens") or ():
            yield _added(entry.get("id"), entry, TOKENIZER), TOKENIZER
        for number, entry in (self.settings.get("added_tokens_decoder") or {}).items():
            yield _added(number, entry, SETTINGS), SETTINGS
        for content, number in self.json(ADDED).items():
            yield _added(number, {"content": content}, ADDED), ADDED


def content_of(token: Any) -> str | None:
    """The text of a special token as configs write it: a string, or an object with its content."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _added(number: Any, entry: Any, where: str) -> AddedToken:
    content = entry.get("content") if isinstance(entry, dict) else None
    try:
        place = int(number)
    except (TypeError, ValueError, OverflowError):
        place = -1
    if not isinstance(content, str) or place < 0:
        raise CheckpointError(f"{where} lists the token {str(content)[:40]!r} under the id {number!r}", _AGAIN)
    flags = {name: bool(entry.get(name)) for name in ("special", "lstrip", "rstrip")}
    return AddedToken(place, content, **flags)


_AGAIN = "copy the tokenizer's files again"
