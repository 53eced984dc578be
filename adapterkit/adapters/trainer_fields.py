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
    # NeMo Automodel, components/_peft/lora.py (0.7.0)
    "use_triton": "NeMo Automodel: which kernel computes the product",
    "lora_A_init": "NeMo Automodel: how A was initialised",
    # Megatron-Bridge, peft/lora.py and canonical_lora.py (0.3.1); B starts at zero or is trained from what it was
    "lora_A_init_method": "Megatron-Bridge: how A was initialised",
    "lora_B_init_method": "Megatron-Bridge: how B was initialised",
    "dropout_position": "Megatron-Bridge: where dropout acts in training",
    # The learning rates of LoRA+ (arXiv:2402.12354) as LLaMA-Factory and axolotl call them
    "loraplus_lr_ratio": "LLaMA-Factory, axolotl: the learning rates of LoRA+",
    "loraplus_lr_embedding": "LLaMA-Factory, axolotl: the learning rates of LoRA+",
    # Unsloth
    "unsloth_fixed": "Unsloth: it patched the config",
    # Fields of a model card
    "library_name": "the library that a model card names",
    "pipeline_tag": "the task that a model card names",
    "license": "the licence that a model card names",
    "tags": "the tags of a model card",
    # PEFT before 0.3
    "merge_weights": "PEFT before 0.3: whether evaluation merged the weights in memory",
    # What several exporters add
    "transformers_version": "versions at training time",
    "torch_dtype": "the dtype of the base at training time",
    "dtype": "the dtype of the base at training time",
}


def decides_nothing(name: str, value: Any) -> bool:
    """Whether a field of that value leaves the merged weights as they are."""
    # Versions of programs, under whatever name.
    version = name.endswith("_version") and isinstance(value, str)
    return value in (None, False, "", [], {}) or name in TRAINER_FIELDS or version
