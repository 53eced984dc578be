"""`evaluate`: what the harness is told and what becomes of its figures; and, slowly, the harness itself."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from models import plain_adapter, plain_base, read_tensors

from adapterkit.checkpoint.listing import LocalFolder
from adapterkit.errors import AdapterkitError, CheckFailed, CheckpointError, NotFound, UnsupportedAdapter, UsageError
from adapterkit.provenance.register import register
from adapterkit.registry import evaluation, verbs
from adapterkit.verbs.evaluate import _null_adapter, evaluate

# A harness that answers with how large the adapter's factors are, and writes down what it was asked.
FAKE = """
import json, os
__version__ = "0.0.1"
class _Tasks:
    pass
def simple_evaluate(model, model_args, tasks, task_manager, log_samples, **options):
    tensors = {}
    if "peft" in model_args:
        from safetensors.numpy import load_file
        tensors = load_file(os.path.join(model_args["peft"], "adapter_model.safetensors"))
    size = sum(float(abs(one).sum()) for name, one in tensors.items() if "lora_B" in name)
    with open(os.environ["TOLD"], "a") as file:
        paths = ("pretrained", "peft")
        real = {key: os.path.realpath(value) if key in paths else value for key, value in model_args.items()}
        file.write(json.dumps([real, tasks, options, task_manager.include_path]) + "\\n")
    if "killed" in tasks:
        os.kill(os.getpid(), 9)
    if "crash" in tasks:
        raise ValueError("no such task: crash")
    results = {task: {"size,none": size, "size_stderr,none": 0.5} for task in tasks}
    return {"results": results, "n-shot": {}, "config": {"limit": options.get("limit")}}
"""
MANAGER = """
class TaskManager:
    def __init__(self, include_path=None):
        self.include_path = include_path
"""


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    package = tmp_path / "fake" / "lm_eval"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE)
    (package / "tasks.py").write_text(MANAGER)
    monkeypatch.syspath_prepend(str(tmp_path / "fake"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "fake"), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))
    return tmp_path / "told"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return plain_base(tmp_path / "a base, of mine")


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return plain_adapter(tmp_path / "adapter", base, base_model_name_or_path="someone/base", peft_type="LORA")


def asked(told: Path) -> list[Any]:
    return [json.loads(line) for line in told.read_text().splitlines()]


def test_an_adapter_its_base_and_null_adapters(
    home: Path, told: Path, base: Path, adapter: Path, tmp_path: Path
) -> None:
    register(adapter, "tone", base=base)
    report = evaluate("tone", "tickets,mail", base=base, null=True, include_path=tmp_path, limit=5, num_fewshot=2)
    assert report.subjects == ("base", "self", "zeros", "shuffled")
    assert report.attached is not None
    assert report.attached.ref == "tone@2"
    figures = {one.key: one.value for one in evaluation.read(verbs.show("tone@2").record.evidence)}
    assert figures["base:tickets/size"] == figures["zeros:tickets/size"] == 0.0
    assert figures["tickets/size"] > 0
    assert figures["shuffled:mail/size"] == pytest.approx(figures["mail/size"], rel=1e-5)  # the same values, elsewhere
    calls = asked(told)
    assert [call[0]["pretrained"] for call in calls] == [str(base.resolve())] * 4
    assert [bool(call[0].get("peft")) for call in calls] == [False, True, True, True]
    assert calls[0][1] == ["tickets", "mail"]
    assert calls[0][2]["limit"] == 5
    assert calls[0][2]["num_fewshot"] == 2
    assert calls[0][3] == str(tmp_path)
    with pytest.raises(CheckFailed, match="not < shuffled"):
        verbs.tag("tone", "prod", require="tickets/size<shuffled-1")


@pytest.mark.parametrize(("more", "setting"), [({"limit": 5}, "limit"), ({"chat_template": True}, "chat_template")])
def test_figures_of_other_settings_are_not_compared(
    home: Path, told: Path, base: Path, adapter: Path, more: dict[str, Any], setting: str
) -> None:
    """Neither a part of the samples with all of them, nor prompts in a template with plain ones."""
    register(adapter, "tone", base=base)
    evaluate("tone@1", "tickets", base=base, no_base=True)
    verbs.tag("tone@2", "prod", require="size>0")
    register(plain_adapter(adapter.parent / "next", base, seed=9, peft_type="LORA"), "tone", base=base)
    evaluate("tone@3", "tickets", base=base, no_base=True, **more)
    with pytest.raises(CheckFailed, match=f"measured with another {setting}"):
        verbs.tag("tone@4", "prod", require="size>=current-1000")
    verbs.tag("tone@4", "prod", require="size>0")


def test_the_base_that_its_record_names(
    home: Path, told: Path, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bytes are held against the Hub's digests before the harness reads them; pickles are left to it."""
    wanted: list[str] = []
    kept = LocalFolder(base)

    def find(ref: str) -> LocalFolder:
        wanted.append(ref)
        return kept

    monkeypatch.setattr("adapterkit.verbs.evaluate.locate", find)
    register(adapter, "tone")
    evaluate("tone", ["tickets"], no_base=True, attach=False)
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    kept = LocalFolder(base)
    evaluate("tone", ["tickets"], no_base=True, attach=False, base="other/base@v1")
    evaluate("tone", ["tickets"], no_base=True, attach=False, base="gpt2@main")
    first, second, third = (call[0] for call in asked(told))
    assert (third["pretrained"][-4:], third["revision"]) == ("gpt2", "main")
    assert wanted == ["someone/base", "other/base@v1"]
    assert first["pretrained"] == str(base.resolve())
    assert (second["pretrained"][-10:], second["revision"]) == ("other/base", "v1")
    assert verbs.show("tone").versions == (1,)


