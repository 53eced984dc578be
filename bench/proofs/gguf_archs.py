"""Every architecture of the table in llama.cpp itself: ``python -m bench proofs gguf_archs [--jobs 8] [--write] [KIND ...]``.

The rows of the kinds that ran take their places in ``bench/proofs/gguf_archs.json``; without a KIND all run, and ``none`` runs
nothing. ``--write`` makes the page out of what is stored.

For each a tiny random model is made with transformers. `convert` writes its GGUF in float32, `merge` writes base + LoRA as
GGUF in one pass, onto that GGUF, and as a LoRA file beside it; llama.cpp (the xllamacpp wheel, each server in a process of
its own) says the log-probabilities of the next token, transformers and PEFT say theirs. Then GGUF -> Hugging Face -> GGUF,
and, where it reads the architecture, transformers' own reader on our file. ``--write`` writes ``docs/gguf-architectures.md``.

The vocabulary is one of single bytes; tokenizers have their own tests.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.common import results

ROOT = Path(__file__).resolve().parents[2]
DOC = ROOT / "docs" / "gguf-architectures.md"
STORED = Path(__file__).with_suffix(".json")
CLASSES = Path(__file__).with_name("converter_classes.json")
# Why a class of llama.cpp's converter has no row here.
_DRAFT = "a draft for speculative decoding, which is no model by itself"
_NOT_TEXT = "it has no language model"
WHY_NOT = {
    **dict.fromkeys(
        (
            *("DFlash2DraftModel", "DFlashDraftModel", "DSparkDraftModel", "DSparkSpeculator", "DeepseekV4DSparkModel"),
            *("Eagle3DraftModel", "Eagle3LlamaForCausalLM", "Eagle3Speculator", "Gemma4AssistantForCausalLM"),
            *("Gemma4DSparkModel", "Gemma4UnifiedAssistantForCausalLM", "Lfm2DSparkDraftModel", "LingDSparkModel"),
            *("LlamaForCausalLMEagle3", "MuseGlimmerAssistantModel", "Qwen3DSparkModel"),
        ),
        _DRAFT,
    ),
    **dict.fromkeys(
        (
            "Lfm25AudioTokenizer",
            "PocketTTSModel",
            "Qwen3TTSForConditionalGeneration",
            "UltravoxModel",
            "WavTokenizerDec",
        ),
        _NOT_TEXT,
    ),
    "DistilBertForSequenceClassification": "llama.cpp has tanh in the head where the model has ReLU, so it is refused",
}


def sweep(kind: str) -> dict[str, Any]:
    """The figures of one kind: largest differences, or the sentence that refuses."""
    import arch_zoo as zoo
    import transformers

    import adapterkit.gguf.vocab

    adapterkit.gguf.vocab.read_vocab = zoo.read_vocab
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    found: dict[str, Any] = {"kind": kind}
    with tempfile.TemporaryDirectory(prefix="gguf-archs-") as folder:
        try:
            if kind in zoo.DISGUISES:
                _disguise(kind, Path(folder), found)
            elif kind in zoo.ENCODERS:
                _encoder(kind, Path(folder), found)
            elif kind in _coded():
                _formula(kind, Path(folder), found)
            else:
                _model(kind, Path(folder), found)
        except Exception as err:  # one row of a table must not lose the others
            found["error"] = f"{type(err).__name__}: {err}"[-400:]
    return found


def _model(kind: str, at: Path, found: dict[str, Any]) -> None:
    import arch_zoo as zoo
    from gguf_runtime import logprobs, of_model
    from models import load_model, make_adapter
    from peft import PeftModel

    import adapterkit
    from adapterkit.errors import AdapterkitError
    from adapterkit.verbs.convert import convert

    tiny, hf, base = zoo.ZOO[kind], at / "hf", at / "base.gguf"
    plain = of_model(zoo.build(hf, kind))
    found |= {"class": tiny.cls, "tolerance": tiny.tolerance, "why": tiny.why}
    convert(hf, base)
    found["arch"] = _arch(base)
    found["plain"] = _far(logprobs(base)[0], plain)

    adapter = make_adapter(at / "adapter", hf, _lora(tiny), scale=0.1)
    live = PeftModel.from_pretrained(load_model(hf), adapter).float().eval()
    if tiny.patch:
        tiny.patch(live)
    expected = of_model(live)
    found["effect"] = _far(expected, plain)
    adapterkit.merge(hf, [adapter], at / "merged.gguf")
    found["merged"] = _far(logprobs(at / "merged.gguf")[0], expected)
    try:
        adapterkit.merge(base, [adapter], at / "onto.gguf")
        found["onto"] = _far(logprobs(at / "onto.gguf")[0], expected)
    except AdapterkitError as err:
        found["onto"] = str(err).replace(f"{at}/", "")
    try:
        convert(adapter, at / "lora.gguf", to="gguf-lora", base=hf)
        found["lora"] = _far(logprobs(base, lora=at / "lora.gguf")[0], expected)
    except AdapterkitError as err:
        found["lora"] = str(err).replace(f"{at}/", "")

    convert(base, at / "back", to="hf")
    convert(at / "back", at / "again.gguf")
    found["same"] = (at / "again.gguf").read_bytes() == base.read_bytes()
    if tiny.alone:
        again = load_model(at / "back").float().eval()
        if tiny.patch:
            tiny.patch(again)
        found["back"] = _far(of_model(again), plain)
    if tiny.reads is not None:
        found["reads"] = _read(at / "read", kind)


def _read(at: Path, kind: str) -> Any:
    import arch_zoo as zoo
    import torch
    import transformers
    from gguf_runtime import of_model

    from adapterkit.verbs.convert import convert

    tiny = zoo.ZOO[kind]
    zoo.ZOO["read"] = replace(tiny, config={**tiny.config, **tiny.reads})
    plain = of_model(zoo.build(at / "hf", "read"))
    convert(at / "hf", at / "base.gguf")
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            at, gguf_file="base.gguf", dtype=torch.float32, attn_implementation="eager"
        )
        return _far(of_model(model.eval()), plain)
    except Exception as err:  # transformers' own reader, whatever it raises
        return f"transformers' reader: {type(err).__name__}: {err}"[:200]


def _encoder(kind: str, at: Path, found: dict[str, Any]) -> None:
    import arch_zoo as zoo
    from gguf_runtime import embeddings, embeddings_of
    from models import load_model, make_adapter
    from peft import PeftModel

    import adapterkit
    from adapterkit.verbs.convert import convert

    tiny, hf, base = zoo.ENCODERS[kind], at / "hf", at / "base.gguf"
    plain = embeddings_of(zoo.build(hf, kind))
    found |= {"class": tiny.cls, "tolerance": tiny.tolerance, "why": tiny.why, "encoder": True}
    convert(hf, base)
    found["arch"] = _arch(base)
    found["plain"] = _far(embeddings(base), plain)
    adapter = make_adapter(at / "adapter", hf, _lora(tiny), scale=0.1)
    expected = embeddings_of(PeftModel.from_pretrained(load_model(hf), adapter).float().eval())
    adapterkit.merge(hf, [adapter], at / "merged.gguf")
    found["effect"] = _far(expected, plain)
    found["merged"] = _far(embeddings(at / "merged.gguf"), expected)
    convert(base, at / "back", to="hf")
    convert(at / "back", at / "again.gguf")
    found["same"] = (at / "again.gguf").read_bytes() == base.read_bytes()
    found["back"] = _far(embeddings_of(load_model(at / "back").float().eval()), plain)


def _disguise(kind: str, at: Path, found: dict[str, Any]) -> None:
    import arch_zoo as zoo
    from gguf_runtime import logprobs, of_model

    from adapterkit.verbs.convert import convert

    plain = of_model(zoo.disguise(kind, at / "hf"))
    said = json.loads((at / "hf" / "config.json").read_text())
    found |= {"class": said["architectures"][0], "tolerance": 1e-5, "why": "", "own": zoo.DISGUISES[kind][0]}
    convert(at / "hf", at / "base.gguf")
    found["arch"] = _arch(at / "base.gguf")
    found["plain"] = _far(logprobs(at / "base.gguf")[0], plain)


def _coded() -> dict[str, Any]:
    """Models whose class is code in their own repository: tensors by hand, and their formula in float64."""
    import coded_zoo
    from coded_zoo_encoders import ENCODERS
    from coded_zoo_moe import MOE
    from coded_zoo_more import MORE

    return {f"{kind}*": one for kind, one in {**coded_zoo.DENSE, **MOE, **ENCODERS, **MORE}.items()}


def _formula(kind: str, at: Path, found: dict[str, Any]) -> None:
    import coded_zoo
    from gguf_runtime import PROMPTS, embeddings, logprobs

    from adapterkit.verbs.convert import convert

    one = _coded()[kind]
    weights = coded_zoo.build(at / "hf", one)
    found |= {"class": one.config["architectures"][0], "tolerance": one.tolerance, "why": "", "own": "formula"}
    found["kind"] = kind.removesuffix("*")
    convert(at / "hf", at / "base.gguf")
    found["arch"] = _arch(at / "base.gguf")
    if not one.causal:
        found["plain"] = _far(embeddings(at / "base.gguf"), coded_zoo.embeddings_of(one, weights, PROMPTS))
    else:
        size = one.config.get("vocab_size", coded_zoo.VOCAB)
        said = logprobs(at / "base.gguf", vocab=size, ubatch=one.ubatch)[0]
        wanted = None if one.run is None else coded_zoo.logprobs_of(one, weights, PROMPTS)
        found["plain"] = "llama.cpp loads and runs it" if wanted is None else _far(said, wanted)
    convert(at / "base.gguf", at / "back", to="hf")
    convert(at / "back", at / "again.gguf")
    found["same"] = (at / "again.gguf").read_bytes() == (at / "base.gguf").read_bytes()


def _arch(file: Path) -> str:
    from adapterkit.bases import open_model

    return str(open_model(file).header["general.architecture"])


def _lora(tiny: Any) -> Any:
    from peft import LoraConfig

    extra = {"target_parameters": list(tiny.parameters)} if tiny.parameters else {}
    return LoraConfig(r=4, lora_alpha=8, target_modules=tiny.lora, **extra)


def _far(one: Any, other: Any) -> float:
    return float(abs(one - other).max())


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, with what is not exact or refused below."""
    notes: list[str] = []
    lines = [
        "| model | class | GGUF | plain | merged | onto the GGUF | LoRA file | and back | transformers reads |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["kind"], row.get("class", ""), row.get("arch", "")]
        for key in ("plain", "merged", "onto", "lora"):
            cells.append(_cell(row.get(key), row, notes))
        same = {True: "same bytes", False: "other bytes", None: ""}[row.get("same")]
        cells += [same, _cell(row.get("reads"), row, notes)]
        if row.get("error"):
            cells[3] = _cell(row["error"], row, notes)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"{n}. {note}" for n, note in enumerate(notes, 1))])


