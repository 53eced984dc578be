"""Adapters and heads on their way into GGUF and out of it: what a LoRA file may hold, GGUF LoRA as input, pooling, poolers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import arch_zoo as zoo
import pytest
import torch
from gguf import GGUFReader
from gguf_files import random_array, write_gguf
from gguf_runtime import embeddings, embeddings_of, far, live, logprobs, lora, of_model
from models import load_model, make_adapter
from safetensors.torch import load_file, save_file

import adapterkit
import adapterkit.gguf.vocab
from adapterkit.bases import open_model
from adapterkit.checkpoint.decoded import dequantized
from adapterkit.cli import main
from adapterkit.errors import AdapterkitError, CheckFailed, CheckpointError, UnsupportedAdapter, UsageError
from adapterkit.gguf.checkpoint import open_gguf
from adapterkit.gguf.describe import details
from adapterkit.gguf.encode import decode, encode
from adapterkit.gguf.grids import few_bits, on_four_bits
from adapterkit.verbs.check import check
from adapterkit.verbs.convert import convert

_ST = "sentence_transformers.models"


@pytest.fixture(autouse=True)
def _no_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapterkit.gguf.vocab, "read_vocab", zoo.read_vocab)


def _keys(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(str(file)).fields.items()}


@pytest.mark.parametrize("module", ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "lm_head"])
def test_a_lora_that_the_runtime_would_not_look_for_is_refused(module: str, tmp_path: Path) -> None:
    zoo.build(tmp_path / "hf", "deepseek_v3")
    adapter = make_adapter(tmp_path / "a", tmp_path / "hf", lora(target_modules=[module]), scale=0.1)
    with pytest.raises(
        UnsupportedAdapter, match=r"applies no LoRA to .* in a deepseek2 as it was trained; merge it instead"
    ):
        convert(adapter, tmp_path / "a.gguf", to="gguf-lora", base=tmp_path / "hf")


@pytest.mark.parametrize(
    ("how", "tolerance"), [({"dtype": "f16"}, 2e-3), ({"dtype": "bf16"}, 2e-2), ({"quant": "Q8_0"}, 3e-2)]
)
def test_factors_in_fewer_bits(how: dict[str, str], tolerance: float, tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    zoo.build(hf, "llama")
    adapter = make_adapter(tmp_path / "a", hf, lora(r=32), scale=0.1)
    convert(hf, tmp_path / "b.gguf")
    wide = convert(adapter, tmp_path / "wide.gguf", to="gguf-lora", base=hf)
    small = convert(adapter, tmp_path / "small.gguf", to="gguf-lora", base=hf, **how)
    assert small.nbytes < 0.7 * wide.nbytes
    found, plain = logprobs(tmp_path / "b.gguf", lora=tmp_path / "small.gguf")[0], logprobs(tmp_path / "b.gguf")[0]
    expected = live(hf, adapter)
    assert far(found, expected) < tolerance < far(plain, expected)


def test_an_alora_keeps_its_invocation_tokens(tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    zoo.build(hf, "llama")
    adapter = make_adapter(tmp_path / "a", hf, lora(), scale=0.1)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "alora_invocation_tokens": [5, 17]}))
    convert(adapter, tmp_path / "a.gguf", to="gguf-lora", base=hf)
    assert _keys(tmp_path / "a.gguf")["adapter.alora.invocation_tokens"] == [5, 17]
    with pytest.raises(AdapterkitError, match="is an aLoRA"):
        adapterkit.merge(hf, [tmp_path / "a.gguf"], tmp_path / "out")
    convert(tmp_path / "a.gguf", tmp_path / "back", to="peft", base=hf)
    assert json.loads((tmp_path / "back/adapter_config.json").read_text())["alora_invocation_tokens"] == [5, 17]
    convert(hf, tmp_path / "b.gguf")
    convert(tmp_path / "a.gguf", tmp_path / "again", to="peft", base=tmp_path / "b.gguf")
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("back", "again")]
    assert weights[0] == weights[1]
    said = details(open_gguf(tmp_path / "a.gguf"))
    assert (said["rank"], said["invocation"]) == ("4", "5, 17")


def test_types_by_the_converters_word(tmp_path: Path) -> None:
    """``--outtype`` of llama.cpp's converters is the float type or the quantization here."""
    hf = tmp_path / "hf"
    zoo.build(hf, "llama")
    adapter = make_adapter(tmp_path / "a", hf, lora(r=32), scale=0.1)
    for word, how in (("bf16", {"dtype": "bf16"}), ("q8_0", {"quant": "Q8_0"})):
        convert(adapter, tmp_path / f"{word}.gguf", to="gguf-lora", base=hf, outtype=word)
        convert(adapter, tmp_path / "same.gguf", to="gguf-lora", base=hf, force=True, **how)
        assert (tmp_path / f"{word}.gguf").read_bytes() == (tmp_path / "same.gguf").read_bytes()
        words = f"convert {adapter} --to gguf-lora --base {hf} -o {tmp_path}/line.gguf --outtype {word} --force"
        with pytest.raises(SystemExit) as end:
            main(words.split())
        assert not end.value.code
        assert (tmp_path / "line.gguf").read_bytes() == (tmp_path / "same.gguf").read_bytes()
    with pytest.raises(UsageError, match=r"outtype.* and .*quant.* both name a type"):
        convert(hf, tmp_path / "o.gguf", outtype="f16", quant="Q8_0")
    with pytest.raises(UsageError, match=r"outtype.* and .*quant.* both name a type"):
        convert(hf, tmp_path / "o.gguf", outtype="f16", quant="COPY")


