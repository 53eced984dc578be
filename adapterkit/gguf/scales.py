"""Numbers beside the weights of a GGUF model that llama.cpp multiplies products with.

An NVFP4 weight comes with ``<weight>.scale``, one number of a matrix or one for each expert of a stack, since its own scales
end at 448. The runtime computes ``(W x) s`` and adds a LoRA after that (``build_lora_mm`` of llama-graph.cpp), so what an
adapter was trained on is ``W s``. ``<weight>.input_scale`` says how activations are rounded on some devices; no weight
depends on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from adapterkit.checkpoint.tensor import Tensor
from adapterkit.dtypes import F32
from adapterkit.errors import CheckpointError, TargetError

if TYPE_CHECKING:
    import torch

    from adapterkit.gguf.arch.mapping import Mapper
    from adapterkit.gguf.checkpoint import GGUFCheckpoint

ENDS = (".scale", ".input_scale")
WEIGHT = ".weight"


@dataclass(frozen=True)
class WeightScales:
    """The scales of a model.

    Attributes:
        of: the scale of each weight that has one.
        shapes: of all tensors but the scales.
    """

    of: Mapping[str, Tensor] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def times(self, floats: Tensor) -> Tensor:
        """A weight as the model uses it; itself where it has no scale."""
        scale = self.of.get(floats.name)
        return floats if scale is None else Scaled(floats, scale)

    def undone(self, floats: Tensor) -> Tensor:
        """A weight as the model uses it, as it has to be stored beside its scale."""
        scale = self.of.get(floats.name)
        return floats if scale is None else Scaled(floats, scale, undo=True)


def scales_of(base: GGUFCheckpoint, mapper: Mapper) -> WeightScales:
    """The scales of a GGUF model: tensors of such names that the rules of its architecture do not know.

    Raises:
        CheckpointError: a scale whose shape fits no weight.
        TargetError: a weight in NVFP4 beside a tensor of this name that means something else in this architecture.
    """
    found: dict[str, Tensor] = {}
    left = dict(base.shapes)
    for name, tensor in base.items():
        end = next((end for end in ENDS if name.endswith(end)), None)
        weight = base.tensors.get(name.removesuffix(end) + WEIGHT) if end is not None else None
        if weight is None:
            continue
        if mapper.knows(name):
            if weight.dtype.code == "NVFP4":
                raise TargetError(
                    f"{base.ref}: '{name}' is a parameter of a {base.arch}, and would be the scale of '{weight.name}' too, "
                    "which is in NVFP4",
                    "merge into the Hugging Face base: adapterkit merge BASE ADAPTER -o OUT.gguf",
                )
            continue
        matrices = weight.shape[0] if len(weight.shape) > 2 else 1
        if tensor.numel not in (1, matrices):
            raise CheckpointError(
                f"{base.ref}: '{name}' has {tensor.numel} numbers, and '{weight.name}' has {matrices} matrices",
                "convert the base again",
            )
        del left[name]
        if end == ENDS[0]:
            found[weight.name] = tensor
    return WeightScales(found, left)


class Scaled(Tensor):
    """A weight times its scale in float32; with ``undo``, divided by it."""

    dtype = F32

    def __init__(self, inner: Tensor, scale: Tensor, *, undo: bool = False) -> None:
        self.name, self.shape, self.inner = inner.name, inner.shape, inner
        self.scale, self.undo = scale, undo

    @property
    def block(self) -> int:
        return self.inner.block

    @property
    def reads(self) -> int:
        return self.inner.reads + self.scale.reads

    @property
    def memory(self) -> int:
        return self.inner.memory

    @property
    def how(self) -> str:
        return self.inner.how

    def read(self, start: int, stop: int) -> torch.Tensor:
        import torch

        values = self.inner.read_wide(start, stop).float()
        scale = self.scale.read(0, self.scale.numel).float()
        if not torch.isfinite(scale).all() or not scale.all():
            raise CheckpointError(
                f"'{self.scale.name}' is {float(scale[~torch.isfinite(scale) | (scale == 0)][0]):g}, which no weight can be "
                "multiplied with",
                "convert the base again",
            )
        if scale.numel() > 1:
            size = self.numel // scale.numel()
            first, last = start // size, -(-stop // size)
            scale = scale[first:last].repeat_interleave(size)[start - first * size : stop - first * size]
        return values / scale if self.undo else values * scale

    def release(self) -> None:
        self.inner.release()
