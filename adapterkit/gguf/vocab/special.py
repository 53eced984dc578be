"""Special tokens and what is put around a text: which ids, and which of them are added by the tokenizer itself.

The order of authorities is that of gguf's ``SpecialVocab``: what the post-processor of ``tokenizer.json`` does, then
``tokenizer_config.json``, then ``config.json``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from adapterkit.gguf.metadata import Entry, boolean, u32
from adapterkit.gguf.vocab.sources import content_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from adapterkit.gguf.vocab.sources import Sources

# Roles in the order in which they are written, and their keys; the third is misspelt in the format itself.
KEYS = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
    "sep": "tokenizer.ggml.seperator_token_id",
    "pad": "tokenizer.ggml.padding_token_id",
    "cls": "tokenizer.ggml.cls_token_id",
    "mask": "tokenizer.ggml.mask_token_id",
    "eot": "tokenizer.ggml.eot_token_id",
    "eom": "tokenizer.ggml.eom_token_id",
}
ADDS = {role: f"tokenizer.ggml.add_{role}_token" for role in ("bos", "eos", "sep")}

# Texts at which llama.cpp stops without being told (llama-vocab.cpp).
STOPS = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
        *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>"),
        *("<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~["),
    )
)


@dataclass
class Special:
    """Ids by role, and whether a role's token is put around the text."""

    ids: dict[str, int] = field(default_factory=dict)
    adds: dict[str, bool] = field(default_factory=dict)

    def entries(self) -> list[Entry]:
        found = [u32(key, self.ids[role]) for role, key in KEYS.items() if role in self.ids]
        return found + [boolean(key, self.adds[role]) for role, key in ADDS.items() if role in self.adds]


def special_tokens(sources: Sources, ids: Mapping[str, int]) -> Special:
    """The special tokens of a tokenizer.

    Args:
        ids: of every token that is written, by its text.
    """
    texts = _texts(sources)
    found = Special()
    _post_process(sources.tokenizer.get("post_processor"), texts, found.adds)
    for role in ADDS:
        said = sources.settings.get(f"add_{role}_token")
        if isinstance(said, bool):
            found.adds.setdefault(role, said)
    known = set(ids.values())
    for role in KEYS:
        text = texts.get(role, "")
        if text in ids:
            found.ids[role] = ids[text]
            continue
        number = _of_config(sources, role)
        if number in known:
            found.ids[role] = number
    _more_stops(sources, ids, found)
    return found


def _texts(sources: Sources) -> dict[str, str]:
    """The text of each role: bos, eos, ...; where a model has only cls and sep they are these."""
    texts: dict[str, str] = {}
    for place in (sources.settings, sources.special_map):
        for role in KEYS:
            text = content_of(place.get(f"{role}_token"))
            if text:
                texts.setdefault(role, text)
    for role, other in (("bos", "cls"), ("eos", "sep")):
        if other in texts:
            texts.setdefault(role, texts[other])
    return texts


def _of_config(sources: Sources, role: str) -> int:
    for place in (sources.config, sources.text_config()):
        number = place.get(f"{role}_token_id")
        if isinstance(number, list):
            number = next(iter(number), None)
        if isinstance(number, int) and not isinstance(number, bool):
            return number
    return -1


def _steps(processor: Any) -> Iterator[dict[str, Any]]:
    if isinstance(processor, dict):
        inner = processor.get("processors")
        for step in inner if isinstance(inner, list) else [processor]:
            if isinstance(step, dict):
                yield step


def _post_process(processor: Any, texts: dict[str, str], adds: dict[str, bool]) -> None:
    """What ``tokenizer.json`` puts around a text; fills in roles that no other file names."""
    for step in _steps(processor):
        kind = step.get("type")
        if kind == "ByteLevel":
            adds.setdefault("bos", False)
            adds.setdefault("eos", False)
        elif kind in ("RobertaProcessing", "BertProcessing"):
            adds.update(bos=True, eos=True, sep=True)
            for role, other in (("cls", "bos"), ("sep", "eos")):
                pair = step.get(role)
                if isinstance(pair, list) and pair and isinstance(pair[0], str):
                    texts.setdefault(role, pair[0])
                    texts.setdefault(other, texts[role])
        elif kind == "TemplateProcessing":
            _template(step, texts, adds)


def _template(step: Mapping[str, Any], texts: dict[str, str], adds: dict[str, bool]) -> None:
    single = [_token(part) for part in step.get("single") or ()]
    if len(single) < 2:
        return
    first, last = single[0], single[-1]
    if first:
        texts.setdefault("bos", first)
        adds["bos"] = first in (texts["bos"], texts.get("cls"))
    if last:
        before = texts.get("eos")
        if before and before != last:
            # The text ends with another token than the one called eos: that one ends a turn.
            texts["eot" if "eot" not in texts else "eom"] = before
        texts["eos"] = last
        adds["eos"] = True
    pair = [_token(part) for part in step.get("pair") or ()]
    if pair:
        inner = pair[1 if first and pair[0] == first else 0 : -1 if last and pair[-1] == last else None]
        middle = [text for text in inner[1:-1] if text]
        if len(inner) > 2:
            separators = {texts.get("sep"), texts.get("eos")} - {None}
            # A separator of one token that also ends the text is the end of the first text and no separator.
            adds["sep"] = any(text in separators for text in middle) and not (last and len(middle) < 2)
            if adds["sep"]:
                texts.setdefault("sep", texts.get("eos", middle[0]))


def _token(part: Any) -> str | None:
    token = part.get("SpecialToken") if isinstance(part, dict) else None
    text = token.get("id") if isinstance(token, dict) else None
    return text if isinstance(text, str) else None


def _more_stops(sources: Sources, ids: Mapping[str, int], found: Special) -> None:
    """Ends of a turn that only ``generation_config.json`` names, and that llama.cpp would not stop at by itself."""
    texts = {number: text for text, number in ids.items()}
    for place in (sources.generation, sources.config):
        listed = place.get("eos_token_id")
        for number in listed if isinstance(listed, list) else [listed]:
            if number not in texts or number in found.ids.values() or texts[number] in STOPS:
                continue
            role = next((role for role in ("eos", "eot", "eom") if role not in found.ids), None)
            if role is not None:
                found.ids[role] = number
