"""Rows: decoders that give a text a score, for llama-server's rerank endpoint.

The runtime takes the last token, ``cls.output`` of it, and the softmax of that (``build_pooling`` in llama.cpp's
``llama-graph.cpp``); qwen3 is the only decoder that it loads such a layer for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterkit.errors import CheckpointError, TargetError, option
from adapterkit.foreign import json_value
from adapterkit.gguf import metadata
from adapterkit.gguf.arch import dense
from adapterkit.gguf.arch.maps import Array, Box, MapError, Strided
from adapterkit.gguf.arch.ops import Op
from adapterkit.gguf.arch.pooling import POOLING, labels
from adapterkit.gguf.arch.shared import RANK_NO, RANK_YES
from adapterkit.gguf.arch.spec import ArchSpec, Key, rule
from adapterkit.gguf.reader import STRING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapterkit.gguf.arch.config import Config
    from adapterkit.gguf.arch.ops import Shape
    from adapterkit.gguf.metadata import Entry

_NAME = "rerank"
TEMPLATE, NAMES = "tokenizer.chat_template", "tokenizer.chat_templates"
PROMPT = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n<Instruct>: Given a web search query, '
    "retrieve relevant passages that answer the query\n<Query>: {query}\n<Document>: {document}<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
"""What Qwen3-Reranker is asked (its model card); llama-server fills in query and document."""


@dataclass(frozen=True)
class BesideZero(Op):
    """A layer of one score gets a second one, which is 0: the softmax of both is the first one's sigmoid."""

    def run(self, arrays: Sequence[Array], config: Config) -> list[Array]:
        found = []
        for array in arrays:
            if array.rows == 1:
                zero = Box("", Strided.all(1), Strided.all(array.width))
                array = Array((2, array.width), (*array.boxes, zero))
            found.append(array)
        return found


@dataclass(frozen=True)
class TwoRows(Op):
    """The rows of "yes" and "no" of an embedding or an output layer; ``whole``: after all of it."""

    whole: bool = False

    def run(self, arrays: Sequence[Array], config: Config) -> list[Array]:
        found = []
        for array in arrays:
            ids = (config.number(RANK_YES), config.number(RANK_NO))
            if max(ids) >= array.rows:
                raise MapError(f"there is no row {max(ids)} of {array.rows}")
            rows = array.box().rows
            two = array.of_rows((2, array.width), *(rows.part(0, one, 1) for one in ids))
            found += [array, two] if self.whole else [two]
        return found

    def back(self, shapes: Sequence[Shape], config: Config) -> list[Shape]:
        return list(shapes[::2]) if self.whole else list(shapes)


def token_ids(files: Mapping[str, bytes], ref: str) -> dict[str, int]:
    """The fields of a config that make a reranker of it.

    Raises:
        CheckpointError: the tokenizer has no single tokens "yes" and "no".
    """
    try:
        words = json_value(files.get("tokenizer.json", b"{}")).get("model", {}).get("vocab", {})
    except (ValueError, AttributeError):
        words = {}
    found: dict[str, int] = {}
    for field, word in ((RANK_YES, "yes"), (RANK_NO, "no")):
        number = words.get(word) if isinstance(words, dict) else None
        if type(number) is not int:
            raise CheckpointError(
                f"{ref}: a reranker of this kind answers 'yes' or 'no', and its tokenizer.json has no such tokens",
                "convert it as the language model that it is",
            )
        found[field] = number
    return found


_QWEN3 = next(spec for spec in dense.SPECS if spec.model_type == "qwen3")
_BODY = tuple(one for one in _QWEN3.rules if one.hf not in ("lm_head", "model.embed_tokens"))
_RANK = Key("pooling_type", lambda c: POOLING["rank"])


def _two_labels(config: Config) -> list[str]:
    found = labels(config)
    return found if len(found) > 1 else [found[0], f"not {found[0]}"]


def _back(values: Mapping[str, Any], config: Mapping[str, Any], base: Any) -> dict[str, Any]:
    return {"pooling_type": None, "tie_word_embeddings": True}


_COMMON: dict[str, Any] = {
    "needs": ("token_embd.weight", "output_norm.weight", "cls.output.weight"),
    "tied": True,
    "back": _back,
}
SPECS = (
    ArchSpec(
        "qwen3",
        ("Qwen3ForSequenceClassification",),
        "qwen3_classifier",
        (rule("model.embed_tokens", "token_embd"), *_BODY, rule("score", "cls.output", ops=[BesideZero()])),
        (*_QWEN3.keys, _RANK, Key("classifier.output_labels", _two_labels)),
        when=lambda base: "cls.output.weight" in base,
        defaults={"model_type": "qwen3"},
        note="llama.cpp answers with the softmax of the scores, or the sigmoid of a single one",
        **_COMMON,
    ),
    *(
        ArchSpec(
            "qwen3",
            (),
            kind,
            (*rules, *_BODY),
            (*_QWEN3.keys, _RANK, Key("classifier.output_labels", lambda c: ["yes", "no"])),
            when=lambda base: False,
            note="written as a reranker: it answers with the probability of 'yes', and no text",
            **_COMMON,
        )
        for kind, rules in {
            "qwen3_reranker": (
                rule("model.embed_tokens", "token_embd"),
                rule("lm_head", "cls.output", ops=[TwoRows()]),
            ),
            "qwen3_reranker_tied": (
                rule("model.embed_tokens.weight", "token_embd.weight", "cls.output.weight", ops=[TwoRows(whole=True)]),
            ),
        }.items()
    ),
)


def is_reranker(spec: ArchSpec) -> bool:
    """Whether this row writes a language model as a reranker."""
    return spec.model_type.startswith("qwen3_reranker")


def check_row(spec: ArchSpec, ref: str) -> None:
    """Refuse a model that is asked to be written as a reranker and is none that llama.cpp has.

    Raises:
        TargetError: it is no Qwen3.
    """
    if not is_reranker(spec):
        raise TargetError(
            f"{ref}: llama.cpp compares the scores of two answers in a Qwen3ForCausalLM alone, and this is a {spec.arch}",
            f"leave out {option('as_reranker', True)}",
        )


def with_prompt(tokens: Sequence[Entry]) -> tuple[Entry, ...]:
    """The key-values of a tokenizer with the text that a reranker is asked, as llama-server looks for it."""
    kept = [entry for entry in tokens if entry.key not in (NAMES, f"{TEMPLATE}.{_NAME}")]
    names = [entry.key.removeprefix(f"{TEMPLATE}.") for entry in kept if entry.key.startswith(f"{TEMPLATE}.")]
    return (
        *kept,
        metadata.text(f"{TEMPLATE}.{_NAME}", PROMPT),
        metadata.array(NAMES, STRING, [*names, _NAME]),
    )
