"""Whole files beside llama-quantize's, byte for byte: header, order of tensors, types, padding and data.

The program is looked for in ``LLAMA_QUANTIZE`` and on the PATH; without it these tests are skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("gguf")
from gguf_files import write_gguf

from adapterkit.gguf.quantize import Quantization
from adapterkit.verbs.convert import convert

PROGRAM = os.environ.get("LLAMA_QUANTIZE") or shutil.which("llama-quantize") or ""
pytestmark = pytest.mark.skipif(
    not PROGRAM, reason="no llama-quantize: put it on the PATH or name it in LLAMA_QUANTIZE"
)
MIXES = ["Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_0", "Q4_1", "Q4_K_S", "Q4_K_M", "Q5_0", "Q5_1", "Q5_K_S", "Q5_K_M"]
MIXES += ["Q6_K", "Q8_0", "IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_M", "TQ1_0", "TQ2_0", "MXFP4_MOE", "F16", "BF16"]
WITH_IMATRIX = ["Q2_K", "Q2_K_S", "Q3_K_M", "Q4_0", "Q4_K_M", "Q5_0", "Q5_1", "Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS"]
WITH_IMATRIX += ["IQ3_XXS", "IQ3_XS", "IQ2_M", "IQ2_XS"]


@dataclass(frozen=True)
class Model:
    """The shape of a model; every layer has the same matrices."""

    arch: str
    heads: int = 8
    kv_heads: int = 8
    layers: int = 8
    width: int = 256
    inner: int = 512
    experts: int = 0
    fused: bool = False  # q, k, v in one
    tied: bool = False
    dtype: str = "float32"
    more: dict[str, Any] = field(default_factory=dict)


MODELS = {
    "small": Model("llama", kv_heads=4, inner=256, layers=3),
    "llama": Model("llama", dtype="float16"),
    "grouped queries": Model("llama", kv_heads=2, tied=True),
    "mixtral": Model("llama", kv_heads=2, experts=8, layers=4),
    "qwen2": Model("qwen2", kv_heads=4, layers=5, tied=True, dtype="bfloat16"),
    "qwen3moe": Model("qwen3moe", kv_heads=2, experts=4, inner=256, layers=5, more={"expert_feed_forward_length": 256}),
    "gpt-oss": Model(
        "gpt-oss",
        kv_heads=2,
        experts=4,
        inner=256,
        layers=3,
        dtype="bfloat16",
        more={"expert_feed_forward_length": 256, "attention.sliding_window": 64},
    ),
    "phi3": Model("phi3", layers=4, fused=True, more={"rope.dimension_count": 32}),
    "falcon": Model("falcon", kv_heads=2, layers=16, inner=256, fused=True),
    "gemma2": Model("gemma2", kv_heads=4, layers=3, tied=True, more={"attention.sliding_window": 64}),
    "columns of 288": Model("llama", width=288, inner=544, layers=3, heads=4, kv_heads=4),
    "columns of 80": Model("llama", width=256, inner=80, layers=2),
}


def write_model(path: Path, model: Model) -> Path:
    """A file of that shape with weights of several kinds of distribution."""
    import numpy as np

    rng = np.random.default_rng(7)
    tensors: dict[str, Any] = {}
    types: dict[str, str] = {}

    def add(name: str, *shape: int) -> None:
        values = rng.standard_normal(shape) * 0.05
        if len(tensors) % 3 == 1:
            values = rng.standard_t(3, shape) * 0.02
        if len(tensors) % 5 == 2:
            values = np.round(values * 64) / 64
        wide = len(shape) > 1 and "norm" not in name and "ffn_gate_inp" not in name
        if wide and model.dtype == "bfloat16":
            types[name] = "BF16"
        tensors[name] = values.astype(model.dtype if wide and model.dtype != "bfloat16" else "float32")

    width, inner = model.width, model.inner
    kv_width = width // model.heads * model.kv_heads
    add("token_embd.weight", 64, width)
    for layer in range(model.layers):
        at = f"blk.{layer}."
        add(f"{at}attn_norm.weight", width)
        if model.fused:
            add(f"{at}attn_qkv.weight", width + 2 * kv_width, width)
        else:
            for part, rows in (("q", width), ("k", kv_width), ("v", kv_width)):
                add(f"{at}attn_{part}.weight", rows, width)
        add(f"{at}attn_output.weight", width, width)
        if model.experts:
            add(f"{at}ffn_gate_inp.weight", model.experts, width)
            for part, shape in (("gate", (inner, width)), ("up", (inner, width)), ("down", (width, inner))):
                add(f"{at}ffn_{part}_exps.weight", model.experts, *shape)
        else:
            for part, shape in (("gate", (inner, width)), ("up", (inner, width)), ("down", (width, inner))):
                add(f"{at}ffn_{part}.weight", *shape)
    add("output_norm.weight", width)
    if not model.tied:
        add("output.weight", 64, width)
    epsilon = "layer_norm_epsilon" if model.arch == "falcon" else "layer_norm_rms_epsilon"
    facts: dict[str, Any] = {
        "block_count": model.layers,
        "context_length": 128,
        "embedding_length": width,
        "feed_forward_length": inner,
        "vocab_size": 64,
        "attention.head_count": model.heads,
        "attention.head_count_kv": model.kv_heads,
        f"attention.{epsilon}": 1e-5,
        **model.more,
    }
    if model.experts:
        facts |= {"expert_count": model.experts, "expert_used_count": 2}
    metadata = {f"{model.arch}.{key}": value for key, value in facts.items()}
    metadata |= {"general.name": "tiny", "general.file_type": 0}
    return write_gguf(path, tensors, arch=model.arch, metadata=metadata, types=types)


def write_importance(path: Path, base: Path) -> Path:
    """What llama-imatrix writes, of random numbers; the last matrix of a stack was never called."""
    import gguf
    import numpy as np

    rng = np.random.default_rng(3)
    found = {}
    for tensor in gguf.GGUFReader(base).tensors:
        shape = tensor.shape[::-1]
        if len(shape) < 2 or tensor.name.startswith(("token_embd", "output")) or "ffn_gate_inp" in tensor.name:
            continue
        matrices = int(np.prod(shape[:-2]))
        counts = np.full((matrices, 1), 3, "float32")
        counts[-1] *= matrices == 1
        found[f"{tensor.name}.in_sum2"] = (rng.random((matrices, int(shape[-1]))) ** 4).astype("float32") * counts
        found[f"{tensor.name}.counts"] = counts
    facts = {"general.type": "imatrix", "imatrix.datasets": ["some.txt"], "imatrix.chunk_count": 3}
    return write_gguf(path, found, metadata={**facts, "imatrix.chunk_size": 512})


def write_legacy(path: Path, matrix: Path) -> Path:
    """The same in the older format."""
    import struct

    import gguf
    import numpy as np

    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(matrix).tensors}
    names = [name.removesuffix(".in_sum2") for name in tensors if name.endswith(".in_sum2")]
    data = struct.pack("<i", len(names))
    for name in names:
        values = np.asarray(tensors[f"{name}.in_sum2"]).reshape(-1)
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 3, values.size) + values.tobytes()
    dataset = b"some.txt"
    path.write_bytes(data + struct.pack("<ii", 3, len(dataset)) + dataset)
    return path


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = write_model(tmp_path_factory.mktemp("base") / "base.gguf", MODELS[name])
        return made[name]

    return make


def llama_quantize(base: Path, out: Path, mix: str, *options: str) -> None:
    command = [PROGRAM, *options, str(base), str(out), mix, "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=base.parent, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]


def assert_same(ours: Path, theirs: Path) -> None:
    """The same bytes; if not, say which tensors or keys differ."""
    import gguf

    if ours.read_bytes() == theirs.read_bytes():
        return
    one, other = gguf.GGUFReader(ours), gguf.GGUFReader(theirs)
    tensors = [[(t.name, t.tensor_type.name, t.data.tobytes()) for t in reader.tensors] for reader in (one, other)]
    assert [t[:2] for t in tensors[0]] == [t[:2] for t in tensors[1]]
    assert [a[:2] for a, b in zip(*tensors, strict=True) if a != b] == []
    keys = [{k: b"".join(bytes(p) for p in f.parts) for k, f in reader.fields.items()} for reader in (one, other)]
    assert list(keys[0].items()) == list(keys[1].items())
    pytest.fail("the files differ in padding alone")


@pytest.mark.parametrize("mix", ["Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "IQ4_XS"])
def test_the_usual_mixes(mix: str, bases: Any, tmp_path: Path) -> None:
    convert(bases("small"), tmp_path / "ours.gguf", quantization=Quantization(mix))
    llama_quantize(bases("small"), tmp_path / "theirs.gguf", mix)
    assert_same(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")


@pytest.mark.slow
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("model", MODELS)
def test_every_mix(model: str, mix: str, bases: Any, tmp_path: Path) -> None:
    base = bases(model)
    convert(base, tmp_path / "ours.gguf", quantization=Quantization(mix))
    llama_quantize(base, tmp_path / "theirs.gguf", mix)
    assert_same(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")


@pytest.mark.slow
@pytest.mark.parametrize("mix", WITH_IMATRIX)
@pytest.mark.parametrize("model", ["llama", "grouped queries", "mixtral", "qwen3moe", "columns of 288"])
def test_with_an_importance_matrix(model: str, mix: str, bases: Any, tmp_path: Path) -> None:
    base = bases(model)
    matrix = write_importance(base.parent / "imatrix.gguf", base)
    convert(base, tmp_path / "ours.gguf", quantization=Quantization(mix, imatrix=matrix))
    llama_quantize(base, tmp_path / "theirs.gguf", mix, "--imatrix", matrix.name)
    assert_same(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")


def test_with_an_older_importance_matrix(bases: Any, tmp_path: Path) -> None:
    base = bases("small")
    matrix = write_legacy(base.parent / "imatrix.dat", write_importance(base.parent / "i.gguf", base))
    convert(base, tmp_path / "ours.gguf", quantization=Quantization("Q4_K_M", imatrix=matrix))
    llama_quantize(base, tmp_path / "theirs.gguf", "Q4_K_M", "--imatrix", matrix.name)
    assert_same(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")


# name: (our options, llama-quantize's)
OPTIONS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "pure": ({"pure": True}, ["--pure"]),
    "tensor types": (
        {"tensor_types": ((r"attn_v", "Q8_0"), (r"blk\.[12]\.ffn_down", "IQ4_XS"), ("FFN_UP", "Q5_K"))},
        [
            "--tensor-type",
            "attn_v=q8_0",
            "--tensor-type",
            r"blk\.[12]\.ffn_down=iq4_xs",
            "--tensor-type",
            "FFN_UP=q5_K",
        ],
    ),
    "output": ({"output_type": "Q8_0"}, ["--output-tensor-type", "q8_0"]),
    "embedding": ({"token_embedding_type": "F16"}, ["--token-embedding-type", "f16"]),
    "both": (
        {"output_type": "F16", "token_embedding_type": "Q4_K"},
        ["--output-tensor-type", "f16", "--token-embedding-type", "q4_k"],
    ),
    "leave output": ({"leave_output": True}, ["--leave-output-tensor"]),
    "all": (
        {"pure": True, "output_type": "Q8_0", "tensor_types": (("attn_k", "Q6_K"),)},
        ["--pure", "--output-tensor-type", "q8_0", "--tensor-type", "attn_k=q6_k"],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("model", ["llama", "grouped queries", "mixtral"])
def test_options(model: str, name: str, bases: Any, tmp_path: Path) -> None:
    base, (ours, theirs) = bases(model), OPTIONS[name]
    convert(base, tmp_path / "ours.gguf", quantization=Quantization("Q4_K_M", **ours))
    llama_quantize(base, tmp_path / "theirs.gguf", "Q4_K_M", *theirs)
    assert_same(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")


@pytest.mark.parametrize("first", ["Q8_0", "Q4_K_S"])
def test_a_second_time(first: str, bases: Any, tmp_path: Path) -> None:
    convert(bases("small"), tmp_path / "first.gguf", quantization=Quantization(first))
    convert(tmp_path / "first.gguf", tmp_path / "ours.gguf", quantization=Quantization("Q3_K_M", yes_lossy=True))
    llama_quantize(tmp_path / "first.gguf", tmp_path / "theirs.gguf", "Q3_K_M", "--allow-requantize")
    assert_same(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")


def test_a_set_of_parts(bases: Any, tmp_path: Path) -> None:
    """Of parts one file is made, as llama-quantize does without --keep-split."""
    convert(bases("small"), tmp_path / "s.gguf", max_shard_size="1MB")
    first = min(tmp_path.glob("s-00001-*.gguf"))
    convert(first, tmp_path / "ours.gguf", quantization=Quantization("Q5_K_M"))
    llama_quantize(first, tmp_path / "theirs.gguf", "Q5_K_M")
    assert_same(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")
