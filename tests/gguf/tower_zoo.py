"""Tiny models that see or hear, with a tower each, for the projectors (mmproj)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_TEXT: dict[str, Any] = {
    "vocab_size": 288,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
_EYE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
    "num_channels": 3,
}
_QWEN_EYE = {
    "depth": 2,
    "num_heads": 2,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}
_EAR = {"num_mel_bins": 128, "max_source_positions": 1500}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "pixtral": (
        "LlavaForConditionalGeneration",
        {
            "text_config": {"model_type": "mistral", **_TEXT, "sliding_window": None},
            "vision_config": {"model_type": "pixtral", **_EYE, "head_dim": 16, "rope_theta": 10000.0},
            "image_token_index": 5,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        },
    ),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        {
            "text_config": {"model_type": "mistral", **_TEXT, "sliding_window": None},
            "vision_config": {"model_type": "pixtral", **_EYE, "head_dim": 16, "rope_theta": 10000.0},
            "image_token_index": 5,
            "spatial_merge_size": 2,
            "vision_feature_layer": -1,
        },
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {**_TEXT, "query_pre_attn_scalar": 16, "sliding_window": 64, "tie_word_embeddings": True},
            "vision_config": {"model_type": "siglip_vision_model", **_EYE},
            "mm_tokens_per_image": 4,
            "image_token_id": 5,
        },
    ),
    "smolvlm": (
        "SmolVLMForConditionalGeneration",
        {
            "text_config": {"model_type": "llama", **_TEXT},
            "vision_config": _EYE,
            "scale_factor": 2,
            "image_token_id": 5,
        },
    ),
    "idefics3": (
        "Idefics3ForConditionalGeneration",
        {
            "text_config": {"model_type": "llama", **_TEXT},
            "vision_config": _EYE,
            "scale_factor": 2,
            "image_token_id": 5,
        },
    ),
    "internvl": (
        "InternVLForConditionalGeneration",
        {
            "text_config": {"model_type": "qwen2", **_TEXT},
            "vision_config": {**_EYE, "image_size": [56, 56], "patch_size": [14, 14], "use_qk_norm": False},
            "image_token_id": 5,
            "downsample_ratio": 0.5,
        },
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": {**_TEXT, "rope_parameters": _SECTIONS},
            "vision_config": {**_QWEN_EYE, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
            "image_token_id": 5,
        },
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": {**_TEXT, "rope_parameters": _SECTIONS},
            "vision_config": {
                **_QWEN_EYE,
                "hidden_size": 32,
                "out_hidden_size": 64,
                "intermediate_size": 48,
                "fullatt_block_indexes": [1],
                "window_size": 112,
            },
            "image_token_id": 5,
        },
    ),
    "qwen3_vl": (
        "Qwen3VLForConditionalGeneration",
        {
            "text_config": {**_TEXT, "rope_parameters": _SECTIONS},
            "vision_config": {
                **_QWEN_EYE,
                "hidden_size": 32,
                "out_hidden_size": 64,
                "intermediate_size": 48,
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": 16,
            },
            "image_token_id": 5,
        },
    ),
    "lfm2_vl": (
        "Lfm2VlForConditionalGeneration",
        {
            "text_config": {
                **{k: v for k, v in _TEXT.items() if k != "head_dim"},
                "num_hidden_layers": 2,
                "layer_types": ["conv", "full_attention"],
            },
            "vision_config": {
                "model_type": "siglip2_vision_model",
                **{k: v for k, v in _EYE.items() if k != "image_size"},
                "patch_size": 16,
                "num_patches": 256,
            },
            "projector_hidden_size": 48,
            "image_token_id": 5,
        },
    ),
    "qwen2_audio": (
        "Qwen2AudioForConditionalGeneration",
        {
            "text_config": {"model_type": "qwen2", **_TEXT},
            "audio_config": {
                "model_type": "qwen2_audio_encoder",
                **_EAR,
                "d_model": 32,
                "encoder_layers": 2,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 48,
            },
            "audio_token_index": 5,
        },
    ),
    "qwen3_5": (
        "Qwen3_5ForConditionalGeneration",
        {
            "text_config": {
                **_TEXT,
                "layer_types": ["full_attention"],
                "rope_parameters": {**_SECTIONS, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5},
            },
            "vision_config": {
                **_QWEN_EYE,
                "hidden_size": 32,
                "out_hidden_size": 64,
                "intermediate_size": 48,
                "num_position_embeddings": 16,
            },
            "image_token_id": 5,
        },
    ),
}


def read_vocab(files: Any, config: Any, *, kind: str, rows: int, pre: str | None = None) -> Any:
    """A vocabulary of bytes in the place of the tokenizer: what stands around an image is text."""
    from adapterkit.gguf.metadata import array, text, u32
    from adapterkit.gguf.reader import F32, I32, STRING
    from adapterkit.gguf.vocab import Vocab

    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [f"t{number}" for number in range(rows - len(tokens))]
    entries = (
        text("tokenizer.ggml.model", "llama"),
        array("tokenizer.ggml.tokens", STRING, tokens),
        array("tokenizer.ggml.scores", F32, [float(-number) for number in range(rows)]),
        array("tokenizer.ggml.token_type", I32, [2, 3, 3, *[6] * 256, *[1] * (rows - 259)]),
        u32("tokenizer.ggml.unknown_token_id", 0),
        u32("tokenizer.ggml.bos_token_id", 1),
        u32("tokenizer.ggml.eos_token_id", 2),
    )
    return Vocab(entries, rows)


MEAN, STD = (0.5, 0.4, 0.3), (0.5, 0.25, 0.2)
# Sides of the image for each, so that the runtime has nothing to scale.
SIDES = {"mistral3": 112, "qwen2_vl": 112, "qwen2_5_vl": 112, "qwen3_vl": 112, "qwen3_5": 112, "lfm2_vl": 256}


def build(folder: Path, kind: str) -> Any:
    """A random model saved in ``folder``, in float32, with a preprocessor beside it."""
    import torch
    import transformers
    from models import randomize

    name, config = MODELS[kind]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**config)).float().eval()
    randomize(model, scale=0.1)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    tokens = {"added_tokens_decoder": {"7": {"content": "[IMG_BREAK]"}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    return model


def media(kind: str) -> dict[str, Any]:
    """An image or a sound, as `mtmd_c.seen` takes it."""
    import torch

    generator = torch.Generator().manual_seed(3)
    if kind == "qwen2_audio":
        return {"media": (torch.randn(480000, generator=generator) * 0.1).tolist(), "kind": "sound"}
    side = SIDES.get(kind, 56)
    image = torch.randint(0, 256, (side, side, 3), generator=generator, dtype=torch.uint8)
    return {"media": image.reshape(-1).tolist(), "size": (side, side)}


def expected(model: Any, kind: str) -> Any:
    """Float64 ``[tokens, width]``: what transformers gives the language model for `media`."""
    import numpy as np
    import torch

    given = media(kind)
    with torch.no_grad():
        if kind == "qwen2_audio":
            return _rows(_heard(model, given["media"]))
        side = given["size"][0]
        image = torch.tensor(given["media"], dtype=torch.float32).view(side, side, 3) / 255
        pixels = ((image - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)
        if kind.startswith("qwen"):
            found = model.get_image_features(*_patches(pixels, 14))
            deep = getattr(found, "deepstack_features", None) or ()
            return np.concatenate([_rows(found), *(_rows(one) for one in deep)], -1)
        if kind in ("pixtral", "mistral3"):
            return _rows(model.get_image_features(pixels[None], image_sizes=torch.tensor([[side, side]])))
        if kind == "lfm2_vl":
            places = side // 16
            rows = pixels.reshape(3, places, 16, places, 16).permute(1, 3, 2, 4, 0).reshape(1, places * places, -1)
            mask = torch.ones(1, places * places, dtype=torch.long)
            shapes = torch.tensor([[places, places]])
            return _rows(model.get_image_features(pixel_values=rows, spatial_shapes=shapes, pixel_attention_mask=mask))
        return _rows(model.get_image_features(pixels[None, None] if kind in ("smolvlm", "idefics3") else pixels[None]))


def _heard(model: Any, samples: Any) -> Any:
    import numpy as np
    import transformers

    features = transformers.WhisperFeatureExtractor(feature_size=128)
    mel = features(np.array(samples, dtype=np.float32), sampling_rate=16000, return_tensors="pt")["input_features"]
    inner = model.model if hasattr(model, "model") else model
    return inner.multi_modal_projector(inner.audio_tower(mel).last_hidden_state)


def _patches(pixels: Any, size: int) -> tuple[Any, Any]:
    """Patches of two equal frames in the order of Qwen's image processor, and their grid."""
    import torch

    colours, high, wide = pixels.shape
    up, across = high // size, wide // size
    both = pixels[None].repeat(2, 1, 1, 1).reshape(1, 2, colours, up // 2, 2, size, across // 2, 2, size)
    return both.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(up * across, -1), torch.tensor([[1, up, across]])


def _rows(found: Any) -> Any:
    import torch

    if getattr(found, "pooler_output", None) is not None:
        found = found.pooler_output
    while isinstance(found, (list, tuple)) and isinstance(found[0], (list, tuple)):
        found = found[0]
    if isinstance(found, (list, tuple)):
        found = torch.cat([one.reshape(-1, one.shape[-1]) for one in found])
    return found.reshape(-1, found.shape[-1]).double().numpy()
