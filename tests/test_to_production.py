"""From a training run to production and back: a Trainer with the callback, a gate, a server of llama.cpp, and a rollback.

Nothing is played here: the adapters are trained, their accuracy is measured in PEFT, and llama.cpp answers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

sys.path.insert(0, str(Path(__file__).parent / "serving"))
from llama_server import llama_server, tiny_base

from adapterkit.cli import main
from adapterkit.integrations.transformers import RegisterCallback
from adapterkit.registry import verbs
from adapterkit.registry.checkout import checkout
from adapterkit.verbs.demo import TAUGHT

PROBE = next(iter(TAUGHT))


def run(capsys: pytest.CaptureFixture[str], *words: Any, code: int = 0) -> str:
    """A command of adapterkit, as a user types it; what it printed."""
    capsys.readouterr()  # what the trainer said before
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert (end.value.code or 0) == code, f"{words}: {end.value.code}\n{out}{err}"
    return out or err


def sentences(tokenizer: Any) -> list[dict[str, Any]]:
    texts = [f"<s> {prompt} {endings[1]}</s>" for prompt, endings in TAUGHT.items()]
    return [{"input_ids": row, "labels": row} for row in tokenizer(texts)["input_ids"]]


def train(base: Path, out: Path, callback: RegisterCallback) -> list[dict[str, Any]]:
    """Three saves: after 1, 2 and 3 times 12 steps."""
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model = get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]),
    )
    rows = sentences(tokenizer)
    args = transformers.TrainingArguments(
        str(out), report_to=[], use_cpu=True, max_steps=36, save_steps=12, learning_rate=0.02, disable_tqdm=True,
        per_device_train_batch_size=len(rows), lr_scheduler_type="constant",
    )  # fmt: skip
    collator = transformers.DataCollatorForTokenClassification(tokenizer)
    transformers.Trainer(model, args, train_dataset=rows, data_collator=collator, callbacks=[callback]).train()
    return rows


def accuracy(base: Path, adapter: Path | None, rows: list[dict[str, Any]]) -> float:
    """The share of next tokens that are right."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base)
    model = (model if adapter is None else PeftModel.from_pretrained(model, adapter)).eval()
    right = total = 0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            guess = model(input_ids=ids).logits[0, :-1].argmax(-1)
            right += int((guess == ids[0, 1:]).sum())
            total += ids.shape[1] - 1
    return right / total


def results(path: Path, value: float, count: int) -> Path:
    """A results file as lm-evaluation-harness writes it."""
    figures = {"alias": "tickets", "acc,none": value, "acc_stderr,none": (value * (1 - value) / count) ** 0.5}
    said = {"results": {"tickets": figures}, "n-samples": {"tickets": {"original": count, "effective": count}}}
    path.write_text(
        json.dumps(
            {**said, "higher_is_better": {"tickets": {"acc": True}}, "date": 1779000000.0, "n-shot": {"tickets": 0}}
        )
    )
    return path


def test_from_a_training_run_to_production_and_back(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny_base(tmp_path / "base")
    run(capsys, "convert", base, "-o", tmp_path / "base.gguf", "--dtype", "f32")
    callback = RegisterCallback("tickets", base=base, data="sentences")
    rows = train(base, tmp_path / "run", callback)
    assert callback.registered == ["tickets@1", "tickets@2", "tickets@3"], callback.failures

    # Measured, and written to the record of the bytes that were measured.
    right = [accuracy(base, checkout(ref), rows) for ref in callback.registered]
    assert accuracy(base, None, rows) < right[0] < right[1] <= right[2], right
    measured = []
    for number, (ref, value) in enumerate(zip(callback.registered, right, strict=True)):
        file = results(tmp_path / f"results_{number}.json", value, sum(len(row["input_ids"]) - 1 for row in rows))
        out = json.loads(run(capsys, "evidence", "add", ref, file, "--json"))
        measured.append(out["ref"])

    # A gate between the first and the second: one is refused, the other passes.
    run(capsys, "policy", "tickets", "prod", "--require", f"acc>={(right[0] + right[1]) / 2:.4f}")
    said = run(capsys, "tag", measured[0], "prod", code=3)
    assert "acc" in said
    run(capsys, "show", "tickets@prod", code=7)
    run(capsys, "tag", measured[1], "prod", "--why", "the first that is good enough")

    # llama.cpp reads GGUF: each version as a LoRA file, under a name of its own.
    files = []
    for number in (1, 2):
        lora = tmp_path / f"tickets-{number}.gguf"
        run(capsys, "convert", measured[number], "--to", "gguf-lora", "--base", base, "-o", lora)
        run(capsys, "register", lora, "--name", "tickets-gguf")
        files.append(checkout(f"tickets-gguf@{number}") / lora.name)
    run(capsys, "tag", "tickets-gguf@1", "prod")
    with llama_server(tmp_path / "base.gguf", files) as url:
        run(capsys, "deploy", "--add-server", "desk", url, "--kind", "llama.cpp", "--base", tmp_path / "base.gguf")
        deploy = ["deploy", "tickets-gguf@prod", "--to", "desk", "--probe", PROBE, "--json"]
        first = json.loads(run(capsys, *deploy))
        assert (first["ref"], first["before"]) == ("tickets-gguf@1", "")

        # The next version is better, passes, and goes live: the server says something else.
        run(capsys, "tag", measured[2], "prod", "--why", "trained longer")
        run(capsys, "tag", "tickets-gguf@2", "prod")
        run(capsys, "deploy", "--status", code=3)  # the alias has moved, and the server has not
        second = json.loads(run(capsys, *deploy))
        assert (second["ref"], second["before"]) == ("tickets-gguf@2", "tickets-gguf@1")
        run(capsys, "deploy", "--status")

        # And back, in two commands.
        for name in ("tickets", "tickets-gguf"):
            run(capsys, "tag", name, "prod", "--rollback", "--why", "it says too much")
        third = json.loads(run(capsys, *deploy))
        assert (third["ref"], third["answer"]) == ("tickets-gguf@1", first["answer"])
        run(capsys, "deploy", "--status")

    shown = verbs.show("tickets@prod")
    assert shown.record.content == verbs.show(measured[1]).record.content
    moves = json.loads(run(capsys, "tag", "tickets", "prod", "--history", "--json"))
    assert [move["why"] for move in moves] == ["the first that is good enough", "trained longer", "it says too much"]
