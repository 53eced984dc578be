"""`merge --residual` of a GGUF output: llama.cpp loads the two, and computes base + adapter."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")
from gguf_runtime import Tiny, divergence, logprobs, lora
from models import make_adapter
from test_gguf_experts import stacked

import adapterkit
from adapterkit import verify
from adapterkit.gguf.quantize import Quantization
from adapterkit.verbs.convert import convert


@pytest.mark.parametrize(("kind", "mix"), [("llama", "Q4_0"), ("gpt_oss", "MXFP4_MOE")])
def test_llama_cpp_computes_the_merge(kind: str, mix: str, tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    base = tiny(kind)
    if kind == "gpt_oss":
        adapter = stacked(kind, base, tmp_path / "adapter")
    else:
        adapter = make_adapter(tmp_path / "adapter", base.hf, lora(), scale=0.02)
    coarse = tmp_path / "coarse.gguf"
    convert(base.gguf, coarse, quantization=Quantization(mix))
    convert(adapter, tmp_path / "lora.gguf", to="gguf-lora", base=base.gguf)
    expected = logprobs(coarse, lora=tmp_path / "lora.gguf")[0]
    report = adapterkit.merge(coarse, [adapter], tmp_path / "out.gguf", residual=64)
    assert report.residual is not None
    assert report.residual.command.startswith("llama-server -m ")
    alone = divergence(expected, logprobs(tmp_path / "out.gguf")[0])
    found = divergence(expected, logprobs(tmp_path / "out.gguf", lora=tmp_path / "out-residual.gguf")[0])
    assert found < alone / 30
    checked = verify(tmp_path / "out.gguf", base=coarse, adapters=[adapter], level="tensors", min_cosine=0.99)
    assert checked.ok
    assert checked.pair is not None
    assert checked.pair.error < 0.01


def test_every_rounded_matrix_has_a_part(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    """Of a 16-bit model rounding takes something everywhere; the embedding, which llama.cpp cannot amend, is named."""
    base = tiny("llama")
    adapter = make_adapter(tmp_path / "adapter", base.hf, lora(target_modules=["q_proj"]), scale=0.02)
    report = adapterkit.merge(base.gguf, [adapter], tmp_path / "out.gguf", quant="Q4_0", residual=64)
    assert report.residual is not None
    assert report.residual.modules > report.touched
    assert any("token_embd" in note for note in report.residual.notes)
    plain = adapterkit.merge(base.gguf, [adapter], tmp_path / "plain.gguf")
    assert plain.touched == report.touched
    expected = logprobs(tmp_path / "plain.gguf")[0]
    alone = divergence(expected, logprobs(tmp_path / "out.gguf")[0])
    found = divergence(expected, logprobs(tmp_path / "out.gguf", lora=tmp_path / "out-residual.gguf")[0])
    assert found < alone


def test_every_type_of_one_pass_has_its_own(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    base = tiny("llama")
    adapter = make_adapter(tmp_path / "adapter", base.hf, lora(target_modules=["q_proj"]), scale=0.02)
    adapterkit.merge(base.gguf, [adapter], tmp_path / "out.gguf", quant="Q8_0,Q4_0", residual=4)
    adapterkit.merge(base.gguf, [adapter], tmp_path / "alone.gguf", quant="Q4_0", residual=4)
    made = {path.name for path in tmp_path.glob("out-*.gguf")}
    assert made == {f"out-{kind}{end}.gguf" for kind in ("Q8_0", "Q4_0") for end in ("", "-residual")}

    def factors(file: Path) -> dict[str, bytes]:
        return {name: tensor.raw() for name, tensor in adapterkit.open(file).items()}

    assert factors(tmp_path / "out-Q4_0-residual.gguf") == factors(tmp_path / "alone-residual.gguf")