@pytest.mark.parametrize("name", ["model.safetensors", "adapter_config.json", "adapter_model.safetensors"])
def test_files_that_change_while_the_harness_runs(
    name: str, home: Path, told: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No figure is kept of bytes that are not those that are named."""
    from adapterkit.verbs import evaluate as module

    real = module._run

    def run(*args: Any) -> None:
        real(*args)
        (path,) = (folder / name for folder in (base, adapter) if (folder / name).exists())
        path.write_bytes(path.read_bytes()[:-2] + b"  ")

    monkeypatch.setattr(module, "_run", run)
    register(adapter, "tone", base=base)
    with pytest.raises(CheckpointError, match=f"{name} changed while it was read"):
        evaluate(adapter, "tickets", base=base)


def test_a_merged_model_a_path_and_a_gguf_file(home: Path, told: Path, base: Path, tmp_path: Path) -> None:
    report = evaluate(base, "tickets")
    assert report.attached is None
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    evaluate(tmp_path / "small.gguf", "tickets", base=base)
    calls = [call[0] for call in asked(told)]
    assert calls[0]["pretrained"] == calls[1]["pretrained"] == str(base.resolve())
    assert calls[2]["gguf_file"] == "model.gguf"


def test_what_is_refused(home: Path, told: Path, base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterkitError, match="ended with 1: ValueError: no such task: crash"):
        evaluate(base, "crash")
    with pytest.raises(AdapterkitError, match="harness failed: it was ended by signal 9, perhaps since memory ran out"):
        evaluate(base, "killed")
    with pytest.raises(UsageError, match="no task is named"):
        evaluate(base, " , ")
    with pytest.raises(NotFound, match="does not exist"):
        evaluate("nowhere", "tickets")
    with pytest.raises(UsageError, match="only an adapter has null adapters"):
        evaluate(base, "tickets", null=True)
    # The harness computes on another device where it does not have the one that is named.
    with pytest.raises(UsageError, match="cuda:99"):
        evaluate(base, "tickets", device="cuda:99")
    with pytest.raises(UsageError, match="cudda"):
        evaluate(base, "tickets", device="cudda")
    config = adapter / "adapter_config.json"
    said = json.loads(config.read_text())
    config.write_text(json.dumps({**said, "use_dora": True}))
    with pytest.raises(UnsupportedAdapter, match="zeros are no adapter that changes nothing"):
        evaluate(adapter, "tickets", base=base, null=True)
    config.write_text(json.dumps({**said, "base_model_name_or_path": None}))
    with pytest.raises(UsageError, match="does not say which base"):
        evaluate(adapter, "tickets")


def test_without_the_harness(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapterkit.packages.find_spec", lambda name: None if name == "lm_eval" else name)
    with pytest.raises(UsageError, match="lm_eval is not installed") as refused:
        evaluate(base, "tickets")
    assert refused.value.hint == "pip install 'adapterkit[eval]'"


def test_null_adapters(adapter: Path, tmp_path: Path) -> None:
    own = read_tensors(adapter)
    for subject in ("zeros", "shuffled"):
        _null_adapter(adapter, tmp_path / subject, subject)
        made = read_tensors(tmp_path / subject)
        assert {name: one.shape for name, one in made.items()} == {name: one.shape for name, one in own.items()}
        for name, tensor in made.items():
            if subject == "zeros":
                assert not tensor.any()
            else:
                assert tensor.flatten().sort().values.equal(own[name].flatten().sort().values)
                assert not tensor.equal(own[name])


@pytest.mark.slow
def test_the_harness_itself(home: Path, tmp_path: Path) -> None:
    """A model that was trained to answer, an adapter that changes its answers, and a task of one's own; no network."""
    pytest.importorskip("lm_eval", reason="pip install 'adapterkit[eval]'")
    from adapterkit.verbs.demo import TAUGHT, demo

    demo(tmp_path / "demo")
    rows = [{"prompt": prompt, "choices": list(both), "label": 1} for prompt, both in TAUGHT.items()]
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tasks / "colours.yaml").write_text(
        "task: colours\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: "
        + str(tasks / "rows.jsonl")
        + "\n"
        "output_type: multiple_choice\ntest_split: test\n"
        'doc_to_text: "{{prompt}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: label\n'
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    base = tmp_path / "demo" / "base"
    register(tmp_path / "demo" / "adapter", "tone", base=base)
    evaluate("tone", "colours", base=base, null=True, include_path=tasks)
    verbs.tag("tone", "prod", require="acc>=0.8, acc>base+0.5, acc>shuffled+0.5, acc.n>=6")
    with pytest.raises(CheckFailed):
        verbs.tag("tone", "prod", require="acc<=zeros")
