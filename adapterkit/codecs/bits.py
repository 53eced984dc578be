"""Small numbers out of bytes and words: FP8, FP4 (e2m1), power-of-two scales (e8m0), and integers of 2 to 8 bits.

Sources: OCP Microscaling Formats 1.0 (e2m1: table 5, e8m0: section 5.4.1) and the OCP 8-bit floating point
specification.
"""

from __future__ import annotations

from functools import cache

import torch

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@cache
def _bytes_of(dtype: torch.dtype) -> torch.Tensor:
    """The float32 value of every byte of an 8-bit dtype: a lookup is faster than torch's conversion."""
    return torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype).float()


@cache
def _e2m1_pairs() -> torch.Tensor:
    """For every byte the two float32 values of its halves, the low one first, seen as one int64."""
    table = torch.tensor(E2M1)
    return torch.stack([table.repeat(16), table.repeat_interleave(16)], 1).contiguous().view(torch.int64).view(-1)


@cache
def _e8m0() -> torch.Tensor:
    return torch.exp2(torch.arange(256, dtype=torch.float64) - 127).float()


def floats(codes: torch.Tensor) -> torch.Tensor:
    """8-bit floats or integers as float32."""
    if codes.dtype.is_floating_point and codes.element_size() == 1:
        found = torch.index_select(_bytes_of(codes.dtype).to(codes.device), 0, codes.view(torch.uint8).view(-1).int())
        return found.view(codes.shape)
    return codes.float()


def e2m1(codes: torch.Tensor) -> torch.Tensor:
    """Bytes of two 4-bit floats each, low half first, as float32 with twice as many columns."""
    flat = codes.contiguous().view(torch.uint8).view(-1).int()
    return torch.index_select(_e2m1_pairs().to(flat.device), 0, flat).view(torch.float32).view(*codes.shape[:-1], -1)


def powers(codes: torch.Tensor) -> torch.Tensor:
    """Scales 2^(byte - 127), stored as e8m0 or as plain bytes, as float32."""
    flat = codes.contiguous().view(torch.uint8).view(-1).int()
    return torch.index_select(_e8m0().to(flat.device), 0, flat).view(codes.shape)


def unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Rows of int32 words as ``count`` unsigned integers of ``bits`` bits each, first in the lowest bits; int32.

    Values lie end to end, across words where ``bits`` does not divide 32.
    """
    words = words.contiguous()
    rows = words.shape[0]
    mask = (1 << bits) - 1
    if 8 % bits == 0:
        found = words.view(torch.uint8).view(rows, -1)
        if bits < 8:
            found = torch.stack([(found >> shift) & mask for shift in range(0, 8, bits)], -1).view(rows, -1)
        return found[:, :count].int()
    at = torch.arange(count, device=words.device) * bits
    word, shift = at // 32, at % 32
    wide = words.long() & 0xFFFFFFFF
    wide = torch.nn.functional.pad(wide, (0, 1))
    return (((wide[:, word] >> shift) | (wide[:, word + 1] << (32 - shift))) & mask).int()


@cache
def _e2m1_edges() -> torch.Tensor:
    """Upper ends of the magnitudes that round to each code; a middle goes to the even code."""
    edges = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    edges[1::2] = torch.nextafter(edges[1::2], torch.tensor(0.0))
    return edges


@cache
def _e2m1_codes() -> torch.Tensor:
    """For the upper half of a float32's bits, and whether any bit of the lower half is set: its e2m1 code.

    The edges between codes have nothing in their lower halves, so that is all that decides.
    """
    upper = torch.arange(65536, dtype=torch.int32) << 16
    values = torch.stack([upper, upper | 1], 1).view(-1).view(torch.float32)
    codes = torch.bucketize(values.abs().nan_to_num(nan=6.0), _e2m1_edges(), out_int32=True).to(torch.uint8)
    return codes | (torch.signbit(values).to(torch.uint8) << 3)


def to_e2m1(values: torch.Tensor) -> torch.Tensor:
    """Float32 values as e2m1 codes (uint8, one per value), to nearest even; larger ones become 6."""
    bits = values.contiguous().view(torch.int32)
    at = ((bits >> 15) & 0x1FFFE) | ((bits & 0xFFFF) != 0)
    return torch.index_select(_e2m1_codes().to(at.device), 0, at.view(-1)).view(values.shape)


def pair(codes: torch.Tensor) -> torch.Tensor:
    """4-bit codes ``[..., columns]`` two to a byte, the first in the low half."""
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def unpair(codes: torch.Tensor) -> torch.Tensor:
    """The reverse of `pair`."""
    codes = codes.view(torch.uint8)
    return torch.stack([codes & 15, codes >> 4], -1).view(*codes.shape[:-1], -1)


def pack(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows of unsigned integers of ``bits`` bits as int32 words: the reverse of `unpack`."""
    rows, count = numbers.shape
    words = -(-count * bits // 32)
    if 8 % bits == 0:
        per = 32 // bits
        wide = torch.nn.functional.pad(numbers.to(torch.uint8), (0, words * per - count)).view(rows, -1, 8 // bits)
        found = wide[:, :, 0].clone()
        for index in range(1, 8 // bits):
            found |= wide[:, :, index] << (bits * index)
        return found.view(torch.int32)
    at = torch.arange(count, device=numbers.device) * bits
    word, shift = at // 32, at % 32
    wide = numbers.long()
    found = torch.zeros(rows, words + 1, dtype=torch.int64, device=numbers.device)
    found.index_add_(1, word, (wide << shift) & 0xFFFFFFFF)
    found.index_add_(1, word + 1, wide >> (32 - shift))
    return found[:, :words].to(torch.int32)
