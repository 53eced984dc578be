r"""Which of llama.cpp's pre-tokenizers splits text as a ``tokenizer.json`` does.

llama.cpp knows pre-tokenizers by name (``tokenizer.ggml.pre``); a name stands for a list of regexes, each of which splits
the pieces that the one before it left. So the pre-tokenizer of ``tokenizer.json`` is written as such a list too (digits,
punctuation and the byte-level one are regexes as well), both are brought to one spelling, and equal lists have equal
pieces. Tokens that were added, or ids that moved, do not matter.

Source of names and regexes: ``llm_tokenizer_bpe`` in ``src/llama-vocab.cpp`` of llama.cpp.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from adapterkit.errors import CheckpointError, option

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
DIGIT, DIGITS, THREE_DIGITS = r"\p{N}", r"\p{N}+", r"\p{N}{1,3}"
PUNCTUATION = r"[\p{P}\$\+<=>\^~\|`]+"
SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # English short forms, in any case
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _REST
QWEN2 = SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _REST
QWEN35 = SHORT + (r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?" + _UPPER + "*" + _LOWER + "+{0}|" + r"[^\r\n\p{L}\p{N}]?" + _UPPER + "+" + _LOWER + "*{0}"
)
_SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = _CASED.replace("{0}", "") + r"|\p{N}|" + _SLASHED
O200K = _CASED.replace("{0}", SHORT + "?") + r"|\p{N}{1,3}|" + _SLASHED
_NO_HAN = "&&[^\\p{Han}]]"
KIMI = (
    r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?" + _UPPER[:-1] + _NO_HAN + "*" + _LOWER[:-1] + _NO_HAN + "+" + SHORT + "?|"
    r"[^\r\n\p{L}\p{N}]?" + _UPPER[:-1] + _NO_HAN + "+" + _LOWER[:-1] + _NO_HAN + "*" + SHORT + "?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CJK = "[一-龥぀-ゟ゠-ヿ]+"
_ASCII = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
_MARKS = _ASCII + r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"
DEEPSEEK3 = _MARKS + r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Escaped, for some of these letters are equal to others in NFC.
_LETTERS = (
    "[A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376"
    "\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-"
    "\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b"
    "\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943]+"
)
_HAN = "[一-龥ࠀ-一가-퟿]+"
BLOOM = " ?[^(\\s|[.,!?…。，、।۔،])]+"
_WIDE_SPACES = "|".join(rf"\s{{{2**n}}}(?!\S)" for n in range(9, 1, -1)) + r"|\s{1,2}(?!\S)|\s{1}"


@dataclass(frozen=True)
class Pre:
    """One of llama.cpp's pre-tokenizers.

    Attributes:
        regexes: what it splits by, as a ``tokenizer.json`` has it.
        ignore_merges: a piece that is a token is taken whole, whatever the merges say.
        models: model types for which the converter has this name among names that mean the same.
        limit: where llama.cpp's own expression splits otherwise.
    """

    name: str
    regexes: tuple[str, ...]
    ignore_merges: bool = False
    models: tuple[str, ...] = ()
    limit: str = ""


_MARKS_APART = "words with combining marks (Indic scripts, Burmese, Thai, Tibetan)"
_NUMBERS_APART = "numbers beside letters or ends of lines"

# The first row of equal ones is what a model gets that no row names.
ROWS: tuple[Pre, ...] = (
    Pre("gpt-2", (GPT2,), models=("gpt2", "gpt_neo", "gptj", "codegen")),
    Pre("olmo", (GPT2,), models=("olmo", "olmoe", "gpt_neox", "mamba", "mamba2")),
    Pre("mpt", (GPT2,), models=("mpt",)),
    Pre("phi-2", (GPT2,), models=("phi",)),
    Pre("exaone4", (GPT2,), models=("exaone4",)),
    Pre("roberta-bpe", (GPT2,), models=("roberta", "xlm-roberta")),
    Pre("modern-bert", (GPT2,), models=("modernbert",)),
    Pre("jais", (GPT2,), models=("jais",)),
    Pre("starcoder", (DIGIT, GPT2), models=("starcoder2", "gpt_bigcode")),
    Pre("smollm", (DIGIT, GPT2), models=("llama", "smollm3")),
    Pre("refact", (DIGIT, GPT2), models=("refact", "granite", "granitemoe", "granitemoeshared")),
    Pre("command-r", (DIGIT, GPT2), models=("cohere", "cohere2")),
    Pre("exaone", (DIGIT, GPT2), models=("exaone",)),
    Pre("minerva-7b", (DIGIT, GPT2), models=("mistral",)),
    Pre("llama-bpe", (LLAMA3,), True, ("llama", "smollm3")),
    Pre("falcon-h1", (LLAMA3,), True, ("falcon_h1",)),
    Pre("lfm2", (LLAMA3,), True, ("lfm2", "lfm2_moe")),
    Pre("glm4", (LLAMA3,), True, ("glm", "glm4", "glm4_moe", "glm4v", "glm4v_moe")),
    Pre("smaug-bpe", (LLAMA3,)),
    Pre("dbrx", (LLAMA3,), models=("dbrx", "olmo2", "olmo3", "phi3", "granite", "granitemoehybrid")),
    Pre("chatglm-bpe", (LLAMA3,), models=("chatglm",)),
    Pre("qwen2", (QWEN2,), models=("qwen2", "qwen2_moe", "qwen3", "qwen3_moe")),
    Pre("stablelm2", (QWEN2,), models=("stablelm",)),
    Pre("hunyuan", (QWEN2,), models=("hunyuan_v1_moe",)),
    Pre("qwen35", (QWEN35,)),
    Pre("tekken", (TEKKEN,), True, limit=_MARKS_APART),
    Pre("gpt-4o", (O200K,), models=("gpt_oss",), limit=_MARKS_APART),
    Pre("llama4", (O200K,), models=("llama4", "llama4_text"), limit=_MARKS_APART),
    Pre("minimax-m2", (O200K,), models=("minimax_m2",), limit=_MARKS_APART),
    Pre("kimi-k2", (KIMI,), limit=_MARKS_APART),
    Pre("deepseek-v3", (THREE_DIGITS, _CJK, DEEPSEEK3), models=("deepseek_v3",)),
    Pre("hunyuan-dense", (THREE_DIGITS, _CJK, DEEPSEEK3), models=("hunyuan_v1_dense",)),
    Pre("spark2_5", (THREE_DIGITS, _CJK, _MARKS + r"|[\r\n]|\s+(?!\S)|\s+", DIGIT)),
    Pre("deepseek-llm", (r"[\r\n]", r"\s?" + _LETTERS, r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _HAN, DIGITS)),
    Pre("deepseek-llm", (r"[\r\n]", r"\s?" + _LETTERS, r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _HAN, DIGIT)),
    Pre("deepseek-coder", (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN, DIGIT)),
    Pre("falcon", (PUNCTUATION, GPT2, DIGITS, "[0-9][0-9][0-9]"), models=("falcon",)),
    Pre("falcon", (PUNCTUATION, GPT2, "[0-9][0-9][0-9]")),
    Pre("bloom", (BLOOM,), models=("bloom",)),
    Pre("viking", (BLOOM, DIGIT)),
    Pre(
        "bailingmoe",
        (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",),
    ),
    Pre("seed-coder", (SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",)),
    Pre("ufakzeka", (r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _REST,)),
    Pre("superbpe", (DIGITS, r"(?=(\d{3})+(?!\d))")),
    Pre("tiny_aya", (r"\d{1,3}(?=(?:\d{3})*\b)", O200K), limit=_NUMBERS_APART),
    Pre("minicpm5", (THREE_DIGITS, SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+|" + _REST), True),
    Pre(
        "jais-2",
        (SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|" + _WIDE_SPACES,),
    ),
    Pre(
        "exaone-moe",
        (
            SHORT
            + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        ),
    ),
)
# Names that llama.cpp loads beside these; only --pre gives them.
OTHER_NAMES = frozenset(
    (
        *(
            "default",
            "llama3",
            "llama-v3",
            "falcon3",
            "pixtral",
            "midm-2.0",
            "jina-v5-nano",
            "youtu",
            "jina-es",
            "jina-de",
        ),
        *(
            "gigachat",
            "jina-v2-es",
            "jina-v2-de",
            "a.x-4.0",
            "mellum",
            "gemma4",
            "granite-embed-multi-311m",
            "sarvam-moe",
        ),
        *("jina-v1-en", "jina-v2-code", "whitespace", "deepseek-r1-qwen", "kormo", "f2llmv2", "poro-chat", "glm5"),
        *("codeshell", "gpt3-finnish", "chameleon", "megrez", "kanana2", "talkie", "granite-embed-multi-97m"),
        *("cohere2moe", "trillion", "granite-docling", "bailingmoe2", "llada-moe", "hy_v4", "joyai-llm"),
        *("grok-2", "afmoe", "laguna", "solar-open", "mellum2"),
    )
)
NAMES = frozenset(row.name for row in ROWS) | OTHER_NAMES

# Spellings that match the same text in such expressions.
_SPELLINGS = (
    ("\r", r"\r"),
    ("\n", r"\n"),
    ("\t", r"\t"),
    ("(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", SHORT),
    ("'(?i:[sdmt]|ll|ve|re)", SHORT),
    ("'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])", SHORT),
    (r"\p{N}{1}", r"\p{N}"),
    ("(\\s|.,!?…。，、।۔،)", "(\\s|[.,!?…。，、।۔،])"),
)
_POSSESSIVE = re.compile(r"(?<!\\)([+*?])\+(?=[|()\[\\ ]|$)")


def canonical(regex: str) -> str:
    """One spelling for expressions that split alike: escapes, short forms, possessive quantifiers, a redundant end."""
    regex = unicodedata.normalize("NFC", regex)
    for spelling, usual in _SPELLINGS:
        regex = regex.replace(spelling, usual)
    return _POSSESSIVE.sub(r"\1", regex).removesuffix(r"|\s+")


def split_regexes(pre_tokenizer: Any) -> tuple[str, ...]:
    """The regexes that a ``pre_tokenizer`` of ``tokenizer.json`` splits by, in order, each in one spelling.

    Raises:
        CheckpointError: a step that is no split by an expression.
    """
    return tuple(canonical(regex) for step in steps(pre_tokenizer, "pretokenizers") for regex in _regexes(step))


def steps(component: Any, inner: str) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, sequences taken apart."""
    if not isinstance(component, dict):
        return
    if component.get("type") == "Sequence":
        for step in component.get(inner) or ():
            yield from steps(step, inner)
        return
    yield component


