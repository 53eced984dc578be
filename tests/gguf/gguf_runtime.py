"""Log-probabilities of GGUF files in llama.cpp (the xllamacpp wheel), each server in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMPTS = ([1, 5, 17, 200], [1, 260, 33, 7, 90, 271, 3], [1, 44])

_SERVER = """
import json, sys
import xllamacpp as x
files, prompts, vocab, lora, ubatch, bounds = json.loads(sys.argv[1])
found = []
for file in files:
    p = x.CommonParams()
    p.model.path = file
    p.n_ctx = 128; p.n_parallel = 1; p.n_gpu_layers = 0; p.warmup = False; p.fit_params = False
    p.cpuparams.n_threads = 1; p.verbosity = -1; p.port = 0
    p.cache_type_k = p.cache_type_v = x.ggml_type.GGML_TYPE_F32
    p.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if ubatch:
        p.n_ubatch = ubatch
    if bounds:
        p.yarn_beta_fast, p.yarn_beta_slow = bounds
    if lora:
        p.lora_adapters = [x.CommonAdapterLoraInfo(lora, 1.0)]
    server = x.Server(p)
    rows = []
    for prompt in prompts:
        asked = {"prompt": prompt, "n_predict": 1, "n_probs": vocab, "temperature": 0.0}
        asked |= {"cache_prompt": False, "ignore_eos": True}
        answer = server.handle_completions(asked)
        top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        rows.append([lp for _, lp in sorted((t["id"], t["logprob"]) for t in top)])
    found.append(rows)
    del server
print("RESULT" + json.dumps(found))
"""


def logprobs(
    *files: Path,
    lora: Path | None = None,
    vocab: int = 288,
    ubatch: int = 0,
    bounds: tuple[float, float] | None = None,
) -> Any:
    """Float64 ``[files, prompts, vocab]``: the log-probabilities of the token after each of `PROMPTS`.

    ``bounds``: those of yarn, as the runtime's options.
    """
    import numpy as np

    asked = json.dumps([[str(file) for file in files], PROMPTS, vocab, str(lora) if lora else "", ubatch, bounds])
    done = subprocess.run([sys.executable, "-c", _SERVER, asked], capture_output=True, text=True, timeout=900)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT")), None)
    assert line is not None, f"llama.cpp gave no answer: {done.returncode} {done.stderr[-1500:]}"
    return np.array(json.loads(line.removeprefix("RESULT")))


def of_model(model: Any) -> Any:
    """The same from a transformers or PEFT model, in float64."""
    import numpy as np
    import torch

    rows = []
    with torch.no_grad():
        for prompt in PROMPTS:
            logits = model(input_ids=torch.tensor([prompt])).logits[0, -1].double()
            rows.append(torch.log_softmax(logits, -1).numpy())
    return np.array(rows)


@dataclass
class Tiny:
    """A tiny model in both formats, and its own log-probabilities."""

    hf: Path
    gguf: Path
    plain: Any


def lora(**fields: Any) -> Any:
    """A config of PEFT: LoRA of rank 4 on all linear layers, unless ``fields`` say otherwise."""
    from peft import LoraConfig

    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **fields})


def live(base: Path, adapter: Path) -> Any:
    """Log-probabilities of a base with an adapter beside it, in PEFT."""
    from models import load_model
    from peft import PeftModel

    return of_model(PeftModel.from_pretrained(load_model(base), adapter).float().eval())


def far(one: Any, other: Any) -> float:
    """The largest difference."""
    return float(abs(one - other).max())


def divergence(expected: Any, found: Any) -> float:
    """Kullback-Leibler divergence of ``found`` from ``expected``, the largest of the prompts."""
    import numpy as np

    return float((np.exp(expected) * (expected - found)).sum(-1).max())


_EMBEDDING = """
import json, sys
import xllamacpp as x
file, prompts = json.loads(sys.argv[1])
p = x.CommonParams()
p.model.path = file
p.n_ctx = 128; p.n_parallel = 1; p.n_gpu_layers = 0; p.warmup = False; p.fit_params = False
p.cpuparams.n_threads = 1; p.verbosity = -1; p.port = 0; p.embedding = True
p.pooling_type = x.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
p.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = x.Server(p)
rows = [server.handle_embeddings({"input": prompt})["data"][0]["embedding"] for prompt in prompts]
print("RESULT" + json.dumps(rows))
"""


def embeddings(file: Path) -> Any:
    """Float64 ``[prompts, width]``: llama.cpp's embeddings of `PROMPTS`, the mean over the tokens, of length 1."""
    import numpy as np

    asked = json.dumps([str(file), PROMPTS])
    done = subprocess.run([sys.executable, "-c", _EMBEDDING, asked], capture_output=True, text=True, timeout=900)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT")), None)
    assert line is not None, f"llama.cpp gave no answer: {done.returncode} {done.stderr[-1500:]}"
    return np.array(json.loads(line.removeprefix("RESULT")))


def embeddings_of(model: Any) -> Any:
    """The same from a transformers or PEFT encoder."""
    import numpy as np
    import torch

    rows = []
    with torch.no_grad():
        for prompt in PROMPTS:
            mean = model(input_ids=torch.tensor([prompt])).last_hidden_state[0].double().mean(0)
            rows.append((mean / mean.norm()).numpy())
    return np.array(rows)
