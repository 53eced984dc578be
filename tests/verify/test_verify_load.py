"""``verify --level load``: the folder is built by its own class on the meta device.

Each mistake is made by hand in a folder that was right; what it is called stands beside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_adapter, plain_adapter, read_tensors
from safetensors.torch import save_file

import adapterkit
from adapterkit.verbs.verify import verify

pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def right(make_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A masked language model, and an adapter with a head of three labels for it."""
    import transformers
    from peft import LoraConfig

    folder = tmp_path_factory.mktemp("load")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.RobertaConfig(vocab_size=99, max_position_embeddings=40, type_vocab_size=1, **sizes)
    transformers.RobertaForMaskedLM(config).save_pretrained(folder / "base")
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False)
    cls = transformers.RobertaForSequenceClassification
    make_adapter(folder / "adapter", lambda: cls.from_pretrained(folder / "base", num_labels=3), lora)
    return folder / "base", folder / "adapter"


def changed(out: Path, **config: Any) -> None:
    file = out / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))


def kinds(out: Path, base: Path, adapter: Path, level: str = "load") -> dict[str, str]:
    report = verify(out, base=base, adapters=[adapter], level=level)
    assert report.ok is not any(one.severity == "error" for one in report.findings)
    return {one.kind: one.severity for one in report.findings if one.severity != "note"}


def test_our_own_folder_loads(right: tuple[Path, Path], tmp_path: Path) -> None:
    adapterkit.merge(right[0], [right[1]], tmp_path / "out")
    assert kinds(tmp_path / "out", *right) == {}
    report = verify(tmp_path / "out", base=right[0], adapters=[right[1]], level="load")
    assert report.tensors is None
    notes = [one.text for one in report.findings]
    assert any("does not read lm_head." in text and "which the base has too" in text for text in notes), notes


LABELS = {str(i): f"LABEL_{i}" for i in range(32)}
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "labels of the first layer": (
        {"id2label": LABELS, "label2id": {v: int(k) for k, v in LABELS.items()}},
        "other shape",
    ),
    "class of the base": ({"architectures": ["RobertaForMaskedLM"]}, "unread key"),
    "class of another task": ({"architectures": ["RobertaForTokenClassification"]}, "unread key"),
    "deeper": ({"num_hidden_layers": 2}, "missing key"),
}