def _cell(value: Any, row: dict[str, Any], notes: list[str]) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.1e}"
    note = str(value).replace("|", "\\|").replace("\n", " ")
    if note not in notes:
        notes.append(note)
    return f"({notes.index(note) + 1})"


def main() -> None:
    """Run the sweep."""
    import arch_zoo as zoo

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*")
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    every = [*zoo.ZOO, *zoo.ENCODERS, *zoo.DISGUISES, *_coded()]
    kinds = [] if options.kinds == ["none"] else options.kinds or every
    stored = json.loads(STORED.read_text())["rows"] if STORED.is_file() else {}
    rows = []
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for row in pool.map(sweep, kinds):
            rows.append(row)
            print(json.dumps(row), flush=True)
            stored[row["kind"]] = {**row, "versions": _versions()}
            ordered = {name: stored[name] for name in (one.removesuffix("*") for one in every) if name in stored}
            STORED.write_text(json.dumps({"rows": ordered}, indent=1) + "\n")
    if options.write:
        shown = list(json.loads(STORED.read_text())["rows"].values())
        DOC.write_text(PAGE.format(table=table(shown), classes=_classes(shown), **_summary(shown)))
    results.note(kinds=len(rows), wrong=sum(not _passed(row) for row in rows))
    sys.exit(1 if any(not _passed(row) for row in rows) else 0)


