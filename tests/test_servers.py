"""What `check --for` says of an adapter, and that the command it prints mends it."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from models import make_adapter, peft_merged, plain_adapter, plain_base, read_tensors

from adapterkit.adapters.load import load_adapter
from adapterkit.checkpoint.open import open_checkpoint
from adapterkit.cli import app, main
from adapterkit.provenance.register import register
from adapterkit.serving import servers as package
from adapterkit.serving.expectations import expected
from adapterkit.serving.features import FEATURES
from adapterkit.serving.handover import write_handover
from adapterkit.serving.servers import servers
from adapterkit.verbs.check import check
from adapterkit.verbs.verify import verify


def test_every_row_names_a_known_feature_its_source_and_a_way_out() -> None:
    assert set(servers()) == {"vllm", "sglang", "tgi", "lorax", "llama.cpp", "ollama", "mlx", "semantic-router"}
    for name, server in servers().items():
        assert server.expectations, name
        told = [(row.feature, row.architectures) for row in server.expectations]
        assert len(set(told)) == len(told), name
        for row in server.expectations:
            assert row.feature in FEATURES
            assert row.verdict in ("refused", "wrong", "depends")
            assert row.source
            assert row.fix


TOY = """
from adapterkit.serving.server import Expectation, Launch, ModelFile, Ranks, Server, StoredForms

SERVER = Server(
    "toy",
    expectations=(
        Expectation("rslora", "wrong", "it divides by r", "toy docs", "convert {adapter} --base {base}"),
        Expectation("rslora", "refused", "not for this kind", "toy docs", architectures=("qwen2",)),
    ),
    ranks=Ranks(largest=8, default=4, option="--rank", source="toy docs", steps=(2, 4, 8)),
    stored=StoredForms(("awq",), "toy docs"),
    launch=Launch("toy {path}", "toy {base} --rank {rank} {each}", "toy docs", each="{name}:{path}"),
    file=ModelFile("toy.txt", lambda model, header, generation: (f"load {model}", ()), script=False, start="toy {path}"),
)
"""


@pytest.fixture
def _toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server in a file of its own, as one would be added to the package."""
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "toy.py").write_text(TOY)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(rows)])
    servers.cache_clear()
    yield
    servers.cache_clear()
    sys.modules.pop("adapterkit.serving.servers.toy", None)


