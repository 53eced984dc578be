"""A part that is opened alone: its bytes are those of a whole run, and a slice that resolves otherwise is seen."""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from models import plain_adapter, random_tensors, read_bytes, read_tensors, write_adapter, write_checkpoint

import adapterkit
from adapterkit.checkpoint.plan import Plan
from adapterkit.errors import CheckpointError
from adapterkit.gguf import vocab
from adapterkit.verbs import outputs
from adapterkit.verbs.execute import OpenPlan
from adapterkit.verbs.sliced import PartOpener

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WIDTH = 32
SIZE = 8000  # bytes of work in a part


def llama(folder: Path, tied: bool = False, fused: bool = False, experts: int = 0, width: int = WIDTH) -> Path:
    """A Llama, Phi-3 (fused projections) or Mixtral (experts one by one) of two layers in three files."""
    wide = (2 * width, width)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (40, width)}
    for layer in range(2):
        lead = f"model.layers.{layer}."
        square = {"o_proj": (width, width)} | ({"qkv_proj": (3 * width, width)} if fused else {})
        square |= {} if fused else dict.fromkeys(("q_proj", "k_proj", "v_proj"), (width, width))
        shapes |= {f"{lead}self_attn.{name}.weight": shape for name, shape in square.items()}
        down = wide[::-1]
        if experts:
            shapes[f"{lead}block_sparse_moe.gate.weight"] = (experts, width)
            for one in range(experts):
                expert = {"w1": wide, "w2": down, "w3": wide}
                shapes |= {f"{lead}block_sparse_moe.experts.{one}.{n}.weight": s for n, s in expert.items()}
        else:
            some = {"gate_up_proj": (4 * width, width)} if fused else {"gate_proj": wide, "up_proj": wide}
            shapes |= {f"{lead}mlp.{name}.weight": shape for name, shape in (some | {"down_proj": down}).items()}
        shapes |= {f"{lead}{name}.weight": (width,) for name in ("input_layernorm", "post_attention_layernorm")}
    shapes["model.norm.weight"] = (width,)
    if not tied:
        shapes["lm_head.weight"] = (40, width)
    kind = "phi3" if fused else "mixtral" if experts else "llama"
    config = {
        "architectures": [{"phi3": "Phi3", "mixtral": "Mixtral", "llama": "Llama"}[kind] + "ForCausalLM"],
        "model_type": kind,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_hidden_layers": 2,
        "num_local_experts": experts,
        "tie_word_embeddings": tied,
        "vocab_size": 40,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
        "torch_dtype": "bfloat16",
    }
    return write_checkpoint(folder, random_tensors(shapes, "bfloat16"), config, 3)


def brings(folder: Path, rows: int, *modules: str) -> Path:
    """An adapter of one projection that brings whole modules with so many rows."""
    of_layer = "model.layers.0.self_attn.q_proj.lora_"
    shapes = {f"{of_layer}A.weight": (4, WIDTH), f"{of_layer}B.weight": (WIDTH, 4)}
    shapes |= {f"{'model.' * (name != 'lm_head')}{name}.weight": (rows, WIDTH) for name in modules}
    tensors = {f"base_model.model.{name}": tensor for name, tensor in random_tensors(shapes).items()}
    return write_adapter(folder, tensors, target_modules=["q_proj"], modules_to_save=list(modules))


