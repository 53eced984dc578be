"""bitsandbytes NF4 and FP4, as transformers saves them in safetensors.

`weight` holds the packed codes (as uint8, or in the training run's ``quant_storage`` dtype), `weight.absmax` one
value per block, `weight.quant_map` the 16 values, `weight.quant_state.bitsandbytes__nf4` a JSON text with the shape.
With double quantization `absmax` is uint8, with `weight.nested_absmax`, `weight.nested_quant_map` and an offset in
the JSON.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from adapterkit.codecs.codec import AGAIN, Codec, Parts, StoredTensor, Weight, check_shape, companion, stems, whole
from adapterkit.dtypes import BF16, F16, F32, DType
from adapterkit.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch

    from adapterkit.codecs.codec import Decode

KINDS = ("nf4", "fp4")
STATE = ".quant_state.bitsandbytes__"
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = {dtype.torch_name: dtype for dtype in (BF16, F16, F32)}
MAX_STATE = 4096  # bytes of JSON


@dataclass(frozen=True)
class QuantState:
    """What the JSON of a 4-bit weight says."""

    kind: str
    blocksize: int
    dtype: DType
    shape: tuple[int, ...]
    nested_blocksize: int = 0
    offset: float = 0.0

    @property
    def count(self) -> int:
        return prod(self.shape)

    @property
    def blocks(self) -> int:
        return -(-self.count // self.blocksize)


def read_state(part: StoredTensor) -> QuantState:
    """The state of a weight.

    Raises:
        CheckpointError: it is not what bitsandbytes writes.
    """
    if prod(part.shape) > MAX_STATE or part.dtype.bits != 8:
        raise CheckpointError(f"'{part.name}' is not the state of a 4-bit weight", AGAIN)
    try:
        found = json.loads(part.raw().decode("utf-8"))
        shape = tuple(found["shape"])
        state = QuantState(
            found["quant_type"],
            found["blocksize"],
            DTYPES[found["dtype"]],
            shape,
            found.get("nested_blocksize", 0),
            float(found.get("nested_offset", 0.0)),
        )
        numbers = (*shape, state.blocksize, state.nested_blocksize)
        if state.kind not in KINDS or not shape or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"'{part.name}' is not the state of a 4-bit weight", AGAIN) from None
    if state.blocksize not in BLOCKSIZES:
        raise CheckpointError(
            f"'{part.name}' says blocks of {state.blocksize}, which bitsandbytes does not have "
            f"({', '.join(map(str, BLOCKSIZES))})",
            AGAIN,
        )
    return state


def find(parts: Parts, config: Mapping[str, Any]) -> Iterator[Weight]:
    for kind in KINDS:
        for name in stems(parts, STATE + kind):
            yield _weight(parts, name, kind)


def _weight(parts: Parts, name: str, kind: str) -> Weight:
    state_part = parts[name + STATE + kind]
    state = read_state(state_part)
    what = f"{kind} of {'x'.join(map(str, state.shape))}"
    packed = companion(parts, name, state_part.name, what)
    absmax = check_shape(companion(parts, f"{name}.absmax", name, what), (state.blocks,), what)
    table = check_shape(companion(parts, f"{name}.quant_map", name, what), (16,), what)
    used = [packed, absmax, table, state_part]
    nested: tuple[StoredTensor, StoredTensor] | None = None
    if f"{name}.nested_absmax" in parts or state.nested_blocksize:
        blocks = -(-state.blocks // max(state.nested_blocksize, 1))
        nested = (
            check_shape(companion(parts, f"{name}.nested_absmax", name, what), (blocks,), what),
            check_shape(companion(parts, f"{name}.nested_quant_map", name, what), (256,), what),
        )
        used += nested
    nbytes = packed.dtype.nbytes(packed.shape)
    held = (state.count + 1) // 2
    if nbytes - held not in range(max(1, packed.dtype.bits // 8)):
        raise CheckpointError(f"'{name}' holds {nbytes} bytes where {what} needs {held}", AGAIN)
    if absmax.dtype.is_float == (nested is not None):
        raise CheckpointError(f"'{absmax.name}' is {absmax.dtype}, which does not fit the state of '{name}'", AGAIN)
    how = f"{kind} {state.blocksize}{' double' if nested else ''}"

    def load() -> Decode:
        return _decoder(state, packed, absmax, nested)

    grain = max(state.blocksize, 64)
    return Weight(name, state.shape, state.dtype, tuple(used), how, grain, load, 4 * state.blocks)


def _decoder(
    state: QuantState, packed: StoredTensor, absmax: StoredTensor, nested: tuple[StoredTensor, StoredTensor] | None
) -> Decode:
    import torch

    from adapterkit.codecs.blockwise import decode_4bit, unnest

    scales = whole(absmax)
    if nested is not None:
        largest, table = whole(nested[0]), whole(nested[1])
        scales = unnest(scales, table, largest, state.nested_blocksize, state.offset)
    scales = scales.float()
    bits = packed.dtype.bits
    stored = -(-((state.count + 1) // 2) * 8 // bits)  # elements of the storage dtype

    def decode(start: int, stop: int) -> torch.Tensor:
        codes = packed.read(start * 4 // bits, min(-(-stop * 4 // bits), stored)).view(torch.uint8)
        return decode_4bit(
            codes[: (stop - start + 1) // 2],
            scales[start // state.blocksize : -(-stop // state.blocksize)],
            state.kind,
            state.blocksize,
            stop - start,
            state.dtype.torch,
        )

    return decode


BNB4 = Codec(
    "bitsandbytes 4-bit",
    ("bitsandbytes",),
    (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATE + "nf4", STATE + "fp4"),
    find,
    True,
    "bitsandbytes 0.50, functional.py: QuantState.as_dict; transformers 5, quantizers/quantizer_bnb_4bit.py",
    what="NF4 and FP4, every block size, with and without double quantization, any storage dtype",
    test="test_bitsandbytes.py: bitsandbytes",
    writes=("nf4", "fp4"),
)