def _passed(row: dict[str, Any]) -> bool:
    figures = [row.get(key) for key in ("plain", "merged", "onto", "lora", "reads")]
    return "error" not in row and all(v < row["tolerance"] for v in figures if isinstance(v, float))


def _versions() -> str:
    return ", ".join(f"{name} {version(name)}" for name in ("transformers", "peft", "torch", "xllamacpp"))


def _measured(rows: list[dict[str, Any]]) -> str:
    """With which versions how many rows were measured."""
    counts = Counter(row["versions"] for row in rows).most_common()
    return "\n".join(f"* {count} with {versions}" for versions, count in counts)


def _classes(rows: list[dict[str, Any]]) -> str:
    """The classes of llama.cpp's converter: which convert here, which of them ran, and why the others do not."""
    from adapterkit.gguf.arch.table import classes

    named, here = json.loads(CLASSES.read_text())["classes"], classes()
    missing = [name for name in named if name not in here]
    ran = {row.get("class") for row in rows}
    lines = [
        f"**{len(named) - len(missing)} of the {len(named)} classes of the converter's map of text models convert.**",
        "",
        f"{sum(name in ran for name in named if name in here)} of these ran, as rows of the table above. Those with a * did",
        "not run in llama.cpp under their own name; most have the rules of another class, or of their text part.",
        "",
    ]
    reasons: dict[str, list[str]] = {}
    for name in missing:
        reasons.setdefault(WHY_NOT.get(name, "no row yet"), []).append(f"`{name}`")
    lines += ["Not converted:", "", *(f"* {reason}: {', '.join(names)}." for reason, names in reasons.items())]
    found = {name: here[name] for name in named if name in here}
    by_arch: dict[str, list[str]] = {}
    for name, arch in found.items():
        by_arch.setdefault(arch, []).append(f"`{name}`" if name in ran else f"`{name}`\\*")
    lines += ["", "| GGUF | classes |", "|---|---|", *(f"| {a} | {', '.join(n)} |" for a, n in sorted(by_arch.items()))]
    return "\n".join(lines)


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    gelu = [row for row in rows if row.get("tolerance", 0) > 1e-5]
    exact = [row for row in rows if row not in gelu]

    def worst(of: list[dict[str, Any]]) -> str:
        keys = ("plain", "merged", "onto", "lora")
        return f"{max((row[k] for row in of for k in keys if isinstance(row.get(k), float)), default=0.0):.1e}"

    read = [row["reads"] for row in rows if "reads" in row]
    return {
        "versions": _measured(rows),
        "count": len(rows),
        "archs": len({row.get("arch") for row in rows}),
        "exact": len(exact),
        "exact_worst": worst(exact),
        "gelu": len(gelu),
        "gelu_worst": worst(gelu),
        "same": sum(row.get("same") is True for row in rows),
        "backs": sum("same" in row for row in rows),
        "read": sum(isinstance(value, float) for value in read),
        "reads": len(read),
    }


