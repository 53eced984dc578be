"""`merge --rounding feedback` on a model that learned a text: nearer to the trained model than the nearest values are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adapterkit import convert, merge, verify
from adapterkit.checkpoint.plan import Plan
from adapterkit.errors import AdapterkitError, CheckFailed, UsageError
from adapterkit.verbs.execute import OpenPlan, execute

pytest.importorskip("transformers")

WORDS = list("abcdefghijklmnopqrstuvw")


def sentences(seed: int, count: int) -> str:
    """Words that follow each other by a rule, so that there is something to learn."""
    made = torch.Generator().manual_seed(seed)
    at, found = 0, []
    for step in torch.randint(1, 4, (count,), generator=made).tolist():
        at = (at * 2 + step) % len(WORDS)
        found.append(WORDS[at])
    return " ".join(found)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Llama of 300,000 weights that learned one text, a LoRA that learned another, and the two texts."""
    import peft
    import tokenizers
    import transformers

    folder = tmp_path_factory.mktemp("trained")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(["?", *WORDS])}, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS) + 1, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    texts = {"first": sentences(1, 512), "second": sentences(2, 512)}
    second = texts["second"].split()
    texts["second"] = " ".join(WORDS[(WORDS.index(w) * 3 + 5) % len(WORDS)] for w in second)

    def learn(module: Any, text: str, steps: int) -> None:
        ids = torch.tensor(tokenizer(text)["input_ids"]).view(-1, 32)
        optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=5e-3)
        for _ in range(steps):
            module(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    learn(model, texts["first"], 30)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=4, target_modules="all-linear"))
    learn(tuned, texts["second"], 12)
    tuned.save_pretrained(folder / "adapter")
    (folder / "text.txt").write_text(texts["second"])
    return {name: folder / name for name in ("base", "adapter", "text.txt")}


def said(folder: Path, text: str) -> torch.Tensor:
    """Log-probabilities of the decoded weights, computed by transformers."""
    import transformers

    plain = folder.with_name(f"{folder.name}-plain")
    if not plain.exists():
        convert(folder, plain, to="f32")
    model = transformers.LlamaForCausalLM.from_pretrained(plain).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.tensor(tokenizer(text)["input_ids"]).view(-1, 32)).logits
    return found.log_softmax(-1)


def apart(wanted: torch.Tensor, found: torch.Tensor) -> float:
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


@pytest.mark.parametrize(
    "kind", ["nf4", pytest.param("mxfp4", marks=pytest.mark.slow), pytest.param("fp8-block", marks=pytest.mark.slow)]
)
def test_it_is_nearer_to_the_trained_model(trained: dict[str, Path], tmp_path: Path, kind: str) -> None:
    base, adapter, text = tmp_path / "base", trained["adapter"], trained["text.txt"]
    convert(trained["base"], base, to=kind)
    how: dict[str, Any] = {"quant": "keep", "yes_lossy": True}
    merge(base, [adapter], tmp_path / "wanted", dtype="f32")
    merge(base, [adapter], tmp_path / "near", **how)
    merge(base, [adapter], tmp_path / "fed", rounding="feedback", calibration=text, **how, jobs=1)
    wanted = said(tmp_path / "wanted", text.read_text())
    near, fed = (apart(wanted, said(tmp_path / name, text.read_text())) for name in ("near", "fed"))
    assert fed < 0.7 * near
    # The same bytes with more threads and from a plan in parts, and the size of the nearest values.
    again: dict[str, Any] = {**how, "rounding": "feedback", "calibration": text}
    merge(base, [adapter], tmp_path / "again", **again, jobs=3)
    plan_file = tmp_path / "plan.json"
    merge(base, [adapter], tmp_path / "planned", **again, save_plan=plan_file, dry_run=True)
    plan = Plan.from_json(plan_file.read_bytes())
    parts = len(OpenPlan(plan, tmp_path / "parts", 1 << 15).parts)
    assert parts > 1
    for part in range(parts):
        execute(plan, tmp_path / "parts", part=part, part_size=1 << 15)
    execute(plan, tmp_path / "parts", part_size=1 << 15)
    one, two, three, plain = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("fed", "again", "parts", "near")
    )
    assert one == two == three
    assert len(one) == len(plain)
    plan_file.write_text(plan_file.read_text().replace(plan.inputs["calibration"], "0" * 64))
    with pytest.raises(AdapterkitError, match="plan"):
        execute(Plan.from_json(plan_file.read_bytes()), tmp_path / "other")
    untouched = [name for name in load_file(base / "model.safetensors") if "proj" not in name]
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "fed/model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in untouched)
    record = json.loads((tmp_path / "fed/adapterkit.json").read_text())
    assert record["operation"]["parameters"]["rounding"] == "feedback"
    figures = record["evidence"]["rounding"]
    assert figures["tokens"] == 512
    assert figures["left"] < figures["nearest"]
    checked = verify(tmp_path / "fed", base=base, adapters=[adapter], level="tensors")
    assert checked.ok, checked.findings
    assert "feedback" in {finding.kind for finding in checked.findings}
    assert not list(tmp_path.glob(".*"))  # the inputs of layers are gone


