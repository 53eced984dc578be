"""MLX: `weight` uint32 words of 2 to 8 bits, end to end along a row, with `scales` and `biases` per group of columns.

W = q * scale + bias, each step rounded to the dtype of the scales. The modes ``mxfp4``, ``mxfp8`` and ``nvfp4`` hold small
floats instead, with scales of 8 bits and no biases. ``config.json`` names group size, bits and mode under `quantization`,
for all layers and for single ones; they must fit the shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from adapterkit.codecs.codec import (
    AGAIN,
    FLOATS,
    Codec,
    Kind,
    Layers,
    Parts,
    StoredTensor,
    Weight,
    check_dtype,
    check_scales,
    check_shape,
    companion,
    setting,
    stems,
    whole,
    zero_scale,
)
from adapterkit.codecs.encode import Encoder, TensorSpec
from adapterkit.codecs.fp8 import factors
from adapterkit.dtypes import BF16, F16, F32, U8, U32, DType
from adapterkit.errors import CheckpointError
from adapterkit.values import dataclass

if TYPE_CHECKING:
    import torch

    from adapterkit.codecs.codec import Decode
    from adapterkit.codecs.tiles import Numbers

FLOAT_MODES = {"mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}  # columns of a group, bits
LEAST = 1e-7  # scale that MLX takes at least


def find(parts: Parts, config: Mapping[str, Any]) -> Iterator[Weight]:
    for stem in stems(parts, ".scales"):
        words = companion(parts, f"{stem}.weight", f"{stem}.scales", "MLX")
        check_dtype(words, ("U32",), "MLX")
        own = config.get(stem)
        asked = own if isinstance(own, Mapping) else config
        mode = setting(asked, "mode", str, default="affine")
        if mode in FLOAT_MODES:
            yield _floats(parts, stem, words, mode)
        elif mode == "affine":
            size = setting(asked, "group_size", int, default=64)
            yield _affine(parts, stem, words, setting(asked, "bits", int, default=4), size)
        else:
            raise CheckpointError(
                f"MLX quantization in mode '{mode}' is not known", f"adapterkit reads affine, {', '.join(FLOAT_MODES)}"
            )


def _shape(words: StoredTensor, bits: int, size: int, scales: StoredTensor) -> tuple[int, ...]:
    """The shape of the decoded weight.

    Raises:
        CheckpointError: bits, groups and shapes do not fit.
    """
    if bits not in (2, 3, 4, 5, 6, 8) or size <= 0 or len(words.shape) < 2 or words.shape[-1] * 32 % bits:
        raise CheckpointError(f"'{words.name}' is {list(words.shape)}, which is no MLX weight of {bits} bits", AGAIN)
    columns = words.shape[-1] * 32 // bits
    check_shape(scales, (*words.shape[:-1], -(-columns // size)), f"MLX of {bits} bits in groups of {size}")
    return (*words.shape[:-1], columns)


def _affine(parts: Parts, stem: str, words: StoredTensor, bits: int, size: int) -> Weight:
    scales = check_dtype(parts[f"{stem}.scales"], FLOATS, "MLX")
    biases = companion(parts, f"{stem}.biases", words.name, "MLX")
    shape = _shape(words, bits, size, scales)
    check_dtype(check_shape(biases, scales.shape, "a bias per scale"), FLOATS, "MLX")

    def numbers() -> Numbers:
        return _affine_numbers(bits, scales.dtype)

    def decoded(codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        assert bias is not None
        return codes.to(scale.dtype) * scale + bias

    parts_of = (words, scales, biases)
    how = _affine_words(bits, size)
    return _weight(f"{stem}.weight", shape, bits, size, parts_of, numbers, decoded, lambda scale: scale, how)


def _floats(parts: Parts, stem: str, words: StoredTensor, mode: str) -> Weight:
    size, bits = FLOAT_MODES[mode]
    scales = check_dtype(parts[f"{stem}.scales"], ("U8",), "MLX")
    shape = _shape(words, bits, size, scales)

    def meant(scale: torch.Tensor) -> torch.Tensor:
        import torch

        return scale.view(torch.float8_e4m3fn).float() if mode == "nvfp4" else factors(scale)

    def decoded(codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        import torch

        from adapterkit.codecs.bits import E2M1

        table = torch.tensor(E2M1) if bits == 4 else torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
        return table.to(codes.device)[codes.int()] * meant(scale)

    def numbers() -> Numbers:
        return _float_numbers(mode, decoded)

    return _weight(f"{stem}.weight", shape, bits, size, (words, scales), numbers, decoded, meant, f"mlx {mode}")


def _weight(
    name: str,
    shape: tuple[int, ...],
    bits: int,
    size: int,
    parts: tuple[StoredTensor, ...],
    numbers: Callable[[], Numbers],
    decoded: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor],
    meant: Callable[[torch.Tensor], torch.Tensor],
    how: str,
) -> Weight:
    words, scales = parts[:2]
    rows, columns, stored = prod(shape[:-1]), shape[-1], words.shape[-1]
    across = scales.shape[-1]
    dtype = scales.dtype if len(parts) == 3 else BF16

    def read(first: int, last: int) -> torch.Tensor:
        import torch

        from adapterkit.codecs.bits import unpack

        found = words.read(first * stored, last * stored).view(torch.int32).view(-1, stored)
        return unpack(found, bits, columns)

    def load() -> Decode:
        factor = whole(scales).view(rows, across)
        check_scales(meant(factor), scales)
        bias = check_scales(whole(parts[2]).view(rows, across), parts[2]) if len(parts) == 3 else None
        empty = bias is not None and bool((factor == 0).any())

        def decode(start: int, stop: int) -> torch.Tensor:
            first, last = start // columns, stop // columns
            codes = read(first, last).view(last - first, across, size)
            part = slice(first, last)
            if empty and bool(((codes != 0).any(2) & (factor[part] == 0)).any()):
                raise zero_scale(scales.name)
            found = decoded(codes, factor[part, :, None], None if bias is None else bias[part, :, None])
            return found.to(dtype.torch).view(-1)

        return decode

    def encoder() -> Encoder:
        import torch

        from adapterkit.codecs.bits import pack, unpack
        from adapterkit.codecs.tiles import Held, Shape, Tiles

        def complete(held: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
            return {part.name: tensor.reshape(-1) for part, tensor in zip(parts[1:], held, strict=True)}

        return Tiles(
            tuple(TensorSpec(part.name, part.dtype, part.shape) for part in parts),
            Shape(rows, columns, rows, (1, size), across),
            numbers,
            lambda codes: pack(codes.int(), bits).view(torch.uint32),
            lambda found: unpack(found.view(torch.int32).view(-1, stored), bits, columns),
            complete,
            Held(
                lambda: read,
                lambda: whole(scales).view(rows, across),
                None if len(parts) < 3 else lambda: whole(parts[2]).view(rows, across),
            ),
            row_codes=stored,
        )

    memory = 8 * rows * across
    return Weight(name, shape, dtype, parts, how, columns, load, memory, encoder if columns % size == 0 else None)


def _affine_words(bits: int, size: int) -> str:
    return f"mlx {bits} bit, groups of {size}"


def _affine_numbers(bits: int, dtype: DType, *, wide: bool = False) -> Numbers:
    """MLX's rule (`quantize`, mode affine): the end of the range that is farther from zero is one of the values, and so is
    zero where that fits.

    Args:
        wide: codes are for the scale before it is rounded to ``dtype``, as MLX takes it; else for the one that is stored.
    """
    import torch

    from adapterkit.codecs.tiles import Numbers

    most, stored = (1 << bits) - 1, dtype.torch

    def choose(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        below = low.abs() > high.abs()
        scale = ((high - low) / most).clamp(min=LEAST)
        scale = torch.where(below, scale, -scale)
        edge = torch.where(below, low, high)
        first = torch.round(edge / scale)
        some = first != 0
        scale = torch.where(some, edge / torch.where(some, first, 1.0), scale)
        return scale.to(stored), torch.where(some, edge, 0.0).to(stored), scale if wide else None

    def code(
        values: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, times: torch.Tensor | None
    ) -> torch.Tensor:
        assert bias is not None
        return torch.round((values - bias.float()) / (scale.float() if times is None else times)).clamp(0, most).int()

    def value(codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        assert bias is not None
        return (codes.to(scale.dtype) * scale + bias).float()

    return Numbers(choose, code, value)


def _float_numbers(
    mode: str, decoded: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
) -> Numbers:
    """MLX's rule for its float modes: scale = absmax / largest number, up to a power of two, or to FP8; zero has no sign."""
    import torch

    from adapterkit.codecs.bits import to_e2m1
    from adapterkit.codecs.tiles import Numbers

    largest = 448.0 if mode == "mxfp8" else 6.0

    def choose(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        scale = torch.maximum(-low, high) / largest
        if mode == "nvfp4":
            return scale.clamp(max=448.0).to(torch.float8_e4m3fn).view(torch.uint8), None, None
        exponent = torch.where(scale > 0, scale.clamp(min=torch.finfo(torch.float32).tiny).log2().ceil(), 0.0)
        return (exponent + 127).clamp(0, 254).to(torch.uint8), None, None

    def code(
        values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, times: torch.Tensor | None
    ) -> torch.Tensor:
        meant = scale.view(torch.float8_e4m3fn).float() if mode == "nvfp4" else factors(scale)
        found = torch.where(meant > 0, values / torch.where(meant > 0, meant, 1.0), 0.0)
        if mode == "mxfp8":
            return found.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).int()
        codes = to_e2m1(found).int()
        return torch.where(codes == 8, 0, codes)

    def value(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        return decoded(codes, scale, zero)

    return Numbers(choose, code, value)


@dataclass(frozen=True)
class MlxNumbers:
    """How MLX quantizes a layer: bits of a code, columns of a group, and its word for the numbers."""

    bits: int
    size: int
    mode: str = "affine"


def new(name: str, shape: tuple[int, ...], dtype: DType, double: bool, *, numbers: MlxNumbers) -> Encoder | None:
    """What writes a weight as `mx.quantize` does: ``[..., columns]`` in groups of columns.

    None for one that does not fit: no whole groups, or no floats. Of stacked experts each row is a row.
    """
    bits, size, mode = numbers.bits, numbers.size, numbers.mode
    if len(shape) < 2 or shape[-1] % size or dtype not in (BF16, F16, F32):
        return None
    import torch

    from adapterkit.codecs.bits import E2M1, pack, unpack
    from adapterkit.codecs.tiles import Shape, Tiles

    stem, columns, rows = name.removesuffix(".weight"), shape[-1], prod(shape[:-1])
    stored, across = columns * bits // 32, columns // size
    affine = mode == "affine"
    scale = TensorSpec(f"{stem}.scales", dtype if affine else U8, (*shape[:-1], across))
    made = [TensorSpec(f"{stem}.weight", U32, (*shape[:-1], stored)), scale]
    if affine:
        made.append(TensorSpec(f"{stem}.biases", dtype, scale.shape))

    def decoded(codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        table = torch.tensor(E2M1) if bits == 4 else torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
        return table.to(codes.device)[codes.int()] * (
            scale.view(torch.float8_e4m3fn).float() if mode == "nvfp4" else factors(scale)
        )

    def complete(held: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        return {spec.name: tensor.reshape(-1) for spec, tensor in zip(made[1:], held, strict=True)}

    return Tiles(
        tuple(made),
        Shape(rows, columns, rows, (1, size), across),
        lambda: _affine_numbers(bits, dtype, wide=True) if affine else _float_numbers(mode, decoded),
        lambda codes: pack(codes.int(), bits).view(torch.uint32),
        lambda found: unpack(found.view(torch.int32).view(-1, stored), bits, columns),
        complete,
        row_codes=stored,
    )


def _said(layers: Layers, *, numbers: MlxNumbers) -> dict[str, Any]:
    return {"group_size": numbers.size, "bits": numbers.bits, "mode": numbers.mode}


def _is(config: Mapping[str, Any], *, numbers: MlxNumbers) -> bool:
    """Whether a `quantization` has these numbers for all layers that it does not name."""
    found = (config.get("bits"), config.get("group_size"), config.get("mode", "affine"))
    return found == (numbers.bits, numbers.size, numbers.mode)


def _kind(name: str, how: str, numbers: MlxNumbers) -> Kind:
    return Kind(
        name,
        partial(new, numbers=numbers),
        partial(_said, numbers=numbers),
        float(numbers.bits),
        (how,),
        said=partial(_is, numbers=numbers),
        program="mlx",
    )


KINDS = (
    *(
        _kind(f"mlx-{bits}bit{end}", _affine_words(bits, size), MlxNumbers(bits, size))
        for size, end in ((64, ""), (32, "-g32"))
        for bits in (2, 3, 4, 5, 6, 8)
    ),
    *(_kind(f"mlx-{mode}", f"mlx {mode}", MlxNumbers(bits, size, mode)) for mode, (size, bits) in FLOAT_MODES.items()),
)


def _leave(config: dict[str, Any], names: Sequence[str], plain: Sequence[str]) -> None:
    config.update(dict.fromkeys(names, False))


MLX = Codec(
    "MLX",
    ("mlx",),
    (".biases",),
    find,
    False,
    "as mlx 0.32's output shows; mlx-lm 0.32, utils.py: load_model",
    what="affine of 2, 3, 4, 5, 6 and 8 bits, mxfp4, mxfp8, nvfp4; single layers in other sizes",
    test="test_mlx_weights.py: mlx",
    leave=_leave,
    kinds=KINDS,
)