def test_norms_of_a_lora_file_are_said(tmp_path: Path) -> None:
    """llama.cpp reads over them; so do we, and say it at every road."""
    hf, base, file = tmp_path / "hf", tmp_path / "b.gguf", tmp_path / "n.gguf"
    zoo.build(hf, "llama")
    convert(hf, base)
    adapter = make_adapter(tmp_path / "a", hf, lora(), scale=0.1)
    convert(adapter, tmp_path / "a.gguf", to="gguf-lora", base=hf)
    factors = {one.name: one.data for one in GGUFReader(str(tmp_path / "a.gguf")).tensors}
    said = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 8.0}
    write_gguf(file, {**factors, "blk.0.attn_norm.weight": random_array(64)}, metadata=said)
    for report in (
        adapterkit.merge(base, [file], tmp_path / "onto.gguf"),
        convert(file, tmp_path / "back", to="peft", base=hf),
        adapterkit.combine([file, adapter], tmp_path / "c", base=hf),
    ):
        assert any("1 norm of the file, as 'blk.0.attn_norm.weight'" in note for note in report.notes)


def test_adapters_are_combined_on_a_gguf_base(tmp_path: Path) -> None:
    hf, base = tmp_path / "hf", tmp_path / "b.gguf"
    zoo.build(hf, "qwen3")
    convert(hf, base)
    one = make_adapter(tmp_path / "one", hf, lora(), scale=0.1)
    two = make_adapter(tmp_path / "two", hf, lora(r=6, use_rslora=True), scale=0.1, seed=6)
    convert(one, tmp_path / "one.gguf", to="gguf-lora", base=base)
    for number, where in enumerate((hf, base)):
        adapterkit.combine([tmp_path / "one.gguf", two], tmp_path / f"c{number}", base=where, method="svd", rank=8)
    found, expected = (load_file(tmp_path / f"c{number}/adapter_model.safetensors") for number in (1, 0))
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_a_gguf_lora_is_an_adapter(tmp_path: Path) -> None:
    """What llama-export-lora does, and the same onto a Hugging Face base; beside PEFT's live model."""
    hf, base, file = tmp_path / "hf", tmp_path / "b.gguf", tmp_path / "a.gguf"
    zoo.build(hf, "llama")
    adapter = make_adapter(tmp_path / "a", hf, lora(use_rslora=True), scale=0.1)
    convert(hf, base)
    convert(adapter, file, to="gguf-lora", base=hf)
    expected = live(hf, adapter)
    adapterkit.merge(base, [file], tmp_path / "onto.gguf")
    assert far(logprobs(tmp_path / "onto.gguf")[0], expected) < 1e-5
    adapterkit.merge(hf, [file], tmp_path / "merged")
    assert far(of_model(load_model(tmp_path / "merged").float().eval()), expected) < 1e-5
    assert check(hf, [file]).touched == 14
    with pytest.raises(UsageError, match="whose modules are named by its base"):
        adapterkit.combine([file, file], tmp_path / "c", method="linear")
    zoo.build(tmp_path / "other", "qwen2")
    with pytest.raises(AdapterkitError, match="is made for 'llama'"):
        adapterkit.merge(tmp_path / "other", [file], tmp_path / "no")


