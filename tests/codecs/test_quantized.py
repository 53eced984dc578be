"""Quantized outputs against the files that transformers and bitsandbytes write of the same weights."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_as_trained import adapter, model, saved_quantized

from adapterkit.adapters.as_trained import as_trained
from adapterkit.adapters.fold import fold
from adapterkit.adapters.load import load_adapter
from adapterkit.adapters.quantized import quantized
from adapterkit.checkpoint.decoded import dequantized
from adapterkit.checkpoint.open import open_checkpoint
from adapterkit.checkpoint.save import save
from adapterkit.codecs.grid import Grid
from adapterkit.errors import UsageError


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2", "t5", "qwen3_moe"])
@pytest.mark.parametrize("to", ["nf4", "fp4", "int8"])
def test_equals_what_transformers_saves(bnb, tmp_path: Path, kind: str, to: str) -> None:
    model(kind).to(torch.bfloat16).save_pretrained(tmp_path / kind)
    how = {"load_in_8bit": True} if to == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": to}
    saved_quantized(tmp_path / kind, tmp_path / "q", torch.bfloat16, bnb_4bit_compute_dtype=torch.bfloat16, **how)
    plan = save(quantized(open_checkpoint(tmp_path / kind), to), tmp_path / "ours")
    got, wanted = stored(tmp_path / "ours"), stored(tmp_path / "q")
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if kind == "t5" and tensor.dtype is torch.float32:
            tensor = tensor.to(got[name].dtype)  # transformers keeps `wo` in float32; the base has it in bfloat16
        assert got[name].dtype is tensor.dtype, name
        assert torch.equal(got[name], tensor), name
    assert plan.total_size == sum(t.numel() * t.element_size() for t in got.values())
    ours, theirs = config(tmp_path / "ours"), config(tmp_path / "q")
    if to == "int8":
        theirs["quantization_config"]["bnb_4bit_compute_dtype"] = "float32"
    assert ours["quantization_config"] == theirs["quantization_config"]


def test_the_bytes_do_not_depend_on_threads_or_blocks(bnb, tmp_path: Path) -> None:
    model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "llama")
    view = open_checkpoint(tmp_path / "llama")
    save(quantized(view, "nf4", double_quant=True), tmp_path / "one", jobs=1)
    save(quantized(view, "nf4", double_quant=True), tmp_path / "four", jobs=4)
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "four/model.safetensors").read_bytes()
    name = "model.layers.0.mlp.down_proj.weight"
    handles = quantized(view, "nf4", double_quant=True)
    absmax = handles[name + ".absmax"]
    assert torch.equal(absmax.read(0, absmax.numel), stored(tmp_path / "one")[name + ".absmax"])  # before the codes
    assert torch.equal(handles[name].read(100, 900), stored(tmp_path / "one")[name].view(-1)[100:900])


@pytest.mark.parametrize("to", ["nf4", "nf4-double", "fp4", "int8"])
def test_transformers_loads_what_was_written(bnb, tmp_path: Path, to: str) -> None:
    """Loaded with bitsandbytes, every weight decodes to the base as trained on that grid."""
    from transformers import AutoModelForCausalLM

    model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "llama")
    double = to.endswith("double")
    save(quantized(open_checkpoint(tmp_path / "llama"), to[:4].rstrip("-"), double_quant=double), tmp_path / "out")
    grid = Grid(to[:4].rstrip("-"), double=double)
    wanted = as_trained(open_checkpoint(tmp_path / "llama"), grid)
    read = dequantized(open_checkpoint(tmp_path / "out"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.quantization_config.quant_method == "bitsandbytes"
    for name, tensor in wanted.items():
        exact = tensor.read(0, tensor.numel).view(tensor.shape)
        assert torch.equal(read[name].read(0, tensor.numel).view(tensor.shape), exact), name
        if name.endswith("_proj.weight"):
            module = loaded.get_submodule(name.removesuffix(".weight"))
            if grid.kind == "int8":
                found = bnb.int8_vectorwise_dequant(module.weight.data, module.weight.SCB).to(torch.bfloat16)
            else:
                state = module.weight.quant_state
                absmax = state.absmax
                if double:
                    absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
                flat = (1, tensor.numel)
                op = torch.ops.bitsandbytes.dequantize_4bit.default
                found = op(module.weight.data, absmax, 64, grid.kind, flat, state.dtype).view(tensor.shape)
            assert torch.equal(found, exact), name


def test_fp8_equals_transformers(tmp_path: Path) -> None:
    import transformers
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    torch.manual_seed(0)
    small = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=128,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(small).to(torch.bfloat16)
    base.model.layers[0].self_attn.q_proj.weight.data[:, :] = 0
    base.save_pretrained(tmp_path / "base")
    save(quantized(open_checkpoint(tmp_path / "base"), "fp8"), tmp_path / "out")
    got = stored(tmp_path / "out")
    settings = SimpleNamespace(weight_block_size=[128, 128], scale_fmt=None)
    oracle = Fp8Quantize(SimpleNamespace(quantization_config=settings))
    for name, tensor in stored(tmp_path / "base").items():
        if name.endswith("_proj.weight") and all(size % 128 == 0 for size in tensor.shape):
            wanted = oracle._quantize_one(name, tensor)
            for key, value in wanted.items():
                assert torch.equal(got[key].view(torch.uint8), value.view(torch.uint8)), key
        else:
            assert torch.equal(got[name], tensor)
    skipped = config(tmp_path / "out")["quantization_config"]["modules_to_not_convert"]
    assert skipped == ["lm_head", "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"]
    settings = transformers.FineGrainedFP8Config(dequantize=True, modules_to_not_convert=skipped)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=settings)
    read = dequantized(open_checkpoint(tmp_path / "out"))
    for name, value in loaded.state_dict().items():
        assert torch.equal(read[name].read(0, value.numel()).view(value.shape), value), name


def test_a_merge_is_encoded_before_any_other_rounding(bnb, tmp_path: Path) -> None:
    """The grid is the only rounding: bitsandbytes of the float64 sum, not of the sum rounded to bfloat16."""
    model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "llama")
    tuned = adapter(tmp_path / "adapter")
    folded = fold(open_checkpoint(tmp_path / "llama"), [load_adapter(tuned)]).checkpoint
    save(quantized(folded, "nf4"), tmp_path / "one")
    got, base = stored(tmp_path / "one"), stored(tmp_path / "llama")
    factors = load_file(tuned / "adapter_model.safetensors")
    for module in ("self_attn.q_proj", "mlp.down_proj"):
        name, key = f"model.layers.0.{module}.weight", f"base_model.model.model.layers.0.{module}.lora_"
        exact = base[name].double() + 2 * factors[f"{key}B.weight"].double() @ factors[f"{key}A.weight"].double()
        codes, state = bnb.quantize_4bit(exact.float(), quant_type="nf4", blocksize=64)
        assert torch.allclose(got[name + ".absmax"], state.absmax, rtol=1e-6)
        assert (got[name] != codes).float().mean() < 1e-3  # a sum in float32 may fall on the other side of a boundary
        rounded, _ = bnb.quantize_4bit(exact.bfloat16(), quant_type="nf4", blocksize=64)
        assert (got[name] != rounded).float().mean() > 5e-3
        assert json.loads(bytes(got[name + ".quant_state.bitsandbytes__nf4"].tolist()))["dtype"] == "bfloat16"
    untouched = "model.layers.1.self_attn.q_proj.weight"
    save(quantized(open_checkpoint(tmp_path / "llama"), "nf4"), tmp_path / "two")
    assert torch.equal(got[untouched], stored(tmp_path / "two")[untouched])


def test_what_cannot_be_written(bnb, tmp_path: Path) -> None:
    model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "llama")
    view = open_checkpoint(tmp_path / "llama")
    for options, message in (
        ({"kind": "awq"}, "no format"),
        ({"kind": "fp8", "double_quant": True}, "no double quantization"),
        ({"kind": "fp8"}, "no linear layer that fp8 fits"),
        ({"kind": "int8", "double_quant": True}, "no double quantization"),
    ):
        with pytest.raises(UsageError, match=message):
            quantized(view, **options)
    save(quantized(view, "nf4"), tmp_path / "q")
    with pytest.raises(UsageError, match="quantized already"):
        quantized(open_checkpoint(tmp_path / "q"), "nf4")
