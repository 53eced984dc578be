"""Which base to fold a QLoRA adapter onto: {W16, decoded NF4} x {adapter live, merged}, on a model trained for real.

    python -m bench studies bases                # a few minutes on one core; prints the table of docs/quantized.md

A Llama of 0.9e6 weights learns Python from the standard library's own source, in bfloat16 it is the base W16. transformers
and bitsandbytes quantize it to NF4, PEFT trains LoRAs on that (QLoRA) with the prose of this repository's docs: one at a high
learning rate, whose change is large, and one at a low rate, whose change is small. Then every way of using an adapter answers
the same held-out prose, and is compared with what was trained: the adapter live on NF4.

KL is the mean over tokens of KL(as trained || this), in nats; "same" how often both name the same most likely next byte;
"loss" the mean negative log-likelihood of the held-out prose.
"""

from __future__ import annotations

import argparse
import logging
import sysconfig
import tempfile
import warnings
from pathlib import Path

import peft
import torch
import transformers

import adapterkit

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
transformers.utils.logging.disable_progress_bar()
ROOT = Path(__file__).parents[2]
WINDOW, BATCH = 128, 16


def source_code(limit: int = 3_000_000) -> torch.Tensor:
    """Bytes of the standard library."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)[:limit]), dtype=torch.uint8).long()


def prose() -> torch.Tensor:
    """Bytes of this repository's docs, in pieces of one window, shuffled."""
    files = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
    text = bytearray(b"\n".join(path.read_bytes() for path in files))
    found = torch.frombuffer(text, dtype=torch.uint8).long()
    found = found[: found.numel() // WINDOW * WINDOW].view(-1, WINDOW)
    return found[torch.randperm(len(found), generator=torch.Generator().manual_seed(0))]


def train(model: torch.nn.Module, batches: list[torch.Tensor], rate: float) -> float:
    """One step for each batch; gives the mean loss of the last tenth."""
    model.train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=len(batches))
    losses = []
    for batch in batches:
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return sum(losses[-len(losses) // 10 :]) / (len(losses) // 10 or 1)


def answers(model: torch.nn.Module, held: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of every next byte, float64. In training mode, where bitsandbytes computes in float32."""
    model.train()
    with torch.no_grad():
        logits = torch.cat([model(part).logits.float() for part in held.split(BATCH)])
    return logits[:, :-1].double().log_softmax(-1)


def load(folder: Path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def make(folder: Path, steps: int, tuning: int, rates: list[float]) -> torch.Tensor:
    """The base, its NF4 form and an adapter for each rate; gives the held-out prose."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=256, max_position_embeddings=256, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config)
    code = source_code()
    starts = torch.randint(0, len(code) - WINDOW, (steps, BATCH))
    loss = train(base, [torch.stack([code[s : s + WINDOW] for s in row]) for row in starts], 3e-3)
    print(f"base: {sum(p.numel() for p in base.parameters()):,} weights, {steps} steps, loss {loss:.3f}", flush=True)
    base.to(torch.bfloat16).save_pretrained(folder / "base")
    how = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    # Computing in float32, so that what differs is the weights.
    transformers.AutoModelForCausalLM.from_pretrained(
        folder / "base", quantization_config=how, dtype=torch.bfloat16
    ).save_pretrained(folder / "nf4")
    rows = prose()
    held, rows = rows[: len(rows) // 10], rows[len(rows) // 10 :]
    for rate in rates:
        tuned = peft.get_peft_model(
            load(folder / "nf4"), peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", lora_dropout=0.0)
        )
        picks = torch.randint(0, len(rows), (tuning, BATCH))
        loss = train(tuned, [rows[pick] for pick in picks], rate)
        print(f"adapter on NF4: {tuning} steps at {rate:g}, loss {loss:.3f}", flush=True)
        tuned.save_pretrained(folder / f"adapter-{rate:g}")
    return held


def table(folder: Path, held: torch.Tensor, rate: float) -> list[tuple[str, float, float, float]]:
    """Name, KL, share of equal most likely bytes, loss."""
    adapter = folder / f"adapter-{rate:g}"

    def live(base: str) -> torch.Tensor:
        return answers(peft.PeftModel.from_pretrained(load(folder / base), adapter), held)

    def merged(base: str, name: str, **options: object) -> torch.Tensor:
        report = adapterkit.merge(folder / base, [adapter], folder / name, fidelity=True, force=True, **options)
        if report.fidelity is not None and options.get("as_trained"):
            errors = [row.base_error for row in report.fidelity.tensors if row.base_error is not None]
            sizes = [row.relative for row in report.fidelity.tensors]
            print(f"\nadapter at {rate:g}: |delta|/|W| {min(sizes):.1e} to {max(sizes):.1e} over the layers, "
                  f"|W - decode(encode(W))| / |delta| {min(errors):.1f} to {max(errors):.1f}", flush=True)  # fmt: skip
        return answers(load(folder / name), held)

    trained = live("nf4")
    ways = {
        "decoded NF4, adapter live (as trained)": trained,
        "decoded NF4, merged (`--as-trained nf4`)": merged("base", "on-nf4", as_trained="nf4"),
        "W16, adapter live": live("base"),
        "W16, merged": merged("base", "on-w16"),
        "W16, merged, NF4 again (`--quant nf4`)": merged("base", "w16-nf4", quant="nf4"),
        "decoded NF4, merged, NF4 again (`--yes-lossy`)": merged("nf4", "nf4-nf4", quant="nf4", yes_lossy=True),
        "W16, no adapter": answers(load(folder / "base"), held),
    }
    wanted = held[:, 1:, None]
    found = []
    for name, said in ways.items():
        kl = (trained.exp() * (trained - said)).sum(-1).mean().item()
        same = (trained.argmax(-1) == said.argmax(-1)).double().mean().item()
        found.append((name, kl, same, -said.gather(-1, wanted).mean().item()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=400, help="of the base")
    parser.add_argument("--tuning", type=int, default=80, help="steps of each adapter")
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 2e-4], help="learning rates of the adapters")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        held = make(Path(place), options.steps, options.tuning, options.rates)
        for rate in options.rates:
            rows = table(Path(place), held, rate)
            print("\n| base, and how the adapter is used | KL | same | loss |\n|---|---|---|---|")
            for name, kl, same, loss in rows:
                print(f"| {name} | {kl:.1e} | {same:.1%} | {loss:.4f} |", flush=True)


if __name__ == "__main__":
    main()
