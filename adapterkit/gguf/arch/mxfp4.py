"""MXFP4 experts as GGUF's MXFP4: the same bits in another order.

A checkpoint has a stack's blocks as uint8 ``[experts, rows, groups, 16]``, values 2k and 2k + 1 in byte k, and its scales
beside them; GGUF has 17 bytes per 32 values: the scale, then values k and k + 16 in byte k (``block_mxfp4`` of ggml).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from adapterkit.checkpoint.decoded import Decoded
from adapterkit.checkpoint.tensor import BLOCK, Tensor
from adapterkit.gguf.arch.maps import Array, Strided
from adapterkit.gguf.arch.views import Gathered, Part
from adapterkit.gguf.tensors import dtype_of
from adapterkit.gguf.types import TYPES

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

GROUP = 32
KIND = TYPES["MXFP4"]


class Repacked(Tensor):
    """A GGUF tensor of type MXFP4 from the bytes of a checkpoint's; `decoded` gives it as floats."""

    def __init__(self, name: str, shape: tuple[int, ...], blocks: Tensor, scales: Tensor, decoded: Tensor) -> None:
        self.name, self.shape, self.kind = name, shape, KIND
        self.dtype = dtype_of(KIND)
        self.blocks, self.scales, self.decoded = blocks, scales, decoded

    @property
    def block(self) -> int:
        return max(1, BLOCK // self.shape[-1]) * self.shape[-1]

    @property
    def reads(self) -> int:
        return self.blocks.reads + self.scales.reads

    @property
    def how(self) -> str:
        return "repacked"

    def read(self, start: int, stop: int) -> torch.Tensor:
        import torch

        low, high = start // GROUP, -(-stop // GROUP)
        packed = self.blocks.read(low * 16, high * 16).view(-1, 16)
        values = torch.stack((packed & 15, packed >> 4), -1).view(-1, GROUP)
        out = torch.empty(high - low, 17, dtype=torch.uint8)
        out[:, 0] = self.scales.read(low, high)
        out[:, 1:] = values[:, :16] | (values[:, 16:] << 4)
        return out.view(-1)

    def release(self) -> None:
        self.blocks.release()
        self.scales.release()


def repacked(name: str, array: Array, tensors: Mapping[str, Tensor], floats: Tensor) -> Repacked | None:
    """The handle, when every row of ``array`` is a packed row of MXFP4 weights that nothing changed."""
    blocks: list[Part] = []
    scales: list[Part] = []
    at = 0
    for box in array.boxes:
        source = tensors.get(box.tensor)
        whole = box.turned and not box.values and isinstance(source, Decoded)
        if not whole or not isinstance(source, Decoded) or source.weight.how != "mxfp4 32":
            return None
        packed, scale = source.weight.parts
        experts, rows, groups, _ = packed.shape
        height = groups * GROUP
        # A row of the decoded stack is a column of all packed rows of one expert.
        if not box.rows.is_plain or box.rows.count != height or box.rows.at % height or box.rows.at >= experts * height:
            return None
        chosen = replace(box.columns, at=box.columns.at + box.rows.at // height * rows)
        where = Strided(at, (box.height,), (1,))
        for found, part, width in ((blocks, packed, groups * 16), (scales, scale, groups)):
            every = Strided.all(width)
            found.append(Part(part, width, chosen, every, where, every))  # type: ignore[arg-type]
        at += box.height
    width = array.width // GROUP
    kinds = [
        Gathered(name, (at, size), size, parts, parts[0].source.dtype, wide=False)
        for size, parts in ((width * 16, blocks), (width, scales))
    ]
    return Repacked(name, array.shape, kinds[0], kinds[1], floats)


def on_mxfp4(tensor: Tensor) -> bool:
    """Whether a merged tensor's base was decoded from MXFP4."""
    base = getattr(tensor, "base", tensor)
    return isinstance(base, Decoded) and base.weight.how == "mxfp4 32"
