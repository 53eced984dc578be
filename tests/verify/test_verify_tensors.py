"""The tensor level on merges that are right, on thresholds, options from records, and bad input."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from models import plain_adapter, plain_base, random_tensors, read_tensors, write_checkpoint
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.cli import main
from adapterkit.errors import OutputError, UsageError
from adapterkit.verbs.verify import verify
from adapterkit.verbs.verify.report import EQUAL, FORMAT, OFF, ROUNDING
from adapterkit.verbs.verify.tensors import _same_bytes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Base, adapter, merge."""
    folder = tmp_path_factory.mktemp("verify")
    base = plain_base(folder / "base", shards=2)
    adapter = plain_adapter(folder / "adapter", base)
    adapterkit.merge(base, [adapter], folder / "merged")
    return base, adapter, folder / "merged"


def rewritten(
    merged: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], Any], config: dict[str, Any] | None = None
) -> Path:
    """A copy of a folder with other tensors, by the safetensors library."""
    tensors = read_tensors(merged)
    change(tensors)
    said = json.loads((merged / "config.json").read_text())
    return write_checkpoint(out, tensors, {**said, **(config or {})})


def kinds(report: Any) -> list[str]:
    return [finding.kind for finding in report.findings if finding.severity != "note"]


@pytest.mark.parametrize("dtype", ["auto", "f16", "f32"])
def test_our_own_merge_is_equal_in_every_dtype(dtype: str, made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, _ = made
    adapterkit.merge(base, [adapter], tmp_path / "out", dtype=dtype, max_shard_size="3kB")
    report = verify(tmp_path / "out", base=base, adapters=[adapter])
    assert report.ok
    assert report.tensors.counts == {EQUAL: report.tensors.total}
    assert report.tensors.touched == 6
    assert report.tensors.untouched_equal == report.tensors.total - 6
    # Without the record: what the dtype is, the headers say.
    (tmp_path / "out" / "adapterkit.json").unlink()
    assert verify(tmp_path / "out", base=base, adapters=[adapter]).tensors.counts == {EQUAL: report.tensors.total}


def test_figures_are_those_of_numpy(made: tuple[Path, Path, Path]) -> None:
    import numpy as np

    base, adapter, merged = made
    row = verify(merged, base=base, adapters=[adapter]).tensors.tensors[0]
    w, there = (read_tensors(f)[row.name].double().numpy() for f in (base, merged))
    a, b = (t.double().numpy() for t in _factors(adapter, row.name))
    d, g = 2 * b @ a, there - w
    assert row.relative == pytest.approx(np.linalg.norm(d) / np.linalg.norm(w), rel=1e-4)
    assert row.retention == pytest.approx((g * d).sum() / (d * d).sum(), rel=1e-4)
    assert row.cosine == pytest.approx((g * d).sum() / np.linalg.norm(d) / np.linalg.norm(g), rel=1e-4)
    assert row.error == pytest.approx(np.linalg.norm(g - d) / np.linalg.norm(d), rel=1e-3)
    assert row.unmoved == pytest.approx((g == 0).mean(), abs=1e-6)


def _factors(adapter: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    stored = read_tensors(adapter)
    stem = f"base_model.model.{name.removesuffix('.weight')}"
    return stored[f"{stem}.lora_A.weight"], stored[f"{stem}.lora_B.weight"]


def test_rounded_twice_is_within_one_rounding(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """A tool that rounds the delta to bfloat16 before it adds it."""
    base, adapter, merged = made

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, w in read_tensors(base).items():
            if "q_proj" in name or "up_proj" in name:
                a, b = _factors(adapter, name)
                tensors[name] = w + (2 * b @ a).bfloat16()

    report = verify(rewritten(merged, tmp_path / "out", change), base=base, adapters=[adapter])
    assert report.ok
    assert report.tensors.counts[ROUNDING] == 6
    note = next(finding for finding in report.findings if finding.kind == "rounding")
    assert "within" in note.text
    assert max(row.steps or 0 for row in report.tensors.tensors) <= 1.5


@pytest.mark.parametrize("count", [1, 3])
def test_one_bit_of_an_untouched_tensor(count: int, made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, merged = made

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"].view(torch.int16).view(-1)[:count] ^= 1

    report = verify(rewritten(merged, tmp_path / "out", change), base=base, adapters=[adapter])
    assert not report.ok
    (row,) = [row for row in report.tensors.tensors if not row.touched]
    assert (row.name, row.status, row.differing) == ("lm_head.weight", "off", count)


def test_one_value_of_a_touched_tensor(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, merged = made
    name = "model.layers.1.mlp.up_proj.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][40, 3] += 2.0

    report = verify(rewritten(merged, tmp_path / "out", change), base=base, adapters=[adapter])
    assert not report.ok
    assert [row.name for row in report.tensors.tensors if row.status == "off"] == [name]
    assert next(row for row in report.tensors.tensors if row.name == name).differing == 1


def test_missing_extra_and_misshapen(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, merged = made

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.0.input_layernorm.weight"]
        tensors["surplus.weight"] = torch.zeros(3)
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()

    report = verify(rewritten(merged, tmp_path / "out", change), base=base, adapters=[adapter])
    assert {"missing", "extra", "other shape"} <= set(kinds(report))
    assert report.tensors.counts["missing"] == report.tensors.counts["extra"] == report.tensors.counts["shape"] == 1
    assert any("[39, 16] and should be [40, 16]" in finding.text for finding in report.findings)


def test_wrapped_tensors_are_called_not_merged(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, _ = made
    out = rewritten(base, tmp_path / "out", lambda tensors: tensors.update(_prefixed(read_tensors(adapter))))
    report = verify(out, base=base, adapters=[adapter])
    assert "not merged" in kinds(report)


def _prefixed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(tensors)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, None),
        ({"model_type": "qwen2"}, "config"),
        ({"num_attention_heads": 4}, "config"),
        ({"torch_dtype": "float16"}, "config"),
    ],
)
def test_a_config_that_lies(
    config: dict[str, Any], kind: str | None, made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, adapter, merged = made
    out = rewritten(merged, tmp_path / "out", lambda tensors: None, config)
    report = verify(out, base=base, adapters=[adapter])
    assert (kind or "quantization_config left") in kinds(report)
    assert report.ok is (kind == "config" and "model_type" not in config)


def test_a_tie_that_only_the_config_undid(make_base: Callable[..., Path], tmp_path: Path) -> None:
    """A loader would make an output layer of random numbers."""
    base = make_base("llama", tie_word_embeddings=True)
    adapter = plain_adapter(tmp_path / "adapter", base, modules=["q_proj"])
    adapterkit.merge(base, [adapter], tmp_path / "out")
    assert verify(tmp_path / "out", base=base, adapters=[adapter]).ok
    out = rewritten(tmp_path / "out", tmp_path / "untied", lambda tensors: None, {"tie_word_embeddings": False})
    (finding,) = verify(out, base=base, adapters=[adapter]).errors
    assert finding.kind == "tied head"
    assert "MERGED has no lm_head.weight" in finding.text


def test_options_come_from_the_record(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, _ = made
    other = plain_adapter(tmp_path / "other", base, seed=9)
    out = tmp_path / "out"
    adapterkit.merge(base, [adapter, other], out, weights=[0.5, -0.25], method="ties", parameters={"density": 0.5})
    report = verify(out, base=base, adapters=[adapter, other])
    assert report.ok
    assert report.record
    assert report.options["method"] == "ties"
    assert [one.weight for one in report.inputs if one.role == "adapter"] == [0.5, -0.25]
    # Given in another order the record does not hold, and the weights would be the wrong way round.
    swapped = verify(out, base=base, adapters=[other, adapter], weights=[-0.25, 0.5], method="ties")
    assert "other adapter" in kinds(swapped)
    # Without the record its options are asked for, and given they do.
    (out / "adapterkit.json").unlink()
    assert not verify(out, base=base, adapters=[adapter, other]).ok
    given: dict[str, Any] = {"weights": [0.5, -0.25], "method": "ties", "parameters": {"density": 0.5}}
    assert verify(out, base=base, adapters=[adapter, other], **given).ok


def test_wrong_weights_are_told_apart(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, _ = made
    other = plain_adapter(tmp_path / "other", base, seed=9)
    adapterkit.merge(base, [adapter, other], tmp_path / "out", weights=[0.5, 2.0])
    report = verify(tmp_path / "out", base=base, adapters=[adapter, other], weights=[1.0, 1.0])
    (finding,) = report.errors
    assert finding.kind == "other weights"
    assert f"{adapter} 0.5, {other} 2" in finding.text


def test_a_damaged_record_is_said(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, merged = made
    shutil.copytree(merged, tmp_path / "out")
    path = tmp_path / "out" / "adapterkit.json"
    path.write_text(path.read_text().replace("merged", "merjed", 1))
    report = verify(tmp_path / "out", base=base, adapters=[adapter])
    assert kinds(report) == ["damaged record"]
    assert report.tensors.counts == {EQUAL: report.tensors.total}


def test_thresholds(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, _, _ = made
    small = plain_adapter(tmp_path / "small", base, lora_alpha=0.004)
    adapterkit.merge(base, [small], tmp_path / "out")
    report = verify(tmp_path / "out", base=base, adapters=[small])
    kept = report.tensors.retention
    assert kept < 0.9
    assert "swallowed" in kinds(report)
    assert report.ok is (kept >= 0.5)
    assert verify(tmp_path / "out", base=base, adapters=[small], min_retention=kept - 0.01).ok
    failed = verify(tmp_path / "out", base=base, adapters=[small], min_retention=kept + 0.01)
    assert not failed.ok
    assert f"min_retention= asks for {kept + 0.01:.1%}" in failed.errors[0].text


def test_a_threshold_for_the_cosine(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, _, _ = made
    small, out = plain_adapter(tmp_path / "small", base, lora_alpha=0.008), tmp_path / "out"
    assert run(["merge", base, small, "-o", out, "--min-cosine", "0.9999"]) == 3
    adapterkit.merge(base, [small], tmp_path / "wide", dtype="f32")
    stored, written, wide = (read_tensors(folder) for folder in (base, out, tmp_path / "wide"))
    moved, wanted = (
        torch.cat([(found[name].double() - stored[name].double()).flatten() for name in stored])
        for found in (written, wide)
    )
    exact = torch.nn.functional.cosine_similarity(moved, wanted, dim=0).item()
    assert 0.1 < exact < 0.998
    for limit, code in ((exact - 0.001, 0), (exact + 0.001, 3)):
        assert run(["merge", base, small, "-o", tmp_path / f"{code}", "--min-cosine", f"{limit}"]) == code
        command = ["verify", out, "--base", base, "--adapter", small, "--min-retention", "0"]
        assert run([*command, "--min-cosine", f"{limit}"]) == code
    failed = verify(out, base=base, adapters=[small], min_retention=0, min_cosine=exact + 0.001)
    assert [f"asks for {exact + 0.001:g}" in one.text for one in failed.errors] == [True]
    assert failed.thresholds.min_cosine == exact + 0.001
    # The error beside the change and the tensors that lose theirs have limits of their own, the same at both doors.
    error = failed.tensors.error
    names = [one.name for one in failed.tensors.tensors if one.touched and min(one.cosine, one.retention) < 0.5]
    assert [one.name for one in failed.tensors.dead] == names
    moved, wanted = moved - wanted, wanted
    assert error == pytest.approx((moved.norm() / wanted.norm()).item(), rel=1e-2)
    for option, limit, code in (
        ("--max-error", error * 1.01, 0),
        ("--max-error", error * 0.99, 3),
        ("--max-dead", len(names), 0),
    ):
        assert run(["merge", base, small, "-o", tmp_path / "held", "--force", option, f"{limit}"]) == code
        assert run([*command, option, f"{limit}"]) == code


@pytest.mark.parametrize("quant", ["nf4", "int8", "fp8"])
def test_quantized_folders(quant: str, tmp_path: Path) -> None:
    shapes = {"model.embed_tokens.weight": (64, 128), "lm_head.weight": (64, 128)}
    for layer in range(2):
        shapes[f"model.layers.{layer}.self_attn.q_proj.weight"] = (128, 128)
        shapes[f"model.layers.{layer}.mlp.up_proj.weight"] = (256, 128)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
    config |= {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 64}
    base = write_checkpoint(tmp_path / "base", random_tensors(shapes, "bfloat16"), config)
    adapter = plain_adapter(tmp_path / "adapter", base)
    adapterkit.merge(base, [adapter], tmp_path / "out", quant=quant)
    for _ in range(2):
        report = verify(tmp_path / "out", base=base, adapters=[adapter])
        assert report.ok, report.errors
        assert report.tensors.counts == {EQUAL: len(shapes)}
        assert 0.9 < report.tensors.retention < 1.1
        (tmp_path / "out" / "adapterkit.json").unlink(missing_ok=True)
    # Without the adapter, the same format holds something else.
    adapterkit.merge(base, [adapter], tmp_path / "none", quant=quant, weights=[0.0])
    (tmp_path / "none" / "adapterkit.json").unlink()
    report = verify(tmp_path / "none", base=base, adapters=[adapter])
    assert [finding.kind for finding in report.errors] == ["not applied"]


def test_another_encoding_of_the_same_values_is_as_good(tmp_path: Path) -> None:
    """NF4 whose scales were rounded: other bytes, and no further from the values."""
    test = {"model.layers.0.self_attn.q_proj.weight": (128, 128), "model.embed_tokens.weight": (8, 128)}
    config = {"model_type": "llama", "tie_word_embeddings": True, "hidden_size": 128, "num_attention_heads": 2}
    base = write_checkpoint(tmp_path / "base", random_tensors(test, "bfloat16"), config | {"num_hidden_layers": 1})
    adapter = plain_adapter(tmp_path / "adapter", base)
    adapterkit.merge(base, [adapter], tmp_path / "out", quant="nf4")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        scales = tensors["model.layers.0.self_attn.q_proj.weight.absmax"]
        scales *= 1.002

    report = verify(rewritten(tmp_path / "out", tmp_path / "other", change), base=base, adapters=[adapter])
    assert report.ok, report.errors
    assert report.tensors.counts == {EQUAL: 1, FORMAT: 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapters": []}, "no adapter was given"),
        ({"level": "deep"}, "is not a value of level"),
        ({"max_kl": 0.1, "level": "tensors"}, "--max-kl needs the models to answer"),
        ({"wieghts": [1.0]}, "no option 'wieghts'; did you mean 'weights'"),
        ({"weights": [1.0, 2.0]}, "2 weights for 1 adapter"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str, made: tuple[Path, Path, Path]) -> None:
    base, adapter, merged = made
    with pytest.raises(UsageError, match=message):
        verify(merged, **{"base": base, "adapters": [adapter], **options})


def test_the_same_report_with_any_number_of_threads(made: tuple[Path, Path, Path]) -> None:
    base, adapter, merged = made
    one, four = (verify(merged, base=base, adapters=[adapter], jobs=jobs).tensors for jobs in (1, 4))
    assert one.tensors == four.tensors
    assert (one.retention, one.counts) == (four.retention, four.counts)


def run(arguments: list[Any]) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


def test_the_command_line(
    made: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter, merged = made
    assert run(["verify", merged, "--base", base, "--adapter", adapter]) == 0
    shown = capsys.readouterr().out
    assert "11 equal; 6 of 11 changed by adapters" in shown
    assert "verified:" in shown
    assert run(["verify", base, "--base", base, "--adapter", adapter]) == 3
    assert "error: not applied: all 6 tensors that the adapter changes equal the base" in capsys.readouterr().out
    assert run(["verify", base, "--base", base, "--adapter", adapter, "--json"]) == 3
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert report["findings"][0]["kind"] == "not applied"
    summary = tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    arguments = ["verify", base, "--base", base, "--adapter", adapter, "--step-summary"]
    assert (run(arguments), run(arguments)) == (3, 3)
    assert summary.read_text().count("not what was trained") == 2
    monkeypatch.delenv("GITHUB_STEP_SUMMARY")
    assert run(arguments) == 2
    assert run(["verify", tmp_path / "nowhere", "--base", base, "--adapter", adapter]) == 7


def test_evidence_goes_into_the_record(
    made: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter, merged = made
    out = tmp_path / "out"
    shutil.copytree(merged, out)
    before = (out / "adapterkit.json").read_bytes()
    command = ["verify", out, "--base", base, "--adapter", adapter, "--min-retention", "0.9"]
    assert run([*command, "--no-attach"]) == 0
    assert (out / "adapterkit.json").read_bytes() == before
    assert run(command) == 0
    capsys.readouterr()
    once = (out / "adapterkit.json").read_bytes()
    found = json.loads(once)["evidence"]["verification"]["tensors"]
    assert found["ok"] is True
    assert found["figures"]["equal"] == 11
    assert found["thresholds"] == {"min_retention": 0.9}
    # Again it is the same record, and the record is still one.
    assert run(command) == 0
    assert "evidence written" not in capsys.readouterr().err
    assert (out / "adapterkit.json").read_bytes() == once
    # What does not hold is written down too.
    shutil.copy(base / "model-00001-of-00002.safetensors", out)
    assert run(command) == 3
    found = json.loads((out / "adapterkit.json").read_bytes())["evidence"]["verification"]["tensors"]
    assert found["ok"] is False
    assert "layer missing" in found["figures"]["findings"] or "not applied" in found["figures"]["findings"]


def test_a_folder_that_cannot_be_written_is_verified_all_the_same(
    made: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: object, **__: object) -> object:
        raise OutputError("it cannot be written to (Read-only file system)")

    monkeypatch.setattr("adapterkit.verbs.verify.evidence.attach", refused)
    base, adapter, merged = made
    command = ["verify", merged, "--base", base, "--adapter", adapter]
    assert run(command) == 0
    told = capsys.readouterr()
    assert "verified: " in told.out
    assert "the figures are not in the record of " in told.err
    assert "Read-only file system" in told.err
    assert run([*command, "--attach"]) == 1  # that was asked for


def test_evidence_of_a_registered_version_is_a_new_one(
    made: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ADAPTERKIT_HOME", str(tmp_path / "home"))
    base, adapter, merged = made
    assert run(["register", merged, "--name", "shop"]) == 0
    assert run(["verify", "shop", "--base", base, "--adapter", adapter]) == 0
    assert run(["verify", "shop", "--base", base, "--adapter", adapter, "--attach", "--min-retention", "0.8"]) == 0
    assert "evidence written to shop@2" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}),
        ("gpt2", {"target_modules": ["c_attn", "c_fc"]}),
    ],
)
def test_the_same_model_in_another_layout(
    kind: str, fields: dict[str, Any], make_base: Callable[..., Path], tmp_path: Path
) -> None:
    """Experts stacked, or names without the head's prefix: what transformers saves is not always what it loaded."""
    peft = pytest.importorskip("peft")
    from models import load_model, make_adapter

    base = make_base(kind)
    adapter = make_adapter(tmp_path / "adapter", base, peft.LoraConfig(r=4, lora_alpha=8, **fields), scale=0.1)
    merged = peft.PeftModel.from_pretrained(load_model(base), adapter).merge_and_unload()
    if kind == "gpt2":
        merged.base_model.save_pretrained(tmp_path / "out")
    else:
        merged.save_pretrained(tmp_path / "out", save_original_format=False)
    assert set(read_tensors(tmp_path / "out")) != set(read_tensors(base))
    report = verify(tmp_path / "out", base=base, adapters=[adapter])
    assert report.ok, report.errors
    assert sum(report.tensors.counts.values()) == report.tensors.total
    load_model(base).save_pretrained(tmp_path / "none", save_original_format=kind == "gpt2")
    assert [one.kind for one in verify(tmp_path / "none", base=base, adapters=[adapter]).errors] == ["not applied"]


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_conv1d_in_its_own_format(kind: str, tmp_path: Path) -> None:
    """GPT-2's weights lie on their side in a quantized file: the change is looked for there as they lie."""
    name, made = "transformer.h.0.mlp.c_fc", torch.Generator().manual_seed(0)
    said = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    write_checkpoint(tmp_path / "plain", {f"{name}.weight": torch.randn(64, 256, generator=made).bfloat16()}, said)
    adapterkit.convert(tmp_path / "plain", tmp_path / "base", to=kind)
    adapter = plain_adapter(tmp_path / "adapter", tmp_path / "plain", modules=("c_fc",))
    key = f"base_model.model.{name}.lora_"
    factors = {"A": torch.randn(4, 64, generator=made) * 0.3, "B": torch.randn(256, 4, generator=made)}
    save_file({f"{key}{one}.weight": value for one, value in factors.items()}, adapter / "adapter_model.safetensors")
    adapterkit.merge(tmp_path / "base", [adapter], tmp_path / "out", quant="keep", yes_lossy=True)
    report = verify(tmp_path / "out", base=tmp_path / "base", adapters=[adapter], level="tensors")
    assert report.tensors is not None
    assert report.tensors.counts == {EQUAL: 1}
    assert report.tensors.retention == pytest.approx(1, abs=0.05)
    assert report.ok, report.errors


@pytest.mark.parametrize("quant", ["nf4", "int4", "mxfp4", "mlx-4bit-g32"])
def test_scales_that_are_others_beside_the_same_codes(quant: str, tmp_path: Path) -> None:
    """Codes alone do not tell: a layer whose scales were damaged is another layer, changed by an adapter or not."""
    base = plain_base(tmp_path / "base", width=128)
    adapter = plain_adapter(tmp_path / "adapter", base, modules=("q_proj",))
    adapterkit.merge(base, [adapter], tmp_path / "out", quant=quant)
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)

    def off() -> list[str]:
        found = verify(tmp_path / "out", base=base, adapters=[adapter], level="tensors").tensors
        assert found is not None
        return [one.name for one in found.tensors if one.status == OFF]

    for layer in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"):
        ends = (".scales", ".weight_scale", ".weight.absmax")
        name = next(f"{layer}{end}" for end in ends if f"{layer}{end}" in tensors)
        one = tensors[name]
        damaged = {**tensors, name: one + 1 if one.dtype is torch.uint8 else one * 2}
        save_file(damaged, file, metadata={"format": "pt"})
        assert off() == [f"{layer}.weight"], quant
    save_file(tensors, file, metadata={"format": "pt"})
    assert off() == []


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 64, 100])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
def test_blocks_are_the_same_where_their_bytes_are(size: int, dtype: torch.dtype) -> None:
    data = bytearray(b"\xff" * (size * dtype.itemsize))  # as numbers NaN, which no comparison of values calls equal
    one = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
    assert _same_bytes(one, one.clone())
    for at in {0, len(data) // 2, len(data) - 1} if data else ():
        changed = bytearray(data)
        changed[at] ^= 1
        assert not _same_bytes(one, torch.frombuffer(changed, dtype=dtype))
    if size:
        assert not _same_bytes(one, one[:-1])


def test_the_original_of_a_quantized_base_is_an_input_as_the_others_are(
    made: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter, merged = made
    original = tmp_path / "original"
    shutil.copytree(base, original)
    watched: list[str] = []
    monkeypatch.setattr(
        "adapterkit.verbs.verify.opened.check_unchanged",
        lambda sources: watched.extend(str(source.path) for source in sources),
    )
    report = verify(merged, base=base, adapters=[adapter], base16=original)
    found = {one.role: one for one in report.inputs}
    assert found["original"].ref == str(original)
    assert found["original"].digest == found["base"].digest
    for folder in (original, base, merged, adapter):
        assert any(path.startswith(f"{folder}/") for path in watched)
    assert len(watched) == len(set(watched))
