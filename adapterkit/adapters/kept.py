"""`kept`: a fold of a quantized base in the format that the base is stored in.

What no adapter touches keeps its bytes, scales and all. A touched weight is encoded again from decode(W) + delta by the
rule of its own format, and within it every tile that did not change keeps its codes and its scale. The config stays.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adapterkit.adapters.merged import Merged
from adapterkit.checkpoint.decoded import Decoded
from adapterkit.checkpoint.encoded import Encoded, Encoding
from adapterkit.checkpoint.tensor import Transposed
from adapterkit.codecs.conv1d import is_conv1d
from adapterkit.errors import TargetError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from adapterkit.adapters.fold import Folded
    from adapterkit.checkpoint.checkpoint import Checkpoint, StoredForm
    from adapterkit.checkpoint.encoded import Both
    from adapterkit.checkpoint.plan import Plan
    from adapterkit.checkpoint.tensor import Tensor
    from adapterkit.codecs.codec import Weight


@dataclass(frozen=True)
class Kept:
    """A fold in the base's own format.

    Attributes:
        view: what is written.
        encodings: the weights that are encoded again, by the names that they have when decoded.
    """

    view: Checkpoint
    encodings: dict[str, Encoding]


def stored_form(view: Checkpoint) -> StoredForm:
    """What a view was decoded from.

    Raises:
        UsageError: the base is not quantized.
    """
    if view.stored is None:
        raise UsageError(f"{view.ref} is not quantized, so there is no format of its own to keep", "leave out keep")
    return view.stored


def kept(folded: Folded) -> Kept:
    """The view of a fold in which everything is stored as in the base.

    Raises:
        UsageError: the base is not quantized, or the format of a touched weight cannot be written.
        TargetError: a quantized weight changed its shape.
    """
    form = stored_form(folded.checkpoint)
    stored, new = form.checkpoint, folded.checkpoint.tensors
    touched = set(folded.touched)
    parts = {part.name: weight for weight in form.weights.values() for part in weight.parts}
    tensors: dict[str, Tensor] = {}
    encodings: dict[str, Encoding] = {}
    for name, tensor in stored.items():
        weight = parts.get(name)
        if weight is None:
            tensors[name] = new[name] if name in touched and name in new else tensor
        elif weight.name not in touched:
            tensors[name] = tensor
        elif weight.name not in encodings:
            made = _encoded(weight, new[weight.name], stored)
            encodings[weight.name] = made[0].shared
            # Codes come first, whatever their names: what they find on the way is in what follows.
            tensors.update({one.name: one for one in made})
            tensors.update({part.name: stored[part.name] for part in weight.parts if part.name not in tensors})
    known = {weight.name for weight in form.weights.values()}
    tensors.update({name: tensor for name, tensor in new.items() if name not in known and name not in tensors})
    last = list(stored.shards.values())[-1] if stored.shards else "model.safetensors"
    counts = Counter(form.weights[name].how for name in encodings)
    said = ", ".join(f"{count} in {how}" for how, count in counts.items())
    view = replace(
        stored,
        tensors=tensors,
        shards={name: stored.shards.get(name, last) for name in tensors},
        notes=(*folded.checkpoint.notes, f"the base's own format kept; written again: {said or 'nothing'}"),
    )
    return Kept(view, encodings)


def keep_index(stored: Checkpoint, plan: Plan) -> dict[str, bytes]:
    """The base's own index, where the shards of the output are those of the base."""
    if stored.index is None or plan.weight_map != dict(stored.shards):
        return {}
    return {stored.index.name: stored.index.bytes()}


def _encoded(weight: Weight, tensor: Tensor, stored: Checkpoint) -> list[Encoded]:
    if weight.encoder is None:
        raise UsageError(
            f"'{weight.name}' is stored in {weight.how}, which adapterkit does not write", "leave out keep: 16 bits"
        )
    linear = Transposed(tensor) if is_conv1d(weight.name, stored.config) else tensor
    if linear.shape != weight.shape:
        raise TargetError(
            f"'{weight.name}' was {list(weight.shape)} and becomes {list(linear.shape)}, which its format cannot follow",
            "leave out keep, or merge without the resized vocabulary",
        )
    encoder = weight.encoder()
    shared = Encoding(linear, encoder, _both(tensor, linear, weight), weight.how)
    return list(_handles(shared))


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
