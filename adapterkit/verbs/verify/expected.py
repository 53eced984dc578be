"""The metadata that a merged GGUF file should have: its base's, or what a conversion of the merge would write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterkit.errors import CheckpointError, UsageError
from adapterkit.gguf.vocab.table import PRE

if TYPE_CHECKING:
    from adapterkit.gguf.arch.model import Model
    from adapterkit.gguf.checkpoint import GGUFCheckpoint
    from adapterkit.gguf.reader import GGUFHeader


@dataclass(frozen=True)
class Expected:
    """The metadata that MERGED should have.

    Attributes:
        header: a header with it and without tensors, or that of a GGUF base.
        notes: what could not be said.
        strict: it is a file's, so that a key more is a difference too.
    """

    header: GGUFHeader
    notes: tuple[str, ...] = ()
    strict: bool = True


def of_base(
    model: Model, found: GGUFCheckpoint, *, config: Mapping[str, Any], files: Mapping[str, bytes], pre: str | None
) -> Expected:
    """What our conversion of the merge would write.

    Args:
        model: the fold in GGUF's terms.
        found: MERGED, whose pre-tokenizer is taken over where the base's own is not recognised.
        config, files: what a merge would put beside the weights.
        pre: the pre-tokenizer, where the merge was told of one.
    """
    from adapterkit.gguf.arch.model import vocabulary
    from adapterkit.gguf.vocab.pretokenizers import NAMES

    own = found.header.get(PRE)
    notes: list[str] = []
    for given in dict.fromkeys((pre, own if own in NAMES else pre)):
        try:
            entries, _ = vocabulary(model, files, config, given)
        except (CheckpointError, UsageError) as error:
            notes.append(f"the tokenizer in MERGED was not compared: {error.message}")
            continue
        if notes:
            notes = [f"the base's pre-tokenizer is not recognised; that of MERGED ({own}) was taken for right"]
        return Expected(_header([*model.entries, *entries]), tuple(notes), strict=False)
    return Expected(_header(list(model.entries)), tuple(notes[:1]), strict=False)


def _header(entries: Sequence[Any]) -> GGUFHeader:
    from adapterkit.gguf.metadata import file_start
    from adapterkit.gguf.reader import parse_gguf

    data = file_start(0, len(entries)) + b"".join(one.data for one in entries)
    return parse_gguf(lambda start, count: data[start : start + count], len(data), "the metadata of the base")
