"""The metadata of a merged GGUF file beside that of its base: of a Hugging Face base, what our conversion of it would write.

A merge leaves the metadata alone, and weights that are right answer wrongly with a wrong rope base, without their chat
template, or when the text ends at another token. What two converters may write differently and means the same in llama.cpp
(a default written out or left out, one number for all layers or one for each, names of rows without a token) is no finding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from adapterkit.errors import UsageError, nearest, option
from adapterkit.gguf.vocab import special, templates
from adapterkit.gguf.vocab.table import MERGES, MODEL, NORMAL, PRE, SCORES, SPACE, TOKENS, TYPES, UNUSED
from adapterkit.verbs.verify.meaning import same, shown, value
from adapterkit.verbs.verify.report import ERROR, NOTE, WARNING, Finding

if TYPE_CHECKING:
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.gguf.reader import GGUFHeader
    from adapterkit.verbs.verify.subject import Subject

# Names, licences, types of tensors and how a file is split: nothing that decides an answer.
_FREE = ("general.", "quantize.", "split.", "adapterkit.")


@dataclass(frozen=True)
class MetadataRow:
    """Keys whose difference is one finding.

    Attributes:
        kind: of the finding.
        keys: patterns; those of an architecture without its name in front.
        severity: of a value that is another one.
        does: what comes of it.
    """

    kind: str
    keys: tuple[str, ...]
    severity: str
    does: str


ROWS = (
    MetadataRow("rope base", ("rope.freq_base*",), ERROR, "positions are read otherwise than in training"),
    MetadataRow("rope scaling", ("rope.*",), ERROR, "positions are read otherwise than in training"),
    MetadataRow("norm epsilon", ("*epsilon",), ERROR, "every norm gives other values"),
    MetadataRow(
        "head count",
        ("attention.head_count*", "attention.key_length*", "attention.value_length*"),
        ERROR,
        "q, k and v are cut at other places",
    ),
    MetadataRow(
        "context length", ("context_length",), WARNING, "servers allow more or less text than the base was made for"
    ),
    MetadataRow(
        "sizes",
        ("*feed_forward_length", "embedding_length*", "block_count", "vocab_size"),
        WARNING,
        "servers may refuse to load it",
    ),
    MetadataRow("experts", ("expert*",), ERROR, "tokens go to other experts, or with other weights"),
    MetadataRow("attention", ("attention.*", "*softcapping", "*_scale"), ERROR, "attention or its scales are others"),
    MetadataRow("tokenizer", (MODEL, TOKENS, MERGES), ERROR, "text becomes other tokens"),
    MetadataRow("pre-tokenizer", (PRE,), ERROR, "text is cut at other places before it becomes tokens"),
    MetadataRow("token types", (TYPES,), WARNING, "special tokens are read or shown otherwise"),
    MetadataRow("token scores", (SCORES,), WARNING, "text may become other tokens"),
    MetadataRow("bos token", (special.KEYS["bos"],), ERROR, "texts begin otherwise than in training"),
    MetadataRow("eos token", (special.KEYS["eos"],), ERROR, "answers end too early, or not at all"),
    MetadataRow("special tokens", ("tokenizer.ggml.*_token_id",), WARNING, "some special tokens are others"),
    MetadataRow("added tokens", tuple(special.ADDS.values()), ERROR, "texts begin or end otherwise than in training"),
    MetadataRow("chat template", (templates.TEMPLATE,), WARNING, "messages are put together otherwise"),
    MetadataRow("tokenizer", ("tokenizer.*",), WARNING, "it may treat text otherwise"),
    MetadataRow("config", ("*",), WARNING, "the model may be computed otherwise"),
)

# Keys that change answers wherever they stand.
_SAID = frozenset({special.KEYS["eos"], *special.ADDS.values()})


# ------------------------------------------------------------------ what is found


def metadata(subject: Subject, on_purpose: Sequence[str] = ()) -> Iterator[Finding]:
    """What of MERGED's metadata is other than the base's.

    Args:
        on_purpose: keys that were set otherwise on purpose: they are noted, and no alarm.
    """
    expected = subject.metadata
    if expected is None:
        return
    theirs, mine = _header_of(subject.found), expected.header
    yield from (Finding("not compared", NOTE, text) for text in expected.notes)
    arch, other = (str(one.get("general.architecture")) for one in (mine, theirs))
    if arch != other:
        text = f"MERGED is a '{other}' and the base a '{arch}'"
        yield Finding("other architecture", ERROR, text, "give the base that MERGED was made from")
        return
    known = [key for key in dict.fromkeys((*mine.keys, *theirs.keys)) if not key.startswith(_FREE)]
    if TOKENS not in mine.keys:  # the base's tokenizer cannot be told
        known = [key for key in known if not key.startswith("tokenizer.")]
    groups: dict[tuple[str, str, bool], list[tuple[str, Finding]]] = {}
    for key in known:
        one = _difference(key, arch, mine, theirs, strict=expected.strict)
        if one is not None:
            groups.setdefault((one.kind, one.severity, key in on_purpose), []).append((key, one))
    for (_, _, meant), found in groups.items():
        yield _together(found, meant=meant)


def _header_of(found: Checkpoint) -> GGUFHeader:
    from adapterkit.gguf.checkpoint import GGUFCheckpoint

    assert isinstance(found, GGUFCheckpoint)
    return found.header


def check_keys(subject: Subject, given: Sequence[str]) -> None:
    """Refuse keys said to be set on purpose that are no key of MERGED or its base.

    Raises:
        UsageError
    """
    if not given:
        return
    if subject.metadata is None:
        raise UsageError(f"{option('on_purpose')} names keys of a GGUF file, and MERGED is a folder", "leave it out")
    known = [*dict.fromkeys((*_header_of(subject.found).keys, *subject.metadata.header.keys))]
    for key in given:
        if key not in known:
            hint = nearest(key, known, "give a key such as tokenizer.chat_template")
            raise UsageError(f"'{key}' is no key of MERGED or its base", hint)


def _together(found: list[tuple[str, Finding]], *, meant: bool) -> Finding:
    """One finding of what is the same mistake; the first key is shown, all are named."""
    keys, first = tuple(key for key, _ in found), found[0][1]
    more = f" (and {len(keys) - 1} more keys)" if len(keys) > 1 else ""
    if meant:
        return replace(first, severity=NOTE, text=f"{first.text}{more}, on purpose", hint="", keys=keys)
    named = " ".join(f"{option('on_purpose', key)}" for key in keys[:3])
    return replace(first, text=first.text + more, hint=f"{first.hint}; if that is meant, {named}", keys=keys)


def _difference(key: str, arch: str, mine: GGUFHeader, theirs: GGUFHeader, *, strict: bool) -> Finding | None:
    """What is wrong with one key; None where both mean the same."""
    name = key.removeprefix(f"{arch}.")
    row = next(row for row in ROWS if any(fnmatchcase(name, pattern) for pattern in row.keys))
    if key in _ARRAYS:
        says = _ARRAYS[key](mine, theirs)
        return None if says is None else _finding(row, says)
    wanted, there = value(name, arch, mine), value(name, arch, theirs)
    if same(name, wanted, there) or _idle(name, arch, mine, theirs):
        return None
    base = "the base has" if strict else "a conversion of the base has"
    if there is None:
        found = _finding(row, f"MERGED has no {key}, and {base} {shown(key, wanted, mine)}")
        return replace(found, severity=ERROR if key == templates.TEMPLATE else WARNING)
    found = _finding(row, f"{key} is {shown(key, there, theirs)}, and {base} {shown(key, wanted, mine)}")
    if wanted is None and not strict:
        if key == templates.TEMPLATE:
            return replace(found, severity=NOTE, hint="")
        # A key that our conversion does not write may be one of a newer converter.
        return replace(found, severity=WARNING) if name in _SAID else None
    lesser = key not in mine.keys and name.startswith("tokenizer.")
    lesser |= key == special.KEYS["eos"] and _ends(there, mine)
    return replace(found, severity=WARNING) if lesser else found


def _idle(name: str, arch: str, mine: GGUFHeader, theirs: GGUFHeader) -> bool:
    """Whether it is a detail of a scaling that neither file has."""
    kind = "rope.scaling.type"
    detail = name.startswith("rope.scaling.") and name not in (kind, "rope.scaling.factor")
    return detail and all(value(kind, arch, one) == "none" for one in (mine, theirs))


def _finding(row: MetadataRow, says: str) -> Finding:
    return Finding(row.kind, row.severity, f"{says}: {row.does}", "convert again with the base's own files")


def _ends(number: Any, mine: GGUFHeader) -> bool:
    """Whether answers of the base end at that token too."""
    return number in [mine.get(special.KEYS[role]) for role in ("eos", "eot", "eom")]


# ------------------------------------------------------------------ lists


def _tokens(mine: GGUFHeader, theirs: GGUFHeader) -> str | None:
    return _apart(TOKENS, "token", mine, theirs, lambda text: str(text).replace(SPACE, " "))


def _types(mine: GGUFHeader, theirs: GGUFHeader) -> str | None:
    return _apart(TYPES, "the type of token", mine, theirs, int)


def _scores(mine: GGUFHeader, theirs: GGUFHeader) -> str | None:
    if mine.get(MODEL) not in ("llama", "t5"):  # the others never ask for one
        return None
    return _apart(SCORES, "the score of token", mine, theirs, lambda score: float(f"{score:.6g}"))


def _merges(mine: GGUFHeader, theirs: GGUFHeader) -> str | None:
    return _apart(MERGES, "merge", mine, theirs, str)


def _apart(key: str, word: str, mine: GGUFHeader, theirs: GGUFHeader, read: Callable[[Any], Any]) -> str | None:
    """The first place where two lists differ, in words; rows of the embedding without a token do not count."""
    if TOKENS not in mine.keys:  # the base's tokenizer is not known
        return None
    wanted, there = mine.get(key, []), theirs.get(key, [])
    if not wanted or not there:
        return (
            None
            if wanted == there
            else f"MERGED has {'no' if wanted else 'a'} {key}, and the base {'one' if wanted else 'none'}"
        )
    if len(wanted) != len(there):
        return f"{key} has {len(there)} entries, and the base's {len(wanted)}"
    kinds = mine.get(TYPES, []) if key != MERGES else []
    # Only a score of a normal token is ever asked for.
    unused = {n for n, kind in enumerate(kinds) if kind == UNUSED or (key == SCORES and kind != NORMAL)}
    pairs = enumerate(zip(wanted, there, strict=True))
    off = [n for n, (a, b) in pairs if a != b and n not in unused and read(a) != read(b)]
    if not off:
        return None
    more = f" (and {len(off) - 1} more)" if len(off) > 1 else ""
    return f"{word} {off[0]} is {there[off[0]]!r}, and the base's {wanted[off[0]]!r}{more}"


_ARRAYS: Mapping[str, Callable[[GGUFHeader, GGUFHeader], str | None]] = {
    TOKENS: _tokens,
    TYPES: _types,
    SCORES: _scores,
    MERGES: _merges,
}
