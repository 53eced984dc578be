"""The Trainer's callback: what a save says in the registry, and what is there after a run that was killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from adapterkit.errors import AdapterkitError
from adapterkit.integrations import runs
from adapterkit.integrations.transformers import RegisterCallback, base_identity
from adapterkit.provenance.register import identify_base
from adapterkit.registry import verbs
from adapterkit.registry.home import Home
from adapterkit.registry.identity import compare

Rows = list[dict[str, Any]]


def rows(count: int = 8, seed: int = 0) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 90, (count, 6), generator=generator)
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def train(base: Path, out: Path, *callbacks: Any, resume: bool = False, **given: Any) -> Any:
    """Four steps on a tiny Llama, saved after each second one."""
    torch.manual_seed(0)
    model = get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    )
    said = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps", "logging_steps": 1, "learning_rate": 0.01}
    args = transformers.TrainingArguments(
        str(out),
        report_to=[],
        use_cpu=True,
        per_device_train_batch_size=2,
        disable_tqdm=True,
        **{**said, **given},
    )
    trainer = transformers.Trainer(model, args, train_dataset=rows(), callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


@pytest.fixture
def base(make_base: Callable[..., Path]) -> Path:
    return make_base("llama")


def test_every_save_is_a_version_that_says_where_it_comes_from(base: Path, home: Path, tmp_path: Path) -> None:
    repository = tmp_path / "code"
    repository.mkdir()
    git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@b.example"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "start"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    callback = RegisterCallback("tickets", data="tickets-v3", meta={"owner": "team"}, alias="candidate")
    callback.on_train_begin = _with_code(callback.on_train_begin, callback, repository)  # type: ignore[method-assign]
    train(base, tmp_path / "out", callback, seed=7)
    assert callback.registered == ["tickets@1", "tickets@2"]
    assert callback.failures == []
    shown = verbs.show("tickets@2")
    record = shown.record
    assert shown.aliases == ("candidate",)
    assert (record.kind, record.method, record.parameters["r"]) == ("adapter", "lora", 2)
    assert record.operation is not None
    assert (record.operation.name, record.operation.tool) == ("train", "transformers")
    settings = record.operation.parameters
    assert (settings["seed"], settings["max_steps"], settings["learning_rate"]) == (7, 4, 0.01)
    assert "output_dir" not in settings
    assert str(tmp_path) not in json.dumps(record.to_json())  # nothing of this machine
    meta = record.meta
    assert (meta["git"], meta["seed"], meta["step"], meta["owner"]) == (head, "7", "4", "team")
    assert (meta["data"], meta["data.rows"], meta["data.fingerprint"]) == ("tickets-v3", "8", runs.fingerprint(rows()))
    assert record.evidence["training"]["step"] == 4
    assert record.evidence["training"]["loss"] > 0
    assert record.base is not None
    assert compare(record.base, identify_base(base)).fits is True
    files = {file.path for file in record.files}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    assert not files & {"optimizer.pt", "trainer_state.json", "training_args.bin", "rng_state.pth", "scheduler.pt"}


def _with_code(begin: Any, callback: RegisterCallback, folder: Path) -> Any:
    def called(*given: Any, **more: Any) -> None:
        begin(*given, **more)
        callback._code = runs.code(folder)

    return called


def test_other_data_have_another_fingerprint() -> None:
    one = rows()
    assert runs.fingerprint(one) == runs.fingerprint(rows())
    assert runs.fingerprint(one) != runs.fingerprint(rows(seed=1))
    assert runs.fingerprint(one) != runs.fingerprint(one[:-1])
    assert runs.fingerprint([*one[:-1], one[0]]) != runs.fingerprint(one)
    assert runs.fingerprint([]) == runs.fingerprint([])
    long = [{"text": str(number)} for number in range(5000)]
    assert runs.fingerprint(long).startswith("rows-1024:")
    assert runs.fingerprint([*long[:-1], {"text": "x"}]) != runs.fingerprint(long)


def test_what_a_record_keeps_of_the_settings(tmp_path: Path) -> None:
    said = {
        "lr": 1e-3,
        "warmup": 0,
        "out": str(tmp_path),
        "where": "~/runs",
        "token": "hf_" + "a" * 30,
        "masked": "<HUB_TOKEN>",
        "nan": float("nan"),
        "modules": ["q_proj", "v_proj"],
        "odd": object(),
    }
    assert runs.settings(said, {"warmup": 0}) == {"lr": 1e-3, "nan": "nan", "modules": ["q_proj", "v_proj"]}
    assert runs.settings(said, {"warmup": 0}, ["warmup"])["warmup"] == 0


class Killed(BaseException):
    """What a signal is in here: nothing of the trainer catches it."""


@pytest.mark.parametrize("where", ["before", "within"])
def test_a_run_that_is_killed_around_a_save_is_whole_when_it_is_resumed(
    where: str, base: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``before``: a checkpoint is saved, and the registry has not heard of it; ``within``: its files are half there."""

    class Kill(transformers.TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if state.global_step == 4 and where == "before":
                raise Killed

    if where == "within":
        saved = transformers.Trainer._save_optimizer_and_scheduler

        def cut(self: Any, output_dir: str) -> None:
            if output_dir.endswith("-4"):
                file = Path(output_dir) / "adapter_model.safetensors"
                file.write_bytes(file.read_bytes()[:-100])
                raise Killed
            saved(self, output_dir)

        monkeypatch.setattr(transformers.Trainer, "_save_optimizer_and_scheduler", cut)
    out = tmp_path / "out"
    with pytest.raises(Killed):
        train(base, out, Kill(), RegisterCallback("tickets"), max_steps=6)
    assert len(Home(home).versions("tickets")) == 1
    monkeypatch.undo()
    monkeypatch.setenv("ADAPTERKIT_HOME", str(home))
    if where == "within":
        shutil.rmtree(out / "checkpoint-4")  # the trainer itself cannot go on from it
    second = RegisterCallback("tickets")
    train(base, out, second, resume=True, max_steps=6)
    assert [verbs.show(ref).record.meta["step"] for ref in second.registered] == ["4", "6"]
    assert [verbs.show(f"tickets@{n}").record.meta["step"] for n in (1, 2, 3)] == ["2", "4", "6"]
    again = RegisterCallback("tickets")
    train(base, out, again, resume=True, max_steps=6)
    assert again.registered == []  # nothing twice


def test_what_cannot_be_registered_is_said_and_the_training_goes_on(
    base: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback = RegisterCallback("tickets", base=tmp_path / "nowhere")
    trainer = train(base, tmp_path / "out", callback)
    assert trainer.state.global_step == 4
    assert len(callback.failures) == 2
    assert "nowhere" in callback.failures[0]
    assert not callback.registered
    with pytest.raises(AdapterkitError, match="nowhere"):
        train(base, tmp_path / "strict", RegisterCallback("tickets", base=tmp_path / "nowhere", strict=True))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    args = transformers.TrainingArguments(
        str(tmp_path / "full"), report_to=[], use_cpu=True, max_steps=1, save_steps=1, disable_tqdm=True
    )
    whole = RegisterCallback("whole")
    transformers.Trainer(model, args, train_dataset=rows(), callbacks=[whole]).train()
    assert "holds no adapter" in whole.failures[0]


def test_a_base_that_is_only_named(home: Path, base: Path) -> None:
    found = base_identity(None, "org/not-here", None)
    assert found is not None
    assert (found.id, found.commit, found.merkle) == ("org/not-here", "", "")
    local = base_identity(None, str(base), None)
    assert local is not None
    assert local.id == ""
    assert base_identity(None, "", None) is None


CHILD = """
import os, signal, sys
sys.path[:0] = sys.argv[3:]
from pathlib import Path
import transformers
from test_transformers_callback import train
from adapterkit.integrations.transformers import RegisterCallback
from adapterkit.registry import blobs
kept, count = blobs.put_file, [0]
def kill(*given, **more):
    count[0] += 1
    if count[0] == int(os.environ["KILL_AT"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return kept(*given, **more)
blobs.put_file = kill
train(Path(sys.argv[1]), Path(sys.argv[2]), RegisterCallback("tickets"), resume=os.environ.get("RESUME") == "1")
"""


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 2, 3, 4, 5, 6])
def test_sigkill_while_it_registers(at: int, base: Path, home: Path, tmp_path: Path) -> None:
    out, here = tmp_path / "out", Path(__file__).parent
    command = [sys.executable, "-c", CHILD, str(base), str(out), str(here), str(here.parent)]
    done = subprocess.run(command, env={**os.environ, "KILL_AT": str(at)}, check=False, timeout=900)
    assert done.returncode == -signal.SIGKILL
    from adapterkit.registry.fsck import fsck

    assert fsck(home=home).clean
    done = subprocess.run(command, env={**os.environ, "KILL_AT": "0", "RESUME": "1"}, check=False, timeout=900)
    assert done.returncode == 0
    steps = [verbs.show(f"tickets@{n}").record.meta["step"] for n in Home(home).versions("tickets")]
    assert steps == ["2", "4"]
    assert fsck(home=home).clean


