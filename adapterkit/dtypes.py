"""The dtypes a checkpoint stores, as a table.

Sources: the safetensors format (README of huggingface/safetensors, "Format") for the codes;
torch's documentation for the names. Torch itself is imported only when a tensor is made.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from adapterkit.errors import CheckpointError
from adapterkit.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


@dataclass(frozen=True)
class DType:
    """One row of the table: the code in safetensors headers, bits per element, torch's name for it.

    Types that share scales among elements (GGUF's) count ``bits`` per ``block`` of elements; torch sees their bytes.
    """

    code: str
    bits: int
    torch_name: str
    is_float: bool
    label: str
    block: int = 1

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of a dense tensor of ``shape``; sub-byte types are packed and must fill whole bytes."""
        return prod(shape) // self.block * self.bits // 8

    @property
    def torch(self) -> torch.dtype:
        """The torch dtype.

        Raises:
            CheckpointError: the installed torch has no such dtype.
        """
        import torch

        found = getattr(torch, self.torch_name, None) if self.torch_name else None
        if found is None:
            raise CheckpointError(f"torch {torch.__version__} has no dtype for {self.code}", "install a newer torch")
        return found  # type: ignore[no-any-return]

    def __str__(self) -> str:
        return self.label


_ROWS = (
    DType("F64", 64, "float64", True, "f64"),
    DType("F32", 32, "float32", True, "f32"),
    DType("F16", 16, "float16", True, "f16"),
    DType("BF16", 16, "bfloat16", True, "bf16"),
    DType("F8_E4M3", 8, "float8_e4m3fn", True, "fp8"),
    DType("F8_E5M2", 8, "float8_e5m2", True, "fp8_e5m2"),
    DType("F8_E8M0", 8, "float8_e8m0fnu", True, "e8m0"),
    DType("F8_E4M3FNUZ", 8, "float8_e4m3fnuz", True, "fp8_fnuz"),
    DType("F8_E5M2FNUZ", 8, "float8_e5m2fnuz", True, "fp8_e5m2_fnuz"),
    DType("F4", 4, "", True, "f4"),
    DType("F6_E2M3", 6, "", True, "f6_e2m3"),
    DType("F6_E3M2", 6, "", True, "f6_e3m2"),
    DType("C64", 64, "complex64", False, "c64"),
    DType("I64", 64, "int64", False, "i64"),
    DType("U64", 64, "uint64", False, "u64"),
    DType("I32", 32, "int32", False, "i32"),
    DType("U32", 32, "uint32", False, "u32"),
    DType("I16", 16, "int16", False, "i16"),
    DType("U16", 16, "uint16", False, "u16"),
    DType("I8", 8, "int8", False, "i8"),
    DType("U8", 8, "uint8", False, "u8"),
    DType("BOOL", 8, "bool", False, "bool"),
)
DTYPES = {row.code: row for row in _ROWS}
BY_LABEL = {row.label: row for row in _ROWS}

F64, F32, F16, BF16 = (DTYPES[code] for code in ("F64", "F32", "F16", "BF16"))
U32, U8 = (DTYPES[code] for code in ("U32", "U8"))
FLOATS = (BF16, F16, F32, F64)
