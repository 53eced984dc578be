"""What the merged model says, against the quantized model with a live adapter."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from adapterkit import merge

TOKENS = torch.arange(1, 33).view(2, 16)


def logits(model: torch.nn.Module) -> torch.Tensor:
    """In training mode, where bitsandbytes computes in float32 (else its CPU kernels round to bfloat16); no dropout."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.train()(TOKENS).logits.detach().float()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 base, its NF4 form by transformers and bitsandbytes, and an adapter on all linear layers."""
    import transformers
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, initializer_range=0.08,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config)
    base.save_pretrained(folder / "base")
    tuned = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", lora_dropout=0.0))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    tuned.save_pretrained(folder / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        how = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        transformers.AutoModelForCausalLM.from_pretrained(
            folder / "base", quantization_config=how, dtype=torch.float32
        ).save_pretrained(folder / "nf4")
    return folder


def live(folder: Path, base: str) -> torch.Tensor:
    import peft
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / base, dtype=torch.float32)
        return logits(peft.PeftModel.from_pretrained(model, folder / "adapter"))


def merged(folder: Path, out: Path, base: str, **options: str) -> torch.Tensor:
    import transformers

    merge(folder / base, [folder / "adapter"], out, **options)
    return logits(transformers.AutoModelForCausalLM.from_pretrained(out))


def far(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, as a part of the logits' spread."""
    return ((one - other).abs().max() / other.std()).item()


def test_merged_says_what_the_live_adapter_says(bnb, trained: Path, tmp_path: Path) -> None:
    on_nf4, on_w16 = live(trained, "nf4"), live(trained, "base")
    decoded = merged(trained, tmp_path / "decoded", "nf4")
    as_trained = merged(trained, tmp_path / "trained", "base", as_trained="nf4")
    original = merged(trained, tmp_path / "original", "nf4", base16=str(trained / "base"))
    assert far(decoded, on_nf4) < 1e-3
    assert far(as_trained, on_nf4) < 1e-3
    assert far(original, on_w16) < 1e-3
    # The two bases are not the same: which of them is meant has to be asked.
    assert far(original, on_nf4) > 0.05
