"""The way back: a GGUF file's tokenizer as ``tokenizer.json`` and what belongs beside it.

What is written says again, when it is read by `read_vocab`, exactly what the file said.
"""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

from adapterkit.errors import CheckpointError
from adapterkit.gguf.vocab import pretokenizers, proto, special, templates
from adapterkit.gguf.vocab.bpe import GPT2, PRE_HINT
from adapterkit.gguf.vocab.sources import SETTINGS, TOKENIZER
from adapterkit.gguf.vocab.spm import GEMMA4, LLAMA, PLAIN_MERGES, PREFIX
from adapterkit.gguf.vocab.table import (
    BYTE,
    CONTROL,
    MERGES,
    MODEL,
    NORMAL,
    PRE,
    SCORES,
    SPACE,
    TOKENS,
    TYPES,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    padding,
)
from adapterkit.gguf.vocab.unigram import CHARSMAP, T5, TRIM
from adapterkit.gguf.vocab.wordpiece import BERT, INSIDE, LOWERCASE, STRIP_ACCENTS

if TYPE_CHECKING:
    from collections.abc import Callable

    from adapterkit.gguf.reader import GGUFHeader

_BYTES = {"add_prefix_space": True, "trim_offsets": True, "use_regex": True}
_ESCAPE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}


def tokenizer_files(header: GGUFHeader) -> dict[str, bytes]:
    """The files of a tokenizer as transformers reads them, by name; none for a model without one.

    Raises:
        CheckpointError: its tokenizer is missing, damaged, or of a kind that ``tokenizer.json`` has not.
    """
    kind = header.get(MODEL)
    if kind in ("none", "no_vocab"):
        return {}
    make = _MODELS.get(str(kind))
    if make is None:
        raise CheckpointError(
            f"a tokenizer '{kind}' cannot be written as {TOKENIZER}", "copy it from the model's own folder"
        )
    found = _Tokens(header)
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": found.added(),
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": found.post_processor(kind == GPT2),
        "decoder": None,
    }
    files = {}
    tokenizer |= make(found)
    if kind == LLAMA:
        files["tokenizer.model"] = _sentencepiece(found)
    files[TOKENIZER] = _json(tokenizer)
    files[SETTINGS] = _json(found.settings())
    for name, template in templates.of_header(header).items():
        path = templates.JINJA if name == templates.DEFAULT else f"{templates.MORE}{name}.jinja"
        files[path] = template.encode("utf-8", "surrogateescape")
    return files


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode("utf-8", "surrogateescape")


class _Tokens:
    """The lists of a header, checked against each other, without the padding at their end."""

    def __init__(self, header: GGUFHeader) -> None:
        self.header = header
        tokens, types, scores = (header.get(key) for key in (TOKENS, TYPES, SCORES))
        if not isinstance(tokens, list) or not tokens:
            raise CheckpointError(
                "the GGUF file has no list of tokens", "copy the tokenizer from the model's own folder"
            )
        for key, values in ((TYPES, types), (SCORES, scores)):
            if values is not None and (not isinstance(values, list) or len(values) < len(tokens)):
                raise CheckpointError(
                    f"the GGUF file has {len(tokens)} tokens and not as many in {key}", "convert it again"
                )
        size = len(tokens)
        types = types or [NORMAL] * size
        while size > 1 and types[size - 1] == UNUSED and tokens[size - 1] == padding(size - 1):
            size -= 1
        self.texts: list[str] = tokens[:size]
        self.types: list[int] = types[:size]
        self.scores: list[float] = (scores or [0.0] * size)[:size]
        self.merges: list[str] = header.get(MERGES) or []

    def role(self, role: str) -> str | None:
        """The text of a special token."""
        number = self.header.get(special.KEYS[role])
        return self.texts[number] if isinstance(number, int) and 0 <= number < len(self.texts) else None

    def adds(self, role: str) -> Any:
        return self.header.get(special.ADDS[role])

    def unknown(self) -> str | None:
        number = next((number for number, kind in enumerate(self.types) if kind == UNKNOWN), None)
        return self.texts[number] if number is not None else self.role("unk")

    def added(self) -> list[dict[str, Any]]:
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        return [
            {"id": number, "content": text, **flags, "special": kind == CONTROL}
            for number, (text, kind) in enumerate(zip(self.texts, self.types, strict=True))
            if kind in (CONTROL, USER_DEFINED)
        ]

    def vocabulary(self) -> dict[str, int]:
        """All tokens but padding. Added ones are among them, for those that are not get the next free ids."""
        return {
            text: number
            for number, (text, kind) in enumerate(zip(self.texts, self.types, strict=True))
            if not (kind == UNUSED and text == padding(number))
        }

    def has_bytes(self) -> bool:
        return BYTE in self.types

    def post_processor(self, over_bytes: bool) -> dict[str, Any] | None:
        first = self.role("bos") if self.adds("bos") else None
        last = self.role("eos") if self.adds("eos") else None
        if first is None and last is None:
            return (
                {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
                if over_bytes
                else None
            )
        between: list[str] = []
        if self.adds("sep"):
            between = [self.role("sep") or last or str(first)] * 2
        elif self.adds("sep") is False and last is not None:
            between = [last]
        ids = {text: number for number, text in enumerate(self.texts)}
        used = [text for text in dict.fromkeys((first, *between, last)) if text is not None]

        def token(text: str | None, part: int) -> list[dict[str, Any]]:
            return [{"SpecialToken": {"id": text, "type_id": part}}] if text is not None else []

        a, b = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
        middle = [one for text in between for one in token(text, 0)]
        return {
            "type": "TemplateProcessing",
            "single": [*token(first, 0), a, *token(last, 0)],
            "pair": [*token(first, 0), a, *middle, b, *token(last, 1)],
            "special_tokens": {text: {"id": text, "ids": [ids[text]], "tokens": [text]} for text in used},
        }

    def settings(self) -> dict[str, Any]:
        """``tokenizer_config.json``"""
        found: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        context = self.header.get(f"{self.header.get('general.architecture')}.context_length")
        if isinstance(context, int):
            found["model_max_length"] = context
        for role in special.KEYS:
            text = self.role(role)
            if text is not None:
                found[f"{role}_token"] = text
        for role in special.ADDS:
            if self.adds(role) is not None:
                found[f"add_{role}_token"] = bool(self.adds(role))
        pre = self.header.get(PRE)
        if self.header.get(MODEL) == GPT2:
            found[PRE_HINT] = pre
        return found


def _byte_level(found: _Tokens) -> dict[str, Any]:
    name = str(found.header.get(PRE))
    if name == PLAIN_MERGES:
        return _plain(found, found.merges)
    row = pretokenizers.row_of(name)
    if row is None:
        raise CheckpointError(
            f"how llama.cpp's pre-tokenizer '{name}' would be written as {TOKENIZER} is not known here",
            "copy the tokenizer from the model's own folder",
        )
    return {
        "pre_tokenizer": pretokenizers.as_json(row),
        "decoder": {"type": "ByteLevel", **_BYTES},
        "model": _bpe(found, found.merges, ignore_merges=row.ignore_merges),
    }


def _bpe(found: _Tokens, merges: list[str], **more: Any) -> dict[str, Any]:
    empty = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    flags = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    pairs = []
    for merge in merges:
        at = merge.find(" ", 1)
        if at < 0:
            raise CheckpointError(f"the GGUF file has the merge {merge!r} of one part", "convert it again")
        pairs.append([merge[:at], merge[at + 1 :]])
    return {"type": "BPE", **empty, **flags, **more, "vocab": found.vocabulary(), "merges": pairs}


def _plain(found: _Tokens, merges: list[str]) -> dict[str, Any]:
    """A BPE over plain text, as transformers converts SentencePiece."""
    prefix = bool(found.header.get(PREFIX, found.header.get(MODEL) == LLAMA))
    normalizers = [{"type": "Prepend", "prepend": SPACE}, _ESCAPE] if prefix else [_ESCAPE]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(found, merges, unk_token=found.unknown(), fuse_unk=True, byte_fallback=found.has_bytes()),
    }