def of_experts(folder: Path, base: Path) -> Path:
    """An adapter of the experts as transformers holds them: one stack, with factors for each."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(2):
        lead = f"base_model.model.model.layers.{layer}.mlp.experts."
        shapes |= {f"{lead}base_layer.lora_A.weight": (16, WIDTH), f"{lead}base_layer.lora_B.weight": (4 * WIDTH, 16)}
        shapes |= {f"{lead}lora_A.weight": (16, 2 * WIDTH), f"{lead}lora_B.weight": (WIDTH, 16)}
    said = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "target_modules": []}
    return write_adapter(folder, random_tensors(shapes), **said)


def read_vocab(files: Any, config: Any, *, rows: int, **how: Any) -> Any:
    """In the place of `adapterkit.gguf.vocab.read_vocab`: these models have no tokenizer."""
    from adapterkit.gguf.metadata import array, text
    from adapterkit.gguf.reader import I32, STRING

    tokens = [f"t{number}" for number in range(rows)]
    listed = (array("tokenizer.ggml.tokens", STRING, tokens), array("tokenizer.ggml.token_type", I32, [1] * rows))
    return vocab.Vocab((text("tokenizer.ggml.model", "llama"), *listed), rows)


def quantized(folder: Path, kind: str) -> Path:
    adapterkit.convert(llama(folder / "plain"), folder / kind, to=kind)
    return folder / kind


def turned(folder: Path) -> Path:
    """A base with its adapters: all linear layers of a Llama."""
    return plain_adapter(folder / "adapter", llama(folder / "base"), modules=LINEAR)


Made = tuple[Path, list[Path], Mapping[str, Any]]
KINDS: dict[str, Callable[[Path], Made]] = {
    "two adapters": lambda at: (
        at / "base",
        [turned(at), plain_adapter(at / "more", at / "base", modules=("q_proj",), seed=9, use_dora=False)],
        {"weights": (1.0, 0.5)},
    ),
    "tied": lambda at: (
        llama(at / "base", tied=True),
        [plain_adapter(at / "a", at / "base", modules=LINEAR)],
        {},
    ),
    "untied by the adapter": lambda at: (llama(at / "base", tied=True), [brings(at / "a", 40, "lm_head")], {}),
    "brings a head": lambda at: (llama(at / "base"), [brings(at / "a", 40, "lm_head")], {}),
    "resized": lambda at: (llama(at / "base"), [brings(at / "a", 44, "lm_head", "embed_tokens")], {}),
    "another dtype": lambda at: (at / "base", [turned(at)], {"dtype": "f32"}),
    "fused projections": lambda at: (
        llama(at / "base", fused=True),
        [plain_adapter(at / "a", at / "base", modules=("qkv_proj", "gate_up_proj"))],
        {},
    ),
    "stacked experts": lambda at: (
        llama(at / "base", experts=4),
        [of_experts(at / "a", at / "base")],
        {},
    ),
    "NF4 decoded": lambda at: (quantized(at, "nf4"), [plain_adapter(at / "a", at / "plain", modules=LINEAR)], {}),
    "MXFP4 kept": lambda at: (
        quantized(at, "mxfp4"),
        [plain_adapter(at / "a", at / "plain", modules=LINEAR)],
        {"quant": "keep"},
    ),
    "written as NF4": lambda at: (at / "base", [turned(at)], {"quant": "nf4"}),
    "GGUF": lambda at: (at / "base", [turned(at)], {"quant": "Q8_0", "to": "gguf"}),
    "split GGUF": lambda at: (at / "base", [turned(at)], {"quant": "BF16", "to": "gguf", "max_shard_size": "20KB"}),
}
# Of these a slice comes out otherwise in some parts: tensors that an adapter brings, among others that are out of sight.
SEEN = {"brings a head", "resized"}


def in_parts(plan: Plan, out: Path, size: int) -> tuple[int, int]:
    """Execute every part by a worker of its own, as a process would be, and make the output.

    Returns:
        How many parts there are, and for how many of them the whole plan was opened.
    """
    count, whole = len(OpenPlan(plan, out, size).parts), 0
    for index in reversed(range(count)):
        worker = OpenPlan(plan, out, size)
        worker.execute(index)
        whole += "job" in vars(worker)
    OpenPlan(plan, out, size).finish()
    return count, whole


def files_of(out: Path) -> dict[str, bytes]:
    """The weights of an output: of a folder, of a file, or of several that are numbered, without its name."""
    if out.is_dir():
        return read_bytes(out)
    return {path.name.removeprefix(out.stem): path.read_bytes() for path in out.parent.glob(f"{out.stem}*.gguf")}


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_by_itself_has_the_bytes_of_a_whole_run(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(vocab, "read_vocab", read_vocab)
    base, adapters, how = KINDS[kind](tmp_path)
    suffix = ".gguf" if how.get("to") == "gguf" else ""
    adapterkit.merge(base, adapters, tmp_path / f"whole{suffix}", **how)
    adapterkit.merge(base, adapters, save_plan=tmp_path / "plan.json", **how)
    plan, out = Plan.from_json((tmp_path / "plan.json").read_bytes()), tmp_path / f"parts{suffix}"
    caplog.set_level(logging.DEBUG, "adapterkit.slices")
    count, whole = in_parts(plan, out, SIZE)
    assert files_of(out) == files_of(tmp_path / f"whole{suffix}")
    assert len(files_of(out)) > 1 or kind == "GGUF"
    assert count > 3
    assert (whole > 0) == (kind in SEEN), caplog.text
    assert whole <= count / 2
    if kind == "resized":
        assert "is planned otherwise" in caplog.text


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose rows are long enough for K-quants, the same in NF4, and an importance matrix of some of its weights."""
    place = tmp_path_factory.mktemp("wide")
    base = llama(place / "base", width=256)
    adapterkit.convert(base, place / "nf4", to="nf4")
    generator = torch.Generator().manual_seed(0)
    entries = [("blk.0.ffn_down", 512), ("blk.0.attn_q", 256), ("blk.1.attn_v", 256), ("blk.1.ffn_up", 256)]
    data = struct.pack("<i", len(entries))
    for name, columns in entries:
        spelled, values = f"{name}.weight".encode(), torch.rand(columns, generator=generator) + 0.1
        data += struct.pack("<i", len(spelled)) + spelled + struct.pack(f"<ii{columns}f", 1, columns, *values.tolist())
    (place / "imatrix.dat").write_bytes(data)
    return place


