"""Models that see or hear around a language model of a known kind: their text part in llama.cpp, beside transformers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")
import arch_zoo
import tower_zoo as zoo
from gguf_runtime import far, logprobs, of_model
from models import randomize

from adapterkit.gguf.arch.wholes import WRAPPERS
from adapterkit.gguf.towers.rows import TOWERS
from adapterkit.verbs.convert import convert

_EYE = {key: zoo.MODELS["gemma3"][1]["vision_config"][key] for key in ("hidden_size", "intermediate_size")}
_EYE |= {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14, "num_channels": 3}
_CLIP = {"model_type": "clip_vision_model", **_EYE, "projection_dim": 32}
_SIGLIP = {"model_type": "siglip_vision_model", **_EYE}
_GRID = {"image_token_index": 5, "image_grid_pinpoints": [[56, 56]]}
_EAR = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}


def _text(kind: str, **fields: Any) -> dict[str, Any]:
    plain = {key: value for key, value in zoo.MODELS["gemma3"][1]["text_config"].items() if key != "sliding_window"}
    return {"model_type": kind, **plain, "tie_word_embeddings": False, **fields}


_COHERE = _text("cohere2", num_hidden_layers=4, sliding_window=16)
_COHERE = {key: value for key, value in _COHERE.items() if key not in ("head_dim", "query_pre_attn_scalar")}
MODELS: dict[str, dict[str, Any]] = {
    "SmolVLMForConditionalGeneration": zoo.MODELS["smolvlm"][1],
    "InternVLForConditionalGeneration": zoo.MODELS["internvl"][1],
    "LlavaNextForConditionalGeneration": {"text_config": _text("mistral"), "vision_config": _CLIP, **_GRID},
    "LlavaOnevisionForConditionalGeneration": {"text_config": _text("qwen2"), "vision_config": _SIGLIP, **_GRID},
    "Idefics3ForConditionalGeneration": zoo.MODELS["idefics3"][1],
    "LlavaNextVideoForConditionalGeneration": {"text_config": _text("llama"), "vision_config": _CLIP, **_GRID},
    "VipLlavaForConditionalGeneration": {
        "text_config": _text("llama"),
        "vision_config": _CLIP,
        "image_token_index": 5,
        "vision_feature_layers": [-1, -2],
    },
    "VideoLlavaForConditionalGeneration": {
        "text_config": _text("llama"),
        "vision_config": _CLIP,
        "image_token_index": 5,
    },
    "AyaVisionForConditionalGeneration": {
        "text_config": {**_COHERE, "logit_scale": 1.0},
        "vision_config": _SIGLIP,
        "image_token_index": 5,
    },
    "Cohere2VisionForConditionalGeneration": {
        "text_config": {**_COHERE, "logit_scale": 1.0},
        "vision_config": _SIGLIP,
        "image_token_id": 5,
    },
    "LightOnOcrForConditionalGeneration": {
        "text_config": _text("qwen3"),
        "vision_config": {"model_type": "pixtral", **_EYE, "head_dim": 16},
        "image_token_id": 5,
    },
    "FastVlmForConditionalGeneration": {"text_config": _text("qwen2"), "vision_config": _CLIP, "image_token_id": 5},
    "GotOcr2ForConditionalGeneration": {
        "text_config": _text("qwen2"),
        "vision_config": {
            **{key: _EYE[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
            "image_size": 64,
            "patch_size": 16,
            "output_channels": 16,
            "window_size": 2,
            "mlp_dim": 48,
            "global_attn_indexes": [1],
        },
        "image_token_index": 5,
    },
    "Ovis2ForConditionalGeneration": {
        "text_config": _text("qwen2"),
        "vision_config": {**_EYE, "vocab_size": 50, "hidden_stride": 2, "num_visual_indicator_tokens": 5},
        "image_token_id": 5,
        "visual_indicator_token_ids": [10, 11, 12, 13, 14],
    },
    "GlmAsrForConditionalGeneration": {
        "text_config": _text("llama"),
        "audio_config": {"model_type": "glmasr_encoder", **_EAR, "num_mel_bins": 16, "max_position_embeddings": 50},
        "audio_token_id": 5,
    },
    "MusicFlamingoForConditionalGeneration": {
        "text_config": _text("qwen2"),
        "audio_config": {"model_type": "audioflamingo3_encoder", **_EAR, "num_mel_bins": 16, "max_source_positions": 8},
        "audio_token_id": 5,
    },
}
FAST = 4  # of them; the others are slow


@pytest.fixture(autouse=True)
def _vocab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapterkit.gguf.vocab.read_vocab", arch_zoo.read_vocab)


def build(folder: Path, name: str, **fields: Any) -> Any:
    """A random model of a class, in float32; ``fields`` are of its text part."""
    import torch
    import transformers

    config = MODELS[name]
    config = {**config, "text_config": {**config["text_config"], **fields}}
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**config)).float().eval()
    randomize(model, scale=0.1)
    model.save_pretrained(folder)
    return model


def both(tmp_path: Path, names: list[str]) -> None:
    wanted, files = [], []
    for name in names:
        model = build(tmp_path / name, name)
        files.append(tmp_path / f"{name}.gguf")
        report = convert(tmp_path / name, files[-1])
        said = next(note for note in report.notes if "text part alone" in note)
        known = any(name in tower.classes for tower in TOWERS)
        assert ("mmproj=" in said) == known, said
        wanted.append(of_model(model))
    for name, mine, theirs in zip(names, logprobs(*files), wanted, strict=True):
        assert far(mine, theirs) < 1e-5, name


def test_the_text_part_computes_the_same(tmp_path: Path) -> None:
    both(tmp_path, list(MODELS)[:FAST])


@pytest.mark.slow
def test_the_text_part_of_the_others_too(tmp_path: Path) -> None:
    both(tmp_path, list(MODELS)[FAST:])


def test_scores_that_transformers_does_not_scale_are_said(tmp_path: Path) -> None:
    """AyaVision and a LLaVA with a Granite: llama.cpp applies the text part's factor, transformers' class does not."""
    build(tmp_path / "hf", "AyaVisionForConditionalGeneration", logit_scale=0.25)
    notes = convert(tmp_path / "hf", tmp_path / "o.gguf").notes
    assert any("'logit_scale' is 0.25" in note and "AyaVision" in note for note in notes)
    build(tmp_path / "granite", "LlavaNextForConditionalGeneration", model_type="granite", logits_scaling=4.0)
    notes = convert(tmp_path / "granite", tmp_path / "g.gguf").notes
    assert any("'logits_scaling' is 4.0" in note for note in notes)


def test_every_class_with_a_tower_has_a_text_part() -> None:
    from adapterkit.gguf.arch.table import classes

    known = {*classes(), *WRAPPERS}
    remote = {"InternVLChatModel"}  # its own code's; the text part is taken by its model type
    assert {name for tower in TOWERS for name in tower.classes} - known <= remote
