"""Tokenizers as GGUF has them: a Hugging Face folder's files to key-values, and back.

Everything is read from the files themselves (``tokenizer.json``, ``tokenizer.model``, ``vocab.txt``, ``tekken.json`` and
the configs beside them). Keys and values are those of llama.cpp's converter (``conversion/base.py``, gguf's
``SpecialVocab``), but where those would give other ids than the tokenizer does: `spm` tells of the scores, `special` of what
is put around a text.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from adapterkit.errors import CheckpointError, UsageError
from adapterkit.gguf.metadata import Entry, text, u32
from adapterkit.gguf.vocab import bpe, pretokenizers, proto, special, spm, tekken, templates, unigram, wordpiece, world
from adapterkit.gguf.vocab.inverse import tokenizer_files
from adapterkit.gguf.vocab.sources import (
    GENERATION,
    MERGES,
    SENTENCEPIECE,
    SETTINGS,
    SPECIAL_MAP,
    TEKKEN,
    TOKENIZER,
    VOCABULARY,
    WORDS,
    Sources,
)
from adapterkit.gguf.vocab.table import MODEL, UNKNOWN, TokenTable, Vocab

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["FILES", "Vocab", "read_vocab", "tokenizer_files"]

# Side files that say something of a tokenizer; templates of other names lie in a folder of their own.
FILES = (
    *(TOKENIZER, SETTINGS, SPECIAL_MAP, "added_tokens.json", GENERATION, TEKKEN, WORDS, VOCABULARY, MERGES),
    *(*SENTENCEPIECE, templates.JINJA, templates.JSON, world.FILE),
)
TYPE_COUNT = "tokenizer.ggml.token_type_count"
_READERS: dict[str, Callable[[Sources, TokenTable, str | None], tuple[list[Entry], list[Entry]]]] = {
    "spm": spm.read,
    "bpe": bpe.read,
    "tekken": tekken.read,
    "wordpiece": wordpiece.read,
    "unigram": unigram.read,
    "world": world.read,
}
# What an architecture's row may say, and the kinds that its files may then turn out to be.
KINDS = {
    "auto": ("spm", "bpe", "tekken", "wordpiece", "unigram"),
    "spm": ("spm", "bpe", "tekken"),
    "bpe": ("bpe", "spm", "tekken"),
    "wordpiece": ("wordpiece", "bpe", "unigram"),
    "unigram": ("unigram", "spm"),
    "world": ("world",),
}
# Roles by the texts that these families always use, where no file names them.
_ROLES = {
    "wordpiece": {
        "bos": "[CLS]",
        "eos": "[SEP]",
        "unk": "[UNK]",
        "sep": "[SEP]",
        "pad": "[PAD]",
        "cls": "[CLS]",
        "mask": "[MASK]",
    },
    "tekken": tekken.ROLES,
    "world": world.ROLES,
}
# What a family's classes put before and after a text where no tokenizer.json says it.
_ADDED = {"spm": (True, False), "tekken": (True, False), "wordpiece": (True, True), "unigram": (False, True)}
# Roles that some models' configs leave out (conversion/base.py, _set_vocab_glm; glm.py; gemma.py).
_MODEL_ROLES = {
    ("glm4_moe", "glm4v_moe", "glm4v_moe_text", "chatglm"): {
        "bos": "[gMASK]",
        "eot": "<|user|>",
        "unk": "<|endoftext|>",
        "eom": "<|observation|>",
    },
    ("glm4", "glm4v", "glm4v_text"): {
        "bos": "<|endoftext|>",
        "eos": "<|endoftext|>",
        "eot": "<|user|>",
        "unk": "<|endoftext|>",
    },
    ("gemma",): {"eot": "<end_of_turn>"},
}


def read_vocab(
    files: Mapping[str, bytes], config: Mapping[str, Any], *, kind: str, rows: int, pre: str | None = None
) -> Vocab:
    """The key-values of a tokenizer.

    Args:
        files: side files by name, as `FILES`.
        config: of the model.
        kind: what the architecture has: ``auto``, ``spm``, ``bpe``, ``wordpiece``, ``unigram`` or ``none``.
        rows: of the embedding; there are as many tokens. 0 for as many as the tokenizer has.
        pre: the name of llama.cpp's pre-tokenizer, instead of the one that is recognised.

    Raises:
        CheckpointError: files are missing, contradict each other or the embedding, or llama.cpp cannot do what they say.
        UsageError: a ``pre`` that llama.cpp does not know.
    """
    if pre is not None and pre not in pretokenizers.NAMES:
        raise UsageError(f"'{pre}' is no pre-tokenizer of llama.cpp", "give a name as llama-bpe or qwen2")
    if kind == "none":
        return Vocab((text(MODEL, "none"),), rows)
    try:
        return _read(Sources(files, config), kind, rows, pre)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, struct.error) as error:
        said = f"{type(error).__name__}: {error}"[:100]
        hint = "copy them from the model's own repository"
        raise CheckpointError(f"the tokenizer files hold what no tokenizer has ({said})", hint) from error


def _read(sources: Sources, kind: str, rows: int, pre: str | None) -> Vocab:
    found = _kind(sources, kind)
    table = TokenTable()
    before, after = _READERS[found](sources, table, pre)
    table.fit(rows or max(table.texts) + 1, sources.added)
    greedy = [token.content for token in sources.added.values() if token.lstrip or token.rstrip]
    if greedy and found in ("bpe", "spm"):
        more = f" and {len(greedy) - 1} more" if len(greedy) > 1 else ""
        table.notes.append(f"{greedy[0]!r}{more} take away the spaces beside them here, and not in llama.cpp")
    roles = _special(sources, table, found)
    chat = templates.templates(sources)
    types = sources.text_config().get("type_vocab_size")
    if found == "wordpiece" or types is not None:
        after = [*after, u32(TYPE_COUNT, int(types or 1))]
    entries = (*before, *table.entries(scores=found in ("spm", "unigram")), *after, *roles, *templates.entries(chat))
    return Vocab(entries, len(table.texts), tuple(dict.fromkeys(table.notes)))


def _kind(sources: Sources, kind: str) -> str:
    """The family that the files belong to."""
    found = _of_files(sources)
    if found is None:
        raise CheckpointError("there are no tokenizer files", f"put {TOKENIZER} or tokenizer.model beside the weights")
    if found not in KINDS[kind]:
        raise CheckpointError(
            f"the tokenizer is a {found}, and this architecture has a {kind}", "give the model's own tokenizer"
        )
    return found


def _of_files(sources: Sources) -> str | None:
    name = spm.file_of(sources)
    if world.FILE in sources:
        return "world"
    if TOKENIZER in sources:
        if sources.model_kind != "BPE":
            family = {"WordPiece": "wordpiece", "Unigram": "unigram"}.get(sources.model_kind)
            if family is None:
                raise CheckpointError(
                    f"llama.cpp has no tokenizer of the kind {sources.model_kind}", "use another model"
                )
            return family
        found = pretokenizers.steps(sources.tokenizer.get("pre_tokenizer"), "pretokenizers")
        over_bytes = any(step.get("type") == "ByteLevel" for step in found)
        return "bpe" if over_bytes and name is None else "spm"
    if TEKKEN in sources:
        return "tekken"
    if name is not None:
        return "spm" if proto.parse(sources.files[name], name).kind == proto.BPE else "unigram"
    if WORDS in sources:
        return "wordpiece"
    return "bpe" if VOCABULARY in sources or MERGES in sources else None


def _special(sources: Sources, table: TokenTable, kind: str) -> list[Entry]:
    ids = table.ids()
    found = special.special_tokens(sources, ids)
    expected = dict(_ROLES.get(kind, {}))
    for models, roles in _MODEL_ROLES.items():
        if sources.model_types & set(models):
            expected |= roles
    for role, content in expected.items():
        if content in ids:
            found.ids.setdefault(role, ids[content])
    if "unk" not in found.ids:
        unknown = ids.get(str(sources.model.get("unk_token") or ""))
        if unknown is None:
            unknown = next((number for number, one in sorted(table.types.items()) if one == UNKNOWN), None)
        if unknown is not None:
            found.ids["unk"] = unknown
    # llama.cpp has defaults of its own for what a file does not say.
    stated = kind == "wordpiece" or TOKENIZER not in sources
    both = _ADDED.get(kind, (False, False)) if stated else (False, False)
    if kind == "unigram" and spm.file_of(sources) == unigram.FAIRSEQ_FILE:
        both = (True, True)
    for role, usual in zip(("bos", "eos"), both, strict=True):
        found.adds.setdefault(role, usual)
    for role in ("bos", "eos"):
        if found.adds.get(role) and role not in found.ids:
            found.adds[role] = False
            table.notes.append(f"a {role} token is to be added and none is named; it is not added")
    return found.entries()