def _regexes(step: dict[str, Any]) -> Iterator[str]:
    kind = step.get("type")
    if kind == "ByteLevel":
        if step.get("use_regex", True):
            yield GPT2
    elif kind == "Digits":
        yield DIGIT if step.get("individual_digits") else DIGITS
    elif kind == "Punctuation" and step.get("behavior") == "Contiguous":
        yield PUNCTUATION
    elif kind == "Split" and _keeps_all(step):
        pattern = step.get("pattern") or {}
        yield str(pattern["Regex"]) if "Regex" in pattern else re.escape(str(pattern.get("String", "")))
    else:
        raise CheckpointError(
            f"the pre-tokenizer has the step {kind} ({_described(step)}), which llama.cpp has not", hint()
        )


def _keeps_all(step: dict[str, Any]) -> bool:
    """Matches and what lies between them both stay: isolated, or matches kept where the expression covers everything."""
    behavior = step.get("behavior")
    return behavior == "Isolated" or (behavior == "Removed" and bool(step.get("invert")))


def _described(step: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value!r}" for name, value in step.items() if name != "type")[:200]


def hint() -> str:
    """What to do where no pre-tokenizer is recognised."""
    return f"give the name of llama.cpp's nearest pre-tokenizer with {option('pre')}"


def recognise(
    regexes: tuple[str, ...], *, ignore_merges: bool, models: Iterable[str] = (), hint: str = ""
) -> tuple[Pre, tuple[str, ...]]:
    """The row that splits by these regexes, and notes.

    Args:
        regexes: from `split_regexes`.
        ignore_merges: what the tokenizer's model says.
        models: types of the model, which choose among rows that mean the same.
        hint: a name written by the inverse, taken if it means the same.

    Raises:
        CheckpointError: none; the message has the regexes and the nearest row.
    """
    same = [row for row in ROWS if tuple(map(canonical, row.regexes)) == regexes]
    if not same:
        raise _unknown(regexes)
    alike = [row for row in same if row.ignore_merges == ignore_merges]
    notes: tuple[str, ...] = ()
    if not alike:
        says = "takes whole tokens before merges" if ignore_merges else "always merges"
        notes = (f"this tokenizer {says}, llama.cpp's {same[0].name} does not; a few words may get other ids",)
        alike = same
    named = set(models)
    chosen = row_of(hint)
    if (
        chosen is None
        or (*map(canonical, chosen.regexes),) != regexes
        or chosen.ignore_merges != alike[0].ignore_merges
    ):
        chosen = next((row for row in alike if named & set(row.models)), alike[0])
    if chosen.limit:
        notes += (f"llama.cpp's {chosen.name} splits {chosen.limit} otherwise than this tokenizer",)
    return chosen, notes


