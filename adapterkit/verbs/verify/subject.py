"""MERGED beside the view that `merge` would write: which handles are compared with which, from headers alone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.fold import Folded
from adapterkit.adapters.merged import Merged, in_dtype
from adapterkit.adapters.mlx_view import mlx_named
from adapterkit.checkpoint.decoded import dequantized
from adapterkit.checkpoint.tensor import Cast, Tensor
from adapterkit.dtypes import FLOATS
from adapterkit.errors import CheckpointError, UsageError
from adapterkit.foreign import json_value

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from adapterkit.adapters.adapter import Adapter
    from adapterkit.checkpoint.checkpoint import Checkpoint, StoredForm
    from adapterkit.checkpoint.encoded import Encoding
    from adapterkit.dtypes import DType
    from adapterkit.gguf.checkpoint import GGUFCheckpoint
    from adapterkit.requests.merge import MergeRequest
    from adapterkit.verbs.verify.expected import Expected


FLOAT8_BITS = 5.0


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
        base: the weight without them, where it is touched and is no fold of its own (rows of a fold in another order).
        own: it is stored as the base stores it; what is not touched then has to be the base's bytes.
        encoding: what encodes it again, where it is touched and ``own``.
        touched: adapters change it.
        format: a word for how values are encoded; None where they are floats.
        bits: per weight, in that format.
        fed: it is rounded with feedback: single values lie farther from what was wanted, so that sums of them do not.
    """

    name: str
    parts: tuple[tuple[Tensor, Tensor], ...]
    floats: Tensor
    values: Tensor
    merged: Merged | None
    touched: bool
    format: str | None = None
    bits: float = 16.0
    base: Tensor | None = None
    own: bool = False
    encoding: Encoding | None = None
    fed: bool = False

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
        trained: the fold under the names of a Hugging Face base; None where the base is a GGUF file.
        became: where MERGED has other names, what each tensor of ``trained`` became.
        metadata: what the metadata of a GGUF file should be; None where MERGED is a folder.
        layouts: weights that are quantized otherwise than in the base: name, how the base has it, how MERGED has it.
        scales_lost: weights whose codes are there and whose scales are not.
        side: the small files that merge would write beside the weights of a folder.
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
    trained: Checkpoint | None = None
    became: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    metadata: Expected | None = None
    layouts: tuple[tuple[str, str, str], ...] = ()
    scales_lost: tuple[str, ...] = ()
    side: Mapping[str, bytes] = field(default_factory=dict)


def subject(
    found: Checkpoint, base: Checkpoint, adapters: Sequence[Adapter], options: Mapping[str, Any], *, fed: bool = False
) -> Subject:
    """Plan the merge that MERGED claims to be, and put the two side by side.

    Args:
        found: MERGED, as it is stored.
        base: the base, as it is stored.
        adapters: in the order of their weights.
        options: those of `adapterkit.requests.merge.MergeRequest`.
        fed: the record says that MERGED was rounded with feedback.

    Raises:
        NotFound, CheckpointError, AdapterError, TargetError, UsageError, UnsafeError
    """
    if found.format == "gguf":
        return _gguf(found, base, adapters, options)
    if base.format == "gguf":
        raise UsageError(f"{found.ref} is a folder and {base.ref} is a GGUF file", "give the base as a folder")
    made = _folder(found, base, adapters, options)
    if not fed:
        return made
    items = tuple(replace(one, fed=one.format is not None and (one.touched or not one.own)) for one in made.items)
    return replace(made, items=items)


