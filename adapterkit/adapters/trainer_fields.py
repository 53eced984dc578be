"""Fields that other trainers write into ``adapter_config.json`` and that decide nothing when the adapter is merged.

`TRAINER_FIELDS` maps each to who writes it and what it is for. A field that can change the merged weights has no row here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TRAINER_FIELDS: Mapping[str, str] = {
    # ms-swift, swift/tuners/peft.py: fields of its own LoraConfig
    "lora_dtype": "ms-swift, NeMo Automodel: the dtype of the factors in training",
    "lorap_lr_ratio": "ms-swift: the learning rates of LoRA+",
    "lorap_emb_lr": "ms-swift: the learning rates of LoRA+",
    "model_key_mapping": "ms-swift: which modules of a model type it may target",
    # axolotl, integrations/kernels/merge_aware_callback.py (axolotl#3822)
    "nvfp4_merge_aware": "axolotl: training saw base + adapter on the NVFP4 grid",
    # PEFT before 0.3
    "merge_weights": "PEFT before 0.3: whether evaluation merged the weights in memory",
    # What several exporters add
    "transformers_version": "versions at training time",
    "torch_dtype": "the dtype of the base at training time",
    "dtype": "the dtype of the base at training time",
}


def decides_nothing(name: str, value: Any) -> bool:
    """Whether a field of that value leaves the merged weights as they are."""
    return value in (None, False, "", [], {}) or name in TRAINER_FIELDS
