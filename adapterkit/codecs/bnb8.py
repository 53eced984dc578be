"""LLM.int8, as transformers saves it: `weight` int8 ``[out, in]``, `SCB` float32 ``[out]`` and `weight_format`.

Weights of releases that stored the layout of a GPU's matrix units (``weight_format`` other than 0) are refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapterkit.codecs.codec import AGAIN, Codec, Parts, StoredTensor, Weight, check_shape, companion, stems, whole
from adapterkit.dtypes import F32
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

        largest = whole(scales).view(-1).float()

        def decode(start: int, stop: int) -> torch.Tensor:
            codes = weight.read(start, stop).view(-1, columns)
            return decode_int8(codes, largest[start // columns : stop // columns]).view(-1)

        return decode

    return Weight(weight.name, (rows, columns), F32, used, "int8", columns, load, 4 * rows)


BNB8 = Codec(
    "bitsandbytes int8",
    ("bitsandbytes",),
    (".SCB", ".weight_format"),
    find,
    True,
    "bitsandbytes 0.50, nn/modules.py: Linear8bitLt; transformers 5, quantizers/quantizer_bnb_8bit.py",
    what="LLM.int8 with row-wise scales",
    test="test_bitsandbytes.py: bitsandbytes",
    writes=("int8",),
)
