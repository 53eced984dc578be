"""`--keep-touched`: what changed leaves the grid of a quantized base, the rest stays, and loaders know which is which."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stored_formats import FORMATS
from test_as_trained import adapter, model, saved_quantized
from test_keep import IN, OTHER, OUT, TOUCHED, adapter_of, base_of, same, stored

from adapterkit import merge, verify
from adapterkit.adapters.wider import leaving
from adapterkit.checkpoint.decoded import dequantized
from adapterkit.checkpoint.open import open_checkpoint
from adapterkit.errors import UsageError

KEYS = {
    "fp8 blocks": ["modules_to_not_convert"],
    "ct int4": ["ignore"],
    "nf4": ["llm_int8_skip_modules"],
    "int8": ["llm_int8_skip_modules"],
    "awq": ["modules_to_not_convert"],
    "torchao int8": ["modules_to_not_convert"],
    "modelopt nvfp4": ["ignore"],
}


@pytest.mark.parametrize("name", FORMATS)
def test_changed_weights_are_the_formula_and_the_rest_keeps_its_bytes(tmp_path: Path, name: str) -> None:
    base = base_of(tmp_path, name)
    old = dequantized(open_checkpoint(base))[f"{TOUCHED}.weight"]
    rows, columns = old.shape
    b = torch.full((rows, 4), 1e-3)
    tuned = adapter_of(tmp_path, b, columns)
    report = merge(base, [tuned], tmp_path / "out", quant="keep", keep_touched="bf16", fidelity=True)
    assert report.fidelity is not None
    assert report.fidelity.format == "bf16"
    assert report.fidelity.retention > 0.9
    a = load_file(tuned / "adapter_model.safetensors")[f"base_model.model.{TOUCHED}.lora_A.weight"]
    wanted = torch.addmm(old.read_wide(0, old.numel).view(rows, columns).float(), b, a).bfloat16()
    before, after = stored(base), stored(tmp_path / "out")
    assert torch.equal(after[f"{TOUCHED}.weight"], wanted)
    assert {key for key in after if key.startswith(TOUCHED)} == {f"{TOUCHED}.weight"}
    for key, tensor in before.items():
        if not key.startswith(TOUCHED):
            assert same(after[key], tensor), key
    said = json.loads((tmp_path / "out/config.json").read_text()).get("quantization_config", {})
    for key in KEYS.get(name, ()):
        assert TOUCHED in said[key]
    if name.startswith("gptq"):
        assert f"-:^{TOUCHED.replace('.', chr(92) + '.')}$" in said["dynamic"]
    if name.startswith("mlx"):
        assert said[TOUCHED] is False
    # What was written is read again: one weight in 16 bits beside the quantized ones.
    read = dequantized(open_checkpoint(tmp_path / "out"))
    assert torch.equal(read[f"{TOUCHED}.weight"].read(0, rows * columns).view(rows, columns), wanted)


def test_what_servers_run_as_one_leaves_together(tmp_path: Path) -> None:
    """vLLM refuses a fused module of which only a part is quantized; the experts of a layer are one module too."""
    encode = FORMATS["fp8 short blocks"].encode
    modules = [f"model.layers.{layer}.self_attn.{part}_proj" for layer in (0, 1) for part in "qkvo"]
    modules += [f"model.layers.0.mlp.experts.{e}.{part}_proj" for e in (0, 1) for part in ("gate", "up", "down")]
    w = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0)) * 0.05
    tensors = {f"{module}.{leaf}": tensor for module in modules for leaf, tensor in encode(w).items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    config = {"model_type": "llama", "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    form = dequantized(open_checkpoint(tmp_path)).stored
    assert form is not None
    found = leaving(form, [f"{modules[0]}.weight"])
    assert sorted(found) == sorted(f"{module}.weight" for module in (modules[0], modules[1], modules[2]))
    assert leaving(form, [f"{modules[3]}.weight"]) == [f"{modules[3]}.weight"]
    assert set(leaving(form, [f"{modules[8]}.weight"])) == {f"{module}.weight" for module in modules[8:]}


@pytest.mark.parametrize("to", ["nf4", "int8"])
def test_transformers_loads_it(bnb, tmp_path: Path, to: str) -> None:
    """Its modules are those that are stored: plain where the change is, quantized elsewhere; and its values ours."""
    from transformers import AutoModelForCausalLM

    model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "llama")
    tuned = adapter(tmp_path / "adapter")
    how = {"load_in_8bit": True} if to == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": to}
    saved_quantized(tmp_path / "llama", tmp_path / "q", torch.bfloat16, **how)
    merge(tmp_path / "q", [tuned], tmp_path / "out", quant="keep", keep_touched="bf16")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    read = dequantized(open_checkpoint(tmp_path / "out"))
    plain = 0
    for name, module in loaded.named_modules():
        if name.endswith("_proj"):
            handle = read[f"{name}.weight"]
            assert (handle.how == "copy") is (type(module) is torch.nn.Linear), name
            if handle.how == "copy":
                plain += 1
                assert torch.equal(module.weight, handle.read(0, handle.numel).view(handle.shape))
    assert 0 < plain < sum(1 for name, _ in loaded.named_modules() if name.endswith("_proj"))
    assert type(loaded.lm_head) is torch.nn.Linear


def test_transformers_loads_compressed_tensors(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    small = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=64,
    )
    plain = transformers.LlamaForCausalLM(small).to(torch.bfloat16)
    base = tmp_path / "base"
    plain.save_pretrained(base)
    made = FORMATS["ct int4"]
    tensors = {}
    for name, tensor in stored(base).items():
        if name.endswith("_proj.weight"):
            tensors |= {f"{name.removesuffix('weight')}{leaf}": t for leaf, t in made.encode(tensor.float()).items()}
        else:
            tensors[name] = tensor
    save_file(
        {name: t.contiguous() for name, t in tensors.items()}, base / "model.safetensors", metadata={"format": "pt"}
    )
    config = json.loads((base / "config.json").read_text())
    said = {**made.config, "quantization_status": "compressed"}  # type: ignore[dict-item]
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    tuned = adapter_of(tmp_path, torch.full((64, 4), 0.01), 64)
    merge(base, [tuned], tmp_path / "out", quant="keep", keep_touched="bf16")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
        ids = torch.arange(8)[None]
        got = loaded(ids).logits
    read = dequantized(open_checkpoint(tmp_path / "out"))
    plain.load_state_dict({name: t.read(0, t.numel).view(t.shape) for name, t in read.items()}, strict=False)
    assert torch.allclose(got, plain(ids).logits, atol=0.05)
    assert torch.equal(loaded.get_submodule(TOUCHED).weight, read[f"{TOUCHED}.weight"].read(0, 64 * 64).view(64, 64))


def test_only_beside_keep(tmp_path: Path) -> None:
    base = base_of(tmp_path, "fp8 tensor")
    tuned = adapter_of(tmp_path, torch.ones(OUT, 4), IN)
    with pytest.raises(UsageError, match="only in a format that the rest has already"):
        merge(base, [tuned], tmp_path / "out", keep_touched="bf16")
    with pytest.raises(UsageError, match="'Q8_0' is no output dtype"):
        merge(base, [tuned], tmp_path / "out", quant="keep", keep_touched="Q8_0")
    with pytest.raises(UsageError, match="per tensor already, which fp8 does not widen"):
        merge(base, [tuned], tmp_path / "out", quant="keep", keep_touched="fp8")
    (tmp_path / "nf4").mkdir()
    with pytest.raises(UsageError, match="a config of 'bitsandbytes' cannot name FP8"):
        merge(base_of(tmp_path / "nf4", "nf4"), [tuned], tmp_path / "out", quant="keep", keep_touched="fp8")


FUSED = "model.layers.0.self_attn.qkv_proj"
SHARDS = [FUSED.replace("qkv", part) for part in "qkv"]


def vllm_and_sglang_skip(said: dict[str, Any], fused: str, shards: list[str]) -> bool:
    """Whether servers run a fused module in 16 bits, by the rules that `adapterkit.adapters.wider` names the sources of."""
    method = said["quant_method"]
    if method == "bitsandbytes":
        parts = fused.split(".")
        listed = said["llm_int8_skip_modules"]
        return any(".".join(parts[: n + 1]) in listed for n in range(len(parts))) or bool({*parts} & {*listed})
    if method == "awq":
        vllm = all(any(name in shard for name in said["modules_to_not_convert"]) for shard in shards)
        return vllm and any(name in fused for name in said["modules_to_not_convert"])
    if method == "gptq":
        return any(key.startswith("-:") and re.match(key[2:], fused) for key in said["dynamic"])
    listed = said["ignore"] if method in ("compressed-tensors", "modelopt") else said["modules_to_not_convert"]
    found = {shard in listed for shard in shards}
    assert len(found) == 1, "servers refuse a fused module of which a part is quantized"
    return found.pop()


@pytest.mark.parametrize("name", ["fp8 short blocks", "ct int4", "nf4", "int8", "gptq", "awq", "modelopt nvfp4"])
def test_servers_find_what_left(tmp_path: Path, name: str) -> None:
    """The fused module that holds a changed projection is run in 16 bits, that of the next layer is not."""
    made = FORMATS[name]
    base = tmp_path / "base"
    base.mkdir()
    w = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0)) * 0.05
    layers = [[shard.replace("layers.0", f"layers.{layer}") for shard in SHARDS] for layer in (0, 1)]
    tensors = {f"{n}.{leaf}": t.clone() for ns in layers for n in ns for leaf, t in made.encode(w).items()}
    save_file({n: t.contiguous() for n, t in tensors.items()}, base / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "llama", "torch_dtype": "bfloat16", "quantization_config": made.config}
    (base / "config.json").write_text(json.dumps(config))
    tuned = adapter_of(tmp_path, torch.full((OUT, 4), 0.01), IN)
    merge(base, [tuned], tmp_path / "out", quant="keep", keep_touched="bf16")
    said = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert vllm_and_sglang_skip(said, FUSED, SHARDS)
    assert not vllm_and_sglang_skip(said, FUSED.replace("layers.0", "layers.1"), layers[1])
    after = stored(tmp_path / "out")
    assert all(after[f"{shard}.weight"].dtype is torch.bfloat16 for shard in SHARDS)


def test_experts_that_vllm_takes_as_quantized(tmp_path: Path) -> None:
    """gpt-oss: vLLM reads no list of modules for MXFP4, and the report says so."""
    base = tmp_path / "base"
    base.mkdir()
    name = "model.layers.0.mlp.experts.down_proj"
    tensors = {
        f"{name}_blocks": torch.randint(0, 256, (2, 32, 2, 16), dtype=torch.uint8),
        f"{name}_scales": torch.full((2, 32, 2), 120, dtype=torch.uint8),
    }
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    said = {"model_type": "gpt_oss", "torch_dtype": "bfloat16", "quantization_config": {"quant_method": "mxfp4"}}
    (base / "config.json").write_text(json.dumps(said))
    tuned = tmp_path / "adapter"
    tuned.mkdir()
    key = "base_model.model.model.layers.0.mlp.experts.lora_"
    save_file(
        {f"{key}A.weight": torch.randn(4, 64), f"{key}B.weight": torch.randn(32, 4)},
        tuned / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_parameters": ["mlp.experts.down_proj"]}
    (tuned / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "b"}))
    kept = merge(base, [tuned], tmp_path / "kept", quant="keep", yes_lossy=True)
    assert not any("vLLM" in note for note in kept.notes)
    assert (tmp_path / "kept/config.json").read_bytes() == (base / "config.json").read_bytes()
    report = merge(base, [tuned], tmp_path / "out", quant="keep", keep_touched="bf16")
    assert any("vLLM takes all experts of a mxfp4 model as quantized" in note for note in report.notes)
    assert stored(tmp_path / "out")[name].shape == (2, 64, 32)


@pytest.mark.parametrize("name", ["ct int4", "ct nvfp4", "ct mxfp4"])
def test_fp8_beside_another_format(tmp_path: Path, name: str) -> None:
    """A group of its own in the config; bytes of compressed-tensors; transformers loads both."""
    import transformers

    small = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64,
    )  # fmt: skip
    torch.manual_seed(0)
    plain = transformers.LlamaForCausalLM(small).to(torch.bfloat16)
    base, made = tmp_path / "base", FORMATS[name]
    plain.save_pretrained(base)
    tensors = {}
    for key, tensor in stored(base).items():
        if key.endswith("_proj.weight"):
            tensors |= {f"{key.removesuffix('weight')}{leaf}": t for leaf, t in made.encode(tensor.float()).items()}
        else:
            tensors[key] = tensor
    save_file({n: t.contiguous() for n, t in tensors.items()}, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    said = {**made.config, "quantization_status": "compressed"}  # type: ignore[dict-item]
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": said}, default=lambda one: str(one)))
    b = torch.randn(64, 4, generator=torch.Generator().manual_seed(8)) * 0.01
    tuned = adapter_of(tmp_path, b, 64)
    report = merge(base, [tuned], tmp_path / "out", quant="keep", keep_touched="fp8", fidelity=True)
    assert report.fidelity is not None
    assert report.fidelity.retention > 0.9
    assert verify(tmp_path / "out", base=base, adapters=[tuned]).ok
    after = stored(tmp_path / "out")
    old = dequantized(open_checkpoint(base))[f"{TOUCHED}.weight"]
    a = load_file(tuned / "adapter_model.safetensors")[f"base_model.model.{TOUCHED}.lora_A.weight"]
    wanted = torch.addmm(old.read_wide(0, old.numel).view(64, 64).float(), b, a)
    scale = (wanted.abs().amax(1, keepdim=True) / 448).bfloat16()
    codes = (wanted / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert same(after[f"{TOUCHED}.weight"], codes)
    assert same(after[f"{TOUCHED}.weight_scale"], scale)
    assert same(after[f"{OTHER}.weight_packed"], tensors[f"{OTHER}.weight_packed"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
        ids = torch.arange(8)[None]
        got = loaded(ids).logits
    read = dequantized(open_checkpoint(tmp_path / "out"))
    plain.load_state_dict({n: t.read(0, t.numel).view(t.shape) for n, t in read.items()}, strict=False)
    assert torch.allclose(got, plain(ids).logits, atol=0.05)