def test_new_outputs(trained: dict[str, Path], tmp_path: Path) -> None:
    base, adapter, text = (trained[name] for name in ("base", "adapter", "text.txt"))
    merge(base, [adapter], tmp_path / "wanted")
    wanted = said(tmp_path / "wanted", text.read_text())
    for kind in ("nvfp4", "nf4"):
        merge(base, [adapter], tmp_path / f"{kind}-near", quant=kind)
        merge(base, [adapter], tmp_path / f"{kind}-fed", quant=kind, rounding="feedback", calibration=text)
        near, fed = (apart(wanted, said(tmp_path / f"{kind}-{way}", text.read_text())) for way in ("near", "fed"))
        assert fed < 0.7 * near
        checked = verify(tmp_path / f"{kind}-fed", base=base, adapters=[adapter], level="tensors")
        assert checked.ok, [f"{finding.kind}: {finding.text}" for finding in checked.findings]


@pytest.mark.parametrize("kind", ["keep", "nvfp4"])
def test_verify_finds_another_change_under_its_record(
    trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Weights that hold the change not at all, twice or with the wrong sign, beside the record of the right ones."""
    base, adapter, text = trained["base"], trained["adapter"], trained["text.txt"]
    if kind == "keep":
        base = tmp_path / "base"
        convert(trained["base"], base, to="nf4")
    how: dict[str, Any] = {"quant": kind, "yes_lossy": kind == "keep"}
    fed = tmp_path / "fed"
    merge(base, [adapter], fed, **how, rounding="feedback", calibration=text)
    assert verify(fed, base=base, adapters=[adapter], level="tensors").ok
    rows: list[tuple[float, set[str]]] = [
        (0.0, {"not applied"}),
        (2.0, {"applied twice", "other scaling"}),
        (-1.0, {"subtracted", "other scaling", "not applied"}),
    ]
    for weight, kinds in rows:
        other = tmp_path / f"times{weight}"
        merge(base, [adapter], other, weights=[weight], **how)
        (other / "adapterkit.json").write_bytes((fed / "adapterkit.json").read_bytes())
        found = verify(other, base=base, adapters=[adapter], level="tensors")
        assert not found.ok
        errors = {finding.kind for finding in found.findings if finding.severity == "error"}
        assert errors
        assert errors <= kinds
        assert "changed since" in {finding.kind for finding in found.findings}
        with monkeypatch.context() as patch:  # as if the record named these files
            patch.setattr("adapterkit.verbs.verify.inputs.same_as_recorded", lambda *_: ())
            found = verify(other, base=base, adapters=[adapter], level="tensors")
        assert {finding.kind for finding in found.findings if finding.severity == "error"} <= kinds
        assert not found.ok
    given = verify(fed, base=base, adapters=[adapter], weights=[2.0], level="tensors")
    assert not given.ok


def test_what_is_refused(trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter, text = tmp_path / "base", trained["adapter"], trained["text.txt"]
    convert(trained["base"], base, to="nf4")
    out = tmp_path / "out"
    fed: dict[str, Any] = {"quant": "keep", "rounding": "feedback", "calibration": text, "yes_lossy": True}
    short = tmp_path / "short.txt"
    short.write_text("a b c")
    rows: list[tuple[dict[str, Any], str]] = [
        ({"calibration": None}, "needs a text"),
        ({"quant": None, "yes_lossy": False}, "on a grid"),
        ({"quant": "Q4_0"}, "on a grid"),
        ({"residual": 4}, "holds less"),
        ({"keep_touched": "bf16"}, "nothing to round"),
        ({"calibration": tmp_path / "no.txt"}, "does not exist"),
        ({"calibration": short}, "3 tokens"),
        ({"rounding": "nearest"}, "means nothing"),
    ]
    for more, words in rows:
        with pytest.raises(AdapterkitError, match=words):
            merge(base, [adapter], out, **{**fed, **more})
    eight = tmp_path / "eight"
    convert(trained["base"], eight, to="int8")
    with pytest.raises(UsageError, match="share scales in groups"):
        merge(eight, [adapter], out, **fed)
    merge(base, [adapter], out, **fed, dry_run=True)  # reads no text
    assert not out.exists()
    monkeypatch.setattr("adapterkit.verbs.merge.MOST_LEFT", 0.0)
    with pytest.raises(CheckFailed, match="outputs of layers are off by"):
        merge(base, [adapter], out, **{**fed, "yes_lossy": False})
    # Whoever carries out a plan asks nothing any more.
    with pytest.raises(CheckFailed, match="outputs of layers are off by"):
        merge(base, [adapter], out, **{**fed, "yes_lossy": False}, save_plan=tmp_path / "plan.json", dry_run=True)
    assert not (tmp_path / "plan.json").exists()


def test_a_conversion_is_rounded_so_too(trained: dict[str, Path], tmp_path: Path) -> None:
    """Without an adapter: nearer to the model on the text than the nearest values, the same by a plan, in a record."""
    how: dict[str, Any] = {"rounding": "feedback", "calibration": trained["text.txt"]}
    planned = convert(trained["base"], to="nf4", dry_run=True, **how).notes
    assert any("reads" in note and "B of disk" in note for note in planned)
    convert(trained["base"], tmp_path / "near", to="nf4")
    report = convert(trained["base"], tmp_path / "fed", to="nf4", jobs=1, **how)
    assert any(note.startswith("rounded with feedback, by 512 tokens") for note in report.notes)
    text = trained["text.txt"].read_text()
    wanted = said(trained["base"], text)
    near, fed = (apart(wanted, said(tmp_path / name, text)) for name in ("near", "fed"))
    assert fed < 0.7 * near
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("near", "fed"))
    assert one.keys() == other.keys()
    assert any(not torch.equal(one[name], other[name]) for name in one if name.endswith("proj.weight"))
    record = json.loads((tmp_path / "fed/adapterkit.json").read_text())
    assert record["operation"]["parameters"]["rounding"] == "feedback"
    convert(trained["base"], tmp_path / "plan", to="nf4", save_plan=tmp_path / "plan.json", **how)
    execute(Plan.from_json((tmp_path / "plan.json").read_bytes()), tmp_path / "planned", part=0)
    execute(Plan.from_json((tmp_path / "plan.json").read_bytes()), tmp_path / "planned")
    assert (tmp_path / "planned/model.safetensors").read_bytes() == (tmp_path / "fed/model.safetensors").read_bytes()
    for wrong in ({"rounding": "feedback"}, {"calibration": trained["text.txt"]}):
        with pytest.raises(UsageError, match=r"calibration|need no text"):
            convert(trained["base"], tmp_path / "no", to="nf4", **wrong)
    with pytest.raises(UsageError, match="does not apply"):
        convert(trained["base"], tmp_path / "no", to="bf16", **how)