def test_axolotl_gets_the_callback_by_its_config() -> None:
    """``BasePlugin`` of src/axolotl/integrations/base.py: get_input_args names a pydantic model, callbacks are a list."""
    pytest.importorskip("pydantic")
    from importlib import import_module

    from adapterkit.integrations.axolotl import RegisterPlugin

    plugin = RegisterPlugin()
    module, _, name = plugin.get_input_args().rpartition(".")
    model = getattr(import_module(module), name)
    assert set(model.model_fields) == {"adapterkit_name", "adapterkit_alias", "adapterkit_strict"}
    assert plugin.add_callbacks_pre_trainer({}, None) == []
    config = {"adapterkit_name": "tickets", "datasets": [{"path": "org/tickets"}, {"path": "/data/x"}]}
    (callback,) = plugin.add_callbacks_pre_trainer(config, None)
    assert (callback.name, callback.data, callback.strict) == ("tickets", "org/tickets", False)


def test_llama_factory_gets_the_callback_by_its_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``run_exp(args, callbacks)`` of src/llamafactory/train/tuner.py."""
    from types import ModuleType

    from adapterkit.errors import NotFound, UsageError
    from adapterkit.integrations import llamafactory

    config = tmp_path / "train.yaml"
    config.write_text("stage: sft\ndataset: tickets_v3\nadapterkit_name: tickets\nlearning_rate: 1.0e-4\n")
    with pytest.raises(NotFound, match="not installed"):
        llamafactory.main([str(config)])
    seen: dict[str, Any] = {}
    for name in ("llamafactory", "llamafactory.train", "llamafactory.train.tuner"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["llamafactory.train.tuner"].run_exp = lambda **given: seen.update(given)  # type: ignore[attr-defined]
    llamafactory.main([str(config), "learning_rate=2e-4", "adapterkit_alias=candidate"])
    assert seen["args"] == {"stage": "sft", "dataset": "tickets_v3", "learning_rate": "2e-4"}
    (callback,) = seen["callbacks"]
    assert (callback.name, callback.alias, callback.data) == ("tickets", "candidate", "tickets_v3")
    for text, error in (("stage: sft", UsageError), ("- a", UsageError), ("a: [", UsageError)):
        config.write_text(text)
        with pytest.raises(error):
            llamafactory.main([str(config)])
    with pytest.raises(NotFound):
        llamafactory.main([str(tmp_path / "none.yaml")])
    with pytest.raises(UsageError):
        llamafactory.main([])
