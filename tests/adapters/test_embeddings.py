"""Embeddings that do more than a lookup: what PEFT computes live is merged exactly, or refused by name.

Expected values are the logits of PEFT's live model.
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from models import read_tensors

import adapterkit
from adapterkit.adapters.classes import table
from adapterkit.errors import UnsupportedAdapter

NORMED = {
    "MuseGlimmerTextNormedEmbedding",
    "MuseSparkTextNormedEmbedding",
    "InklingNormedEmbedding",
    "Inkling2NormedEmbedding",
    "Inkling2LoopNormedEmbedding",
}
IDS = torch.arange(4, 14)[None]


def trained(
    name: str, leaf: str, folder: Path, method: str = "LoraConfig", changes: dict[str, Any] | None = None, **more: Any
) -> Any:
    """PEFT's live model of a tiny base, both of which are saved in ``folder``; the first module called ``leaf`` is adapted."""
    import peft
    import transformers

    from bench.common import zoo

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model = zoo.make(getattr(transformers, name), **(changes or {})).float().eval()
    model.save_pretrained(folder / "base")
    path = next(path for path, _ in model.named_modules() if path.endswith(leaf))
    settings = {"target_modules": re.escape(path), "init_weights": False, "r": 2, **more}
    if method == "LoraConfig":
        settings["init_lora_weights"] = settings.pop("init_weights")
    if method == "TrainableTokensConfig":
        settings = {"target_modules": [path], "token_indices": [5, 6], "init_weights": False}
    live = peft.get_peft_model(model, getattr(peft, method)(**settings)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in live.parameters():
            if value.requires_grad:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
    return live


def saved(live: Any, folder: Path) -> Path:
    live.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return folder / "adapter"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def test_every_class_of_embeddings_is_known() -> None:
    """A new one is not in the table: run tools/make_classes.py, and look at what kind it finds."""
    import transformers.models

    found = set()
    for file in sorted(Path(transformers.models.__file__).parent.glob("*/modeling_*.py")):
        text = file.read_text(encoding="utf-8")
        classes = re.findall(r"^class (\w+)\((.*)\):", text, re.MULTILINE) if "Embedding)" in text else []
        ours = {"nn.Embedding", "torch.nn.Embedding", "Embedding"}
        for name, bases in classes:
            if ours & set(bases.split(", ")):
                ours.add(name)
                found.add(name)
    kinds = table()["embedding_classes"]
    assert found == set(kinds)
    assert set(kinds.values()) == {"plain", "scaled", "normed", "row", "positions"}
    assert {name for name, kind in kinds.items() if kind == "normed"} == NORMED
    placed = {name for rows in table()["embeddings"].values() for name in rows.values()}
    assert placed == {name for name, kind in kinds.items() if kind != "plain"}


@pytest.mark.parametrize(
    ("name", "leaf", "method", "why"),
    [
        (
            "MuseGlimmerForConditionalGeneration",
            "embed_tokens",
            "LoraConfig",
            "MuseGlimmerTextNormedEmbedding, which norm",
        ),
        ("InklingForConditionalGeneration", "embed_tokens", "LoraConfig", "InklingNormedEmbedding, which normalises"),
        ("MuseGlimmerForConditionalGeneration", "embed_tokens", "TrainableTokensConfig", "which normalises"),
        ("BartForConditionalGeneration", "encoder.embed_positions", "LoraConfig", "which looks up positions"),
        ("OPTForCausalLM", "embed_positions", "LoraConfig", "which looks up positions"),
        ("T5Gemma2ForConditionalGeneration", "embed_tokens", "LoraConfig", "in the place of one token's row"),
        ("Gemma3ForCausalLM", "embed_tokens", "HiraConfig", "which multiplies what it looks up"),
    ],
)
def test_what_no_weight_holds_is_refused(name: str, leaf: str, method: str, why: str, tmp_path: Path) -> None:
    adapter = saved(trained(name, leaf, tmp_path, method), tmp_path)
    if name.startswith("T5Gemma2"):  # a token that the tiny vocabulary has
        file = tmp_path / "base" / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "eoi_token_index": 7}))
    with pytest.raises(UnsupportedAdapter, match=f"{leaf}' is a .*{why}") as merged:
        adapterkit.merge(tmp_path / "base", [adapter], tmp_path / "out")
    report = adapterkit.check(tmp_path / "base", [adapter])
    assert merged.value.message in [one.message for one in report.findings]
    assert report.exit_code == merged.value.exit_code == UnsupportedAdapter.exit_code
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "method", "more"),
    [
        ("Gemma3ForCausalLM", "LoraConfig", {}),
        ("Gemma3ForCausalLM", "LoraConfig", {"use_dora": True}),
        ("Gemma3ForCausalLM", "TrainableTokensConfig", {}),
        ("XGLMForCausalLM", "LoraConfig", {}),
        ("BioGptForCausalLM", "LoraConfig", {}),
    ],
)
def test_a_scaled_embedding_answers_as_live(name: str, method: str, more: dict[str, Any], tmp_path: Path) -> None:
    import transformers

    live = trained(name, "embed_tokens", tmp_path, method, **more)
    adapter = saved(live, tmp_path)
    adapterkit.merge(tmp_path / "base", [adapter], tmp_path / "out")
    wanted = logits(live)
    got = logits(getattr(transformers, name).from_pretrained(tmp_path / "out").eval())
    assert float((got - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


def test_a_normed_embedding_trained_whole_is_merged(tmp_path: Path) -> None:
    import transformers

    name = "MuseGlimmerForConditionalGeneration"
    live = trained(name, "q_proj", tmp_path, modules_to_save=["embed_tokens"])
    adapterkit.merge(tmp_path / "base", [saved(live, tmp_path)], tmp_path / "out")
    wanted = logits(live)
    got = logits(getattr(transformers, name).from_pretrained(tmp_path / "out").eval())
    assert float((got - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


def test_a_token_with_a_vector_of_its_own_that_was_not_trained(tmp_path: Path) -> None:
    """T5Gemma2 gives one token a vector of its own; a LoRA whose A is zero there changes nothing of it."""
    live = trained("T5Gemma2ForConditionalGeneration", "embed_tokens", tmp_path)
    with torch.no_grad():
        for name, value in live.named_parameters():
            if "lora_embedding_A" in name:
                value[:, 7] = -0.0
    adapter = saved(live, tmp_path)
    file = tmp_path / "base" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eoi_token_index": 7}))
    adapterkit.merge(tmp_path / "base", [adapter], tmp_path / "out")


def test_a_tie_that_the_class_cannot_do_without(tmp_path: Path) -> None:
    """ImageGPT's output layer has a row less than its embedding where they are not tied."""
    live = trained("ImageGPTForCausalImageModeling", "wte", tmp_path, changes={"tie_word_embeddings": True})
    adapter = saved(live, tmp_path)
    with pytest.raises(UnsupportedAdapter, match=r"'lm_head\.weight' has another shape there") as merged:
        adapterkit.merge(tmp_path / "base", [adapter], tmp_path / "out")
    report = adapterkit.check(tmp_path / "base", [adapter])
    assert merged.value.message in [one.message for one in report.findings]


def test_the_live_model_of_a_rotation_on_positions(tmp_path: Path) -> None:
    import transformers

    live = trained("OPTForCausalLM", "embed_positions", tmp_path, "OFTConfig", r=0, oft_block_size=4)
    adapterkit.merge(tmp_path / "base", [saved(live, tmp_path)], tmp_path / "out")
    wanted = logits(live)
    got = logits(transformers.OPTForCausalLM.from_pretrained(tmp_path / "out").eval())
    assert float((got - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


def test_what_is_extracted_of_a_normed_embedding_gives_the_tuned_model(tmp_path: Path) -> None:
    """Factors would be added behind the norm: the embedding is stored whole."""
    import transformers
    from safetensors.torch import load_file

    from bench.common import zoo

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model = zoo.make(transformers.MuseGlimmerForConditionalGeneration).float().eval()
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight += 0.1 * torch.randn(weight.shape[0], 2) @ torch.randn(2, weight.shape[1])
    model.save_pretrained(tmp_path / "tuned")
    adapterkit.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", rank=2)
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert not [name for name in names if "lora_embedding" in name]
    adapterkit.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    tuned, out = (read_tensors(tmp_path / folder) for folder in ("tuned", "out"))
    assert tuned.keys() == out.keys()
    assert all(torch.equal(out[name], value) for name, value in tuned.items())
