"""GPTQ and AWQ: integers with a scale and a zero point per group of inputs and per output, stored transposed.

GPTQ: `qweight` int32 ``[in*bits/32, out]``, values end to end down a column; `qzeros` ``[groups, out*bits/32]`` along
a row; `scales` ``[groups, out]``; `g_idx` ``[in]`` the group of each input. Files of version 1 store zero points less
one. AWQ (gemm): `qweight` ``[in, out/8]`` and `qzeros` ``[groups, out/8]``, eight 4-bit values per word in the order
0 2 4 6 1 3 5 7. W[o, i] = scales[g, o] * (q[i, o] - z[g, o]), g the group of input i.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
    check_shape,
    companion,
    setting,
    stems,
    whole,
)
from adapterkit.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from adapterkit.codecs.codec import Decode

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def find_gptq(parts: Parts, config: Mapping[str, Any]) -> Iterator[Weight]:
    bits = _bits(config)
    if bits not in (2, 3, 4, 8):
        raise CheckpointError(f"GPTQ weights of {bits} bits are not known", "adapterkit reads 2, 3, 4 and 8 bits")
    packing = setting(config, "packing_format", str, default="auto_round:auto_gptq")
    if not packing.endswith("gptq"):
        raise CheckpointError(f"auto-round's packing '{packing}' is not known", "export it again as auto_gptq")
    off = 0 if config.get("checkpoint_format") == "gptq_v2" else 1
    for stem in stems(parts, ".qweight"):
        packed = check_shape(parts[f"{stem}.qweight"], (-1, -1), "GPTQ")
        words, out = packed.shape
        rows = words * 32 // bits
        what = f"GPTQ of {bits} bits"
        if packed.dtype.code != "I32" or words * 32 % bits:
            raise CheckpointError(f"'{packed.name}' ({packed.dtype}, {words} rows) is no {what}", AGAIN)
        zeros = check_shape(companion(parts, f"{stem}.qzeros", packed.name, what), (-1, -(-out * bits // 32)), what)
        scales = companion(parts, f"{stem}.scales", packed.name, what)
        check_shape(scales, (zeros.shape[0], out), what)
        check_dtype(zeros, ("I32",), what)
        check_dtype(scales, FLOATS, what)
        groups = parts.get(f"{stem}.g_idx")
        if groups is not None:
            check_dtype(check_shape(groups, (rows,), what), INTEGERS, what)
        size = _group_size(config, rows, zeros.shape[0], packed.name)

        def values(held: torch.Tensor, first: int, last: int, rows: int = rows) -> torch.Tensor:
            from adapterkit.codecs.bits import unpack

            return unpack(held[:, first:last].T, bits, rows)

        def zero_points(held: torch.Tensor, out: int = out) -> torch.Tensor:
            from adapterkit.codecs.bits import unpack

            # Version 1 wrote z - 1 in as many bits, so 0 became the largest value.
            found: torch.Tensor = (unpack(held, bits, out) + off) & ((1 << int(bits)) - 1)
            return found

        yield _weight(
            stem, (out, rows), packed, zeros, scales, groups, size, values, zero_points, f"gptq {bits} bit", 1
        )


def find_awq(parts: Parts, config: Mapping[str, Any]) -> Iterator[Weight]:
    bits, version = _bits(config, 4), setting(config, "version", str, default="gemm").lower()
    if bits != 4 or version != "gemm":
        raise CheckpointError(f"AWQ '{version}' of {bits} bits is not known", "adapterkit reads gemm of 4 bits")
    for stem in stems(parts, ".qweight"):
        packed = check_shape(parts[f"{stem}.qweight"], (-1, -1), "AWQ")
        rows, out = packed.shape[0], packed.shape[1] * 8
        zeros = check_shape(companion(parts, f"{stem}.qzeros", packed.name, "AWQ"), (-1, packed.shape[1]), "AWQ")
        scales = companion(parts, f"{stem}.scales", packed.name, "AWQ")
        check_shape(scales, (zeros.shape[0], out), "AWQ")
        for part, kinds in ((packed, ("I32",)), (zeros, ("I32",)), (scales, FLOATS)):
            check_dtype(part, kinds, "AWQ")
        size = _group_size(config, rows, zeros.shape[0], packed.name)

        def values(held: torch.Tensor, first: int, last: int) -> torch.Tensor:
            return _awq(held[:, first // 8 : last // 8]).T

        yield _weight(stem, (out, rows), packed, zeros, scales, None, size, values, _awq, "awq 4 bit", 8)


def _awq(words: torch.Tensor) -> torch.Tensor:
    """``[k, n]`` words as ``[k, 8n]`` values."""
    import torch

    found: torch.Tensor = torch.stack([(words >> (4 * ORDER.index(i))) & 15 for i in range(8)], -1)
    return found.view(words.shape[0], -1)


def _bits(config: Mapping[str, Any], default: int | None = None) -> int | None:
    found: int | None = setting(config, "bits", int, default=setting(config, "w_bit", int, default=default))
    return found


def _group_size(config: Mapping[str, Any], rows: int, groups: int, name: str) -> int:
    size = setting(config, "group_size", int, default=setting(config, "q_group_size", int, default=-1))
    size = size if size > 0 else max(rows, 1)
    if -(-rows // size) != groups:
        raise CheckpointError(
            f"'{name}' has {groups} groups where {rows} inputs in groups of {size} have {-(-rows // size)}", AGAIN
        )
    return size


def _weight(
    stem: str,
    shape: tuple[int, int],
    packed: StoredTensor,
    zeros: StoredTensor,
    scales: StoredTensor,
    groups: StoredTensor | None,
    size: int,
    values: Callable[[torch.Tensor, int, int], torch.Tensor],
    zero_points: Callable[[torch.Tensor], torch.Tensor],
    how: str,
    step: int,
) -> Weight:
    out, rows = shape

    def load() -> Decode:
        import torch

        held = whole(packed)
        zero = zero_points(whole(zeros)).float()
        scale = whole(scales).float()
        group = torch.arange(rows) // size if groups is None else check_index(groups, zeros.shape[0])

        def decode(start: int, stop: int) -> torch.Tensor:
            first, last = start // rows, -(-stop // rows)
            part = slice(first, last)
            found = values(held, first, last).float()
            found -= torch.index_select(zero[:, part], 0, group).T
            found *= torch.index_select(scale[:, part], 0, group).T
            return found.reshape(-1).to(scales.dtype.torch)

        return decode

    parts = tuple(part for part in (packed, zeros, scales, groups) if part is not None)
    memory = packed.dtype.nbytes(packed.shape) + 8 * out * zeros.shape[0]
    return Weight(f"{stem}.weight", shape, scales.dtype, parts, f"{how}, groups of {size}", step * rows, load, memory)


_MARKS = (".qweight", ".qzeros", ".g_idx")
GPTQ = Codec(
    "GPTQ",
    ("gptq", "auto-round", "autoround"),
    _MARKS,
    find_gptq,
    False,
    "AutoGPTQ, nn_modules/qlinear; GPTQModel, nn_modules/qlinear/__init__.py: PackableQuantLinear",
    what="2, 3, 4 and 8 bits, versions 1 and 2, activation order (g_idx); auto-round's export of it",
    test="test_gptq.py: auto-round (slow), else by its published layout",
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
)
