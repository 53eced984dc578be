"""16-bit models written as mlx-lm quantizes them, held against mlx and mlx-lm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mlx_child import MlxChild
from models import write_checkpoint
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.adapters.mlx_models import rows
from adapterkit.codecs.mlx import KINDS
from adapterkit.dtypes import BF16, F16, F32
from adapterkit.errors import CheckpointError, UsageError
from adapterkit.verbs.verify import verify

mx = pytest.importorskip("mlx.core")

TYPES = {F32: mx.float32, BF16: mx.bfloat16, F16: mx.float16}
CHILD = """
import sys
from pathlib import Path
import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, quantize_model
plain, ours, out, bits, size = sys.argv[1:]
model, config = load_model(Path(plain))
model, config = quantize_model(model, config, int(size), int(bits))
theirs = dict(tree_flatten(model.parameters()))
written, _ = load_model(Path(ours))
found = dict(tree_flatten(written.parameters()))
assert set(found) == set(theirs), set(found) ^ set(theirs)
wrong = [name for name in theirs if not mx.array_equal(found[name], theirs[name])]
assert not wrong, wrong
print(len(theirs), sum(name.endswith(".scales") for name in theirs))
"""


def test_bytes_are_those_of_mlx() -> None:
    import numpy as np

    torch.manual_seed(0)
    values = torch.randn(6, 192) * 0.05
    values[0, :64] = 0  # a group of zeros, and one that is all of one sign
    values[1, :64].abs_()
    for kind in KINDS:
        words = kind.config(None)  # type: ignore[arg-type]
        # Halfway between two numbers of FP4, which 16-bit weights often are, MLX's build for CPUs takes the smaller one and
        # that for Apple's GPUs the even one (backend/metal/kernels/fp4.h), as here.
        few = words["mode"] in ("mxfp4", "nvfp4")
        for dtype, theirs in list(TYPES.items())[: 1 if few else None]:
            encoder = kind.encoder("a.weight", (6, 192), dtype, False)
            assert encoder is not None
            rounded = values.to(dtype.torch)
            codes, *held = encoder.encode(0, rounded.reshape(-1), None)
            made = {"a.weight": codes, **encoder.finish(tuple(held))}
            wanted = mx.quantize(mx.array(rounded.float().numpy()).astype(theirs), **words)
            for spec, array in zip(encoder.made, wanted, strict=True):
                found = made[spec.name].reshape(spec.shape)
                assert tuple(array.shape) == spec.shape
                raw = array if array.dtype in (mx.uint32, mx.uint8) else array.astype(mx.float32)
                mine = found if spec.dtype.code in ("U32", "U8") else found.float()
                assert np.array_equal(np.array(raw), mine.numpy()), (kind.name, dtype, spec.name)


def moe(folder: Path) -> Path:
    """A tiny Qwen3 MoE, as published: one tensor for each expert."""
    torch.manual_seed(0)
    size: dict[str, tuple[int, ...]] = {"model.embed_tokens": (96, 64), "lm_head": (96, 64)}
    for layer in range(2):
        at = f"model.layers.{layer}"
        size |= {f"{at}.self_attn.{name}_proj": (64, 64) for name in "qo"} | {f"{at}.mlp.gate": (4, 64)}
        size |= {f"{at}.self_attn.{name}_proj": (32, 64) for name in "kv"}
        for expert in range(4):
            one = f"{at}.mlp.experts.{expert}"
            size |= {f"{one}.gate_proj": (32, 64), f"{one}.up_proj": (32, 64), f"{one}.down_proj": (64, 32)}
        size |= {f"{at}.{name}_layernorm": (64,) for name in ("input", "post_attention")}
        size |= {f"{at}.self_attn.{name}_norm": (16,) for name in "qk"}
    size |= {"model.norm": (64,)}
    config = {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "vocab_size": 96,
        "tie_word_embeddings": False,
        "max_position_embeddings": 64,
    }
    return write_checkpoint(
        folder, {f"{name}.weight": torch.randn(shape) * 0.1 for name, shape in size.items()}, config
    )


def trained(folder: Path) -> Path:
    """A LoRA of attention, of one expert and of the output layer."""
    modules = {
        "model.layers.0.self_attn.q_proj": (64, 64),
        "model.layers.1.mlp.experts.2.down_proj": (64, 32),
        "lm_head": (96, 64),
    }
    tensors = {}
    for path, (out, into) in modules.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(2, into)
        tensors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(out, 2) * 0.1
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj", "lm_head"]}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def test_a_merge_is_what_mlx_lm_makes_of_the_merged_model(mlx_lm: MlxChild, tmp_path: Path) -> None:
    """Experts stacked, routers in 8 bits, embeddings and the output layer too; through `convert` the same bytes."""
    base, adapter = moe(tmp_path / "base"), trained(tmp_path / "adapter")
    adapterkit.merge(base, [adapter], tmp_path / "plain")
    report = adapterkit.merge(base, [adapter], tmp_path / "out", quant="mlx-3bit-g32")
    assert any("6 stacks" in note for note in report.notes)
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["quantization"]["model.layers.0.mlp.gate"] == {"group_size": 64, "bits": 8}
    assert said["quantization"] == said["quantization_config"]
    mlx_lm.run(CHILD, tmp_path / "plain", tmp_path / "out", tmp_path, 3, 32)
    adapterkit.convert(tmp_path / "plain", tmp_path / "again", to="mlx-3bit-g32")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert verify(tmp_path / "out", base=base, adapters=[adapter]).ok


def test_an_output_layer_that_the_config_does_not_speak_of(tmp_path: Path) -> None:
    """It is one of its own for transformers and tied for some of mlx-lm's classes: the output says which."""
    base = moe(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    del config["tie_word_embeddings"]
    silent = write_checkpoint(tmp_path / "silent", load_file(base / "model.safetensors"), config)
    # The output is that of a config that says so, which mlx-lm loads (above).
    for plain, out in ((base, tmp_path / "said"), (silent, tmp_path / "out")):
        adapterkit.convert(plain, out, to="mlx-4bit-g32")
    wanted, found = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("said", "out"))
    assert found == wanted
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("said", "out"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_mlx_base_goes_into_another_number_of_bits(tmp_path: Path) -> None:
    """`mlx-4bit` of a base in 4 bits is its own format again; another word is another format, routers in 8 bits or not."""
    base = moe(tmp_path / "base")
    adapterkit.convert(base, tmp_path / "four", to="mlx-4bit-g32")
    with pytest.raises(UsageError, match="is mlx-4bit-g32 already"):
        adapterkit.convert(tmp_path / "four", tmp_path / "again", to="mlx-4bit-g32")
    report = adapterkit.convert(tmp_path / "four", tmp_path / "eight", to="mlx-8bit-g32")
    assert any("stays lost" in note for note in report.notes)
    said: dict[str, Any] = json.loads((tmp_path / "eight" / "config.json").read_text())["quantization"]
    assert (said["bits"], said["group_size"]) == (8, 32)
    adapter = trained(tmp_path / "adapter")
    adapterkit.merge(tmp_path / "four", [adapter], tmp_path / "out", quant="mlx-8bit-g32")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]["bits"] == 8
    assert "model.layers.1.mlp.switch_mlp.down_proj.scales" in load_file(tmp_path / "out" / "model.safetensors")
    assert verify(tmp_path / "out", base=tmp_path / "four", adapters=[adapter]).ok
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors["model.layers.1.mlp.switch_mlp.down_proj.scales"][2] *= 1.5
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "mlx"})
    assert not verify(tmp_path / "out", base=tmp_path / "four", adapters=[adapter]).ok


