"""Byte-level BPE (``gpt2`` in GGUF): GPT-2, Llama 3, Qwen and most models since."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapterkit.errors import CheckpointError, option
from adapterkit.gguf.metadata import Entry, array, text
from adapterkit.gguf.reader import STRING
from adapterkit.gguf.vocab import pretokenizers
from adapterkit.gguf.vocab.sources import MERGES as MERGES_FILE
from adapterkit.gguf.vocab.sources import TOKENIZER, VOCABULARY
from adapterkit.gguf.vocab.table import MERGES, MODEL, PRE, TokenTable

if TYPE_CHECKING:
    from adapterkit.gguf.vocab.sources import Sources

GPT2 = "gpt2"
PRE_HINT = (
    "gguf_pre"  # in tokenizer_config.json of folders made from GGUF: names that mean the same stay what they were
)
_SPACE = chr(ord(" ") + 256)  # a space inside a merge, in GPT-2's alphabet of bytes
# What older folders without tokenizer.json are, by their class.
_CLASSES = {
    "GPT2Tokenizer": "gpt-2",
    "GPT2TokenizerFast": "gpt-2",
    "RobertaTokenizer": "roberta-bpe",
    "CodeGenTokenizer": "phi-2",
    "Qwen2Tokenizer": "qwen2",
    "GPTNeoXTokenizer": "olmo",
}


def read(sources: Sources, table: TokenTable, pre: str | None) -> tuple[list[Entry], list[Entry]]:
    """Fill the table; gives the keys before the tokens and those after them.

    Raises:
        CheckpointError: files missing, or a tokenizer that llama.cpp cannot do.
    """
    vocabulary, merges = (_of_json if TOKENIZER in sources else _of_files)(sources)
    for token, number in vocabulary.items():
        table.put(number, token)
    table.add(sources.added.values())
    name = pre or _recognised(sources, table)
    return [text(MODEL, GPT2), text(PRE, name)], [array(MERGES, STRING, merges)]


def _of_json(sources: Sources) -> tuple[dict[str, int], list[str]]:
    model = sources.model
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise CheckpointError(
                f"this BPE has the {name} {model[name]!r}, which llama.cpp has not", "use another model"
            )
    return checked_vocabulary(model.get("vocab")), [joined(pair) for pair in model.get("merges") or ()]


def _of_files(sources: Sources) -> tuple[dict[str, int], list[str]]:
    missing = [name for name in (VOCABULARY, MERGES_FILE) if name not in sources]
    if missing:
        raise CheckpointError(
            f"no {TOKENIZER}, and no {' and '.join(missing)}", "copy the tokenizer's files beside the weights"
        )
    lines = sources.files[MERGES_FILE].decode("utf-8", "replace").splitlines()
    merges = [line for line in lines if line.strip() and not line.startswith("#version")]
    return checked_vocabulary(sources.json(VOCABULARY)), merges


def checked_vocabulary(found: Any) -> dict[str, int]:
    """A vocabulary as text to id.

    Raises:
        CheckpointError: it is something else.
    """
    if not isinstance(found, dict) or not found or not all(isinstance(number, int) for number in found.values()):
        raise CheckpointError(f"the model of {TOKENIZER} has no vocabulary", "copy the tokenizer's files again")
    return found


def joined(pair: Any) -> str:
    """A merge as GGUF has it: two tokens with a space between them."""
    if isinstance(pair, str):
        return pair
    if isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair):
        return " ".join(part.replace(" ", _SPACE) for part in pair)
    raise CheckpointError(f"{TOKENIZER} has the merge {str(pair)[:60]}", "copy the tokenizer's files again")


def _recognised(sources: Sources, table: TokenTable) -> str:
    if TOKENIZER not in sources:
        name = _CLASSES.get(str(sources.settings.get("tokenizer_class")))
        if name is None:
            raise CheckpointError(
                "nothing says how this tokenizer splits text", f"add its tokenizer.json, or give {option('pre')}"
            )
        return name
    pre_tokenizer = sources.tokenizer.get("pre_tokenizer")
    for step in pretokenizers.steps(sources.tokenizer.get("normalizer"), "normalizers"):
        if step.get("type") != "NFC":
            raise CheckpointError(
                f"this BPE normalizes text ({step.get('type')}), which llama.cpp does not", pretokenizers.hint()
            )
        table.notes.append("this tokenizer brings text to NFC first, llama.cpp does not")
    found = list(pretokenizers.steps(pre_tokenizer, "pretokenizers"))
    if not any(step.get("type") == "ByteLevel" for step in found):
        raise CheckpointError(
            "this BPE is not over bytes, and llama.cpp has no other of this kind", pretokenizers.hint()
        )
    if any(step.get("add_prefix_space") for step in found):
        table.notes.append(
            "this tokenizer puts a space before the text, llama.cpp does not; the first word gets other ids"
        )
    row, notes = pretokenizers.recognise(
        pretokenizers.split_regexes(pre_tokenizer),
        ignore_merges=bool(sources.model.get("ignore_merges")),
        models=sources.model_types,
        hint=str(sources.settings.get(PRE_HINT) or ""),
    )
    table.notes.extend(notes)
    return row.name
