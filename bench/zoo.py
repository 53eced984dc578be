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

HIDDEN, HEADS, KV_HEADS, HEAD, LAYERS, VOCAB, EXPERTS = 32, 4, 2, 8, 2, 128, 4

# field name -> tiny value; a field is set only where the config class has it and its default is a number (or a list)
SMALL: dict[str, Any] = json.loads(Path(__file__).with_name("zoo.json").read_text(encoding="utf-8"))
OVERRIDES: dict[str, dict[str, Any]] = SMALL.pop("types")
AUTO: dict[str, str] = SMALL.pop("auto")


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
    defaults = fields(config_class)
    for name, default in defaults.items():
        if (name in SMALL and isinstance(default, (int, float)) and not isinstance(default, bool)) or (
            isinstance(default, (list, tuple)) and name in SMALL and isinstance(SMALL[name], list)
        ):
            values[name] = SMALL[name]
    override = {**OVERRIDES.get(config_class.model_type, {}), **overrides}
    inner = {k: v for k, v in override.items() if isinstance(v, dict) and k in config_class.sub_configs}
    values.update({k: v for k, v in override.items() if k not in inner})
    if config_class.sub_configs:
        whole = _default(config_class, values)
        for key in config_class.sub_configs:
            part = getattr(whole, key, None)
            if part is not None and key not in values:
                values[key] = tiny(type(part), **inner.get(key, {}))
    return config_class(**values)


def _default(config_class: Any, values: dict[str, Any]) -> Any:
    """The default config, to see which classes its sub-configs have."""
    try:
        return config_class()
    except Exception:
        return config_class(**values)


def make(cls: Any, **overrides: Any) -> Any:
    """A tiny model of one class (on the current default device, not randomised)."""
    from transformers import PreTrainedModel

    config = tiny(cls.config_class, **overrides)
    config._attn_implementation = "eager"
    assert issubclass(cls, PreTrainedModel)
    return cls(config)
