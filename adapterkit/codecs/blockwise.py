"""bitsandbytes' blockwise numbers on plain tensors: NF4, FP4, the 8-bit map that absmax is nested in, and LLM.int8.

A 4-bit weight is walked in blocks of its flattened elements. A block stores its largest magnitude (absmax) and, per
element, which of 16 values comes nearest to element / absmax; two codes share a byte, the first in the high half.
Double quantization stores absmax - mean(absmax) in the same way, in blocks of 256 on a map of 256 values. Everything
here gives the bits of bitsandbytes 0.50, which the tests compare, with it or without; where it is installed, its own
function decodes NF4 (:mod:`adapterkit.codecs.bnb_kernel`), in a third of the time.

Sources: QLoRA (arXiv:2305.14314, appendix E: the NF4 values), bitsandbytes (MIT): ``functional.py`` and
``backends/default/ops.py``; 8-bit map: arXiv:1511.04561.
"""

from __future__ import annotations

from functools import cache

import torch

from adapterkit.codecs.bnb_kernel import decode_nf4

NESTED = 256  # absmax values per block of the nested absmax

# fmt: off
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on
# Sign, two exponent bits, one mantissa bit; the eighth code is a subnormal, and 12 is the largest value.
FP4 = tuple(sign * value / 12 for sign in (1, -1) for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))

VALUES = {"nf4": NF4, "fp4": FP4}


@cache
def values(kind: str) -> torch.Tensor:
    """The 16 values of ``nf4`` or ``fp4`` by code, float32."""
    return torch.tensor(VALUES[kind], dtype=torch.float32)


@cache
def nested_values() -> torch.Tensor:
    """The 256 values of the dynamic 8-bit map: sign, decimal exponent in unary, linear fraction in what is left."""
    found = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        middles = (10.0 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2.0)).tolist()
        found += [*middles, *(-value for value in middles)]
    return torch.tensor(sorted(found), dtype=torch.float32)


@cache
def _byte_pairs(kind: str) -> torch.Tensor:
    """For every byte the two float32 values of its halves, seen as one int64, so that one lookup decodes both."""
    table = values(kind)
    pairs = torch.stack([table.repeat_interleave(16), table.repeat(16)], 1).contiguous()
    return pairs.view(torch.int64).view(-1)