@pytest.mark.parametrize("level", ["load", "tensors"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_config_that_lies(mistake: str, level: str, right: tuple[Path, Path], tmp_path: Path) -> None:
    adapterkit.merge(right[0], [right[1]], tmp_path / "out")
    config, kind = MISTAKES[mistake]
    changed(tmp_path / "out", **config)
    assert kinds(tmp_path / "out", *right, level=level).get(kind) == "error"


def test_a_class_that_nobody_knows_is_said(right: tuple[Path, Path], tmp_path: Path) -> None:
    adapterkit.merge(right[0], [right[1]], tmp_path / "out")
    changed(tmp_path / "out", architectures=["OurOwnForEverything"])
    report = verify(tmp_path / "out", base=right[0], adapters=[right[1]], level="load")
    (said,) = [one for one in report.findings if one.kind == "not loaded"]
    assert "OurOwnForEverything" in said.text
    assert said.severity == "note"


@pytest.mark.parametrize("name", ["num_hidden_layers", "n_layer", "text_config"])
def test_a_config_of_a_billion_layers_is_not_built(name: str, right: tuple[Path, Path], tmp_path: Path) -> None:
    """transformers would, until memory runs out."""
    adapterkit.merge(right[0], [right[1]], tmp_path / "out")
    changed(tmp_path / "out", **{name: {"num_layers": 10**9} if name == "text_config" else 10**9})
    report = verify(tmp_path / "out", base=right[0], adapters=[right[1]], level="load")
    assert any("says 1,000,000,000 layers, and MERGED holds" in one.text for one in report.findings)
    assert not report.ok


def test_weights_that_are_converted_while_they_are_loaded(make_base: Callable[..., Path], tmp_path: Path) -> None:
    """transformers' own sentence reads like a fault of the folder, which loads."""
    pytest.importorskip("bitsandbytes")
    base = make_base(hidden_size=64, intermediate_size=64)
    adapter = plain_adapter(tmp_path / "adapter", base)
    adapterkit.merge(base, [adapter], tmp_path / "out", quant="nf4", yes_lossy=True)
    report = verify(tmp_path / "out", base=base, adapters=[adapter], level="load")
    (said,) = [one for one in report.findings if one.kind == "not loaded"]
    assert said.severity == "note"
    assert "no class of bitsandbytes weights without loading them" in said.text
    import transformers

    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters() > 0


def test_code_of_the_folder_is_not_run(right: tuple[Path, Path], tmp_path: Path) -> None:
    adapterkit.merge(right[0], [right[1]], tmp_path / "out")
    (tmp_path / "out" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    auto = {"AutoConfig": "evil.C", "AutoModelForSequenceClassification": "evil.M"}
    changed(tmp_path / "out", auto_map=auto, model_type="unheard_of", architectures=["M"])
    verify(tmp_path / "out", base=right[0], adapters=[right[1]], level="load")
    assert not (tmp_path / "ran").exists()


def test_without_transformers_a_note_says_so(
    right: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adapterkit.verbs.verify import load

    adapterkit.merge(right[0], [right[1]], tmp_path / "out")
    monkeypatch.setattr(load, "find_spec", lambda name: None)
    report = verify(tmp_path / "out", base=right[0], adapters=[right[1]], level="load")
    assert report.ok
    assert any("not installed" in one.text for one in report.findings)


def test_a_bert_whose_decoder_lost_its_bias(tmp_path: Path) -> None:
    """Untied, BERT has a bias of its own in the decoder, which a loader would fill with nothing."""
    import transformers
    from peft import LoraConfig

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=99, max_position_embeddings=40, **sizes))
    model.save_pretrained(tmp_path / "base")
    lora = LoraConfig(target_modules=["word_embeddings"], init_lora_weights=False)
    make_adapter(tmp_path / "adapter", tmp_path / "base", lora)
    adapterkit.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    assert kinds(tmp_path / "out", tmp_path / "base", tmp_path / "adapter") == {}
    tensors = read_tensors(tmp_path / "out")
    del tensors["cls.predictions.decoder.bias"]
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    found = kinds(tmp_path / "out", tmp_path / "base", tmp_path / "adapter")
    assert "error" in found.values()


BASE, TRAINED = "BASE {{ messages }}", "TRAINED {{ messages }}"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"chat_template.jinja": BASE}, "differ"),
        ({"tokenizer_config.json": json.dumps({"chat_template": BASE})}, "not that"),
    ],
    ids=["both forms", "the base's"],
)
def test_the_base_s_chat_template(
    wrong: dict[str, str], said: str, make_base: Callable[..., Path], tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(make_base("llama"), tmp_path / "base")
    adapter = plain_adapter(tmp_path / "adapter", tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").write_text(BASE)
    (adapter / "tokenizer_config.json").write_text(json.dumps({"chat_template": TRAINED}))
    adapterkit.merge(tmp_path / "base", [adapter], tmp_path / "out")
    assert "chat template" not in kinds(tmp_path / "out", tmp_path / "base", adapter)
    for name, text in wrong.items():
        (tmp_path / "out" / name).write_text(text)
    report = verify(tmp_path / "out", base=tmp_path / "base", adapters=[adapter], level="load")
    (finding,) = [one for one in report.findings if one.kind == "chat template"]
    assert finding.severity == "error"
    assert said in finding.text


def test_a_tokenizer_with_other_added_tokens(make_base: Callable[..., Path], tmp_path: Path) -> None:
    import shutil

    shutil.copytree(make_base("llama"), tmp_path / "base")
    adapter = plain_adapter(tmp_path / "adapter", tmp_path / "base")

    def words(added: int) -> str:
        return json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "<x>", "id": added}]})

    (adapter / "tokenizer.json").write_text(words(1))
    adapterkit.merge(tmp_path / "base", [adapter], tmp_path / "out")
    assert "tokenizer" not in kinds(tmp_path / "out", tmp_path / "base", adapter)
    (tmp_path / "out" / "tokenizer.json").write_text(words(2))
    assert kinds(tmp_path / "out", tmp_path / "base", adapter)["tokenizer"] == "error"


def test_nothing_is_left_in_memory(right: tuple[Path, Path], tmp_path: Path) -> None:
    """The class is built on the meta device: no parameter has values."""
    from transformers import RobertaForSequenceClassification

    from adapterkit.verbs.verify.load import _told

    adapterkit.merge(right[0], [right[1]], tmp_path / "out")
    made: list[Any] = []
    original = RobertaForSequenceClassification.__init__

    class Watched(RobertaForSequenceClassification):
        def __init__(self, config: Any) -> None:
            original(self, config)
            made.append(self)

    assert not isinstance(_told(Watched, tmp_path / "out"), str)
    assert {parameter.device for parameter in made[0].parameters()} == {torch.device("meta")}


def test_bars_of_other_libraries_are_not_shown(right: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """compressed-tensors draws its own, which no switch of transformers ends."""
    import sys

    from transformers import RobertaForSequenceClassification

    from adapterkit.verbs.verify.load import _told

    class Loud(RobertaForSequenceClassification):
        def __init__(self, config: Any) -> None:
            print("Applying quantization config:   0%", file=sys.stderr)
            super().__init__(config)

    assert not isinstance(_told(Loud, right[0]), str)
    assert "Applying" not in capsys.readouterr().err
