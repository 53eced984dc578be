"""Which block function encodes a type, and the shape it works on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterkit.gguf.kernels import codebooks, legacy, superblocks

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class BlockLayout:
    """``n`` weights become ``size`` bytes; ``subs`` sub-blocks have a scale each; ``given`` takes importance."""

    n: int
    size: int
    subs: int
    plain: Callable[..., None]
    given: Callable[..., None] | None = None
    row_mean: bool = False
    """With importance, C weighs a block by the mean square of its whole row."""


LAYOUTS: dict[str, BlockLayout] = {
    "Q8_0": BlockLayout(32, 34, 1, legacy.q8_0),
    "Q4_0": BlockLayout(32, 18, 1, legacy.q4_0, legacy.q4_0_given, True),
    "Q4_1": BlockLayout(32, 20, 1, legacy.q4_1, legacy.q4_1_given, True),
    "Q5_0": BlockLayout(32, 22, 1, legacy.q5_0, legacy.q5_0_given, True),
    "Q5_1": BlockLayout(32, 24, 1, legacy.q5_1, legacy.q5_1_given, True),
    "Q2_K": BlockLayout(256, 84, 16, superblocks.q2_k, superblocks.q2_k_given),
    "Q3_K": BlockLayout(256, 110, 16, superblocks.q3_k, superblocks.q3_k_given),
    "Q4_K": BlockLayout(256, 144, 8, superblocks.q4_k, superblocks.q4_k_given),
    "Q5_K": BlockLayout(256, 176, 8, superblocks.q5_k, superblocks.q5_k_given),
    "Q6_K": BlockLayout(256, 210, 16, superblocks.q6_k, superblocks.q6_k_given),
    "IQ4_NL": BlockLayout(32, 18, 1, codebooks.iq4_nl, codebooks.iq4_nl_given),
    "IQ4_XS": BlockLayout(256, 136, 8, codebooks.iq4_xs, codebooks.iq4_xs_given),
    "TQ1_0": BlockLayout(256, 54, 1, codebooks.tq1_0),
    "TQ2_0": BlockLayout(256, 66, 1, codebooks.tq2_0),
    "MXFP4": BlockLayout(32, 17, 1, codebooks.mxfp4),
}
