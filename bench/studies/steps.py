"""From training to a 4-bit file, step by step: what happens to a task that was really learned.

    python -m bench studies steps             # trains a small Llama here (some minutes), prints the table of docs/verify.md
    python -m bench studies steps --html DIR       # and writes verify's page of every step

The base learns to repeat four letters ("dbac>dbac"), the adapter, a LoRA on all linear layers of the base in bfloat16, to
sort them ("dbac>abcd"). Accuracy is the share of held-out strings whose four letters are all the likeliest next tokens:
of transformers and PEFT for base, adapter and merged folder, of llama.cpp for GGUF files. KL and agreement are what
`verify --level model` measures on held-out strings.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

LETTERS, LENGTH = "abcdefgh", 4
BATCH, HELD_OUT = 64, 100
QUANTS = ("Q8_0", "Q4_K_M", "Q2_K")


def tokenizer() -> Any:
    """Bytes, as GPT-2's tokenizer has them, without merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=259,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([LETTERS], trainer)
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def model(vocabulary: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def strings(count: int, seed: int) -> list[str]:
    """Random strings. Those of seed -1 are held out: the numbers of their letters add up to a multiple of four."""
    draw = random.Random(seed)
    found: list[str] = []
    while len(found) < count:
        text = "".join(draw.choice(LETTERS) for _ in range(LENGTH))
        if (sum(map(LETTERS.index, text)) % 4 == 0) is (seed == -1):
            found.append(text)
    return found


def task(text: str, learned: bool) -> str:
    return f"{text}>{''.join(sorted(text)) if learned else text}"


def ids(made: Any, text: str) -> list[int]:
    return [1, *made(text)["input_ids"]]


def train(trained: Any, made: Any, learned: bool, steps: int, rate: float) -> None:
    """Cross-entropy on what comes after the ``>``."""
    import torch

    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    trained.train()
    for step in range(steps):
        batch = torch.tensor([ids(made, task(text, learned)) for text in strings(BATCH, step)])
        labels = batch.clone()
        labels[:, : LENGTH + 2] = -100
        optimizer.zero_grad()
        loss = trained(input_ids=batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"  step {step}: loss {loss.item():.4f}", file=sys.stderr, flush=True)
    trained.eval()


def accuracy(answering: Any, made: Any, learned: bool) -> float:
    right = 0
    for text in strings(HELD_OUT, -1):
        tokens = ids(made, task(text, learned))
        positions = range(LENGTH + 1, 2 * LENGTH + 1)
        found = answering.logprobs(tokens, list(positions))
        right += all(int(found[row].argmax()) == tokens[at + 1] for row, at in enumerate(positions))
    answering.close()
    return right / HELD_OUT


def main() -> int:
    import peft
    import torch
    import transformers

    import adapterkit
    from adapterkit.gguf.quantize import Quantization
    from adapterkit.verbs.verify import html, verify
    from adapterkit.verbs.verify.answers import InTransformers
    from adapterkit.verbs.verify.runtime import InLlamaCpp, find_runtime

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=500, help="of training, each")
    parser.add_argument("--jobs", type=int, help="threads; 1 where other work is on the machine")
    parser.add_argument("--html", type=Path, metavar="DIR")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="train there, or go on with what was trained there")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    runtime = find_runtime()
    assert runtime is not None, "install xllamacpp"
    with tempfile.TemporaryDirectory() as name:
        root = options.keep or Path(name)
        made = tokenizer()
        base, adapter = root / "base", root / "adapter"
        started = time.monotonic()
        if not adapter.exists():
            plain = model(len(made))
            print(f"training a base of {sum(p.numel() for p in plain.parameters()):,} weights", file=sys.stderr)
            train(plain, made, False, options.steps, 2e-3)
            plain.to(torch.bfloat16).save_pretrained(base)
            made.save_pretrained(base)
            print("training the adapter", file=sys.stderr)
            loaded = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
            tuned = peft.get_peft_model(loaded, config)
            train(tuned, made, True, options.steps, 4e-3)
            tuned.save_pretrained(adapter)
            print(f"trained in {time.monotonic() - started:.0f} s", file=sys.stderr)
        prompts = root / "prompts.jsonl"
        lines = [json.dumps({"ids": ids(made, task(text, True))}) for text in strings(12, -1)]
        prompts.write_text("\n".join(lines))
        adapterkit.merge(base, [adapter], root / "merged", force=True)
        outputs = {"merged, bf16": root / "merged"}
        for quant in QUANTS:
            out = root / f"merged-{quant}.gguf"
            adapterkit.merge(base, [adapter], out, quantization=Quantization(quant), force=True)
            outputs[f"merged, {quant}"] = out
        rows = [
            ("base", accuracy(InTransformers(base, "base"), made, True), None),
            ("base + adapter (PEFT)", accuracy(InTransformers(base, "PEFT", adapter), made, True), None),
        ]
        for name, out in outputs.items():
            report = verify(out, base=base, adapters=[adapter], level="model", prompts=prompts, jobs=options.jobs)
            assert report.ok, report.errors
            if options.html is not None:
                (options.html / f"{out.stem}.html").write_text(html(report), encoding="utf-8")
            answering = (
                InLlamaCpp(out, runtime, 64, len(made), options.jobs) if out.suffix else InTransformers(out, name)
            )
            rows.append((name, accuracy(answering, made, True), report))
        print(
            "| step | sorts right | of the change | cosine | error of outputs | top-1 | mean KL | max KL | perplexity |"
        )
        print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
        first = rows[2][2]
        assert first is not None
        level = first.model
        told = {"base": (level.base, level.perplexity["base"])}
        for name, right, report in rows:
            cells = ["", "", ""]
            if report is not None:
                tensors = report.tensors
                cells = [f"{tensors.retention:.1%}", f"{tensors.cosine:.4f}", f"{report.layers.error:.1e}"]
                distance, perplexity = report.model.merged, report.model.perplexity["merged"]
            elif name in told:
                distance, perplexity = told[name]
            else:
                distance, perplexity = None, level.perplexity["trained"]
            apart = ["", "", ""]
            if distance is not None:
                apart = [f"{distance.top1:.1%}", f"{distance.mean_kl:.1e}", f"{distance.max_kl:.1e}"]
            print("| " + " | ".join([name, f"{right:.1%}", *cells, *apart, f"{perplexity:.3f}"]) + " |")
        print(f"\n{HELD_OUT} held-out strings; {level.tokens} scored tokens; {time.monotonic() - started:.0f} s in all")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
