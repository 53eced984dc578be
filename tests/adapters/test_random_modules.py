"""What the class of the merged model has and neither the base nor the adapter holds is said by merge, check and verify.

Expected values: the keys that transformers' own loader misses (`test_heads.py` has the heads that adapters do bring).
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
from models import read_tensors, write_adapter

import adapterkit

if TYPE_CHECKING:
    from pathlib import Path


def trained(folder: Path, base: str, task: str, **config: Any) -> tuple[Path, Path, set[str]]:
    """A base of the class ``base``, an adapter of PEFT for ``task`` on it, and what no file of them holds."""
    import transformers
    from peft import LoraConfig, get_peft_model

    from adapterkit.adapters.classes import table
    from bench.common import zoo

    warnings.simplefilter("ignore")
    made = zoo.make(getattr(transformers, base))
    made.save_pretrained(folder / "base")
    cls = getattr(transformers, table()["tasks"][task][made.config.model_type])
    how: dict[str, Any] = {"num_labels": 3, "ignore_mismatched_sizes": True, "output_loading_info": True}
    model, told = cls.from_pretrained(folder / "base", **how)
    tuned = get_peft_model(
        model, LoraConfig(**{"task_type": task, "r": 2, "target_modules": ["query", "q_proj"], **config})
    )
    tuned.save_pretrained(folder / "adapter")
    held = {key.partition("base_model.model.")[2] for key in read_tensors(folder / "adapter")}
    return folder / "base", folder / "adapter", {key for key in told["missing_keys"] if key not in held}


@pytest.mark.parametrize(
    ("base", "task", "config"),
    [
        ("BertForMaskedLM", "SEQ_CLS", {}),  # its base model has no pooler
        ("BertForMaskedLM", "SEQ_CLS", {"modules_to_save": ["pooler", "classifier"]}),
        ("BertForMaskedLM", "TOKEN_CLS", {}),  # that class has none either
        ("BertForSequenceClassification", "SEQ_CLS", {}),
        ("RobertaForMaskedLM", "SEQ_CLS", {}),
        ("BartForCausalLM", "SEQ_CLS", {"target_modules": r".*decoder.*q_proj"}),  # a decoder alone
    ],
)
def test_what_nothing_holds(tmp_path: Path, base: str, task: str, config: dict[str, Any]) -> None:
    from adapterkit.verbs.check import WARNING

    model, adapter, lost = trained(tmp_path, base, task, **config)
    report = adapterkit.merge(model, [adapter], tmp_path / "merged")
    said = [note for note in report.notes if "neither the base nor the adapter holds" in note]
    assert bool(said) == bool(lost)
    warned = [one for one in adapterkit.check(model, [adapter]).findings if one.code == "random"]
    assert [one.message for one in warned] == said
    assert all(one.level == WARNING for one in warned)
    if lost:
        modules = said[0].partition(" has ")[2].partition(", which")[0].split(", ")
        assert all(any(key.startswith(module) for key in lost) for module in modules)


def test_a_head_that_was_not_saved(tmp_path: Path) -> None:
    """An adapter for classification without its head: the merge has none, and says so."""
    model, adapter, _ = trained(tmp_path, "LlamaForCausalLM", "SEQ_CLS")
    tensors = {key: value for key, value in read_tensors(adapter).items() if "score" not in key}
    bare = write_adapter(tmp_path / "bare", tensors, r=2, target_modules=["q_proj"], task_type="SEQ_CLS")
    (note,) = [note for note in adapterkit.merge(model, [bare], tmp_path / "merged").notes if "neither" in note]
    assert "LlamaForSequenceClassification has score," in note
