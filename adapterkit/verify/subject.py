"""MERGED beside the view that `merge` would write: which handles are compared with which, from headers alone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.fold import FLOATS, Folded
from adapterkit.adapters.merged import Merged, in_dtype
from adapterkit.checkpoint.decoded import dequantized
from adapterkit.checkpoint.tensor import Cast, Tensor
from adapterkit.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from adapterkit.adapters.adapter import Adapter
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.dtypes import DType


@dataclass(frozen=True)
class Item:
    """One weight of MERGED.

    Attributes:
        name: of the weight.
        parts: (what merge would write, what is there); several where a format stores a weight in several tensors. The
            first holds the values. Empty where this format is not one that adapterkit writes.
        floats: the weight before it is rounded or encoded.
        values: what is there, as floats.
        merged: the fold, where adapters add to this weight.
        touched: adapters change it.
        format: a word for how values are encoded; None where they are floats.
        bits: per weight, in that format.
    """

    name: str
    parts: tuple[tuple[Tensor, Tensor], ...]
    floats: Tensor
    values: Tensor
    merged: Merged | None
    touched: bool
    format: str | None = None
    bits: float = 16.0

    @property
    def nbytes(self) -> int:
        """Bytes that comparing it reads from MERGED."""
        return sum(found.nbytes for _, found in self.parts) or self.values.reads


@dataclass(frozen=True)
class Subject:
    """What is compared.

    Attributes:
        found: MERGED as it is stored.
        base: the base whose values were folded onto.
        folded: the fold of it, in floats.
        items: every weight that is in both.
        missing, extra: names that are only in the one, and only in the other.
        misshapen: name, expected shape, found shape.
        config: what ``config.json`` should say; None where MERGED has none of that kind.
        values: which values of its own the base has; see `open_base`.
    """

    found: Checkpoint
    base: Checkpoint
    adapters: tuple[Adapter, ...]
    weights: tuple[float, ...]
    folded: Folded
    items: tuple[Item, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    misshapen: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    config: Mapping[str, Any] | None
    values: str = "as stored"
    kind: str | None = None
    notes: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


def subject(found: Checkpoint, base: Checkpoint, adapters: Sequence[Adapter], options: Mapping[str, Any]) -> Subject:
    """Plan the merge that MERGED claims to be, and put the two side by side.

    Args:
        found: MERGED, as it is stored.
        base: the base, as it is stored.
        adapters: in the order of their weights.
        options: those of `adapterkit.options.MergeOptions`.

    Raises:
        NotFound, CheckpointError, AdapterError, TargetError, UsageError, UnsafeError
    """
    if found.format == "gguf":
        return _gguf(found, base, adapters, options)
    if base.format == "gguf":
        raise UsageError(f"{found.ref} is a folder and {base.ref} is a GGUF file", "give the base as a folder")
    return _folder(found, base, adapters, options)


def _folder(found: Checkpoint, base: Checkpoint, adapters: Sequence[Adapter], options: Mapping[str, Any]) -> Subject:
    from adapterkit.merge import plan_merge
    from adapterkit.verify.aligned import aligned

    plain = {name: value for name, value in options.items() if name not in ("quant", "quant_double", "quantization")}
    planned = plan_merge(base, adapters, headers_only=False, fingerprints=False, **{**plain, "to": "folder"})
    floats = planned.folded.checkpoint
    packed = _holds_packed(found)
    values = dequantized(found) if packed else found
    kind, double, skip = _written_in(found) if packed else (None, False, None)
    values = aligned(values, floats)
    how: dict[str, Any] = {
        "found": found,
        "base": planned.base,
        "adapters": planned.adapters,
        "weights": planned.weights,
        "folded": planned.folded,
        "values": planned.base_values,
        "config": _planned_config(planned.side, planned.base),
        "kind": kind,
        "options": planned.options.request(),
    }
    touched = frozenset(planned.folded.touched)
    items, misshapen = [], []
    parts = _encoded_parts(floats, found, kind, double, skip) if kind is not None else {}
    for name, tensor in floats.items():
        if name not in values:
            continue
        there = values[name]
        if there.shape != tensor.shape:
            misshapen.append((name, tensor.shape, there.shape))
        elif name in parts:
            items.append(_item(tensor, parts[name], there, name in touched, kind, _BITS.get(kind or "", 8.0)))
        elif there.how != "copy" and kind is not None:
            items.append(_item(tensor, (), there, name in touched, there.how.split()[0], _bits(there)))
        else:
            expected = retyped(tensor, there.dtype)
            items.append(_item(expected, ((expected, there),), there, name in touched))
    missing, extra = _ties(planned.folded, floats, values)
    return Subject(items=tuple(items), missing=missing, extra=extra, misshapen=tuple(misshapen), **how)


def _item(
    floats: Tensor,
    parts: tuple[tuple[Tensor, Tensor], ...],
    values: Tensor,
    touched: bool,
    kind: str | None = None,
    bits: float = 16.0,
) -> Item:
    merged = floats if isinstance(floats, Merged) else None
    return Item(floats.name, parts, floats, values, merged, touched, kind, bits)


def retyped(tensor: Tensor, dtype: DType) -> Tensor:
    """A handle of floats in another floating dtype, rounded once."""
    if tensor.dtype is dtype or tensor.dtype not in FLOATS or dtype not in FLOATS:
        return tensor
    if isinstance(tensor, Merged):
        return in_dtype(tensor, dtype)
    return Cast(tensor.inner if isinstance(tensor, Cast) else tensor, dtype)


# ------------------------------------------------------------------ folders that are quantized

_BITS = {"nf4": 4.0, "fp4": 4.0, "int8": 8.0, "fp8": 8.0}


def _holds_packed(found: Checkpoint) -> bool:
    """Whether any weight is quantized, whatever the config says."""
    from adapterkit.codecs.table import PACKED_ENDS

    return any(
        not tensor.dtype.is_float or tensor.dtype.bits < 16 for n, tensor in found.items() if n.endswith(PACKED_ENDS)
    )


def _written_in(found: Checkpoint) -> tuple[str | None, bool, Sequence[str] | None]:
    """The format of a quantized folder: one that adapterkit writes, or its own word; with its options."""
    from adapterkit.checkpoint.decoded import is_plain
    from adapterkit.codecs.table import method_of, quantization

    said = None if is_plain(found) else quantization(found.config)
    if said is None:
        return None, False, None
    method = method_of(said)
    skip = said.get("llm_int8_skip_modules") if method == "bitsandbytes" else said.get("modules_to_not_convert")
    if method == "bitsandbytes":
        four = bool(said.get("load_in_4bit") or said.get("_load_in_4bit"))
        kind = str(said.get("bnb_4bit_quant_type") or "fp4") if four else "int8"
        return kind, bool(four and said.get("bnb_4bit_use_double_quant")), skip
    return method, False, skip


def _encoded_parts(
    floats: Checkpoint, found: Checkpoint, kind: str, double: bool, skip: Sequence[str] | None
) -> dict[str, tuple[tuple[Tensor, Tensor], ...]]:
    """For each weight that is encoded, the tensors that hold it: as adapterkit would write them, and as they are."""
    from adapterkit.adapters.quantized import KINDS, quantized
    from adapterkit.checkpoint.encoded import Encoded
    from adapterkit.codecs.table import find_weights

    if kind not in KINDS:
        return {}
    stored = {weight.name: weight for weight in find_weights(found.tensors, found.config, found.ref)}
    view = quantized(floats, kind, double_quant=double, skip=skip if kind != "fp8" else None)
    ours: dict[str, list[Tensor]] = {}
    for tensor in view.values():
        if isinstance(tensor, Encoded):
            ours.setdefault(tensor.weight.name, []).append(tensor)
    parts: dict[str, tuple[tuple[Tensor, Tensor], ...]] = {}
    for name, made in ours.items():
        pairs = [(tensor, found.get(tensor.name)) for tensor in made]
        if name in stored and all(t is not None and t.shape == m.shape and t.dtype is m.dtype for m, t in pairs):
            parts[name] = tuple((one, other) for one, other in pairs if other is not None)
    return parts


def _bits(tensor: Tensor) -> float:
    """Bits per weight of a decoded tensor."""
    return 8 * tensor.reads / max(tensor.numel, 1)


def _planned_config(side: Mapping[str, bytes], base: Checkpoint) -> Mapping[str, Any]:
    import json

    found = side.get("config.json")
    return json.loads(found) if found is not None else base.config


def _ties(folded: Folded, floats: Checkpoint, values: Checkpoint) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names in the one alone and in the other; an output layer that shares the embedding's values may stand in either."""
    from adapterkit.adapters.names import Names
    from adapterkit.adapters.ties import is_tied

    missing = [name for name in floats if name not in values]
    extra = [name for name in values if name not in floats]
    if folded.untied or not is_tied(floats.config) or not (missing or extra):
        return tuple(missing), tuple(extra)
    # The name of an output layer says little of itself: what the class declares decides.
    heads = {head for _, head in Names(floats.shapes, floats.config).declared_ties()}
    heads |= {head for _, head in Names(values.shapes, values.config).declared_ties()} | {"lm_head.weight"}
    return tuple(n for n in missing if n not in heads), tuple(n for n in extra if n not in heads)


