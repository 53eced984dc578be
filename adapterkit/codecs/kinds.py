"""The words for formats that 16-bit weights are written in: what options, help and tables need to know of them.

How each is written stands in its codec's file (`adapterkit.codecs.codec.Kind`), under the same name. The words of the codecs
that come with the package are listed here, so that ``--help`` imports none of them; a codec in a file of its own says its
words there, in ``Kind.what`` and ``Kind.nested``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING

from adapterkit.rows import brought

if TYPE_CHECKING:
    from adapterkit.codecs.codec import Codec

_WRITTEN = {
    "nf4": "a folder as bitsandbytes quantizes it",
    "fp4": "a folder as bitsandbytes quantizes it",
    "int8": "a folder in LLM.int8 of bitsandbytes",
    "fp8": "a folder in FP8 blocks as transformers has them",
    "fp8-block": "a folder in FP8 blocks of compressed-tensors, for vLLM and SGLang",
    "int4": "a folder in INT4 of compressed-tensors, groups of 128, rounded to nearest",
    "nvfp4": "a folder in NVFP4 of compressed-tensors, weights alone",
    "mxfp4": "a folder in MXFP4 of compressed-tensors, weights alone; of gpt-oss as it is published",
    **{
        f"mlx-{bits}bit{end}": f"a folder as mlx-lm quantizes it, {bits} bits, groups of {size}"
        for size, end in ((64, ""), (32, "-g32"))
        for bits in (2, 3, 4, 5, 6, 8)
    },
    **{f"mlx-{mode}": f"a folder as mlx-lm quantizes it, {mode.upper()}" for mode in ("mxfp4", "mxfp8", "nvfp4")},
}
_NESTED = frozenset({"nf4", "fp4"})
# Modules of this package that are no codec, or whose words are above.
_LISTED = frozenset(
    {"bits", "blockwise", "bnb4", "bnb8", "bnb_kernel", "codec", "compressed", "conv1d", "encode", "fp8", "gptq", "grid", "hqq",
     "kinds", "mlx", "mxfp4", "plain8", "scaled", "table", "tiles", "torchao"}
)  # fmt: skip


@cache
def others() -> tuple[Codec, ...]:
    """The codecs of files that are not listed."""
    from adapterkit import codecs

    return tuple(brought("adapterkit.codecs", codecs.__path__, "CODEC", _LISTED))


@cache
def written() -> Mapping[str, str]:
    """The formats that weights are written in: name and one line for readers."""
    return _WRITTEN | {kind.name: kind.what for codec in others() for kind in codec.kinds}


@cache
def nested() -> frozenset[str]:
    """Those whose scales can be quantized too."""
    return _NESTED | {kind.name for codec in others() for kind in codec.kinds if kind.nested}
