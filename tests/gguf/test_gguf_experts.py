"""Experts that checkpoints keep on their side (gpt-oss, llama4): by stack, by expert, and on quantized bases."""

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
from gguf_runtime import Tiny, divergence, far, live, logprobs, lora
from models import make_adapter, read_tensors, write_adapter

import adapterkit
from adapterkit.errors import TargetError
from adapterkit.gguf.quantize import Quantization
from adapterkit.verbs.convert import convert

PARENTS = {"gpt_oss": "mlp", "llama4": "feed_forward"}


def stacked(kind: str, base: Tiny, folder: Path) -> Path:
    """An adapter on the two stacks of every layer, as PEFT trains it."""
    experts = [f"{PARENTS[kind]}.experts.{part}" for part in ("gate_up_proj", "down_proj")]
    config = lora(target_modules=[], target_parameters=experts)
    return make_adapter(folder, base.hf, config, scale=0.3)


def by_expert(kind: str, adapter: Path, folder: Path, fused: bool) -> Path:
    """The same change as a LoRA on each expert's own linear layers, gate and up in one or apart."""
    found: dict[str, Any] = {}
    for key, a in read_tensors(adapter).items():
        if "lora_A" not in key:
            continue
        b = read_tensors(adapter)[key.replace("lora_A", "lora_B")]
        # The wrapper of gate_up_proj is the inner one.
        stem, part = key.split(".lora_A")[0], "gate_up_proj" if ".base_layer" in key else "down_proj"
        stem = stem.removesuffix(".base_layer")
        for expert in range(4):
            right, left = a.view(4, 4, -1)[expert], b.view(b.shape[0], 4, 4)[:, :, expert]
            if kind == "llama4":
                right, left = left.T, right.T
            pieces = {f"experts.{part}s.{expert}": left}
            if not fused:
                half = left.shape[0] // 2
                gate, up = (left[::2], left[1::2]) if kind == "gpt_oss" else (left[:half], left[half:])
                apart = {"gate_proj": gate, "up_proj": up} if part == "gate_up_proj" else {"down_proj": left}
                pieces = {f"experts.{expert}.{name}": rows for name, rows in apart.items()}
            for path, rows in pieces.items():
                module = stem.replace("experts", path)
                found |= {f"{module}.lora_A.weight": right.clone(), f"{module}.lora_B.weight": rows.clone()}
    return write_adapter(folder, found, target_modules=["gate_up_proj", "down_proj"])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", PARENTS)
def test_the_same_change_by_stack_and_by_expert(
    kind: str, fused: bool, tiny: Callable[[str], Tiny], tmp_path: Path
) -> None:
    base = tiny(kind)
    adapter = stacked(kind, base, tmp_path / "adapter")
    expected = live(base.hf, adapter)
    assert far(expected, base.plain) > 0.1
    experts = by_expert(kind, adapter, tmp_path / "experts", fused)
    adapterkit.merge(base.gguf, [experts], tmp_path / "merged.gguf")
    assert far(logprobs(tmp_path / "merged.gguf")[0], expected) < 1e-5
    convert(experts, tmp_path / "lora.gguf", to="gguf-lora", base=base.gguf)
    assert far(logprobs(base.gguf, lora=tmp_path / "lora.gguf")[0], expected) < 1e-5


@pytest.mark.parametrize("kind", PARENTS)
def test_a_method_that_is_no_low_rank_sum(kind: str, tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    """Whole stacks put in their place: every value of the parameter has to find its own place in the tensors."""
    import numpy as np
    import torch

    base = tiny(kind)
    stem = f"model.layers.1.{PARENTS[kind]}.experts"
    given = read_tensors(base.hf)[f"{stem}.gate_up_proj"]
    new = torch.randn(given.shape, generator=torch.Generator().manual_seed(5)) * 0.1
    folder = write_adapter(
        tmp_path / "adapter", {f"base_model.model.{stem}.gate_up_proj": new}, modules_to_save=["experts"]
    )
    adapterkit.merge(base.gguf, [folder], tmp_path / "merged.gguf")
    found = adapterkit.open(tmp_path / "merged.gguf")
    for part, rows in zoo.unturned(new.numpy(), "", "gate_up", "weight", kind).items():
        tensor = found[f"blk.1.ffn_{part.split('_')[0]}_exps.weight"]
        assert np.array_equal(tensor.read(0, tensor.numel).view(tensor.shape).numpy(), rows)


def test_mxfp4_experts_are_kept_wider(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    """gpt-oss as it is published: experts in MXFP4, the rest in Q8_0."""
    base = tiny("gpt_oss")
    adapter = stacked("gpt_oss", base, tmp_path / "adapter")
    coarse = tmp_path / "coarse.gguf"
    report = convert(base.gguf, coarse, quantization=Quantization("MXFP4_MOE"))
    assert report.types["MXFP4"] == 6
    convert(adapter, tmp_path / "lora.gguf", to="gguf-lora", base=base.gguf)
    beside = logprobs(coarse, lora=tmp_path / "lora.gguf")[0]
    merged = adapterkit.merge(
        coarse, [adapter], tmp_path / "merged.gguf", quantization=Quantization(keep_touched="Q8_0")
    )
    assert merged.touched == 6
    found = logprobs(tmp_path / "merged.gguf")[0]
    assert divergence(beside, found) < divergence(beside, logprobs(coarse)[0]) / 20


def test_an_expert_that_is_not_there(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    import torch

    key = "base_model.model.model.layers.0.mlp.experts.9.gate_proj"
    tensors = {f"{key}.lora_A.weight": torch.ones(4, 64), f"{key}.lora_B.weight": torch.ones(96, 4)}
    adapter = write_adapter(tmp_path / "far", tensors, target_modules=["gate_proj"])
    with pytest.raises(TargetError, match=r"experts\.9\.gate_proj"):
        adapterkit.merge(tiny("gpt_oss").gguf, [adapter], tmp_path / "o.gguf")
