"""The child process of `adapterkit.verbs.conversions.compressor`: llm-compressor on a folder, with a text to calibrate on.

Run as a script by the Python that has llm-compressor, which need not have adapterkit:

    python -I oneshot.py '{"src": FOLDER, "out": FOLDER, "kind": "gptq", "calibration": FILE, "skip": ["lm_head"]}'

The text is cut into windows of 512 tokens (or as many as the model takes), of which at most 256 are used, spread over it.
"""

from __future__ import annotations

import json
import sys
from typing import Any

WINDOW, WINDOWS = 512, 256
SCHEMES = {"gptq": "W4A16", "awq": "W4A16_ASYM"}


def main() -> None:
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asked: dict[str, Any] = json.loads(sys.argv[1])
    if not torch.accelerator.is_available():
        # AWQ of llm-compressor 0.14 pins its activations, which torch refuses where there is no accelerator.
        from llmcompressor.pipelines.cache import IntermediatesCache

        IntermediatesCache.pin_memory = lambda *args, **kwargs: None
    tokenizer = AutoTokenizer.from_pretrained(asked["src"])
    model = AutoModelForCausalLM.from_pretrained(asked["src"], dtype="auto")
    with open(asked["calibration"], encoding="utf-8") as file:
        tokens = tokenizer(file.read())["input_ids"]
    window = min(WINDOW, getattr(model.config, "max_position_embeddings", None) or WINDOW)
    starts = list(range(0, len(tokens), window))
    step = -(-len(starts) // WINDOWS)
    rows = [tokens[start : start + window] for start in starts[::step]]
    samples = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
    how: dict[str, Any] = {"targets": ["Linear"], "scheme": SCHEMES[asked["kind"]], "ignore": asked["skip"]}
    recipe = [GPTQModifier(**how)] if asked["kind"] == "gptq" else [AWQModifier(), QuantizationModifier(**how)]
    oneshot(
        model=model,
        dataset=Dataset.from_list(samples),
        recipe=recipe,
        max_seq_length=window,
        num_calibration_samples=len(samples),
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(asked["out"], save_compressed=True)


if __name__ == "__main__":
    main()
