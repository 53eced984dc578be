"""llama.cpp's C functions in the library of the xllamacpp wheel: log-probabilities at many positions by one decode.

Run by `runtime` as a process of its own: ``python decode_child.py JSON`` with the file, the context in tokens, the threads and
where rows go. Each line of standard input is a question, ``{"prompt": token ids, "positions": indices}``; the answer is a line,
and a float32 array ``[positions, vocabulary]`` in the file.

Two structures are set by their offsets, which are those of llama.h since 2025. Each default that stands there is looked at
first, and afterwards llama.cpp's own log has to say that keys and values are kept in float32 and that flash attention is off.
If either is otherwise, this says ``NO``, and the server, which is slower, answers in its place. Imports nothing of adapterkit.
"""

import ctypes
import json
import os
import re
import struct
import sys
from typing import Any

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int32
_F32, _F16 = 0, 1  # ggml.h: ggml_type
_OFF = 0  # llama.h: LLAMA_FLASH_ATTN_TYPE_DISABLED


class Params(ctypes.Structure):
    """Passed by value, so at least as large as the structure that the library has."""

    _fields_ = [("bytes", ctypes.c_char * 1024)]


class Batch(ctypes.Structure):
    """llama.h: llama_batch"""

    _fields_ = [
        ("n_tokens", _INT),
        ("token", ctypes.POINTER(_INT)),
        ("embd", _POINTER),
        ("pos", ctypes.POINTER(_INT)),
        ("n_seq_id", ctypes.POINTER(_INT)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(_INT))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


class Refused(Exception):
    """The library is not as it is known here."""


def context_settings(default: bytes, context: int, threads: int) -> bytes:
    """The structure llama_context_params with our values in it.

    Raises:
        Refused: what stands at their places is not the default that is known.
    """
    numbers = struct.unpack_from("<30i", default, 0)
    # n_ctx, n_batch, n_ubatch, n_seq_max; later two numbers of threads, and four kinds of which -1 is "by the model".
    pairs = [at for at in range(4, 12) if numbers[at : at + 2] == (4, 4)]
    kinds = [at for at in range(6, 16) if numbers[at : at + 4] == (-1, -1, -1, -1)]
    if numbers[:4] != (512, 2048, 512, 1) or len(pairs) != 1 or len(kinds) != 1 or kinds[0] < pairs[0]:
        raise Refused(f"llama_context_params is {numbers}")
    found = bytearray(default)
    struct.pack_into("<3i", found, 0, context, max(context, 512), 512)
    struct.pack_into("<2i", found, 4 * pairs[0], threads, threads)
    struct.pack_into("<i", found, 4 * kinds[0] + 12, _OFF)
    # Behind the numbers of RoPE and two null pointers (cb_eval and its data): type_k, type_v.
    places = [at for at in range(4 * kinds[0] + 16, 160, 8) if default[at - 16 : at] == bytes(16)]
    places = [at for at in places if struct.unpack_from("<2i", default, at) == (_F16, _F16)]
    if len(places) != 1:
        raise Refused("llama_context_params has its types elsewhere")
    struct.pack_into("<2i", found, places[0], _F32, _F32)
    return bytes(found)


def model_settings(default: bytes) -> bytes:
    """The structure llama_model_params, with every layer on the CPU.

    Raises:
        Refused: as of `context_settings`.
    """
    (layers,) = struct.unpack_from("<i", default, 16)  # behind two pointers that are null: n_gpu_layers
    if default[:16] != bytes(16) or layers not in (-1, 0, 99, 999):
        raise Refused(f"llama_model_params has {layers} for n_gpu_layers")
    found = bytearray(default)
    struct.pack_into("<i", found, 16, 0)
    return bytes(found)


def main() -> None:
    file, context, threads, where = json.loads(sys.argv[1])
    import numpy as np
    from xllamacpp import xllamacpp

    lib = ctypes.CDLL(xllamacpp.__file__)

    def function(name: str, result: Any, *takes: Any) -> Any:
        try:
            found = getattr(lib, name)
        except AttributeError:
            raise Refused(f"there is no {name}") from None
        found.restype, found.argtypes = result, list(takes)
        return found

    log: list[str] = []
    keep = ctypes.CFUNCTYPE(None, _INT, ctypes.c_char_p, _POINTER)(
        lambda level, text, data: log.append((text or b"").decode("utf-8", "replace"))
    )
    function("llama_log_set", None, _POINTER, _POINTER)(ctypes.cast(keep, _POINTER), None)
    function("llama_backend_init", None)()
    default_model = function("llama_model_default_params", Params)()
    default_context = function("llama_context_default_params", Params)()
    own_model, own_context = Params(), Params()
    ctypes.memmove(ctypes.byref(own_model), model_settings(bytes(default_model)), 1024)
    ctypes.memmove(ctypes.byref(own_context), context_settings(bytes(default_context), context, threads), 1024)
    model = function("llama_model_load_from_file", _POINTER, ctypes.c_char_p, Params)(os.fsencode(file), own_model)
    if not model:
        print("ERROR not loaded", flush=True)
        return
    made = function("llama_init_from_model", _POINTER, _POINTER, Params)(model, own_context)
    said = "".join(log)
    if not made or function("llama_n_ctx", ctypes.c_uint32, _POINTER)(made) < context:
        raise Refused("no context was made")
    if "K (f32)" not in said or "V (f32)" not in said or not re.search(r"flash_attn\s*= disabled", said):
        raise Refused("llama.cpp does not say that it took the settings")
    if function("llama_model_has_encoder", ctypes.c_bool, _POINTER)(model):
        raise Refused("a model with an encoder")
    vocabulary = function("llama_vocab_n_tokens", _INT, _POINTER)(
        function("llama_model_get_vocab", _POINTER, _POINTER)(model)
    )
    clear = function("llama_memory_clear", None, _POINTER, ctypes.c_bool)
    memory = function("llama_get_memory", _POINTER, _POINTER)(made)
    decode = function("llama_decode", _INT, _POINTER, Batch)
    logits = function("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), _POINTER, _INT)
    batch = function("llama_batch_init", Batch, _INT, _INT, _INT)(context, 0, 1)

    def run(ids: list[int], positions: list[int]) -> Any:
        wanted = set(positions)
        batch.n_tokens = len(ids)
        for at, token in enumerate(ids):
            batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.seq_id[at][0] = token, at, 1, 0
            batch.logits[at] = at in wanted
        clear(memory, True)
        if len(ids) > context or decode(made, batch) != 0:
            return None
        found = [logits(made, at) for at in positions]
        if not all(found):
            return None
        rows = np.stack([np.ctypeslib.as_array(row, (vocabulary,)).astype(np.float64) for row in found])
        top = rows.max(-1, keepdims=True)
        return rows - top - np.log(np.exp(rows - top).sum(-1, keepdims=True))

    few = min(context, 8)
    if run([0] * few, list(range(few))) is None:
        raise Refused("a first decode failed")
    print("READY", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        rows = run(asked["prompt"], asked["positions"])
        if rows is None:
            print("ERROR not decoded", flush=True)
            continue
        np.save(where, rows.astype(np.float32))
        print("ROW", flush=True)


if __name__ == "__main__":
    try:
        main()
    except Refused as error:
        print(f"NO {error}", flush=True)
    os._exit(0)  # the library's own end is of no interest, and may fail
