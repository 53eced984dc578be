"""Numbers that files leave out and a seed gives back."""

from __future__ import annotations

import pytest
import torch

from adapterkit.ops.rotations import butterfly_order
from adapterkit.ops.spectral import permutation_prefix


@pytest.mark.parametrize("n", [1, 2, 3, 50, 4096, 1 << 20])
@pytest.mark.parametrize("seed", [0, 777, 2**31 + 5])
def test_the_front_of_a_permutation_without_the_rest(n: int, seed: int) -> None:
    whole = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    count = min(n, 300)
    assert permutation_prefix(n, count, seed).tolist() == whole[:count].tolist()
    if n <= 4096:
        assert permutation_prefix(n, n, seed).tolist() == whole.tolist()


def test_butterfly_order_is_that_of_peft() -> None:
    from peft.tuners.boft.layer import BOFTLayer

    for n, blocks, half in ((32, 8, 2), (32, 4, 2), (32, 2, 2), (48, 6, 4), (48, 3, 4)):
        theirs = BOFTLayer.block_butterfly_perm(None, n, blocks, half, 2)
        assert butterfly_order(n, blocks, half).tolist() == theirs.tolist()


def test_filters_are_those_of_peft() -> None:
    """And those of the books: each is orthonormal to its own even shifts, but for PEFT's coif4."""
    from peft.tuners.waveft.wavelet import _WAVELET_COEFFS, Wavelet

    from adapterkit.adapters.methods.spectral import wavelets

    assert set(_WAVELET_COEFFS) - set(wavelets()) == {"coif5"}  # 48 taps in PEFT 0.21 instead of 30
    off = {}
    for name, taps in wavelets().items():
        assert list(taps) == Wavelet(name).rec_lo
        products = [sum(a * b for a, b in zip(taps[shift:], taps, strict=False)) for shift in range(0, len(taps), 2)]
        off[name] = max(abs(product - (place == 0)) for place, product in enumerate(products))
    assert {name for name, error in off.items() if error > 1e-11} == {"coif4"}
    assert len(Wavelet("coif5").rec_lo) == 48
