"""Metadata of merged GGUF files: mistakes that the gguf package wrote into real files are called by their names."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "gguf"))
pytest.importorskip("gguf")
import arch_zoo
import gguf_zoo
from models import make_adapter

import adapterkit
from adapterkit.cli import main
from adapterkit.errors import UsageError
from adapterkit.verbs.convert import convert
from adapterkit.verbs.verify import verify
from adapterkit.verbs.verify.report import VerifyReport

TEMPLATE = "{% for m in messages %}<|begin|>{{ m.role }} {{ m.content }}<|end|>{% endfor %}"
BOS, EOS = 296, 297
EOS_KEY, TEMPLATE_KEY = "tokenizer.ggml.eos_token_id", "tokenizer.chat_template"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base as a folder and as a GGUF file, an adapter, and their merge."""
    folder = tmp_path_factory.mktemp("metadata")
    script = Path(__file__).parents[2] / "examples/recipe/make_inputs.py"
    subprocess.run([sys.executable, str(script), str(folder)], check=True, timeout=900)
    said = {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    _edit(folder / "base/config.json", **said)
    _edit(folder / "base/tokenizer_config.json", chat_template=TEMPLATE)
    convert(folder / "base", folder / "base.gguf")
    adapterkit.merge(folder / "base", [folder / "style"], folder / "merged.gguf")
    return {name: folder / name for name in ("base", "base.gguf", "style", "merged.gguf")}


def _edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def rewritten(path: Path, out: Path, changes: dict[str, Any]) -> Path:
    """A copy with other key-values (None: without them), by gguf's reader and writer."""
    import gguf

    reader = gguf.GGUFReader(path)
    fields = {name: one for name, one in reader.fields.items() if not name.startswith("GGUF.")}
    writer = gguf.GGUFWriter(out, fields["general.architecture"].contents())
    for name, one in fields.items():
        value = changes.get(name, one.contents())
        if name == "general.architecture" or value is None:
            continue
        inner = one.types[-1] if one.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, one.types[0], sub_type=inner)
    for name, value in changes.items():
        if name not in fields and value is not None:
            kind = gguf.GGUFValueType.get_type(value)
            inner = gguf.GGUFValueType.get_type(value[0]) if isinstance(value, list) else None
            writer.add_key_value(name, value, gguf.GGUFValueType.UINT32 if isinstance(value, int) else kind, inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def examined(made: dict[str, Path], merged: Path, base: str = "base", **how: Any) -> VerifyReport:
    return verify(merged, base=made[base], adapters=[made["style"]], **how)


def alarms(report: VerifyReport) -> list[tuple[str, str]]:
    return [(one.kind, one.severity) for one in report.findings if one.severity != "note"]


def tokens(made: dict[str, Path]) -> list[str]:
    import gguf

    found: list[str] = gguf.GGUFReader(made["merged.gguf"]).fields["tokenizer.ggml.tokens"].contents()
    return found


MISTAKES: dict[str, tuple[dict[str, Any], tuple[str, str], str]] = {
    "rope base": (
        {"llama.rope.freq_base": 10000.0},
        ("rope base", "error"),
        "llama.rope.freq_base is 10000, and .* 500000",
    ),
    "rope base left out": (
        {"llama.rope.freq_base": None},
        ("rope base", "error"),
        "is 10000 by default, and .* 500000",
    ),
    "rope factor": ({"llama.rope.scaling.factor": 8.0}, ("rope scaling", "error"), "is 8, and .* 4"),
    "no rope scaling": (
        {"llama.rope.scaling.factor": None, "llama.rope.scaling.type": None},
        ("rope scaling", "error"),
        r"\(and 1 more keys\)",
    ),
    "epsilon": (
        {"llama.attention.layer_norm_rms_epsilon": 1e-6},
        ("norm epsilon", "error"),
        "is 1e-06, and .* 1e-05",
    ),
    "heads": ({"llama.attention.head_count_kv": 4}, ("head count", "error"), "head_count_kv is 4, and .* 2"),
    "no kv heads": ({"llama.attention.head_count_kv": None}, ("head count", "error"), "is 4 by default, and .* 2"),
    "context": ({"llama.context_length": 4096}, ("context length", "warning"), "is 4096, and .* 128"),
    "eos and bos swapped": (
        {EOS_KEY: BOS, "tokenizer.ggml.bos_token_id": EOS},
        ("eos token", "error"),
        r"is 296 \('<\|begin\|>'\), and .* 297 \('<\|end\|>'\)",
    ),
    "no eos": ({EOS_KEY: None}, ("eos token", "error"), r"is 11 \(.*\) by default, and .* 297"),
    "bos added": ({"tokenizer.ggml.add_bos_token": True}, ("added tokens", "error"), "is True, and .* False"),
    "no template": ({TEMPLATE_KEY: None}, ("chat template", "error"), "MERGED has no tokenizer.chat_template"),
    "other template": ({TEMPLATE_KEY: "{{ messages }}"}, ("chat template", "warning"), "one of 14 characters"),
    "pre-tokenizer": ({"tokenizer.ggml.pre": "llama-bpe"}, ("pre-tokenizer", "error"), "is llama-bpe, and .* gpt-2"),
    "tokenizer": ({"tokenizer.ggml.model": "llama"}, ("tokenizer", "error"), "is llama, and .* gpt2"),
}


@pytest.mark.parametrize("base", ["base", "base.gguf"])
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_called_by_its_name(name: str, base: str, made: dict[str, Path], tmp_path: Path) -> None:
    changes, (kind, severity), says = MISTAKES[name]
    report = examined(made, rewritten(made["merged.gguf"], tmp_path / "m.gguf", changes), base)
    found = next(one for one in report.findings if one.kind == kind)
    assert found.severity == severity
    assert re.search(says, found.text), found.text
    assert set(found.keys) <= changes.keys()
    assert report.ok is (severity == "warning")
    assert {key for one in report.findings for key in one.keys} == changes.keys()
    assert report.tensors.counts == {"equal": report.tensors.total}


@pytest.mark.parametrize("base", ["base", "base.gguf"])
def test_lists_of_the_tokenizer(base: str, made: dict[str, Path], tmp_path: Path) -> None:
    texts = tokens(made)
    swapped = [*texts[:256], texts[257], texts[256], *texts[258:]]
    report = examined(
        made, rewritten(made["merged.gguf"], tmp_path / "a.gguf", {"tokenizer.ggml.tokens": swapped}), base
    )
    assert alarms(report) == [("tokenizer", "error")]
    assert f"token 256 is {texts[257]!r}, and the base's {texts[256]!r} (and 1 more)" in report.errors[0].text
    types = [1] * len(texts)
    report = examined(
        made, rewritten(made["merged.gguf"], tmp_path / "b.gguf", {"tokenizer.ggml.token_type": types}), base
    )
    assert alarms(report) == [("token types", "warning")]
    merges = {"tokenizer.ggml.merges": ["t h"]}
    report = examined(made, rewritten(made["merged.gguf"], tmp_path / "c.gguf", merges), base)
    assert alarms(report) == [("tokenizer", "error")]
    assert "has 1 entries" in report.errors[0].text


SAME_MEANING: dict[str, dict[str, Any]] = {
    "nothing": {},
    "a pre-tokenizer that splits alike": {"tokenizer.ggml.pre": "olmo"},
    "a default written out": {"llama.attention.key_length": 64, "llama.rope.scaling.attn_factor": 1.0},
    "defaults left out": {
        "llama.vocab_size": None,
        "llama.rope.dimension_count": None,
        "llama.rope.scaling.type": None,
    },
    "scores that byte-level BPE has no use for": {"tokenizer.ggml.scores": [0.0] * 298},
    "what says nothing of answers": {
        "general.name": "mine",
        "general.license": "mit",
        "quantize.imatrix.file": "i.dat",
    },
}


@pytest.mark.parametrize("name", SAME_MEANING)
def test_what_means_the_same_is_no_alarm(name: str, made: dict[str, Path], tmp_path: Path) -> None:
    merged = rewritten(made["merged.gguf"], tmp_path / "m.gguf", SAME_MEANING[name])
    report = examined(made, merged)
    assert (report.ok, alarms(report)) == (True, [])


def test_one_number_for_all_layers_or_one_for_each(made: dict[str, Path], tmp_path: Path) -> None:
    key = "llama.attention.head_count_kv"
    bare = rewritten(made["merged.gguf"], tmp_path / "m.gguf", {key: None})
    for counts, wanted in (([2, 2], []), ([2, 4], [("head count", "error")])):
        merged = rewritten(bare, tmp_path / f"{counts[1]}.gguf", {key: counts})
        assert alarms(examined(made, merged)) == wanted


def test_what_llama_cpp_s_converter_writes_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of tokens that are no pieces, and vectors of one more dimension."""
    import gguf

    monkeypatch.setattr("adapterkit.gguf.vocab.read_vocab", arch_zoo.read_vocab)
    arch_zoo.build(tmp_path / "hf", "llama")
    adapter = adapter_of(tmp_path / "adapter", tmp_path / "hf", ["q_proj"])
    ours = tmp_path / "merged.gguf"
    adapterkit.merge(tmp_path / "hf", [adapter], ours)
    scores = gguf.GGUFReader(ours).fields["tokenizer.ggml.scores"].contents()
    key, add = "tokenizer.ggml.scores", gguf.GGUFWriter.add_tensor

    def with_one_more(self: Any, name: str, tensor: Any, **how: Any) -> None:
        add(self, name, tensor.reshape(1, -1) if name == "output_norm.weight" else tensor, **how)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", with_one_more)
    theirs = rewritten(ours, tmp_path / "theirs.gguf", {key: [-1000.0] * 3 + scores[3:]})
    report = verify(theirs, base=tmp_path / "hf", adapters=[adapter])
    assert (report.ok, alarms(report)) == (True, [])
    theirs = rewritten(ours, tmp_path / "wrong.gguf", {key: [*scores[:9], 5.0, *scores[10:]]})
    report = verify(theirs, base=tmp_path / "hf", adapters=[adapter])
    assert (report.ok, alarms(report)) == (True, [("token scores", "warning")])


def test_another_end_of_the_answer_is_a_warning(made: dict[str, Path], tmp_path: Path) -> None:
    """Publishers write the token that ends a turn as eos: answers still end there."""
    base = shutil.copytree(made["base"], tmp_path / "base")
    turn = tokens(made).index("\u0120calm")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, turn]}))
    merged = tmp_path / "m.gguf"
    adapterkit.merge(base, [made["style"]], merged)
    merged = rewritten(merged, tmp_path / "e.gguf", {EOS_KEY: turn})
    report = verify(merged, base=base, adapters=[made["style"]])
    assert (report.ok, alarms(report)) == (True, [("eos token", "warning")])


def test_another_architecture(made: dict[str, Path], tmp_path: Path) -> None:
    merged = tmp_path / "m.gguf"
    merged.write_bytes(made["merged.gguf"].read_bytes().replace(b"llama", b"qwen2"))
    report = examined(made, merged)
    assert [one.kind for one in report.errors] == ["other architecture"]


def adapter_of(folder: Path, base: Path, modules: Any) -> Path:
    from peft import LoraConfig

    return make_adapter(folder, base, LoraConfig(r=4, lora_alpha=8, target_modules=modules), scale=0.1)


# ------------------------------------------------------------------ what is meant


def test_what_was_set_on_purpose_is_noted(made: dict[str, Path], tmp_path: Path) -> None:
    changes = {"llama.context_length": 512, TEMPLATE_KEY: None, EOS_KEY: BOS}
    merged = rewritten(made["merged.gguf"], tmp_path / "m.gguf", changes)
    report = examined(made, merged, on_purpose=["llama.context_length", TEMPLATE_KEY])
    assert alarms(report) == [("eos token", "error")]
    noted = {one.kind: one.text for one in report.findings if one.severity == "note" and one.keys}
    assert noted.keys() == {"context length", "chat template"}
    assert all(text.endswith("on purpose") for text in noted.values())
    assert examined(made, merged, on_purpose=[*changes]).ok


def test_on_purpose_names_real_keys(made: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'tokenizer\.chat_templat' is no key") as caught:
        examined(made, made["merged.gguf"], on_purpose=["tokenizer.chat_templat"])
    assert caught.value.hint == "did you mean 'tokenizer.chat_template'?"
    adapterkit.merge(made["base"], [made["style"]], tmp_path / "folder")
    with pytest.raises(UsageError, match="MERGED is a folder"):
        examined(made, tmp_path / "folder", on_purpose=[TEMPLATE_KEY])


def test_a_merge_that_was_told_otherwise(made: dict[str, Path], tmp_path: Path) -> None:
    """`--pre` stands in the record; the adapter's own tokenizer is what the merge takes."""
    adapterkit.merge(made["base"], [made["style"]], tmp_path / "pre.gguf", pre="llama-bpe")
    assert alarms(examined(made, tmp_path / "pre.gguf")) == []
    adapterkit.merge(made["base"], [made["style"]], tmp_path / "merged")
    convert(tmp_path / "merged", tmp_path / "later.gguf", pre="llama-bpe")
    assert alarms(examined(made, tmp_path / "later.gguf")) == []
    (tmp_path / "later.gguf.adapterkit.json").unlink()
    assert alarms(examined(made, tmp_path / "later.gguf")) == [("pre-tokenizer", "error")]
    adapter = shutil.copytree(made["style"], tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(made["base"] / name, adapter / name)
    _edit(adapter / "tokenizer_config.json", chat_template="{{ messages }}")
    adapterkit.merge(made["base"], [adapter], tmp_path / "own.gguf")
    assert alarms(verify(tmp_path / "own.gguf", base=made["base"], adapters=[adapter])) == []
    assert alarms(examined(made, tmp_path / "own.gguf")) != []  # the adapter without its tokenizer


def test_without_the_base_s_tokenizer_the_rest_is_compared(made: dict[str, Path], tmp_path: Path) -> None:
    base = shutil.copytree(made["base"], tmp_path / "base")
    (base / "tokenizer.json").unlink()
    merged = rewritten(made["merged.gguf"], tmp_path / "m.gguf", {"llama.rope.freq_base": 1.0, EOS_KEY: BOS})
    report = verify(merged, base=base, adapters=[made["style"]])
    assert alarms(report) == [("rope base", "error")]
    assert any("tokenizer in MERGED was not compared: there are no tokenizer files" in f.text for f in report.findings)


def test_a_pre_tokenizer_that_is_not_recognised(made: dict[str, Path], tmp_path: Path) -> None:
    base = shutil.copytree(made["base"], tmp_path / "base")
    words = json.loads((base / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": "[aeiou]"}, "behavior": "Isolated", "invert": False}
    words["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, words["pre_tokenizer"]]}
    (base / "tokenizer.json").write_text(json.dumps(words))
    merged = rewritten(made["merged.gguf"], tmp_path / "m.gguf", {EOS_KEY: BOS})
    report = verify(merged, base=base, adapters=[made["style"]])
    assert alarms(report) == [("eos token", "error")]
    assert any("that of MERGED (gpt-2) was taken for right" in finding.text for finding in report.findings)


def test_the_command_line(made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merged = rewritten(made["merged.gguf"], tmp_path / "m.gguf", {TEMPLATE_KEY: None})
    words = ["verify", str(merged), "--base", str(made["base"]), "--adapter", str(made["style"])]

    def code(*more: str) -> Any:
        with pytest.raises(SystemExit) as end:
            main([*words, *more])
        return end.value.code

    assert code() == 3
    said = capsys.readouterr().out
    assert "error: chat template: MERGED has no tokenizer.chat_template" in said
    assert "--on-purpose tokenizer.chat_template" in said
    assert code("--json") == 3
    found = json.loads(capsys.readouterr().out)["findings"]
    assert [one["keys"] for one in found] == [[TEMPLATE_KEY]]
    assert not code("--on-purpose", TEMPLATE_KEY)
    assert code("--on-purpose", "chat_template") == 2


# ------------------------------------------------------------------ no false alarm


@pytest.mark.parametrize("kind", [*arch_zoo.ZOO, *arch_zoo.ENCODERS])
def test_our_own_outputs_raise_no_alarm(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapterkit.gguf.vocab.read_vocab", arch_zoo.read_vocab)
    tiny, hf = (arch_zoo.ZOO | arch_zoo.ENCODERS)[kind], tmp_path / "hf"
    arch_zoo.build(hf, kind)
    adapter = adapter_of(tmp_path / "adapter", hf, tiny.lora)
    adapterkit.merge(hf, [adapter], tmp_path / "merged.gguf")
    report = verify(tmp_path / "merged.gguf", base=hf, adapters=[adapter])
    assert (report.ok, alarms(report)) == (True, [])
    assert not [one for one in report.findings if one.kind == "not compared"]


@pytest.mark.parametrize("kind", list(gguf_zoo.KINDS))
def test_another_converter_raises_no_alarm(kind: str, tmp_path: Path) -> None:
    """The tests' own converter, which writes fewer keys and others."""
    gguf_zoo.build(tmp_path / "hf", kind)
    adapter = adapter_of(tmp_path / "adapter", tmp_path / "hf", "all-linear")
    adapterkit.merge(tmp_path / "hf", [adapter], tmp_path / "merged")
    gguf_zoo.to_gguf(tmp_path / "merged", kind, tmp_path / "merged.gguf")
    report = verify(tmp_path / "merged.gguf", base=tmp_path / "hf", adapters=[adapter])
    # It forgets the rope base of layers without a window; a gemma3 of two layers has none, so the runtime does not show it.
    assert alarms(report) == ([("rope base", "error")] if kind == "gemma3" else [])
