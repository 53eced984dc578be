"""Single files of kohya's scripts and LyCORIS: the same tensors as PEFT's under other names, so PEFT is the oracle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_adapter, peft_merged, read_tensors, write_checkpoint
from safetensors.torch import save_file

from adapterkit.adapters.fold import fold
from adapterkit.adapters.load import load_adapter
from adapterkit.checkpoint.open import open_checkpoint
from adapterkit.errors import AdapterError, TargetError, UnsupportedAdapter, UsageError
from adapterkit.verbs.convert import convert

MODULES = ["q_proj", "down_proj"]
NAMES = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight", "lora_magnitude_vector": "dora_scale"}


def configs() -> dict[str, Any]:
    import peft

    pattern = {"rank_pattern": {"q_proj": 3}}
    return {
        "lora": peft.LoraConfig(target_modules=MODULES, r=6, lora_alpha=9, **pattern),
        "dora": peft.LoraConfig(target_modules=MODULES, r=6, lora_alpha=9, use_dora=True),
        "loha": peft.LoHaConfig(target_modules=MODULES, r=4, alpha=7, **pattern),
        "lokr": peft.LoKrConfig(target_modules=MODULES, r=2, alpha=3),
        "lokr_both": peft.LoKrConfig(target_modules=MODULES, r=2, alpha=3, decompose_both=True),
        "lokr_whole": peft.LoKrConfig(target_modules=MODULES, r=64, alpha=64),
    }


def flattened(adapter: Path, out: Path, alpha: float | None, dtype: torch.dtype = torch.float32) -> Path:
    """A PEFT adapter as such a file; ``alpha`` becomes a tensor beside every module."""
    tensors: dict[str, torch.Tensor] = {}
    for key, tensor in read_tensors(adapter).items():
        path, _, leaf = key.removeprefix("base_model.model.").partition(
            next(f".{word}" for word in ("lora_", "hada_", "lokr_") if f".{word}" in key)
        )
        word = key.removeprefix("base_model.model.")[len(path) + 1 :]
        flat = "lora_te_" + path.replace(".", "_")
        # LyCORIS keeps the norms of the outputs as a column.
        tensors[f"{flat}.{NAMES.get(word, word)}"] = tensor.unsqueeze(1) if tensor.ndim == 1 else tensor.contiguous()
        if alpha is not None:
            tensors[f"{flat}.alpha"] = torch.tensor(alpha, dtype=dtype)
        del leaf
    save_file(tensors, out)
    return out


def merged(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    found = fold(open_checkpoint(base), [load_adapter(adapter)]).checkpoint
    return {name: tensor.read(0, tensor.numel).view(tensor.shape) for name, tensor in found.tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", sorted(configs()))
def test_merges_as_the_peft_adapter_of_the_same_tensors(
    kind: str, dtype: torch.dtype, make_base: Callable[..., Path], tmp_path: Path
) -> None:
    base, config = make_base("llama"), configs()[kind]
    adapter = make_adapter(tmp_path / "adapter", base, config)
    alpha = getattr(config, "lora_alpha", None) or config.alpha
    single = flattened(adapter, tmp_path / "file.safetensors", float(alpha), dtype)
    ours, exact = merged(base, single), peft_merged(base, adapter, tmp_path / "peft").exact
    before = read_tensors(base)
    for name, tensor in exact.items():
        delta = (tensor - before[name]).abs().max()
        assert (ours[name] - tensor).abs().max() <= 2e-6 * delta
    assert sum(not torch.equal(ours[name], before[name]) for name in before) == 4


def test_without_alpha_the_scale_is_one(make_base: Callable[..., Path], tmp_path: Path) -> None:
    import peft

    base = make_base("llama")
    adapter = make_adapter(tmp_path / "adapter", base, peft.LoraConfig(target_modules=MODULES, r=5, lora_alpha=5))
    ours = merged(base, flattened(adapter, tmp_path / "file.safetensors", None))
    exact = merged(base, adapter)
    assert all(torch.equal(ours[name], exact[name]) for name in exact)


def test_to_peft_and_to_mlx(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base("llama")
    adapter = make_adapter(tmp_path / "adapter", base, configs()["lora"])
    single = flattened(adapter, tmp_path / "file.safetensors", 9.0)
    with pytest.raises(UsageError, match="names modules without dots"):
        convert(single, tmp_path / "peft", to="peft")
    convert(single, tmp_path / "peft", to="peft", base=base)
    before, after = read_tensors(adapter), read_tensors(tmp_path / "peft")
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    exact = peft_merged(base, tmp_path / "peft", tmp_path / "one").exact
    convert(single, tmp_path / "mlx", to="mlx", base=base)
    ours = merged(base, tmp_path / "mlx")
    assert max(float((ours[name] - exact[name]).abs().max()) for name in exact) <= 2e-6


ONE = {"lora_te_a_b.lora_down.weight": (4, 8), "lora_te_a_b.lora_up.weight": (8, 4)}
BAD = [
    ({"lora_te_a_b.oft_diag": (8, 4, 4)}, UnsupportedAdapter, "'lora_te_a_b.oft_diag' belongs to an algorithm"),
    ({"lora_te_a_b.lambda_layer": (1, 4)}, UnsupportedAdapter, "lambda_layer' belongs to T-LoRA"),
    ({**ONE, "lora_te_a_b.scalar": ()}, UnsupportedAdapter, "scalar' is a scale that LyCORIS"),
    ({**ONE, "lora_te_a_b.weight": (8, 8)}, UnsupportedAdapter, "belongs to an algorithm"),
    ({**ONE, "oft_te_a_b.lora_up.weight": (8, 4)}, AdapterError, "two modules called 'a_b'"),
    ({**ONE, "lora_te_x.alpha": ()}, AdapterError, "'x' has an alpha and nothing else"),
    ({**ONE, "lora_te_a_b.alpha": (2,)}, AdapterError, "is no number"),
    ({"lora_te_a_b.lora_down.weight": (4,)}, AdapterError, "no factor"),
    ({"some.weight": (4, 4)}, AdapterError, "no keys of a single-file adapter"),
]


@pytest.mark.parametrize(("shapes", "kind", "words"), BAD, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_files(shapes: dict[str, tuple[int, ...]], kind: type[Exception], words: str, tmp_path: Path) -> None:
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, tmp_path / "file.safetensors")
    with pytest.raises(kind, match=words):
        load_adapter(tmp_path / "file.safetensors")


def test_a_name_without_a_module_is_told(make_base: Callable[..., Path], tmp_path: Path) -> None:
    save_file({name: torch.ones(shape) for name, shape in ONE.items()}, tmp_path / "file.safetensors")
    with pytest.raises(TargetError, match="'a_b' stands for no module"):
        merged(make_base("llama"), tmp_path / "file.safetensors")


def test_a_loose_file_may_lie_beside_the_output(make_base: Callable[..., Path], tmp_path: Path) -> None:
    import adapterkit

    base = make_base("llama")
    single = flattened(make_adapter(tmp_path / "adapter", base, configs()["lora"]), tmp_path / "file.safetensors", 9.0)
    (tmp_path / "something else.txt").write_text("not the adapter's")
    adapterkit.merge(base, [single], tmp_path / "merged")
    adapterkit.merge(base, [single], tmp_path / "merged", force=True)
    record = (tmp_path / "merged" / "adapterkit.json").read_bytes()
    (tmp_path / "something else.txt").unlink()
    adapterkit.merge(base, [single], tmp_path / "merged", force=True)
    assert (tmp_path / "merged" / "adapterkit.json").read_bytes() == record  # what lies beside it is not its own
    with pytest.raises(UsageError, match="lies in or over"):
        adapterkit.merge(base, [single], single, force=True)


@pytest.mark.parametrize("kind", ["lora", "loha", "mixed"])
def test_each_base_takes_its_part(kind: str, tmp_path: Path) -> None:
    """As SDXL's files: two text encoders whose first layers have the same names, and a UNet; the shapes tell."""
    widths = {"te1": 8, "te2": 12, "unet": 8}
    paths = {
        "te1": [f"text_model.encoder.layers.{i}.mlp.fc1" for i in range(2)],
        "te2": [f"text_model.encoder.layers.{i}.mlp.fc1" for i in range(3)],
        "unet": ["down_blocks.0.attentions.0.to_q"],
    }
    tensors: dict[str, torch.Tensor] = {}
    deltas: dict[tuple[str, str], torch.Tensor] = {}
    for part, width in widths.items():
        for path in paths[part]:
            flat = f"lora_{part}_{path.replace('.', '_')}"
            up, down = torch.randn(width, 2), torch.randn(2, width)
            if kind == "loha" or (kind == "mixed" and part == "te2"):
                other_up, other_down = torch.randn(width, 2), torch.randn(2, width)
                names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
                tensors |= {f"{flat}.{n}": t for n, t in zip(names, (up, down, other_up, other_down), strict=True)}
                delta = (up.double() @ down.double()) * (other_up.double() @ other_down.double())
            else:
                tensors |= {f"{flat}.lora_up.weight": up, f"{flat}.lora_down.weight": down}
                delta = up.double() @ down.double()
            tensors[f"{flat}.alpha"] = torch.tensor(1.0)
            deltas[part, path] = delta / 2
    save_file(tensors, tmp_path / "file.safetensors")
    assert load_adapter(tmp_path / "file.safetensors").notes == ("read as a kohya or LyCORIS file for te1, te2, unet",)
    for part, width in widths.items():
        weights = {f"{path}.weight": torch.randn(width, width) for path in paths[part]}
        base = write_checkpoint(tmp_path / part, weights, {"model_type": "clip_text_model"} if part != "unet" else {})
        ours = merged(base, tmp_path / "file.safetensors")
        for path in paths[part]:
            assert torch.allclose(
                ours[f"{path}.weight"].double(), weights[f"{path}.weight"] + deltas[part, path], atol=1e-5
            )
