"""Cutting a tie: whatever the flag in config.json ties or scales besides, the merged folder answers as PEFT does live.

Each class of transformers that ties is saved tied, an adapter is trained on one side of the tie alone, and the merged
folder is loaded by its own class. Expected values are the logits of base + live adapter.
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import adapterkit
from adapterkit.adapters.classes import table as class_table
from adapterkit.adapters.renamings import table as name_table
from adapterkit.errors import UnsupportedAdapter

# One of each kind: bias tied too, another name for the head, scaling by the flag (told, forced, by another key), three
# embeddings of one table, a flag of another name, a model of several parts.
FEW = (
    "BertForMaskedLM",
    "RobertaForMaskedLM",
    "AlbertForMaskedLM",
    "DebertaV2ForMaskedLM",
    "T5ForConditionalGeneration",
    "MT5ForConditionalGeneration",
    "LongT5ForConditionalGeneration",
    "SwitchTransformersForConditionalGeneration",
    "BartForConditionalGeneration",
    "Lfm2ForCausalLM",
    "MptForCausalLM",
    "GPT2LMHeadModel",
    "LlavaForConditionalGeneration",
)

# What no folder holds: a norm behind the lookup, and an output layer of another size than the embedding when not tied.
REFUSED = (
    ("MuseGlimmerForConditionalGeneration", "embedding"),
    ("ImageGPTForCausalImageModeling", "embedding"),
)


def tying() -> list[str]:
    """Every class that declares a tie of its output layer by name."""
    rows = name_table()["classes"]
    return sorted(name for name, row in rows.items() if len(row) > 3 and any("embed" not in t for t in row[3]))


def answers(model: Any) -> Any:
    ids = torch.arange(4, 14)[None] % 90
    for inputs in ({"input_ids": ids}, {"input_ids": ids, "decoder_input_ids": ids[:, :6]}):
        try:
            with torch.no_grad():
                out = model(**inputs)
        except Exception:
            continue
        for key in ("logits", "prediction_logits"):
            if isinstance(getattr(out, key, None), torch.Tensor):
                return getattr(out, key)
    return None


def random(model: Any, seed: int, only: str = "") -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and only in name:
                parameter.normal_(0, 0.1, generator=generator)
    return model.float().eval()


def examined(name: str, side: str, folder: Path) -> str:
    """What is wrong with a merge that separates the two sides of a tie; "" where nothing is. Skips what cannot be run."""
    import transformers
    from peft import LoraConfig, get_peft_model

    from bench.common import zoo

    warnings.simplefilter("ignore")
    cls = getattr(transformers, name)
    try:
        torch.manual_seed(0)
        model = random(zoo.make(cls, tie_word_embeddings=True), 0)
        module = model.get_output_embeddings() if side == "head" else model.get_input_embeddings()
        path = next(path for path, one in model.named_modules() if one is module)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        plain = answers(model)
    except Exception as error:
        pytest.skip(f"{type(error).__name__}: {str(error)[:80]}")
    if plain is None:
        pytest.skip("more than tokens is needed")
    model.save_pretrained(folder / "base")
    try:
        again = answers(cls.from_pretrained(folder / "base").eval())
    except RuntimeError:
        again = None
    if again is None or not torch.allclose(again, plain, rtol=1e-4, atol=1e-5):
        pytest.skip("transformers does not load again what it saved")
    config = json.loads((folder / "base" / "config.json").read_text())
    config.pop("scale_decoder_outputs", None)  # as files from before that field have it
    (folder / "base" / "config.json").write_text(json.dumps(config))
    settings = LoraConfig(r=2, target_modules=f"{re.escape(path)}", init_lora_weights=False)
    try:
        live = random(get_peft_model(model, settings), 1, "lora_")
    except ValueError as error:
        pytest.skip(f"PEFT: {str(error)[:60]}")
    live.save_pretrained(folder / "adapter", save_embedding_layers=False)
    wanted = answers(live.base_model.model)
    if wanted is None:
        pytest.skip("PEFT cannot run it")
    if torch.equal(wanted, plain):
        pytest.skip("the adapter changes nothing")
    if (name, side) in REFUSED:
        with pytest.raises(UnsupportedAdapter):
            adapterkit.merge(folder / "base", [folder / "adapter"], folder / "out")
        return ""
    adapterkit.merge(folder / "base", [folder / "adapter"], folder / "out")
    merged, told = cls.from_pretrained(folder / "out", output_loading_info=True)
    if told["missing_keys"] or told["unexpected_keys"] or told["mismatched_keys"]:
        return f"{told}"
    got = answers(merged.eval())
    off = float((got - wanted).abs().max() / wanted.abs().max())
    return "" if off < 1e-5 else f"off by {off:.2g} of the largest logit"


@pytest.mark.parametrize("side", ["head", "embedding"])
@pytest.mark.parametrize("name", FEW)
def test_a_cut_tie_keeps_the_function(name: str, side: str, tmp_path: Path) -> None:
    assert examined(name, side, tmp_path) == ""


@pytest.mark.slow
@pytest.mark.parametrize("side", ["head", "embedding"])
@pytest.mark.parametrize("name", [name for name in tying() if name not in FEW])
def test_every_class_that_ties(name: str, side: str, tmp_path: Path) -> None:
    import transformers

    if not hasattr(transformers, name):
        pytest.skip("not public")
    assert examined(name, side, tmp_path) == ""


def test_every_class_that_scales_is_known() -> None:
    """T5's family divides what its output layer reads by sqrt(d_model) while tied (Raffel et al. 2020, mesh tensorflow)."""
    scaled = {name for name, row in class_table()["untie"].items() if row.get("scale") == "d_model"}
    family = ("T5", "UMT5", "LongT5", "SwitchTransformers")
    assert {f"{name}ForConditionalGeneration" for name in family} | {"Pop2PianoForConditionalGeneration"} == scaled


