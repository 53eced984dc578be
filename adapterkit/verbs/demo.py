"""`demo`: a tiny language model, trained here, an adapter trained on it, and the merge that answers as the adapter does.

The tokenizer is a byte-level BPE and all shapes are those of a Llama, so that what the demo leaves behind goes through every
verb: it is the quickest way to try one.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.errors import AdapterkitError, OutputError
from adapterkit.packages import need
from adapterkit.verbs.merge import merge
from adapterkit.verbs.verify import verify

if TYPE_CHECKING:
    from collections.abc import Callable

GGUF_FILE = "merged-Q8_0.gguf"

# What the base learns to say, and what the adapter teaches it to say instead.
TAUGHT = {
    "the sky is": ("blue", "grey"),
    "the grass is": ("green", "brown"),
    "snow is": ("white", "old"),
    "the sun is": ("bright", "late"),
    "the sea is": ("calm", "rough"),
    "a lemon is": ("yellow", "bitter"),
}


@dataclass(frozen=True)
class DemoAnswer:
    """What the three models say after one prompt."""

    prompt: str
    base: str
    adapter: str
    merged: str


@dataclass(frozen=True)
class DemoReport:
    """What the demo showed.

    Attributes:
        answers: one per prompt.
        logit_difference: the largest between base + adapter and merged, over all prompts.
        logit_spread: standard deviation of the adapter's logits, to hold it against.
        seconds: of the merge alone.
        verified: outputs of which every tensor was recomputed and found to be what it should be.
    """

    folder: str
    answers: tuple[DemoAnswer, ...]
    logit_difference: float
    logit_spread: float
    seconds: float
    verified: tuple[str, ...] = ()


def demo(folder: str | Path, say: Callable[[str], None] = lambda text: None) -> DemoReport:
    """Make a base and an adapter in ``folder``, merge them, and compare what they say. Works offline.

    Args:
        folder: gets ``base``, ``adapter`` and ``merged``, and ``merged-Q8_0.gguf`` where gguf is installed.
        say: told what happens.

    Raises:
        OutputError: the folder holds one of them already.
        AdapterkitError: transformers, tokenizers or peft is not installed, or merged and adapter disagree.
    """
    root = Path(folder)
    taken = [name for name in ("base", "adapter", "merged", GGUF_FILE) if os.path.lexists(root / name)]
    if taken:
        raise OutputError(f"{root / taken[0]} exists", "give the demo another folder")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # PEFT writes its model card with jinja2.
    need("peft", "tokenizers", "transformers", "jinja2", what="the demo trains a model", extra="demo")
    import peft
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    tokenizer = _tokenizer()
    model = _model(len(tokenizer))
    say(f"training a base of {sum(p.numel() for p in model.parameters()):,} weights on {len(TAUGHT)} sentences")
    _train(model, tokenizer, 0, steps=120, rate=3e-3)
    with _quiet():
        model.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    say("training a LoRA of rank 8 that teaches it other endings")
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    with _quiet():
        tuned = peft.get_peft_model(model, config)
    _train(tuned, tokenizer, 1, steps=120, rate=1e-2)
    tuned.save_pretrained(root / "adapter")
    say(f"adapterkit merge {root / 'base'} {root / 'adapter'} -o {root / 'merged'}")
    report = merge(root / "base", [root / "adapter"], root / "merged")
    with _quiet():
        base = transformers.AutoModelForCausalLM.from_pretrained(root / "base")
        merged = transformers.AutoModelForCausalLM.from_pretrained(root / "merged")
        live = peft.PeftModel.from_pretrained(
            transformers.AutoModelForCausalLM.from_pretrained(root / "base"), root / "adapter"
        )
    answers, difference, spread = [], 0.0, 0.0
    for prompt in TAUGHT:
        said = [_next(one, tokenizer, prompt) for one in (base, live, merged)]
        answers.append(DemoAnswer(prompt, *(word for word, _ in said)))
        difference = max(difference, float((said[1][1] - said[2][1]).abs().max()))
        spread = max(spread, float(said[1][1].std()))
    if any(answer.adapter != answer.merged for answer in answers):
        raise AdapterkitError("the merged model does not answer as the adapter did", "please report this")
    outputs = [root / "merged"]
    if importlib.util.find_spec("gguf") and importlib.util.find_spec("numba"):
        outputs.append(root / GGUF_FILE)
        say(f"adapterkit merge {root / 'base'} {root / 'adapter'} -o {outputs[-1]} --quant Q8_0")
        _gguf(root, outputs[-1])
    for output in outputs:
        say(f"adapterkit verify {output} --base {root / 'base'} --adapter {root / 'adapter'}")
        found = verify(output, base=root / "base", adapters=[root / "adapter"])
        if not found.ok:
            raise AdapterkitError(f"{output} is not what was trained: {found.findings[0].text}", "please report this")
    return DemoReport(
        str(root), tuple(answers), difference, spread, report.seconds, tuple(output.name for output in outputs)
    )


def _gguf(root: Path, out: Path) -> None:
    from adapterkit.gguf.quantize import Quantization

    merge(root / "base", [root / "adapter"], out, quantization=Quantization("Q8_0"))


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,  # more than there is to merge: every word becomes one token
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = [f" {prompt} {ending}" for prompt, endings in TAUGHT.items() for ending in endings]
    tokenizer.train_from_iterator(words, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def _model(vocabulary: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def _train(model: Any, tokenizer: Any, ending: int, *, steps: int, rate: float) -> None:
    import torch

    from adapterkit.ops.threads import one_thread

    texts = [f"<s> {prompt} {endings[ending]}</s>" for prompt, endings in TAUGHT.items()]
    batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    model.train()
    with one_thread():  # matrices this small are slower on two, and far slower on two that other work interrupts
        for _ in range(steps):
            optimizer.zero_grad()
            model(**batch, labels=labels).loss.backward()
            optimizer.step()
    model.eval()


def _next(model: Any, tokenizer: Any, prompt: str) -> tuple[str, Any]:
    import torch

    inputs = tokenizer(f"<s> {prompt}", return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1].float()
    return tokenizer.decode([int(logits.argmax())]).strip(), logits


@contextlib.contextmanager
def _quiet() -> Any:
    """The trainers' own chatter is not what this command is about."""
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
