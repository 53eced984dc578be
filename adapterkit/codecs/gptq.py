"""GPTQ and AWQ: integers with a scale and a zero point per group of inputs and per output, stored transposed.

GPTQ: `qweight` int32 ``[in*bits/32, out]``, values end to end down a column; `qzeros` ``[groups, out*bits/32]`` along
a row; `scales` ``[groups, out]``; `g_idx` ``[in]`` the group of each input. Files of version 1 store zero points less
one. AWQ (gemm): `qweight` ``[in, out/8]`` and `qzeros` ``[groups, out/8]``, eight 4-bit values per word in the order
0 2 4 6 1 3 5 7. W[o, i] = scales[g, o] * (q[i, o] - z[g, o]), g the group of input i.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterkit.codecs.codec import (
    AGAIN,
    FLOATS,
    INTEGERS,
    Codec,
    Parts,
    StoredTensor,
    Weight,
    check_dtype,
    check_index,
    check_scales,
    check_shape,
    companion,
    listed,
    setting,
    stems,
    whole,
    zero_scale,
)
from adapterkit.codecs.encode import TensorSpec
from adapterkit.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from adapterkit.codecs.codec import Decode
    from adapterkit.codecs.encode import Encoder
    from adapterkit.codecs.tiles import Numbers

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Packing:
    """How numbers of one format lie in words.

    Attributes:
        values: columns of the stored words, first and last row of the weight, to numbers ``[rows, inputs]``.
        zeros: stored zero points to numbers ``[groups, outputs]``.
        pack: numbers ``[rows, inputs]`` to words of which columns are made.
        unpack: the reverse.
        pack_zeros: numbers ``[groups, outputs]`` to stored zero points.
        numbers: what is done with a group.
        step: rows of the weight that are packed together.
    """

    values: Callable[[torch.Tensor, int, int], torch.Tensor]
    zeros: Callable[[torch.Tensor], torch.Tensor]
    pack: Callable[[torch.Tensor], torch.Tensor]
    unpack: Callable[[torch.Tensor], torch.Tensor]
    pack_zeros: Callable[[torch.Tensor], torch.Tensor]
    numbers: Callable[[], Numbers]
    step: int = 1


def find_gptq(parts: Parts, config: Mapping[str, Any]) -> Iterator[Weight]:
    said = _gptq_settings(config)
    off = 0 if said.version == 2 else 1
    for stem in stems(parts, ".qweight"):
        packed = check_shape(parts[f"{stem}.qweight"], (-1, -1), "GPTQ")
        words, out = packed.shape
        zeros = check_shape(companion(parts, f"{stem}.qzeros", packed.name, "GPTQ"), (-1, -1), "GPTQ")
        fitting = [bits for bits in said.bits if words * 32 % bits == 0 and zeros.shape[1] == -(-out * bits // 32)]
        if packed.dtype.code != "I32" or len(fitting) != 1:
            raise CheckpointError(
                f"'{packed.name}' ({packed.dtype}, {words} rows) with zero points {list(zeros.shape)} is no GPTQ of "
                f"{' or '.join(map(str, said.bits))} bits",
                AGAIN,
            )
        bits = fitting[0]
        rows = words * 32 // bits
        what = f"GPTQ of {bits} bits"
        scales = companion(parts, f"{stem}.scales", packed.name, what)
        check_shape(scales, (zeros.shape[0], out), what)
        check_dtype(zeros, ("I32",), what)
        check_dtype(scales, FLOATS, what)
        groups = parts.get(f"{stem}.g_idx")
        if groups is not None:
            check_dtype(check_shape(groups, (rows,), what), INTEGERS, what)
        elif zeros.shape[0] > 1 and config.get("desc_act") is True:
            raise CheckpointError(f"'{packed.name}' has no g_idx, and the config says that its order is another", AGAIN)
        size = _group_size(said.sizes, rows, zeros.shape[0], packed.name, ordered=groups is not None)
        packing = _gptq_packing(bits, rows, out, off, zeros, said.symmetric)
        yield _weight(stem, (out, rows), packed, zeros, scales, groups, size, packing, f"gptq {bits} bit")


@dataclass(frozen=True)
class GptqSettings:
    """What a config says of GPTQ weights, for the checkpoint and for single modules of it.

    Attributes:
        bits, sizes: of weights and groups, all that are named; each module has what fits its shapes.
        symmetric: by which scales are chosen; None where modules differ and their zero points tell.
        version: of stored zero points: 1 has them less one.
    """

    bits: tuple[int, ...]
    sizes: tuple[int, ...]
    symmetric: bool | None
    version: int


def _gptq_settings(config: Mapping[str, Any]) -> GptqSettings:
    """GPTQModel's ``dynamic`` and auto-round's ``extra_config`` give single modules other settings.

    Raises:
        CheckpointError: a layout or a setting that is not known.
    """
    form = setting(config, "checkpoint_format", str, default="").lower()
    if not form:
        other = str(config.get("format")).lower()  # GPTQModel takes that word too; other tools mean other things by it
        form = other if other in ("gptq_v2", "gptq_p", "marlin", "bitblas") else "gptq"
    if form not in ("gptq", "gptq_v2") or config.get("is_marlin_format"):
        form = "marlin" if config.get("is_marlin_format") else form
        raise CheckpointError(
            f"GPTQ in the layout '{form}' is not known", "adapterkit reads gptq and gptq_v2; give the 16-bit base"
        )
    layout = setting(config, "packing_format", str, default="auto_round:auto_gptq")
    if not layout.endswith("gptq"):
        raise CheckpointError(f"auto-round's packing '{layout}' is not known", "export it again as auto_gptq")
    others = [setting(config, key, dict, default={}) for key in ("dynamic", "extra_config")]
    single = [own for one in others for own in one.values() if isinstance(own, Mapping)]
    # A module that is not quantized may say 16 bits.
    named = (_bits(config), *(bits for own in single if (bits := _bits(own)) is not None and bits < 16))
    unknown = [bits for bits in named if bits not in (2, 3, 4, 8)]
    if unknown:
        raise CheckpointError(f"GPTQ weights of {unknown[0]} bits are not known", "adapterkit reads 2, 3, 4 and 8 bits")
    sizes = (_size(config, -1), *(size for own in single if (size := _size(own)) is not None))
    symmetric = setting(config, "sym", bool, default=True)
    alike = all(setting(own, "sym", bool, default=symmetric) is symmetric for own in single)
    bits_of = tuple(dict.fromkeys(bits for bits in named if bits is not None))
    return GptqSettings(bits_of, tuple(dict.fromkeys(sizes)), symmetric if alike else None, 2 if form[-1] == "2" else 1)


def _gptq_packing(bits: int, rows: int, out: int, off: int, stored: StoredTensor, symmetric: bool | None) -> Packing:
    """How GPTQ packs a module of ``out`` outputs and ``rows`` inputs; ``stored`` are its zero points."""

    def values(held: torch.Tensor, first: int, last: int) -> torch.Tensor:
        from adapterkit.codecs.bits import unpack

        return unpack(held[:, first:last].T, bits, rows)

    def zero_points(held: torch.Tensor) -> torch.Tensor:
        from adapterkit.codecs.bits import unpack

        # Version 1 wrote z - 1 in as many bits, so 0 became the largest value.
        found: torch.Tensor = (unpack(held, bits, out) + off) & ((1 << bits) - 1)
        return found

    def pack_rows(found: torch.Tensor) -> torch.Tensor:
        from adapterkit.codecs.bits import pack

        return pack(found.int(), bits)

    def unpack_rows(words: torch.Tensor) -> torch.Tensor:
        from adapterkit.codecs.bits import unpack

        return unpack(words, bits, rows)

    def pack_zeros(found: torch.Tensor) -> torch.Tensor:
        from adapterkit.codecs.bits import pack

        return pack((found.int() - off) & ((1 << bits) - 1), bits)

    def numbers() -> Numbers:
        middle = symmetric
        if middle is None:
            middle = bool((zero_points(whole(stored)) == 1 << (bits - 1)).all())
        return _gptq_numbers(bits, symmetric=middle)

    return Packing(values, zero_points, pack_rows, unpack_rows, pack_zeros, numbers)


def find_awq(parts: Parts, config: Mapping[str, Any]) -> Iterator[Weight]:
    form = setting(config, "version", str, default=setting(config, "checkpoint_format", str, default="gemm"))
    bits, version = _bits(config, 4), form.lower()
    if bits != 4 or version != "gemm":
        raise CheckpointError(f"AWQ '{version}' of {bits} bits is not known", "adapterkit reads gemm of 4 bits")
    scaled = next((name for name in parts if name.endswith(".act.scales")), None)
    if scaled is not None:
        raise CheckpointError(
            f"'{scaled}' divides what the activation gives (AutoAWQ's ScaledActivation), and the next layer is stored for that",
            "give the 16-bit base",
        )
    for stem in stems(parts, ".qweight"):
        packed = check_shape(parts[f"{stem}.qweight"], (-1, -1), "AWQ")
        rows, out = packed.shape[0], packed.shape[1] * 8
        zeros = check_shape(companion(parts, f"{stem}.qzeros", packed.name, "AWQ"), (-1, packed.shape[1]), "AWQ")
        scales = companion(parts, f"{stem}.scales", packed.name, "AWQ")
        check_shape(scales, (zeros.shape[0], out), "AWQ")
        for part, kinds in ((packed, ("I32",)), (zeros, ("I32",)), (scales, FLOATS)):
            check_dtype(part, kinds, "AWQ")
        size = _group_size((_size(config, -1),), rows, zeros.shape[0], packed.name)

        def values(held: torch.Tensor, first: int, last: int) -> torch.Tensor:
            return _awq(held[:, first // 8 : last // 8]).T

        packing = Packing(
            values,
            _awq,
            lambda found: _awq_words(found.T).T,
            lambda words: _awq(words.T).T,
            _awq_words,
            _awq_numbers,
            8,
        )
        yield _weight(stem, (out, rows), packed, zeros, scales, None, size, packing, "awq 4 bit")


def _awq(words: torch.Tensor) -> torch.Tensor:
    """``[k, n]`` words as ``[k, 8n]`` values."""
    import torch

    found: torch.Tensor = torch.stack([(words >> (4 * ORDER.index(i))) & 15 for i in range(8)], -1)
    return found.view(words.shape[0], -1)


def _awq_words(numbers: torch.Tensor) -> torch.Tensor:
    """The reverse of `_awq`."""
    import torch

    parts = numbers.int().contiguous().view(numbers.shape[0], -1, 8)
    found = torch.zeros(parts.shape[:2], dtype=torch.int32, device=parts.device)
    for index in range(8):
        found |= parts[:, :, index] << (4 * ORDER.index(index))
    return found


def _awq_numbers() -> Numbers:
    """AutoAWQ's `pseudo_quantize_tensor` with zero points: scale = (max - min) / 15, zero = -round(min / scale)."""

    def choose(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        scale = (high - low).clamp(min=1e-5) / 15
        return scale, (-(low / scale).round()).clamp(0, 15), None

    return _unsigned(choose, 15)


def _gptq_numbers(bits: int, *, symmetric: bool) -> Numbers:
    """AutoGPTQ's `Quantizer.find_params` without search: scale = (max - min) / (2^bits - 1), zero always among the values.

    Symmetric ones take min = -max and the middle as zero point.
    """
    import torch

    most = (1 << bits) - 1

    def choose(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        if symmetric:
            high = torch.maximum(-low, high)
            low = -high
        flat = low == high
        low, high = torch.where(flat, -1.0, low), torch.where(flat, 1.0, high)
        scale = (high - low) / most
        zero = torch.full_like(scale, (most + 1) / 2) if symmetric else (-low / scale).round()
        return scale, zero, None

    return _unsigned(choose, most)


def _unsigned(
    choose: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, None]], most: int
) -> Numbers:
    """Integers from 0 to ``most``: round(W / scale) + zero, with the scale as it is stored."""
    from adapterkit.codecs.tiles import Numbers

    def code(
        values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, times: torch.Tensor | None
    ) -> torch.Tensor:
        assert zero is not None
        return ((values / scale.float()).round() + zero).clamp(0, most)

    def value(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        assert zero is not None
        return (codes.float() - zero) * scale.float()

    return Numbers(choose, code, value)


def _bits(config: Mapping[str, Any], default: int | None = None) -> int | None:
    found: int | None = setting(config, "bits", int, default=setting(config, "w_bit", int, default=default))
    return found


def _size(config: Mapping[str, Any], default: int | None = None) -> Any:
    return setting(config, "group_size", int, default=setting(config, "q_group_size", int, default=default))


def _group_size(named: tuple[int, ...], rows: int, groups: int, name: str, *, ordered: bool = False) -> int:
    """The group size among those that a config names which gives that many groups.

    Args:
        ordered: each input's group is stored, so that sizes that come to the same are no matter.

    Raises:
        CheckpointError: none does, or two do.
    """
    sizes = dict.fromkeys(min(size, max(rows, 1)) if size > 0 else max(rows, 1) for size in named)
    fitting = [size for size in sizes if -(-rows // size) == groups]
    if not fitting or (len(fitting) > 1 and not ordered):
        said = " or ".join(f"{size} have {-(-rows // size)}" for size in sizes)
        raise CheckpointError(f"'{name}' has {groups} groups where {rows} inputs in groups of {said}", AGAIN)
    return fitting[0]


def _weight(
    stem: str,
    shape: tuple[int, int],
    packed: StoredTensor,
    zeros: StoredTensor,
    scales: StoredTensor,
    groups: StoredTensor | None,
    size: int,
    packing: Packing,
    how: str,
) -> Weight:
    out, rows = shape
    count = zeros.shape[0]

    def load() -> Decode:
        import torch

        held = whole(packed)
        zero = packing.zeros(whole(zeros)).float()
        scale = check_scales(whole(scales).float(), scales)
        group = torch.arange(rows) // size if groups is None else check_index(groups, count)
        empty = bool((scale == 0).any())

        def decode(start: int, stop: int) -> torch.Tensor:
            first, last = start // rows, -(-stop // rows)
            part = slice(first, last)
            found = packing.values(held, first, last).float()
            found -= torch.index_select(zero[:, part], 0, group).T
            factor = torch.index_select(scale[:, part], 0, group).T
            if empty and bool(((found != 0) & (factor == 0)).any()):
                raise zero_scale(f"{stem}.weight")
            found *= factor
            return found.reshape(-1).to(scales.dtype.torch)

        return decode

    def encoder() -> Encoder:
        from dataclasses import replace

        from adapterkit.codecs.tiles import Held, Shape, Tiles

        def numbers() -> Numbers:
            found = packing.numbers()

            def choose(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
                scale, zero, _ = found.choose(low, high)
                return scale.to(scales.dtype.torch), zero, None

            return replace(found, choose=choose)

        def before() -> Callable[[int, int], torch.Tensor]:
            words = whole(packed)
            return lambda first, last: packing.values(words, first, last).float()

        def order() -> torch.Tensor:
            assert groups is not None
            return check_index(groups, count)

        def complete(parts: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
            words, scale, zero = parts
            return {
                packed.name: words.T.reshape(-1),
                scales.name: scale.T.reshape(-1),
                zeros.name: packing.pack_zeros(zero.T.contiguous()).reshape(-1),
            }

        return Tiles(
            tuple(TensorSpec(part.name, part.dtype, part.shape) for part in (packed, zeros, scales)),
            Shape(out, rows, out, (1, size), count),
            numbers,
            packing.pack,
            packing.unpack,
            complete,
            Held(
                before,
                lambda: whole(scales).T.contiguous(),
                lambda: packing.zeros(whole(zeros)).T.float().contiguous(),
                None if groups is None else order,
            ),
            step=packing.step,
            streams=False,
        )

    parts = tuple(part for part in (packed, zeros, scales, groups) if part is not None)
    memory = packed.dtype.nbytes(packed.shape) + 8 * out * count
    grain = packing.step * rows
    return Weight(
        f"{stem}.weight", shape, scales.dtype, parts, f"{how}, groups of {size}", grain, load, memory, encoder
    )


def _leave_gptq(config: dict[str, Any], names: Sequence[str], plain: Sequence[str]) -> None:
    """GPTQModel's ``dynamic``: a pattern behind ``-:`` is not quantized (vLLM, `get_dynamic_override`)."""
    config["dynamic"] = {**(config.get("dynamic") or {}), **{f"-:^{re.escape(name)}$": {} for name in names}}


_MARKS = (".qweight", ".qzeros", ".g_idx")
GPTQ = Codec(
    "GPTQ",
    ("gptq", "auto-round", "autoround"),
    _MARKS,
    find_gptq,
    False,
    "AutoGPTQ, nn_modules/qlinear; GPTQModel, nn_modules/qlinear/__init__.py: PackableQuantLinear",
    what="2, 3, 4 and 8 bits, also by module, versions 1 and 2, activation order (g_idx); auto-round's export of it",
    test="test_gptq.py: auto-round (slow), else by its published layout",
    leave=_leave_gptq,
    fused=True,
)
AWQ = Codec(
    "AWQ",
    ("awq",),
    (".qweight", ".qzeros"),
    find_awq,
    False,
    "AutoAWQ, modules/linear/gemm.py; utils/packing_utils.py",
    what="gemm of 4 bits",
    test="test_gptq.py: AutoAWQ where installed, else by its published layout",
    leave=listed("modules_to_not_convert"),
    fused=True,
)
