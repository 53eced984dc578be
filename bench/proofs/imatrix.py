"""`imatrix` beside llama-imatrix on the same text: ``python -m bench proofs imatrix PATH/TO/llama-imatrix [KIND ...]``.

Tiny random models of the tests' zoo in float32, with a tokenizer trained here. Printed is, for each kind, how many tensors
both files have, which only one has, and the largest difference of a value over the mean of its tensor.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from adapterkit.gguf.checkpoint import open_gguf
from adapterkit.gguf.vocab import pretokenizers
from adapterkit.verbs.convert import convert
from adapterkit.verbs.imatrix import imatrix
from bench.common import results

ROOT = Path(__file__).resolve().parents[2]

KINDS = (
    "llama",
    "qwen3",
    "olmo",
    "stablelm2",
    "cohere2",
    "gpt2",
    "gpt_neox",
    "mixtral",
    "qwen3_moe",
    "granitemoe",
    "gpt_oss",
)
CHUNK = 64
FLAGS = ["-c", "64", "-b", "64", "-ub", "64", "--no-ppl", "-t", "1", "-fa", "off", "-ctk", "f32", "-ctv", "f32"]


def values(path: Path) -> dict[str, Any]:
    return {name: tensor.read(0, tensor.numel).view(tensor.shape).numpy() for name, tensor in open_gguf(path).items()}


def compare(program: str, kind: str, tokenizer: str, text: Path, folder: Path) -> str:
    from arch_zoo import build

    build(folder / "hf", kind)
    (folder / "hf" / "tokenizer.json").write_text(tokenizer)
    imatrix(folder / "hf", text, folder / "ours.gguf", chunk=CHUNK, dtype="f32")
    convert(folder / "hf", folder / "model.gguf", dtype="f32")
    command = [program, "-m", folder / "model.gguf", "-f", text, "-o", folder / "theirs.gguf", *FLAGS]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return f"llama-imatrix failed: {done.stderr[-300:]}"
    ours, theirs = values(folder / "ours.gguf"), values(folder / "theirs.gguf")
    both = ours.keys() & theirs.keys()
    worst = max(float(abs(ours[name] - theirs[name]).max() / (np.abs(theirs[name]).mean() + 1e-9)) for name in both)
    alone = sorted(ours.keys() ^ theirs.keys())
    return f"{len(both)} tensors in both, {len(alone)} in one{' as ' + alone[0] if alone else ''}; {worst:.1e}"


def main(program: str, kinds: tuple[str, ...]) -> None:
    from vocab_zoo import byte_level

    row = pretokenizers.row_of("qwen2")
    assert row is not None
    tokenizer = str(byte_level(pretokenizers.as_json(row), size=280).to_str())
    for kind in kinds:
        folder = Path(tempfile.mkdtemp())
        try:
            text = folder / "text.txt"
            text.write_text((ROOT / "docs" / "methods.md").read_text()[:6000])
            said = compare(program, kind, tokenizer, text, folder)
            print(f"{kind:12} {said}", flush=True)
            results.note(**{kind: said.partition(";")[0]})
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1], tuple(sys.argv[2:]) or KINDS)
