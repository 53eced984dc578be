"""Checkpoints made of tensors in memory, and the tiny models that real libraries quantize."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from adapterkit.checkpoint.checkpoint import Checkpoint
from adapterkit.checkpoint.open import open_checkpoint


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def bnb():
    """bitsandbytes.functional; it warns at import where optional kernels are missing, and would compile for a minute."""
    torch._dynamo.config.disable = True
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("bitsandbytes.functional")


@pytest.fixture
def store(tmp_path: Path):
    """Write tensors and a quantization_config as a folder, and open it."""

    def make(tensors: dict[str, torch.Tensor], quantization: dict | None = None, **config: object) -> Checkpoint:
        folder = tmp_path / f"m{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
        if quantization is not None:
            config["quantization_config"] = quantization
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16", **config}))
        return open_checkpoint(folder)

    return make
