"""bitsandbytes' own CPU decoder of NF4, taken from its shared library without importing the package.

The import costs seconds and a hundred megabytes, the library alone half a millisecond. Its function decodes, scales and
rounds in one pass; what is called "rows" there are blocks here, which its AVX-512 path needs for right scales (with
rows that are a multiple of 16 but not of the block it uses wrong ones: ``cpu_ops.cpp``, dequantizeBlockwise4bitCpu).

Its result has the bits of `adapterkit.codecs.blockwise.decode_by_table`, so a machine without it writes the same files.
Left out are FP4, whose zeros have another sign there, blocks of 2048 and more, with which bitsandbytes does not trust
itself, and scales so small that a bfloat16 becomes subnormal, which the instruction it uses (VCVTNEPS2BF16) makes zero.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

KNOWN = ("0.49.", "0.50.")  # releases whose function has the arguments below
LARGEST_BLOCK = 1024
SMALLEST_SCALE = 2.0**-120  # the smallest value, 0.08 of it, is still a normal number
_FUNCTIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_LIBRARIES = ("libbitsandbytes_cpu.so", "libbitsandbytes_cpu.dylib", "libbitsandbytes_cpu.dll")


@cache
def _library() -> ctypes.CDLL | None:
    try:
        if not version("bitsandbytes").startswith(KNOWN):
            return None
        spec = find_spec("bitsandbytes")
    except PackageNotFoundError:
        return None
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        for name in _LIBRARIES:
            path = Path(folder, name)
            if path.exists():
                try:
                    return ctypes.CDLL(str(path))
                except OSError:  # built for another machine, or without its OpenMP: torch decodes as well
                    return None
    return None


@cache
def _function(dtype: torch.dtype) -> Callable[..., None] | None:
    library = _library()
    found = getattr(library, f"cdequantize_blockwise_cpu_nf4_{_FUNCTIONS[dtype]}", None)
    if found is None:
        return None
    found.restype = None
    found.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_longlong] * 3
    return found  # type: ignore[no-any-return]


def decode_nf4(packed: torch.Tensor, absmax: torch.Tensor, blocksize: int, out: torch.Tensor) -> bool:
    """Decode whole blocks of NF4 into ``out``, if bitsandbytes is there and can; says whether it did.

    Args:
        packed: uint8 ``[blocks * blocksize / 2]``, contiguous.
        absmax: float32 ``[blocks]``, contiguous.
        out: float32, bfloat16 or float16 ``[blocks * blocksize]``, contiguous.

    Raises:
        ValueError: they are something else, which the function itself would not see.
    """
    function = _function(out.dtype) if blocksize <= LARGEST_BLOCK and out.device.type == "cpu" else None
    if function is None:
        return False
    blocks = absmax.numel()
    if packed.numel() * 2 != out.numel() or blocks * blocksize != out.numel():
        raise ValueError(f"{packed.numel()} bytes and {blocks} blocks of {blocksize} for {out.numel()} weights")
    if packed.dtype is not torch.uint8 or absmax.dtype is not torch.float32:
        raise ValueError(f"{packed.dtype} codes and {absmax.dtype} scales, not uint8 and float32")
    if not all(tensor.is_contiguous() for tensor in (packed, absmax, out)):
        raise ValueError("codes, scales or weights do not lie one after the other")
    if not blocks:
        return True
    if out.dtype is torch.bfloat16 and _subnormal(absmax):
        return False
    function(packed.data_ptr(), absmax.data_ptr(), out.data_ptr(), blocksize, blocks, blocksize)
    return True


def _subnormal(absmax: torch.Tensor) -> bool:
    sizes = absmax.abs()
    # The first comparison is all that is done where no block is empty.
    return bool(sizes.min() < SMALLEST_SCALE) and bool(((sizes != 0) & (sizes < SMALLEST_SCALE)).any())