def decode_4bit(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    kind: str,
    blocksize: int,
    count: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """``count`` weights, computed in float32 and rounded to ``dtype``.

    Args:
        packed: uint8 ``[ceil(count / 2)]``, contiguous, starting with a block.
        absmax: float32, contiguous, one per block.
    """
    found = torch.empty(count, dtype=dtype, device=packed.device)
    blocks = count // blocksize
    done = blocks * blocksize
    if kind != "nf4" or not decode_nf4(packed[: done // 2], absmax[:blocks], blocksize, found[:done]):
        done = 0
    if done < count:
        rest = decode_by_table(packed[done // 2 :], absmax[done // blocksize :], kind, blocksize, count - done)
        found[done:] = rest
    return found


def decode_by_table(packed: torch.Tensor, absmax: torch.Tensor, kind: str, blocksize: int, count: int) -> torch.Tensor:
    """As `decode_4bit`, in float32 and without bitsandbytes."""
    found = torch.index_select(_byte_pairs(kind).to(packed.device), 0, packed.int()).view(torch.float32)[:count]
    full = count - count % blocksize
    blocks = full // blocksize
    found[:full].view(blocks, blocksize).mul_(absmax[:blocks, None])
    if full < count:
        found[full:].mul_(absmax[blocks])
    return found


def absmax_of(weights: torch.Tensor, blocksize: int) -> torch.Tensor:
    """The largest magnitude of each block of a flat tensor (the last may be short), float32."""
    count = weights.numel()
    full = count - count % blocksize
    found = weights[:full].view(-1, blocksize).abs().amax(1).float()
    if full < count:
        # As bitsandbytes: only a short last block is kept from being zero.
        found = torch.cat([found, weights[full:].abs().amax().float().clamp(min=1e-38).view(1)])
    return found


@cache
def _cells(kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For the upper half of a float32's bits: the values below it, the boundary that lies in it, and code by rank.

    The boundaries are midpoints of neighbours; no two share the upper 16 bits, so two lookups and a comparison find the
    nearest value.
    """
    table = values(kind)
    order = torch.argsort(table)
    edges = (table[order[:-1]] + table[order[1:]]) / 2
    upper = torch.arange(65536, dtype=torch.int32) << 16
    nearest_zero, farthest = upper.view(torch.float32), (upper | 0xFFFF).view(torch.float32)
    low, high = torch.minimum(nearest_zero, farthest), torch.maximum(nearest_zero, farthest)
    below = torch.bucketize(low, edges).clamp(max=15)
    inside = torch.bucketize(high, edges).clamp(max=15) > below
    edge = torch.where(inside, edges[below.clamp(max=14)], torch.tensor(torch.inf))
    return below.to(torch.uint8), edge, order.to(torch.uint8)


def encode_4bit(weights: torch.Tensor, absmax: torch.Tensor, kind: str, blocksize: int) -> torch.Tensor:
    """A flat tensor that starts with a block as packed codes, uint8 ``[ceil(count / 2)]``; see `absmax_of`."""
    count = weights.numel()
    scaled = torch.zeros(count + count % 2, device=weights.device)  # an odd end is padded by the code of zero
    full = count - count % blocksize
    blocks = full // blocksize
    inverse = 1.0 / absmax[:blocks].clamp(min=1e-38)
    torch.mul(
        weights[:full].view(blocks, blocksize).float(), inverse[:, None], out=scaled[:full].view(blocks, blocksize)
    )
    if full < count:
        torch.div(weights[full:].float(), absmax[blocks], out=scaled[full:count])
    scaled.clamp_(-1, 1)
    below, edge, order = (table.to(weights.device) for table in _cells(kind))
    upper = (scaled.view(torch.int32) >> 16) & 0xFFFF
    codes = torch.index_select(below, 0, upper)
    codes += scaled > torch.index_select(edge, 0, upper)
    if kind != "nf4":
        codes = torch.index_select(order, 0, codes.int())
    pairs = codes.view(-1, 2)
    return (pairs[:, 0] << 4) | pairs[:, 1]


def nest(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Double quantization: uint8 codes, the absmax of their blocks of 256, and the offset (a float32 scalar).

    The nearest value is taken, as by bitsandbytes on a GPU, where such weights are trained; its CPU kernel first rounds
    to a grid of 65536 and so takes the other neighbour of an almost exact middle (0.15 % of random values).
    """
    threads = torch.get_num_threads()
    # The last bit of a mean depends on how many threads share it.
    torch.set_num_threads(1)
    offset = absmax.mean()
    torch.set_num_threads(threads)
    shifted = absmax - offset
    table = nested_values()
    count = shifted.numel()
    blocks = -(-count // NESTED)
    padded = torch.nn.functional.pad(shifted, (0, blocks * NESTED - count)).view(blocks, NESTED)
    largest = padded.abs().amax(1)
    scaled = padded * (1.0 / largest.clamp(min=1e-38))[:, None]
    codes = torch.bucketize(scaled, (table[:-1] + table[1:]) / 2, out_int32=True)
    return codes.view(-1)[:count].to(torch.uint8), largest, offset


def unnest(
    codes: torch.Tensor, table: torch.Tensor, largest: torch.Tensor, blocksize: int, offset: float
) -> torch.Tensor:
    """The absmax values that `nest` (or bitsandbytes) stored, float32."""
    found = torch.index_select(table.float(), 0, codes.int())
    found *= largest.float().repeat_interleave(blocksize)[: found.numel()]
    return found + offset


def encode_int8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """LLM.int8 (arXiv:2208.07339): rows ``[k, columns]`` as int8, and their largest magnitudes, float32 ``[k]``.

    bitsandbytes rounds to float16 first.
    """
    half = rows.to(torch.float16)
    largest = half.abs().amax(1).float()
    scaled = half * (127.0 / largest)[:, None]
    return torch.nan_to_num(torch.round(scaled), nan=0.0).to(torch.int8), largest


def decode_int8(codes: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Rows of `encode_int8`, float32."""
    return codes * largest[:, None] * 7.874015718698502e-3
