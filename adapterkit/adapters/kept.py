"""`kept`: a fold of a quantized base in the format that the base is stored in.

What no adapter touches keeps its bytes, scales and all. A touched weight is encoded again from decode(W) + delta by the
rule of its own format, and within it every tile that did not change keeps its codes and its scale. The config stays.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from adapterkit.adapters.merged import Merged, in_dtype
from adapterkit.adapters.wider import RECORD, check_fp8, in_fp8, leaving, left_out, not_in_vllm, patched_record
from adapterkit.checkpoint.decoded import Decoded
from adapterkit.checkpoint.encoded import Encoded, Encoding
from adapterkit.checkpoint.tensor import Retyped, Transposed
from adapterkit.codecs.conv1d import is_conv1d
from adapterkit.codecs.table import method_of, quantization, without_quantization
from adapterkit.errors import TargetError, UsageError, counted, option, size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import torch

    from adapterkit.adapters.adapter import Adapter
    from adapterkit.adapters.fold import Folded
    from adapterkit.checkpoint.checkpoint import Checkpoint, StoredForm
    from adapterkit.checkpoint.encoded import Both
    from adapterkit.checkpoint.plan import Plan
    from adapterkit.checkpoint.tensor import Tensor
    from adapterkit.codecs.codec import Weight
    from adapterkit.codecs.encode import Encoder
    from adapterkit.dtypes import DType

    # A weight's name, the encoder of its format, its shape and the format's name, to what rounds it with feedback.
    FedInto = Callable[[str, Encoder, tuple[int, ...], str], Encoder]


@dataclass(frozen=True)
class KeptFold:
    """A fold in the base's own format.

    Attributes:
        view: what is written.
        encodings: the weights that are encoded again, by the names that they have when decoded.
        wider: the weights that left the base's format for a floating dtype.
    """

    view: Checkpoint
    encodings: dict[str, Encoding]
    wider: tuple[str, ...] = ()


def stored_form(view: Checkpoint) -> StoredForm:
    """What a view was decoded from.

    Raises:
        UsageError: the base is not quantized.
    """
    if view.stored is None:
        raise UsageError(f"{view.ref} is not quantized, so there is no format of its own to keep", "leave out keep")
    return view.stored


def trained_on_the_grid(adapters: Sequence[Adapter], weights: Sequence[float] | None) -> str | None:
    """The library whose rule put base + adapter on the NVFP4 grid in training; None where training did not do so.

    axolotl states it in ``nvfp4_merge_aware``: fresh scales of the blocks, under the base's scale of the whole tensor.

    Raises:
        UsageError: several adapters or a weight, for which training does not speak; or a rule that is not known here.
    """
    stated = [adapter for adapter in adapters if isinstance(adapter.config.get("nvfp4_merge_aware"), dict)]
    if not stated:
        return None
    said = stated[0].config.get("nvfp4_merge_aware")
    encoder = str(said.get("encoder"))
    if (
        said.get("scale_mode") != "fresh"
        or said.get("pts_policy") != "base_fused_max"
        or not encoder.startswith("torchao")
    ):
        raise UsageError(
            f"{stated[0].ref} was trained with its sum on the NVFP4 grid by a rule that is not known here "
            f"({said.get('scale_mode')}, {said.get('pts_policy')}, {encoder})",
            f"merge to 16 bits (no {option('quant')}), or keep the adapter beside the base",
        )
    if len(adapters) > 1 or any(weight != 1 for weight in weights or ()):
        raise UsageError(
            f"{stated[0].ref} was trained with its sum on the NVFP4 grid, alone and with weight 1",
            f"merge it so, or merge to 16 bits (no {option('quant')})",
        )
    return "torchao"


FP8: Literal["fp8"] = "fp8"


def kept(
    folded: Folded,
    touched_as: DType | Literal["fp8"] | None = None,
    rule: str | None = None,
    fed: FedInto | None = None,
) -> KeptFold:
    """The view of a fold in which everything is stored as in the base.

    Args:
        folded: of a view of decoded weights.
        touched_as: write changed weights, and those that servers run as one with them, in this dtype instead; the config
            then names them among the modules that are not quantized. ``fp8`` is FP8 with a scale per row, which the config
            of compressed-tensors can name beside another format.
        rule: of another library than a format's own, for formats that have one; see `trained_on_the_grid`.
        fed: gives the encoder of a weight that is rounded with feedback: its name, the format's encoder, its shape and what
            the format is called.

    Raises:
        UsageError: the base is not quantized, or the format of a touched weight cannot be written.
        TargetError: a quantized weight changed its shape.
    """
    form = stored_form(folded.checkpoint)
    stored, new = form.checkpoint, folded.checkpoint.tensors
    touched = set(folded.touched)
    _check_layers(form, new)
    parts = {part.name: weight for weight in form.weights.values() for part in weight.parts}
    tensors: dict[str, Tensor] = {}
    encodings: dict[str, Encoding] = {}
    wider = leaving(form, touched & set(form.weights)) if touched_as is not None else []
    if touched_as == FP8:
        check_fp8(form, wider)
    floats = None if isinstance(touched_as, str) else touched_as
    out = set(wider)
    for name, tensor in stored.items():
        weight = parts.get(name)
        if weight is None:
            tensors[name] = new[name] if name in touched and name in new else tensor
        elif weight.name in out and touched_as == FP8:
            if weight.name not in encodings:
                made = _in_fp8(weight, new[weight.name], stored)
                encodings[weight.name] = made[0].shared
                tensors.update({one.name: one for one in made})
        elif weight.name in out and floats is not None:
            if weight.name not in tensors:
                tensors[weight.name] = _in(new[weight.name], floats)
        elif weight.name not in touched:
            tensors[name] = tensor
        elif weight.name not in encodings:
            made = _encoded(weight, new[weight.name], stored, rule, fed)
            encodings[weight.name] = made[0].shared
            # Codes come first, whatever their names: what they find on the way is in what follows.
            tensors.update({one.name: one for one in made})
            tensors.update({part.name: stored[part.name] for part in weight.parts if part.name not in tensors})
    places = {name: stored.shards[weight.parts[0].name] for name, weight in form.weights.items() if stored.shards}
    known = {weight.name for weight in form.weights.values()}
    tensors.update({name: tensor for name, tensor in new.items() if name not in known and name not in tensors})
    last = list(stored.shards.values())[-1] if stored.shards else "model.safetensors"
    counts = Counter(form.weights[name].how for name in encodings if name not in out)
    said = ", ".join(f"{count} in {how}" for how, count in counts.items())
    if wider:
        said = f"{said or 'nothing'}; {counted(len(wider), 'weight left it and is', 'weights left it and are')} {touched_as}"
    config = stored.config
    if wider:
        config = in_fp8(config, wider) if touched_as == FP8 else left_out(config, stored, wider, form.weights)
        if touched_as != FP8 and out >= form.weights.keys():
            config = without_quantization(stored.config)  # nothing is quantized any more, which readers would look for
    caveat = not_in_vllm(method_of(quantization(stored.config) or {}), wider)
    side_files = tuple(
        patched_record(file, wider) if wider and file.name == RECORD else file for file in stored.side_files
    )
    view = replace(
        stored,
        tensors=tensors,
        shards={name: stored.shards.get(name, places.get(name, last)) for name in tensors},
        config=config,
        side_files=side_files,
        notes=(
            *folded.checkpoint.notes,
            f"the base's own format kept; written again: {said or 'nothing'}",
            *((caveat,) if caveat else ()),
        ),
    )
    return KeptFold(view, encodings, () if touched_as == FP8 else tuple(wider))


def _check_layers(form: StoredForm, new: Mapping[str, Tensor]) -> None:
    """A model whose layers were repeated or left out has quantized weights that the base does not store.

    Raises:
        UsageError: it is one.
    """
    other = next((name for name in form.weights if name not in new), None)
    if other is None:
        other = next((n for n, tensor in new.items() if n not in form.weights and _is_decoded(tensor)), None)
    if other is not None:
        raise UsageError(
            f"the merged model has other quantized layers than the base ('{other}'), which its own format cannot follow",
            f"leave out {option('quant')} keep",
        )


def _is_decoded(tensor: Tensor) -> bool:
    """Whether a tensor's values come from a quantized weight."""
    while True:
        if isinstance(tensor, Decoded):
            return True
        below = getattr(tensor, "base", None) or getattr(tensor, "inner", None)
        if below is None:
            return False
        tensor = below