def _unknown(regexes: tuple[str, ...]) -> CheckpointError:
    text = "\n".join(regexes)

    def likeness(row: Pre) -> float:
        return difflib.SequenceMatcher(None, text, "\n".join(map(canonical, row.regexes)), autojunk=False).ratio()

    nearest = max(ROWS, key=likeness)
    theirs = ", ".join(map(canonical, nearest.regexes))
    return CheckpointError(
        f"llama.cpp has no pre-tokenizer that splits by {', '.join(regexes) or 'nothing at all'}; "
        f"the nearest is {nearest.name}, which splits by {theirs}",
        f"if they do the same on your text, give {option('pre', nearest.name)}",
    )


def as_json(row: Pre) -> dict[str, Any]:
    """The ``pre_tokenizer`` of ``tokenizer.json`` that splits as a row does."""
    parts: list[dict[str, Any]] = []
    regexes = list(row.regexes)
    natural = bool(regexes) and regexes[-1] == GPT2
    if natural:
        regexes.pop()
    for regex in regexes:
        if regex in (DIGIT, DIGITS):
            parts.append({"type": "Digits", "individual_digits": regex == DIGIT})
        elif regex == PUNCTUATION:
            parts.append({"type": "Punctuation", "behavior": "Contiguous"})
        else:
            parts.append({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False})
    parts.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": natural})
    return parts[0] if len(parts) == 1 else {"type": "Sequence", "pretokenizers": parts}