def _folder(found: Checkpoint, base: Checkpoint, adapters: Sequence[Adapter], options: Mapping[str, Any]) -> Subject:
    from adapterkit.requests.merge import MergeRequest
    from adapterkit.verbs.merge import planned as planned_merge
    from adapterkit.verbs.verify.aligned import aligned

    layout = ("quant", "quant_double", "keep_touched", "quantization")
    plain = {name: value for name, value in options.items() if name not in layout}
    request = MergeRequest.bound({**plain, "base": base, "adapters": adapters, "to": "folder"})
    planned = planned_merge(request, headers_only=False, fingerprints=False)
    floats = planned.folded.checkpoint
    packed = _holds_packed(found)
    form = planned.base.stored if packed and not _other_numbers(found, planned.base) else None
    lost = () if form is None else _without_scales(form, found)
    found = found if form is None else _without(found, form, lost)
    values = dequantized(found) if packed else found
    kind, double, skip = _written_in(found, values) if packed else (None, False, None)
    touched = frozenset(planned.folded.touched)
    stacked: Mapping[str, Tensor] = {}
    became: dict[str, tuple[str, ...]] = {}
    if kind is not None and form is None and _is_mlx(kind):
        # Under MLX's names and in its stacks of experts, as the values are.
        named, came = mlx_named(floats)
        stacked = mlx_named(planned.base)[0]
        became = {one: (name,) for name, several in came.items() for one in several if one != name}
        touched = frozenset(name for name, several in came.items() if touched.intersection(several))
        floats = replace(floats, tensors=named)
    values = aligned(values, floats)
    how: dict[str, Any] = {
        "found": found,
        "base": planned.base,
        "adapters": planned.adapters,
        "weights": planned.weights,
        "folded": planned.folded,
        "values": planned.base_values,
        "config": _planned_config(planned.side, planned.base),
        "side": planned.side,
        "kind": kind,
        "trained": planned.folded.checkpoint,
        "became": became,
        "options": planned.request.stated(),
    }
    items, misshapen = [], []
    own = {} if form is None else _own_parts(planned.folded, form, found, values)
    parts = _encoded_parts(floats, found, kind, double, skip) if kind is not None and form is None else {}
    for name, tensor in floats.items():
        if name not in values:
            continue
        there = values[name]
        if there.shape != tensor.shape:
            misshapen.append((name, tensor.shape, there.shape))
        elif name in own and form is not None:
            items.append(_own_item(tensor, own[name], there, name in touched, form.weights[name].how))
        elif name in parts:
            items.append(_item(tensor, parts[name], there, name in touched, kind, _bits_of(kind)))
        elif there.how != "copy" and kind is not None:
            items.append(_item(tensor, (), there, name in touched, there.how.split()[0], _bits(there)))
        else:
            expected = retyped(tensor, there.dtype)
            items.append(_item(expected, ((expected, there),), there, name in touched))
    # What is no fold of its own is measured beside the base under the same name.
    items = [
        replace(one, base=stacked[one.name]) if one.touched and one.merged is None and one.name in stacked else one
        for one in items
    ]
    missing, extra = _ties(planned.folded, floats, values)
    missing = tuple(name for name in missing if name not in lost)
    layouts = () if form is None else _layouts(form, values)
    how |= {"layouts": layouts, "scales_lost": lost}
    return Subject(items=tuple(items), missing=missing, extra=extra, misshapen=tuple(misshapen), **how)


def _without_scales(form: StoredForm, found: Checkpoint) -> tuple[str, ...]:
    """Weights whose codes are in MERGED as the base has them, while what their format needs beside them is not."""
    return tuple(
        weight.name
        for weight in form.weights.values()
        if (codes := found.get(weight.parts[0].name)) is not None
        and codes.dtype is weight.parts[0].dtype
        and not (codes.dtype.is_float and codes.dtype.bits >= 16)
        and len(weight.parts) > 1  # plain float8 has none
        and weight.parts[1].name not in found
    )


def _without(found: Checkpoint, form: StoredForm, names: Sequence[str]) -> Checkpoint:
    """MERGED without what is left of some weights."""
    if not names:
        return found
    gone = {part.name for name in names for part in form.weights[name].parts}
    return replace(found, tensors={name: tensor for name, tensor in found.items() if name not in gone})


