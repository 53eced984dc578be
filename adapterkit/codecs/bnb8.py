"""LLM.int8, as transformers saves it: `weight` int8 ``[out, in]``, `SCB` float32 ``[out]`` and `weight_format`.

Weights of releases that stored the layout of a GPU's matrix units (``weight_format`` other than 0) are refused.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from adapterkit.codecs.bnb4 import config
from adapterkit.codecs.codec import (
    AGAIN,
    Codec,
    Kind,
    Parts,
    StoredTensor,
    Weight,
    check_scales,
    check_shape,
    companion,
    listed,
    stems,
    whole,
    zero_scale,
)
from adapterkit.codecs.encode import Encoder, TensorSpec
from adapterkit.dtypes import DTYPES, F32
from adapterkit.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch

    from adapterkit.codecs.codec import Decode


def find(parts: Parts, config: Mapping[str, Any]) -> Iterator[Weight]:
    for stem in stems(parts, ".SCB"):
        name = f"{stem}.weight"
        weight = check_shape(companion(parts, name, f"{stem}.SCB", "int8"), (-1, -1), "int8")
        if weight.dtype.code != "I8":
            raise CheckpointError(f"'{name}' is {weight.dtype} beside '{stem}.SCB', where int8 belongs", AGAIN)
        scales = parts[f"{stem}.SCB"]
        if scales.shape not in ((weight.shape[0],), (1, weight.shape[0])):
            raise CheckpointError(f"'{scales.name}' is {list(scales.shape)} for {weight.shape[0]} rows", AGAIN)
        used = [weight, scales]
        layout = parts.get(f"{stem}.weight_format")
        if layout is not None:
            used.append(layout)
            if any(layout.raw()):
                raise CheckpointError(
                    f"'{name}' is stored in the layout of a GPU's matrix units",
                    "load and save it with bitsandbytes 0.45",
                )
        yield _weight(weight, scales, tuple(used))


def _weight(weight: StoredTensor, scales: StoredTensor, used: tuple[StoredTensor, ...]) -> Weight:
    rows, columns = weight.shape

    def load() -> Decode:
        from adapterkit.codecs.blockwise import decode_int8

        largest = check_scales(whole(scales).view(-1).float(), scales)
        empty = bool((largest == 0).any())

        def decode(start: int, stop: int) -> torch.Tensor:
            codes, factor = weight.read(start, stop).view(-1, columns), largest[start // columns : stop // columns]
            if empty and bool(((codes != 0).any(1) & (factor == 0)).any()):
                raise zero_scale(weight.name)
            return decode_int8(codes, factor).view(-1)

        return decode

    def encoder() -> Encoder:
        return Int8(weight.name, (rows, columns), weight, scales)

    return Weight(weight.name, (rows, columns), F32, used, "int8", columns, load, 4 * rows, encoder)


class Int8(Encoder):
    """LLM.int8 of ``[out, in]``, new, or a stored one that is written again (its `weight_format` stays as it is)."""

    def __init__(
        self, name: str, shape: tuple[int, ...], codes: StoredTensor | None = None, scales: StoredTensor | None = None
    ) -> None:
        rows, self._columns = shape
        self._codes, self._scales = codes, scales
        self.unit = self.unit_codes = self._columns
        self.memory = 8 * rows
        stem = name.removesuffix("weight")
        self._scb, self._format = f"{stem}SCB", f"{stem}weight_format"
        self.made = (
            TensorSpec(name, DTYPES["I8"], shape),
            TensorSpec(self._scb, F32, (rows,))
            if scales is None
            else TensorSpec(scales.name, scales.dtype, scales.shape),
        )
        if codes is None:
            self.made += (TensorSpec(self._format, DTYPES["U8"], ()),)

    def encode(self, start: int, new: torch.Tensor, old: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        import torch

        from adapterkit.codecs.blockwise import encode_int8

        codes, largest = encode_int8(new.view(-1, self._columns))
        if old is not None and self._codes is not None and self._scales is not None:
            changed = (new != old).view(-1, self._columns).any(1)
            if not bool(changed.all()):
                row = start // self._columns
                kept = self._codes.read(start, start + new.numel()).view(-1, self._columns).to(new.device)
                codes = torch.where(changed[:, None], codes, kept)
                before = self._scales.read(row, row + changed.numel()).float().to(new.device)
                largest = torch.where(changed, largest, before)
        return codes.view(-1), largest

    def finish(self, held: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        import torch

        dtype = self.made[1].dtype.torch
        return {self._scb: held[0].to(dtype), self._format: torch.zeros(1, dtype=torch.uint8)}

    def values(self, start: int, encoded: tuple[torch.Tensor, ...]) -> torch.Tensor:
        from adapterkit.codecs.blockwise import decode_int8

        return decode_int8(encoded[0].view(-1, self._columns), encoded[1]).view(-1)


BNB8 = Codec(
    "bitsandbytes int8",
    ("bitsandbytes",),
    (".SCB", ".weight_format"),
    find,
    True,
    "bitsandbytes 0.50, nn/modules.py: Linear8bitLt; transformers 5, quantizers/quantizer_bnb_8bit.py",
    what="LLM.int8 with row-wise scales",
    test="test_bitsandbytes.py: bitsandbytes",
    leave=listed("llm_int8_skip_modules"),
    fused=True,
    kinds=(
        Kind(
            "int8",
            lambda name, shape, dtype, double: Int8(name, shape),
            partial(config, kind="int8"),
            8.0,
            ("int8",),
            conv1d=True,
        ),
    ),
)
