"""Heads that adapters bring: the merged folder is of the class that was trained, with its labels, and loads to its weights.

The base is saved without a head; the class with a head is trained by PEFT with another number of labels than any default.
Expected values are the parameters of PEFT's own merge.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from models import plain_adapter, plain_base, read_tensors
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.adapters.classes import head, table

PEFT_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
OTHERS = (
    *("ctc", "audio-classification", "audio-frame-classification", "image-classification", "video-classification"),
    *("semantic-segmentation", "multiple-choice"),
)
FEW = (
    *(
        ("SEQ_CLS", kind)
        for kind in ("roberta", "distilbert", "llama", "gpt2", "gemma3_text", "bart", "deberta-v2", "xlnet")
    ),
    *(("TOKEN_CLS", kind) for kind in ("bert", "qwen2")),
    *(("QUESTION_ANS", kind) for kind in ("electra", "llama")),
    *(("ctc", "wav2vec2"), ("ctc", "hubert"), ("audio-classification", "wavlm")),
    *(("image-classification", "vit"), ("image-classification", "swin"), ("video-classification", "timesformer")),
    ("image-classification", "pvt"),  # its config has a number of its own beside the labels
    *(
        ("image-classification", "siglip"),
        ("audio-classification", "whisper"),
    ),  # their base model's parts in themselves
    ("ctc", "wav2vec2-bert"),  # its base model counts no tokens
    ("QUESTION_ANS", "t5"),
)
LABELS = 5


def every() -> list[tuple[str, str]]:
    return [(task, kind) for task in (*PEFT_TASKS, *OTHERS) for kind in table()["tasks"][task]]


def examined(task: str, kind: str, folder: Path, labels: int = LABELS, before: int | None = None) -> str:
    """What is wrong with the merge of a head for one type; "" where nothing is."""
    import transformers
    from peft import LoraConfig, get_peft_model
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
    from transformers.pytorch_utils import Conv1D

    from bench.common import zoo

    warnings.simplefilter("ignore")
    name = table()["tasks"][task][kind]
    known = head(name)
    if known is None or not known.own:
        pytest.skip("the head of this class is not known")
    cls = getattr(transformers, name)
    inner = MODEL_MAPPING_NAMES.get(kind)
    size = {"vocab_size": 45} if task == "ctc" else {"num_labels": labels}
    try:
        torch.manual_seed(0)
        if before is None:
            zoo.make(getattr(transformers, inner if isinstance(inner, str) else inner[0])).save_pretrained(
                folder / "base"
            )
        else:
            zoo.make(cls, num_labels=before).save_pretrained(folder / "base")
        model = cls.from_pretrained(folder / "base", ignore_mismatched_sizes=True, **size).float()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if known.has(key):
                    parameter.normal_(0, 0.1, generator=generator)
        linear = [n for n, m in model.base_model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)]
        prefix = f"{known.prefix}." if known.prefix and hasattr(model, known.prefix) else ""
        # A pooler that the saved base has not is another base's.
        there = [key for file in (folder / "base").glob("*.safetensors") for key in load_file(file)]
        linear = [n for n in linear if "pooler" not in n or any("pooler" in key for key in there)]
        # A head inside of the base model (Perceiver) is named whole.
        inside = [key.rpartition(".")[0] for key in known.own if known.prefix and key.startswith(prefix)]
        modules = sorted(inside or {key.partition(".")[0] for key in known.own})
        lora = LoraConfig(
            task_type=task if task in PEFT_TASKS else None,
            target_modules=[prefix + n for n in linear[:2]],
            modules_to_save=modules,
            init_lora_weights=False,
        )
        wrapped = get_peft_model(model, lora)
        wrapped.save_pretrained(folder / "adapter", save_embedding_layers=False)
        trained = set(load_file(folder / "adapter" / "adapter_model.safetensors"))
        wanted = {key: value.clone() for key, value in wrapped.merge_and_unload().state_dict().items()}
        _, told = cls.from_pretrained(folder / "base", output_loading_info=True, **size, ignore_mismatched_sizes=True)
        plain = set(told["missing_keys"])
        # The family's bare model is another one (Perceiver's image classes have wider layers by the same config).
        if before is None and any(not known.has(one[0]) for one in told["mismatched_keys"]):
            raise ValueError("the bare model has layers of another size")
    except Exception as error:
        pytest.skip(f"{type(error).__name__}: {str(error)[:80]}")
    # What the class has beside the head and the base does not hold was never saved by anyone.
    lost = {key for key in plain if f"base_model.model.{key}" not in trained}
    adapterkit.merge(folder / "base", [folder / "adapter"], folder / "out")
    said = json.loads((folder / "out" / "config.json").read_text())
    if said["architectures"] != [name]:
        return f"architectures {said['architectures']}"
    merged, told = cls.from_pretrained(folder / "out", output_loading_info=True, ignore_mismatched_sizes=True)
    if set(told["missing_keys"]) - lost or told["mismatched_keys"]:
        return f"missing {set(told['missing_keys']) - lost}, mismatched {told['mismatched_keys']}"
    if task != "ctc" and merged.config.num_labels != labels and known.labels:
        return f"{merged.config.num_labels} labels"
    got = merged.float().state_dict()
    # PEFT 0.21.2 leaves a module that was saved within a saved one wrapped.
    floats = {
        key: value
        for key, value in wanted.items()
        if key not in lost and value.is_floating_point() and ".original_module." not in key
    }
    floats = {key.replace(".modules_to_save.default", ""): value for key, value in floats.items()}
    apart = [key for key, value in floats.items() if not torch.allclose(got[key], value, atol=1e-5)]
    return f"{len(apart)} tensors differ: {apart[:3]}" if apart else ""


@pytest.mark.parametrize(("task", "kind"), FEW)
def test_a_head_is_of_the_class_that_was_trained(task: str, kind: str, tmp_path: Path) -> None:
    assert examined(task, kind, tmp_path) == ""


@pytest.mark.slow
@pytest.mark.parametrize(("task", "kind"), [pair for pair in every() if pair not in FEW])
def test_every_class_with_a_head(task: str, kind: str, tmp_path: Path) -> None:
    assert examined(task, kind, tmp_path) == ""


@pytest.mark.parametrize(("labels", "before"), [(5, 2), (1, 3), (2, 7)], ids=["more", "a reward", "fewer"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "qwen2"])
def test_a_head_of_another_size_than_the_base_s(kind: str, labels: int, before: int, tmp_path: Path) -> None:
    assert examined("SEQ_CLS", kind, tmp_path, labels, before) == ""


def test_names_of_labels_stay_where_their_number_does(tmp_path: Path) -> None:
    import transformers
    from peft import LoraConfig, get_peft_model

    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    names = {0: "no", 1: "yes"}
    numbers = {name: number for number, name in names.items()}
    config = transformers.BertConfig(id2label=names, label2id=numbers, **sizes)
    model = transformers.BertForSequenceClassification(config)
    model.save_pretrained(tmp_path / "base")
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    adapterkit.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"] == {"0": "no", "1": "yes"}


def test_a_head_that_nothing_tells_of_is_written_and_said(tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base")
    adapter = plain_adapter(tmp_path / "adapter", base, modules_to_save=["v_head"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.v_head.summary.weight"] = torch.randn(1, 16)
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    report = adapterkit.merge(base, [adapter], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert "v_head.summary.weight" in read_tensors(tmp_path / "out")
    (note,) = [note for note in report.notes if "v_head" in note]
    assert "was not checked" in note


def test_a_weight_of_another_size_that_is_no_head_is_another_base(tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base")
    adapter = plain_adapter(tmp_path / "adapter", base, modules_to_save=["up_proj"], modules=["q_proj"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.0.mlp.up_proj.weight"] = torch.randn(48, 20)
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(adapterkit.errors.TargetError, match=r"\[48, 20\]"):
        adapterkit.merge(base, [adapter], tmp_path / "out")


def test_every_head_that_peft_s_tasks_name_is_in_the_table() -> None:
    """RoBERTa's two layers are one head; the labels are counted by the last."""
    roberta = head("RobertaForSequenceClassification")
    assert roberta is not None
    assert {counted.parameter for counted in roberta.labels} == {
        "classifier.out_proj.weight",
        "classifier.out_proj.bias",
    }
