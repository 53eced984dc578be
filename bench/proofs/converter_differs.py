"""Where our files differ from those of llama.cpp's converter on purpose, and what that converter cannot convert.

A row: patterns of models and of keys or tensors, which of the files say it (``ours``, ``theirs`` or ``both``), the reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Meant:
    """A difference that is meant."""

    models: str
    where: str
    says: str
    reason: str

    def fits(self, model: str, where: str, ours: str, theirs: str) -> bool:
        says = "ours" if theirs == "-" else "theirs" if ours == "-" else "both"
        known = any(fnmatchcase(model, one) for one in self.models.split("|"))
        return known and says == self.says and fnmatchcase(where, self.where)


_TOKEN = "tokenizer.ggml."
_BARE = "a tokenizer.model alone says these too: symbols that the user defined, the unknown token"
_MASK = "the converter knows XLM-RoBERTa's <mask> by the id 250001 alone; here it is the token after the pieces"
_MICRO = "keys of a mixer that a Granite 4 without mixers has not, and defaults; a granite in llama.cpp makes nothing of them"
_FORGETS = "the converter leaves out the file's type"
ROWS = (
    Meant("*", f"{_TOKEN}add_space_prefix", "ours", "said, where llama.cpp would take the same by default"),
    Meant(
        "mistral v?|t5_encoder",
        f"{_TOKEN}add_???_token",
        "ours",
        "said, where llama.cpp would take the same by default",
    ),
    Meant(
        "*bert*|MiniLM",
        f"{_TOKEN}normalizer.strip_accents",
        "ours",
        "said, where llama.cpp would take the same by default",
    ),
    Meant("*bert*|MiniLM", f"{_TOKEN}cls_token_id", "ours", "llama.cpp reads it no more; it is kept for the way back"),
    Meant("llama_tied|mistral v?", f"{_TOKEN}token_type", "both", _BARE),
    Meant("llama_tied|mistral v?", f"{_TOKEN}unknown_token_id", "ours", _BARE),
    Meant(
        "gemma",
        f"{_TOKEN}eot_token_id",
        "both",
        "the converter writes 107, whatever the tokenizer; ours is <end_of_turn>",
    ),
    Meant(
        "nemotron",
        f"{_TOKEN}padding_token_id",
        "theirs",
        "the converter writes 0 and 1 for these, whatever the tokenizer",
    ),
    Meant(
        "nemotron",
        f"{_TOKEN}unknown_token_id",
        "both",
        "the converter writes 0 and 1 for these, whatever the tokenizer",
    ),
    Meant("xverse", f"{_TOKEN}scores", "ours", "without them llama.cpp does not know which tokens to join first"),
    Meant("xlm_roberta", f"{_TOKEN}scores", "both", _MASK),
    Meant("xlm_roberta", f"{_TOKEN}token*", "both", _MASK),
    Meant("mistral tekken", f"{_TOKEN}scores", "theirs", "zeros, which no byte-level BPE has a use for"),
    Meant(
        "mistral tekken",
        "tokenizer.chat_template",
        "theirs",
        "the converter's own choice for a tekken.json without a template",
    ),
    Meant(
        "MiniLM",
        f"{_TOKEN}pre",
        "both",
        "found by the hash of another tokenizer; a WordPiece has no pre-tokenizer in llama.cpp",
    ),
    Meant("*", "general.dataset.*.name", "both", "underscores are spaces, as in the names of models"),
    Meant("*", "general.dataset.*.repo_url", "both", "the converter's link lacks datasets/ and leads nowhere"),
    Meant("gpt_neox*|mpt", "general.file_type", "ours", _FORGETS),
    Meant(
        "gpt_neox*",
        "gptneox.rope.freq_base",
        "ours",
        "the converter leaves out the base, which then is 10000 whatever the config says",
    ),
    Meant(
        "t5_encoder", "t5encoder.attention.causal", "ours", "without it llama.cpp's server masks what follows a token"
    ),
    Meant(
        "ernie4_5_moe",
        "ernie4_5-moe.expert_shared_feed_forward_length",
        "both",
        "the converter divides another width by the number of key heads, which is right for the published sizes alone",
    ),
    Meant("granite4_micro", "granite.ssm.*", "theirs", _MICRO),
    Meant("granite4_micro", "granite.rope.scaling.finetuned", "theirs", _MICRO),
    Meant("granite4_micro", "granite.expert_shared_feed_forward_length", "theirs", _MICRO),
    Meant(
        "granite4_micro",
        "granite.attention.head_count_kv",
        "both",
        "one number for all layers, and not a list of equal ones",
    ),
    Meant(
        "*mamba*|jamba",
        "blk.*.ssm_a",
        "both",
        "ours are the nearest float32 of -exp(x); torch's are off by one unit now and then",
    ),
    Meant(
        "llama gptq",
        "blk.*.weight",
        "both",
        "decoded in float16, as GPTQ's own loop does and as adapters were trained; the converter decodes in float32",
    ),
)
# What the converter answers where it cannot convert a published model.
REFUSED = {
    "stablelm2": ("ValueError: Unprocessed norms", "the converter loses the query and key norms of StableLM 2 12B"),
    "baichuan": ("RecursionError", "the converter calls itself without end on every tensor that is not W_pack"),
}


def reason(model: str, where: str, ours: str, theirs: str) -> str | None:
    """Why two files differ there; None when that is not meant."""
    return next((row.reason for row in ROWS if row.fits(model, where, ours, theirs)), None)


def refusal(model: str, said: str) -> str | None:
    """Why the converter has no file."""
    start, why = REFUSED.get(model, ("", ""))
    return why if start and said.startswith(start) else None
