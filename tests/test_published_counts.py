"""What `inspect` counts, beside the figures that PEFT's and Unsloth's pages print for the same models and settings.

Files are sparse: headers of the real shapes, and nothing behind them.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import adapterkit
from adapterkit.checkpoint.header import build_header
from adapterkit.dtypes import BF16, F32, DType


def sparse(path: Path, shapes: dict[str, tuple[int, ...]], dtype: DType) -> None:
    header, _ = build_header([(name, dtype, shape) for name, shape in shapes.items()], {"format": "pt"})
    size = len(header) + sum(dtype.nbytes(shape) for shape in shapes.values())
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(size)


def llama(layers: int, hidden: int, ffn: int, kv: int, vocab: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    shapes["lm_head.weight"] = (vocab, hidden)
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.self_attn.q_proj.weight": (hidden, hidden),
            f"{at}.self_attn.k_proj.weight": (kv, hidden),
            f"{at}.self_attn.v_proj.weight": (kv, hidden),
            f"{at}.self_attn.o_proj.weight": (hidden, hidden),
            f"{at}.mlp.gate_proj.weight": (ffn, hidden),
            f"{at}.mlp.up_proj.weight": (ffn, hidden),
            f"{at}.mlp.down_proj.weight": (hidden, ffn),
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.post_attention_layernorm.weight": (hidden,),
        }
    return shapes


LLAMA_2_7B = (32, 4096, 11008, 4096, 32000)
LLAMA_31_8B = (32, 4096, 14336, 1024, 128256)
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    ("shape", "modules", "rank", "parameters", "model"),
    [
        # "trainable params: 4,194,304 || all params: 6,742,609,920 || trainable%: 0.0622": 6,738,415,616 of them the model
        pytest.param(LLAMA_2_7B, ("q_proj", "v_proj"), 8, 4_194_304, 6_738_415_616, id="llama-2-7b-qv-8"),
        pytest.param(LLAMA_2_7B, SEVEN[:4], 16, 16_777_216, 6_738_415_616, id="llama-2-7b-qkvo-16"),
        pytest.param(LLAMA_31_8B, SEVEN, 16, 41_943_040, 8_030_261_248, id="llama-3.1-8b-all-16"),
    ],
)
def test_counts_are_the_published_ones(
    shape: tuple[int, int, int, int, int],
    modules: tuple[str, ...],
    rank: int,
    parameters: int,
    model: int,
    tmp_path: Path,
) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    shapes = llama(*shape)
    sparse(base / "model.safetensors", shapes, BF16)
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": shape[0]}))
    factors: dict[str, tuple[int, ...]] = {}
    for name, size in shapes.items():
        path = name.removesuffix(".weight")
        if path.rpartition(".")[2] in modules:
            factors[f"base_model.model.{path}.lora_A.weight"] = (rank, size[1])
            factors[f"base_model.model.{path}.lora_B.weight"] = (size[0], rank)
    sparse(adapter / "adapter_model.safetensors", factors, F32)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 16, "target_modules": list(modules)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    found = adapterkit.inspect(adapter, base=base)
    assert found.parameters == parameters
    assert found.share == pytest.approx(parameters / model, rel=1e-12)
