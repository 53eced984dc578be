from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes adapter folders; the content decides the bytes of the weights."""

    def adapter(name: str = "adapter", content: bytes = b"weights", base: str = "org/base", **config: object) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "base_model_name_or_path": base, **config}
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        (folder / "adapter_model.safetensors").write_bytes(content)
        return folder

    return adapter
