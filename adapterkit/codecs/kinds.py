"""The words for formats that 16-bit weights are written in: what options, help and tables need to know of them.

How each is written stands in its codec's file (`Kind`), under the same name.
"""

from __future__ import annotations

WRITTEN = {
    "nf4": "a folder as bitsandbytes quantizes it",
    "fp4": "a folder as bitsandbytes quantizes it",
    "int8": "a folder in LLM.int8 of bitsandbytes",
    "fp8": "a folder in FP8 blocks as transformers has them",
    "fp8-block": "a folder in FP8 blocks of compressed-tensors, for vLLM and SGLang",
    "int4": "a folder in INT4 of compressed-tensors, groups of 128, rounded to nearest",
    "nvfp4": "a folder in NVFP4 of compressed-tensors, weights alone",
    "mxfp4": "a folder in MXFP4 of compressed-tensors, weights alone",
}
"""Name and one line for readers."""
NESTED = ("nf4", "fp4")
"""Those whose scales can be quantized too."""
