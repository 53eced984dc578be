"""What llama.cpp computes with our files is what transformers and PEFT compute with the originals."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")
import gguf_zoo as zoo
from gguf_runtime import Tiny, far, live, logprobs, lora
from models import make_adapter, read_tensors

import adapterkit
from adapterkit.errors import UnsupportedAdapter, UsageError
from adapterkit.gguf.quantize import Quantization
from adapterkit.verbs.convert import convert

MOE = {"mixtral": "mlp", "qwen3_moe": "mlp", "gpt_oss": "mlp", "llama4": "feed_forward"}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# ggml computes GELU by a table in half precision; the other kinds agree to the rounding of float32.
TOLERANCE = {"gemma2": 5e-3, "gemma3": 5e-3, "starcoder2": 1e-3, "gpt2": 1e-3, "gpt_neox": 1e-3}


@pytest.mark.parametrize("kind", [kind for kind in zoo.KINDS if kind != "llama_tied"])
def test_merged_and_live_agree_with_peft(kind: str, tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    base = tiny(kind)
    experts = [f"{MOE[kind]}.experts.{part}" for part in ("gate_up_proj", "down_proj")] if kind in MOE else []
    moe = {"target_modules": ATTENTION, "target_parameters": experts} if experts else {}
    adapter = make_adapter(tmp_path / "adapter", base.hf, lora(use_rslora=True, **moe), scale=0.1)
    expected = live(base.hf, adapter)
    assert far(expected, base.plain) > 0.1
    tolerance = TOLERANCE.get(kind, 1e-5)

    adapterkit.merge(base.gguf, [adapter], tmp_path / "merged.gguf")
    assert far(logprobs(tmp_path / "merged.gguf")[0], expected) < tolerance

    convert(adapter, tmp_path / "lora.gguf", to="gguf-lora", base=base.gguf)
    assert far(logprobs(base.gguf, lora=tmp_path / "lora.gguf")[0], expected) < tolerance

    # The Hugging Face base says the same about names and rows as the GGUF.
    convert(adapter, tmp_path / "lora2.gguf", to="gguf-lora", base=base.hf)
    assert (tmp_path / "lora2.gguf").read_bytes() == (tmp_path / "lora.gguf").read_bytes()

    convert(tmp_path / "lora.gguf", tmp_path / "back", to="peft", base=base.hf)
    assert far(live(base.hf, tmp_path / "back"), expected) < 1e-6


ALPHAS = {"q_proj": 32, "layers.1.mlp.up_proj": 2}
RANKS = {"k_proj": 2, "down_proj": 7}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": ALPHAS},
        {"rank_pattern": RANKS},
        {"alpha_pattern": ALPHAS, "rank_pattern": RANKS},
        {"alpha_pattern": ALPHAS, "rank_pattern": RANKS, "use_rslora": True},
    ],
)
def test_scalings(fields: dict[str, Any], tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    base = tiny("llama")
    adapter = make_adapter(tmp_path / "adapter", base.hf, lora(**fields), scale=0.1)
    expected = live(base.hf, adapter)
    convert(adapter, tmp_path / "lora.gguf", to="gguf-lora", base=base.gguf)
    adapterkit.merge(base.gguf, [adapter], tmp_path / "merged.gguf")
    assert far(logprobs(base.gguf, lora=tmp_path / "lora.gguf")[0], expected) < 1e-5
    assert far(logprobs(tmp_path / "merged.gguf")[0], expected) < 1e-5
    convert(tmp_path / "lora.gguf", tmp_path / "back", to="peft", base=base.hf)
    assert far(live(base.hf, tmp_path / "back"), expected) < 1e-6


def test_embedding_and_output_layer(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    base = tiny("llama")
    config = lora(target_modules=["embed_tokens", "lm_head", "q_proj"])
    adapter = make_adapter(tmp_path / "adapter", base.hf, config, scale=0.1)
    expected = live(base.hf, adapter)
    report = convert(adapter, tmp_path / "lora.gguf", to="gguf-lora", base=base.gguf)
    assert any("left out" in note for note in report.notes)
    adapterkit.merge(base.gguf, [adapter], tmp_path / "merged.gguf")
    assert far(logprobs(base.gguf, lora=tmp_path / "lora.gguf")[0], expected) < 1e-5
    assert far(logprobs(tmp_path / "merged.gguf")[0], expected) < 1e-5
    convert(tmp_path / "lora.gguf", tmp_path / "back", to="peft", base=base.hf)
    assert far(live(base.hf, tmp_path / "back"), expected) < 1e-6


def test_tied_embedding_becomes_two_tensors(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    base = tiny("llama_tied")
    config = lora(target_modules=["embed_tokens", "q_proj"])
    adapter = make_adapter(tmp_path / "adapter", base.hf, config, scale=0.1)
    report = adapterkit.merge(base.gguf, [adapter], tmp_path / "merged.gguf")
    assert report.added == ("output.weight",)
    assert far(logprobs(tmp_path / "merged.gguf")[0], live(base.hf, adapter)) < 1e-5
    with pytest.raises(UnsupportedAdapter, match="one tensor for the embedding and the output layer"):
        convert(adapter, tmp_path / "lora.gguf", to="gguf-lora", base=base.gguf)


def test_dora_merges_and_is_refused_as_lora(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    base = tiny("llama")
    adapter = make_adapter(tmp_path / "adapter", base.hf, lora(use_dora=True), scale=0.1)
    adapterkit.merge(base.gguf, [adapter], tmp_path / "merged.gguf")
    assert far(logprobs(tmp_path / "merged.gguf")[0], live(base.hf, adapter)) < 1e-5
    with pytest.raises(UnsupportedAdapter, match=r"dora.*merge it instead"):
        convert(adapter, tmp_path / "lora.gguf", to="gguf-lora", base=base.gguf)
    assert not (tmp_path / "lora.gguf").exists()


@pytest.mark.parametrize("fields", [{"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"lora_bias": True}])
def test_what_a_lora_file_cannot_hold(fields: dict[str, Any], tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    base = tiny("qwen2")
    adapter = make_adapter(tmp_path / "adapter", base.hf, lora(target_modules=["q_proj"], **fields), scale=0.1)
    adapterkit.merge(base.gguf, [adapter], tmp_path / "merged.gguf")
    assert far(logprobs(tmp_path / "merged.gguf")[0], live(base.hf, adapter)) < 1e-5
    with pytest.raises(UnsupportedAdapter, match="merge it instead"):
        convert(adapter, tmp_path / "lora.gguf", to="gguf-lora", base=base.gguf)


def test_two_adapters_on_one_base(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    """Halves of one adapter with twice its weight."""
    base = tiny("qwen3")
    adapter = make_adapter(tmp_path / "adapter", base.hf, lora(), scale=0.1)
    adapterkit.merge(base.gguf, [adapter, adapter], tmp_path / "merged.gguf", weights=[0.25, 0.75])
    assert far(logprobs(tmp_path / "merged.gguf")[0], live(base.hf, adapter)) < 1e-5


@pytest.mark.parametrize(("mix", "divergence"), [("F16", 1e-5), ("BF16", 1e-4), ("Q8_0", 1e-4), ("Q4_K_M", 2e-3)])
def test_quantized_results(mix: str, divergence: float, tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    import numpy as np

    base = tiny("llama")
    adapter = make_adapter(tmp_path / "adapter", base.hf, lora(), scale=0.1)
    expected = live(base.hf, adapter)
    adapterkit.merge(base.gguf, [adapter], tmp_path / "merged.gguf", quantization=Quantization(mix))
    found = logprobs(tmp_path / "merged.gguf")[0]

    def kl(other: Any) -> float:
        return float((np.exp(expected) * (expected - other)).sum(-1).max())

    assert kl(found) < divergence
    assert kl(found) < kl(base.plain) / 5
    if mix == "F16":
        assert far(found, expected) < 1e-2


def test_what_would_drown_is_kept_wider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer's change is a thousandth of the other's; only that one needs more bits, from a folder and from a GGUF."""
    import arch_zoo
    from safetensors.torch import save_file

    monkeypatch.setattr("adapterkit.gguf.vocab.read_vocab", arch_zoo.read_vocab)
    arch_zoo.build(tmp_path / "hf", "llama")
    convert(tmp_path / "hf", tmp_path / "base.gguf")
    config = lora(target_modules=["q_proj", "v_proj"])
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "hf", config, scale=0.1)
    given = {name: t * (1e-3 if "layers.0" in name else 1) for name, t in read_tensors(adapter).items()}
    save_file(given, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    asked = Quantization("Q4_0", keep_touched="F16", keep_below=0.3)
    for source in ("hf", "base.gguf"):
        out = tmp_path / f"{source}-out.gguf"
        report = adapterkit.merge(tmp_path / source, [adapter], out, quantization=asked)
        found = adapterkit.open(out)
        kinds = {name: found[name].dtype.code for name in found if ".attn_q." in name or ".attn_v." in name}
        assert kinds == {f"blk.{i}.attn_{p}.weight": ("F16", "Q4_0")[i] for i in range(2) for p in "qv"}
        assert any("2 of 4 changed tensors" in note for note in report.notes)


def test_quantized_bases(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    """Q8_0 holds the change; on Q4_0 it is kept when the touched tensors become Q8_0, and refused otherwise."""
    base = tiny("llama")
    adapter = make_adapter(tmp_path / "adapter", base.hf, lora(target_modules=ATTENTION), scale=0.1)
    convert(adapter, tmp_path / "lora.gguf", to="gguf-lora", base=base.gguf)
    for mix in ("Q8_0", "Q4_0"):
        quantized = tmp_path / f"{mix}.gguf"
        convert(base.gguf, quantized, quantization=Quantization(mix))
        beside = logprobs(quantized, lora=tmp_path / "lora.gguf")[0]
        if mix == "Q4_0":
            with pytest.raises(UsageError, match=r"keep_touched='Q8_0'"):
                adapterkit.merge(quantized, [adapter], tmp_path / "no.gguf")
            lossy = Quantization(yes_lossy=True)
            report = adapterkit.merge(quantized, [adapter], tmp_path / "lossy.gguf", quantization=lossy)
            assert any("rounded away" in note for note in report.notes)
        asked = Quantization(keep_touched="Q8_0")
        adapterkit.merge(quantized, [adapter], tmp_path / f"m-{mix}.gguf", quantization=asked)
        assert far(logprobs(tmp_path / f"m-{mix}.gguf")[0], beside) < 0.03
        assert far(logprobs(quantized)[0], beside) > 0.1
    assert far(logprobs(tmp_path / "lossy.gguf")[0], beside) > far(logprobs(tmp_path / "m-Q4_0.gguf")[0], beside)


def test_a_set_of_parts_runs(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    base = tiny("qwen2")
    adapter = make_adapter(tmp_path / "adapter", base.hf, lora(), scale=0.1)
    report = adapterkit.merge(base.gguf, [adapter], tmp_path / "m.gguf", max_shard_size="120kB")
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) > 2
    assert report.files == tuple(part.name for part in parts)
    assert far(logprobs(parts[0])[0], live(base.hf, adapter)) < 1e-5
    # A set is a base like any other, and one file comes out of it unless asked otherwise.
    convert(parts[0], tmp_path / "one.gguf")
    adapterkit.merge(base.gguf, [adapter], tmp_path / "whole.gguf")
    assert far(logprobs(tmp_path / "one.gguf")[0], logprobs(tmp_path / "whole.gguf")[0]) == 0
