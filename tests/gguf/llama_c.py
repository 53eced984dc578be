"""llama.cpp's C functions in the library of the xllamacpp wheel, where its server has no way to ask: encoders with decoders.

Structures that are given by value are only passed on, so they are bytes of at least their size.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

_SEQ2SEQ = """
import ctypes, glob, json, os, sys
import xllamacpp
lib = ctypes.CDLL(glob.glob(os.path.dirname(xllamacpp.__file__) + "/*.so")[0])
class Params(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_char * 1024)]
class Batch(ctypes.Structure):
    _fields_ = [("n", ctypes.c_int32)] + [(name, ctypes.c_void_p) for name in ("token", "embd", "pos", "n_seq", "seq", "out")]
def function(name, result, *takes):
    found = getattr(lib, name)
    found.restype, found.argtypes = result, list(takes)
    return found
P, I = ctypes.c_void_p, ctypes.c_int32
quiet = ctypes.CFUNCTYPE(None, I, ctypes.c_char_p, P)(lambda *_: None)
function("llama_log_set", None, P, P)(ctypes.cast(quiet, P), None)
function("llama_backend_init", None)()
model_params = function("llama_model_default_params", Params)()
context_params = function("llama_context_default_params", Params)()
load = function("llama_model_load_from_file", P, ctypes.c_char_p, Params)
start = function("llama_init_from_model", P, P, Params)
one = function("llama_batch_get_one", Batch, ctypes.POINTER(I), I)
encode = function("llama_encode", I, P, Batch)
decode = function("llama_decode", I, P, Batch)
logits = function("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), P, I)
free = function("llama_free", None, P)
file, prompts, first, vocab = json.loads(sys.argv[1])
model = load(file.encode(), model_params)
assert model, "not loaded"
rows = []
for prompt in prompts:
    context = start(model, context_params)
    tokens = (I * len(prompt))(*prompt)
    assert encode(context, one(tokens, len(prompt))) == 0
    begin = (I * 1)(first)
    assert decode(context, one(begin, 1)) == 0
    found = logits(context, 0)
    rows.append([found[i] for i in range(vocab)])
    free(context)
print("RESULT" + json.dumps(rows), flush=True)
os._exit(0)
"""


def seq2seq(file: Path, prompts: Any, first: int = 0, vocab: int = 288) -> Any:
    """Float64 ``[prompts, vocab]``: log-probabilities of the decoder's token after ``first``, the prompt being encoded."""
    import numpy as np

    asked = json.dumps([str(file), prompts, first, vocab])
    done = subprocess.run([sys.executable, "-c", _SEQ2SEQ, asked], capture_output=True, text=True, timeout=900)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT")), None)
    assert line is not None, f"llama.cpp gave no answer: {done.returncode} {done.stderr[-1500:]}"
    values = np.array(json.loads(line.removeprefix("RESULT")), dtype=np.float64)
    top = values.max(-1, keepdims=True)
    return values - top - np.log(np.exp(values - top).sum(-1, keepdims=True))
