"""What `check --for` says of an adapter, and that the command it prints mends it."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from models import make_adapter, peft_merged, read_tensors

from adapterkit.cli import main
from adapterkit.serving.expectations import FEATURES, SERVERS
from adapterkit.verbs.check import check
from adapterkit.verbs.verify import verify


def test_every_row_names_a_known_feature_its_source_and_a_way_out() -> None:
    assert set(SERVERS) == {"vllm", "sglang", "tgi", "lorax", "llama.cpp", "ollama", "mlx"}
    for name, rows in SERVERS.items():
        assert len({row.feature for row in rows}) == len(rows), name
        for row in rows:
            assert row.feature in FEATURES
            assert row.verdict in ("refused", "wrong", "depends")
            assert row.source
            assert row.fix


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
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, timeout=120)
    base = tmp_path / "base"
    plain = peft.LoraConfig(r=4, target_modules=["q_proj"])
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


def test_a_module_that_lacks_factors_in_some_layer_is_told_where_that_matters(
    make_base: Callable[..., Path], tmp_path: Path
) -> None:
    import peft

    base = make_base("llama")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "model.layers.0.mlp.up_proj"])
    adapter = make_adapter(tmp_path / "adapter", base, config)
    assert "tgi-some_layers" in {finding.code for finding in check(base, [adapter], server="tgi").findings}
    assert not any("some_layers" in finding.code for finding in check(base, [adapter], server="vllm").findings)
