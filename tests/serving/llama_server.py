"""A tiny base with a tokenizer, and llama.cpp's own server (the xllamacpp wheel) on loopback, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_CHILD = """
import json, sys
import xllamacpp as x
base, loras = json.loads(sys.argv[1])
p = x.CommonParams()
p.model.path = base
p.n_ctx = 128; p.n_parallel = 1; p.n_gpu_layers = 0; p.warmup = False; p.fit_params = False
p.cpuparams.n_threads = 1; p.verbosity = -1; p.port = 0
p.lora_adapters = [x.CommonAdapterLoraInfo(path, 0.0) for path in loras]
p.lora_init_without_apply = True
server = x.Server(p)
print("AT " + server.listening_address, flush=True)
sys.stdin.read()
"""


@contextmanager
def llama_server(base: Path, loras: Sequence[Path | str]) -> Iterator[str]:
    """The address of a server of a GGUF base that has these adapters, none of them applied."""
    asked = json.dumps([str(base), [str(lora) for lora in loras]])
    process = subprocess.Popen(
        [sys.executable, "-c", _CHILD, asked],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = next((line for line in process.stdout if line.startswith("AT ")), "")
        assert line, "llama.cpp did not start"
        yield line[3:].strip()
    finally:
        process.stdin.close()
        process.wait(60)
        process.stdout.close()


def tiny_base(folder: Path) -> Path:
    """A Llama of the demo's shape with random weights, and its tokenizer."""
    import torch
    from models import randomize

    from adapterkit.verbs.demo import _model, _tokenizer

    torch.manual_seed(0)
    tokenizer = _tokenizer()
    model = _model(len(tokenizer))
    randomize(model, scale=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
