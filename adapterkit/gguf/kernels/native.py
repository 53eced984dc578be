"""ggml's own encoders through ctypes, from an installed package that ships them: for types without a kernel here."""

from __future__ import annotations

import ctypes
from functools import cache
from threading import Lock
from typing import TYPE_CHECKING

from adapterkit.packages import missing

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from adapterkit.gguf.types import GGMLType

_LOCK = Lock()


@cache
def library() -> ctypes.CDLL:
    """The shared library of xllamacpp, which exports ggml's functions.

    Raises:
        UsageError: it is not installed or does not export them.
    """
    try:
        from xllamacpp import xllamacpp

        found = ctypes.CDLL(xllamacpp.__file__)
        quantize = found.ggml_quantize_chunk
    except (ImportError, OSError, AttributeError) as error:
        raise missing("xllamacpp", "types like IQ2_XS are encoded by ggml's own functions") from error
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    return found


@cache
def _prepare(type_id: int) -> None:
    with _LOCK:
        library().ggml_quantize_init(type_id)


def run(
    ggml: GGMLType, x: npt.NDArray[np.float32], importance: npt.NDArray[np.float32] | None, out: npt.NDArray[np.uint8]
) -> None:
    """Encode contiguous rows ``x`` into ``out``; ctypes lets other Python threads run meanwhile."""
    _prepare(ggml.id)
    weights = None if importance is None else importance.ctypes.data
    rows, columns = x.shape
    library().ggml_quantize_chunk(ggml.id, x.ctypes.data, out.ctypes.data, 0, rows, columns, weights)