def _own_parts(
    folded: Folded, form: StoredForm, found: Checkpoint, values: Checkpoint
) -> dict[str, tuple[tuple[tuple[Tensor, Tensor], ...], Encoding | None]]:
    """For each weight that MERGED stores as the base does: what should be there and what is, and what encodes it again."""
    from adapterkit.adapters.kept import kept

    view: Checkpoint | None = None
    made: dict[str, Encoding] = {}
    touched = set(folded.touched)
    result: dict[str, tuple[tuple[tuple[Tensor, Tensor], ...], Encoding | None]] = {}
    stored = {} if values.stored is None else values.stored.weights
    for name, weight in form.weights.items():
        if len(weight.parts) == 1 and name in stored and len(stored[name].parts) > 1:
            continue  # plain float8 in the base, and in MERGED codes under a scale
        there = [found.get(part.name) for part in weight.parts]
        if any(
            other is None or other.dtype is not part.dtype or other.shape != part.shape
            for part, other in zip(weight.parts, there, strict=True)
        ):
            continue
        expected: Mapping[str, Tensor] = form.checkpoint
        if name in touched:
            if weight.encoder is None:
                continue
            if view is None:
                again = kept(replace(folded, touched=tuple(n for n in folded.touched if _written(form, n))))
                view, made = again.view, again.encodings
            expected = view
            if not made[name].again:
                continue
        pairs = tuple((expected[part.name], found[part.name]) for part in weight.parts)
        if all(one.shape == other.shape for one, other in pairs):
            result[name] = pairs, made.get(name)
    return result


def _written(form: StoredForm, name: str) -> bool:
    return name not in form.weights or form.weights[name].encoder is not None


def _own_item(
    floats: Tensor,
    own: tuple[tuple[tuple[Tensor, Tensor], ...], Encoding | None],
    values: Tensor,
    touched: bool,
    how: str,
) -> Item:
    merged = floats if isinstance(floats, Merged) else None
    made = {"own": True, "encoding": own[1]}
    return Item(floats.name, own[0], floats, values, merged, touched, how, _bits(values), **made)  # type: ignore[arg-type]


def _layouts(form: StoredForm, values: Checkpoint) -> tuple[tuple[str, str, str], ...]:
    """Weights that are quantized in both, and otherwise."""
    if values.stored is None:
        return ()
    there = values.stored.weights
    both = ((name, weight.how, there[name].how) for name, weight in form.weights.items() if name in there)
    return tuple(one for one in both if one[1] != one[2])


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


def _holds_packed(found: Checkpoint) -> bool:
    """Whether any weight is quantized, whatever the config says."""
    from adapterkit.codecs.table import PACKED_ENDS

    return any(
        not tensor.dtype.is_float or tensor.dtype.bits < 16 for n, tensor in found.items() if n.endswith(PACKED_ENDS)
    )


def _written_in(found: Checkpoint, values: Checkpoint) -> tuple[str | None, bool, Sequence[str] | None]:
    """The format of a quantized folder: one that adapterkit writes, or its own word; with its options."""
    from adapterkit.checkpoint.decoded import is_plain
    from adapterkit.codecs.table import CODECS, method_of, quantization

    said = None if is_plain(found) else quantization(found.config)
    if said is None:
        return None, False, None
    method = method_of(said)
    skip = said.get("llm_int8_skip_modules") if method == "bitsandbytes" else said.get("modules_to_not_convert")
    if method == "bitsandbytes":
        four = bool(said.get("load_in_4bit") or said.get("_load_in_4bit"))
        kind = str(said.get("bnb_4bit_quant_type") or "fp4") if four else "int8"
        return kind, bool(four and said.get("bnb_4bit_use_double_quant")), skip
    how = {weight.how for weight in (values.stored.weights.values() if values.stored is not None else ())}
    for codec in CODECS:
        for one in codec.kinds if method in codec.methods else ():
            if how & set(one.already) and (one.said is None or one.said(said)):
                return one.name, False, None
    return method, False, skip


