"""Embeddings that do more than a lookup: which changes of their weight are what PEFT adds live.

PEFT adds an adapter's rows to what the embedding's module gives, so W + BA is the same only where the module is linear in W
and looks up what it is given. What each class of transformers does is in ``classes.json``; how it was found out is in
``tools/embedding_kinds.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapterkit.adapters.classes import table
from adapterkit.errors import UnsupportedAdapter

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from adapterkit.adapters.adapter import Adapter
    from adapterkit.adapters.method import Edit
    from adapterkit.adapters.names import Names
    from adapterkit.checkpoint.tensor import Tensor

PLAIN = "plain"
_WHY = {
    "normed": "normalises each row after the lookup, and PEFT adds the adapter behind that",
    "row": "puts a vector of its own in the place of one token's row, and PEFT adds the adapter behind that",
    "positions": "looks up positions, and PEFT looks up in the adapter what the module is given instead",
    "scaled": "multiplies what it looks up, and PEFT does not multiply what the adapter adds",
}
# Methods whose change of a kind of embedding a weight holds. A rotation acts on what the module gives.
_HELD = {"positions": frozenset({"OFT"})}
# Methods for which PEFT 0.21 does not ask for `embed_scale`.
_UNSCALED = frozenset({"HIRA", "TINYLORA"})
_TOKEN = "eoi_token_index"
_TOKEN_DEFAULT = 256_000  # of T5Gemma2's class, where its config does not say


def check_embeddings(adapter: Adapter, edits: Iterable[Edit], names: Names, config: Mapping[str, Any]) -> None:
    """Refuse what no weight of an embedding can hold.

    Raises:
        UnsupportedAdapter: the base's class does more with the embedding than a lookup, and PEFT's live model is another
            function than any weight gives.
    """
    rows = _places(config)
    if not rows:
        return
    for edit in edits:
        if edit.override or edit.change.replaced is not None:
            continue
        for parameter in _changed(edit, adapter, names):
            name = _class_of(parameter, rows)
            kind = table()["embedding_classes"].get(name, PLAIN)
            if _is_held(kind, edit, adapter, config):
                continue
            module = parameter.rpartition(".")[0]
            raise UnsupportedAdapter(
                f"{adapter.ref} cannot be merged: '{module}' is a {name}, which {_WHY[kind]}: no weight of it computes "
                "what was trained",
                "serve the adapter beside its base, or train the embedding whole (modules_to_save)",
            )


def holds_factors(parameter: str, config: Mapping[str, Any]) -> bool:
    """Whether factors of a weight give the same live as folded into it, in every row, with the model of a parsed config."""
    return table()["embedding_classes"].get(_class_of(parameter, _places(config)), PLAIN) in (PLAIN, "scaled")


def _places(config: Mapping[str, Any]) -> dict[str, str]:
    """The last two names of the path of an embedding that is no plain lookup -> its class."""
    kinds = {str(kind) for kind in _values(config, "model_type")}
    return {place: name for kind in kinds for place, name in table()["embeddings"].get(kind, {}).items()}


def _changed(edit: Edit, adapter: Adapter, names: Names) -> Iterator[str]:
    """The parameters that an edit changes in the live model: an output layer's goes to the embedding too where PEFT ties."""
    parameter = edit.target.parameter
    yield parameter
    if adapter.config.flag("ensure_weight_tying"):
        shared = names.tied(parameter)
        if shared is not None:
            yield shared


def _class_of(parameter: str, rows: Mapping[str, str]) -> str:
    module, _, leaf = parameter.rpartition(".")
    return rows.get(".".join(module.split(".")[-2:]), "") if leaf == "weight" else ""


def _is_held(kind: str, edit: Edit, adapter: Adapter, config: Mapping[str, Any]) -> bool:
    method = adapter.config.peft_type
    if kind == "row":
        row = int(next(_values(config, _TOKEN), _TOKEN_DEFAULT))
        return _is_untrained(edit, row) if row < edit.target.matrix[0] else method not in _UNSCALED
    if kind == "scaled":
        return method not in _UNSCALED
    return kind == PLAIN or method in _HELD.get(kind, ())


def _is_untrained(edit: Edit, row: int) -> bool:
    """Whether a plain low-rank change adds nothing to a row: PEFT starts an embedding's A with zeros."""
    if not edit.change.factors:
        return False
    left, turned = edit.change.factors[0]
    return _is_zero(left, row, column=turned)


def _is_zero(tensor: Tensor, index: int, *, column: bool) -> bool:
    """Whether a stored row or column holds zeros alone, by its bytes. False where it cannot be read so."""
    extent, width = tensor.extent, tensor.dtype.bits // 8
    if extent is None or len(tensor.shape) != 2 or not width:
        return False
    rows, columns = tensor.shape
    at = [(row * columns + index, 1) for row in range(rows)] if column else [(index * columns, columns)]
    for start, count in at:
        found = extent.source.read(extent.offset + start * width, count * width)
        # A negative zero has the highest bit of its last byte set.
        if any(byte & (0x7F if place % width == width - 1 else 0xFF) for place, byte in enumerate(bytes(found))):
            return False
    return True


def _values(config: Mapping[str, Any], key: str) -> Iterator[Any]:
    """What a parsed config and the configs inside it say under a key."""
    if config.get(key) is not None:
        yield config[key]
    for part in config.values():
        if hasattr(part, "get"):
            yield from _values(part, key)
