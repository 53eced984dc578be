"""Experts as MLX stacks them, quantized by mlx; adapters of mlx-lm and PEFT's names for single experts onto them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import read_tensors, write_adapter, write_checkpoint
from safetensors.torch import save_file

import adapterkit
from adapterkit.errors import UnsupportedAdapter

mx = pytest.importorskip("mlx.core")

EXPERTS, OUT, WIDTH, RANK = 3, 32, 64, 2


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def quantized(weight: torch.Tensor, mode: str, bits: int, size: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What mlx stores of a weight, by leaf, and the values that it decodes."""
    import numpy as np

    made = mx.quantize(mx.array(weight.numpy()), group_size=size, bits=bits, mode=mode)
    values = mx.dequantize(*made, group_size=size, bits=bits, mode=mode, dtype=mx.float32)
    parts = {
        leaf: torch.from_numpy(np.array(part)) for leaf, part in zip(("weight", "scales", "biases"), made, strict=False)
    }
    return parts, torch.from_numpy(np.array(values))


def model(folder: Path, block: str, kind: str, mode: str, bits: int, size: int) -> tuple[Path, dict[str, torch.Tensor]]:
    tensors, values = {"model.norm.weight": torch.ones(WIDTH)}, {}
    for seed, name in enumerate(("gate_proj", "up_proj", "down_proj")):
        shape = (EXPERTS, WIDTH, OUT) if name == "down_proj" else (EXPERTS, OUT, WIDTH)
        path = f"model.layers.0.{block}.switch_mlp.{name}"
        parts, values[path] = quantized(random(seed, *shape), mode, bits, size)
        tensors |= {f"{path}.{leaf}": part for leaf, part in parts.items()}
    said = {"group_size": size, "bits": bits, "mode": mode}
    config = {"architectures": ["X"], "model_type": kind, "quantization": said, "quantization_config": said}
    write_checkpoint(folder, tensors, config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "mlx"})
    return folder, values


@pytest.mark.parametrize(
    ("block", "kind", "names", "mode", "bits", "size"),
    [
        ("mlp", "olmoe", ("gate_proj", "up_proj", "down_proj"), "affine", 4, 32),
        ("block_sparse_moe", "mixtral", ("w1", "w3", "w2"), "affine", 8, 32),
        ("feed_forward", "lfm2_moe", ("w1", "w3", "w2"), "affine", 3, 32),
        ("mlp", "qwen3_moe", ("gate_proj", "up_proj", "down_proj"), "mxfp4", 4, 32),
    ],
)
def test_adapters_onto_stacks(
    block: str, kind: str, names: tuple[str, ...], mode: str, bits: int, size: int, tmp_path: Path
) -> None:
    base, values = model(tmp_path / "base", block, kind, mode, bits, size)
    ours, theirs, expected = {}, {}, {}
    for seed, ((path, value), name) in enumerate(zip(values.items(), names, strict=True)):
        a, b = random(10 + seed, EXPERTS, RANK, value.shape[2]), random(20 + seed, EXPERTS, value.shape[1], RANK)
        theirs |= {f"{path}.lora_a": a, f"{path}.lora_b": b}
        for expert in range(EXPERTS):
            key = f"base_model.model.model.layers.0.{block}.experts.{expert}.{name}"
            ours |= {f"{key}.lora_A.weight": a[expert], f"{key}.lora_B.weight": b[expert]}
        expected[f"{path}.weight"] = value.double() + 3.0 * b.double() @ a.double()
    folder = tmp_path / "mlx"
    folder.mkdir()
    save_file(theirs, folder / "adapters.safetensors")
    said = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": RANK, "scale": 3.0, "dropout": 0.0}}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    adapters = [folder, write_adapter(tmp_path / "peft", ours, r=RANK, lora_alpha=3 * RANK)]
    for number, adapter in enumerate(adapters):
        out = tmp_path / f"out{number}"
        report = adapterkit.merge(base, [adapter], out, dtype="f32")
        assert report.touched == 3
        found = read_tensors(out)
        for name, tensor in expected.items():
            assert (found[name] - tensor).abs().max() <= 2e-6
        checked = adapterkit.verify(out, base=base, adapters=[adapter])
        assert checked.ok, checked
        assert any("MLX's layout" in one.text for one in checked.findings)