def test_a_gguf_file_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    zoo.build(hf, "llama")
    adapter = make_adapter(tmp_path / "a", hf, lora(target_modules=["q_proj"]), scale=0.1)
    convert(hf, tmp_path / "b.gguf")
    blob = tmp_path / f"sha256-{'0123' * 16}"
    shutil.copyfile(tmp_path / "b.gguf", blob)
    for name, base in (("one", tmp_path / "b.gguf"), ("other", blob)):
        adapterkit.merge(base, [adapter], tmp_path / f"{name}.gguf")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "other.gguf").read_bytes()


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama", "gemma3"])
def test_pooling_of_decoders_is_written(kind: str, tmp_path: Path) -> None:
    zoo.build(tmp_path / "hf", kind)
    modules = [{"path": "", "type": f"{_ST}.Transformer"}, {"path": "1_Pooling", "type": f"{_ST}.Pooling"}]
    modules.append({"path": "2_Dense", "type": f"{_ST}.Dense"})
    (tmp_path / "hf/modules.json").write_text(json.dumps(modules))
    (tmp_path / "hf/1_Pooling").mkdir()
    (tmp_path / "hf/1_Pooling/config.json").write_text(json.dumps({"pooling_mode_lasttoken": True}))
    report = convert(tmp_path / "hf", tmp_path / "o.gguf")
    keys = _keys(tmp_path / "o.gguf")
    assert keys[f"{keys['general.architecture']}.pooling_type"] == 3
    assert any("2_Dense" in note for note in report.notes)


def test_embeddinggemma_sees_both_ways(tmp_path: Path) -> None:
    config = {**zoo._GEMMA, "num_hidden_layers": 6, "use_bidirectional_attention": True}
    zoo.ENCODERS["embeddinggemma"] = zoo.Tiny("Gemma3TextModel", config, zoo.GELU)
    expected = embeddings_of(zoo.build(tmp_path / "hf", "embeddinggemma"))
    convert(tmp_path / "hf", tmp_path / "o.gguf")
    assert _keys(tmp_path / "o.gguf")["general.architecture"] == "gemma-embedding"
    assert (embeddings(tmp_path / "o.gguf") * expected).sum(-1).min() > 1 - 1e-6
    convert(tmp_path / "o.gguf", tmp_path / "back", to="hf")
    convert(tmp_path / "back", tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "o.gguf").read_bytes()


def test_a_classifiers_pooler_and_labels(tmp_path: Path) -> None:
    labels = {number: f"class{number:02d}" for number in range(12)}
    config = {**zoo._NO_KV, "num_labels": 12, "id2label": labels, "label2id": {v: k for k, v in labels.items()}}
    zoo.ENCODERS["classifier"] = zoo.Tiny("BertForSequenceClassification", config, zoo.GELU)
    zoo.build(tmp_path / "hf", "classifier")
    convert(tmp_path / "hf", tmp_path / "o.gguf")
    assert _keys(tmp_path / "o.gguf")["bert.classifier.output_labels"] == list(labels.values())
    names = {tensor.name for tensor in GGUFReader(str(tmp_path / "o.gguf")).tensors}
    assert {"cls.weight", "cls.bias", "cls.output.weight", "cls.output.bias"} <= names


def test_nan_does_not_become_a_file(tmp_path: Path) -> None:
    zoo.build(tmp_path / "hf", "llama")
    stored = load_file(tmp_path / "hf/model.safetensors")
    for value, words in ((float("nan"), "no number"), (1e6, "too large for")):
        stored["model.layers.0.mlp.down_proj.weight"][1, 2] = value
        wide = {name: tensor.to(torch.bfloat16) for name, tensor in stored.items()}
        save_file(wide, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=f"row 1, column 2, which is {words}"):
            convert(tmp_path / "hf", tmp_path / "o.gguf", dtype="f16")
        assert not (tmp_path / "o.gguf").exists()


def test_four_bit_values_in_a_folder_are_known(tmp_path: Path) -> None:
    hf, folder = tmp_path / "hf", tmp_path / "folder"
    zoo.build(hf, "llama")
    adapter = make_adapter(tmp_path / "a", hf, lora(target_modules=["q_proj"]), scale=0.1)
    for mix, coarse in (("Q4_0", True), ("Q4_1", True), ("Q8_0", False)):
        shutil.rmtree(folder, ignore_errors=True)
        convert(hf, tmp_path / f"{mix}.gguf", quant=mix)
        convert(tmp_path / f"{mix}.gguf", folder, to="hf")
        opened = open_model(folder)
        assert on_four_bits(opened["model.layers.0.self_attn.q_proj.weight"]) == coarse
    assert not on_four_bits(open_model(hf)["model.layers.0.self_attn.q_proj.weight"])
    shutil.rmtree(folder)
    convert(tmp_path / "Q4_0.gguf", folder, to="hf")
    with pytest.raises(UsageError, match="hold values of a 4-bit grid"):
        adapterkit.merge(folder, [adapter], tmp_path / "o.gguf", quant="Q4_0")
    report = adapterkit.merge(folder, [adapter], tmp_path / "o.gguf", quant="Q4_0", yes_lossy=True)
    assert any("4-bit grid" in note for note in report.notes)
    adapterkit.merge(folder, [adapter], tmp_path / "kept.gguf", quant="Q4_0", keep_touched="Q8_0")


