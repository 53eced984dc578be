"""GGUF outputs: what is copied, what is encoded, sets of parts, interrupted runs, and everything that is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("gguf")
from gguf_files import random_array, write_gguf
from models import write_adapter

import adapterkit
from adapterkit.cli import main
from adapterkit.disk import own_folder
from adapterkit.errors import AdapterkitError, CheckpointError, NotFound, OutputError
from adapterkit.gguf.quantize import Quantization
from adapterkit.gguf.reader import parse_gguf
from adapterkit.gguf.tensors import Quantized, decoded
from adapterkit.verbs.convert import convert

HEADS = {"llama.block_count": 2, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2}
OTHERS = {"general.name": "tiny", "tokenizer.ggml.tokens": ["a", "b", "ü"], "tokenizer.ggml.scores": [0.0, -1.0, 2.0]}


def tensors(dtype: str = "float32") -> dict[str, Any]:
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (40, 64)}
    for layer in range(2):
        shapes |= {
            f"blk.{layer}.attn_q.weight": (64, 64),
            f"blk.{layer}.attn_k.weight": (32, 64),
            f"blk.{layer}.ffn_down.weight": (64, 96),
            f"blk.{layer}.attn_norm.weight": (64,),
        }
    shapes |= {"output_norm.weight": (64,), "output.weight": (40, 64)}
    return {
        name: random_array(*shape, seed=seed, dtype=dtype if len(shape) > 1 else "float32")
        for seed, (name, shape) in enumerate(shapes.items())
    }


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "base.gguf", tensors(), metadata={**HEADS, **OTHERS})


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    import torch

    generator = torch.Generator().manual_seed(3)
    shapes = {}
    for layer in range(2):
        key = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        shapes |= {f"{key}.lora_A.weight": (4, 64), f"{key}.lora_B.weight": (64, 4)}
    return write_adapter(
        tmp_path / "adapter",
        {n: torch.randn(s, generator=generator) for n, s in shapes.items()},
        target_modules=["q_proj"],
    )


def read(path: Path) -> tuple[dict[str, bytes], dict[str, tuple[str, bytes]]]:
    """Metadata as bytes, and tensors with type and bytes, by gguf's reader."""
    import gguf

    reader = gguf.GGUFReader(path)
    values = {
        name: b"".join(bytes(part) for part in field.parts)
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    return values, {t.name: (t.tensor_type.name, t.data.tobytes()) for t in reader.tensors}


# ------------------------------------------------------------------ what is written


def test_only_touched_tensors_change(base: Path, adapter: Path, tmp_path: Path) -> None:
    report = adapterkit.merge(base, [adapter], tmp_path / "out.gguf")
    assert (report.touched, report.files) == (2, ("out.gguf",))
    (old_values, old), (values, new) = read(base), read(tmp_path / "out.gguf")
    assert values == old_values
    assert list(new) == list(old)
    assert {name for name in old if old[name] != new[name]} == {f"blk.{layer}.attn_q.weight" for layer in range(2)}
    assert not list(tmp_path.glob(".*"))


def test_a_copy_is_the_same_file(base: Path, tmp_path: Path) -> None:
    convert(base, tmp_path / "copy.gguf")
    assert (tmp_path / "copy.gguf").read_bytes() == base.read_bytes()


def test_other_alignment_and_types_survive_a_merge(adapter: Path, tmp_path: Path) -> None:
    given = tensors("float16")
    types = {"blk.1.ffn_down.weight": "Q4_0", "output.weight": "Q5_1"}
    given = {n: t.astype("float32") if n in types else t for n, t in given.items()}
    base = write_gguf(tmp_path / "b.gguf", given, metadata=HEADS, types=types, alignment=128)
    adapterkit.merge(base, [adapter], tmp_path / "out.gguf", max_shard_size="10kB")
    parts = sorted(tmp_path.glob("out-*.gguf"))
    assert len(parts) > 2
    merged: dict[str, tuple[str, bytes]] = {}
    for part in parts:
        merged |= read(part)[1]
    old = read(base)[1]
    assert list(merged) == list(old)
    assert {name for name in old if old[name] != merged[name]} == {f"blk.{layer}.attn_q.weight" for layer in range(2)}
    assert {name: kind for name, (kind, _) in old.items()} == {name: kind for name, (kind, _) in merged.items()}


@pytest.mark.parametrize(("mix", "number"), [("Q8_0", 7), ("Q4_0", 2), ("F16", 1), ("BF16", 32)])
def test_converted_tensors_are_those_of_gguf(mix: str, number: int, base: Path, tmp_path: Path) -> None:
    import gguf

    convert(base, tmp_path / "out.gguf", quantization=Quantization(mix, output_type="Q8_0"))
    values, found = read(tmp_path / "out.gguf")
    given = tensors()
    # llama-quantize writes tensors by layer, then by name, and sets two keys after all others.
    layers = sorted(given, key=lambda n: (int(n.split(".")[1]) if n.startswith("blk") else -1, n))
    assert list(found) == layers
    assert list(values)[-2:] == ["general.quantization_version", "general.file_type"]
    assert values["general.file_type"].endswith(number.to_bytes(4, "little"))
    for name, tensor in given.items():
        kind = "F32" if tensor.ndim == 1 else "Q8_0" if name == "output.weight" else mix
        assert found[name][0] == kind
        wanted = gguf.quantize(tensor, gguf.GGMLQuantizationType[kind])
        assert found[name][1] == wanted.tobytes(), name


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1", "F16"])
def test_decoded_ranges_are_those_of_gguf(kind: str, tmp_path: Path) -> None:
    import gguf
    import numpy as np

    values = random_array(6, 96)
    path = write_gguf(tmp_path / "m.gguf", {"w": values}, types={"w": kind})
    wanted = gguf.dequantize(gguf.quantize(values, gguf.GGMLQuantizationType[kind]), gguf.GGMLQuantizationType[kind])
    tensor = decoded(adapterkit.open(path)["w"])
    for start, stop in [(0, 576), (0, 1), (31, 33), (100, 400), (575, 576), (5, 5)]:
        assert np.array_equal(tensor.read(start, stop).float().numpy(), wanted.reshape(-1)[start:stop])


def test_importance_of_every_expert(tmp_path: Path) -> None:
    """Each expert's rows are weighted with its own numbers: bytes of ggml itself."""
    pytest.importorskip("xllamacpp")
    import ctypes

    import numpy as np
    import xllamacpp

    values = random_array(3, 8, 64)
    name = "blk.0.ffn_down_exps.weight"
    sums = np.abs(random_array(3, 64, seed=5)) + 0.1
    base = write_gguf(tmp_path / "m.gguf", {name: values}, metadata={**HEADS, "llama.expert_count": 3})
    matrix = {f"{name}.in_sum2": sums * 2, f"{name}.counts": np.full((3, 1), 2, "float32")}
    facts = {"general.type": "imatrix", "imatrix.chunk_count": 7, "imatrix.datasets": ["some text"]}
    imatrix = write_gguf(tmp_path / "imatrix.gguf", matrix, metadata=facts)
    convert(base, tmp_path / "out.gguf", quantization=Quantization("Q4_0", imatrix=imatrix, pure=True))
    metadata, found = read(tmp_path / "out.gguf")
    library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    wanted = b""
    for expert, weights in zip(values, sums, strict=True):
        out = ctypes.create_string_buffer(8 * 64 // 32 * 18)
        library.ggml_quantize_chunk(
            2,
            expert.ctypes.data_as(ctypes.c_void_p),
            out,
            ctypes.c_int64(0),
            ctypes.c_int64(8),
            ctypes.c_int64(64),
            weights.ctypes.data_as(ctypes.c_void_p),
        )
        wanted += out.raw
    assert found[name] == ("Q4_0", wanted)
    assert metadata["quantize.imatrix.dataset"].endswith(b"some text")
    assert metadata["quantize.imatrix.chunks_count"].endswith((7).to_bytes(4, "little"))


def test_the_error_beside_a_change_is_weighed_by_an_importance_matrix(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    """Expected: the formula, on what the gguf package reads of both outputs; the encoder uses the same matrix."""
    import gguf
    import numpy as np

    name = "blk.0.attn_q.weight"
    by = np.abs(random_array(1, 64, seed=5)) ** 4 + 1e-3
    matrix = {f"{name}.in_sum2": by, f"{name}.counts": np.ones((1, 1), "float32")}
    imatrix = write_gguf(tmp_path / "i.gguf", matrix, metadata={"general.type": "imatrix"})
    asked = Quantization("Q4_0", imatrix=imatrix)
    out = tmp_path / "out.gguf"
    report = adapterkit.merge(base, [adapter], out, quantization=asked, fidelity=True)
    adapterkit.merge(base, [adapter], tmp_path / "wide.gguf", quantization=Quantization("F32"))
    before, after, wanted = (
        next(gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors if t.name == name)
        for path in (base, out, tmp_path / "wide.gguf")
    )
    exact = (((after - wanted) ** 2 * by).sum() / ((wanted - before) ** 2 * by).sum()) ** 0.5
    (row,) = [one for one in report.fidelity.tensors if one.name == name]
    assert row.weighed == pytest.approx(exact, rel=1e-4)
    assert row.weighed < row.error
    assert report.fidelity.weighed == pytest.approx(exact, rel=1e-4)
    assert [one.weighed for one in report.fidelity.tensors if one.name != name] == [None]
    fails = adapterkit.merge(base, [adapter], out, quantization=asked, max_error=exact * 0.99, force=True)
    assert [f"{exact:.3g}, more than" in words for words in fails.unmet] == [True]


def test_any_number_of_threads_writes_the_same_bytes(base: Path, adapter: Path, tmp_path: Path) -> None:
    for jobs in (1, 3):
        out = tmp_path / f"{jobs}.gguf"
        adapterkit.merge(base, [adapter], out, jobs=jobs, quantization=Quantization("Q8_0"))
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "3.gguf").read_bytes()


# ------------------------------------------------------------------ what is kept wider


def kinds_of(path: Path) -> dict[str, str]:
    return {name: kind for name, (kind, _) in read(path)[1].items()}


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    """An adapter that hardly changes layer 0, and layer 1 a lot."""
    import torch

    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for layer, scale in ((0, 0.005), (1, 0.5)):
        key = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{key}.lora_A.weight"] = torch.randn(4, 64, generator=generator) * scale
        tensors[f"{key}.lora_B.weight"] = torch.randn(64, 4, generator=generator)
    return write_adapter(tmp_path / "uneven", tensors, target_modules=["q_proj"])


def test_changed_tensors_are_kept_wider(base: Path, uneven: Path, tmp_path: Path) -> None:
    """All of them, or those whose change would drown in the type that they would get."""
    names = [f"blk.{layer}.attn_q.weight" for layer in range(2)]
    asked = Quantization("Q4_0", keep_touched="Q8_0")
    report = adapterkit.merge(base, [uneven], tmp_path / "all.gguf", quantization=asked, fidelity=True)
    found = kinds_of(tmp_path / "all.gguf")
    assert [found[name] for name in names] == ["Q8_0", "Q8_0"]
    assert found["blk.0.attn_k.weight"] == "Q4_0"
    assert min(one.cosine for one in report.fidelity.tensors) > 0.9

    asked = Quantization("Q4_0", keep_touched="Q8_0", keep_below=0.5)
    report = adapterkit.merge(base, [uneven], tmp_path / "some.gguf", quantization=asked)
    found = kinds_of(tmp_path / "some.gguf")
    assert [found[name] for name in names] == ["Q8_0", "Q4_0"]
    assert any("1 of 2 changed tensors" in note and "kept as Q8_0" in note for note in report.notes)
    plain = Quantization("Q4_0")
    report = adapterkit.merge(base, [uneven], tmp_path / "none.gguf", quantization=plain, fidelity=True)
    assert report.fidelity.format == "Q4_0"
    assert {one.name: one.cosine < 0.5 for one in report.fidelity.tensors} == {names[0]: True, names[1]: False}


def test_on_a_coarse_base_what_was_measured_decides(base: Path, uneven: Path, tmp_path: Path) -> None:
    """A change of many steps may go back onto the grid; one that would vanish there is kept wider."""
    convert(base, tmp_path / "coarse.gguf", quantization=Quantization("Q4_0"))
    with pytest.raises(AdapterkitError, match="2 tensors that the adapter changes lie on a grid coarser"):
        adapterkit.merge(tmp_path / "coarse.gguf", [uneven], tmp_path / "no.gguf")
    asked = Quantization(keep_touched="Q8_0", keep_below=0.5)
    adapterkit.merge(tmp_path / "coarse.gguf", [uneven], tmp_path / "out.gguf", quantization=asked)
    found = kinds_of(tmp_path / "out.gguf")
    assert [found[f"blk.{layer}.attn_q.weight"] for layer in range(2)] == ["Q8_0", "Q4_0"]


def test_kept_types_fit_their_rows(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Q6_K cannot have rows of 64 weights; what llama-quantize takes in its place is wider too."""
    asked = Quantization("Q4_0", keep_touched="Q6_K")
    adapterkit.merge(base, [adapter], tmp_path / "out.gguf", quantization=asked)
    assert kinds_of(tmp_path / "out.gguf")["blk.0.attn_q.weight"] == "Q8_0"


# ------------------------------------------------------------------ interrupted runs


@pytest.mark.parametrize("resume", [False, True])
def test_an_interrupted_run(resume: bool, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = Quantized.array, []

    def read_some(self: Quantized, start: int, stop: int) -> Any:
        calls.append(self.name)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return real(self, start, stop)

    out = tmp_path / "out.gguf"
    asked = Quantization("Q8_0")
    with monkeypatch.context() as patched:
        patched.setattr(Quantized, "array", read_some)
        with pytest.raises(KeyboardInterrupt):
            convert(base, out, quantization=asked, jobs=1, resume=resume)
    assert not out.exists()
    assert (tmp_path / ".out.gguf.partial").exists() == resume
    report = convert(base, out, quantization=asked, resume=True)
    assert report.reused == (3 if resume else 0)
    convert(base, tmp_path / "whole.gguf", quantization=asked)
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_another_request_does_not_use_what_was_left(base: Path, tmp_path: Path) -> None:
    """Padding and all: the hidden file of another run has other bytes where this one has none."""
    out = tmp_path / "out.gguf"
    folder = tmp_path / ".out.gguf.partial"
    own_folder(folder)
    (folder / "model.gguf").write_bytes(b"\xff" * 200_000)
    convert(base, out, quantization=Quantization("Q8_0"), resume=True)
    convert(base, tmp_path / "whole.gguf", quantization=Quantization("Q8_0"))
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_a_saved_plan_is_executed_part_by_part(base: Path, adapter: Path, tmp_path: Path) -> None:
    from adapterkit.checkpoint.plan import Plan

    asked = Quantization("Q8_0", tensor_types=(("ffn_down", "F16"),))
    planned = adapterkit.plan_merge(base, [adapter], quantization=asked, max_shard_size="9kB", headers_only=False)
    plan = Plan.from_json(planned.plan.to_json())
    assert len(plan.files) > 2
    for part in reversed(range(len(plan.files))):
        adapterkit.execute(plan, tmp_path / "parts.gguf", part=part)
    adapterkit.execute(plan, tmp_path / "parts.gguf")
    adapterkit.merge(base, [adapter], tmp_path / "whole.gguf", quantization=asked, max_shard_size="9kB")
    one, other = (sorted(tmp_path.glob(f"{name}-*.gguf")) for name in ("parts", "whole"))
    assert len(one) == len(plan.files)
    assert [part.read_bytes() for part in one] == [part.read_bytes() for part in other]


# ------------------------------------------------------------------ sets of parts


def test_sets_of_parts(base: Path, tmp_path: Path) -> None:
    convert(base, tmp_path / "s.gguf", max_shard_size="20kB")
    parts = sorted(tmp_path.glob("s-*.gguf"))
    whole = adapterkit.open(parts[1])
    assert list(whole) == list(adapterkit.open(base))
    assert len(whole.sources) == len(parts)
    parts[2].rename(tmp_path / "away")
    with pytest.raises(NotFound, match=f"1 of {len(parts)} parts are missing, as {parts[2].name}"):
        adapterkit.open(parts[0])
    parts[0].with_name(parts[2].name).write_bytes(parts[1].read_bytes())
    with pytest.raises(CheckpointError, match="is not part 3"):
        adapterkit.open(parts[0])
    parts[0].rename(tmp_path / "other.gguf")
    with pytest.raises(CheckpointError, match="name does not end"):
        adapterkit.open(tmp_path / "other.gguf")


# ------------------------------------------------------------------ refused


def command(arguments: list[Any], capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    with pytest.raises(SystemExit) as found:
        main([*map(str, arguments), "--json"])
    return int(found.value.code or 0), json.loads(capsys.readouterr().out)


def test_weights_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    given = tensors()
    given["blk.1.attn_k.weight"][3, 5] = float("nan")
    base = write_gguf(tmp_path / "m.gguf", given, metadata=HEADS)
    with pytest.raises(CheckpointError, match=r"'blk.1.attn_k.weight' cannot be Q8_0: .* row 3, column 5"):
        convert(base, tmp_path / "out.gguf", quantization=Quantization("Q8_0"))
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def bad_imatrix(folder: Path) -> Path:
    return write_gguf(folder / "i.gguf", {"x.in_sum2": random_array(1, 64)}, metadata={"general.type": "imatrix"})


def other_imatrix(folder: Path) -> Path:
    import numpy as np

    matrix = {
        "blk.9.x.weight.in_sum2": np.ones((1, 64), "float32"),
        "blk.9.x.weight.counts": np.ones((1, 1), "float32"),
    }
    return write_gguf(folder / "i.gguf", matrix, metadata={"general.type": "imatrix"})


def nan_imatrix(folder: Path) -> Path:
    import numpy as np

    matrix = {"blk.0.attn_q.weight.in_sum2": np.full((1, 64), np.nan, "float32")}
    matrix["blk.0.attn_q.weight.counts"] = np.ones((1, 1), "float32")
    return write_gguf(folder / "i.gguf", matrix, metadata={"general.type": "imatrix"})


def wide_imatrix(folder: Path) -> Path:
    import numpy as np

    matrix = {"blk.0.attn_q.weight.in_sum2": np.ones((1, 96), "float32")}
    matrix["blk.0.attn_q.weight.counts"] = np.ones((1, 1), "float32")
    return write_gguf(folder / "i.gguf", matrix, metadata={"general.type": "imatrix"})


def damaged(what: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        from test_gguf_reader import BAD

        (folder / "damaged.gguf").write_bytes(BAD[what][0])
        return folder / "damaged.gguf"

    return make


def infinite(folder: Path) -> Path:
    given = tensors()
    given["blk.0.ffn_down.weight"][1, 2] = float("inf")
    return write_gguf(folder / "inf.gguf", given, metadata=HEADS)


def truncated(folder: Path) -> Path:
    path = folder / "cut.gguf"
    path.write_bytes((folder / "base.gguf").read_bytes()[:-5000])
    return path


def strange(folder: Path) -> Path:
    return write_gguf(folder / "strange.gguf", tensors(), arch="rwkv99", metadata={"rwkv99.block_count": 2})


def says_little(folder: Path) -> Path:
    return write_gguf(folder / "little.gguf", tensors(), arch="rwkv7", metadata={"rwkv7.block_count": 2})


def no_heads(folder: Path) -> Path:
    return write_gguf(folder / "heads.gguf", tensors(), metadata={"llama.block_count": 2})


def short(folder: Path) -> Path:
    given = {name: tensor[:, :32] if name.endswith("attn_q.weight") else tensor for name, tensor in tensors().items()}
    return write_gguf(folder / "short.gguf", given, metadata=HEADS)


def wide(folder: Path) -> Path:
    return write_gguf(folder / "wide.gguf", {"blk.0.ffn_up.weight": random_array(2, 256)}, metadata=HEADS)


def lora(folder: Path) -> Path:
    convert(folder / "adapter", folder / "lora.gguf", to="gguf-lora", base=folder / "base.gguf")
    return folder / "lora.gguf"


# name: (arguments, exit code, sentence); functions make a file first, {} stands for the folder
REFUSED: dict[str, tuple[list[Any], int, str]] = {
    "no such mix": (["convert", "{}/base.gguf", "-o", "{}/o.gguf", "--quant", "Q9_K"], 2, "no quantization"),
    "no such type": (["convert", "{}/base.gguf", "-o", "{}/o.gguf", "--tensor-type", "a=Q9"], 2, "no GGUF tensor type"),
    "no such tensor": (
        ["convert", "{}/base.gguf", "-o", "{}/o.gguf", "--quant", "Q8_0", "--tensor-type", "ffn_dwn=F16"],
        2,
        "no tensor that 'ffn_dwn' names",
    ),
    "not regex=type": (["convert", "{}/base.gguf", "-o", "{}/o.gguf", "--tensor-type", "Q8_0"], 2, "not REGEX=TYPE"),
    "no row fits": (
        ["convert", "{}/base.gguf", "-o", "{}/o.gguf", "--quant", "Q4_0", "--output-type", "Q6_K"],
        2,
        "rows of 64 weights, which Q6_K cannot hold",
    ),
    "no type to keep": (
        ["merge", "{}/base.gguf", "{}/adapter", "-o", "{}/o.gguf", "--keep-touched", "Q9"],
        2,
        "no GGUF tensor type",
    ),
    "below what": (
        ["merge", "{}/base.gguf", "{}/adapter", "-o", "{}/o.gguf", "--quant", "Q4_0", "--keep-below", "0.5"],
        2,
        "add --keep-touched",
    ),
    "no cosine": (
        ["merge", "{}/base.gguf", "{}/adapter", "-o", "{}/o.gguf", "--keep-touched", "Q8_0", "--keep-below", "7"],
        2,
        "give a number from 0 to 1",
    ),
    "pure without mix": (["convert", "{}/base.gguf", "-o", "{}/o.gguf", "--pure"], 2, "add --quant"),
    "no format": (["convert", "{}/base.gguf", "-o", "{}/o"], 2, "add --to"),
    "no base": (["convert", "{}/adapter", "--to", "gguf-lora", "-o", "{}/o.gguf"], 2, "needs the base"),
    "not there": (["convert", "{}/none.gguf", "-o", "{}/o.gguf"], 7, "does not exist"),
    "adapter as model": (["convert", "{}/adapter", "-o", "{}/o.gguf"], 2, "is an adapter, not a model"),
    "needs importance": (["convert", wide, "-o", "{}/o.gguf", "--quant", "IQ2_XXS"], 2, "needs an importance matrix"),
    "no imatrix": (
        ["convert", "{}/base.gguf", "-o", "{}/o.gguf", "--quant", "Q4_0", "--imatrix", "{}/none"],
        7,
        "does not exist",
    ),
    "bad imatrix": (["convert", "{}/base.gguf", "-o", "{}/o.gguf", "--quant", "Q4_0", "--imatrix", bad_imatrix], 1, ""),
    "imatrix of another": (
        ["convert", "{}/base.gguf", "-o", "{}/o.gguf", "--quant", "Q4_0", "--imatrix", other_imatrix],
        2,
        "no tensor of this model",
    ),
    "imatrix with NaN": (
        ["convert", "{}/base.gguf", "-o", "{}/o.gguf", "--quant", "Q4_0", "--imatrix", nan_imatrix],
        1,
        "NaN or infinity for blk.0.attn_q.weight",
    ),
    "imatrix of other widths": (
        ["convert", "{}/base.gguf", "-o", "{}/o.gguf", "--quant", "Q4_0", "--imatrix", wide_imatrix],
        1,
        "96 values for blk.0.attn_q.weight, which needs 64",
    ),
    "infinite weights": (
        ["convert", infinite, "-o", "{}/o.gguf", "--quant", "Q8_0"],
        1,
        "'blk.0.ffn_down.weight' cannot be Q8_0",
    ),
    **{
        f"{what} in the header": (["convert", damaged(what), "-o", "{}/o.gguf", "--quant", "Q8_0"], 1, sentence)
        for what, sentence in {
            "many tensors": "1000 tensors",
            "long array": "claims",
            "five dims": "5 dimensions",
            "offset far": "truncated",
            "alignment 2^30": "1048576",
            "overlap": "overlaps 'v'",
            "type 200": "type 200",
        }.items()
    },
    "truncated": (["convert", truncated, "-o", "{}/o.gguf", "--quant", "Q8_0"], 1, "truncated"),
    "truncated base": (["merge", truncated, "{}/adapter", "-o", "{}/o.gguf"], 1, "truncated"),
    "folder for a file": (["merge", "{}/base.gguf", "{}/adapter", "-o", "{}/out"], 2, "becomes a .gguf file"),
    "over the base": (["merge", "{}/base.gguf", "{}/adapter", "-o", "{}/base.gguf", "--force"], 2, "over the input"),
    "exists": (["merge", "{}/base.gguf", "{}/adapter", "-o", "{}/base.gguf"], 2, ""),
    "dtype": (["merge", "{}/base.gguf", "{}/adapter", "-o", "{}/o.gguf", "--dtype", "f16"], 2, "use --quant"),
    "unknown architecture": (["merge", strange, "{}/adapter", "-o", "{}/o.gguf"], 1, "not known here"),
    "says little": (
        ["merge", says_little, "{}/adapter", "-o", "{}/o.gguf"],
        1,
        "metadata does not say 'wkv.head_size'",
    ),
    "no heads": (
        ["merge", no_heads, "{}/adapter", "-o", "{}/o.gguf"],
        1,
        "metadata does not say 'num_attention_heads'",
    ),
    "other base": (["merge", short, "{}/adapter", "-o", "{}/o.gguf"], 1, "another base"),
    "lora as base": (["merge", lora, "{}/adapter", "-o", "{}/o.gguf"], 2, "is a GGUF adapter"),
    "lora as model": (["convert", lora, "-o", "{}/o.gguf", "--quant", "Q8_0"], 2, "is a GGUF adapter"),
    "model as lora": (["convert", "{}/base.gguf", "--to", "peft", "--base", "{}/base.gguf", "-o", "{}/o"], 2, ""),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_a_sentence(
    name: str, base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, code, sentence = REFUSED[name]
    arguments = [one(tmp_path) if callable(one) else str(one).replace("{}", str(tmp_path)) for one in given]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    found, answer = command(arguments, capsys)
    text = f"{answer['error']['message']}; {answer['error']['hint']}"
    assert (found, sentence in text) == (code, True), text
    assert answer["error"]["hint"]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_adapter_with_a_module_that_is_not_there(base: Path, tmp_path: Path) -> None:
    import torch

    key = "base_model.model.model.layers.7.self_attn.q_proj"
    adapter = write_adapter(
        tmp_path / "far", {f"{key}.lora_A.weight": torch.ones(4, 64), f"{key}.lora_B.weight": torch.ones(64, 4)}
    )
    with pytest.raises(AdapterkitError, match=r"layers.7.self_attn.q_proj.*nearest: model.layers.*q_proj"):
        adapterkit.merge(base, [adapter], tmp_path / "o.gguf")


# ------------------------------------------------------------------ the command line


def test_inspect_and_dry_run(base: Path, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = command(["inspect", base], capsys)
    assert (code, found["architecture"], found["tensors"]) == (0, "llama", 11)
    assert found["details"]["name"] == "tiny"
    assert found["details"]["tokens"] == "3"
    code, found = command(["merge", base, adapter, "--quant", "Q4_K_M", "--dry-run"], capsys)
    assert (code, found["touched"], found["dry_run"]) == (0, 2, True)
    code, found = command(["convert", base, "-o", "x.gguf", "--quant", "Q8_0", "--dry-run"], capsys)
    assert (code, found["types"]) == (0, {"F32": 3, "Q8_0": 8})
    script = (
        "import sys\nfrom adapterkit.cli import main\n"
        f"try: main(['merge', {str(base)!r}, {str(adapter)!r}, '--dry-run', '--quant', 'Q8_0'])\n"
        "except SystemExit as end: assert not end.code\n"
        "print(sorted({'torch', 'transformers', 'numba'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_check(base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = command(["check", base, adapter], capsys)
    assert (code, found["touched"], found["ok"]) == (0, 2, True)
    code, found = command(["check", short(tmp_path), adapter], capsys)
    assert (code, found["ok"]) == (1, False)
    convert(base, tmp_path / "coarse.gguf", quantization=Quantization("Q4_0"))
    coarse = tmp_path / "coarse.gguf"
    refused, said = command(["merge", coarse, adapter, "-o", tmp_path / "m.gguf"], capsys)
    code, found = command(["check", coarse, adapter], capsys)
    assert (code, found["ok"]) == (refused, False) == (2, False)
    assert said["error"]["message"] in {finding["message"] for finding in found["findings"]}
    code, found = command(["check", coarse, adapter, "--yes-lossy"], capsys)
    assert (code, found["ok"]) == (0, True)


def test_headers_of_our_files_pass_our_own_reader(base: Path, adapter: Path, tmp_path: Path) -> None:
    convert(adapter, tmp_path / "lora.gguf", to="gguf-lora", base=base)
    data = (tmp_path / "lora.gguf").read_bytes()
    header = parse_gguf(lambda at, count: data[at : at + count], len(data), "lora")
    assert header["general.type"] == "adapter"
    assert header["adapter.lora.alpha"] == 8
    assert sorted(header.tensors) == [f"blk.{i}.attn_q.weight.lora_{side}" for i in range(2) for side in "ab"]


BESIDE = ("adapterkit.json", "adapterkit.intoto.json", "Modelfile")


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("what", ["file", "link"])
def test_what_lies_beside_is_not_replaced(name: str, what: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    """The files that belong to an output which is a file are outputs too."""
    out = tmp_path / "out.gguf"
    place, kept = out.with_name(f"out.gguf.{name}"), tmp_path / "kept"
    kept.write_text("mine")
    place.symlink_to(kept) if what == "link" else place.write_text("mine")

    def merge(**more: Any) -> Any:
        server = "ollama" if name == "Modelfile" else None
        return adapterkit.merge(base, [adapter], out, attest=True, server=server, **more)

    for more in ({}, {"dry_run": True}):
        with pytest.raises(OutputError, match=f"out.gguf.{name} exists"):
            merge(**more)
        assert not out.exists()
        assert place.read_text() == kept.read_text() == "mine"
    merge(force=True)
    assert out.exists()
    assert kept.read_text() == "mine"
    assert place.read_text() != "mine"
    assert not place.is_symlink()


def test_the_record_of_an_output_that_is_gone_is_replaced(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Who removes OUT.gguf and makes it again has not to know of the record beside it."""
    out, place = tmp_path / "out.gguf", tmp_path / "out.gguf.adapterkit.json"
    adapterkit.merge(base, [adapter], out)
    before = place.read_bytes()
    out.unlink()
    adapterkit.merge(base, [adapter], out, weights=[0.5], dry_run=True)
    adapterkit.merge(base, [adapter], out, weights=[0.5])
    assert place.read_bytes() != before
    with pytest.raises(OutputError, match=r"out.gguf exists"):
        adapterkit.merge(base, [adapter], out)


@pytest.mark.parametrize("split_first", [False, True])
def test_the_record_of_an_output_that_is_there_is_kept(
    split_first: bool, base: Path, adapter: Path, tmp_path: Path
) -> None:
    """OUT.gguf and OUT-00001-of-0000N.gguf are other files, and have one record."""
    out, place = tmp_path / "out.gguf", tmp_path / "out.gguf.adapterkit.json"
    split: dict[str, Any] = {"max_shard_size": "20KB"}
    first, second = (split, {}) if split_first else ({}, split)
    adapterkit.merge(base, [adapter], out, **first)
    there, before = sorted(tmp_path.glob("out*.gguf")), place.read_bytes()
    assert len(there) > 1 or not split_first
    for more in ({}, {"dry_run": True}):
        with pytest.raises(OutputError, match=r"out.gguf.adapterkit.json exists"):
            adapterkit.merge(base, [adapter], out, **second, **more)
    assert (sorted(tmp_path.glob("out*.gguf")), place.read_bytes()) == (there, before)


def test_a_record_that_appears_meanwhile_stays(base: Path, adapter: Path, tmp_path: Path) -> None:
    from adapterkit.checkpoint import write

    place, publish = tmp_path / "out.gguf.adapterkit.json", write.publish_files
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "publish_files", lambda *a, **k: (place.write_text("another"), publish(*a, **k)))
        with pytest.raises(OutputError, match="appeared while"):
            adapterkit.merge(base, [adapter], tmp_path / "out.gguf")
    assert place.read_text() == "another"