def _other_numbers(found: Checkpoint, base: Checkpoint) -> bool:
    """Whether both are MLX's and MERGED in other numbers than the base: then all of it was quantized anew."""
    from adapterkit.codecs.table import KINDS, has_layout

    if base.stored is None:
        return False
    both = (found.config, base.stored.checkpoint.config)
    named = [{kind.name for kind in KINDS.values() if kind.program and has_layout(one, kind)} for one in both]
    return all(named) and named[0] != named[1]


def _is_mlx(kind: str) -> bool:
    from adapterkit.codecs.table import KINDS

    return kind in KINDS and KINDS[kind].program == "mlx"


def _encoded_parts(
    floats: Checkpoint, found: Checkpoint, kind: str, double: bool, skip: Sequence[str] | None
) -> dict[str, tuple[tuple[Tensor, Tensor], ...]]:
    """For each weight that is encoded, the tensors that hold it: as adapterkit would write them, and as they are."""
    from adapterkit.adapters.quantized import quantized
    from adapterkit.checkpoint.encoded import Encoded
    from adapterkit.codecs.table import KINDS, find_weights

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


def _bits_of(kind: str | None) -> float:
    from adapterkit.codecs.table import KINDS

    return KINDS[kind].bits if kind in KINDS else 8.0


def _bits(tensor: Tensor) -> float:
    """Bits per weight of a decoded tensor."""
    found = 8 * tensor.reads / max(tensor.numel, 1)
    # Eight bits that are a float round a weight as five bits of an integer do.
    return min(found, FLOAT8_BITS) if " fp8" in f" {tensor.how}" or " mxfp8" in f" {tensor.how}" else found


def _planned_config(side: Mapping[str, bytes], base: Checkpoint) -> Mapping[str, Any]:

    found = side.get("config.json")
    return json_value(found) if found is not None else base.config


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
    from adapterkit.requests.merge import MergeRequest

    if not isinstance(found, GGUFCheckpoint) or found.kind != "model":
        raise CheckpointError(f"{found.ref} is a GGUF file, and no model", "give the merged model")
    asked = MergeRequest.bound({**options, "base": base, "adapters": adapters})
    adapters = [asked.told(adapter) for adapter in adapters]
    if isinstance(base, GGUFCheckpoint):
        return _gguf_of_gguf(found, base, adapters, asked)
    return _gguf_of_folder(found, base, adapters, asked)


def _how(asked: MergeRequest) -> dict[str, Any]:
    return {"residual_base": asked.residual_base, "allow_unknown": asked.allow_unknown, "rule": asked.rule}


def _gguf_of_gguf(
    found: GGUFCheckpoint, base: GGUFCheckpoint, adapters: Sequence[Adapter], asked: MergeRequest
) -> Subject:
    from adapterkit.gguf.fold import fold_values
    from adapterkit.gguf.tensors import decoded
    from adapterkit.verbs.verify.expected import Expected

    folded = fold_values(base, adapters, asked.adapter_weights, **_how(asked))
    touched = frozenset(folded.touched)
    pairs = _Pairs(found)
    for name, tensor in folded.checkpoint.items():
        # What adapters leave alone is copied, however the base has it.
        copied = base[name] if name not in touched and name in base else None
        pairs.add(tensor, touched=name in touched, copied=copied)
    view = replace(base, tensors={name: decoded(tensor) for name, tensor in base.items()})
    return replace(pairs.subject(view, adapters, asked, folded), metadata=Expected(base.header))


