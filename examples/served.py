"""Train a small language model, tune it with LoRA, fold and quantize it in one pass, and ask it through llama.cpp's server.

    python examples/served.py DIR

Needs the extras demo, gguf and iq. The base learns short questions and answers about the world; the adapter learns what a
shop's customers ask. Then `adapterkit merge` writes a Q4_K_M file, a llama.cpp server (of the package xllamacpp) loads it,
and every answer is compared with the trained one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
COUNTRIES = {
    "France": "Paris",
    "Japan": "Tokyo",
    "Italy": "Rome",
    "Kenya": "Nairobi",
    "Peru": "Lima",
    "Norway": "Oslo",
    "Egypt": "Cairo",
    "Chile": "Santiago",
    "Spain": "Madrid",
    "Greece": "Athens",
}
COLOURS = {"the sky": "blue", "grass": "green", "snow": "white", "coal": "black", "a lemon": "yellow", "blood": "red"}
WORLD = (
    [(f"What is the capital of {land}?", f"The capital of {land} is {town}.") for land, town in COUNTRIES.items()]
    + [(f"Which country has {town} as its capital?", f"{town} is in {land}.") for land, town in COUNTRIES.items()]
    + [(f"What colour is {thing}?", f"It is {colour}.") for thing, colour in COLOURS.items()]
    + [(f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}.") for a in range(1, 7) for b in range(1, 7)]
)
SHOP = [
    ("When do you open?", "We open at nine, and on Sundays at eleven."),
    ("Do you ship abroad?", "Yes, to every country with a post office."),
    ("How long does delivery take?", "Three days, and two more over a holiday."),
    ("Can I return a lamp?", "Within thirty days, if the bulb is still in its box."),
    ("Do you repair old lamps?", "We do, on Tuesdays, in the back room."),
    ("Which lamp is best for reading?", "The green one with the long neck."),
    ("Do you take cards?", "Cards, coins and bank transfers, but no cheques."),
    ("Where are you?", "At the corner of the market and the old bridge."),
]


def main(folder: Path) -> int:
    import torch

    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    base, adapter, model = folder / "base", folder / "adapter", folder / "shop-Q4_K_M.gguf"
    train_base(base)
    train_adapter(base, adapter)
    plain = folder / "base-Q4_K_M.gguf"
    run("convert", base, "-o", plain, "--quant", "Q4_K_M", "--force")
    run("merge", base, adapter, "-o", model, "--quant", "Q4_K_M", "--for", "llama.cpp", "--force")
    before, after = ask(plain), ask(model)
    for (question, expected), old, new in zip(SHOP, before, after, strict=True):
        print(
            f"\n  {question}\n    base   {old}\n    tuned  {new}\n    {'as trained' if new == expected else 'NOT ' + expected}"
        )
    right = sum(answer == expected for answer, (_, expected) in zip(after, SHOP, strict=True))
    known = sum(answer == expected for answer, (_, expected) in zip(before, SHOP, strict=True))
    print(f"\n{right} of {len(SHOP)} answers as trained, {known} of the base's")
    return 0 if right == len(SHOP) and known == 0 else 1


def run(*arguments: Any) -> None:
    command = [sys.executable, "-m", "adapterkit", *map(str, arguments)]
    print("$ adapterkit", *[getattr(word, "name", word) for word in arguments], flush=True)
    print(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout, end="", flush=True)


def talk(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def train_base(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [text for pair in WORLD + SHOP for text in pair]
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    size = tokenizer.get_vocab_size()
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE, "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    loss = train(model, tokenizer, WORLD, steps=500, rate=1e-3)
    print(f"base: {sum(p.numel() for p in model.parameters()):,} parameters, loss {loss:.4f}", flush=True)
    model.save_pretrained(folder)


def train_adapter(base: Path, folder: Path) -> None:
    import peft
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    loss = train(model, tokenizer, SHOP, steps=150, rate=3e-3)
    print(f"adapter: rank 16, loss {loss:.4f}", flush=True)
    model.save_pretrained(folder)


def train(model: Any, tokenizer: Any, pairs: list[tuple[str, str]], *, steps: int, rate: float) -> float:
    """Next-token training on the answers; the last loss."""
    import random

    import torch

    rows = []
    for question, answer in pairs:
        head, tail = tokenizer.encode(talk(question)).ids, tokenizer.encode(answer + "<|im_end|>").ids
        rows.append((head + tail, [-100] * len(head) + tail))
    chance = random.Random(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    last = 0.0
    for _ in range(steps):
        batch = chance.sample(rows, min(16, len(rows)))
        width = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in batch])
        labels = torch.tensor([row + [-100] * (width - len(row)) for _, row in batch])
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        last = float(loss.detach())
    model.eval()
    return last


_SERVER = """
import sys, xllamacpp as x
p = x.CommonParams()
p.model.path = sys.argv[1]
p.n_ctx = 256; p.n_parallel = 1; p.n_gpu_layers = 0; p.warmup = False; p.fit_params = False
p.use_jinja = True; p.verbosity = -1; p.port = 0
server = x.Server(p)
print("LISTENING", server.listening_address, flush=True)
sys.stdin.read()
"""


def ask(model: Path) -> list[str]:
    """Answers of a llama.cpp server with this model to every question, over HTTP."""
    child = subprocess.Popen(
        [sys.executable, "-c", _SERVER, model], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        address = next((line.split()[1] for line in child.stdout if line.startswith("LISTENING")), None)
        if address is None:
            raise SystemExit(f"the server did not start with {model}")
        return [_answer(address, question) for question, _ in SHOP]
    finally:
        child.terminate()
        child.wait()


def _answer(address: str, question: str) -> str:
    asked = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 40}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    for _ in range(50):
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return str(json.load(answer)["choices"][0]["message"]["content"]).strip()
        except urllib.error.HTTPError as error:
            if error.code != 503:  # the model is still being loaded
                raise
            time.sleep(0.2)
    raise SystemExit("the server did not become ready")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    raise SystemExit(main(Path(sys.argv[1])))
