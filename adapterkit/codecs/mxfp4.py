"""MXFP4 as gpt-oss stores its experts.

`..._blocks` is uint8 ``[experts, out, in/32, 16]``, `..._scales` ``[experts, out, in/32]``. Each byte holds two e2m1
values, low half first; a scale is the power of two of 32 values. The parameter that transformers makes of them is
``[experts, in, out]``, so a row of it gathers one column of every packed row.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from adapterkit.codecs.codec import (
    Codec,
    Parts,
    StoredTensor,
    Weight,
    check_dtype,
    check_scales,
    check_shape,
    companion,
    listed,
    stems,
)
from adapterkit.codecs.encode import Encoder, TensorSpec
from adapterkit.codecs.fp8 import e2m1_numbers
from adapterkit.dtypes import BF16

if TYPE_CHECKING:
    import torch

    from adapterkit.codecs.codec import Decode
    from adapterkit.codecs.tiles import Tiles

GROUP = 32


def find(parts: Parts, config: Mapping[str, Any]) -> Iterator[Weight]:
    for name in stems(parts, "_blocks"):
        blocks = check_shape(parts[f"{name}_blocks"], (-1, -1, -1, GROUP // 2), "mxfp4")
        scales = companion(parts, f"{name}_scales", blocks.name, "mxfp4")
        check_dtype(blocks, ("U8",), "mxfp4")
        check_dtype(scales, ("U8", "F8_E8M0"), "mxfp4")
        yield _weight(name, blocks, check_shape(scales, blocks.shape[:-1], "mxfp4"))


def _weight(name: str, blocks: StoredTensor, scales: StoredTensor) -> Weight:
    experts, out, groups, _ = blocks.shape
    height = groups * GROUP

    def load() -> Decode:
        import torch

        from adapterkit.codecs.bits import e2m1, powers

        held: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        lock = threading.Lock()

        def expert(index: int) -> tuple[torch.Tensor, torch.Tensor]:
            with lock:
                if index not in held:
                    for old in [other for other in held if other < index - 1]:
                        del held[old]
                    size = out * groups
                    packed = blocks.read(index * size * 16, (index + 1) * size * 16).view(out, groups, 16)
                    factors = check_scales(powers(scales.read(index * size, (index + 1) * size)), scales)
                    held[index] = packed, factors.view(out, groups, 1)
                return held[index]

        def decode(start: int, stop: int) -> torch.Tensor:
            first, last = start // (GROUP * out), -(-stop // (GROUP * out))
            found = []
            while first < last:
                index, group = divmod(first, groups)
                until = min(last, (index + 1) * groups)
                packed, factors = expert(index)
                part = slice(group, group + until - first)
                values = (e2m1(packed[:, part]) * factors[:, part]).to(torch.bfloat16)
                found.append(values.view(out, -1).T.reshape(-1))
                first = until
            return found[0] if len(found) == 1 else torch.cat(found)

        return decode

    memory = 2 * out * groups * 20
    parts, grain = (blocks, scales), GROUP * out
    return Weight(
        name, (experts, height, out), BF16, parts, "mxfp4 32", grain, load, memory, lambda: Mxfp4(blocks, scales)
    )


class Mxfp4(Encoder):
    """Stored experts, written again, one expert at a time: each is turned to the rows that are stored.

    A scale is the smallest power of two that keeps its 32 values within 6, as triton_kernels' `downcast_to_mxfp` rounds
    it (transformers writes gpt-oss with that).
    """

    def __init__(self, blocks: StoredTensor, scales: StoredTensor) -> None:
        experts, self._out, groups, _ = blocks.shape
        self._in = groups * GROUP
        self.unit, self.unit_codes = self._in * self._out, self._out * groups * GROUP // 2
        self.made = (
            TensorSpec(blocks.name, blocks.dtype, blocks.shape),
            TensorSpec(scales.name, scales.dtype, scales.shape),
        )
        self.memory = experts * self._out * groups + 16 * self.unit
        self._blocks, self._scales, self._across = blocks, scales, groups
        self._rows: Tiles | None = None

    def _tiles(self) -> Tiles:
        from adapterkit.codecs.bits import pair, unpair
        from adapterkit.codecs.codec import whole
        from adapterkit.codecs.tiles import Held, Shape, Tiles

        if self._rows is None:
            blocks, stored = self._blocks, self._in // 2
            rows = blocks.shape[0] * self._out

            def before(first: int, last: int) -> torch.Tensor:
                return unpair(blocks.read(first * stored, last * stored).view(-1, stored))

            self._rows = Tiles(
                self.made,
                Shape(rows, self._in, rows, (1, GROUP), self._across),
                lambda: e2m1_numbers(self._scales.dtype, None, multiply=True),
                pair,
                lambda found: unpair(found.view(-1, stored)),
                lambda held: {self._scales.name: held[0].reshape(-1)},
                Held(lambda: before, lambda: whole(self._scales).reshape(rows, self._across)),
                row_codes=stored,
            )
        return self._rows

    def _turned(self, values: torch.Tensor, rows: int) -> torch.Tensor:
        """Experts ``[rows, columns]``, each turned, flat."""
        return values.view(-1, rows, self.unit // rows).transpose(1, 2).reshape(-1)

    def encode(self, start: int, new: torch.Tensor, old: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        turned = None if old is None else self._turned(old, self._in)
        return self._tiles().encode(start, self._turned(new, self._in), turned)

    def finish(self, held: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        return self._tiles().finish(held)

    def values(self, start: int, encoded: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return self._turned(self._tiles().values(start, encoded), self._out)

    def end(self) -> None:
        self._rows = None


MXFP4 = Codec(
    "mxfp4",
    ("mxfp4",),
    ("_proj_blocks", "_proj_scales"),
    find,
    True,
    "OCP Microscaling Formats 1.0; transformers 5, integrations/mxfp4.py: convert_moe_packed_tensors",
    what="stacked experts of gpt-oss",
    test="test_scaled.py: transformers",
    leave=listed("modules_to_not_convert"),
)
