"""What an adapter's folder brings for the merged model: its tokenizer, chat template, processor and generation config.

One fact, one file: transformers has written each of these facts in several forms over the years, and readers prefer one
or another. What an adapter brings replaces every form of the same fact that the base has, so that no reader finds the
base's.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from adapterkit.checkpoint.folder import MODULES, MORE_TEMPLATES, VALUE_HEAD, is_module
from adapterkit.foreign import json_value

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from adapterkit.adapters.adapter import Adapter

TOKENIZER_CONFIG, TOKENIZER = "tokenizer_config.json", "tokenizer.json"
PROCESSOR_CONFIG = "processor_config.json"
TEMPLATE = "chat_template"  # as a key
TEMPLATES = ("chat_template.jinja", "chat_template.json")
# Files that hold a tokenizer's vocabulary, in any of its forms.
VOCABULARIES = frozenset(
    {
        *(TOKENIZER, "tokenizer.model", "tokenizer.model.v3", "tokenizer.model.v11", "tekken.json", "vocab.json"),
        *("vocab.txt", "vocab.bpe", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "sentencepiece.model"),
        *("source.spm", "target.spm", "bpe.codes", "emoji.json", "encoder.json", "prophetnet.tokenizer"),
    }
)
# Of a tokenizer, what tokenizer_config.json says too.
SPECIAL = frozenset({"added_tokens.json", "special_tokens_map.json"})
# Keys of processor_config.json, and the file in which older versions keep the same.
PROCESSORS = {
    "image_processor": "preprocessor_config.json",
    "feature_extractor": "preprocessor_config.json",
    "video_processor": "video_preprocessor_config.json",
}
_STARTS = (
    *("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", TEMPLATE, "spiece", "sentencepiece"),
    *("tekken", "source.spm", "target.spm", MORE_TEMPLATES, "generation_config.json", PROCESSOR_CONFIG),
    *("preprocessor_config.json", "video_preprocessor_config.json"),
)
# What sentence-transformers saves beside a transformer and the folders of its modules.
_OF_MODULES = frozenset({MODULES, "config_sentence_transformers.json", "sentence_bert_config.json"})


def is_brought(name: str, beside: Collection[str] = ()) -> bool:
    """Whether a file beside an adapter is for the merged model to use; anything else in its folder is about training.

    Args:
        name: of the file in its folder.
        beside: all names in it.
    """
    if is_module(name, beside) or (MODULES in beside and name in _OF_MODULES):
        return True
    return name.startswith(_STARTS) or name.endswith(".tiktoken") or name == VALUE_HEAD


def with_brought(base: Mapping[str, bytes], adapters: Sequence[Adapter]) -> tuple[dict[str, bytes], list[str]]:
    """The base's side files with what the first adapter that brings any has instead, and notes."""
    files = dict(base)
    bringing = [adapter for adapter in adapters if adapter.side_files]
    if not bringing:
        return files, []
    mine = {file.name: file.bytes() for file in bringing[0].side_files}
    notes = []
    dropped = {*_stale_template(files, mine), *_stale_vocabulary(files, mine), *_stale_processor(mine)} - set(mine)
    if TOKENIZER_CONFIG in mine or TOKENIZER in mine:
        dropped |= SPECIAL - set(mine)
    inline = _inline(files)
    for name in dropped & set(files):
        del files[name]
    files.update(mine)
    if _has_template(mine):
        for name in (TOKENIZER_CONFIG, PROCESSOR_CONFIG):
            if name not in mine and name in files and TEMPLATE in (said := _object(files[name])):
                files[name] = _text({key: value for key, value in said.items() if key != TEMPLATE})
    elif inline is not None and TOKENIZER_CONFIG in mine and not any(name in files for name in TEMPLATES):
        files[TOKENIZER_CONFIG] = _text({**_object(mine[TOKENIZER_CONFIG]), TEMPLATE: inline})
    facts = [
        fact
        for fact, there in (
            ("tokenizer", any(name in VOCABULARIES | SPECIAL | {TOKENIZER_CONFIG} or "token" in name for name in mine)),
            ("chat template", _has_template(mine)),
            ("generation config", "generation_config.json" in mine),
            ("processor", any("processor_config" in name for name in mine)),
            ("sentence-transformers' modules", MODULES in mine),
            ("value head", VALUE_HEAD in mine),
        )
        if there
    ]
    notes.append(f"{', '.join(facts) or 'side files'} taken from {bringing[0].ref}")
    gone = sorted(dropped & set(base))
    if gone:
        notes.append(f"left out of the base's files, for they state the same in another form: {', '.join(gone)}")
    if len(bringing) > 1:
        notes.append(f"{len(bringing)} adapters bring such files; the first one's were taken")
    return files, notes


def _has_template(files: Mapping[str, bytes]) -> bool:
    if any(name in TEMPLATES or name.startswith(MORE_TEMPLATES) for name in files):
        return True
    return _inline(files) is not None or bool(_object(files.get(PROCESSOR_CONFIG, b"")).get(TEMPLATE))


def _inline(files: Mapping[str, bytes]) -> Any:
    """The chat template, or the list of them, in a tokenizer's own config; None where there is none."""
    return _object(files.get(TOKENIZER_CONFIG, b"")).get(TEMPLATE) or None


def _stale_template(files: Mapping[str, bytes], mine: Mapping[str, bytes]) -> set[str]:
    if not _has_template(mine):
        return set()
    return {name for name in files if name in TEMPLATES or name.startswith(MORE_TEMPLATES)}


def _stale_vocabulary(files: Mapping[str, bytes], mine: Mapping[str, bytes]) -> set[str]:
    """Other forms of the vocabulary, unless both sides state in one form that it is the same apart from added tokens."""
    if not _vocabularies(mine):
        return set()
    if TOKENIZER in mine and TOKENIZER in files:
        one, other = (_object(side[TOKENIZER]).get("model") for side in (mine, files))
        if one is not None and one == other:
            return set()
    shared = _vocabularies(mine) & _vocabularies(files)
    if shared and TOKENIZER not in shared and all(mine[name] == files[name] for name in shared):
        return set()
    return _vocabularies(files)


def _vocabularies(files: Mapping[str, bytes]) -> set[str]:
    return {name for name in files if name in VOCABULARIES or name.endswith(".tiktoken")}


def _stale_processor(mine: Mapping[str, bytes]) -> set[str]:
    said = _object(mine.get(PROCESSOR_CONFIG, b""))
    return {file for key, file in PROCESSORS.items() if key in said}


def _object(data: bytes) -> dict[str, Any]:
    """A JSON object; an empty one where it is none, for what cannot be read states nothing."""
    try:
        found = json_value(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _text(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
