"""Deltas that are sparse in another basis: Fourier (FourierFT) and wavelets (WaveFT).

Which coefficients are trained is drawn from a seed, the same on every machine. Rows of the delta are computed for the rows
that are asked for, so that nothing of the size of W is held.
"""

from __future__ import annotations

from functools import lru_cache

import torch


@lru_cache(maxsize=64)
def permutation_prefix(n: int, count: int, seed: int) -> torch.Tensor:
    """The first ``count`` numbers of ``torch.randperm(n, generator=Generator().manual_seed(seed))``, without the rest.

    torch shuffles from the front (Fisher and Yates) with raw draws of the Mersenne twister, of 32 bits, or of 64 when
    n is at least (2^32 - 1) // 20; the first ``count`` places are final after as many swaps.
    """
    import numpy as np

    wide = n >= (2**32 - 1) // 20
    twister = np.random.RandomState(seed % 2**32)
    draws = twister.randint(0, 2**32, size=count * (2 if wide else 1), dtype=np.uint32).astype(object)
    if wide:
        draws = draws[0::2] * 2**32 + draws[1::2]
    moved: dict[int, int] = {}
    found = []
    for place, draw in enumerate(draws):
        other = place + (int(draw) % (n - place) if place < n - 1 else 0)
        here = moved.pop(place, place)
        found.append(moved.get(other, other) if other != place else here)
        if other != place:
            moved[other] = here
    return torch.tensor(found, dtype=torch.int64)


def fourier_rows(
    spectrum: torch.Tensor, places: tuple[torch.Tensor, torch.Tensor], shape: tuple[int, int], rows: torch.Tensor
) -> torch.Tensor:
    """FourierFT (arXiv:2405.03003): rows of the real part of the inverse 2-D transform of a sparse real matrix.

    The transform along the columns is made of the few rows that are not zero, for the asked rows only; the one along the
    rows is an FFT. Angles are taken modulo the height in whole numbers, so that no precision is lost in them.
    """
    height, width = shape
    down, across = places
    turn = (rows[:, None] * down) % height
    angle = turn.double() * (2 * torch.pi / height)
    wave = torch.complex(angle.cos(), angle.sin())
    middle = torch.zeros(len(rows), width, dtype=torch.complex128)
    middle.index_add_(1, across, wave * (spectrum.double() / height))
    delta: torch.Tensor = torch.fft.ifft(middle, dim=1).real.float()
    return delta


def synthesis(low: torch.Tensor, high: torch.Tensor, filters: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """One level of the inverse wavelet transform along the last dimension: ``[k, n]`` twice to ``[k, 2n + 2 - taps]``."""
    taps, count = len(filters[0]), low.shape[1]
    out = low.new_zeros(len(low), 2 * count + taps - 2)
    for tap, (smooth, rough) in enumerate(zip(filters[0].tolist(), filters[1].tolist(), strict=True)):
        out[:, tap : tap + 2 * count : 2].add_(low, alpha=smooth).add_(high, alpha=rough)
    return out[:, taps - 2 : out.shape[1] - (taps - 2)]


def wavelet_rows(
    spectrum: torch.Tensor,
    places: tuple[torch.Tensor, torch.Tensor],
    shape: tuple[int, int],
    taps: tuple[float, ...],
    rows: torch.Tensor,
) -> torch.Tensor:
    """WaveFT (arXiv:2505.12532; PEFT 0.21): rows of the one-level inverse transform of a sparse matrix.

    The coefficients stand centred in a matrix that is larger by what the transform cuts off, ``taps - 2`` in each
    direction, and even. Its quarters are approximation (upper left) and details; the upper right one is high along the rows'
    direction (PEFT's order, that of PyWavelets).

    Args:
        taps: the low-pass synthesis filter; the high-pass is its mirror with alternating signs.
    """
    length = len(taps)
    low = torch.tensor(taps, dtype=torch.float64)
    high = low.flip(0) * torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(length // 2)
    cut = length - 2
    padded = [size + cut + (size + cut) % 2 for size in shape]
    down, across = (place + (outer - size) // 2 for place, outer, size in zip(places, padded, shape, strict=True))
    half_down, half_across = padded[0] // 2, padded[1] // 2
    lower, right = down >= half_down, across >= half_across
    # Where rows and columns of the quarters get their filters: PEFT hands the quarters over crosswise.
    vertical, horizontal = right, lower
    tap = (rows[:, None] + cut) - 2 * (down % half_down)
    inside = (tap >= 0) & (tap < length)
    filters = torch.stack((low, high))
    here = inside.any(0)  # few coefficients reach these rows: filters are short
    along = (
        filters[vertical.long()[here], tap[:, here].clamp(0, length - 1)] * inside[:, here] * spectrum[here].double()
    )
    middle = torch.zeros(len(rows), padded[1], dtype=torch.float64)
    middle.index_add_(1, (across % half_across + half_across * horizontal.long())[here], along)
    out = synthesis(middle[:, :half_across], middle[:, half_across:], (low, high))
    return out[:, : shape[1]].float()
