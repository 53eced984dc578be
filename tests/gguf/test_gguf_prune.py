"""Layers that are left out of a GGUF file: it computes what the model computes without them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import arch_zoo as zoo
import pytest
from gguf_runtime import far, logprobs, of_model

import adapterkit.gguf.vocab
from adapterkit.errors import AdapterkitError, TargetError, UsageError
from adapterkit.gguf.prune import layers_of
from adapterkit.verbs.convert import convert


@pytest.fixture(autouse=True)
def _no_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapterkit.gguf.vocab, "read_vocab", zoo.read_vocab)


def _build(folder: Path, kind: str, **change: Any) -> Any:
    tiny = zoo.ZOO[kind]
    zoo.ZOO["changed"] = replace(tiny, config={**tiny.config, **change})
    return zoo.build(folder, "changed")


KINDS = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("kind", "change", "layers"),
    [
        ("llama", {"num_hidden_layers": 4}, "1-2"),
        ("llama", {"num_hidden_layers": 3}, "0"),
        ("apertus", {"num_hidden_layers": 4}, "2"),
        ("mellum", {"num_hidden_layers": 4, "layer_types": KINDS, "sliding_window": 3}, "1"),
    ],
)
def test_the_others_compute_what_they_computed(kind: str, change: dict[str, Any], layers: str, tmp_path: Path) -> None:
    from torch.nn import ModuleList

    model = _build(tmp_path / "hf", kind, **change)
    convert(tmp_path / "hf", tmp_path / "whole.gguf")
    convert(tmp_path / "whole.gguf", tmp_path / "o.gguf", prune_layers=layers)
    gone = layers_of(layers)
    kept = [layer for number, layer in enumerate(model.model.layers) if number not in gone]
    for number, layer in enumerate(kept):
        layer.self_attn.layer_idx = number
    model.model.layers = ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    if "layer_types" in change:
        model.config.layer_types = [one for number, one in enumerate(KINDS) if number not in gone]
    assert far(logprobs(tmp_path / "o.gguf")[0], of_model(model)) < 1e-5
    convert(tmp_path / "o.gguf", tmp_path / "back", to="hf")


def test_layers_that_differ_by_their_place_are_refused(tmp_path: Path) -> None:
    for kind, words in (
        ("gemma3", "apart by their place"),
        ("jamba", "hold other tensors"),
        ("smollm3", "by their place"),
    ):
        file = tmp_path / f"{kind}.gguf"
        zoo.build(tmp_path / kind, kind)
        convert(tmp_path / kind, file)
        with pytest.raises(TargetError, match=words):
            convert(file, tmp_path / "o.gguf", prune_layers="1")
    zoo.build(tmp_path / "hf", "llama")
    convert(tmp_path / "hf", tmp_path / "m.gguf")
    (tmp_path / "i.dat").write_bytes(b"")
    wrong: tuple[tuple[Path, dict[str, Any], str], ...] = (
        (tmp_path / "m.gguf", {"prune_layers": "2"}, "no layer 2"),
        (tmp_path / "m.gguf", {"prune_layers": "0,1"}, "none left"),
        (tmp_path / "m.gguf", {"prune_layers": "1-0"}, "no list of layers"),
        (tmp_path / "m.gguf", {"prune_layers": "x"}, "no list of layers"),
        (tmp_path / "m.gguf", {"prune_layers": "1", "quant": "Q4_0", "imatrix": tmp_path / "i.dat"}, "of all layers"),
        (tmp_path / "hf", {"prune_layers": "1"}, "left out of a GGUF file"),
    )
    for source, given, words in wrong:
        with pytest.raises(AdapterkitError, match=words) as raised:
            convert(source, tmp_path / "o.gguf", **given)
        assert isinstance(raised.value, UsageError), words
    assert not (tmp_path / "o.gguf").exists()
    convert(tmp_path / "m.gguf", tmp_path / "copy.gguf", quant="copy")  # llama-quantize's word
    assert (tmp_path / "copy.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()


def test_metadata_and_tokenizer_alone(tmp_path: Path) -> None:
    from gguf import GGUFReader

    zoo.build(tmp_path / "hf", "llama")
    convert(tmp_path / "hf", tmp_path / "whole.gguf")
    convert(tmp_path / "hf", tmp_path / "o.gguf", vocab_only=True)
    whole, alone = GGUFReader(str(tmp_path / "whole.gguf")), GGUFReader(str(tmp_path / "o.gguf"))
    assert not alone.tensors
    gone = {"general.file_type", "general.quantization_version"}
    names = [name for name in whole.fields if not name.startswith("GGUF.") and name not in gone]
    assert [name for name in alone.fields if not name.startswith("GGUF.")] == names
    assert all(alone.fields[name].contents() == whole.fields[name].contents() for name in names)
    for source, given in ((tmp_path / "whole.gguf", {}), (tmp_path / "hf", {"quant": "Q8_0"})):
        with pytest.raises(UsageError):
            convert(source, tmp_path / "p.gguf", vocab_only=True, **given)
