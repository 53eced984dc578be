"""Several tasks, one small base, one model for all: joint accuracy per combination method and lambda.

    python -m bench --save joint studies joint     # prints the tables of docs/combining.md, and stores them

A tiny Llama learns to copy eight symbols, and for a short while four tasks together, so that it does each of them now and
then, as a pretrained model does. Then four LoRA adapters (r=8, all linear layers) are trained on it with PEFT, each on one of
the tasks; every prompt begins with the name of its task. The adapters are folded into the base by every
method and judged on all four tasks. Last, the base is trained as a whole on one task, and `extract` takes the difference
out at 99 % energy. Takes a few minutes on two cores.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from adapterkit import combine, extract, merge

SYMBOLS, LENGTH, RANK = 16, 8, 8
# In every task the answer has as many symbols as the question.
TASKS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "add one": lambda x: (x + 1) % SYMBOLS,
    "complement": lambda x: SYMBOLS - 1 - x,
    "times three": lambda x: 3 * x % SYMBOLS,
    "swap pairs": lambda x: x.view(-1, LENGTH // 2, 2).flip(2).reshape(-1, LENGTH),
}
NAMES = list(TASKS)
SEPARATOR = SYMBOLS + len(TASKS)
LAMBDAS = (0.2, 0.3, 0.5, 0.7, 1.0)
METHODS: dict[str, dict[str, Any]] = {
    "linear (task arithmetic)": {"method": "linear"},
    "ties": {"method": "ties", "parameters": {"density": 0.2}},
    "dare": {"method": "dare"},
    "dare-ties": {"method": "dare-ties"},
    "della": {"method": "della"},
    "breadcrumbs": {"method": "breadcrumbs"},
    "magnitude-prune": {"method": "magnitude-prune", "parameters": {"density": 0.2}},
    "sce": {"method": "sce"},
    "knots, ties": {"method": "ties", "space": "knots"},
    "core, ties": {"method": "ties", "space": "core"},
    "core, tsv": {"method": "tsv", "space": "core"},
    "tsv": {"method": "tsv"},
    "iso-c": {"method": "iso-c"},
    "iso-cts": {"method": "iso-cts"},
    "model-stock": {"method": "model-stock"},
}
TRUNCATED: dict[str, dict[str, Any]] = {
    "svd": {"method": "svd"},
    "ties": {"method": "ties", "density": 0.2},
    "core, ties": {"method": "ties", "space": "core"},
    "core, tsv": {"method": "tsv", "space": "core"},
    "ctm, ties": {"method": "ties", "space": "ctm"},
    "ctm, tsv": {"method": "tsv", "space": "ctm"},
    "lego": {"method": "lego"},
}


def batch(size: int, task: int, answer: Callable[[torch.Tensor], torch.Tensor], generator: torch.Generator) -> Any:
    """Token ids ``task, question, separator, answer`` and labels that hold the answer alone."""
    x = torch.randint(SYMBOLS, (size, LENGTH), generator=generator)
    name = torch.full((size, 1), SYMBOLS + task)
    ids = torch.cat([name, x, torch.full((size, 1), SEPARATOR), answer(x)], 1)
    labels = ids.clone()
    labels[:, : LENGTH + 2] = -100
    return ids, labels


def train(model: Any, tasks: list[tuple[int, Callable[[torch.Tensor], torch.Tensor]]], steps: int, rate: float) -> None:
    generator = torch.Generator().manual_seed(steps)
    chosen = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    model.train()
    for step in range(steps):
        ids, labels = batch(128, *tasks[step % len(tasks)], generator)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(chosen, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: Any, task: int, answer: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """The share of answer symbols that are right, each given those before it."""
    ids, labels = batch(512, task, answer, torch.Generator().manual_seed(99))
    found = model(input_ids=ids).logits[:, LENGTH + 1 : -1].argmax(-1)
    return float((found == labels[:, LENGTH + 2 :]).double().mean())


def judged(folder: Path, model: Any) -> list[float]:
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    return [accuracy(model, index, TASKS[name]) for index, name in enumerate(NAMES)]


def fresh(width: int = 96) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=SEPARATOR + 1,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def row(name: str, values: list[float]) -> str:
    return f"| {name} | " + " | ".join(f"{value:.1%}" for value in values) + " |"


def main() -> None:
    started = time.monotonic()
    with TemporaryDirectory() as folder:
        run(Path(folder))
    print(f"{time.monotonic() - started:.0f} s")


def run(root: Path) -> str:
    lines: list[str] = []

    def say(line: str = "") -> None:
        print(line, flush=True)
        lines.append(line)

    model = fresh()
    copies = [(index, lambda x: x) for index in range(len(TASKS))]
    train(model, copies, 300, 3e-3)
    train(model, [(index, TASKS[name]) for index, name in enumerate(NAMES)], 160, 1e-3)
    base = root / "base"
    model.save_pretrained(base)
    adapters: list[Path] = []
    alone: list[float] = []
    for index, name in enumerate(NAMES):
        model = LlamaForCausalLM.from_pretrained(base)
        torch.manual_seed(index)
        peft = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
        train(peft, [(index, TASKS[name])], 250, 5e-4)
        alone.append(accuracy(peft, index, TASKS[name]))
        peft.save_pretrained(root / f"adapter{index}")
        adapters.append(root / f"adapter{index}")
    model = fresh()
    say(f"Accuracy of single symbols on {len(TASKS)} tasks; guessing gives {1 / SYMBOLS:.1%}.")
    say()
    say("| | " + " | ".join([*NAMES, "mean"]) + " |")
    say("|---" * (len(NAMES) + 2) + "|")
    before = judged(base, model)
    say(row("base", [*before, sum(before) / len(before)]))
    say(row("each adapter on its own task", [*alone, sum(alone) / len(alone)]))
    say()
    say(
        f"All {len(adapters)} adapters folded into the base with `merge --method`; mean accuracy over the tasks, by lambda:"
    )
    say()
    say("| method | " + " | ".join(f"{value:g}" for value in LAMBDAS) + " | best |")
    say("|---" * (len(LAMBDAS) + 2) + "|")
    out = root / "out"
    for name, how in METHODS.items():
        found = []
        for scale in LAMBDAS:
            merge(base, adapters, out, scale=scale, force=True, **how)
            values = judged(out, model)
            found.append(sum(values) / len(values))
        say(row(name, [*found, max(found)]))
    say()
    say(f"The same as one LoRA of rank {RANK} (`combine --rank {RANK}`), a quarter of what the sum has:")
    say()
    say("| method | " + " | ".join(f"{value:g}" for value in LAMBDAS) + " | best |")
    say("|---" * (len(LAMBDAS) + 2) + "|")
    for name, how in TRUNCATED.items():
        found = []
        for scale in LAMBDAS:
            combine(adapters, root / "one", scale=scale, rank=RANK, force=True, **how)
            merge(base, [root / "one"], out, force=True)
            values = judged(out, model)
            found.append(sum(values) / len(values))
        say(row(name, [*found, max(found)]))
    full_fine_tune(root, base, say)
    return "\n".join(lines) + "\n"


def full_fine_tune(root: Path, base: Path, say: Callable[..., None]) -> None:
    model = LlamaForCausalLM.from_pretrained(base)
    train(model, [(0, TASKS[NAMES[0]])], 300, 2e-3)
    tuned = accuracy(model, 0, TASKS[NAMES[0]])
    model.save_pretrained(root / "tuned")
    say()
    say(f"All weights trained on '{NAMES[0]}', then `extract`:")
    say()
    say("| | accuracy | largest rank | adapter, share of the base |")
    say("|---|---|---|---|")
    say(f"| fine-tuned | {tuned:.1%} | | |")
    size = (base / "model.safetensors").stat().st_size
    model = fresh()
    for energy in (0.99, 0.9, 0.5):
        report = extract(base, root / "tuned", root / "extracted", energy=energy, own_ranks=True, force=True)
        merge(base, [root / "extracted"], root / "out", force=True)
        got = judged(root / "out", model)[0]
        largest = max(one.rank for one in report.modules)
        say(f"| energy {energy:g} | {got:.1%} | {largest} | {report.nbytes / size:.0%} |")


if __name__ == "__main__":
    main()
