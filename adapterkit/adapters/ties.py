"""Tied embeddings, done right: what is one tensor in the base may have become two.

A model whose output layer shares the embedding's values stores them once. An adapter that changes only one of the two, or
both in different ways, makes them different; then both are written and the tie is dropped from the config. PEFT's merge
changes the shared tensor instead (its issues 2018 and 2777), which is wrong for the side that was not trained.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.target import Piece
from adapterkit.checkpoint.tensor import Renamed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from adapterkit.adapters.adapter import Adapter
    from adapterkit.adapters.method import Edit
    from adapterkit.adapters.names import Names
    from adapterkit.checkpoint.tensor import Tensor


@dataclass(frozen=True)
class Weighted:
    """An edit, the adapter it comes from, and how strongly it counts."""

    edit: Edit
    adapter: Adapter
    weight: float


@dataclass(frozen=True)
class Untied:
    """Edits after ties were settled, tensors to add, and whether the config must drop its tie."""

    edits: tuple[Weighted, ...]
    added: Mapping[str, Tensor]
    untied: bool
    notes: tuple[str, ...]


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the config ties input and output embeddings; transformers' default is that it does."""
    text = config.get("text_config")
    inner = text.get("tie_word_embeddings") if isinstance(text, dict) else None
    return bool(config.get("tie_word_embeddings", inner if inner is not None else True))


def settle_ties(
    edits: Sequence[Weighted], names: Names, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> Untied:
    """Give every tied pair that an adapter touches one tensor or two, as its edits need."""
    if not is_tied(config):
        return Untied(tuple(edits), {}, False, ())
    done: list[Weighted] = list(edits)
    added: dict[str, Tensor] = {}
    notes: list[str] = []
    for shared, head in _pairs(edits, names):
        on_shared = [e for e in done if e.edit.target.parameter == shared]
        on_head = [e for e in done if e.edit.target.parameter == head]
        rest = [e for e in done if e not in on_shared and e not in on_head]
        together, alone_shared, alone_head = _split(on_shared, on_head, shared)
        if not alone_shared and not alone_head:
            done = rest + together
            continue
        (stored,) = {piece.tensor for e in (*on_shared, *on_head) for piece in e.edit.target.pieces}
        name = names.stored_name(head, stored)
        added[name] = Renamed(name, tensors[stored])
        done = rest + together + alone_shared + [_moved(e, head, name) for e in (*together, *alone_head)]
        notes.append(f"{head} shared {shared}'s values and is now a tensor of its own (tie_word_embeddings: false)")
    return Untied(tuple(done), added, bool(added), tuple(notes))


def _pairs(edits: Sequence[Weighted], names: Names) -> list[tuple[str, str]]:
    """(stored parameter, output layer that shares it) for every tie that an edit touches."""
    pairs: dict[tuple[str, str], None] = {}
    for item in edits:
        parameter = item.edit.target.parameter
        if names.find(parameter) is None:
            shared = names.tied(parameter)
            if shared is not None:
                pairs[shared, parameter] = None
        else:
            # Encoder and decoder embeddings that share one table stay one; only an output layer can be told apart.
            for head in names.sharers(parameter):
                if "embed" not in head:
                    pairs[parameter, head] = None
    return list(pairs)


def _split(
    on_shared: list[Weighted], on_head: list[Weighted], shared: str
) -> tuple[list[Weighted], list[Weighted], list[Weighted]]:
    """Edits that concern both sides, the stored one alone, and the output layer alone."""
    together: list[Weighted] = []
    alone_shared: list[Weighted] = []
    alone_head = list(on_head)
    for item in on_shared:
        twin = next((e for e in alone_head if e.adapter is item.adapter and _same(e.edit, item.edit)), None)
        if twin is not None:
            alone_head.remove(twin)
        if twin is not None or _for_both(item):
            together.append(item)
        else:
            alone_shared.append(item)
    # An adapter trained with its ties kept has the same change on both sides, whichever of them it is stored under.
    for item in list(alone_head):
        if item.adapter.config.flag("ensure_weight_tying"):
            alone_head.remove(item)
            if not any(e.adapter is item.adapter for e in together):
                target = replace(item.edit.target, parameter=shared)
                together.append(replace(item, edit=replace(item.edit, target=target)))
    return together, alone_shared, alone_head


def _for_both(item: Weighted) -> bool:
    """Whether training applied an edit of the embedding to the output layer too."""
    config = item.adapter.config
    if item.edit.override or config.flag("ensure_weight_tying"):
        return True
    if item.edit.change.how.endswith("token rows replaced"):
        field = config.get("token_indices") or config.get("trainable_token_indices")
        return not hasattr(field, "items")
    return False


def _same(one: Edit, other: Edit) -> bool:
    """Whether two edits store the same bytes: a tied module that was saved twice."""
    a, b = one.change.stored, other.change.stored
    if a is None or b is None or (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    x, y = a.extent, b.extent
    if x is None or y is None:
        return False
    chunk = 1 << 20
    return all(
        x.source.read(x.offset + at, min(chunk, x.nbytes - at))
        == y.source.read(y.offset + at, min(chunk, y.nbytes - at))
        for at in range(0, x.nbytes, chunk)
    )


def _moved(item: Weighted, parameter: str, tensor: str) -> Weighted:
    target = item.edit.target
    pieces = tuple(_at(piece, tensor) for piece in target.pieces)
    return replace(item, edit=replace(item.edit, target=replace(target, parameter=parameter, pieces=pieces)))


def _at(piece: Piece, tensor: str) -> Piece:
    return replace(piece, tensor=tensor)