@pytest.mark.parametrize("kind", ["TQ2_0", "Q2_0"])
def test_three_levels_are_a_grid_although_most_are_zero(kind: str, tmp_path: Path) -> None:
    """Q2_0 and TQ2_0 give most weights of a bell curve the value 0; a matrix that is merely sparse is none."""
    values = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    grid = torch.from_numpy(decode(kind, encode(kind, values), 256))
    sparse = values * (values.abs() > 0.9)
    save_file({"grid": grid.half(), "sparse": sparse.half()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    opened = open_model(tmp_path)
    assert on_four_bits(opened["grid"])
    assert not on_four_bits(opened["sparse"])


def test_five_bit_values_and_quantized_folders_are_measured_before_a_coarse_file(tmp_path: Path) -> None:
    hf, out = tmp_path / "hf", tmp_path / "o.gguf"
    zoo.build(hf, "llama")
    adapter = make_adapter(tmp_path / "a", hf, lora(target_modules=["q_proj"]), scale=0.01)
    convert(hf, tmp_path / "b.gguf", quant="Q5_1")
    convert(tmp_path / "b.gguf", tmp_path / "five", to="hf")
    (tmp_path / "five/adapterkit.json").unlink()
    with pytest.raises(CheckFailed, match=r"on a coarse grid already, .* would survive Q5_1"):
        adapterkit.merge(tmp_path / "five", [adapter], out, quant="Q5_1")
    assert not out.exists()
    with pytest.raises(CheckFailed, match="on a coarse grid already"):
        adapterkit.merge(tmp_path / "five", [adapter], out, quant="Q5_1", dry_run=True)
    report = adapterkit.merge(tmp_path / "five", [adapter], out, quant="Q5_1", yes_lossy=True)
    assert report.fidelity is not None
    assert report.fidelity.retention < 0.5
    adapterkit.merge(tmp_path / "five", [adapter], tmp_path / "kept.gguf", quant="Q5_1", keep_touched="F16")
    assert adapterkit.merge(hf, [adapter], tmp_path / "plain.gguf", quant="Q5_1").fidelity is None


def test_a_folder_whose_record_names_a_gguf_file_is_measured(tmp_path: Path) -> None:
    hf, folder = tmp_path / "hf", tmp_path / "folder"
    zoo.build(hf, "llama")
    adapter = make_adapter(tmp_path / "a", hf, lora(target_modules=["q_proj"]), scale=0.001)
    convert(hf, tmp_path / "b.gguf", quant="Q8_0")
    convert(tmp_path / "b.gguf", folder, to="hf")
    report = adapterkit.merge(folder, [adapter], tmp_path / "o.gguf", quant="Q8_0")
    assert report.fidelity is not None
    assert report.fidelity.retention < 0.5
    (folder / "adapterkit.json").unlink()  # eight bits are not seen by the values alone
    assert adapterkit.merge(folder, [adapter], tmp_path / "p.gguf", quant="Q8_0").fidelity is None


@pytest.mark.parametrize("kind", ["nf4", "nvfp4", "mxfp4"])
def test_few_bits_are_seen_in_every_form_of_a_folder(kind: str, tmp_path: Path) -> None:
    hf, name = tmp_path / "hf", "model.layers.0.mlp.down_proj.weight"
    zoo.build(hf, "llama")
    convert(hf, tmp_path / "packed", to=kind)
    convert(tmp_path / "packed", tmp_path / "plain", to="bf16")
    assert not few_bits(open_model(hf)[name])
    assert few_bits(dequantized(open_model(tmp_path / "packed"))[name])
    assert few_bits(open_model(tmp_path / "plain")[name])
    stored = load_file(tmp_path / "plain/model.safetensors")
    turned = {key: value.T.contiguous() if value.dim() == 2 else value for key, value in stored.items()}
    sparse = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * (torch.arange(128) % 8 == 0)
    save_file(turned | {"sparse": sparse}, tmp_path / "plain/model.safetensors", metadata={"format": "pt"})
    opened = open_model(tmp_path / "plain")
    assert few_bits(opened[name])  # a Conv1D is stored on its side
    assert not few_bits(opened["sparse"])
