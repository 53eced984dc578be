"""Tied embeddings, done right: what is one tensor in the base may have become two.

A model whose output layer shares the embedding's values stores them once. An adapter that changes only one of the two, or
both in different ways, makes them different; then both are written and the tie is dropped from the config. PEFT's merge
changes the shared tensor instead (its issues 2018 and 2777), which is wrong for the side that was not trained.
"""

from __future__ import annotations

from dataclasses import field, replace
from typing import TYPE_CHECKING, Any, Literal

from adapterkit.adapters.classes import FLAG, flag_keys, untying
from adapterkit.adapters.names import TEXT_CONFIGS
from adapterkit.adapters.target import Piece
from adapterkit.checkpoint.tensor import Renamed
from adapterkit.errors import UnsupportedAdapter
from adapterkit.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from adapterkit.adapters.adapter import Adapter
    from adapterkit.adapters.method import Edit
    from adapterkit.adapters.names import Names
    from adapterkit.checkpoint.tensor import Tensor

_UNSIGNED: dict[int, Literal["B", "H", "I", "Q"]] = {8: "B", 16: "H", 32: "I", 64: "Q"}


@dataclass(frozen=True)
class Weighted:
    """An edit, the adapter it comes from, and how strongly it counts."""

    edit: Edit
    adapter: Adapter
    weight: float


@dataclass(frozen=True)
class Untied:
    """Edits after ties were settled, and what the output needs besides.

    Attributes:
        edits: with those of a separated tensor moved to it.
        added: tensors that the base did not have.
        untied: what was one tensor is two now.
        flag_off: the config must drop its tie.
        factors: by which an output layer is multiplied, where its class scales what it reads only while it is tied.
        notes: what a user should know.
    """

    edits: tuple[Weighted, ...]
    added: Mapping[str, Tensor]
    untied: bool
    notes: tuple[str, ...]
    flag_off: bool = False
    factors: Mapping[str, float] = field(default_factory=dict)


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the config ties input and output embeddings; transformers' default is that it does."""
    keys = flag_keys(config)[::-1]  # a key of the model type's own has the last word
    parts = [config, *(config[name] for name in TEXT_CONFIGS if hasattr(config.get(name), "get"))]
    return bool(next((part[key] for part in parts for key in keys if key in part), True))


