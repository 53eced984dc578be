"""Which modules bitsandbytes would quantize, against the module trees of transformers (all: bench/proofs/linear.py)."""

from __future__ import annotations

import pytest
import torch

from adapterkit.adapters.linear import quantized_modules
from adapterkit.errors import UsageError


@pytest.fixture(scope="module")
def bench():
    from bench.common import zoo
    from bench.proofs import linear

    return linear, zoo


CLASSES = (
    "LlamaForCausalLM Qwen3MoeForCausalLM MixtralForCausalLM GPT2LMHeadModel FalconForCausalLM Gemma3ForCausalLM "
    "Phi3ForCausalLM BloomForCausalLM OPTForCausalLM GPTNeoXForCausalLM T5ForConditionalGeneration "
    "BartForConditionalGeneration DeepseekV3ForCausalLM MambaForCausalLM CTRLLMHeadModel Qwen2VLForConditionalGeneration"
)


@pytest.mark.parametrize("name", CLASSES.split())
def test_equals_transformers(bench, name: str) -> None:
    import transformers

    linear, zoo = bench
    with torch.device("meta"):
        model = zoo.make(getattr(transformers, name))
    assert linear.by_adapterkit(model) == linear.by_transformers(model)


LLAMA = {
    "model.embed_tokens.weight": (8, 4),
    "model.layers.0.self_attn.q_proj.weight": (4, 4),
    "model.layers.0.input_layernorm.weight": (4,),
    "model.layers.1.self_attn.q_proj.weight": (4, 4),
    "model.layers.11.self_attn.q_proj.weight": (4, 4),
    "lm_head.weight": (8, 4),
}


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        (None, {"0", "1", "11"}),
        ([], {"0", "1", "11", "lm_head"}),
        (["lm_head"], {"0", "1", "11"}),
        (["model.layers.1"], {"0", "11", "lm_head"}),
        ([r"model.layers.1.*"], {"0", "lm_head"}),
        (["q_proj"], {"lm_head"}),
    ],
)
def test_skipped_modules_by_the_rule_of_transformers(skip: list[str] | None, left: set[str]) -> None:
    found = quantized_modules(LLAMA, {"model_type": "llama"}, skip)
    assert {name.split(".")[2] if "layers" in name else name for name in found} == left


def test_a_pattern_that_is_none() -> None:
    with pytest.raises(UsageError, match="no pattern"):
        quantized_modules(LLAMA, {}, ["("])


@pytest.mark.parametrize(
    "skip", ["q_proj", r"model\.layers\.\d+", "layers.1", "model", r"(?:model|lm_head)", r".*\.0\..*"]
)
def test_patterns_mean_what_transformers_means(skip: str) -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    found = set(quantized_modules(LLAMA, {"model_type": "llama"}, [skip]))
    modules = {name.removesuffix(".weight") for name in LLAMA if "proj" in name or "head" in name}
    assert found == {name for name in modules if should_convert_module(name, [skip])}
