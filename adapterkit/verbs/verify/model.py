"""The level of the model: base, base with adapters, and MERGED read the same tokens, and their answers are compared.

One model is loaded at a time; the answers of base + adapters wait in a temporary folder, so that memory is that of one
model. Everything is computed in float32, so what differs is the weights.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.experts import SLOWEST, stated_order
from adapterkit.checkpoint.decoded import dequantized
from adapterkit.errors import UsageError, option
from adapterkit.ops.device import CPU
from adapterkit.verbs.verify.answers import Answering, InTransformers, Tokenizer, check_known, need_transformers
from adapterkit.verbs.verify.inputs import place
from adapterkit.verbs.verify.prompts import MOST_TOKENS, Prompt, read_prompts
from adapterkit.verbs.verify.report import Distance, ModelLevel, Parting, PromptCheck
from adapterkit.verbs.verify.runtime import InLlamaCpp, find_runtime

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.verbs.verify.subject import Subject

    Floats = npt.NDArray[np.float32]

FEW, FEWER, LARGE_VOCABULARY = 16, 4, 1 << 16  # positions of a prompt in llama.cpp, which gives one answer a question
PARTINGS = 8  # that are told of each prompt
BEFORE = 8  # tokens shown before a parting
FLOOR = -100.0  # log-probability of what a runtime does not list


@dataclass(frozen=True)
class Text:
    """A prompt as tokens, and the positions whose next token is asked for."""

    prompt: Prompt
    ids: tuple[int, ...]
    positions: tuple[int, ...]
    truncated: bool


@dataclass(frozen=True)
class Models:
    """How the three models are had, each when its turn comes."""

    trained: Callable[[], Answering]
    base: Callable[[], Answering]
    merged: Callable[[], Answering]
    how_trained: str
    few: bool


def check_models(merged: Checkpoint, base: Checkpoint, prompts: Path | None) -> None:
    """What can be said before anything is computed.

    Raises:
        NotFound, UsageError: prompts that cannot be used, or models that cannot answer.
    """
    read_prompts(prompts)
    need_transformers()
    for one in (merged, base):
        if one.format != "gguf":
            check_known(one.config, one.ref)
            _check_memory(one)


def _check_memory(checkpoint: Checkpoint) -> None:
    needed = 4 * checkpoint.parameters
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return
    if needed > 0.9 * free:
        raise UsageError(
            f"{checkpoint.ref} in float32 takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free",
            f"use {option('level', 'layers')}, which holds one block at a time",
        )


def compare_models(subject: Subject, base: Checkpoint, prompts: Path | None, *, jobs: int | None = None) -> ModelLevel:
    """Let the models answer.

    Args:
        subject: what is compared at the level of tensors.
        base: the base as it is stored.
        prompts: a file; the built-in set when None.
        jobs: threads of llama.cpp.

    Raises:
        UsageError, AdapterkitError, NotFound
    """
    import numpy as np

    started = time.monotonic()
    read = read_prompts(prompts)
    with tempfile.TemporaryDirectory(prefix="adapterkit-verify-") as name:
        scratch = Path(name)
        tokenizer = _tokenizer(subject.found, base, scratch)
        models = _models(subject, base, scratch, jobs)
        trained = models.trained()
        try:
            texts = list(_texts(read, tokenizer, trained, models.few))
            for number, text in enumerate(texts):
                np.save(scratch / f"{number}.npy", trained.logprobs(text.ids, text.positions))
        finally:
            trained.close()
        answers: dict[str, list[_Answer]] = {}
        names = {}
        for role, make in (("base", models.base), ("merged", models.merged)):
            model = make()
            try:
                names[role] = model.name
                answers[role] = [_answer(model, text, scratch / f"{n}.npy") for n, text in enumerate(texts)]
            finally:
                model.close()
        own = [_nll(np.load(scratch / f"{number}.npy"), text) for number, text in enumerate(texts)]
    checks = tuple(
        _check(text, merged, plain, tokenizer)
        for text, merged, plain in zip(texts, answers["merged"], answers["base"], strict=True)
    )
    perplexity = {
        "base": _perplexity([a.nll for a in answers["base"]]),
        "trained": _perplexity(own),
        "merged": _perplexity([a.nll for a in answers["merged"]]),
    }
    return ModelLevel(
        names["merged"],
        models.how_trained,
        checks,
        sum(len(text.positions) for text in texts),
        _distance(answers["merged"]),
        _distance(answers["base"]),
        perplexity,
        time.monotonic() - started,
    )


# ------------------------------------------------------------------ the models


def _models(subject: Subject, base: Checkpoint, scratch: Path, jobs: int | None) -> Models:
    found, device = subject.found, str(subject.options.get("device", CPU))
    if found.format != "gguf":
        return Models(*_folder_base(subject, base, scratch), few=False)
    runtime = find_runtime()
    file = place(found)
    assert file is not None
    merged = _gguf(file, runtime, found, jobs, device)
    if base.format != "gguf":
        trained, plain, _, how = _folder_base(subject, base, scratch)
        return Models(trained, plain, merged, how, few=runtime is not None)
    before = place(base)
    assert before is not None

    def folded() -> Answering:
        from adapterkit.gguf.quantize import Quantization
        from adapterkit.verbs.merge import merge

        out = scratch / "trained.gguf"
        how = {k: v for k, v in subject.options.items() if k in ("residual_base", "allow_unknown", "device", *_RULE)}
        merge(base, subject.adapters, out, weights=subject.weights, quantization=Quantization("F32"), **how)
        return _gguf(out, runtime, found, jobs, device)()

    return Models(
        folded, _gguf(before, runtime, base, jobs, device), merged, "folded in float32", few=runtime is not None
    )


_RULE = ("method", "scale", "space", "parameters")


def _gguf(
    file: Path, runtime: str | None, checkpoint: Checkpoint, jobs: int | None, device: str
) -> Callable[[], Answering]:
    vocabulary = checkpoint["token_embd.weight"].shape[0]
    if runtime is not None:
        return lambda: InLlamaCpp(file, runtime, MOST_TOKENS + 8, vocabulary, jobs)
    return lambda: InTransformers(file.parent, "transformers, decoded", gguf=file.name, device=device)


def _folder_base(
    subject: Subject, base: Checkpoint, scratch: Path
) -> tuple[Callable[[], Answering], Callable[[], Answering], Callable[[], Answering], str]:
    """Base + adapters, the base, MERGED, and in what way the first was made."""
    plain = _folder(base, scratch / "base")
    merged = _folder(subject.found, scratch / "merged")
    live, device = _live(subject), str(subject.options.get("device", CPU))
    word = "transformers" if subject.kind is None else "transformers, decoded"

    def trained() -> Answering:
        if live is not None:
            return InTransformers(plain(), "PEFT", live, device=device)
        from adapterkit.verbs.merge import merge

        how = {k: v for k, v in subject.options.items() if k not in _LAYOUT}
        merge(base, subject.adapters, scratch / "trained", dtype="f32", **how)
        return InTransformers(scratch / "trained", "folded in float32", device=device)

    return (
        trained,
        lambda: InTransformers(plain(), "transformers", device=device),
        lambda: InTransformers(merged(), word, device=device),
        "PEFT" if live is not None else "folded in float32",
    )


_LAYOUT = ("to", "dtype", "max_shard_size", "quant", "quant_double", "keep_touched", "quantization", "pre")


def _folder(checkpoint: Checkpoint, scratch: Path) -> Callable[[], Path]:
    """The folder of a model with floating weights; a quantized one is decoded first."""

    def folder() -> Path:
        from adapterkit.checkpoint.save import save

        where = place(checkpoint)
        view = dequantized(checkpoint)
        if view is checkpoint and where is not None and (where / "config.json").is_file():
            return where
        if not scratch.exists():
            save(view, scratch)
        return scratch

    return folder


def _live(subject: Subject) -> Path | None:
    """The adapter's folder, where PEFT can run it beside the base as it is: one adapter, as strongly as it was trained."""
    from importlib.util import find_spec

    if find_spec("peft") is None or len(subject.adapters) != 1 or subject.weights != (1.0,):
        return None
    if subject.values != "as stored" or any(subject.options.get(key) for key in ("residual_base", "parameters")):
        return None
    if (subject.options.get("method"), subject.options.get("scale")) != ("linear", 1.0):
        return None
    if stated_order(subject.adapters[0].config) == SLOWEST:
        return None  # PEFT would read its experts in another order than they were trained in
    path = subject.adapters[0].source.path
    folder = path.parent if path is not None else None
    if folder is None or path is None or path.name != "adapter_model.safetensors":
        return None
    return folder if (folder / "adapter_config.json").is_file() else None