def _in(tensor: Tensor, dtype: DType) -> Tensor:
    """The same values in a dtype, rounded once."""
    if isinstance(tensor, Merged):
        return in_dtype(tensor, dtype)
    return Retyped(tensor, dtype)


def sizes(form: StoredForm, view: Checkpoint) -> str:
    """In a sentence: what the base's tensors weigh, by kind, and what those of an output do."""
    before: Counter[str] = Counter()
    of = {part.name: weight.how for weight in form.weights.values() for part in weight.parts}
    for name, tensor in form.checkpoint.items():
        before[of.get(name, str(tensor.dtype))] += tensor.nbytes
    after: Counter[str] = Counter()
    for tensor in view.values():
        after[str(tensor.dtype)] += tensor.nbytes
    return f"the base's {_sum(before)} become {_sum(after)}"


def _sum(counts: Counter[str]) -> str:
    parts = ", ".join(f"{size(nbytes)} {kind}" for kind, nbytes in counts.most_common(4))
    return f"{size(sum(counts.values()))} ({parts})"


def keep_index(stored: Checkpoint, plan: Plan) -> dict[str, bytes]:
    """The base's own index, where the shards of the output are those of the base."""
    if stored.index is None or plan.weight_map != dict(stored.shards):
        return {}
    return {stored.index.name: stored.index.bytes()}