# ------------------------------------------------------------------ GGUF


def _gguf(found: Checkpoint, base: Checkpoint, adapters: Sequence[Adapter], options: Mapping[str, Any]) -> Subject:
    from adapterkit.gguf.checkpoint import GGUFCheckpoint
    from adapterkit.gguf.fold import fold_values
    from adapterkit.gguf.tensors import bits_per_weight, decoded, encoded, kind_of
    from adapterkit.gguf.types import TYPES
    from adapterkit.options import MergeOptions

    if not isinstance(base, GGUFCheckpoint):
        raise UsageError(f"{found.ref} is a GGUF file and {base.ref} is not", "give the base as a GGUF file of 16 bits")
    assert isinstance(found, GGUFCheckpoint)
    if found.kind != "model":
        raise CheckpointError(f"{found.ref} is a GGUF {found.kind}, not a model", "give the merged model")
    asked = MergeOptions.of(**options)
    how: dict[str, Any] = {
        "residual_base": asked.residual_base,
        "allow_unknown": asked.allow_unknown,
        "rule": asked.rule,
    }
    folded = fold_values(base, adapters, asked.weights, **how)
    floats = folded.checkpoint
    touched = frozenset(folded.touched)
    items, misshapen = [], []
    for name, tensor in floats.items():
        if name not in found:
            continue
        there = found[name]
        if there.shape != tensor.shape:
            misshapen.append((name, tensor.shape, there.shape))
            continue
        kind = kind_of(there)
        plain = kind.name in ("F32", "F16", "BF16")
        if name not in touched and base[name].dtype is there.dtype:
            # What adapters leave alone is copied, however the base has it.
            items.append(Item(name, ((base[name], there),), tensor, decoded(there), None, False))
        elif plain:
            expected = retyped(tensor, there.dtype)
            items.append(_item(expected, ((expected, there),), there, name in touched))
        else:
            writable = TYPES[kind.name].encoder == "own"
            parts = ((encoded(tensor, kind), there),) if writable else ()
            item = _item(tensor, parts, decoded(there), name in touched, kind.name, bits_per_weight(kind))
            items.append(item)
    missing = tuple(name for name in floats if name not in found)
    extra = tuple(name for name in found if name not in floats)
    weights = asked.weights or (1.0,) * len(adapters)
    view = replace(base, tensors={name: decoded(tensor) for name, tensor in base.items()})
    return Subject(
        found, view, tuple(adapters), weights, folded, tuple(items), missing, extra, tuple(misshapen), None,
        kind="gguf", notes=folded.notes, options=asked.request(),
    )  # fmt: skip
