"""Random numbers by position: entry i of a stream is a function of (seed, adapter, key, i) and nothing else.

So a mask is the same whatever the block size, the thread count or the order of the work. The function is SplitMix64
(Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), whose i-th
output is mix(start + i * gamma); the start of each stream is a BLAKE2b hash of its name.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
else:
    from adapterkit.ops._torch import torch

_GAMMA = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def stream(seed: int, adapter: int, key: str) -> int:
    """The start of the stream named by ``(seed, adapter, key)``, an unsigned 64-bit integer."""
    name = f"{seed}/{adapter}/{key}".encode()
    return int.from_bytes(blake2b(name, digest_size=8).digest(), "little")


def uniform(start: int, first: int, count: int, device: torch.device | None = None) -> torch.Tensor:
    """Entries ``first .. first + count - 1`` of a stream: float64 in [0, 1), 53 random bits each, the same on every device."""
    z = torch.arange(first + 1, first + 1 + count, dtype=torch.int64, device=device)
    z.mul_(_signed(_GAMMA)).add_(_signed(start))
    for shift, factor in _MIX:
        z.bitwise_xor_(_shifted(z, shift)).mul_(_signed(factor))
    z.bitwise_xor_(_shifted(z, 31))
    return _shifted(z, 11).double().mul_(2.0**-53)


def _shifted(z: torch.Tensor, bits: int) -> torch.Tensor:
    """A logical right shift: int64 is the only 64-bit integer torch computes with, and its own shift keeps the sign."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