def _gguf_of_folder(
    found: GGUFCheckpoint, base: Checkpoint, adapters: Sequence[Adapter], asked: MergeRequest
) -> Subject:
    """A GGUF file of a merge into a Hugging Face folder: rows of the fold, in the order of GGUF."""
    from adapterkit.adapters.fold import fold
    from adapterkit.adapters.sidecars import patched_config, side_files
    from adapterkit.bases import open_base
    from adapterkit.gguf.arch.dense_modules import with_dense
    from adapterkit.gguf.arch.model import as_gguf
    from adapterkit.verbs.verify.expected import of_base

    opened, values = open_base(base, base16=asked.base16, trained=asked.trained)
    if asked.dense_modules:
        opened = with_dense(opened)
    folded = fold(opened, adapters, asked.adapter_weights, **_how(asked))
    files, _ = side_files(opened, folded, adapters, None)
    said: dict[str, Any] = {"config": patched_config(opened, folded, adapters, None), "files": files}
    how: dict[str, Any] = {"approximate": tuple(asked.allow_approximate), "as_reranker": asked.as_reranker}
    new = as_gguf(folded.checkpoint, base=opened, adapters=adapters, touched=folded.touched, **said, **how)
    old = as_gguf(opened, base=opened, config=opened.config, files=files, **how)
    changed = {one for name in folded.touched for one in new.mapped.sources[name]}
    pairs = _Pairs(found)
    for name, tensor in new.tensors.items():
        pairs.add(tensor, touched=name in changed, base=old.tensors.get(name))
    added = tuple(name for name in new.tensors if name not in old.tensors)
    view = replace(folded.checkpoint, tensors=new.tensors)
    order = tuple(name for name in new.tensors if name in changed)
    became = {name: tuple(tensors) for name, tensors in new.mapped.sources.items()}
    trained = folded.checkpoint
    folded = replace(folded, checkpoint=view, touched=order, added=added)
    made = pairs.subject(opened, adapters, asked, folded, values)
    expected = of_base(new, found, pre=asked.pre, **said)
    return replace(made, trained=trained, became=became, metadata=expected)


def _filled(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape in four dimensions, as ggml has every one: leading ones are not told apart."""
    return (*(1,) * (4 - len(shape)), *shape)


class _Pairs:
    """Collects the weights of a GGUF file beside those that are expected."""

    def __init__(self, found: GGUFCheckpoint) -> None:
        self._found = found
        self._items: list[Item] = []
        self._misshapen: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []

    def add(self, floats: Tensor, *, touched: bool, copied: Tensor | None = None, base: Tensor | None = None) -> None:
        """A weight before it gets its type; ``copied`` is a tensor that is written as it is."""
        from adapterkit.gguf.tensors import bits_per_weight, decoded, encoded, kind_of

        there = self._found.get(floats.name)
        if there is None:
            return
        if _filled(there.shape) != _filled(floats.shape):
            self._misshapen.append((floats.name, floats.shape, there.shape))
            return
        merged = floats if isinstance(floats, Merged) else None
        kind = kind_of(there)
        if copied is not None and copied.dtype is there.dtype:
            item = Item(floats.name, ((copied, there),), floats, decoded(there), None, False)
        elif kind.is_quantized:
            parts = ((encoded(floats, kind), there),) if kind.encoder == "own" else ()
            bits = bits_per_weight(kind)
            item = Item(floats.name, parts, floats, decoded(there), merged, touched, kind.name, bits)
        else:
            expected = retyped(floats, there.dtype)
            merged = expected if isinstance(expected, Merged) else None
            item = Item(floats.name, ((expected, there),), expected, there, merged, touched)
        self._items.append(replace(item, base=base if touched and merged is None else None))

    def subject(
        self,
        base: Checkpoint,
        adapters: Sequence[Adapter],
        asked: MergeRequest,
        folded: Folded,
        values: str = "as stored",
    ) -> Subject:
        found, view = self._found, folded.checkpoint
        missing = tuple(name for name in view if name not in found)
        extra = tuple(name for name in found if name not in view)
        weights = asked.adapter_weights or (1.0,) * len(adapters)
        items, misshapen = tuple(self._items), tuple(self._misshapen)
        return Subject(
            found, base, tuple(adapters), weights, folded, items, missing, extra, misshapen, None, values,
            kind="gguf", notes=folded.notes, options=asked.stated(),
        )  # fmt: skip
