"""`demo`: a tiny language model, trained here, an adapter trained on it, and the merge that answers as the adapter does."""

from __future__ import annotations

import contextlib
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.errors import AdapterkitError, OutputError
from adapterkit.merge import merge

if TYPE_CHECKING:
    from collections.abc import Callable

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
    """

    folder: str
    answers: tuple[DemoAnswer, ...]
    logit_difference: float
    logit_spread: float
    seconds: float


def demo(folder: str | Path, say: Callable[[str], None] = lambda text: None) -> DemoReport:
    """Make a base and an adapter in ``folder``, merge them, and compare what they say. Works offline.

    Args:
        folder: gets ``base``, ``adapter`` and ``merged``.
        say: told what happens.

    Raises:
        OutputError: the folder holds one of them already.
        AdapterkitError: transformers, tokenizers or peft is not installed, or merged and adapter disagree.
    """
    root = Path(folder)
    taken = [name for name in ("base", "adapter", "merged") if (root / name).exists()]
    if taken:
        raise OutputError(f"{root / taken[0]} exists", "give the demo another folder")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        import peft
        import torch
        import transformers
    except ImportError as error:
        raise AdapterkitError(
            f"the demo trains with {error.name}, which is not installed", "pip install 'adapterkit[demo]'"
        ) from None
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
    return DemoReport(str(root), tuple(answers), difference, spread, report.seconds)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for prompt, endings in TAUGHT.items() for word in (*prompt.split(), *endings)})
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
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

    texts = [f"<s> {prompt} {endings[ending]} </s>" for prompt, endings in TAUGHT.items()]
    batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    model.train()
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
    return tokenizer.decode([int(logits.argmax())]), logits


@contextlib.contextmanager
def _quiet() -> Any:
    """The trainers' own chatter is not what this command is about."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