def test_options_beside_it(tmp_path: Path) -> None:
    base, adapter = moe(tmp_path / "base"), trained(tmp_path / "adapter")
    skip = ["lm_head", "model.layers.0.mlp.experts"]
    adapterkit.convert(base, tmp_path / "skipped", to="mlx-4bit-g32", skip_modules=skip)
    scales = {name for name in load_file(tmp_path / "skipped" / "model.safetensors") if name.endswith(".scales")}
    assert "lm_head.scales" not in scales
    assert {f"model.layers.{n}.mlp.switch_mlp.up_proj.scales" for n in range(2)} & scales == {
        "model.layers.1.mlp.switch_mlp.up_proj.scales"
    }
    for more, words in (
        ({"residual": 4}, "which mlx-lm does not load beside mlx-4bit"),
        ({"quant_double": True}, "mlx-4bit has no nested scales"),
    ):
        with pytest.raises(UsageError, match=words):
            adapterkit.merge(base, [adapter], tmp_path / "out", quant="mlx-4bit", **more)


def test_what_mlx_lm_does_not_take_as_it_is_is_refused(tmp_path: Path) -> None:
    base = moe(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(UsageError, match="is of type 'gpt2', whose tensors mlx-lm does not take as they are"):
        adapterkit.convert(base, tmp_path / "out", to="mlx-4bit")
    (base / "config.json").write_text(json.dumps(config))
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.1.up_proj.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"not all of its experts under 'model.layers.1.mlp.experts"):
        adapterkit.convert(base, tmp_path / "out", to="mlx-4bit-g32")
    assert not (tmp_path / "out").exists()


def test_the_table_has_the_types_that_are_used_most() -> None:
    assert {"llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "phi3", "granite"} <= set(rows())
    page = (Path(__file__).resolve().parents[2] / "docs" / "files.md").read_text(encoding="utf-8")
    assert f"It has {len(rows())} types" in page
