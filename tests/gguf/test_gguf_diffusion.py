"""Image and video models in GGUF, as ComfyUI-GGUF writes them: the checkpoint's own names, some tensors in other dimensions."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch
from gguf_files import random_array, write_gguf
from safetensors.torch import save_file

from adapterkit.cli import main

gguf = pytest.importorskip("gguf")

if TYPE_CHECKING:
    from pathlib import Path

R = 4


class Done:
    """What a command gave back: its exit code and what it said."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *words: object) -> None:
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
        said = capsys.readouterr()
        self.exit_code, self.output = int(stop.value.code or 0), said.out + said.err


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    return partial(Done, capsys)


def lora(path: Path, shapes: dict[str, tuple[int, ...]], names: tuple[str, str]) -> dict[str, torch.Tensor]:
    """A LoRA file of some modules; their deltas."""
    torch.manual_seed(1)
    tensors, deltas = {}, {}
    for module, shape in shapes.items():
        a = torch.randn(R, *shape[1:]) * 0.1
        b = torch.randn(shape[0], R, *[1] * (len(shape) - 2)) * 0.1
        tensors |= {f"{module}.{names[0]}.weight": a, f"{module}.{names[1]}.weight": b}
        deltas[module] = (b.view(shape[0], R) @ a.view(R, -1)).view(shape)
    save_file(tensors, path)
    return deltas


def read(path: Path) -> dict[str, torch.Tensor]:
    found = {}
    for tensor in gguf.GGUFReader(str(path)).tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        found[tensor.name] = torch.from_numpy(values.copy()).float()
    return found


PEFT = ("lora_A", "lora_B")
QKV, PROJ, NORM = (
    "double_blocks.0.img_attn.qkv",
    "double_blocks.0.img_attn.proj",
    "double_blocks.0.img_attn.norm.key_norm.scale",
)
FLUX = {
    f"{QKV}.weight": random_array(192, 64, seed=1),
    f"{PROJ}.weight": random_array(64, 64, seed=2),
    NORM: random_array(32, seed=3),
    "img_in.weight": random_array(64, 16, seed=4),
}


@pytest.mark.parametrize(("kind", "error"), [("F16", 1e-3), ("BF16", 8e-3), ("Q8_0", 2e-2)])
def test_flux_keeps_types_and_all_other_bytes(run, tmp_path: Path, kind: str, error: float) -> None:
    base = write_gguf(tmp_path / "flux.gguf", FLUX, arch="flux", types={f"{QKV}.weight": kind, f"{PROJ}.weight": kind})
    deltas = lora(tmp_path / "l.safetensors", {f"diffusion_model.{QKV}": (192, 64)}, PEFT)
    made = run("merge", base, tmp_path / "l.safetensors", "-o", tmp_path / "out.gguf")
    assert made.exit_code == 0, made.output
    before, after = read(base), read(tmp_path / "out.gguf")
    assert {t.name: t.tensor_type for t in gguf.GGUFReader(str(base)).tensors} == {
        t.name: t.tensor_type for t in gguf.GGUFReader(str(tmp_path / "out.gguf")).tensors
    }
    wanted = before.pop(f"{QKV}.weight") + deltas[f"diffusion_model.{QKV}"]
    assert (after.pop(f"{QKV}.weight") - wanted).abs().max() < error * wanted.abs().max()
    assert all(torch.equal(after[name], values) for name, values in before.items())


def test_diffusers_names_onto_the_fused_projection(run, tmp_path: Path) -> None:
    base = write_gguf(tmp_path / "flux.gguf", FLUX, arch="flux")
    path = "transformer_blocks.0.attn.to_k"
    deltas = lora(tmp_path / "l.safetensors", {f"transformer.{path}": (64, 64)}, PEFT)
    made = run("merge", base, tmp_path / "l.safetensors", "-o", tmp_path / "out.gguf")
    assert made.exit_code == 0, made.output
    moved = read(tmp_path / "out.gguf")[f"{QKV}.weight"] - read(base)[f"{QKV}.weight"]
    assert torch.allclose(moved[64:128], deltas[f"transformer.{path}"], atol=1e-5)
    assert not moved[:64].any()
    assert not moved[128:].any()