MIXED = {"quant": "Q4_K_M", "imatrix": "imatrix.dat", "tensor_types": [("blk.1.attn_q", "F16"), ("ffn_up", "Q8_0")]}
CONVERSIONS: dict[str, tuple[str, int, dict[str, Any]]] = {  # what is converted, and the work of a part
    "16 bits": ("base", 800_000, {"to": "f16"}),
    "int4": ("base", 500_000, {"to": "int4"}),
    "NF4 decoded": ("nf4", 1_000_000, {"to": "bf16"}),
    "Q8_0": ("base", 4_000_000, {"to": "gguf", "quant": "Q8_0"}),
    "split GGUF of several types": ("base", 4_000_000, {"to": "gguf", "max_shard_size": "600KB", **MIXED}),
}
# Of these every part needs the whole plan: a pattern has to name a tensor that is there, and a mix of types counts layers.
OF_ALL = {"split GGUF of several types"}


@pytest.mark.parametrize("kind", CONVERSIONS)
def test_every_part_of_a_conversion_by_itself_has_the_bytes_of_a_whole_run(
    kind: str, wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(vocab, "read_vocab", read_vocab)
    name, size, asked = CONVERSIONS[kind]
    how = {key: wide / value if key == "imatrix" else value for key, value in asked.items()}
    suffix = ".gguf" if how["to"] == "gguf" else ""
    adapterkit.convert(wide / name, tmp_path / f"whole{suffix}", **how)
    adapterkit.convert(wide / name, save_plan=tmp_path / "plan.json", **how)
    caplog.set_level(logging.DEBUG, "adapterkit.slices")
    out = tmp_path / f"parts{suffix}"
    count, whole = in_parts(Plan.from_json((tmp_path / "plan.json").read_bytes()), out, size)
    assert files_of(out) == files_of(tmp_path / f"whole{suffix}")
    assert count > 3
    assert whole == (count if kind in OF_ALL else 0), caplog.text


@pytest.mark.parametrize(
    ("option", "before", "after"),
    [
        ("metadata", '{"general.author": "a"}', '{"general.author": "b"}'),
        ("tensor_type_file", "ffn_up=Q8_0", "ffn_up=Q4_0"),
    ],
)
def test_a_file_that_an_option_names_is_named_when_it_changes(
    option: str, before: str, after: str, wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocab, "read_vocab", read_vocab)
    file, plan = tmp_path / "said", tmp_path / "plan.json"
    file.write_text(before)
    adapterkit.convert(wide / "base", save_plan=plan, to="gguf", quant="Q5_0", **{option: file})
    file.write_text(after)
    with pytest.raises(CheckpointError, match="said changed since the plan was made"):
        OpenPlan(Plan.from_json(plan.read_bytes()), tmp_path / "out.gguf", SIZE).execute(0)


def test_what_resolves_otherwise_in_a_slice_is_opened_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a rule that looks at all names: same names, shapes, types and words, other values. The digest alone tells."""
    from dataclasses import replace

    from adapterkit.adapters.config import AdapterConfig

    adapter = turned(tmp_path)
    fold, whole = outputs.fold, len(read_tensors(tmp_path / "base"))

    def strange(base: Any, adapters: Any, *given: Any, **how: Any) -> Any:
        if len(base) < whole:
            louder = {"lora_alpha": 64}
            adapters = [replace(one, config=AdapterConfig({**one.config.raw, **louder}, "a")) for one in adapters]
        return fold(base, adapters, *given, **how)

    monkeypatch.setattr(outputs, "fold", strange)
    adapterkit.merge(tmp_path / "base", adapter, tmp_path / "whole")
    adapterkit.merge(tmp_path / "base", adapter, save_plan=tmp_path / "plan.json")
    plan = Plan.from_json((tmp_path / "plan.json").read_bytes())
    caplog.set_level(logging.DEBUG, "adapterkit.slices")
    for index in range(len(OpenPlan(plan, tmp_path / "parts").parts)):
        OpenPlan(plan, tmp_path / "parts").execute(index)
    assert caplog.text.count("is resolved otherwise") == len(plan.files)
    OpenPlan(plan, tmp_path / "parts").finish()
    assert read_bytes(tmp_path / "parts") == read_bytes(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["rule", "results"])
def test_what_needs_whole_inputs_is_not_tried_with_less(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan says nothing of its parts then, so no worker pays for an attempt."""
    adapter, out, saved = turned(tmp_path), tmp_path / "out", tmp_path / "plan.json"
    more = plain_adapter(tmp_path / "more", tmp_path / "base", modules=LINEAR, seed=9)
    if kind == "rule":
        adapterkit.merge(tmp_path / "base", [adapter, more], save_plan=saved, method="ties")
    else:
        adapterkit.resize(more, rank=2, save_plan=saved)
    plan = Plan.from_json(saved.read_bytes())
    assert not plan.slices
    monkeypatch.setattr(PartOpener, "_sliced", lambda self, *given: pytest.fail("tried"))
    worker = OpenPlan(plan, out, SIZE)
    worker.execute(len(worker.parts) - 1)


def test_a_brought_tensor_is_alone_in_its_group(tmp_path: Path) -> None:
    """A head that the adapter brings: those around it are opened alone."""
    base, adapter = llama(tmp_path / "base"), brings(tmp_path / "a", 40, "lm_head")
    adapterkit.merge(base, adapter, save_plan=tmp_path / "plan.json", max_shard_size="1GB")
    plan = Plan.from_json((tmp_path / "plan.json").read_bytes())
    held = {
        tuple(step.tensor for step in file.steps[group.first : group.first + group.count] if step.source is None)
        for file in plan.files
        for group in plan.slices.get(file.name, ())
    }
    assert held == {("lm_head.weight",), ("model.layers.0.self_attn.q_proj.weight",)}


def test_a_worker_that_executes_many_parts_opens_the_whole_plan_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When slices have taken as long as the whole takes, no more are opened."""
    import adapterkit.verbs.sliced as module

    adapter = turned(tmp_path)
    adapterkit.merge(tmp_path / "base", adapter, save_plan=tmp_path / "plan.json")
    worker = OpenPlan(Plan.from_json((tmp_path / "plan.json").read_bytes()), tmp_path / "parts", SIZE)
    monkeypatch.setattr(module, "LEAST", 0.0)
    monkeypatch.setattr(module, "A_TENSOR", 1e-9)
    asked: list[object] = []
    opened = PartOpener._sliced
    monkeypatch.setattr(PartOpener, "_sliced", lambda self, *given: asked.append(given) or opened(self, *given))
    for index in range(len(worker.parts)):
        worker.execute(index)
    assert len(asked) == 1
    worker.finish()


@pytest.mark.parametrize("file", ["base/config.json", "adapter/adapter_config.json", "base/tokenizer_config.json"])
def test_a_small_file_that_changes_between_two_parts_is_named(file: str, tmp_path: Path) -> None:
    """At every door that goes on with a plan. Its weights are the same, so nothing else would tell."""
    adapter = turned(tmp_path)
    (tmp_path / "base/tokenizer_config.json").write_text("{}")
    out, plan = tmp_path / "out", tmp_path / "plan.json"
    adapterkit.merge(tmp_path / "base", adapter, save_plan=plan)
    opened = OpenPlan(Plan.from_json(plan.read_bytes()), out, SIZE)
    opened.execute(0)
    said = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps({**said, "lora_alpha": 4, "rope_theta": 7.0}))
    again = OpenPlan(opened.plan, out, SIZE)
    doors: tuple[Callable[[], Any], ...] = (
        lambda: again.execute(1),
        lambda: OpenPlan(opened.plan, out, SIZE).finish(),
        lambda: adapterkit.execute(opened.plan, out) if hasattr(adapterkit, "execute") else again.execute(1),
        lambda: adapterkit.run(plan, out, on="local", workers="1"),
        lambda: adapterkit.run(plan, out, on="slurm", workers="2"),
        lambda: adapterkit.run(plan, out, task=0, tasks=1),
    )
    for door in doors:
        with pytest.raises(CheckpointError, match=rf"{file} changed since the plan was made"):
            door()
    assert not out.exists()
    (tmp_path / file).unlink()
    with pytest.raises(adapterkit.AdapterkitError, match=rf"{file} is gone since the plan was made"):
        OpenPlan(opened.plan, out, SIZE).execute(1)


def test_what_cannot_be_described_has_no_digest() -> None:
    """A handle that holds a whole model, or asks for another parameter while it computes, is never taken from a slice."""
    from functools import partial

    from adapterkit.adapters.target import Piece, Target
    from adapterkit.checkpoint.resolved import Describer, UndescribedError
    from adapterkit.checkpoint.tensor import Renamed
    from adapterkit.gguf.arch.views import Constant

    def holding(held: object) -> Renamed:
        found = Renamed("x", Constant("c", [1.0]))
        found.held = held  # type: ignore[attr-defined]
        return found

    def digest(held: object) -> str:
        return Describer().digest([holding(held)])[0]

    target = Target("p", (1,), (Piece("t", 1),))
    circle: list[object] = []
    circle.append(holding(circle))
    Word, Words = type("Word", (str,), {}), type("Words", (tuple,), {})
    for held in (Word("x"), Words("xy"), dict.fromkeys(range(5000)), lambda: target, circle, iter(())):
        with pytest.raises((UndescribedError, RecursionError)):
            digest(held)
    one = 1.0
    different = [digest(lambda: one), digest(partial(max, 1)), digest(partial(max, 2)), digest({1, 2}), digest({1: 2})]
    different += [digest(torch.zeros(2)), digest(torch.ones(2)), digest(torch.zeros(2).bfloat16()), digest((1, 2))]
    assert len(set(different)) == len(different)
