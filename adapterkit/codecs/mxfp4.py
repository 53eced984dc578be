"""MXFP4 as gpt-oss stores its experts.

`..._blocks` is uint8 ``[experts, out, in/32, 16]``, `..._scales` ``[experts, out, in/32]``. Each byte holds two e2m1
values, low half first; a scale is the power of two of 32 values. The parameter that transformers makes of them is
``[experts, in, out]``, so a row of it gathers one column of every packed row.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from adapterkit.codecs.codec import Codec, Parts, StoredTensor, Weight, check_dtype, check_shape, companion, stems
from adapterkit.dtypes import BF16

if TYPE_CHECKING:
    import torch

    from adapterkit.codecs.codec import Decode

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
                    factors = powers(scales.read(index * size, (index + 1) * size)).view(out, groups, 1)
                    held[index] = packed, factors
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
    return Weight(name, (experts, height, out), BF16, (blocks, scales), "mxfp4 32", GROUP * out, load, memory)


MXFP4 = Codec(
    "mxfp4",
    ("mxfp4",),
    ("_proj_blocks", "_proj_scales"),
    find,
    True,
    "OCP Microscaling Formats 1.0; transformers 5, integrations/mxfp4.py: convert_moe_packed_tensors",
    what="stacked experts of gpt-oss",
    test="test_scaled.py: transformers",
)
