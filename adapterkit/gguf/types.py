"""The tensor types of GGUF as a table.

Ids, block shapes and byte counts: ``ggml.h`` and ``ggml-common.h`` of llama.cpp; which types need an importance matrix:
``tensor_requires_imatrix`` of llama-quant.cpp. Nothing heavy is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from adapterkit.errors import UsageError

Encoder = Literal["cast", "own", "ggml", "none"]


@dataclass(frozen=True)
class GGMLType:
    """One row: ``block`` elements take ``size`` bytes.

    ``encoder`` says who writes it: a cast, our kernels, ggml's functions from an installed package, or nobody.
    ``halves`` are the offsets of the float16 scales in a block, where a scale too large for float16 shows.
    """

    name: str
    id: int
    block: int
    size: int
    encoder: Encoder
    needs_importance: bool = False
    halves: tuple[int, ...] = ()

    @property
    def is_quantized(self) -> bool:
        """Whether elements share a scale, as ``ggml_is_quantized`` says."""
        return self.block > 1

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of ``columns`` elements.

        Raises:
            UsageError: ``columns`` is no multiple of the block.
        """
        if columns % self.block:
            raise UsageError(f"a row of {columns} weights cannot be {self.name}", f"use a multiple of {self.block}")
        return columns // self.block * self.size


_ROWS = (
    GGMLType("F32", 0, 1, 4, "cast"),
    GGMLType("F16", 1, 1, 2, "cast"),
    GGMLType("Q4_0", 2, 32, 18, "own", halves=(0,)),
    GGMLType("Q4_1", 3, 32, 20, "own", halves=(0, 2)),
    GGMLType("Q5_0", 6, 32, 22, "own", halves=(0,)),
    GGMLType("Q5_1", 7, 32, 24, "own", halves=(0, 2)),
    GGMLType("Q8_0", 8, 32, 34, "own", halves=(0,)),
    GGMLType("Q8_1", 9, 32, 36, "none"),
    GGMLType("Q2_K", 10, 256, 84, "own", halves=(80, 82)),
    GGMLType("Q3_K", 11, 256, 110, "own", halves=(108,)),
    GGMLType("Q4_K", 12, 256, 144, "own", halves=(0, 2)),
    GGMLType("Q5_K", 13, 256, 176, "own", halves=(0, 2)),
    GGMLType("Q6_K", 14, 256, 210, "own", halves=(208,)),
    GGMLType("Q8_K", 15, 256, 292, "none"),
    GGMLType("IQ2_XXS", 16, 256, 66, "ggml", True),
    GGMLType("IQ2_XS", 17, 256, 74, "ggml", True),
    GGMLType("IQ3_XXS", 18, 256, 98, "ggml", True),
    GGMLType("IQ1_S", 19, 256, 50, "ggml", True),
    GGMLType("IQ4_NL", 20, 32, 18, "own", halves=(0,)),
    GGMLType("IQ3_S", 21, 256, 110, "ggml"),
    GGMLType("IQ2_S", 22, 256, 82, "ggml", True),
    GGMLType("IQ4_XS", 23, 256, 136, "own", halves=(0,)),
    GGMLType("I8", 24, 1, 1, "none"),
    GGMLType("I16", 25, 1, 2, "none"),
    GGMLType("I32", 26, 1, 4, "none"),
    GGMLType("I64", 27, 1, 8, "none"),
    GGMLType("F64", 28, 1, 8, "none"),
    GGMLType("IQ1_M", 29, 256, 56, "ggml", True),
    GGMLType("BF16", 30, 1, 2, "cast"),
    GGMLType("TQ1_0", 34, 256, 54, "own", halves=(52,)),
    GGMLType("TQ2_0", 35, 256, 66, "own", halves=(64,)),
    GGMLType("MXFP4", 39, 32, 17, "own"),
    GGMLType("NVFP4", 40, 64, 36, "ggml"),
    GGMLType("Q1_0", 41, 128, 18, "ggml", halves=(0,)),
    GGMLType("Q2_0", 42, 64, 18, "ggml", halves=(0,)),
)
TYPES = {row.name: row for row in _ROWS}
BY_ID = {row.id: row for row in _ROWS}


def ggml_type(name: str) -> GGMLType:
    """The row for a type's name, in any case.

    Raises:
        UsageError: there is no such type.
    """
    found = TYPES.get(name.upper())
    if found is None:
        raise UsageError(f"{name!r} is no GGUF tensor type", f"use one of {', '.join(TYPES)}")
    return found
