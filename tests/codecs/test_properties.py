"""Properties of the codecs, on numbers that hypothesis makes up."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterkit.codecs import blockwise
from adapterkit.codecs.bits import unpack
from adapterkit.codecs.fp8 import short_blocks
from adapterkit.dtypes import F32

numbers = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100), max_value=2.0**100)


@settings(max_examples=60)
@given(st.lists(numbers, min_size=1, max_size=300), st.sampled_from(["nf4", "fp4"]), st.sampled_from([32, 64, 128]))
def test_4bit_takes_a_nearest_value_and_stays(values: list[float], kind: str, blocksize: int) -> None:
    w = torch.tensor(values)
    absmax = blockwise.absmax_of(w, blocksize)
    codes = blockwise.encode_4bit(w, absmax, kind, blocksize)
    got = blockwise.decode_4bit(codes, absmax, kind, blocksize, len(values)).double()
    scale = absmax.double().repeat_interleave(blocksize)[: len(values)]
    nearest = (w.double()[:, None] - scale[:, None] * blockwise.values(kind).double()).abs().amin(1)
    assert ((got - w.double()).abs() <= nearest + 1e-6 * scale + 1e-37).all()
    # What is on the grid already is encoded to itself.
    again = blockwise.encode_4bit(got.float(), absmax, kind, blocksize)
    same = blockwise.decode_4bit(again, absmax, kind, blocksize, len(values)).double()
    assert ((same - got).abs() <= 1e-6 * scale).all()


@settings(max_examples=40)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=600))
def test_nested_scales_are_within_half_a_step(values: list[float]) -> None:
    absmax = torch.tensor(values)
    codes, largest, offset = blockwise.nest(absmax)
    got = blockwise.unnest(codes, blockwise.nested_values(), largest, 256, float(offset))
    scale = largest.repeat_interleave(256)[: len(values)]
    # The widest gap of the map is between its two smallest values below -0.9 and -1: 0.0141, and -1 itself is missing.
    assert ((got - absmax).abs() <= 0.0142 * scale + 1e-6).all()


@settings(max_examples=60)
@given(st.integers(2, 8).flatmap(lambda b: st.tuples(st.just(b), st.lists(st.integers(0, 2**b - 1), min_size=1))))
def test_unpacking_inverts_packing(case: tuple[int, list[int]]) -> None:
    bits, values = case
    whole = sum(value << (bits * index) for index, value in enumerate(values))
    words = [(whole >> (32 * at)) & 0xFFFFFFFF for at in range(-(-len(values) * bits // 32))]
    signed = torch.tensor([[word - (1 << 32) if word >> 31 else word for word in words]], dtype=torch.int32)
    assert unpack(signed, bits, len(values)).tolist() == [values]


@settings(max_examples=15)
@given(st.integers(0, 2**31), st.floats(-30, 30))
def test_fp8_is_within_its_precision(seed: int, power: float) -> None:
    w = torch.randn(128, 256, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    codes, scales = short_blocks("w.weight", (128, 256), F32, False).encode(0, w.reshape(-1), None)
    got = codes.float().view(1, 128, 2, 128) * scales.view(1, 1, 2, 1)
    # Three bits of mantissa: 1/16 of a value, or half of the smallest step of the block.
    step = scales.view(1, 1, 2, 1) * 2.0**-9
    tiles = w.view(1, 128, 2, 128)
    assert ((got - tiles).abs() <= torch.maximum(tiles.abs() / 16, step / 2) * 1.001).all()
