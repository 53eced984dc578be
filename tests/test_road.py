"""The whole road on a loopback Hub: an adapter trained by PEFT, registered, checked, folded, converted, published, and on
another machine's home pulled, traced to its origin and loaded by transformers and PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub import Repo
from hub_writes import WritableHub, writable_hub  # noqa: F401  (the fixture hub)

from adapterkit.cli import main

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
BASE = "someone/base"
TEXT = torch.arange(1, 33).reshape(2, 16)


def trained(base: Path, folder: Path) -> Path:
    """A LoRA that a few steps of gradient descent made, as PEFT saves it; its base named by its Hub id."""
    import peft
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"])
    )
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.02)
    losses = []
    for _ in range(6):
        loss = wrapped(input_ids=TEXT, labels=TEXT).loss
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    wrapped.peft_config["default"].base_model_name_or_path = BASE
    wrapped.save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=TEXT).logits
    return found


def test_from_training_to_another_machine(
    hub: WritableHub,
    make_base: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import peft
    import transformers

    def run(*arguments: object, code: int = 0) -> Any:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([*map(str, arguments), "--json"])
        out, err = capsys.readouterr()
        assert stopped.value.code == code, out + err
        return json.loads(out)

    local = make_base("llama")
    hub.repos[BASE] = Repo()
    commit = hub.repos[BASE].commit({path.name: path.read_bytes() for path in local.iterdir()})
    adapter = trained(local, tmp_path / "tone")

    # ---- at home: what is it, does it fit, fold, convert, record
    made = run("register", adapter, "--name", "tone", "--base", BASE, "--meta", "license=apache-2.0")
    assert made["record"]["base"]["commit"] == commit
    assert run("check", BASE, "tone")["bases"][0]["verdict"] == "same"
    run("merge", BASE, "tone", "-o", tmp_path / "merged", "--fidelity", "--attest")
    run("register", tmp_path / "merged", "--name", "desk")
    run("convert", "desk", "--to", "bf16", "-o", tmp_path / "half")
    run("register", tmp_path / "half", "--name", "desk-half")
    run("tag", "tone@1", "prod")
    digests = {name: run("show", name)["content"] for name in ("tone", "desk", "desk-half")}

    # ---- publish: nothing but the allow-list, and cards that the Hub's own check takes
    for name in ("tone", "desk", "desk-half"):
        (tmp_path / name).mkdir(exist_ok=True)
        run("push", name, f"my-org/{name}", "--tag", "v1")
    assert set(hub.files("my-org/tone")) == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "adapterkit.json")
    }
    for name in ("desk", "desk-half"):
        extra = {"adapterkit.intoto.json"} if name == "desk" else set()
        assert set(hub.files(f"my-org/{name}")) == extra | {
            *("README.md", "adapterkit.json", "config.json", "generation_config.json", "model.safetensors")
        }
    published = [data for name in digests for data in hub.files(f"my-org/{name}").values()]
    assert not any(str(tmp_path).encode() in data for data in published)
    for name, relation in (("tone", "adapter"), ("desk", "merge")):
        front = yaml.safe_load(hub.files(f"my-org/{name}")["README.md"].decode().split("---\n")[1])
        assert (front["base_model"], front["base_model_relation"]) == (BASE, relation)
        assert front.get("license") == ("apache-2.0" if name == "tone" else None)

    # ---- elsewhere: the same bytes, the same chain
    monkeypatch.setenv("ADAPTERKIT_HOME", str(tmp_path / "elsewhere"))
    for name in ("desk-half", "desk", "tone"):
        pulled = run("pull", f"my-org/{name}@v1", "--name", name)
        assert pulled["record"]["origin"]["repo"] == f"my-org/{name}"
        assert run("show", name)["content"] == digests[name]
    assert run("fsck")["problems"] == []
    family = run("lineage", "desk-half")
    edges = {(edge["parent"], edge["child"]): edge["operation"] for edge in family["edges"]}
    assert edges[digests["tone"], digests["desk"]] == "merge"
    assert edges[digests["desk"], digests["desk-half"]] == "convert"
    above = [node for node in family["nodes"] if node["kind"] == "base"]
    assert [node["label"] for node in above] == [f"{BASE}@{commit[:7]}"]

    # ---- and both libraries load what was published, and compute what was trained
    cache = {"cache_dir": tmp_path / "another-cache"}
    base = transformers.AutoModelForCausalLM.from_pretrained(BASE, **cache)
    before = logits(base)
    there = logits(peft.PeftModel.from_pretrained(base, "my-org/tone", **cache))
    here = logits(peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(local), adapter))
    assert torch.equal(there, here)
    assert (there - before).abs().max() > 0.01  # training did something
    whole = logits(transformers.AutoModelForCausalLM.from_pretrained("my-org/desk", **cache))
    assert torch.allclose(whole, here, atol=2e-4)
    assert (whole - before).abs().max() > 0.01
