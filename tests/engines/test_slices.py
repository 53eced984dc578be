"""A part that is opened alone: its bytes are those of a whole run, and a slice that resolves otherwise is seen."""

from __future__ import annotations

import json
import logging
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


def llama(folder: Path, tied: bool = False, fused: bool = False, experts: int = 0) -> Path:
    """A Llama, Phi-3 (fused projections) or Mixtral (experts one by one) of two layers in three files."""
    wide = (2 * WIDTH, WIDTH)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (40, WIDTH)}
    for layer in range(2):
        lead = f"model.layers.{layer}."
        square = {"o_proj": (WIDTH, WIDTH)} | ({"qkv_proj": (3 * WIDTH, WIDTH)} if fused else {})
        square |= {} if fused else dict.fromkeys(("q_proj", "k_proj", "v_proj"), (WIDTH, WIDTH))
        shapes |= {f"{lead}self_attn.{name}.weight": shape for name, shape in square.items()}
        down = wide[::-1]
        if experts:
            shapes[f"{lead}block_sparse_moe.gate.weight"] = (experts, WIDTH)
            for one in range(experts):
                expert = {"w1": wide, "w2": down, "w3": wide}
                shapes |= {f"{lead}block_sparse_moe.experts.{one}.{n}.weight": s for n, s in expert.items()}
        else:
            some = {"gate_up_proj": (4 * WIDTH, WIDTH)} if fused else {"gate_proj": wide, "up_proj": wide}
            shapes |= {f"{lead}mlp.{name}.weight": shape for name, shape in (some | {"down_proj": down}).items()}
        shapes |= {f"{lead}{name}.weight": (WIDTH,) for name in ("input_layernorm", "post_attention_layernorm")}
    shapes["model.norm.weight"] = (WIDTH,)
    if not tied:
        shapes["lm_head.weight"] = (40, WIDTH)
    kind = "phi3" if fused else "mixtral" if experts else "llama"
    config = {
        "architectures": [{"phi3": "Phi3", "mixtral": "Mixtral", "llama": "Llama"}[kind] + "ForCausalLM"],
        "model_type": kind,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
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
    "FP8 kept": lambda at: (
        quantized(at, "fp8-block"),
        [plain_adapter(at / "a", at / "plain", modules=LINEAR)],
        {"quant": "keep"},
    ),
    "written as NF4": lambda at: (at / "base", [turned(at)], {"quant": "nf4"}),
    "GGUF": lambda at: (at / "base", [turned(at)], {"quant": "Q8_0", "to": "gguf"}),
    "split GGUF": lambda at: (at / "base", [turned(at)], {"quant": "BF16", "to": "gguf", "max_shard_size": "20KB"}),
}
# Of these a slice comes out otherwise in some parts: tensors that an adapter brings, among others that are out of sight.
SEEN = {"brings a head", "resized"}


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
    count = len(OpenPlan(plan, out, SIZE).parts)
    whole = 0
    for index in reversed(range(count)):
        worker = OpenPlan(plan, out, SIZE)  # each as a process of its own would
        worker.execute(index)
        whole += "job" in vars(worker)
    OpenPlan(plan, out, SIZE).finish()
    if suffix:
        made, wanted = (
            {p.name.replace(lead, ""): p.read_bytes() for p in tmp_path.glob(f"{lead}*.gguf")}
            for lead in ("parts", "whole")
        )
        assert made == wanted
        assert len(made) > 1 or kind == "GGUF"
    else:
        assert read_bytes(out) == read_bytes(tmp_path / "whole")
    assert count > 3
    assert (whole > 0) == (kind in SEEN), caplog.text
    assert whole <= count / 2
    if kind == "resized":
        assert "is resolved otherwise" in caplog.text


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
    for held in (dict.fromkeys(range(5000)), lambda: target, circle, iter(())):
        with pytest.raises((UndescribedError, RecursionError)):
            digest(held)
    one = 1.0
    different = [digest(lambda: one), digest(partial(max, 1)), digest(partial(max, 2)), digest({1, 2}), digest({1: 2})]
    different += [digest(torch.zeros(2)), digest(torch.ones(2)), digest(torch.zeros(2).bfloat16()), digest((1, 2))]
    assert len(set(different)) == len(different)
