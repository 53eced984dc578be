"""Vocabularies in a real llama.cpp: a tiny model that carries one, and the ids that its server cuts text into."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.gguf.metadata import array, f32, file_start, tensor_info, text, u32
from adapterkit.gguf.reader import I32
from adapterkit.gguf.types import TYPES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from adapterkit.gguf.vocab import Vocab

WIDTH, HIDDEN = 32, 32

_SERVER = """
import http.client, json, sys, urllib.parse
import xllamacpp as x
found = []
for file, cases in json.loads(sys.stdin.read()):
    p = x.CommonParams()
    p.model.path = file
    p.n_ctx = 64; p.n_parallel = 1; p.n_gpu_layers = 0; p.warmup = False; p.fit_params = False
    p.cpuparams.n_threads = 1; p.verbosity = -1; p.port = 0
    server = x.Server(p)
    place = urllib.parse.urlparse(server.listening_address)
    line = http.client.HTTPConnection(place.hostname, place.port, timeout=900)
    rows = []
    for content, special in cases:
        asked = json.dumps({"content": content, "add_special": special, "parse_special": True}).encode()
        line.request("POST", "/tokenize", asked, {"Content-Type": "application/json"})
        rows.append(json.loads(line.getresponse().read())["tokens"])
    line.close()
    found.append(rows)
    del server
print("RESULT" + json.dumps(found))
"""


def write_model(path: Path, vocab: Vocab) -> Path:
    """A llama of one layer with this vocabulary."""
    shapes = {
        "token_embd.weight": (vocab.size, WIDTH),
        "output_norm.weight": (WIDTH,),
        "output.weight": (vocab.size, WIDTH),
        "blk.0.attn_norm.weight": (WIDTH,),
        "blk.0.ffn_norm.weight": (WIDTH,),
        **{f"blk.0.attn_{part}.weight": (WIDTH, WIDTH) for part in ("q", "k", "v", "output")},
        **{f"blk.0.ffn_{part}.weight": (HIDDEN, WIDTH) for part in ("gate", "up")},
        "blk.0.ffn_down.weight": (WIDTH, HIDDEN),
    }
    entries = [
        text("general.architecture", "llama"),
        u32("llama.block_count", 1),
        u32("llama.context_length", 64),
        u32("llama.embedding_length", WIDTH),
        u32("llama.feed_forward_length", HIDDEN),
        u32("llama.attention.head_count", 2),
        f32("llama.attention.layer_norm_rms_epsilon", 1e-6),
        *vocab.entries,
    ]
    infos, offset = [], 0
    for name, shape in shapes.items():
        kind = TYPES["F32" if len(shape) == 1 else "F16"]
        infos.append(tensor_info(name, kind, shape, offset))
        size = shape[0] * (shape[1] if len(shape) > 1 else 1) * kind.size
        offset += size + -size % 32
    head = b"".join([file_start(len(shapes), len(entries)), *(one.data for one in entries), *infos])
    with path.open("wb") as file:
        file.write(head + bytes(-len(head) % 32))
        file.truncate(file.tell() + offset)  # weights of zero; they take no room on the disk
    return path


def tokenized(cases: Mapping[Path, Sequence[tuple[str, bool]]]) -> dict[Path, list[list[int]]]:
    """llama.cpp's ids of each text, by model; the flag says whether special tokens are put around it."""
    asked = json.dumps([[str(path), list(texts)] for path, texts in cases.items()])
    done = subprocess.run([sys.executable, "-c", _SERVER], input=asked, capture_output=True, text=True, timeout=900)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT")), None)
    assert line is not None, f"llama.cpp gave no answer: {done.returncode} {done.stdout[-500:]} {done.stderr[-2500:]}"
    return dict(zip(cases, json.loads(line.removeprefix("RESULT")), strict=True))


def values(entries: Sequence[Any]) -> dict[str, Any]:
    """Key-values as Python values, read back by the gguf package from a file of nothing else."""
    import tempfile

    import gguf

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "keys.gguf")
        # gguf's reader wants a tensor to be there.
        info = tensor_info("x", TYPES["F32"], (1,), 0)
        extra = [array("unused", I32, [1])]
        head = b"".join([file_start(1, len(entries) + 1), *(one.data for one in (*entries, *extra)), info])
        path.write_bytes(head + bytes(-len(head) % 32) + bytes(4))
        fields = gguf.GGUFReader(path).fields
        return {one.key: fields[one.key].contents() for one in entries}
