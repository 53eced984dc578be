"""llama.cpp's mtmd in the library of the xllamacpp wheel: what a tower makes of an image or a sound."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

_SEEN = """
import ctypes, glob, json, os, sys
import xllamacpp
lib = ctypes.CDLL(glob.glob(os.path.dirname(xllamacpp.__file__) + "/*.so")[0])
class Params(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_char * 1024)]
class Mtmd(ctypes.Structure):
    _fields_ = [("use_gpu", ctypes.c_bool), ("device", ctypes.c_void_p), ("print_timings", ctypes.c_bool),
                ("n_threads", ctypes.c_int), ("image_marker", ctypes.c_char_p), ("media_marker", ctypes.c_char_p),
                ("flash_attn_type", ctypes.c_int), ("warmup", ctypes.c_bool), ("image_min_tokens", ctypes.c_int),
                ("image_max_tokens", ctypes.c_int), ("rest", ctypes.c_char * 512)]
class Text(ctypes.Structure):
    _fields_ = [("text", ctypes.c_char_p), ("length", ctypes.c_size_t), ("add_special", ctypes.c_bool),
                ("parse_special", ctypes.c_bool), ("rest", ctypes.c_char * 64)]
P, I = ctypes.c_void_p, ctypes.c_int32
def function(name, result, *takes):
    found = getattr(lib, name)
    found.restype, found.argtypes = result, list(takes)
    return found
quiet = ctypes.CFUNCTYPE(None, I, ctypes.c_char_p, P)(lambda *_: None)
function("llama_log_set", None, P, P)(ctypes.cast(quiet, P), None)
function("mtmd_log_set", None, P, P)(ctypes.cast(quiet, P), None)
function("llama_backend_init", None)()
file, projector, kind, media, size, least, most = json.loads(sys.argv[1])
load = function("llama_model_load_from_file", P, ctypes.c_char_p, Params)
model = load(file.encode(), function("llama_model_default_params", Params)())
assert model, "text not loaded"
params = function("mtmd_context_params_default", Mtmd)()
params.use_gpu, params.warmup, params.n_threads, params.flash_attn_type = False, False, 1, 0
params.image_min_tokens, params.image_max_tokens = least, most
context = function("mtmd_init_from_file", P, ctypes.c_char_p, P, Mtmd)(projector.encode(), model, params)
assert context, "projector not loaded"
if kind == "image":
    data = (ctypes.c_ubyte * len(media))(*media)
    bitmap = function("mtmd_bitmap_init", P, ctypes.c_uint32, ctypes.c_uint32, P)(size[0], size[1], ctypes.cast(data, P))
else:
    data = (ctypes.c_float * len(media))(*media)
    bitmap = function("mtmd_bitmap_init_from_audio", P, ctypes.c_size_t, P)(len(media), ctypes.cast(data, P))
chunks = function("mtmd_input_chunks_init", P)()
marker = function("mtmd_default_marker", ctypes.c_char_p)()
text = Text(marker, len(marker), False, True)
tokenize = function("mtmd_tokenize", I, P, P, ctypes.POINTER(Text), ctypes.POINTER(P), ctypes.c_size_t)
done = tokenize(context, chunks, ctypes.byref(text), (P * 1)(bitmap), 1)
assert done == 0, f"mtmd_tokenize {done}"
width = function("llama_model_n_embd_inp", I, P)(model)
found = []
for index in range(function("mtmd_input_chunks_size", ctypes.c_size_t, P)(chunks)):
    chunk = function("mtmd_input_chunks_get", P, P, ctypes.c_size_t)(chunks, index)
    if function("mtmd_input_chunk_get_type", I, P)(chunk) == 0:
        continue
    count = function("mtmd_input_chunk_get_n_tokens", ctypes.c_size_t, P)(chunk)
    assert function("mtmd_encode_chunk", I, P, P)(context, chunk) == 0
    out = function("mtmd_get_output_embd", ctypes.POINTER(ctypes.c_float), P)(context)
    found.append([[out[i * width + j] for j in range(width)] for i in range(count)])
print("RESULT" + json.dumps(found), flush=True)
os._exit(0)
"""


def seen(
    text: Path, projector: Path, media: Any, size: Any = (0, 0), kind: str = "image", least: int = -1, most: int = -1
) -> Any:
    """A list of float64 ``[tokens, width]``: the embeddings of each part of an image (RGB bytes, row by row) or a sound.

    Args:
        text: the GGUF of the language model.
        projector: the mmproj file.
        media: bytes of an image of ``size`` (width, height), or samples of a sound.
        kind: ``image`` or ``sound``.
        least, most: tokens of an image, where the model scales it.
    """
    import numpy as np

    asked = json.dumps([str(text), str(projector), kind, list(media), list(size), least, most])
    code = _SEEN.replace("json.loads(sys.argv[1])", "json.loads(sys.stdin.read())")
    done = subprocess.run([sys.executable, "-c", code], input=asked, capture_output=True, text=True, timeout=900)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT")), None)
    assert line is not None, f"llama.cpp gave no answer: {done.returncode} {done.stderr[-1500:]}"
    return [np.array(part) for part in json.loads(line.removeprefix("RESULT"))]