def _llama(found: _Tokens) -> dict[str, Any]:
    """All pairs that make a piece as merges, the best piece first."""
    ids = {text: number for number, text in enumerate(found.texts) if found.types[number] == NORMAL}
    merges = []
    for text, _ in sorted(ids.items(), key=lambda item: -found.scores[item[1]]):
        ways = [(text[:at], text[at:]) for at in range(1, len(text)) if text[:at] in ids and text[at:] in ids]
        merges += [f"{left} {right}" for left, right in sorted(ways, key=lambda way: (ids[way[0]], ids[way[1]]))]
    return _plain(found, merges)


def _sentencepiece(found: _Tokens) -> bytes:
    pieces = tuple(
        proto.VocabularyPiece(text.replace(" ", SPACE) if kind == USER_DEFINED else text, score, kind)
        for text, score, kind in zip(found.texts, found.scores, found.types, strict=True)
    )
    roles = {role: int(found.header.get(special.KEYS[role], -1)) for role in ("unk", "bos", "eos", "pad")}
    prefix = bool(found.header.get(PREFIX, True))
    model = proto.SentencePieceModel(pieces, proto.BPE, prefix=prefix, trim=False, byte_fallback=found.has_bytes())
    return proto.serialize(model, roles)


def _wordpiece(found: _Tokens) -> dict[str, Any]:
    def written(text: str, kind: int) -> str:
        if kind in (CONTROL, USER_DEFINED, UNUSED):
            return text
        return text[len(SPACE) :] if text.startswith(SPACE) else INSIDE + text

    found.texts = [written(text, kind) for text, kind in zip(found.texts, found.types, strict=True)]
    lowercase = bool(found.header.get(LOWERCASE, True))
    accents = bool(found.header.get(STRIP_ACCENTS, lowercase))
    normalizer = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True}
    model = {"type": "WordPiece", "unk_token": found.role("unk") or "[UNK]", "continuing_subword_prefix": INSIDE}
    return {
        "normalizer": {**normalizer, "strip_accents": accents, "lowercase": lowercase},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": INSIDE, "cleanup": True},
        "model": {**model, "max_input_chars_per_word": 100, "vocab": found.vocabulary()},
    }


def _unigram(found: _Tokens) -> dict[str, Any]:
    steps: list[dict[str, Any]] = []
    charsmap = found.header.get(CHARSMAP)
    if charsmap:
        data = bytes(value & 0xFF for value in charsmap)
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()})
    if found.header.get(TRIM, False):
        steps.append({"type": "Strip", "strip_left": False, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": SPACE})
    scheme = "always" if found.header.get(PREFIX, True) else "never"
    space = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": True}
    unknown = found.unknown()
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps} if steps else None,
        "pre_tokenizer": space,
        "decoder": space,
        "model": {
            "type": "Unigram",
            "unk_id": found.texts.index(unknown) if unknown is not None else None,
            "vocab": [[text, score] for text, score in zip(found.texts, found.scores, strict=True)],
            "byte_fallback": found.has_bytes(),
        },
    }


def _gemma4(found: _Tokens) -> dict[str, Any]:
    return _plain(found, found.merges)


_MODELS: dict[str, Callable[[_Tokens], dict[str, Any]]] = {
    GPT2: _byte_level,
    LLAMA: _llama,
    BERT: _wordpiece,
    T5: _unigram,
    GEMMA4: _gemma4,
}