def settle_ties(
    edits: Sequence[Weighted], names: Names, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> Untied:
    """Give every tied pair that an adapter touches one tensor or two, as its edits need.

    The flag that ties an output layer ties whatever else the class declares: where one pair is separated, every other
    parameter that had no tensor of its own gets one, so that the model is the same with the flag off.

    Raises:
        UnsupportedAdapter: the class wants another shape of what would become a tensor of its own.
    """
    if not is_tied(config):
        return Untied(tuple(edits), {}, False, ())
    done: list[Weighted] = list(edits)
    added: dict[str, Tensor] = {}
    notes: list[str] = []
    apart = False
    for shared, head in _pairs(edits, names):
        on_shared = [e for e in done if e.edit.target.parameter == shared]
        on_head = [e for e in done if e.edit.target.parameter == head]
        rest = [e for e in done if e not in on_shared and e not in on_head]
        together, alone_shared, alone_head = _split(on_shared, on_head, shared)
        if not alone_shared and not alone_head:
            done = rest + together
            continue
        apart = True
        (stored,) = {piece.tensor for e in (*on_shared, *on_head) for piece in e.edit.target.pieces}
        name = names.stored_name(head, stored)
        added[name] = Renamed(name, tensors[stored])
        done = rest + together + alone_shared + [_moved(e, head, name) for e in (*together, *alone_head)]
        notes.append(f"{head} shared {shared}'s values and is now a tensor of its own")
    done, again, both = _stored_twice(done, names, tensors)
    apart, notes = apart or both, notes + again
    if not apart:
        return Untied(tuple(done), {}, False, tuple(notes))
    if names.ties_by_pattern:
        notes.append(
            f"config.json keeps {FLAG}, which also ties the blocks that layers share: transformers 5 reads both tensors "
            "as they are, version 4 may tie them again"
        )
        return Untied(tuple(done), added, True, tuple(notes))
    how = untying(names.class_name, config)
    stuck = sorted(how.resized)
    if stuck:
        raise UnsupportedAdapter(
            f"the adapter changes one side of a tie that {names.class_name} cannot do without: '{stuck[0]}' has another "
            "shape there when it is not tied",
            "serve the adapter beside its base, or train it without the embedding and the output layer",
        )
    # A head that is scaled can share nobody's tensor.
    stays = how.stays if how.factor == 1 else frozenset(name for name in how.stays if "embed" in name)
    done += _follow(done, names, tensors, added, stays)
    notes.append(f"config.json says {FLAG}: false")
    heads = [name for name, tensor in added.items() if "embed" not in name and len(tensor.shape) == 2]
    factors = {} if how.factor == 1 else dict.fromkeys(heads, how.factor)
    return Untied(tuple(done), added, True, (*notes, *how.notes), True, factors)


def _follow(
    edits: Sequence[Weighted],
    names: Names,
    tensors: Mapping[str, Tensor],
    added: dict[str, Tensor],
    stays: frozenset[str],
) -> list[Weighted]:
    """Tensors for the other parameters that the flag ties, into ``added``, and the edits that they share."""
    found: list[Weighted] = []
    for source, follower in names.followers():
        target = names.find(source)
        if target is None or follower in stays or len(target.tensors) != 1:
            continue
        (stored,) = target.tensors
        name = names.stored_name(follower, stored)
        if name in added or name in tensors:
            continue
        added[name] = Renamed(name, tensors[stored])
        found += [_moved(e, follower, name) for e in edits if e.edit.target.tensors == (stored,)]
    return found


def _stored_twice(
    edits: list[Weighted], names: Names, tensors: Mapping[str, Tensor]
) -> tuple[list[Weighted], list[str], bool]:
    """What is tied and yet stored twice gets edits for both, or is told apart from now on.

    Returns:
        the edits, notes, and whether a pair is not the same any longer.
    """
    notes: list[str] = []
    apart = False
    for shared, head in dict.fromkeys(names.declared_ties()):
        one, other = names.find(shared), names.find(head)
        if one is None or other is None or "embed" in head or len(one.tensors) != 1 or len(other.tensors) != 1:
            continue
        if one.tensors == other.tensors or not any(
            {*one.tensors, *other.tensors} & {*e.edit.target.tensors} for e in edits
        ):
            continue
        if not same_bytes(tensors[one.tensors[0]], tensors[other.tensors[0]]):
            continue
        on_shared = [e for e in edits if e.edit.target.tensors == one.tensors]
        on_head = [e for e in edits if e.edit.target.tensors == other.tensors]
        rest = [e for e in edits if e not in on_shared and e not in on_head]
        together, alone_shared, alone_head = _split(on_shared, on_head, shared)
        edits = rest + alone_shared + alone_head
        edits += [_moved(e, shared, one.tensors[0]) for e in together]
        edits += [_moved(e, head, other.tensors[0]) for e in together]
        if alone_shared or alone_head:
            apart = True
            notes.append(f"{head} and {shared} are stored with the same values and differ from now on")
    return edits, notes, apart


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
            for head in names.sharers(parameter):
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
        both = twin is not None or _for_both(item, [e for e in alone_head if _rivals(e, item)])
        (together if both else alone_shared).append(item)
    for item in list(alone_head):
        if _kept_tied(item) and not any(_rivals(e, item) for e in on_shared):
            alone_head.remove(item)
            target = replace(item.edit.target, parameter=shared)
            together.append(replace(item, edit=replace(item.edit, target=target)))
    return together, alone_shared, alone_head


def _for_both(item: Weighted, rivals: Sequence[Weighted]) -> bool:
    """Whether training applied an edit of the embedding to the output layer too.

    ``rivals``: what the adapter holds for the output layer. A resized weight always concerns both, for the model was
    tied when it was resized. PEFT ties trained token rows, unless the output layer was given rows or a weight of its
    own; factors of the output layer are added to its rows then.
    """
    if item.edit.override:
        return True
    if item.adapter.whole:
        return not rivals
    if item.edit.change.some_rows:
        return not any(e.edit.change.some_rows or e.edit.change.replaced is not None for e in rivals)
    return not rivals and _kept_tied(item)


def _kept_tied(item: Weighted) -> bool:
    """Whether PEFT applies one side's change to the other when it loads the adapter.

    It does so for ``ensure_weight_tying``, but only knows embeddings by these names (0.21.2): in GPT-2 the flag does nothing.
    """
    leaf = item.edit.target.parameter.split(".")[-2:-1]
    return item.adapter.config.flag("ensure_weight_tying") and leaf in (["embed_tokens"], ["lm_head"])


def _rivals(one: Weighted, other: Weighted) -> bool:
    return one.adapter is other.adapter and not one.edit.override and not other.edit.override


def _same(one: Edit, other: Edit) -> bool:
    """Whether two edits say the same: a tied module that was saved twice, as one tensor or as LoRA factors."""
    a, b = one.change, other.change
    if a.stored is not None and b.stored is not None:
        return same_bytes(a.stored, b.stored)
    if not a.factors or not b.factors or (a.how, a.scale) != (b.how, b.scale):
        return False
    return all(_equal(*left, *right) for left, right in zip(a.factors, b.factors, strict=True))


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether two stored tensors are the same."""
    return _equal(one, False, other, False)


def _equal(one: Tensor, turned: bool, other: Tensor, other_turned: bool) -> bool:
    """Whether two stored matrices are equal; a turned one counts as its transpose. Compares bytes, without torch."""
    shape = other.shape if turned == other_turned else other.shape[::-1]
    x, y = one.extent, other.extent
    if (one.shape, one.dtype) != (shape, other.dtype) or x is None or y is None:
        return False
    if turned == other_turned:
        chunk = 1 << 20
        return all(
            x.source.read(x.offset + at, min(chunk, x.nbytes - at))
            == y.source.read(y.offset + at, min(chunk, y.nbytes - at))
            for at in range(0, x.nbytes, chunk)
        )
    if len(shape) != 2 or one.dtype.bits not in _UNSIGNED:
        return False
    rows, columns = shape
    width = columns * one.dtype.bits // 8
    straight = x.source.read(x.offset, x.nbytes)
    code: Any = _UNSIGNED[one.dtype.bits]
    across = memoryview(y.source.read(y.offset, y.nbytes)).cast(code)
    return all(straight[row * width : (row + 1) * width] == across[row::rows].tobytes() for row in range(rows))


def _moved(item: Weighted, parameter: str, tensor: str) -> Weighted:
    target = item.edit.target
    pieces = tuple(_at(piece, tensor) for piece in target.pieces)
    return replace(item, edit=replace(item.edit, target=replace(target, parameter=parameter, pieces=pieces)))


def _at(piece: Piece, tensor: str) -> Piece:
    return replace(piece, tensor=tensor)