PAGE = """# GGUF architectures

Written by `bench/proofs/gguf_archs.py --write` out of `bench/proofs/gguf_archs.json`. A row keeps its figures until its kind
runs again, so rows may be older than the code. Measured were:

{versions}

**{count} models of {archs} GGUF architectures. {exact} agree with transformers to {exact_worst} or better in every column,
{gelu} more to {gelu_worst} (GELU, which ggml takes from a table in half precision;
Qwen2-VL). {same} of {backs} give the same bytes after
GGUF -> Hugging Face -> GGUF. transformers' own reader takes {read} of the {reads} tried.**

For each a tiny random model is made with transformers, in float32. The figures are the largest difference of any
log-probability of the next token between llama.cpp and transformers or PEFT (encoders: of any number of the normalised
embedding):

* plain: `convert HF-FOLDER -o base.gguf`;
* merged: `merge HF-FOLDER ADAPTER -o merged.gguf`, folded in the same pass as renamed and permuted;
* onto the GGUF: `merge base.gguf ADAPTER -o merged.gguf`;
* LoRA file: `convert ADAPTER --to gguf-lora` beside `base.gguf`;
* and back: `convert base.gguf --to hf`, and a GGUF of that;
* transformers reads: our file with `from_pretrained(gguf_file=...)`, to transformers' own model. That reader takes much of a
  config at its default (`reads` of the row in `tests/gguf/arch_zoo.py`), so those models have it there.

{table}

## What differs, and why

* **GELU.** ggml takes GELU from a table in half precision; with larger weights than these it shows more.
* **Qwen2-VL.** llama.cpp reads no epsilon for its norms and adds none; with the weights of real models that shows less.
* **phimoe.** llama.cpp computes a plain softmax where PhiMoE has its sparse mixer, and RMS norms where it has layer norms. The
  figures compare with a transformers model that was changed to do the same; the real model differs from that in llama.cpp.
* **longrope.** llama.cpp takes the long factors when its context is larger than the original one, transformers when the text
  is. Below the original length give the runtime a context no longer than that.
* **gemma3n.** The activation sparsity of the first ten layers is a constant in llama.cpp (0.95); other configs are refused.
* **MXFP4 experts (gpt_oss)** keep their bits. llama.cpp multiplies them with activations of 8 bits, so it differs by 2e-2.
* **T5 encoders** are written as not causal; without that key llama.cpp's server masks them.
* **cohere** (query and key norms), **exaone4** (window), **deepseek2** without `q_lora_rank`, **baichuan** (ALiBi): llama.cpp
  tells these apart by the number of layers, so a config that has the one without the other is refused.
* **falcon_h1** (and others with multipliers): the multipliers are in the weights of a GGUF, so an adapter cannot be merged
  onto that file; merge from the Hugging Face folder.
* **LoRA files on `attn_k_b` and `attn_v_b`** (DeepSeek and others with latent attention) are refused: llama.cpp takes these
  weights without looking for a LoRA, and would be silently wrong. Merging works.
* **transformers' reader** takes gpt_oss' scaling factors from the wrong part of a field, has no key for the widths of
  gemma4's per-layer embeddings, and wants qwen2_moe's shared gate without the axis of length one that llama.cpp's
  converter leaves.
* **roberta and xlm-roberta** are told from bert by their tokenizer when going back, which the models above do not have. With it
  they give the same bytes too (`tests/gguf/test_gguf_there_and_back.py`).

* **minimax** (Text-01, M1): the norm after linear attention has an epsilon of its own (1e-6), and llama.cpp one for all; a
  config with another is written with `--allow-approximate rms_norm_eps`.
* **plamo2**: llama.cpp's own converter writes 0 heads for layers with a mixer, and the runtime then never answers; ours says
  their number.
* **neobert**: its code has the query, key and value of each head after the other. llama.cpp's own converter leaves them so, and
  the runtime takes all queries first; ours are sorted.
* **rwkv6**: nothing is halved every sixth layer, which is for half precision; `rescale_every_n_layers` is 0.
* **sarvam**: the bias that chooses experts is stored as it is; its mean, which its code takes away, changes no choice.
* **cogvlm**: llama.cpp answers with the scores of the first token of a batch. The figure is for a micro-batch of one token, and
  the conversion says so.
* **grovemoe** has no formula here: its tensors and keys are those of llama.cpp's own converter, and the runtime runs it.

Architectures in the last rows have no class in transformers; their checkpoints were made from a model that computes the same,
or by hand, and compared with their formula in float64 (`tests/gguf/coded_zoo.py` and its neighbours).

## The classes of llama.cpp's converter

{classes}

## Beside llama.cpp's own converter

`python -m bench proofs converter --converter CONVERT_HF_TO_GGUF.PY --python PYTHON` makes folders as the Hub has them, with a
tokenizer of the model's family, and converts each by both: to F32, F16 and BF16, and once more from a BF16 checkpoint. It
compares the set of tensors, their shapes, types and bytes, and every key with its type and value, tokens, scores, types and
merges among them. The converter is that of llama-cpp-python 0.3.36, with transformers 4.57.6. 108 models: those of the table
above; Arcee, Dots, DeepSeek 1, Bailing, Orion, Xverse and the text parts of Qwen2-VL, Qwen3-VL and GLM-4.1V; and yarn, windows,
a model card, FP8, GPTQ, MXFP4 experts, a vision-language model's text part, multi-token-prediction layers, Phi-4's
tokenizer, three of Mistral's real ones, and the real MiniLM.

**The 106 that it converts, of 66 GGUF architectures, have the same tensors, shapes and types; 13,688 of 13,740 tensors have
the same bytes. 12,256 of 12,600 keys are the same, all of 65 models. Every difference is one of these**
(`bench/proofs/converter_differs.py`), and the script fails when there is another:

* **-exp(x)** (`ssm_a` of Mamba and Jamba, 24 tensors): ours are the nearest float32, torch's are off by one unit now and then.
* **GPTQ** (28 tensors) is decoded in float16, as its own loop does and adapters were trained; the converter decodes in float32,
  which differs where the output is finer than float16. AWQ and bitsandbytes it does not convert.
* Said here, where llama.cpp takes the same by default: `add_space_prefix`, `add_bos_token`, `add_eos_token`, `strip_accents`.
  `cls_token_id`, which llama.cpp reads no more, is kept for the way back.
* A `tokenizer.model` alone: symbols that the user defined are marked as such, and the unknown token is named.
* Ids that the converter writes whatever the tokenizer is: Gemma's end of turn (107), Nemotron's padding and unknown tokens (0
  and 1), XLM-RoBERTa's mask (250001). Ours are looked up.
* Left out by the converter: the file type of gpt_neox and mpt, the rotary base of gpt_neox, and that T5 encoders are not
  causal.
* Ernie 4.5's shared experts: the converter computes their width in a way that is right for the published sizes alone.
* Granite 4 without mixers: the converter writes keys of the mixer. Xverse: it writes no scores, without which llama.cpp does
  not know what to join first.
* Model cards: links to datasets have `datasets/` in them, and underscores in their names are spaces. A `tekken.json` without a
  chat template gets none, and no scores.
* MiniLM: the converter takes the hash of its WordPiece for that of another tokenizer; llama.cpp has no pre-tokenizer there.

StableLM 2 12B (its query and key norms are lost) and Baichuan (it calls itself without end) are not converted by it. A
byte-level tokenizer that was trained here has no hash that it knows: it is told the name of the pre-tokenizer, which with us
comes from the regexes. Layers that predict further tokens are left out by both (`--no-nextn`).
"""


if __name__ == "__main__":
    main()
