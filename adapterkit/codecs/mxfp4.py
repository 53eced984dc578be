"""MXFP4 as gpt-oss stores its experts.

`..._blocks` is uint8 ``[experts, out, in/32, 16]``, `..._scales` ``[experts, out, in/32]``. Each byte holds two e2m1
values, low half first; a scale is the power of two of 32 values. The parameter that transformers makes of them is
``[experts, in, out]``, so a row of it gathers one column of every packed row.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from adapterkit.codecs.codec import (
    Codec,
    Kind,
    Layers,
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
from adapterkit.codecs.fp8 import POWERS, e2m1_numbers
from adapterkit.dtypes import BF16, DTYPES, DType

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
    """Experts, one at a time: each is turned to the rows that are stored.

    A scale is the smallest power of two that keeps its 32 values within 6, as triton_kernels' `downcast_to_mxfp` rounds
    it (transformers writes gpt-oss with that). New experts, of which there are names and shapes alone, get the one of three
    powers that has the least squared error.
    """

    def __init__(self, blocks: StoredTensor | TensorSpec, scales: StoredTensor | TensorSpec) -> None:
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
            blocks, scales, stored = self._blocks, self._scales, self._in // 2
            rows = blocks.shape[0] * self._out
            held = None
            if not isinstance(blocks, TensorSpec) and not isinstance(scales, TensorSpec):

                def before(first: int, last: int) -> torch.Tensor:
                    return unpair(blocks.read(first * stored, last * stored).view(-1, stored))

                held = Held(lambda: before, lambda: whole(scales).reshape(rows, self._across))
            numbers = e2m1_numbers(scales.dtype, None, multiply=True)
            self._rows = Tiles(
                self.made,
                Shape(rows, self._in, rows, (1, GROUP), self._across),
                lambda: numbers if held is not None else replace(numbers, search=POWERS),
                pair,
                lambda found: unpair(found.view(-1, stored)),
                lambda found: {scales.name: found[0].reshape(-1)},
                held,
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


def new_stack(name: str, shape: tuple[int, ...], dtype: DType, double: bool) -> Encoder | None:
    """A new stack of experts ``[experts, in, out]``; None where groups of 32 do not divide their inputs."""
    if len(shape) != 3 or shape[1] % GROUP:
        return None
    experts, inside, out = shape
    u8 = DTYPES["U8"]
    blocks = TensorSpec(f"{name}_blocks", u8, (experts, out, inside // GROUP, GROUP // 2))
    return Mxfp4(blocks, TensorSpec(f"{name}_scales", u8, (experts, out, inside // GROUP)))


# What OpenAI's gpt-oss leaves in 16 bits, as its config says it.
PLAIN = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")


def _config(layers: Layers) -> dict[str, Any]:
    return {"modules_to_not_convert": [*PLAIN, *layers.left], "quant_method": "mxfp4"}


KIND = Kind("mxfp4", new_stack, _config, 4.0, ("mxfp4 32",), models=("gpt_oss",), stacks=True)

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
    kinds=(KIND,),
)