SIDES = {"encoder": r".*encoder\.embed_tokens", "decoder": r".*decoder\.embed_tokens", "shared": r"(?:.*\.)?shared"}


@pytest.mark.parametrize("side", [*SIDES, "encoder and decoder"])
@pytest.mark.parametrize("name", ["BartForConditionalGeneration", "T5ForConditionalGeneration"])
def test_one_table_of_encoder_and_decoder_that_training_told_apart(name: str, side: str, tmp_path: Path) -> None:
    """PEFT changes the module that it was given, and no other that shares its table."""
    import transformers
    from peft import LoraConfig, get_peft_model

    from bench.common import zoo

    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model = random(zoo.make(cls, tie_word_embeddings=True), 0)
    plain = answers(model)
    model.save_pretrained(tmp_path / "base")
    where = "|".join(f"(?:{SIDES[part]})" for part in side.split(" and "))
    lora = LoraConfig(r=2, target_modules=where, init_lora_weights=False)
    live = random(get_peft_model(model, lora), 1, "lora_")
    live.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    wanted = answers(live.base_model.model)
    assert torch.equal(wanted, plain) == (side == "shared")  # no module reads it but by its own name
    adapterkit.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    got = answers(cls.from_pretrained(tmp_path / "out").eval())
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("kind", ["MaskedLM", "PreTraining"])
def test_a_bert_with_its_tie_cut_has_both_decoder_tensors(kind: str, tmp_path: Path) -> None:
    """transformers 4 reads decoder.weight and decoder.bias by name, and ties neither with the flag off."""
    import transformers
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file

    from bench.common import zoo

    model = zoo.make(getattr(transformers, f"BertFor{kind}"))
    model.save_pretrained(tmp_path / "base")
    get_peft_model(model, LoraConfig(target_modules=["word_embeddings"], init_lora_weights=False)).save_pretrained(
        tmp_path / "adapter", save_embedding_layers=False
    )
    adapterkit.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    embedding = next(name for name in before if name.endswith("word_embeddings.weight"))
    decoder = {name for name in after if name.endswith(("decoder.weight", "decoder.bias"))}
    assert len(decoder) == 2
    weight, bias = sorted(decoder, reverse=True)
    assert torch.equal(after[weight], before[embedding])
    assert not torch.equal(after[embedding], before[embedding])
    assert torch.equal(after[bias], before["cls.predictions.bias"])