def test_quantized_again_is_what_mlx_makes_of_the_sum(tmp_path: Path) -> None:
    base, values = model(tmp_path / "base", "mlp", "olmoe", "affine", 4, 32)
    path, value = next(iter(values.items()))
    a, b = random(1, RANK, WIDTH), random(2, OUT, RANK)
    key = "base_model.model.model.layers.0.mlp.experts.1.gate_proj"
    tensors = {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    adapter = write_adapter(tmp_path / "adapter", tensors, r=RANK, lora_alpha=3 * RANK)
    adapterkit.merge(base, [adapter], tmp_path / "out", quant="keep", yes_lossy=True)
    wanted = value.clone()
    wanted[1] += 3.0 * b @ a
    parts, _ = quantized(wanted, "affine", 4, 32)
    before, found = read_tensors(base), read_tensors(tmp_path / "out")
    for leaf, part in parts.items():
        other = found[f"{path}.{leaf}"]
        same = (other == part) if leaf == "weight" else (other - part).abs() <= 1e-6
        assert same[1].float().mean() >= 0.99
    untouched = [name for name in before if not name.startswith(path)]
    assert all(torch.equal(before[name], found[name]) for name in untouched)


def test_the_stack_in_experts_itself(tmp_path: Path) -> None:
    """As gpt-oss and Llama 4 have it, with biases."""
    path = "model.layers.0.mlp.experts.gate_proj"
    parts, value = quantized(random(0, EXPERTS, OUT, WIDTH), "affine", 4, 32)
    tensors = {f"{path}.{leaf}": part for leaf, part in parts.items()} | {f"{path}.bias": random(1, EXPERTS, OUT)}
    said = {"group_size": 32, "bits": 4}
    base = write_checkpoint(tmp_path / "base", tensors, {"model_type": "gpt_oss", "quantization": said})
    a, b = random(2, EXPERTS, RANK, WIDTH), random(3, EXPERTS, OUT, RANK)
    folder = tmp_path / "adapter"
    folder.mkdir()
    # While it trains, mlx-lm saves numbered files beside the last one.
    save_file({f"{path}.lora_a": a, f"{path}.lora_b": b}, folder / "0000100_adapters.safetensors")
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": RANK, "scale": 3.0}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    adapterkit.merge(base, [folder / "0000100_adapters.safetensors"], tmp_path / "out", dtype="f32")
    found = read_tensors(tmp_path / "out")
    assert (found[f"{path}.weight"] - (value.double() + 3.0 * b.double() @ a.double())).abs().max() <= 2e-6
    assert torch.equal(found[f"{path}.bias"], tensors[f"{path}.bias"])
    (folder / "0000100_adapters.safetensors").rename(folder / "weights.safetensors")  # mlx-vlm's other name
    adapterkit.merge(base, [folder], tmp_path / "again", dtype="f32")
    assert torch.equal(read_tensors(tmp_path / "again")[f"{path}.weight"], found[f"{path}.weight"])


def test_to_mlx_stacks_experts_and_names_parts_as_mlx_does(tmp_path: Path) -> None:
    """Experts become one module, zeros for one that is not trained; whole names as keys, for mlx-vlm finds no others."""
    tensors = {}
    for expert in (0, 2):
        key = f"base_model.model.model.language_model.layers.0.mlp.experts.{expert}.gate_proj"
        tensors |= {f"{key}.lora_A.weight": random(expert, RANK, 8), f"{key}.lora_B.weight": random(9, 6, RANK)}
    for seed, path in enumerate(("model.language_model.layers.0.self_attn.q_proj", "lm_head")):
        tensors[f"base_model.model.{path}.lora_A.weight"] = random(4 + seed, RANK, 8)
        tensors[f"base_model.model.{path}.lora_B.weight"] = random(6 + seed, 8, RANK)
    adapter = write_adapter(tmp_path / "adapter", tensors, r=RANK, lora_alpha=RANK)
    adapterkit.convert(adapter, tmp_path / "mlx", to="mlx")
    found = read_tensors(tmp_path / "mlx")
    layer = "language_model.model.layers.0"
    modules = {f"{layer}.mlp.switch_mlp.gate_proj", f"{layer}.self_attn.q_proj", "language_model.lm_head"}
    assert {name.rpartition(".")[0] for name in found} == modules
    a, b = (found[f"{layer}.mlp.switch_mlp.gate_proj.lora_{side}"] for side in "ab")
    assert a.shape == (3, RANK, 8)
    assert b.shape == (3, 6, RANK)
    assert torch.equal(a[2], random(2, RANK, 8))
    assert not a[1].any()
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    assert set(config["lora_parameters"]["keys"]) == modules


def test_peft_on_the_whole_stack(tmp_path: Path) -> None:
    """`target_parameters` of transformers 5, whose gate and up are one parameter, onto MLX's three; to MLX it is refused."""
    base, values = model(tmp_path / "base", "mlp", "olmoe", "affine", 8, 32)
    key = "base_model.model.model.layers.0.mlp.experts"
    a, b = random(1, EXPERTS * RANK, WIDTH), random(2, 2 * OUT, EXPERTS * RANK)
    said = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]}
    tensors = {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    adapter = write_adapter(tmp_path / "adapter", tensors, r=RANK, lora_alpha=2 * RANK, **said)
    adapterkit.merge(base, [adapter], tmp_path / "out", dtype="f32")
    found = read_tensors(tmp_path / "out")
    # PEFT keeps a stack's B as [out, rank * experts], the expert as the fastest index.
    wide_a, wide_b = a.view(EXPERTS, RANK, WIDTH), b.view(2 * OUT, RANK, EXPERTS)
    change = 2.0 * torch.einsum("ore,erw->eow", wide_b.double(), wide_a.double())
    for part, name in ((slice(0, OUT), "gate_proj"), (slice(OUT, None), "up_proj")):
        path = f"model.layers.0.mlp.switch_mlp.{name}"
        assert (found[f"{path}.weight"] - (values[path].double() + change[:, part])).abs().max() <= 2e-6
    with pytest.raises(UnsupportedAdapter, match="whole stacks of experts"):
        adapterkit.convert(adapter, tmp_path / "mlx", to="mlx", base=base)