def _encoded(
    weight: Weight, tensor: Tensor, stored: Checkpoint, rule: str | None, fed: FedInto | None
) -> list[Encoded]:
    if weight.encoder is None:
        raise UsageError(
            f"'{weight.name}' is stored in {weight.how}, which adapterkit does not write", "leave out keep: 16 bits"
        )
    turned = is_conv1d(weight.name, stored.config) and not weight.upright
    linear = Transposed(tensor) if turned else tensor
    if linear.shape != weight.shape:
        raise TargetError(
            f"'{weight.name}' was {list(weight.shape)} and becomes {list(linear.shape)}, which its format cannot follow",
            "leave out keep, or merge without the resized vocabulary",
        )
    encoder = weight.others.get(rule or "", weight.encoder)()
    if fed is not None:
        encoder = fed(weight.name, encoder, weight.shape, weight.how)
    shared = Encoding(linear, encoder, _both(tensor, linear, weight), weight.how)
    return list(_handles(shared))


def _in_fp8(weight: Weight, tensor: Tensor, stored: Checkpoint) -> list[Encoded]:
    """A weight in FP8 with a scale per row, as compressed-tensors stores it."""
    from adapterkit.codecs.compressed import new_rows

    turned = is_conv1d(weight.name, stored.config) and not weight.upright
    linear = Transposed(tensor) if turned else tensor
    encoder = new_rows(weight.name, linear.shape, tensor.dtype)
    return list(_handles(Encoding(linear, encoder, _both(tensor, linear, weight), "fp8 per row")))


def _handles(shared: Encoding) -> Iterator[Encoded]:
    encoder = shared.encoder
    for made in encoder.made:
        yield Encoded(made, shared, streams=encoder.streams and made is encoder.made[0])


def _both(tensor: Tensor, linear: Tensor, weight: Weight) -> Both | None:
    """What reads new values and those that are stored now; None where the base's own values are not below the new ones."""
    if not isinstance(tensor, Merged):
        return None
    base = tensor.base
    below = base.inner if isinstance(base, Transposed) else base
    if not isinstance(below, Decoded) or below.weight.parts != weight.parts:
        return None
    if linear is tensor:
        return tensor.both

    def turned(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        return linear.read_wide(start, stop), below.read_wide(start, stop).float()

    return turned
