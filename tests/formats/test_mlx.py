"""MLX adapters: hand-written files against mlx-lm's formulas in float64, and round trips through PEFT's format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import edit_config, make_adapter, read_tensors
from safetensors.torch import save_file

from adapterkit.adapters.fold import fold
from adapterkit.adapters.load import load_adapter
from adapterkit.checkpoint.open import open_checkpoint
from adapterkit.errors import AdapterError, NotFound, UnsupportedAdapter, UsageError
from adapterkit.verbs.convert import convert

PARAMETERS = {"rank": 4, "scale": 7.5, "dropout": 0.0}


def write(folder: Path, tensors: dict[str, torch.Tensor], kind: str = "lora", **fields: Any) -> Path:
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapters.safetensors")
    config = {"fine_tune_type": kind, "num_layers": -1, "lora_parameters": PARAMETERS, "model": "base", **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merged(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    found = fold(open_checkpoint(base), [load_adapter(adapter)]).checkpoint
    return {name: tensor.read(0, tensor.numel).view(tensor.shape) for name, tensor in found.tensors.items()}


def factors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [0.3 * torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_linear_layer_and_an_embedding(kind: str, make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base("llama", tie_word_embeddings=False)
    before = read_tensors(base)
    paths = ["model.layers.0.mlp.up_proj", "model.embed_tokens"]
    tensors, expected = {}, {}
    for path in paths:
        w = before[f"{path}.weight"].double()
        embedding = path.endswith("embed_tokens")
        first, last = w.shape if embedding else (w.shape[1], w.shape[0])
        a, b = factors((first, 4), (4, last))
        delta = 7.5 * a.double() @ b.double()
        new = w + (delta if embedding else delta.T)
        tensors |= {f"{path}.lora_a": a, f"{path}.lora_b": b}
        if kind == "dora":
            (m,) = factors((w.shape[0],))
            tensors[f"{path}.m"] = m + 2
            new = ((m + 2).double() / new.norm(dim=1))[:, None] * new
        expected[f"{path}.weight"] = new
    ours = merged(base, write(tmp_path / "adapter", tensors, kind))
    for name, tensor in ours.items():
        if name in expected:
            delta = (expected[name] - before[name].double()).abs().max()
            assert (tensor - expected[name]).abs().max() <= 2e-6 * delta
        else:
            assert torch.equal(tensor, before[name])


def test_stacked_experts(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base("mixtral")
    before = read_tensors(base)
    names = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    tensors, expected = {}, {}
    experts = sum(".layers.0.block_sparse_moe.experts." in n and n.endswith("w1.weight") for n in before)
    assert experts > 1
    for name, alone in names.items():
        stored = [before[f"model.layers.0.block_sparse_moe.experts.{e}.{alone}.weight"] for e in range(experts)]
        out, width = stored[0].shape
        a, b = factors((experts, 4, width), (experts, out, 4))
        path = f"model.layers.0.block_sparse_moe.switch_mlp.{name}"
        tensors |= {f"{path}.lora_a": a, f"{path}.lora_b": b}
        for e, w in enumerate(stored):
            key = f"model.layers.0.block_sparse_moe.experts.{e}.{alone}.weight"
            expected[key] = w.double() + 7.5 * b[e].double() @ a[e].double()
    ours = merged(base, write(tmp_path / "adapter", tensors))
    for key, tensor in expected.items():
        assert (ours[key] - tensor).abs().max() <= 2e-6 * (tensor - before[key]).abs().max()
    assert sum(not torch.equal(ours[name], before[name]) for name in before) == len(expected)


def test_a_full_fine_tune_replaces_parameters(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base("llama")
    before = read_tensors(base)
    name = "model.layers.1.self_attn.k_proj.weight"
    ours = merged(base, write(tmp_path / "adapter", {name: before[name] + 1}, "full", lora_parameters=None))
    assert torch.equal(ours[name], before[name] + 1)
    assert sum(not torch.equal(ours[key], before[key]) for key in before) == 1


def test_peft_to_mlx_to_peft_is_bit_equal(make_base: Callable[..., Path], tmp_path: Path) -> None:
    from peft import LoraConfig

    base = make_base("llama", tie_word_embeddings=False)
    config = LoraConfig(r=8, lora_alpha=20, use_rslora=True, target_modules=["q_proj", "down_proj", "embed_tokens"])
    adapter = make_adapter(tmp_path / "adapter", base, config)
    before = {name: tensor for name, tensor in read_tensors(adapter).items() if "base_layer" not in name}
    save_file(before, adapter / "adapter_model.safetensors")
    convert(adapter, tmp_path / "mlx", to="mlx")
    written = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())["lora_parameters"]
    assert written["rank"] == 8
    assert written["scale"] == pytest.approx(20 / 8**0.5, rel=1e-15)
    assert written["keys"] == ["mlp.down_proj", "model.embed_tokens", "self_attn.q_proj"]
    turned = read_tensors(tmp_path / "mlx")
    q = "model.layers.0.self_attn.q_proj"
    assert torch.equal(turned[f"{q}.lora_a"], before[f"base_model.model.{q}.lora_A.weight"].T)
    convert(tmp_path / "mlx", tmp_path / "back", to="peft")
    after = read_tensors(tmp_path / "back")
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    one, two = merged(base, adapter), merged(base, tmp_path / "back")
    assert all((one[name] - two[name]).abs().max() <= 1e-7 for name in one)


def test_what_mlx_cannot_hold(make_base: Callable[..., Path], tmp_path: Path) -> None:
    from peft import LoraConfig

    base = make_base("llama", tie_word_embeddings=False)
    config = LoraConfig(r=8, target_modules=["q_proj"], modules_to_save=["lm_head"])
    adapter = make_adapter(tmp_path / "adapter", base, config)
    with pytest.raises(UnsupportedAdapter, match=r"whole parameters \(lm_head.weight\)"):
        convert(adapter, tmp_path / "mlx", to="mlx")
    model = tmp_path / "model"
    (model / "checkpoint-1").mkdir(parents=True)
    (model / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"model is a whole model, and mlx is a format of adapters; .*mlx_lm.convert"):
        convert(model, tmp_path / "mlx", to="mlx")
    (model / "checkpoint-1" / "adapter_config.json").write_text("{}")
    for missing, said in ((model, "holds adapters in sub-folders"), (tmp_path / "none", "does not exist")):
        with pytest.raises(NotFound, match=said):
            convert(missing, tmp_path / "mlx", to="mlx")
    assert not (tmp_path / "mlx").exists()


BAD: list[tuple[dict[str, Any], dict[str, tuple[int, ...]], type[Exception], str]] = [
    (
        {"fine_tune_type": "magic"},
        {"x.lora_a": (8, 4), "x.lora_b": (4, 8)},
        AdapterError,
        "'fine_tune_type' is 'magic'",
    ),
    ({"lora_parameters": {"rank": 4}}, {"x.lora_a": (8, 4), "x.lora_b": (4, 8)}, AdapterError, "rank and a scale"),
    ({}, {"x.lora_a": (8, 4)}, AdapterError, "'x.lora_a' stands without its x.lora_b"),
    ({}, {"x.m": (8,)}, AdapterError, "'x.m' stands without its x.lora_a"),
    ({}, {"x.lora_a": (8,), "x.lora_b": (8,)}, AdapterError, "no factor"),
    ({}, {"x.lora_a": (8, 4), "x.lora_a_scales": (8, 1)}, UnsupportedAdapter, "quantized factors"),
]


@pytest.mark.parametrize(("fields", "shapes", "kind", "words"), BAD, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_files(
    fields: dict[str, Any], shapes: dict[str, tuple[int, ...]], kind: type[Exception], words: str, tmp_path: Path
) -> None:
    tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
    with pytest.raises(kind, match=words.replace("(", r"\(")):
        load_adapter(write(tmp_path / "adapter", tensors, **({"kind": fields.pop("fine_tune_type", "lora")} | fields)))


def test_a_scale_of_2024_is_not_guessed(tmp_path: Path) -> None:
    tensors = {"x.lora_a": torch.ones(8, 4), "x.lora_b": torch.ones(4, 8)}
    folder = write(tmp_path / "adapter", tensors, lora_parameters={**PARAMETERS, "alpha": 16.0})
    assert load_adapter(folder).config.get("lora_alpha") == 30.0
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["num_layers"]
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_layers": 16}))
    with pytest.raises(AdapterError, match="what 'alpha' means"):
        load_adapter(folder)
    edit_config(folder, lora_parameters=PARAMETERS)
    assert load_adapter(folder).config.get("lora_alpha") == 30.0


def test_an_adapter_of_older_mlx_vlm_is_told(tmp_path: Path) -> None:
    """Factors called A and B, and alpha at the top: its scale meant alpha until 0.7, and alpha / rank since."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    tensors = {"model.layers.0.q_proj.A": torch.randn(8, 2), "model.layers.0.q_proj.B": torch.randn(2, 8)}
    save_file(tensors, folder / "adapters.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"rank": 2, "alpha": 8, "dropout": 0.0}))
    with pytest.raises(UnsupportedAdapter, match=r"of mlx-vlm before 0\.7"):
        load_adapter(folder)
    (folder / "adapter_config.json").write_text(json.dumps({"lora_parameters": {"rank": 2, "scale": 4.0}}))
    adapter = load_adapter(folder)
    assert adapter.config.scaling("model.layers.0.q_proj", 2) == 4.0
    assert sorted(adapter.tensors) == [f"model.layers.0.q_proj.lora_{side}.weight" for side in "AB"]
