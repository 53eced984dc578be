"""bitsandbytes NF4 and FP4, as transformers saves them in safetensors.

`weight` holds the packed codes (as uint8, or in the training run's ``quant_storage`` dtype), `weight.absmax` one
value per block, `weight.quant_map` the 16 values, `weight.quant_state.bitsandbytes__nf4` a JSON text with the shape.
With double quantization `absmax` is uint8, with `weight.nested_absmax`, `weight.nested_quant_map` and an offset in
the JSON.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from adapterkit.codecs.codec import (
    AGAIN,
    Codec,
    Kind,
    Layers,
    Parts,
    StoredTensor,
    Weight,
    check_scales,
    check_shape,
    companion,
    listed,
    stems,
    whole,
    zero_scale,
)
from adapterkit.codecs.encode import Encoder, TensorSpec
from adapterkit.codecs.grid import BLOCKSIZES, Grid
from adapterkit.dtypes import BF16, DTYPES, F16, F32, DType
from adapterkit.errors import CheckpointError
from adapterkit.foreign import json_value

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch

    from adapterkit.codecs.codec import Decode

KINDS = ("nf4", "fp4")
STATE = ".quant_state.bitsandbytes__"
U8 = DTYPES["U8"]
NAMED = {dtype.torch_name: dtype for dtype in (BF16, F16, F32)}
MAX_STATE = 4096  # bytes of JSON
NESTED = 256
# Of the JSON of a new weight with nested scales, filled up with spaces: how long its offset prints is not known before.
STATE_BYTES = 256
OFFSET_BYTES = 15  # the longest that nine digits of a float32 print


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
        found = json_value(part.raw().decode("utf-8"))
        shape = tuple(found["shape"])
        state = QuantState(
            found["quant_type"],
            found["blocksize"],
            NAMED[found["dtype"]],
            shape,
            found.get("nested_blocksize", 0),
            float(found.get("nested_offset", 0.0)),
        )
        numbers = (*shape, state.blocksize, state.nested_blocksize)
        if state.kind not in KINDS or not shape or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
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
        from adapterkit.codecs.blockwise import values

        if not bool((whole(table).float() - values(kind)).abs().max() < 1e-3):
            raise CheckpointError(f"'{table.name}' holds other values than those of {kind}, which kernels take", AGAIN)
        return _decoder(state, packed, absmax, nested)

    def encoder() -> Encoder:
        return FourBitAgain(state, packed, absmax, nested, state_part)

    grain = max(state.blocksize, 64)
    return Weight(name, state.shape, state.dtype, tuple(used), how, grain, load, 4 * state.blocks, encoder)


def _decoder(
    state: QuantState, packed: StoredTensor, absmax: StoredTensor, nested: tuple[StoredTensor, StoredTensor] | None
) -> Decode:
    import torch

    from adapterkit.codecs.blockwise import decode_4bit

    scales = _scales(state, absmax, nested)
    bits = packed.dtype.bits
    stored = -(-((state.count + 1) // 2) * 8 // bits)  # elements of the storage dtype

    # A nested scale may come out as zero where the block's own was only small.
    empty = nested is None and bool((scales == 0).any())

    def decode(start: int, stop: int) -> torch.Tensor:
        codes = packed.read(start * 4 // bits, min(-(-stop * 4 // bits), stored)).view(torch.uint8)
        factor = scales[start // state.blocksize : -(-stop // state.blocksize)]
        if empty:
            # Every kernel gives all of a block of zeros the same code, though not each the same one.
            full = (stop - start) // state.blocksize
            blocks = codes[: full * state.blocksize // 2].view(full, -1)
            if bool(((blocks != blocks[:, :1]).any(1) & (factor[:full] == 0)).any()):
                raise zero_scale(packed.name)
        return decode_4bit(
            codes[: (stop - start + 1) // 2],
            factor,
            state.kind,
            state.blocksize,
            stop - start,
            state.dtype.torch,
        )

    return decode


def _scales(state: QuantState, absmax: StoredTensor, nested: tuple[StoredTensor, StoredTensor] | None) -> torch.Tensor:
    """One float32 scale per block."""
    from adapterkit.codecs.blockwise import unnest

    scales = whole(absmax)
    if nested is not None:
        largest, table = whole(nested[0]), whole(nested[1])
        scales = unnest(scales, table, largest, state.nested_blocksize, state.offset)
    return check_scales(scales.float(), absmax)


class FourBit(Encoder):
    """A new NF4 or FP4 weight; ``shape`` in the orientation of a linear layer, ``dtype`` what it is decoded to."""

    def __init__(self, name: str, shape: tuple[int, ...], grid: Grid, dtype: DType) -> None:
        self._name, self._grid = name, grid
        self.state = QuantState(grid.kind, grid.blocksize, dtype, shape, NESTED if grid.double else 0)
        blocks = self.state.blocks
        self.unit, self.unit_codes, self.memory = grid.blocksize, grid.blocksize // 2, 8 * blocks
        size = STATE_BYTES if grid.double else len(state_json(self.state))
        self.made = (
            TensorSpec(name, U8, (-(-self.state.count // 2), 1)),
            TensorSpec(f"{name}.absmax", U8 if grid.double else F32, (blocks,)),
            TensorSpec(f"{name}.quant_map", F32, (16,)),
            *(
                (
                    TensorSpec(f"{name}.nested_absmax", F32, (-(-blocks // NESTED),)),
                    TensorSpec(f"{name}.nested_quant_map", F32, (256,)),
                )
                if grid.double
                else ()
            ),
            TensorSpec(f"{name}{STATE}{grid.kind}", U8, (size,)),
        )

    def encode(self, start: int, new: torch.Tensor, old: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        from adapterkit.codecs.blockwise import absmax_of, encode_4bit

        absmax = absmax_of(new, self._grid.blocksize)
        return encode_4bit(new, absmax, self._grid.kind, self._grid.blocksize), absmax

    def finish(self, held: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        from adapterkit.codecs import blockwise

        name = self._name
        found = {f"{name}.absmax": held[0], f"{name}.quant_map": blockwise.values(self._grid.kind)}
        state = self.state
        if self._grid.double:
            codes, largest, offset = blockwise.nest(held[0])
            found |= {f"{name}.absmax": codes, f"{name}.nested_absmax": largest}
            found[f"{name}.nested_quant_map"] = blockwise.nested_values()
            state = replace(state, offset=float(offset))
        last = self.made[-1]
        found[last.name] = _filled(state_json(state), last.shape[0])
        return found

    def values(self, start: int, encoded: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return _values(self.state, encoded[0], encoded[1], start)


class FourBitAgain(Encoder):
    """A stored NF4 or FP4 weight, written again. Its tables stay as they are stored."""

    def __init__(
        self,
        state: QuantState,
        packed: StoredTensor,
        absmax: StoredTensor,
        nested: tuple[StoredTensor, StoredTensor] | None,
        text: StoredTensor,
    ) -> None:
        self.state, self._packed, self._absmax, self._nested, self._text = state, packed, absmax, nested, text
        self.unit = state.blocksize
        self.unit_codes = state.blocksize * 4 // packed.dtype.bits
        self.memory = 9 * state.blocks
        self._before: torch.Tensor | None = None
        self.made = (_as_stored(packed), _as_stored(absmax))
        if nested is not None:
            # The offset takes as few digits as tell it from every other float32, so that the JSON keeps its length.
            longest = len(state_json(replace(state, offset=0.0))) - len("0.0") + OFFSET_BYTES
            size = max(text.shape[0], longest if not _has_room(state, text) else 0)
            self.made += (_as_stored(nested[0]), TensorSpec(text.name, text.dtype, (size,)))

    def packed(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes of the whole weight, two in a byte, as they are stored."""
        import torch

        return torch.nn.functional.pad(codes, (0, -codes.numel() % (self._packed.dtype.bits // 8))).view(
            self._packed.dtype.torch
        )

    def encode(self, start: int, new: torch.Tensor, old: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        import torch

        from adapterkit.codecs.blockwise import absmax_of, encode_4bit

        state, size = self.state, self.state.blocksize
        absmax = absmax_of(new, size)
        changed = torch.ones_like(absmax, dtype=torch.bool)
        if old is not None:
            moved = new != old
            full = moved.numel() - moved.numel() % size
            changed[: full // size] = moved[:full].view(-1, size).any(1)
            if full < moved.numel():
                changed[-1] = moved[full:].any()
        kept: torch.Tensor | None = None
        if not bool(changed.all()):
            kept = self.stored(start, new.numel()).to(new.device)
            absmax = torch.where(changed, absmax, self.scales()[start // size :][: absmax.numel()].to(new.device))
        codes = encode_4bit(new, absmax, state.kind, size)
        short = -codes.numel() % (self._packed.dtype.bits // 8)
        codes = torch.nn.functional.pad(codes, (0, short))
        if kept is not None:
            which = changed.repeat_interleave(size // 2)
            which = torch.nn.functional.pad(which, (0, max(0, codes.numel() - which.numel())))[: codes.numel()]
            codes = torch.where(which, codes, kept)
        return codes.view(self._packed.dtype.torch), absmax, changed

    def finish(self, held: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        from adapterkit.codecs import blockwise

        scales, changed = held[-2:]
        stored = {part.name: whole(part).view(-1) for part in (self._absmax, *(self._nested or ())[:1])}
        if self._nested is None:
            return {self._absmax.name: scales.to(self._absmax.dtype.torch)}
        length = self.made[-1].shape[0]
        if not bool(changed.any()):
            return {**stored, self._text.name: _filled(self._text.raw(), length)}
        codes, largest, offset = blockwise.nest(scales)
        text = state_json(replace(self.state, offset=float(f"{float(offset):.9g}")))
        found = {self._absmax.name: codes, self._nested[0].name: largest.to(self._nested[0].dtype.torch)}
        return {**found, self._text.name: _filled(text, length)}

    def values(self, start: int, encoded: tuple[torch.Tensor, ...]) -> torch.Tensor:
        import torch

        return _values(self.state, encoded[0].view(torch.uint8), encoded[1], start)

    def end(self) -> None:
        self._before = None

    @property
    def nested(self) -> bool:
        """Whether its scales are quantized too."""
        return self._nested is not None

    def scales(self) -> torch.Tensor:
        """One float32 scale per block, as they are stored now."""
        if self._before is None:
            self._before = _scales(self.state, self._absmax, self._nested)
        return self._before

    def stored(self, start: int, count: int) -> torch.Tensor:
        """The stored bytes of a range."""
        import torch

        first = start // self.unit * self.unit_codes
        total = prod(self._packed.shape)
        last = total if start + count >= self.state.count else first + count // self.unit * self.unit_codes
        return self._packed.read(first, last).view(torch.uint8)


def _as_stored(part: StoredTensor) -> TensorSpec:
    return TensorSpec(part.name, part.dtype, part.shape)


def _has_room(state: QuantState, text: StoredTensor) -> bool:
    return text.shape[0] >= len(state_json(replace(state, offset=0.0))) - len("0.0") + OFFSET_BYTES


def _filled(text: bytes, size: int) -> torch.Tensor:
    """JSON as the bytes of a tensor, filled up with spaces."""
    import torch

    return torch.frombuffer(bytearray(text + b" " * (size - len(text))), dtype=torch.uint8)


def _values(state: QuantState, codes: torch.Tensor, absmax: torch.Tensor, start: int) -> torch.Tensor:
    from adapterkit.codecs.blockwise import decode_4bit

    count = min(2 * codes.numel(), state.count - start)
    return decode_4bit(codes, absmax, state.kind, state.blocksize, count, state.dtype.torch).float()


def state_json(state: QuantState) -> bytes:
    """The JSON of a weight, in the order in which bitsandbytes writes it."""
    found: dict[str, object] = {
        "quant_type": state.kind,
        "blocksize": state.blocksize,
        "dtype": state.dtype.torch_name,
        "shape": list(state.shape),
    }
    if state.nested_blocksize:
        found |= {
            "nested_blocksize": state.nested_blocksize,
            "nested_dtype": "float32",
            "nested_offset": state.offset,
        }
    return json.dumps(found).encode()


def config(layers: Layers, kind: str) -> dict[str, Any]:
    """``quantization_config`` as transformers 5 writes it of bitsandbytes; ``kind`` is ``nf4``, ``fp4`` or ``int8``."""
    four = kind != "int8"
    return {
        "_load_in_4bit": four,
        "_load_in_8bit": not four,
        "bnb_4bit_compute_dtype": layers.dtype if four else "float32",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": kind if four else "fp4",
        "bnb_4bit_use_double_quant": layers.double,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None if layers.skip is None else list(layers.skip),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "quant_method": "bitsandbytes",
    }


def _kind(name: str) -> Kind:
    def encoder(weight: str, shape: tuple[int, ...], dtype: DType, double: bool) -> Encoder:
        return FourBit(weight, shape, Grid(name, double), dtype)

    already = (f"{name} 64", f"{name} 64 double")
    how = partial(config, kind=name)
    return Kind(name, encoder, how, 4.0, already, conv1d=True)


BNB4 = Codec(
    "bitsandbytes 4-bit",
    ("bitsandbytes",),
    (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATE + "nf4", STATE + "fp4"),
    find,
    True,
    "bitsandbytes 0.50, functional.py: QuantState.as_dict; transformers 5, quantizers/quantizer_bnb_4bit.py",
    what="NF4 and FP4, every block size, with and without double quantization, any storage dtype",
    test="test_bitsandbytes.py: bitsandbytes",
    leave=listed("llm_int8_skip_modules"),
    fused=True,
    kinds=(_kind("nf4"), _kind("fp4")),
)
