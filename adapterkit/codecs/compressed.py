"""compressed-tensors (llm-compressor, vLLM): packed integers, int8, FP8, NVFP4, MXFP4 and MXFP8.

`weight_packed` int32 holds integers of 2 to 8 bits end to end along a row, `weight_shape` the real shape; other formats
keep `weight` in int8 or float8. `weight_scale` is per tensor, row, group of columns or block; a `weight_zero_point` is
packed down the rows. NVFP4 divides its FP8 scales by `weight_global_scale`. What is not written in the tensors is taken
from the ``config_groups`` (bits, block sizes) and must fit the shapes, so that no module pattern has to be matched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from math import floor, log2, prod
from typing import TYPE_CHECKING, Any

from adapterkit.codecs.codec import (
    AGAIN,
    FLOATS,
    INTEGERS,
    Codec,
    Kind,
    Layers,
    Parts,
    StoredTensor,
    Weight,
    block_size,
    check_dtype,
    check_shape,
    companion,
    listed,
    setting,
    stems,
)
from adapterkit.codecs.encode import Encoder, InStep, TensorSpec
from adapterkit.codecs.fp8 import (
    FLOAT8,
    POWERS,
    as_bytes,
    beside,
    describe,
    e2m1_numbers,
    exponent_bytes,
    factors,
    float8_values,
    float8_written,
    pairs_written,
    scale_over,
    unpack_floats,
    unpack_pairs,
)
from adapterkit.codecs.scaled import ScaledWeight, Written, check_like, check_over, grid_of, grid_scales
from adapterkit.dtypes import BF16, DTYPES, F32, DType
from adapterkit.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from adapterkit.codecs.tiles import Numbers, Tiles

FORMATS = (
    "dense",
    "naive-quantized",
    "int-quantized",
    "float-quantized",
    "pack-quantized",
    "mixed-precision",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
)


def find(parts: Parts, config: Mapping[str, Any]) -> Iterator[Weight]:
    every = setting(config, "config_groups", dict, default={})
    groups = [setting(every, name, dict, default={}) for name in every]
    schemes = [setting(group, "weights", dict, default={}) for group in groups]
    sparse = setting(config, "sparsity_config", dict, default={})
    named = [setting(one, "format", str) for one in (config, *groups, sparse)]
    unknown = next((name for name in named if name is not None and name not in FORMATS), None)
    if unknown is not None:
        raise CheckpointError(
            f"compressed-tensors format '{unknown}' is not one that adapterkit reads", f"it reads {', '.join(FORMATS)}"
        )
    for stem in stems(parts, ".weight_packed"):
        packed = parts[f"{stem}.weight_packed"]
        scale = companion(parts, f"{stem}.weight_scale", packed.name, "compressed-tensors")
        more = beside(parts, packed.name)
        check_dtype(scale, (*FLOATS, *FLOAT8, "U8", "F8_E8M0"), "a scale")
        if packed.dtype.code == "I32":
            yield _integers(f"{stem}.weight", packed, scale, more, schemes)
        else:
            yield _fp4(f"{stem}.weight", packed, scale, more)
    for stem in stems(parts, ".weight_scale"):
        codes = parts.get(f"{stem}.weight")
        if codes is not None and codes.dtype.code in ("I8", *FLOAT8):
            scale = check_dtype(parts[f"{stem}.weight_scale"], (*FLOATS, *FLOAT8, "U8", "F8_E8M0"), "a scale")
            yield _plain(codes, scale, beside(parts, codes.name), schemes)


def _natural(scale: StoredTensor) -> DType:
    """compressed-tensors computes in the dtype of the scales, and in bfloat16 where those are powers of two."""
    return scale.dtype if scale.dtype.is_float and scale.dtype.bits >= 16 else BF16


def _named(more: tuple[StoredTensor, ...], leaf: str) -> StoredTensor | None:
    return next((part for part in more if part.name.endswith("." + leaf)), None)


def _plain(
    codes: StoredTensor, scale: StoredTensor, more: tuple[StoredTensor, ...], schemes: list[Mapping[str, Any]]
) -> Weight:
    blocks = [block for scheme in schemes for block in block_size(scheme, "block_structure")]
    block, grid = grid_of(codes.shape, scale, blocks)
    zero, groups = _named(more, "weight_zero_point"), _named(more, "weight_g_idx")
    if zero is not None:
        check_like(zero, scale.shape, "a zero point per scale")
    written: Written | None
    if codes.dtype.code == "I8":
        points = None if zero is None else (zero, lambda found: found.to(zero.dtype.torch))
        written = Written(
            lambda: integers(8, scale.dtype, symmetric=zero is None),
            lambda rows: rows.to(codes.dtype.torch),
            lambda rows: rows.float(),
            scale,
            points,
        )
    else:
        written = None if zero is not None else float8_written(codes, scale, lambda: float8(codes.dtype, scale.dtype))
    return ScaledWeight(
        codes.name,
        codes.shape,
        _natural(scale),
        f"{codes.dtype} {describe(block, codes.shape)}",
        codes,
        unpack_floats,
        block,
        grid,
        lambda: grid_scales(scale, grid),
        (codes, scale, *more),
        None if zero is None else lambda: grid_scales(zero, grid),
        groups,
        written,
    ).weight()


def float8(codes: DType, scale: DType) -> Numbers:
    """float8 by compressed-tensors' rule: scale = absmax / 448 (never zero), codes of W / scale; MXFP8 in powers of two."""
    import torch

    from adapterkit.codecs.tiles import Numbers

    most = torch.finfo(codes.torch).max

    def choose(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        largest = torch.maximum(-low, high)
        if scale.bits == 8:
            return exponent_bytes(mx_exponents(largest, most), scale), None, None
        found = largest / most
        found = torch.where(found > 0, found, torch.finfo(scale.torch).eps)
        return found.to(scale.torch), None, None

    def code(
        values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, times: torch.Tensor | None
    ) -> torch.Tensor:
        return as_bytes((values / factors(scale)).clamp_(-most, most).to(codes.torch))

    return Numbers(choose, code, partial(float8_values, codes))


def mx_exponents(largest: torch.Tensor, most: float) -> torch.Tensor:
    """compressed-tensors' exponent of a power-of-two scale (`generate_mx_scales`): absmax rounded to a power of two as e2m1
    would round its mantissa, less the exponent of the format's largest number."""
    import torch

    bits = largest.float().view(torch.int32)
    power = ((bits + (1 << 21)) & ~((1 << 23) - 1)).view(torch.float32)
    return power.log2().floor() - floor(log2(most))


def integers(bits: int, scale: DType, *, symmetric: bool) -> Numbers:
    """Integers by compressed-tensors' rule (`calculate_qparams`): codes from -2^(bits-1), zero always among the values.

    Symmetric: scale = absmax / ((2^bits - 1) / 2). Otherwise scale = (max - min) / (2^bits - 1), and the zero point is
    where min falls. A scale is never zero.
    """
    import torch

    from adapterkit.codecs.tiles import Numbers

    least, most = -(1 << (bits - 1)), (1 << (bits - 1)) - 1

    def choose(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        found = torch.maximum(-low, high) / ((most - least) / 2) if symmetric else (high - low) / (most - least)
        zero = None if symmetric else torch.nan_to_num(least - low / found, nan=0.0).clamp(least, most).round()
        found = torch.where(found > 0, found, torch.finfo(scale.torch).eps)
        return found.to(scale.torch), zero, None

    def code(
        values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, times: torch.Tensor | None
    ) -> torch.Tensor:
        found = values / scale.float()
        return (found if zero is None else found + zero).clamp(least, most).round()

    def value(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        return (codes.float() if zero is None else codes.float() - zero) * scale.float()

    return Numbers(choose, code, value)


def _integers(
    name: str,
    packed: StoredTensor,
    scale: StoredTensor,
    more: tuple[StoredTensor, ...],
    schemes: list[Mapping[str, Any]],
) -> Weight:
    what = "packed integers"
    stored = _named(more, "weight_shape")
    if stored is None:
        raise CheckpointError(f"'{packed.name}' has no weight_shape beside it", AGAIN)
    size = check_dtype(stored, INTEGERS, what).dtype.bits // 8
    raw = check_shape(stored, (len(packed.shape),), what).raw()
    shape = tuple(int.from_bytes(raw[at : at + size], "little", signed=True) for at in range(0, len(raw), size))
    if len(shape) != 2 or min(shape) <= 0:
        raise CheckpointError(f"'{stored.name}' says {list(shape)}, which is no matrix", AGAIN)
    named = sorted({setting(scheme, "num_bits", int, default=0) for scheme in schemes} - {0}) or [4, 8]
    fitting = [bits for bits in named if 1 < bits <= 8 and packed.shape == (shape[0], -(-shape[1] * bits // 32))]
    if len(fitting) != 1:
        raise CheckpointError(
            f"'{packed.name}' is {list(packed.shape)}, which is no {'x'.join(map(str, shape))} weight of "
            f"{' or '.join(map(str, named))} bits",
            AGAIN,
        )
    bits: int = fitting[0]
    block, grid = grid_of(shape, scale, [])
    zero, groups = _named(more, "weight_zero_point"), _named(more, "weight_g_idx")
    middle = 1 << (bits - 1)

    def unpack(rows: torch.Tensor) -> torch.Tensor:
        from adapterkit.codecs.bits import unpack

        return (unpack(rows, bits, shape[1]) - middle).float()

    def zeros() -> torch.Tensor:
        from adapterkit.codecs.bits import floats, unpack
        from adapterkit.codecs.codec import whole

        assert zero is not None
        if zero.dtype.code != "I32":
            return floats(whole(zero)).reshape(-1, grid[1])
        check_shape(zero, (-(-grid[0] * bits // 32), grid[1]), what)
        return (unpack(whole(zero).T, bits, grid[0]).T - middle).float()

    def pack_zeros(found: torch.Tensor) -> torch.Tensor:
        from adapterkit.codecs.bits import pack

        assert zero is not None
        if zero.dtype.code != "I32":
            return found.to(zero.dtype.torch)
        return pack((found + middle).int().T.contiguous(), bits).T.contiguous()

    def pack_rows(found: torch.Tensor) -> torch.Tensor:
        from adapterkit.codecs.bits import pack

        return pack((found + middle).int(), bits)

    if groups is not None and prod(groups.shape) != shape[1]:
        check_shape(groups, (shape[1],), what)
    written = Written(
        lambda: integers(bits, scale.dtype, symmetric=zero is None),
        pack_rows,
        unpack,
        scale,
        None if zero is None else (zero, pack_zeros),
    )
    return ScaledWeight(
        name,
        shape,
        _natural(scale),
        f"int{bits} {describe(block, shape)}",
        packed,
        unpack,
        block,
        grid,
        lambda: grid_scales(scale, grid),
        (packed, scale, *more),
        None if zero is None else zeros,
        groups,
        written if scale.dtype.bits >= 16 else None,
    ).weight()


def _fp4(name: str, packed: StoredTensor, scale: StoredTensor, more: tuple[StoredTensor, ...]) -> Weight:
    check_dtype(packed if len(packed.shape) == 3 else check_shape(packed, (-1, -1), "FP4"), ("U8", "I8", "F4"), "FP4")
    shape = (*packed.shape[:-1], packed.shape[-1] * 2)
    block, grid = grid_of(shape, scale, [])
    over = check_over(_named(more, "weight_global_scale"), shape)
    if (scale.dtype.code == "F8_E4M3") != (over is not None):
        what = "without" if over is None else "with"
        raise CheckpointError(
            f"'{packed.name}' has scales in {scale.dtype} {what} a weight_global_scale, which is neither NVFP4 nor MXFP4",
            AGAIN,
        )

    def numbers(line: torch.Tensor | None = None) -> Numbers:
        return e2m1_numbers(scale.dtype, scale_over(over, shape, line), multiply=False, power=mx_exponents)

    return ScaledWeight(
        name,
        shape,
        BF16,
        f"{'mxfp4' if over is None else 'nvfp4'} {describe(block, shape)}",
        packed,
        unpack_pairs,
        block,
        grid,
        lambda: grid_scales(scale, grid, over, divide=True),
        (packed, scale, *more),
        written=pairs_written(packed, scale, numbers, over, multiply=False),
    ).weight()


GROUP = 128  # columns of llm-compressor's W4A16
# New weights of four bits: what their largest magnitude is multiplied with to find the scale of the least squared error.
# Those of INT4 come nearer than the 20 steps of llm-compressor's `memoryless_mse`; FP8 scales that differ by less than 6.6 %
# are often the same, so that these are all from 0.8 to 1.7, as in `nvfp4_expanded_mse`; MX scales are powers of two.
INT_SEARCH, INT_FINER = (1.0, 0.92, 0.84, 0.76), (-0.05, -0.025, 0.025, 0.05)
FP8_SEARCH = (1.0, *(1.066**step for step in (-3, -2, -1, 1, 2, 3, 4, 5, 6, 7, 8)))
F8, U8, I32, I64 = (DTYPES[code] for code in ("F8_E4M3", "U8", "I32", "I64"))


def _new(
    name: str,
    shape: tuple[int, ...],
    codes: tuple[str, DType, int],
    scale: DType,
    block: tuple[int, int],
    number: Callable[[], Numbers],
    pack: Callable[[torch.Tensor], torch.Tensor],
    unpack: Callable[[torch.Tensor], torch.Tensor],
    more: Mapping[str, tuple[DType, tuple[int, ...], Callable[[], torch.Tensor]]] | None = None,
) -> Tiles:
    """A new weight in the layout of compressed-tensors; ``codes`` are the end of their name, dtype and columns."""
    from adapterkit.codecs.tiles import Shape, Tiles

    rows, columns = shape
    stem = name.removesuffix("weight")
    end, dtype, stored = codes
    grid = -(-rows // block[0]), -(-columns // block[1])
    others = {f"{stem}{leaf}": one for leaf, one in (more or {}).items()}

    def complete(held: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        made = {other: value() for other, (_, _, value) in others.items()}
        return {f"{stem}weight_scale": held[0].reshape(-1), **made}

    return Tiles(
        (
            TensorSpec(f"{stem}{end}", dtype, (rows, stored)),
            TensorSpec(f"{stem}weight_scale", scale, grid),
            *(TensorSpec(other, kind, size) for other, (kind, size, _) in others.items()),
        ),
        Shape(rows, columns, rows, block, grid[1]),
        number,
        pack,
        lambda found: unpack(found.view(-1, stored)),
        complete,
        row_codes=stored,
    )


def new_blocks(name: str, shape: tuple[int, ...], dtype: DType, double: bool) -> Encoder | None:
    """FP8 in blocks of 128x128, of which the last rows may be short.

    None for columns that are no multiple of 128: what a layer reads is quantized in groups of 128 while the model runs, and
    compressed-tensors (0.20), vLLM and SGLang refuse another width.
    """
    if shape[1] % 128:
        return None
    return _new(
        name,
        shape,
        ("weight", F8, shape[1]),
        dtype,
        (128, 128),
        lambda: float8(F8, dtype),
        lambda rows: rows.contiguous().view(F8.torch),
        as_bytes,
    )


def new_rows(name: str, shape: tuple[int, ...], dtype: DType) -> Encoder:
    """FP8 with a scale per row."""
    return _new(
        name,
        shape,
        ("weight", F8, shape[1]),
        dtype,
        (1, shape[1]),
        lambda: float8(F8, dtype),
        lambda rows: rows.contiguous().view(F8.torch),
        as_bytes,
    )


def new_int4(name: str, shape: tuple[int, ...], dtype: DType, double: bool) -> Encoder | None:
    """INT4 in groups of 128 columns; None where those do not divide the columns, which compressed-tensors refuses."""
    if shape[1] % GROUP:
        return None
    from adapterkit.codecs import bits

    def value() -> torch.Tensor:
        import torch

        return torch.tensor(shape)

    return _new(
        name,
        shape,
        ("weight_packed", I32, shape[1] // 8),
        dtype,
        (1, GROUP),
        lambda: replace(integers(4, dtype, symmetric=True), search=INT_SEARCH, finer=INT_FINER),
        lambda rows: bits.pack((rows + 8).int(), 4),
        lambda rows: (bits.unpack(rows, 4, shape[1]) - 8).float(),
        {"weight_shape": (I64, (2,), value)},
    )


def new_mxfp4(name: str, shape: tuple[int, ...], dtype: DType, double: bool) -> Encoder | None:
    """MXFP4; None where groups of 32 do not divide the columns."""
    if shape[1] % 32:
        return None
    from adapterkit.codecs import bits

    return _new(
        name,
        shape,
        ("weight_packed", U8, shape[1] // 2),
        U8,
        (1, 32),
        lambda: replace(e2m1_numbers(U8, None, multiply=False, power=mx_exponents), search=POWERS),
        bits.pair,
        bits.unpair,
    )


def new_nvfp4(name: str, shape: tuple[int, ...], dtype: DType, double: bool) -> Encoder | None:
    """NVFP4; None where groups of 16 do not divide the columns."""
    return None if shape[1] % 16 else Nvfp4(name, shape)


class Nvfp4(InStep):
    """A new NVFP4 weight, whose FP8 scales fill their range: global scale = 448 * 6 / absmax (`generate_gparam`).

    The absmax is that of all weights that servers run as one, which have to share it; see `InStep`.
    """

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        from adapterkit.codecs import bits

        self._over: float | None = None

        def value() -> torch.Tensor:
            import torch

            return torch.tensor([self._scale()])

        self.tiles = _new(
            name,
            shape,
            ("weight_packed", U8, shape[1] // 2),
            F8,
            (1, 16),
            lambda: replace(e2m1_numbers(F8, self._scale(), multiply=False), search=FP8_SEARCH),
            bits.pair,
            bits.unpair,
            {"weight_global_scale": (F32, (1,), value)},
        )
        self.made, self.unit, self.unit_codes = self.tiles.made, self.tiles.unit, self.tiles.unit_codes
        self.memory = self.tiles.memory

    def _scale(self) -> float:
        if self._over is None:
            import torch

            assert self.largest is not None
            found = 448.0 * 6.0 / torch.tensor(self.largest()).clamp(min=torch.finfo(torch.float32).tiny)
            self._over = float(torch.nan_to_num(found, nan=1.0, posinf=1.0))
        return self._over

    def encode(self, start: int, new: torch.Tensor, old: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        return self.tiles.encode(start, new, old)

    def finish(self, held: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        return self.tiles.finish(held)

    def values(self, start: int, encoded: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return self.tiles.values(start, encoded)


def _some_nvfp4(name: str, shape: tuple[int, ...], dtype: DType, double: bool) -> Encoder | None:
    """Some rows of a weight, as if their absmax were 1: what FP8 scales do to them hardly depends on it."""
    found = new_nvfp4(name, shape, dtype, double)
    if isinstance(found, Nvfp4):
        found.largest = lambda: 1.0
    return found


def _config(layers: Layers, form: str, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> dict[str, Any]:
    """``quantization_config`` as llm-compressor saves it."""
    usual = {"symmetric": True, "dynamic": False, "actorder": None, "observer": "memoryless_minmax"}
    group = {
        "targets": ["Linear"],
        "weights": {**usual, **weights},
        "input_activations": None if inputs is None else {**usual, "dynamic": True, "observer": None, **inputs},
        "output_activations": None,
        "format": form,
    }
    return {
        "config_groups": {"group_0": group},
        "format": form,
        "global_compression_ratio": None,
        "ignore": sorted({*layers.left, *(layers.skip or ())}),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


# core_model_loading.py of 5.24 collects `weight_packed` for the stacks of experts, and finds none.
_LEFT = (
    "transformers (5.24) does not load experts in 16 bits beside layers of this format where they are stored one by one"
)
_SEARCHED = {"observer": "memoryless_mse"}
_FLOAT4 = {**_SEARCHED, "num_bits": 4, "type": "float"}
KINDS = (
    Kind(
        "fp8-block",
        new_blocks,
        lambda layers: _config(
            layers,
            "float-quantized",
            {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
            {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128},
        ),
        8.0,
        ("fp8 128x128",),
        experts=True,
        # The same conversion multiplies codes by scales as they are: right for one block, an error for more.
        of_experts="transformers (5.24) does not load experts of more than one block of 128x128; write mxfp4 or int4 for it",
    ),
    Kind(
        "int4",
        new_int4,
        lambda layers: _config(
            layers, "pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}, None
        ),
        4.0,
        ("int4 per 128", "int4 per row"),
        experts=True,
        of_experts_left=_LEFT,
    ),
    Kind(
        "nvfp4",
        new_nvfp4,
        lambda layers: _config(
            layers,
            "nvfp4-pack-quantized",
            {**_FLOAT4, "strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"},
            None,
        ),
        4.0,
        ("nvfp4 per 16",),
        together=True,
        some=_some_nvfp4,
        experts=True,
        of_experts_left=_LEFT,
        # integrations/compressed_tensors.py of 5.24: its conversion of experts takes `weight_scale` alone.
        of_experts="transformers (5.24) leaves out weight_global_scale where it stacks experts, without a word, and computes "
        "other values; write mxfp4 or int4 for it",
    ),
    Kind(
        "mxfp4",
        new_mxfp4,
        lambda layers: _config(
            layers,
            "mxfp4-pack-quantized",
            {**_FLOAT4, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
            None,
        ),
        4.0,
        ("mxfp4 per 32",),
        experts=True,
        of_experts_left=_LEFT,
    ),
)

COMPRESSED = Codec(
    "compressed-tensors",
    ("compressed-tensors", "compressed_tensors", "sparseml"),
    (".weight_packed", ".weight_shape", ".weight_zero_point", ".weight_g_idx", ".weight_global_scale"),
    find,
    False,
    "compressed-tensors 0.20, compressors/: pack_quantized, naive_quantized, nvfp4, mxfp4, mxfp8",
    what="packed integers of 2 to 8 bits (zero points, g_idx), int8, FP8, NVFP4, MXFP4, MXFP8",
    test="test_scaled.py: compressed-tensors",
    leave=listed("ignore"),
    kinds=KINDS,
    elsewhere=("awq", "gptq"),
)
