from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_oracle import needs_oracle, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterkit.errors import AdapterkitError, UsageError
from adapterkit.gguf.encode import NonFiniteWeightError, decode, encode, encode_into, find_non_finite
from adapterkit.gguf.kernels import backends, selftest
from adapterkit.gguf.kernels.layouts import LAYOUTS
from adapterkit.gguf.types import TYPES

ROWS, COLUMNS = 10, 768
NEEDS_IMPORTANCE = [name for name, kind in TYPES.items() if kind.needs_importance]
VARIANTS = [(name, weighted) for name, layout in LAYOUTS.items() for weighted in (False, layout.given is not None)]
VARIANTS = list(dict.fromkeys(VARIANTS))


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def distributions(seed: int, rows: int = ROWS, columns: int = COLUMNS) -> dict[str, np.ndarray]:
    """The shapes that weights come in, and the ones that break encoders."""
    rng = np.random.default_rng(seed)
    n = rng.standard_normal((rows, columns))
    sixteens = np.repeat(rng.standard_normal((rows, columns // 16)), 16, axis=1)
    cases = {
        "normal": n * 0.02,
        "heavy": rng.standard_t(1.5, (rows, columns)).clip(-1e4, 1e4),
        "sparse": n * (rng.random((rows, columns)) < 0.08),
        "one in a hundred": n * (rng.random((rows, columns)) < 0.01),
        "constant": np.repeat(rng.standard_normal((rows, columns // 32)), 32, axis=1),
        "constant and negative": -np.abs(sixteens),
        "nearly constant": -np.abs(sixteens) * (1 + n * 1e-7),
        "zero": n * 0,
        "both zeros": np.where(n > 0, 0.0, -0.0),
        "tiny": n * 1e-20,
        "subnormal": n * 1e-40,
        "blocks of all sizes": n * np.repeat(10.0 ** rng.uniform(-12, 3, (rows, columns // 16)), 16, axis=1),
        "weights of all sizes": np.sign(n) * 10.0 ** rng.uniform(-10, 2, (rows, columns)),
        "integers": np.round(n * 3),
        "powers of two": np.sign(n) * 2.0 ** np.round(n * 3),
        "two values": np.where(n > 0, 0.3, -0.7),
        "positive": np.abs(n),
        "outliers": np.where(rng.random((rows, columns)) < 0.004, n * 1000, n * 0.01),
        "uniform": rng.random((rows, columns)) - 0.5,
    }
    found = {name: values.astype(np.float32) for name, values in cases.items()}
    found["bf16"] = torch.from_numpy(found["normal"]).bfloat16().float().numpy()
    found["f16"] = found["normal"].astype(np.float16).astype(np.float32)
    return found


def importances(seed: int, columns: int = COLUMNS) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    found = [
        rng.random(columns) + 0.01,
        rng.random(columns) * (rng.random(columns) < 0.3),
        10.0 ** rng.uniform(-8, 8, columns),
        rng.standard_normal(columns) ** 2 * 1e-6,
        np.ones(columns),
        np.zeros(columns),
    ]
    return [values.astype(np.float32) for values in found]


@needs_oracle
@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize(("name", "weighted"), VARIANTS)
def test_bytes_are_those_of_llama_cpp(name: str, weighted: bool, backend: Any) -> None:
    cases = distributions(1)
    rows = np.concatenate(list(cases.values()))
    columns = {"numba": importances(3), "torch": importances(3)[1:3]}[backend] if weighted else [None]
    for importance in columns:
        wrong = (encode(name, rows, importance, backend=backend) != quantize(name, rows, importance)).any(axis=1)
        assert {list(cases)[row // ROWS] for row in np.flatnonzero(wrong)} == set()


@needs_oracle
@given(
    variant=st.sampled_from([("Q4_K", False), ("Q4_K", True), ("Q6_K", False), ("Q3_K", False), ("Q5_1", True)]),
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 35),
    blocks=st.integers(1, 5),
    exponent=st.integers(-30, 3),
    kept=st.sampled_from([0.01, 0.2, 1.0]),
    step=st.sampled_from([0.0, 2.0**-8, 0.25]),
)
@settings(max_examples=100, derandomize=True)
def test_any_shape_and_scale(
    variant: tuple[str, bool], seed: int, rows: int, blocks: int, exponent: int, kept: float, step: float
) -> None:
    name, weighted = variant
    rng = np.random.default_rng(seed)
    shape = (rows, blocks * TYPES[name].block)
    values = rng.standard_t(3, shape) * (rng.random(shape) < kept)
    if step:
        values = np.round(values / step) * step
    values = (values * 10.0**exponent).astype(np.float32)
    importance = (rng.random(shape[1]) ** 4).astype(np.float32) if weighted else None
    assert np.array_equal(encode(name, values, importance), quantize(name, values, importance))


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q3_K", "IQ4_XS"])
def test_any_number_of_threads_gives_the_same_bytes(name: str, backend: Any, threads: int) -> None:
    """Ours that call it, and torch's own."""
    rows = np.random.default_rng(5).standard_normal((96, 512)).astype(np.float32)
    whole = encode(name, rows)
    out = np.zeros_like(whole)
    torch.set_num_threads(threads)
    with ThreadPoolExecutor(threads) as pool:
        parts = [slice(i, i + 7) for i in range(0, 96, 7)]
        list(pool.map(lambda part: encode_into(name, rows[part], out[part], backend=backend), parts))
    assert np.array_equal(out, whole)


@needs_oracle
def test_the_self_test_expects_what_llama_cpp_gives_now() -> None:
    rows, importance = selftest.vector()
    found = {
        (name, weighted): selftest.digest(quantize(name, rows, importance if weighted else None))
        for name, weighted in VARIANTS
    }
    assert found == selftest.DIGESTS


def test_a_backend_with_other_bytes_is_left_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    wanted = encode("Q8_0", rows)
    real = selftest.complaint

    def complaint(backend: str, *rest: Any) -> str | None:
        return "gives other bytes for Q8_0 than llama.cpp" if backend == "numba" else real(backend, *rest)

    monkeypatch.setattr(selftest, "complaint", complaint)
    with pytest.warns(RuntimeWarning, match="the numba encoder gives other bytes for Q8_0 .* using torch"):
        assert np.array_equal(encode("Q8_0", rows), wanted)
    monkeypatch.setattr(selftest, "complaint", lambda *_: "gives other bytes for Q8_0 than llama.cpp")
    with pytest.raises(AdapterkitError, match=r"other bytes for Q8_0 than llama\.cpp"):
        encode("Q8_0", rows, backend="torch")


@pytest.fixture
def _asked_again() -> Any:
    selftest._outcome.cache_clear()
    yield
    selftest._outcome.cache_clear()


@pytest.mark.usefixtures("_asked_again")
@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_self_test_notices_a_wrong_byte(backend: str, weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    what = "run_compiled" if backend == "numba" else "run_backend"
    real = getattr(backends, what)

    def broken(*given: Any) -> float:
        peak: float = real(*given)
        given[-1][4, 7] ^= 1
        return peak

    assert selftest.complaint(backend, "Q4_K", weighted, "cpu") is None
    selftest._outcome.cache_clear()
    monkeypatch.setattr(backends, what, broken)
    assert selftest.complaint(backend, "Q4_K", weighted, "cpu") == "gives other bytes for Q4_K than llama.cpp"


@pytest.mark.usefixtures("_asked_again")
@pytest.mark.parametrize("weighted", [False, True])
def test_each_first_use_of_a_type_asks_the_self_test(weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    real = selftest.complaint
    monkeypatch.setattr(selftest, "complaint", lambda *what: asked.append(what) or real(*what))
    rows, importance = np.ones((2, 256), np.float32), np.ones(256, np.float32) if weighted else None
    for backend in ("auto", "torch"):
        encode("Q6_K", rows, importance, backend=backend)
    assert asked == [("numba", "Q6_K", weighted, "cpu"), ("torch", "Q6_K", weighted, "cpu")]
    assert selftest._outcome.cache_info().misses == 2


@pytest.mark.usefixtures("_asked_again")
def test_a_compiler_that_fails_is_left_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    from adapterkit.gguf.kernels import compiled

    def fails(*_: Any) -> Any:
        raise NotImplementedError("no such processor\nand more")

    rows = np.random.default_rng(0).standard_normal((3, 256)).astype(np.float32)
    wanted = encode("Q4_K", rows, backend="torch")
    monkeypatch.setattr(compiled, "kernel", fails)
    sentence = (
        r"numba encoder does not run for Q4_K \(NotImplementedError: no such processor\) on this machine; using torch"
    )
    with pytest.warns(RuntimeWarning, match=sentence):
        assert np.array_equal(encode("Q4_K", rows), wanted)
    with pytest.raises(AdapterkitError, match="does not run for Q4_K"):
        encode("Q4_K", rows, backend="numba")


@needs_oracle
@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_casts(name: str) -> None:
    rows = distributions(2)["heavy"]
    assert np.array_equal(encode(name, rows), quantize(name, rows))


@needs_oracle
@pytest.mark.parametrize("name", ["IQ2_XXS", "IQ3_S"])
def test_types_that_ggml_encodes(name: str) -> None:
    rows = distributions(4)["normal"]
    importance = importances(4)[0]
    assert np.array_equal(encode(name, rows, importance), quantize(name, rows, importance))


@pytest.mark.parametrize("name", NEEDS_IMPORTANCE)
def test_very_low_bit_types_need_importance(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} needs an importance matrix"):
        encode(name, np.ones((1, 256), np.float32))


def test_without_the_package_that_has_ggml(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from adapterkit.gguf.kernels import native

    native.library.cache_clear()
    native._prepare.cache_clear()
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(UsageError, match=r"pip install 'adapterkit\[iq\]'"):
        encode("IQ3_S", np.ones((1, 256), np.float32))
    monkeypatch.undo()
    native.library.cache_clear()


@pytest.mark.parametrize("name", [*LAYOUTS, "F16", "BF16", "F32", "IQ3_S"])
def test_decode_undoes_encode_up_to_the_type_s_error(name: str) -> None:
    rows = (np.random.default_rng(7).standard_normal((8, 512)) * 0.02).astype(np.float32)
    back = decode(name, encode(name, rows), 512)
    error = float(np.sqrt(np.mean((back - rows) ** 2)) / 0.02)
    bits = TYPES[name].size * 8 / TYPES[name].block
    limits = {"F32": 0.0, "F16": 3e-4, "BF16": 2e-3, "TQ1_0": 1.0, "TQ2_0": 1.0}
    assert error <= limits.get(name, 2.2 * 2.0 ** -(bits - 1))


def test_decode_of_what_gguf_cannot_read() -> None:
    with pytest.raises(UsageError, match="cannot decode I8"):
        decode("I8", np.zeros((1, 4), np.uint8), 4)
    assert np.array_equal(
        decode("Q8_0", encode("Q8_0", np.ones((1, 32), np.float32)), 32),
        gguf.quants.dequantize(encode("Q8_0", np.ones((1, 32), np.float32)), gguf.GGMLQuantizationType.Q8_0),
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "F32"])
def test_non_finite_weights_are_refused(name: str, bad: float) -> None:
    rows = np.ones((4, 256), np.float32)
    rows[2, 17] = bad
    assert find_non_finite(torch.from_numpy(rows)) == (2, 17)
    with pytest.raises(NonFiniteWeightError, match="row 2, column 17") as caught:
        encode(name, rows)
    assert (caught.value.row, caught.value.column) == (2, 17)
    assert find_non_finite(torch.ones(2, 2)) is None


@pytest.mark.parametrize("large", [3.4e38, 2e8])
@pytest.mark.parametrize("name", [*LAYOUTS, "F16", "BF16"])
def test_weights_too_large_for_the_type_are_refused(name: str, large: float) -> None:
    rows = np.ones((4, 512), np.float32)
    rows[3, 288] = 20000.0
    assert np.isfinite(decode(name, encode(name, rows), 512)).all()
    rows[3, 288] = large
    fits = name == "MXFP4" or (name == "BF16" and large < 1e38) or (name in ("Q6_K", "IQ4_XS") and large < 2.5e8)
    if fits:
        assert np.isfinite(decode(name, encode(name, rows), 512)).all()
        return
    with pytest.raises(NonFiniteWeightError, match=f"are too large for {name}") as caught:
        encode(name, rows)
    assert caught.value.row == 3
    assert caught.value.column <= 288 < caught.value.column + TYPES[name].block


def test_arguments() -> None:
    rows = np.ones((2, 256), np.float32)
    out = np.empty((2, 144), np.uint8)
    with pytest.raises(UsageError, match="do not fit Q4_K"):
        encode_into("Q4_K", rows, out[:1])
    with pytest.raises(UsageError, match="do not fit Q4_K"):
        encode_into("Q4_K", rows, np.empty((2, 288), np.uint8)[:, ::2])
    with pytest.raises(UsageError, match="importance of shape"):
        encode("Q4_K", rows, np.ones(128, np.float32))
    with pytest.raises(UsageError, match="negative or non-finite"):
        encode("Q4_K", rows, np.full(256, -1.0, np.float32))
    with pytest.raises(UsageError, match="backend 'cuda' does not exist"):
        encode("Q4_K", rows, backend="cuda")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="Q8_K cannot be encoded"):
        encode("Q8_K", rows)
    assert encode("Q4_K", rows[:0]).shape == (0, 144)


def test_tensors_of_other_floats_are_widened_and_strided_rows_copied() -> None:
    half = torch.randn(4, 512, generator=torch.Generator().manual_seed(1)).half()
    wanted = encode("Q6_K", half.float().numpy())
    assert np.array_equal(encode("Q6_K", half), wanted)
    assert np.array_equal(encode("Q6_K", half.t().contiguous().t()), wanted)
    assert np.array_equal(encode("Q8_0", half, np.ones(512, np.float32)), encode("Q8_0", half))


def test_a_memory_map_is_written_in_place(tmp_path: Any) -> None:
    rows = np.random.default_rng(3).standard_normal((5, 256)).astype(np.float32)
    target = np.memmap(tmp_path / "t", dtype=np.uint8, mode="w+", shape=(5, 144))
    encode_into("Q4_K", rows, target)
    assert np.array_equal(target, encode("Q4_K", rows))


def test_float16_is_widened_as_torch_widens_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pattern of bits, rows that sixteen lanes do not fill, and where numba gives something else."""
    every = np.arange(1 << 16, dtype=np.uint16)
    expected = torch.from_numpy(every.view(np.float16)).float().numpy()

    def check(first: int, count: int) -> None:
        found, wanted = backends.widened(every[first : first + count]), expected[first : first + count]
        np.testing.assert_array_equal(found, wanted)
        np.testing.assert_array_equal(np.signbit(found), np.signbit(wanted))

    assert backends._widens()
    for count in (1 << 16, 50_003, 31, 16, 3, 0):
        check(0, count)
        check(1, count)
    monkeypatch.setattr(backends, "_widens", lambda: False)
    check(0, 1 << 16)
