"""EmbeddingGemma's Dense layers after the pooling, in llama.cpp's embedding endpoint."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")
import arch_zoo
from gguf_runtime import PROMPTS, embeddings
from models import make_adapter, randomize

import adapterkit
from adapterkit.errors import CheckpointError, TargetError, UsageError
from adapterkit.verbs.convert import convert

WIDTH, INNER = 64, 96
CONFIG = {
    "architectures": ["Gemma3TextModel"],
    "vocab_size": 288,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 16,
    "use_bidirectional_attention": True,
    "layer_types": ["sliding_attention", "full_attention"],
    "max_position_embeddings": 128,
}


@pytest.fixture(autouse=True)
def _vocab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapterkit.gguf.vocab.read_vocab", arch_zoo.read_vocab)


def build(folder: Path) -> tuple[Any, list[Any]]:
    """The model, and its two matrices, as sentence-transformers saves them."""
    import torch
    import transformers
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = transformers.Gemma3TextModel(transformers.Gemma3TextConfig(**CONFIG)).float().eval()
    randomize(model, scale=0.1)
    model.save_pretrained(folder)
    kinds = {
        "": "Transformer",
        "1_Pooling": "Pooling",
        "2_Dense": "Dense",
        "3_Dense": "Dense",
        "4_Normalize": "Normalize",
    }
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    matrices = []
    for path, (into, out) in (("2_Dense", (WIDTH, INNER)), ("3_Dense", (INNER, WIDTH))):
        matrices.append(torch.randn(out, into) * 0.2)
        (folder / path).mkdir()
        save_file({"linear.weight": matrices[-1]}, folder / path / "model.safetensors", metadata={"format": "pt"})
        said = {"in_features": into, "out_features": out, "bias": False}
        said["activation_function"] = "torch.nn.modules.linear.Identity"
        (folder / path / "config.json").write_text(json.dumps(said))
    return model, matrices


def wanted(model: Any, matrices: list[Any]) -> Any:
    """Mean of the hidden states, through the matrices, of length 1."""
    import numpy as np
    import torch

    rows = []
    with torch.no_grad():
        for prompt in PROMPTS:
            found = model(input_ids=torch.tensor([prompt])).last_hidden_state[0].double().mean(0)
            for matrix in matrices:
                found = matrix.double() @ found
            rows.append((found / found.norm()).numpy())
    return np.array(rows)


def test_the_runtime_multiplies_with_them(tmp_path: Path) -> None:
    import peft
    from gguf import GGUFReader

    model, matrices = build(tmp_path / "hf")
    report = convert(tmp_path / "hf", tmp_path / "o.gguf", dense_modules=True)
    assert not any("sentence-transformers are not in the file" in note for note in report.notes)
    assert 1 - (embeddings(tmp_path / "o.gguf") * wanted(model, matrices)).sum(-1).min() < 1e-5
    fields = GGUFReader(tmp_path / "o.gguf").fields
    keys = ("dense_2_feat_in", "dense_2_feat_out", "dense_3_feat_in", "dense_3_feat_out")
    assert [int(fields[f"gemma-embedding.{key}"].contents()) for key in keys] == [WIDTH, INNER, INNER, WIDTH]
    plain = convert(tmp_path / "hf", tmp_path / "plain.gguf")
    assert any("2_Dense, 3_Dense of sentence-transformers are not in the file" in note for note in plain.notes)
    assert 1 - (embeddings(tmp_path / "plain.gguf") * wanted(model, [])).sum(-1).min() < 1e-5
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "hf", config, scale=0.2)
    adapterkit.merge(tmp_path / "hf", [adapter], tmp_path / "merged.gguf", dense_modules=True)
    live = peft.PeftModel.from_pretrained(model, adapter).base_model.model
    assert 1 - (embeddings(tmp_path / "merged.gguf") * wanted(live, matrices)).sum(-1).min() < 1e-5


def test_verify_knows_them_and_no_folder_loses_them(tmp_path: Path) -> None:
    import peft

    build(tmp_path / "hf")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"])
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "hf", config, scale=0.2)
    adapterkit.merge(tmp_path / "hf", [adapter], tmp_path / "o.gguf", dense_modules=True)
    report = adapterkit.verify(tmp_path / "o.gguf", base=tmp_path / "hf", adapters=[adapter])
    assert report.ok, report
    with pytest.raises(TargetError, match=r"dense_2\.weight"):
        convert(tmp_path / "o.gguf", tmp_path / "back", to="hf")


def test_what_the_runtime_has_no_place_for_is_refused(tmp_path: Path) -> None:
    build(tmp_path / "hf")
    said = tmp_path / "hf" / "2_Dense" / "config.json"
    plain = json.loads(said.read_text())
    said.write_text(json.dumps({**plain, "activation_function": "torch.nn.modules.activation.Tanh"}))
    with pytest.raises(TargetError, match="Tanh"):
        convert(tmp_path / "hf", tmp_path / "no.gguf", dense_modules=True)
    said.write_text(json.dumps(plain))
    with pytest.raises(UsageError, match="given for a folder"):
        adapterkit.merge(tmp_path / "hf", [tmp_path / "hf"], tmp_path / "folder", weights=[0.5], dense_modules=True)
    (tmp_path / "hf" / "modules.json").unlink()
    with pytest.raises(CheckpointError, match="no Dense modules"):
        convert(tmp_path / "hf", tmp_path / "no.gguf", dense_modules=True)
    arch_zoo.build(tmp_path / "llama", "llama")
    with pytest.raises(CheckpointError, match="no Dense modules"):
        convert(tmp_path / "llama", tmp_path / "no.gguf", dense_modules=True)
    assert not (tmp_path / "no.gguf").exists()