def _tokenizer(merged: Checkpoint, base: Checkpoint, scratch: Path) -> Tokenizer:
    folders: list[Path] = []
    for one in (merged, base):
        where = place(one)
        if one.format != "gguf" and where is not None:
            folders.append(where)
    headers = [one for one in (merged, base) if one.format == "gguf"]
    if headers and not any((folder / "tokenizer_config.json").exists() for folder in folders):
        folders.append(_from_gguf(headers[0], scratch / "tokenizer"))
    return Tokenizer(folders)


def _from_gguf(checkpoint: Checkpoint, folder: Path) -> Path:
    """The tokenizer that a GGUF file holds, as files; an empty folder where it cannot be told."""
    from adapterkit.errors import AdapterkitError
    from adapterkit.gguf.checkpoint import GGUFCheckpoint
    from adapterkit.gguf.vocab.inverse import tokenizer_files

    folder.mkdir()
    assert isinstance(checkpoint, GGUFCheckpoint)
    try:
        for name, data in tokenizer_files(checkpoint.header).items():
            (folder / name).write_bytes(data)
    except AdapterkitError:
        return folder  # asked for tokens, `Tokenizer` says that there is none
    return folder


# ------------------------------------------------------------------ their answers


def _texts(prompts: Sequence[Prompt], tokenizer: Tokenizer, model: Answering, few: bool) -> Iterator[Text]:
    """Prompts as tokens, cut to what is scored.

    Raises:
        UsageError: none has two tokens, or a token is not in the vocabulary.
    """
    context = getattr(model, "context", 0) or MOST_TOKENS
    vocabulary = getattr(model, "vocabulary", 0)
    most = min(context, MOST_TOKENS)
    found = 0
    for prompt in prompts:
        ids = list(prompt.ids) or tokenizer.ids(prompt.text, prompt.messages)
        if vocabulary and max(ids, default=0) >= vocabulary:
            raise UsageError(f"a prompt holds token {max(ids)}, and there are {vocabulary}", "use the base's tokenizer")
        cut = ids[:most]
        if len(cut) < 2:
            continue
        found += 1
        yield Text(prompt, tuple(cut), _positions(len(cut) - 1, few, vocabulary), len(cut) < len(ids))
    if not found:
        raise UsageError("no prompt has two tokens, so there is nothing to compare", "write longer prompts")


