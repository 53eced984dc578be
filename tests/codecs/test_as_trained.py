"""The base as training saw it, against checkpoints that transformers and bitsandbytes saved of it."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapterkit import execute, merge, plan_merge
from adapterkit.adapters.as_trained import as_trained
from adapterkit.checkpoint.decoded import dequantized
from adapterkit.checkpoint.open import open_checkpoint
from adapterkit.codecs.grid import Grid
from adapterkit.dtypes import F16
from adapterkit.errors import TargetError, UsageError


def model(kind: str):
    import transformers

    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=128, n_positions=32)
        return transformers.GPT2LMHeadModel(config)
    if kind == "t5":
        config = transformers.T5Config(d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4, vocab_size=128)
        return transformers.T5ForConditionalGeneration(config)
    if kind == "qwen3_moe":
        config = transformers.Qwen3MoeConfig(
            hidden_size=64, intermediate_size=128, moe_intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=32, num_experts=4, vocab_size=128,
        )  # fmt: skip
        return transformers.Qwen3MoeForCausalLM(config)
    config = transformers.LlamaConfig(
        hidden_size=96, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, tie_word_embeddings=kind == "tied",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def saved_quantized(folder: Path, out: Path, dtype: torch.dtype, **how: object) -> Path:
    """What transformers and bitsandbytes save of a base."""
    import transformers

    cls = transformers.AutoModelForSeq2SeqLM if "t5" in folder.name else transformers.AutoModelForCausalLM
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformers.BitsAndBytesConfig(**how)
        cls.from_pretrained(folder, quantization_config=config, dtype=dtype).save_pretrained(out)
    return out


def read(view, name: str) -> torch.Tensor:
    return view[name].read(0, view[name].numel).view(view[name].shape)


def read_wide(view, name: str) -> torch.Tensor:
    return view[name].read_wide(0, view[name].numel).view(view[name].shape).float()


@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2", "t5", "qwen3_moe"])
@pytest.mark.parametrize("grid", [Grid("nf4"), Grid("fp4"), Grid("int8")], ids=str)
def test_equals_the_quantized_checkpoint(bnb, tmp_path: Path, kind: str, grid: Grid) -> None:
    base = tmp_path / kind
    model(kind).to(torch.bfloat16).save_pretrained(base)
    how = {"load_in_8bit": True} if grid.kind == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": grid.kind}
    oracle = dequantized(open_checkpoint(saved_quantized(base, tmp_path / "q", torch.bfloat16, **how)))
    view = as_trained(open_checkpoint(base), grid)
    assert set(oracle) == set(view)
    changed = 0
    for name in view:
        got, wanted = read_wide(view, name), read_wide(oracle, name)
        assert torch.equal(got, wanted), name
        changed += not torch.equal(read(view, name), read(open_checkpoint(base), name))
    assert changed >= 3


def test_double_quantization_differs_only_where_the_cpu_kernel_is_not_exact(bnb, tmp_path: Path) -> None:
    model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "llama")
    how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    oracle = dequantized(open_checkpoint(saved_quantized(tmp_path / "llama", tmp_path / "q", torch.bfloat16, **how)))
    view = as_trained(open_checkpoint(tmp_path / "llama"), Grid("nf4", double=True))
    single = as_trained(open_checkpoint(tmp_path / "llama"), Grid("nf4"))
    for name in view:
        if "layers" not in name or view[name].numel < 1000:
            continue
        got, wanted = read(view, name), read(oracle, name)
        other = (got != wanted).view(-1, 32).any(1).float().mean()
        assert other < 0.02, name
        assert (got != read(single, name)).float().mean() > 0.2


def test_quant_dtype_and_skipped_modules(bnb, tmp_path: Path) -> None:
    model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "llama")
    how = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "llm_int8_skip_modules": ["q_proj", r"model.layers.1.mlp"],
    }
    oracle = dequantized(open_checkpoint(saved_quantized(tmp_path / "llama", tmp_path / "q", torch.float16, **how)))
    view = as_trained(open_checkpoint(tmp_path / "llama"), Grid("nf4", dtype=F16), skip=how["llm_int8_skip_modules"])
    for name in view:
        wanted = read_wide(oracle, name)
        if "Renamed" in repr(view[name]) or "Stored" in repr(view[name]):
            wanted = wanted.to(torch.float16).float()
            assert torch.equal(read_wide(view, name).to(torch.float16).float(), wanted), name
        else:
            assert torch.equal(read_wide(view, name), wanted), name
    assert not torch.equal(read(view, "lm_head.weight"), read(open_checkpoint(tmp_path / "llama"), "lm_head.weight"))


def adapter(folder: Path, rank: int = 4) -> Path:
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for module, out, inside in (("self_attn.q_proj", 96, 96), ("mlp.down_proj", 96, 160)):
        key = f"base_model.model.model.layers.0.{module}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, inside, generator=generator)
        tensors[f"{key}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * 0.01
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_merging_as_trained_is_merging_the_quantized_checkpoint(bnb, tmp_path: Path, kind: str) -> None:
    """Both give W' = decode(encode(W)) + s B A in float64, rounded once, byte for byte; so does a saved plan."""
    model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "llama")
    how = {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": kind}
    quantized = saved_quantized(tmp_path / "llama", tmp_path / "q", torch.bfloat16, **how)
    tuned = adapter(tmp_path / "adapter")
    one = merge(quantized, [tuned], tmp_path / "one")
    two = merge(tmp_path / "llama", [tuned], tmp_path / "two", as_trained=kind, jobs=1)
    assert one.base_values == "decoded"
    assert two.base_values == f"as trained in {kind}"
    first, second = load_file(tmp_path / "one/model.safetensors"), load_file(tmp_path / "two/model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert "quantization_config" not in json.loads((tmp_path / "one/config.json").read_text())
    factors = load_file(tuned / "adapter_model.safetensors")
    oracle = dequantized(open_checkpoint(quantized))
    for module in ("self_attn.q_proj", "mlp.down_proj"):
        key = f"base_model.model.model.layers.0.{module}"
        delta = 2 * factors[f"{key}.lora_B.weight"].double() @ factors[f"{key}.lora_A.weight"].double()
        name = f"model.layers.0.{module}.weight"
        w = read_wide(oracle, name).double()
        exact = w + delta
        unit = torch.exp2(torch.floor(torch.log2(exact.abs())) - 7)
        # Half a unit of bfloat16, and what a float32 sum of the two terms may be off.
        assert ((first[name].double() - exact).abs() <= unit / 2 + (w.abs() + delta.abs()) * 2.0**-22).all()
    planned = plan_merge(tmp_path / "llama", [tuned], as_trained=kind, headers_only=False)
    for part in range(len(planned.plan.files)):
        execute(planned.plan, tmp_path / "three", part=part)
    execute(planned.plan, tmp_path / "three")
    assert (tmp_path / "three/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


def test_unsloth_2516_folding_onto_the_original(bnb, tmp_path: Path) -> None:
    model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "llama")
    how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    quantized = saved_quantized(tmp_path / "llama", tmp_path / "q", torch.bfloat16, **how)
    tuned = adapter(tmp_path / "adapter")
    report = merge(quantized, [tuned], tmp_path / "one", base16=tmp_path / "llama")
    merge(tmp_path / "llama", [tuned], tmp_path / "two")
    assert report.base_values.startswith("original")
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()
    model("tied").to(torch.bfloat16).save_pretrained(tmp_path / "other")
    with pytest.raises(TargetError, match="not the original"):
        plan_merge(quantized, [tuned], base16=tmp_path / "other")
    with pytest.raises(UsageError, match="is quantized itself"):
        plan_merge(quantized, [tuned], base16=quantized)


def test_contradictions(bnb, tmp_path: Path) -> None:
    model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "llama")
    tuned = adapter(tmp_path / "adapter")
    for options, message in (
        ({"double_quant": True}, "means nothing here; add --as-trained"),
        ({"quant": "int4", "skip_modules": ["lm_head"]}, "merge to 16 bits, then convert that --to int4"),
        ({"skip_modules": ["lm_head"]}, "means nothing here; add --as-trained"),
        ({"as_trained": "q4"}, "is not a value of as_trained"),
        ({"as_trained": "int8", "double_quant": True}, "no nested scales"),
        ({"as_trained": "nf4", "quant_dtype": "f8"}, "is not a value of quant_dtype"),
        ({"as_trained": "nf4", "skip_modules": ["("]}, "no pattern"),
        ({"as_trained": "nf4", "skip_modules": ["model", "lm_head"]}, "no linear layers"),
        ({"as_trained": "nf4", "skip_modules": ["lm_head", "mlp.down"]}, "has nothing that 'mlp.down' names"),
    ):
        with pytest.raises(UsageError, match=message):
            plan_merge(tmp_path / "llama", [tuned], **options)


def test_planning_needs_no_torch(bnb, tmp_path: Path) -> None:
    """A dry run over a quantized base, as trained, or towards one, reads headers only."""
    model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "llama")
    how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    saved_quantized(tmp_path / "llama", tmp_path / "q", torch.bfloat16, **how)
    tuned = adapter(tmp_path / "adapter")
    script = (
        "import sys; from adapterkit.verbs.plan_merge import plan_merge\n"
        f"base, quantized, adapter = {str(tmp_path / 'llama')!r}, {str(tmp_path / 'q')!r}, {str(tuned)!r}\n"
        "print(plan_merge(quantized, [adapter]).plan.steps[5].how)\n"
        "print(len(plan_merge(base, [adapter], as_trained='nf4', double_quant=True).plan.steps))\n"
        "print(len(plan_merge(base, [adapter], quant='nf4', quant_double=True).plan.steps))\n"
        "assert not {'torch', 'numpy', 'transformers', 'bitsandbytes'} & set(sys.modules), 'heavy'\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1] == str(len(open_checkpoint(tmp_path / "llama")))
