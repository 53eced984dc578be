"""GGUF to GGUF by the compiled encoders: the same bytes as through torch, which is not loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import adapterkit
from adapterkit.errors import CheckpointError
from adapterkit.gguf.checkpoint import open_gguf
from adapterkit.gguf.encode import Backend, NonFiniteWeightError, encode
from adapterkit.gguf.tensors import Quantized
from adapterkit.gguf.types import TYPES

pytest.importorskip("numba", reason="without numba the encoders are torch's")

WIDE = {
    "F32": gguf.GGMLQuantizationType.F32,
    "F16": gguf.GGMLQuantizationType.F16,
    "BF16": gguf.GGMLQuantizationType.BF16,
}


def _file(path: Path, kind: str, *, spoilt: bool = False) -> Path:
    """A matrix, a stack of three and a norm, in one float type."""
    generator = np.random.default_rng(3)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    for name, shape in (("blk.0.ffn_up.weight", (40, 256)), ("blk.0.ffn_up_exps.weight", (3, 20, 256))):
        values = generator.standard_normal(shape).astype(np.float32)
        if spoilt:
            values.reshape(-1)[777] = np.inf
        stored = values.astype(np.float16) if kind == "F16" else values
        if kind == "BF16":
            stored = torch.from_numpy(values).bfloat16().view(torch.uint8).numpy().reshape(*shape[:-1], -1)
        writer.add_tensor(name, stored, raw_dtype=WIDE[kind])
    writer.add_tensor("output_norm.weight", np.ones(256, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", list(WIDE))
@pytest.mark.parametrize("to", ["Q8_0", "Q4_K"])
def test_arrays_are_encoded_as_tensors_are(kind: str, to: str, tmp_path: Path) -> None:
    stored = open_gguf(_file(tmp_path / "wide.gguf", kind))
    for name, matrices in (("blk.0.ffn_up.weight", 1), ("blk.0.ffn_up_exps.weight", 3)):
        made = Quantized(stored[name], TYPES[to])
        for importance in (None, np.random.default_rng(1).random((matrices, 256)).astype(np.float32)):
            made.importance = importance
            assert made.plain
            for start, stop in ((0, made.numel), (256, 2560), (512, 768)):
                assert np.array_equal(made.array(start, stop), made.read(start, stop).numpy()), (name, start)
    assert not Quantized(Quantized(stored["blk.0.ffn_up.weight"], TYPES[to]), TYPES["Q8_0"]).plain


WITHOUT = """
import sys
class Never:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise SystemExit("torch is imported")
sys.meta_path.insert(0, Never())
import adapterkit
adapterkit.convert(sys.argv[1], sys.argv[2], quant=sys.argv[3])
"""


def test_a_file_is_quantized_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, alone, beside = _file(tmp_path / "wide.gguf", "F16"), tmp_path / "alone.gguf", tmp_path / "beside.gguf"
    subprocess.run([sys.executable, "-c", WITHOUT, str(base), str(alone), "Q4_K_M"], check=True)
    monkeypatch.setattr(Quantized, "plain", property(lambda _self: False))
    adapterkit.convert(base, beside, quant="Q4_K_M")
    assert alone.read_bytes() == beside.read_bytes()


@pytest.mark.parametrize("torch_too", [False, True])
def test_what_is_not_finite_is_named_on_both_ways(
    torch_too: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = _file(tmp_path / "wide.gguf", "F32", spoilt=True)
    if torch_too:
        monkeypatch.setattr(Quantized, "plain", property(lambda _self: False))
    with pytest.raises(
        CheckpointError, match=r"'blk\.0\.ffn_up\S*' cannot be Q8_0: its value at row 3, column 9 is not"
    ):
        adapterkit.convert(base, tmp_path / "out.gguf", quant="Q8_0")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_float64_that_float32_lacks_is_named_on_both_ways(backend: Backend) -> None:
    rows = np.ones((2, 32))
    rows[1, 5] = 1e300
    with pytest.raises(NonFiniteWeightError, match="row 1, column 5 is inf"):
        encode("Q8_0", rows, backend=backend)


def test_a_copy_needs_no_torch(tmp_path: Path) -> None:
    base: Any = _file(tmp_path / "wide.gguf", "F16")
    out = tmp_path / "copy.gguf"
    subprocess.run([sys.executable, "-c", WITHOUT, str(base), str(out), "COPY"], check=True)
    found, wanted = open_gguf(out), open_gguf(base)
    assert {name: found[name].raw() for name in found} == {name: wanted[name].raw() for name in wanted}
