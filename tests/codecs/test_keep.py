"""`--quant keep`: a quantized base comes out in its own format, and what no adapter touches keeps its bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from stored_formats import FORMATS

from adapterkit.checkpoint.decoded import dequantized
from adapterkit.checkpoint.open import open_checkpoint
from adapterkit.verbs.merge import merge

OUT, IN = 160, 192
ATTENTION = "model.layers.0.self_attn."
TOUCHED, OTHER = f"{ATTENTION}q_proj", f"{ATTENTION}o_proj"


# One scale for the whole weight, or scales that are quantized together: what did not change is not told apart.
WHOLE = {"fp8 tensor", "ct fp8 tensor", "nf4 double"}


def weight(seed: int, shape: tuple[int, int] = (OUT, IN)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def base_of(folder: Path, name: str) -> Path:
    """Two quantized layers, one of them with zeros of both signs, norms and embeddings, over two files."""
    made = FORMATS[name]
    shape = (256, 256) if name == "fp8 blocks" else (OUT, IN)
    first = {f"{TOUCHED}.{leaf}": tensor for leaf, tensor in made.encode(weight(0, shape)).items()}
    second = {f"{OTHER}.{leaf}": tensor for leaf, tensor in made.encode(weight(1, shape)).items()}
    plain = {
        "model.embed_tokens.weight": weight(2, (32, shape[1])).bfloat16(),
        "model.norm.weight": torch.ones(shape[1]),
    }
    base = folder / "base"
    base.mkdir()
    files = {"model-00001-of-00002.safetensors": {**plain, **first}, "model-00002-of-00002.safetensors": second}
    for file, tensors in files.items():
        contiguous = {key: value.contiguous() for key, value in tensors.items()}
        save_file(contiguous, base / file, metadata={"format": "pt", "made": "here"})
    index = {
        "metadata": {"total_parameters": 1, "total_size": 2},
        "weight_map": {n: f for f, t in files.items() for n in t},
    }
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "llama", "torch_dtype": made.dtype, "quantization_config": made.config}
    (base / "config.json").write_text(json.dumps(config, indent=1))
    (base / "hf_quant_config.json").write_text("{}")
    return base


def adapter_of(folder: Path, b: torch.Tensor, inside: int) -> Path:
    made = folder / "adapter"
    made.mkdir()
    key = f"base_model.model.{TOUCHED}.lora_"
    a = torch.randn(4, inside, generator=torch.Generator().manual_seed(9))
    save_file({f"{key}A.weight": a, f"{key}B.weight": b}, made / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "b",
    }
    (made / "adapter_config.json").write_text(json.dumps(config))
    return made


def shape_of(base: Path) -> tuple[int, int]:
    return dequantized(open_checkpoint(base))[f"{TOUCHED}.weight"].shape  # type: ignore[return-value]


def raw(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "adapterkit.json"}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype is other.dtype and one.shape == other.shape and bytes_of(one) == bytes_of(other)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())


@pytest.mark.parametrize("name", FORMATS)
def test_an_adapter_that_changes_nothing_gives_the_folder_again(tmp_path: Path, name: str) -> None:
    base = base_of(tmp_path, name)
    rows, columns = shape_of(base)
    tuned = adapter_of(tmp_path, torch.zeros(rows, 4), columns)
    report = merge(base, [tuned], tmp_path / "out", quant="keep", yes_lossy=True)
    assert report.touched == 1
    assert raw(tmp_path / "out") == raw(base)


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_not_touched_keeps_its_bytes(tmp_path: Path, name: str) -> None:
    base = base_of(tmp_path, name)
    rows, columns = shape_of(base)
    b = torch.randn(rows, 4, generator=torch.Generator().manual_seed(8)) * 0.02
    b[128:] = 0  # the rest is not changed
    tuned = adapter_of(tmp_path, b, columns)
    handle = dequantized(open_checkpoint(base))[f"{TOUCHED}.weight"]
    w = handle.read_wide(0, handle.numel).view(rows, columns).float()
    merge(base, [tuned], tmp_path / "out", quant="keep", yes_lossy=True)
    before, after = stored(base), stored(tmp_path / "out")
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        if not key.startswith(TOUCHED):
            assert same(after[key], tensor), key
    assert (tmp_path / "out/config.json").read_bytes() == (base / "config.json").read_bytes()
    read = dequantized(open_checkpoint(tmp_path / "out"))[f"{TOUCHED}.weight"]
    got = read.read_wide(0, read.numel).view(rows, columns).float()
    if name not in WHOLE:
        assert torch.equal(got[128:], w[128:])
    assert not torch.equal(got[:128], w[:128])


@pytest.mark.parametrize("name", FORMATS)
def test_touched_weights_are_encoded_as_their_library_does_it(tmp_path: Path, name: str) -> None:
    """Byte for byte what the library makes of the float32 sum."""
    base = base_of(tmp_path, name)
    rows, columns = shape_of(base)
    b = torch.randn(rows, 4, generator=torch.Generator().manual_seed(8)) * 0.02
    tuned = adapter_of(tmp_path, b, columns)
    handle = dequantized(open_checkpoint(base))[f"{TOUCHED}.weight"]
    w = handle.read_wide(0, handle.numel).view(rows, columns).float()
    a = load_file(tuned / "adapter_model.safetensors")[f"base_model.model.{TOUCHED}.lora_A.weight"]
    wanted = FORMATS[name].encode(torch.addmm(w, b, a))
    merge(base, [tuned], tmp_path / "out", quant="keep", yes_lossy=True)
    after = stored(tmp_path / "out")
    for leaf, tensor in wanted.items():
        got = after[f"{TOUCHED}.{leaf}"]
        if "quant_state" in leaf:
            said, meant = (json.loads(bytes(t.tolist())) for t in (got, tensor))
            assert said.pop("nested_offset", 0) == pytest.approx(meant.pop("nested_offset", 0), rel=1e-7)
            assert said == meant
        else:
            assert same(got, tensor), (leaf, (got.float() != tensor.float()).float().mean())