def test_a_kernel_in_other_dimensions(run, tmp_path: Path) -> None:
    """SD's convolutions are flattened where a row does not fill blocks; the file says their shape."""
    name = "input_blocks.1.0.in_layers.2"
    shape = (8, 16, 3, 3)
    kernel = random_array(*shape, seed=5)
    tensors = {f"{name}.weight": kernel.reshape(-1, 32), "input_blocks.1.0.in_layers.2.bias": random_array(8)}
    said = {f"comfy.gguf.orig_shape.{name}.weight": list(shape)}
    base = write_gguf(tmp_path / "sd.gguf", tensors, arch="sd1", metadata=said, types={f"{name}.weight": "Q8_0"})
    deltas = lora(tmp_path / "l.safetensors", {f"diffusion_model.{name}": shape}, PEFT)
    made = run("merge", base, tmp_path / "l.safetensors", "-o", tmp_path / "out.gguf")
    assert made.exit_code == 0, made.output
    wanted = read(base)[f"{name}.weight"] + deltas[f"diffusion_model.{name}"].reshape(-1, 32)
    found = read(tmp_path / "out.gguf")[f"{name}.weight"]
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() < 0.02 * wanted.abs().max()
    assert gguf.GGUFReader(str(tmp_path / "out.gguf")).fields[next(iter(said))].contents() == list(shape)


def test_five_dimensions_of_a_video_model(run, tmp_path: Path) -> None:
    """`fix_5d_tensors.py` puts Wan's patch embedding into the file with 5 dimensions."""
    tensors = {
        "patch_embedding.weight": random_array(8, 4, 1, 2, 2),
        "blocks.0.self_attn.q.weight": random_array(32, 32),
    }
    deltas = lora(tmp_path / "l.safetensors", {"diffusion_model.blocks.0.self_attn.q": (32, 32)}, PEFT)
    base = write_gguf(tmp_path / "wan.gguf", tensors, arch="wan")
    made = run("merge", base, tmp_path / "l.safetensors", "-o", tmp_path / "out.gguf")
    assert made.exit_code == 0, made.output
    before, after = read(base), read(tmp_path / "out.gguf")
    assert torch.equal(before["patch_embedding.weight"], after["patch_embedding.weight"])
    moved = after["blocks.0.self_attn.q.weight"] - before["blocks.0.self_attn.q.weight"]
    assert torch.allclose(moved, deltas["diffusion_model.blocks.0.self_attn.q"], atol=1e-5)


def test_what_cannot_be_held_is_refused(run, tmp_path: Path) -> None:
    base = write_gguf(tmp_path / "flux.gguf", FLUX, arch="flux")
    lora(tmp_path / "l.safetensors", {f"diffusion_model.{QKV}": (192, 64)}, PEFT)
    made = run("merge", base, tmp_path / "l.safetensors", "-o", tmp_path / "o.gguf", "--quant", "Q4_K_M")
    assert made.exit_code == 2
    assert "leave out --quant" in made.output
    said = {f"comfy.gguf.orig_shape.{QKV}.weight": [3, 5]}
    wrong = write_gguf(tmp_path / "wrong.gguf", FLUX, arch="flux", metadata=said)
    made = run("merge", wrong, tmp_path / "l.safetensors", "-o", tmp_path / "o.gguf")
    assert made.exit_code == 1
    assert "orig_shape" in made.output
    lora(tmp_path / "other.safetensors", {"diffusion_model.double_blocks.7.img_attn.qkv": (192, 64)}, PEFT)
    made = run("merge", base, tmp_path / "other.safetensors", "-o", tmp_path / "o.gguf")
    assert made.exit_code == 1
    assert "double_blocks.7" in made.output
    coarse = write_gguf(tmp_path / "q4.gguf", FLUX, arch="flux", types={f"{QKV}.weight": "Q4_0"})
    made = run("merge", coarse, tmp_path / "l.safetensors", "-o", tmp_path / "o.gguf")
    assert made.exit_code == 2
    assert not (tmp_path / "o.gguf").exists()


def test_the_merge_is_verified(run, tmp_path: Path) -> None:
    base = write_gguf(tmp_path / "flux.gguf", FLUX, arch="flux")
    lora(tmp_path / "l.safetensors", {f"diffusion_model.{QKV}": (192, 64)}, PEFT)
    assert run("merge", base, tmp_path / "l.safetensors", "-o", tmp_path / "out.gguf").exit_code == 0
    words = ("--base", base, "--adapter", tmp_path / "l.safetensors")
    made = run("verify", tmp_path / "out.gguf", *words)
    assert made.exit_code == 0, made.output
    assert run("verify", base, *words).exit_code == 3
