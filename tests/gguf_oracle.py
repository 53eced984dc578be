"""llama.cpp's own C functions, as the encoders' oracle: exported by the shared library that xllamacpp ships."""

from __future__ import annotations

import ctypes
import platform
from functools import cache

import numpy as np
import pytest
import xllamacpp

from adapterkit.gguf.types import TYPES

needs_oracle = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="llama.cpp gives other bytes off x86-64"
)


@cache
def library() -> ctypes.CDLL:
    found = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    found.ggml_type_name.restype = ctypes.c_char_p
    found.ggml_blck_size.restype = ctypes.c_int64
    found.ggml_type_size.restype = ctypes.c_size_t
    found.ggml_quantize_chunk.restype = ctypes.c_size_t
    found.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    return found


def quantize(name: str, rows: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """The bytes that llama-quantize writes for float32 rows."""
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    kind = TYPES[name]
    out = np.zeros((rows.shape[0], kind.row_bytes(rows.shape[1])), dtype=np.uint8)
    library().ggml_quantize_init(kind.id)
    weights = None if importance is None else importance.ctypes.data
    size = library().ggml_quantize_chunk(kind.id, rows.ctypes.data, out.ctypes.data, 0, *rows.shape, weights)
    assert size == out.nbytes
    return out
