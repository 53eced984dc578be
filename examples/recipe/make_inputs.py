"""The inputs of the example: a tiny base and two adapters, the same bytes whenever and wherever they are made.

python make_inputs.py [FOLDER]

Needs torch, safetensors and tokenizers. Weights are random numbers of a fixed seed: the example is about the road, not about
what the model says (`adapterkit demo` trains one).
"""

import json
import math
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

HIDDEN, LAYERS, HEADS, MIDDLE = 256, 2, 4, 512
WORDS = ["the", " the", " sky", " is", " blue", " grey", " sea", " calm", " rough", " and", " a", " lemon", " sour"]
SPECIAL = ["<|begin|>", "<|end|>"]


def byte_letters() -> dict[int, str]:
    """The printable letter that byte-level BPE writes for each byte (GPT-2's encoder)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def tokenizer() -> Tokenizer:
    letters = byte_letters()
    vocabulary = {letter: index for index, letter in enumerate(letters[byte] for byte in range(256))}
    merges = []
    for word in WORDS:
        parts = [letters[byte] for byte in word.encode()]
        while len(parts) > 1:
            left, right = parts[0], parts[1]
            if left + right not in vocabulary:
                vocabulary[left + right] = len(vocabulary)
                merges.append((left, right))
            parts = [left + right, *parts[2:]]
    made = Tokenizer(models.BPE(vocabulary, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(SPECIAL)
    return made


def write_base(folder: Path) -> None:
    folder.mkdir(parents=True)
    words = tokenizer()
    rows = words.get_vocab_size()
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, HIDDEN)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
        shapes |= {f"{at}.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qo"}
        shapes |= {f"{at}.self_attn.{name}_proj.weight": (HIDDEN // 2, HIDDEN) for name in "kv"}
        shapes |= {f"{at}.mlp.{name}_proj.weight": (MIDDLE, HIDDEN) for name in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (HIDDEN, MIDDLE)
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (rows, HIDDEN)}
    random = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=random) / math.sqrt(HIDDEN)
        tensors[name] = (torch.ones(shape) if len(shape) == 1 else values).to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    words.save(str(folder / "tokenizer.json"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": MIDDLE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "vocab_size": rows,
        "bos_token_id": rows - 2,
        "eos_token_id": rows - 1,
        "dtype": "bfloat16",
    }
    write_json(folder / "config.json", config)
    named = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(folder / "tokenizer_config.json", named)


def write_adapter(folder: Path, modules: list[str], seed: int, rank: int = 8) -> None:
    folder.mkdir(parents=True)
    sizes = {"q_proj": (HIDDEN, HIDDEN), "v_proj": (HIDDEN // 2, HIDDEN), "down_proj": (HIDDEN, MIDDLE)}
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(LAYERS):
        for module in modules:
            rows, columns = sizes[module]
            at = f"base_model.model.model.layers.{layer}.{'mlp' if module == 'down_proj' else 'self_attn'}.{module}"
            tensors[f"{at}.lora_A.weight"] = torch.randn(rank, columns, generator=random) / math.sqrt(columns)
            tensors[f"{at}.lora_B.weight"] = torch.randn(rows, rank, generator=random) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "peft_version": "0.18.0",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "example/tiny-llama",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": modules,
    }
    write_json(folder / "adapter_config.json", config)


def write_json(path: Path, data: dict[str, object]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")


def main(folder: Path) -> None:
    write_base(folder / "base")
    write_adapter(folder / "style", ["q_proj", "v_proj"], seed=1)
    write_adapter(folder / "facts", ["down_proj"], seed=2)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "inputs"))