def _positions(count: int, few: bool, vocabulary: int) -> tuple[int, ...]:
    most = (FEWER if vocabulary > LARGE_VOCABULARY else FEW) if few else count
    if count <= most:
        return tuple(range(count))
    return tuple(sorted({round((i + 1) * count / most) - 1 for i in range(most)}))


@dataclass(frozen=True)
class _Answer:
    """One model on one prompt: divergence, agreement and surprise at every position, and both choices."""

    kl: tuple[float, ...]
    same: tuple[bool, ...]
    nll: tuple[float, ...]
    trained: tuple[int, ...]
    chosen: tuple[int, ...]


def _answer(model: Answering, text: Text, trained: Path) -> _Answer:
    import numpy as np

    right = np.load(trained)
    found = model.logprobs(text.ids, text.positions)
    both = min(right.shape[1], found.shape[1])  # vocabularies may be padded
    p, q = _normal(right[:, :both]), _normal(found[:, :both])
    kl = (np.exp(p) * (p - q)).sum(-1).clip(min=0)
    one, other = p.argmax(-1), q.argmax(-1)
    return _Answer(
        tuple(map(float, kl)),
        tuple(map(bool, one == other)),
        _nll(found, text),
        tuple(map(int, one)),
        tuple(map(int, other)),
    )


def _normal(logprobs: Any) -> Any:
    """Float64 log-probabilities that sum to one."""
    import numpy as np

    wide = np.maximum(logprobs.astype(np.float64), FLOOR)
    top = wide.max(-1, keepdims=True)
    return wide - top - np.log(np.exp(wide - top).sum(-1, keepdims=True))


def _nll(logprobs: Any, text: Text) -> tuple[float, ...]:
    """Minus the log-probability of the token that follows, at every position."""
    return tuple(-max(FLOOR, float(logprobs[row, text.ids[at + 1]])) for row, at in enumerate(text.positions))


def _perplexity(values: Sequence[Sequence[float]]) -> float:
    every = [value for some in values for value in some]
    return exp(min(700.0, sum(every) / len(every)))


def _distance(answers: Sequence[_Answer]) -> Distance:
    kl = [value for one in answers for value in one.kl]
    same = [value for one in answers for value in one.same]
    return Distance(sum(same) / len(same), sum(kl) / len(kl), max(kl))


def _check(text: Text, merged: _Answer, base: _Answer, tokenizer: Tokenizer) -> PromptCheck:
    apart = [i for i, same in enumerate(merged.same) if not same]
    apart.sort(key=lambda i: -merged.kl[i])
    partings = tuple(_parting(text, merged, i, tokenizer) for i in apart[:PARTINGS])
    return PromptCheck(
        text.prompt.start,
        len(text.positions),
        _distance([merged]),
        _distance([base]),
        partings,
        text.positions,
        merged.kl,
        text.truncated,
    )


def _parting(text: Text, merged: _Answer, row: int, tokenizer: Tokenizer) -> Parting:
    at = text.positions[row]
    before = tokenizer.text(text.ids[max(0, at + 1 - BEFORE) : at + 1])
    trained, there = (tokenizer.text([chosen[row]]) for chosen in (merged.trained, merged.chosen))
    return Parting(at, before, trained, there, merged.kl[row])
