"""What speech, embedding and vision-language trainers save, beside PEFT's merge; `inspect` says what each changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import read_tensors
from safetensors.torch import load_file, save_file

import adapterkit

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 32,
}
SPEECH = {
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": (8, 8),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
}


def model(kind: str) -> Any:
    import transformers as t

    torch.manual_seed(0)
    if kind == "wav2vec2":
        return t.Wav2Vec2ForCTC(t.Wav2Vec2Config(**SPEECH))
    if kind == "hubert":
        return t.HubertForSequenceClassification(t.HubertConfig(**SPEECH, classifier_proj_size=8))
    if kind == "orpheus":
        return t.LlamaForCausalLM(t.LlamaConfig(**SMALL, tie_word_embeddings=True))
    vision = {k: v for k, v in SMALL.items() if k not in ("num_key_value_heads", "vocab_size")}
    vision |= {"image_size": 28, "patch_size": 14}
    text = {"model_type": "llama", **SMALL}
    return t.LlavaForConditionalGeneration(
        t.LlavaConfig(
            text_config=text, vision_config={"model_type": "clip_vision_model", "projection_dim": 8, **vision}
        )
    )


@pytest.mark.parametrize(
    ("kind", "said", "parts"),
    [
        (
            "wav2vec2",
            {"target_modules": ["q_proj", "conv_layers.1.conv"], "modules_to_save": ["lm_head"]},
            "encoder (1",
        ),
        ("hubert", {"target_modules": ["v_proj"], "modules_to_save": ["classifier", "projector"]}, "encoder (1"),
        ("orpheus", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}, ""),
        ("llava", {"target_modules": "all-linear"}, "text (7 modules), vision (8 modules)"),
    ],
)
def test_the_merge_is_pefts(kind: str, said: dict[str, Any], parts: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base, adapter = tmp_path / "base", tmp_path / "adapter"
    plain = model(kind)
    plain.save_pretrained(base)
    live = get_peft_model(plain, LoraConfig(r=2, lora_alpha=4, **said))
    with torch.no_grad():
        for key, parameter in live.named_parameters():
            if "lora_" in key or "modules_to_save" in key:
                parameter += 0.1 * torch.randn_like(parameter)
    live.save_pretrained(adapter)
    wanted = {key: tensor.clone() for key, tensor in live.merge_and_unload().state_dict().items()}
    details = adapterkit.inspect(adapter).details
    assert details["trained class"] == type(plain).__name__
    assert details.get("parts", "").startswith(parts)
    adapters = [adapter]
    if kind == "llava":  # the names that this class had in transformers before 4.52
        older = tmp_path / "older"
        older.mkdir()
        (older / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
        tensors = load_file(adapter / "adapter_model.safetensors")
        renamed = {
            key.replace("model.model.language_model.", "model.language_model.model.").replace(
                "model.model.", "model."
            ): tensor
            for key, tensor in tensors.items()
        }
        assert renamed.keys().isdisjoint(tensors)
        save_file(renamed, older / "adapter_model.safetensors", {"format": "pt"})
        adapters.append(older)
    for number, one in enumerate(adapters):
        out = tmp_path / f"out{number}"
        adapterkit.merge(base, [one], out)
        found = type(plain).from_pretrained(out, dtype=torch.float32).state_dict()
        assert found.keys() == wanted.keys()
        assert max((found[key] - tensor).abs().max() for key, tensor in wanted.items()) <= 1e-6
        assert read_tensors(out).keys() >= read_tensors(base).keys()
