"""Tiny random models of (nearly) every architecture in the installed transformers, from shrunken configs.

    model, config = zoo.build("qwen3_moe")

No class is written out here: every config class says which fields it has, `SMALL` says what a field of that name
becomes, and `OVERRIDES` holds what a family needs besides. Weights are random (also the ones that the library fills
with zeros and ones), from a fixed seed, so that a wrong row or a lost transpose cannot hide.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

# which auto mapping a kind of model is drawn from; the first that knows a type has it
KINDS = {
    "causal": ["MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"],
    "vlm": ["MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES"],
    "encoder-decoder": ["MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"],
    "encoder": ["MODEL_FOR_MASKED_LM_MAPPING_NAMES"],
    "speech": [
        "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
        "MODEL_FOR_CTC_MAPPING_NAMES",
        "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
        "MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES",
    ],
    "vision": [
        "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
        "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES",
        "MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES",
        "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES",
        "MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES",
        "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES",
        "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES",
        "MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES",
    ],
    "other": ["MODEL_MAPPING_NAMES"],
}

# field name -> tiny value; a field is set only where the config class has it and its default is a number (or a list)
_DATA: dict[str, Any] = json.loads(Path(__file__).with_name("zoo.json").read_text(encoding="utf-8"))
SMALL: dict[str, int] = _DATA["numbers"]
# list field name -> (first, step): the list keeps its length and becomes first, first + step, ...
LISTS: dict[str, list[int]] = _DATA["lists"]
# model type -> what it needs besides
OVERRIDES: dict[str, dict[str, Any]] = _DATA["types"]


def fields(config_class: Any) -> dict[str, Any]:
    """Field name -> default of a config class."""
    found = {}
    for field in dataclasses.fields(config_class):
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    return found


def tiny(config_class: Any, **overrides: Any) -> Any:
    """A small config of ``config_class``: number fields by `SMALL`, sub-configs likewise, then ``overrides``."""
    values: dict[str, Any] = {}
    for name, default in fields(config_class).items():
        if name in SMALL and isinstance(default, (int, float)) and not isinstance(default, bool):
            values[name] = SMALL[name]
        elif name in LISTS and isinstance(default, (list, tuple)):
            first, step = LISTS[name]
            values[name] = [first + step * index for index in range(len(default))]
    override = {**OVERRIDES.get(config_class.model_type, {}), **overrides}
    inner = {key: override.pop(key) for key in config_class.sub_configs if isinstance(override.get(key), dict)}
    values.update(override)
    if config_class.sub_configs:
        whole = _default(config_class, {**values, **inner})
        for key in config_class.sub_configs:
            part, change = getattr(whole, key, None), dict(inner.get(key, {}))
            if part is not None and key not in values:
                kind = change.pop("model_type", part.model_type)
                values[key] = tiny(type(part) if kind == part.model_type else _config_class(kind), **change)
    return config_class(**values)


def _config_class(model_type: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type]


def _default(config_class: Any, values: dict[str, Any]) -> Any:
    """The default config, to see which classes its sub-configs have."""
    try:
        return config_class()
    except Exception:
        return config_class(**values)


def kinds() -> dict[str, dict[str, str]]:
    """kind -> model type -> class name, from the auto classes; every model type is in one kind only."""
    from transformers.models.auto import modeling_auto as auto

    taken: set[str] = set()
    found: dict[str, dict[str, str]] = {}
    for kind, mappings in KINDS.items():
        types: dict[str, str] = {}
        for mapping in mappings:
            for model_type, names in getattr(auto, mapping).items():
                if model_type not in taken:
                    types[model_type] = names if isinstance(names, str) else names[0]
                    taken.add(model_type)
        found[kind] = types
    return found


def make(cls: Any, **overrides: Any) -> Any:
    """A tiny model of one class (on the current default device, not randomised)."""
    config = tiny(cls.config_class, **overrides)
    config._attn_implementation = "eager"
    return cls(config)


def build(model_type: str, **overrides: Any) -> tuple[Any, Any]:
    """``(model, config)``: a tiny model of ``model_type`` in float32, its weights random from a fixed seed."""
    import torch
    import transformers

    name = next(types[model_type] for types in kinds().values() if model_type in types)
    torch.manual_seed(0)
    model = make(getattr(transformers, name), **overrides).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.normal_(0, 0.1, generator=generator)
    return model.float(), model.config
