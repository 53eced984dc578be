"""The file types of GGUF: what a user asks for, such as ``Q4_K_M``.

Numbers: ``llama.h`` of llama.cpp. Default types: ``llama_ftype_get_default_type`` of llama-quant.cpp.
"""

from __future__ import annotations

from typing import NamedTuple

from adapterkit.errors import UsageError, nearest


class FileType(NamedTuple):
    """``general.file_type`` of a mix, and the type of the tensors that no rule names."""

    number: int
    default: str


FILE_TYPES: dict[str, FileType] = {
    "F32": FileType(0, "F32"),
    "F16": FileType(1, "F16"),
    "Q4_0": FileType(2, "Q4_0"),
    "Q4_1": FileType(3, "Q4_1"),
    "Q8_0": FileType(7, "Q8_0"),
    "Q5_0": FileType(8, "Q5_0"),
    "Q5_1": FileType(9, "Q5_1"),
    "Q2_K": FileType(10, "Q2_K"),
    "Q3_K_S": FileType(11, "Q3_K"),
    "Q3_K_M": FileType(12, "Q3_K"),
    "Q3_K_L": FileType(13, "Q3_K"),
    "Q4_K_S": FileType(14, "Q4_K"),
    "Q4_K_M": FileType(15, "Q4_K"),
    "Q5_K_S": FileType(16, "Q5_K"),
    "Q5_K_M": FileType(17, "Q5_K"),
    "Q6_K": FileType(18, "Q6_K"),
    "IQ2_XXS": FileType(19, "IQ2_XXS"),
    "IQ2_XS": FileType(20, "IQ2_XS"),
    "Q2_K_S": FileType(21, "Q2_K"),
    "IQ3_XS": FileType(22, "IQ3_S"),
    "IQ3_XXS": FileType(23, "IQ3_XXS"),
    "IQ1_S": FileType(24, "IQ1_S"),
    "IQ4_NL": FileType(25, "IQ4_NL"),
    "IQ3_S": FileType(26, "IQ3_S"),
    "IQ3_M": FileType(27, "IQ3_S"),
    "IQ2_S": FileType(28, "IQ2_XS"),
    "IQ2_M": FileType(29, "IQ2_S"),
    "IQ4_XS": FileType(30, "IQ4_XS"),
    "IQ1_M": FileType(31, "IQ1_M"),
    "BF16": FileType(32, "BF16"),
    "TQ1_0": FileType(36, "TQ1_0"),
    "TQ2_0": FileType(37, "TQ2_0"),
    "MXFP4_MOE": FileType(38, "MXFP4"),
    "Q1_0": FileType(40, "Q1_0"),
    "Q2_0": FileType(41, "Q2_0"),
}
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}


def file_type(name: str) -> tuple[str, FileType]:
    """A mix by name in any case, ``Q4_K`` being ``Q4_K_M``.

    Raises:
        UsageError: there is no such mix.
    """
    upper = name.upper()
    upper = ALIASES.get(upper, upper)
    if upper not in FILE_TYPES:
        raise UsageError(f"{name!r} is no quantization", nearest(name, FILE_TYPES))
    return upper, FILE_TYPES[upper]
