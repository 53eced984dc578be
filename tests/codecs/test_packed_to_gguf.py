"""GPTQ and AWQ bases to GGUF in one pass: what a folder of their decoded weights gives."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from models import make_adapter
from packed import pack
from safetensors.torch import save_file

import adapterkit
from adapterkit import convert
from adapterkit.gguf.quantize import Quantization

sys.path.insert(0, str(Path(__file__).parents[1] / "gguf"))
gguf = pytest.importorskip("gguf")
import arch_zoo as zoo  # noqa: E402


@pytest.fixture(params=["gptq", "awq"])
def folders(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A packed model, and the same with its weights as floats, decoded by the formula and rounded to float16."""
    monkeypatch.setattr("adapterkit.gguf.vocab.read_vocab", zoo.read_vocab)
    packed, plain = tmp_path / "base", tmp_path / "plain" / "base"
    zoo.build(packed, "llama")
    decoded = {name: tensor.half() for name, tensor in pack(packed, request.param).items()}
    plain.mkdir(parents=True)
    save_file(decoded, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((packed / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))
    return packed, plain


def tensors(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    return {t.name: (t.tensor_type.name, t.shape.tolist(), t.data.tobytes()) for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize(
    ("options", "kind"),
    [({}, "F16"), ({"dtype": "f32"}, "F32"), ({"quantization": Quantization("Q8_0")}, "Q8_0")],
)
def test_convert(folders: tuple[Path, Path], options: dict[str, Any], kind: str, tmp_path: Path) -> None:
    for number, folder in enumerate(folders):
        convert(folder, tmp_path / f"{number}.gguf", **options)
    found, wanted = tensors(tmp_path / "0.gguf"), tensors(tmp_path / "1.gguf")
    assert found["blk.0.attn_q.weight"][0] == kind
    assert found == wanted
    assert (tmp_path / "0.gguf").read_bytes() == (tmp_path / "1.gguf").read_bytes()


def test_merge(folders: tuple[Path, Path], tmp_path: Path) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    adapter = make_adapter(tmp_path / "adapter", folders[1], config, scale=0.1)
    for number, folder in enumerate(folders):
        adapterkit.merge(folder, [adapter], tmp_path / f"{number}.gguf", quantization=Quantization("Q8_0"))
    convert(folders[0], tmp_path / "base.gguf", quantization=Quantization("Q8_0"))
    found, wanted, base = (tensors(tmp_path / f"{name}.gguf") for name in ("0", "1", "base"))
    assert found == wanted
    assert found["blk.0.attn_q.weight"] != base["blk.0.attn_q.weight"]
    assert found["blk.0.attn_k.weight"] == base["blk.0.attn_k.weight"]
