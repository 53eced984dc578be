"""`as_trained`: a 16-bit base as QLoRA training saw it, decode(encode(W)) where bitsandbytes quantized.

An adapter that was trained on a quantized base corrects that base's errors too. Folding it onto the values it was trained
on needs no quantized checkpoint: the grid is a function of the 16-bit weights.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from adapterkit.adapters.change import Change, Kernel
from adapterkit.adapters.linear import quantized_modules
from adapterkit.adapters.merged import Applied, Loaded, Merged, StoredWeights, merged_columns
from adapterkit.adapters.names import Names
from adapterkit.codecs.conv1d import is_conv1d
from adapterkit.codecs.grid import Grid, RoundTrip
from adapterkit.codecs.table import quantization
from adapterkit.dtypes import BF16, F16, F32
from adapterkit.errors import TargetError, UsageError, counted, option

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from adapterkit.adapters.change import Weights
    from adapterkit.adapters.target import Target
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.checkpoint.tensor import Tensor
    from adapterkit.dtypes import DType


def as_trained(checkpoint: Checkpoint, grid: Grid, *, skip: Iterable[str] | None = None) -> Checkpoint:
    """A view in which the weights that bitsandbytes would quantize are what they are decoded to.

    The same values as in a checkpoint that transformers and bitsandbytes save of this base, bit for bit; with double
    quantization on a CPU, but for the few scales that its kernel rounds to the other neighbour.

    Args:
        checkpoint: a base of 16 or 32 bits.
        grid: how training quantized it.
        skip: ``llm_int8_skip_modules`` of training, when it was given.

    Raises:
        UsageError: the base is quantized itself, or nothing in it would be.
    """
    if quantization(checkpoint.config) is not None:
        raise UsageError(
            f"{checkpoint.ref} is quantized itself", f"leave out {option('as_trained')}: its decoded weights are used"
        )
    targets = quantized_targets(checkpoint, skip)
    by_tensor: dict[str, list[tuple[Target, Loaded]]] = {}
    for target in targets:
        first = checkpoint[target.pieces[0].tensor]
        weights = StoredWeights(target, checkpoint.tensors)
        dtype = grid.dtype or first.dtype
        # A Conv1D is quantized in the orientation of a linear layer, so its whole matrix is needed.
        conv1d = is_conv1d(target.parameter, checkpoint.config)
        memory = 8 * first.numel if conv1d else first.numel // 8
        how = f"as trained in {grid}"
        change = Change(how, partial(_Kernel, grid=grid, dtype=dtype, whole=conv1d), 0, memory)
        loaded = Loaded(change, weights, len(target.tensors))
        for name in target.tensors:
            by_tensor.setdefault(name, []).append((target, loaded))
    tensors: dict[str, Tensor] = dict(checkpoint.tensors)
    for name, found in by_tensor.items():
        base = checkpoint[name]
        applied = tuple(
            (Applied(loaded.change, target, piece, 1.0), loaded)
            for target, loaded in found
            for piece in target.pieces
            if piece.tensor == name
        )
        tensors[name] = Merged(
            name, base, applied, base.dtype, merged_columns(tuple(a for a, _ in applied), base.shape)
        )
    return replace(
        checkpoint,
        tensors=tensors,
        notes=(*checkpoint.notes, f"{counted(len(targets), 'weight')} taken as trained in {grid}, decoded again"),
    )


def quantized_targets(checkpoint: Checkpoint, skip: Iterable[str] | None = None) -> list[Target]:
    """The parameters that bitsandbytes would quantize, and where they are stored.

    Raises:
        UsageError: there are none, or ``skip`` is not understood.
        TargetError: one is not stored as floating numbers.
    """
    names = Names(checkpoint.shapes, checkpoint.config)
    found = {name: target for name in names.parameters() if (target := names.find(name)) is not None}
    shapes = {name: target.shape for name, target in found.items()}
    modules = quantized_modules(shapes, checkpoint.config, None if skip is None else tuple(skip))
    if not modules:
        raise UsageError(
            f"{checkpoint.ref} has no linear layers to quantize (experts are left alone)", "check the base"
        )
    targets = [found[f"{module}.weight"] for module in modules]
    for target in targets:
        for name in target.tensors:
            if checkpoint[name].dtype not in (BF16, F16, F32):
                raise TargetError(
                    f"'{name}' is {checkpoint[name].dtype}, not a weight that training could quantize", ""
                )
    return targets


class _Kernel(Kernel):
    """decode(encode(W)), as the change of one parameter."""

    def __init__(self, weights: Weights, *, grid: Grid, dtype: DType, whole: bool) -> None:
        self._trip: RoundTrip | None = None
        if whole:
            turned = _Turned(weights)
            self._all = RoundTrip(turned, grid, dtype).rows(turned.read(0, turned.shape[0]), 0).T.contiguous()
        else:
            self._trip = RoundTrip(weights, grid, dtype)
            self._weights = weights

    def new(self, w: torch.Tensor, rows: range) -> torch.Tensor:
        if self._trip is None:
            return self._all[rows.start : rows.stop : rows.step]
        if rows.step == 1:
            return self._trip.rows(w, rows.start)
        between = self._weights.read(rows.start, rows[-1] + 1)
        return self._trip.rows(between, rows.start)[:: rows.step]


class _Turned:
    """A matrix in memory, transposed."""

    def __init__(self, weights: Weights) -> None:
        self._all = weights.read(0, weights.shape[0]).T.contiguous()
        self.shape = (weights.shape[1], weights.shape[0])

    def read(self, start: int, stop: int) -> torch.Tensor:
        return self._all[start:stop]
