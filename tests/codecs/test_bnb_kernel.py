"""bitsandbytes' own function against the table in torch, and machines where it cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapterkit.codecs import blockwise, bnb_kernel

pytest.importorskip("bitsandbytes")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def forget():
    bnb_kernel._library.cache_clear()
    bnb_kernel._function.cache_clear()
    yield
    bnb_kernel._library.cache_clear()
    bnb_kernel._function.cache_clear()


@given(
    st.sampled_from(DTYPES),
    st.sampled_from([32, 64, 128, 256, 512, 1024]),
    st.integers(0, 40),
    st.floats(-40, 30),
    st.integers(0, 2**31),
)
def test_it_has_the_bits_of_the_table(
    dtype: torch.dtype, blocksize: int, blocks: int, exponent: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (blocks * blocksize // 2,), dtype=torch.uint8, generator=generator)
    absmax = torch.randn(blocks, generator=generator) * 10.0**exponent
    absmax[::7] = 0
    out = torch.full((blocks * blocksize,), torch.nan, dtype=dtype)
    done = bnb_kernel.decode_nf4(packed, absmax, blocksize, out)
    # It declines where a bfloat16 could become subnormal: the smallest value is 0.0796 of its block's scale.
    smallest = torch.finfo(torch.bfloat16).tiny / 0.0796
    risky = dtype is torch.bfloat16 and bool(((absmax != 0) & (absmax.abs() < smallest)).any())
    assert not (done and risky)
    assert done or exponent < -34  # 10 ** -34 and more is far above that
    wanted = blockwise.decode_by_table(packed, absmax, "nf4", blocksize, blocks * blocksize).to(dtype)
    if not done:
        assert out.isnan().all()  # and nothing was touched
        out = blockwise.decode_4bit(packed, absmax, "nf4", blocksize, blocks * blocksize, dtype)
    bits = torch.int32 if dtype is torch.float32 else torch.int16
    assert torch.equal(out.view(bits), wanted.view(bits))


@pytest.mark.parametrize("count", [1, 63, 64, 65, 200, 640])
def test_a_short_last_block(count: int) -> None:
    packed = torch.arange((count + 1) // 2).to(torch.uint8)
    absmax = torch.rand(-(-count // 64))
    got = blockwise.decode_4bit(packed, absmax, "nf4", 64, count, torch.bfloat16)
    assert torch.equal(got, blockwise.decode_by_table(packed, absmax, "nf4", 64, count).bfloat16())


def test_it_takes_no_other_sizes() -> None:
    """The function itself would write past the end."""
    packed, absmax = torch.zeros(64, dtype=torch.uint8), torch.zeros(2)
    with pytest.raises(ValueError, match="64 bytes and 2 blocks of 64 for 96 weights"):
        bnb_kernel.decode_nf4(packed, absmax, 64, torch.empty(96))


def test_it_takes_nothing_that_lies_otherwise() -> None:
    codes, scales = torch.zeros(64, dtype=torch.uint8), torch.zeros(2)
    with pytest.raises(ValueError, match="float64 scales"):
        bnb_kernel.decode_nf4(codes, scales.double(), 64, torch.empty(128))
    with pytest.raises(ValueError, match="one after the other"):
        bnb_kernel.decode_nf4(torch.zeros(128, dtype=torch.uint8)[::2], scales, 64, torch.empty(128))


def _decode() -> torch.Tensor:
    packed = torch.arange(256).to(torch.uint8)
    return blockwise.decode_4bit(packed, torch.linspace(0.1, 2, 8), "nf4", 64, 512, torch.bfloat16)


def _without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str) -> None:
    if how == "another release":
        monkeypatch.setattr(bnb_kernel, "version", lambda name: "0.51.0")
    elif how == "not installed":

        def missing(name: str) -> str:
            raise bnb_kernel.PackageNotFoundError(name)

        monkeypatch.setattr(bnb_kernel, "version", missing)
    elif how == "a library of another machine":
        (tmp_path / "libbitsandbytes_cpu.so").write_bytes(b"\x7fELF of another machine")
        spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
        monkeypatch.setattr(bnb_kernel, "find_spec", lambda name: spec)
    else:
        spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
        monkeypatch.setattr(bnb_kernel, "find_spec", lambda name: spec)


@pytest.mark.parametrize("how", ["another release", "not installed", "a library of another machine", "no library"])
def test_without_it_the_same_bits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str) -> None:
    wanted = _decode()
    bnb_kernel._library.cache_clear()
    bnb_kernel._function.cache_clear()
    _without(monkeypatch, tmp_path, how)
    assert not bnb_kernel.decode_nf4(torch.empty(32, dtype=torch.uint8), torch.empty(1), 64, torch.empty(64))
    assert torch.equal(_decode(), wanted)


def test_large_blocks_are_left_to_the_table() -> None:
    assert not bnb_kernel.decode_nf4(torch.empty(1024, dtype=torch.uint8), torch.empty(1), 2048, torch.empty(2048))