@pytest.mark.usefixtures("_toy")
def test_a_server_is_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`check --for`, `serve-args` and the file beside a GGUF model know a server as soon as its file is there."""
    base = plain_base(tmp_path / "base")
    adapter = plain_adapter(tmp_path / "adapter", base, rank=6, use_rslora=True, base_model_name_or_path="org/base")
    with pytest.raises(SystemExit) as stopped:
        main(["check", str(base), str(adapter), "--for", "toy", "--json"])
    assert stopped.value.code == 3
    found = {one["code"]: one for one in json.loads(capsys.readouterr().out)["findings"]}
    assert found["toy-rslora"]["message"] == "toy, rsLoRA scaling: wrong: it divides by r [toy docs]"
    assert found["toy-rslora"]["hint"] == f"convert {adapter} --base {base}"
    assert found["toy-rank_4"]["level"] == "warning"

    for verb in ("merge", "convert", "check"):  # and it is one of the choices
        command = app.get_command(click.Context(app), verb)
        assert command is not None
        (option,) = [one for one in command.params if "--for" in one.opts]
        shown = [one.value for one in option.shell_complete(click.Context(command), "to")]
        assert shown == ["toy"], verb

    monkeypatch.setenv("ADAPTERKIT_HOME", str(tmp_path / "home"))
    register(adapter, "support")
    with pytest.raises(SystemExit) as stopped:
        main(["serve-args", "support", "--for", "toy"])
    assert not stopped.value.code
    words = shlex.split(capsys.readouterr().out)
    assert words[:4] == ["toy", "org/base", "--rank", "8"]  # the next one that it takes
    assert words[4].startswith("support:/")

    tiny_gguf(tmp_path / "m.gguf")
    written = write_handover(tmp_path / "m.gguf", "toy")
    assert (tmp_path / "m.gguf.toy.txt").read_text() == "load ./m.gguf"
    assert written.start == f"toy {tmp_path}/m.gguf.toy.txt"


def tiny_gguf(path: Path) -> None:
    import numpy as np
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_tensor("output.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.usefixtures("_toy")
def test_what_is_said_of_one_architecture_and_of_a_stored_form(tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base")
    adapter = plain_adapter(tmp_path / "adapter", base, use_rslora=True)
    config = json.loads((base / "config.json").read_text())
    for kind, verdict in (("llama", "wrong"), ("qwen2", "refused")):
        (base / "config.json").write_text(json.dumps({**config, "model_type": kind}))
        said = [one.message for one in check(base, [adapter], server="toy").findings if one.code == "toy-rslora"]
        assert [text.split(": ")[1] for text in said] == [verdict]
    opened, loaded = open_checkpoint(base), load_adapter(adapter)
    for method, told in (("awq", []), ("hqq", ["a base stored as hqq"]), (None, [])):
        stored = replace(opened, config={"model_type": "llama", "quantization_config": {"quant_method": method}})
        titles = [title for title, row in expected(servers()["toy"], loaded, stored) if row.feature == "stored"]
        assert titles == told


@pytest.mark.parametrize(("server", "level"), [("vllm", "warning"), ("sglang", "error")])
def test_factors_on_the_vision_part(server: str, level: str, tmp_path: Path) -> None:
    """vLLM leaves them out unless it is started for them (#26674); SGLang drops or misplaces them (#28784)."""
    base = plain_base(tmp_path / "base")
    adapter = load_adapter(plain_adapter(tmp_path / "adapter", base))
    (key,) = [key for key in adapter.tensors if key.endswith("lora_A.weight")][:1]
    seeing = replace(
        adapter, tensors={f"model.vision_tower.layers.0.{key.split('.')[-3]}.lora_A.weight": adapter.tensors[key]}
    )
    rows = {row.feature: row.verdict for _, row in expected(servers()[server], seeing, open_checkpoint(base))}
    assert rows["tower"] == {"warning": "depends", "error": "wrong"}[level]
    assert "tower" not in {row.feature for _, row in expected(servers()[server], adapter, open_checkpoint(base))}


def configs() -> dict[str, Any]:
    import peft

    modules = ["q_proj", "up_proj"]
    return {
        "rslora": peft.LoraConfig(r=6, lora_alpha=9, target_modules=modules, use_rslora=True),
        "patterns": peft.LoraConfig(
            r=6, lora_alpha=9, target_modules=modules, rank_pattern={"q_proj": 3}, alpha_pattern={"up_proj": 2}
        ),
        "dora": peft.LoraConfig(r=6, lora_alpha=9, target_modules=modules, use_dora=True),
        "pissa": peft.LoraConfig(r=6, lora_alpha=6, target_modules=modules, init_lora_weights="pissa"),
        "loha": peft.LoHaConfig(r=4, target_modules=modules),
    }


@pytest.mark.parametrize(
    ("server", "kind"),
    [
        ("vllm", "patterns"),
        ("vllm", "dora"),
        ("vllm", "pissa"),
        ("sglang", "rslora"),
        ("tgi", "patterns"),
        ("tgi", "dora"),
        ("lorax", "loha"),
        ("llama.cpp", "pissa"),
    ],
)
def test_the_printed_command_mends_it(
    server: str, kind: str, make_base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base("llama")
    adapter = make_adapter(tmp_path / "it's mine", base, configs()[kind])  # a name that a shell would trip over
    before = check(base, [adapter], server=server)
    hints = {finding.hint for finding in before.findings if finding.level == "error"}
    assert not before.ok
    assert len(hints) == 1
    words = shlex.split(hints.pop().partition("adapterkit ")[2])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert not stopped.value.code
    after = check(base, [tmp_path / "plain"], server=server)
    assert after.ok, after.findings
    # And it still is what was trained, which PEFT says.
    one, two = (peft_merged(base, a, tmp_path / f"m{i}").exact for i, a in enumerate((adapter, tmp_path / "plain")))
    weights = read_tensors(base)
    for name, tensor in one.items():
        scale = float((tensor - weights[name]).abs().max())
        assert float((two[name] - tensor).abs().max()) <= 2e-5 * scale


@pytest.mark.parametrize("kind", ["plain", "rslora", "loha"])
def test_ollama_takes_no_adapter_and_the_printed_command_folds_it_in(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.34.1 refuses ADAPTER (ollama#14969), so whatever the adapter is, the way is a GGUF file with a Modelfile."""
    import peft

    script = Path(__file__).parents[1] / "examples/recipe/make_inputs.py"
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, timeout=900)
    base = tmp_path / "base"
    plain = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"])
    adapter = make_adapter(tmp_path / "it's mine", base, {**configs(), "plain": plain}[kind])
    report = check(base, [adapter], server="ollama")
    assert not report.ok
    errors = [finding for finding in report.findings if finding.level == "error"]
    assert errors[0].code == "ollama-adapter"
    assert "from 0.34.1" in errors[0].message
    assert "ollama/ollama#14969" in errors[0].message
    assert {one.code for one in errors[1:]} == {
        "plain": set(),
        "rslora": {"ollama-rslora"},
        "loha": {"ollama-not_lora"},
    }[kind]
    assert all("up to 0.34.0" in one.message for one in errors[1:])
    (hint,) = {one.hint for one in errors}
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(shlex.split(hint.partition("adapterkit ")[2]))
    assert not stopped.value.code
    modelfile = (tmp_path / "merged.gguf.Modelfile").read_text()
    assert modelfile.startswith("FROM ./merged.gguf\n")
    assert "ADAPTER" not in modelfile
    assert verify(tmp_path / "merged.gguf", base=base, adapters=[adapter]).ok
    # And by PEFT and llama.cpp's reader, which know nothing of us. (Rows of q are permuted in GGUF; those of up are not.)
    exact = peft_merged(base, adapter, tmp_path / "peft").exact
    stored = {one.name: one for one in GGUFReader(tmp_path / "merged.gguf").tensors}
    before = read_tensors(base)
    for name, wanted in exact.items():
        if not name.endswith("up_proj.weight"):
            continue
        one = stored[f"blk.{name.split('.')[2]}.ffn_up.weight"]
        got = torch.from_numpy(dequantize(one.data, one.tensor_type).copy()).view(wanted.shape)
        change = float((wanted - before[name].float()).abs().max())
        assert change > 0
        assert float((got - wanted).abs().max()) <= 2**-8 * float(wanted.abs().max())
        assert float((got - wanted).abs().mean()) < 0.1 * float((wanted - before[name].float()).abs().mean())


def test_a_module_that_lacks_factors_in_some_layer_is_told_where_that_matters(
    make_base: Callable[..., Path], tmp_path: Path
) -> None:
    import peft

    base = make_base("llama")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "model.layers.0.mlp.up_proj"])
    adapter = make_adapter(tmp_path / "adapter", base, config)
    assert "tgi-some_layers" in {finding.code for finding in check(base, [adapter], server="tgi").findings}
    assert not any("some_layers" in finding.code for finding in check(base, [adapter], server="vllm").findings)