def row_of(name: str) -> Pre | None:
    """The row of a name, for files that carry it; names that mean the same as a row's share its regexes."""
    wanted = SAME.get(name, name)
    found = next((row for row in ROWS if row.name == wanted), None)
    return found and replace(found, name=name)


# Names that differ from a row's only in the model they were made for.
SAME = {
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0", "jina-v5-nano"), "llama-bpe"),
    **dict.fromkeys(("gigachat", "jina-v2-es", "jina-v2-de", "jina-es", "jina-de", "a.x-4.0", "mellum"), "gpt-2"),
    **dict.fromkeys(("jina-v1-en", "jina-v2-code"), "roberta-bpe"),
    **dict.fromkeys(("trillion", "granite-docling"), "gpt-2"),
    **dict.fromkeys(("deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "grok-2", "solar-open"), "qwen2"),
    **dict.fromkeys(("codeshell", "mellum2"), "starcoder"),
    **dict.fromkeys(("poro-chat", "gpt3-finnish"), "bloom"),
    **dict.fromkeys(("kanana2", "talkie"), "gpt-4o"),
    **dict.fromkeys(("hy_v4", "joyai-llm"), "deepseek-v3"),
    **dict.fromkeys(("bailingmoe2", "llada-moe"), "bailingmoe"),
    "cohere2moe": "tiny_aya",
    "glm5": "glm4",
}
