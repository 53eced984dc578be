"""The levels of layers and of the model: figures against a float64 reference, thresholds, and prompts that cannot be used."""

from __future__ import annotations

import json
import shutil
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from adapterkit.errors import NotFound, UsageError
from adapterkit.verbs.verify import verify
from adapterkit.verbs.verify.prompts import read_prompts

if TYPE_CHECKING:
    from conftest import Trained

    from adapterkit.verbs.verify.report import VerifyReport

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:FutureWarning")


def reference(folder: Path, text: str, adapter: Path | None = None) -> tuple[Any, list[int]]:
    """Log-probabilities in float64 and the tokens, by transformers and PEFT alone."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    if adapter is not None:
        import peft

        model = peft.PeftModel.from_pretrained(model, adapter)
    ids = tokenizer(text)["input_ids"]
    with torch.no_grad():
        logits = model.double().eval()(input_ids=torch.tensor([ids])).logits[0, :-1]
    return torch.log_softmax(logits, -1).numpy(), ids


def test_figures_are_those_of_a_float64_reference(trained: Trained, broken_report: VerifyReport) -> None:
    model = broken_report.model
    assert model is not None
    assert (model.runtime, model.trained, len(model.prompts)) == ("transformers", "PEFT", 3)
    kls, same, nll = [], [], []
    for text in trained.prompts.read_text().split("\n\n"):
        p, ids = reference(trained.base, text.strip(), trained.adapter)
        q, _ = reference(trained.broken, text.strip())
        kls += list((np.exp(p) * (p - q)).sum(-1))
        same += list(p.argmax(-1) == q.argmax(-1))
        nll += [-q[at, token] for at, token in enumerate(ids[1:])]
    assert model.tokens == len(kls)
    assert model.merged.mean_kl == pytest.approx(np.mean(kls), rel=1e-4)
    assert model.merged.max_kl == pytest.approx(np.max(kls), rel=1e-4)
    assert model.merged.top1 == pytest.approx(np.mean(same))
    assert model.perplexity["merged"] == pytest.approx(np.exp(np.mean(nll)), rel=1e-4)
    assert [kl for prompt in model.prompts for kl in prompt.kls] == pytest.approx(kls, rel=1e-3, abs=1e-9)


def test_where_they_part(broken_report: VerifyReport) -> None:
    assert broken_report.model is not None
    partings = [one for prompt in broken_report.model.prompts for one in prompt.partings]
    assert partings
    assert all(one.trained != one.merged for one in partings)
    assert all(one.before for one in partings)


def test_a_right_merge_holds_any_threshold(trained: Trained) -> None:
    limits: dict[str, Any] = {"max_kl": 1e-6, "min_top1": 1.0, "min_retention": 0.999}
    how: dict[str, Any] = {"base": trained.base, "adapters": [trained.adapter], "prompts": trained.prompts}
    report = verify(trained.merged, level="model", **how, **limits)
    assert report.ok
    assert report.layers is not None
    assert report.layers.lost < 1e-5
    failed = verify(trained.broken, level="model", **how, **limits)
    assert {"layer missing", "max-kl", "min-top1", "swallowed"} <= {finding.kind for finding in failed.errors}
    assert any("max_kl= allows 1e-06" in finding.text for finding in failed.errors)


def test_outputs_of_layers_are_those_of_numpy(trained: Trained) -> None:
    from models import read_tensors

    from adapterkit.adapters.load import load_adapter
    from adapterkit.verbs.verify.inputs import open_inputs
    from adapterkit.verbs.verify.layers import compare_layers, random_inputs
    from adapterkit.verbs.verify.subject import subject

    layers = compare_layers(subject(*open_inputs(trained.broken, trained.base), (load_adapter(trained.adapter),), {}))
    assert layers.inputs == "random"
    checks = {check.module: check for check in layers.modules}
    before, after = read_tensors(trained.base), read_tensors(trained.merged)
    name = "model.layers.1.self_attn.q_proj.weight"
    x = random_inputs(64).double().numpy()
    w, new = (tensors[name].double().numpy() for tensors in (before, after))
    wanted = np.linalg.norm(x @ (new - w).T) / np.linalg.norm(x @ new.T)
    assert checks[name].change == pytest.approx(wanted, rel=1e-5)
    assert checks[name].error == pytest.approx(wanted, rel=1e-5)  # nothing of it is there
    assert checks[name].lost == pytest.approx(1.0)
    assert checks[name.replace(".1.", ".0.")].error < 1e-6
    assert ".layers.1." in layers.worst


def test_layers_work_for_a_model_type_that_transformers_does_not_know(trained: Trained, tmp_path: Path) -> None:
    folders = []
    for source, name in ((trained.base, "base"), (trained.merged, "merged")):
        shutil.copytree(source, tmp_path / name)
        config = tmp_path / name / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "notyet"}))
        (tmp_path / name / "adapterkit.json").unlink(missing_ok=True)
        folders.append(tmp_path / name)
    base, merged = folders
    report = verify(merged, base=base, adapters=[trained.adapter], level="layers")
    assert report.ok, report.errors
    assert report.layers is not None
    assert len(report.layers.modules) == 14
    with pytest.raises(UsageError, match=r"'notyet', which transformers [\d.]+ does not know.*level='layers'"):
        verify(merged, base=base, adapters=[trained.adapter], level="model", prompts=trained.prompts)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("p.txt", b"", "holds no prompts"),
        ("p.txt", b" \n\n \n", "holds no prompts"),
        ("p.txt", b"\x00\x01\x02text", "is not text"),
        ("p.txt", b"\xff\xfe\xfa", "is not text"),
        ("p.jsonl", b'"good"\nbad\n', "line 2: not a prompt"),
        ("p.jsonl", b'{"text": ""}', "line 1: not a prompt"),
        ("p.jsonl", b'{"ids": [1, -2]}', "line 1: not a prompt"),
        ("p.jsonl", b"[" * 100_000, "line 1: not a prompt"),
        ("p.jsonl", b'{"ids": [3]}', "no prompt has two tokens"),
        ("p.jsonl", b'{"ids": [1, 99999]}', "holds token 99999"),
        ("p.jsonl", b'{"messages": [{"role": "user", "content": "the sky"}]}', "no chat template"),
    ],
)
def test_prompts_that_cannot_be_used(name: str, data: bytes, message: str, trained: Trained, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=message):
        verify(trained.merged, base=trained.base, adapters=[trained.adapter], level="model", prompts=tmp_path / name)


def test_prompts_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"nothing.txt does not exist"):
        read_prompts(tmp_path / "nothing.txt")
    (tmp_path / "huge.txt").write_bytes(b"a" * (17 << 20))
    with pytest.raises(UsageError, match="17 MiB of prompts"):
        read_prompts(tmp_path / "huge.txt")


def test_the_built_in_prompts_are_mixed() -> None:
    found = read_prompts(None)
    assert len(found) == 16
    assert any(not prompt.text.isascii() for prompt in found)
    assert all(len(prompt.text) > 60 or not prompt.text.isascii() for prompt in found)


def test_longer_than_the_context_is_cut_and_said(trained: Trained, tmp_path: Path) -> None:
    prompts = tmp_path / "long.txt"
    prompts.write_text("the sky is grey " * 40)
    report = verify(trained.merged, base=trained.base, adapters=[trained.adapter], level="model", prompts=prompts)
    assert report.model is not None
    (prompt,) = report.model.prompts
    assert prompt.truncated
    assert prompt.tokens == 63  # the model reads 64


def test_without_a_tokenizer_numbers_do(trained: Trained, tmp_path: Path) -> None:
    for source, name in ((trained.base, "base"), (trained.merged, "merged")):
        shutil.copytree(source, tmp_path / name)
        for file in (tmp_path / name).glob("tokenizer*"):
            file.unlink()
        (tmp_path / name / "adapterkit.json").unlink(missing_ok=True)
    how: dict[str, Any] = {"base": tmp_path / "base", "adapters": [trained.adapter], "level": "model"}
    with pytest.raises(UsageError, match=r"neither MERGED nor the base has a tokenizer.*\"ids\""):
        verify(tmp_path / "merged", prompts=trained.prompts, **how)
    numbers = tmp_path / "ids.jsonl"
    numbers.write_text('{"ids": [1, 3, 5, 7]}\n')
    report = verify(tmp_path / "merged", prompts=numbers, **how)
    assert report.ok
    assert report.model is not None
    assert report.model.tokens == 3


def test_several_adapters_are_folded_for_the_reference(trained: Trained, tmp_path: Path) -> None:
    """PEFT runs one adapter as it was trained; everything else is folded in float32."""
    import adapterkit

    adapterkit.merge(trained.base, [trained.adapter, trained.adapter], tmp_path / "out", weights=[0.25, 0.75])
    how: dict[str, Any] = {"base": trained.base, "adapters": [trained.adapter] * 2, "prompts": trained.prompts}
    report = verify(tmp_path / "out", level="model", **how)
    assert report.ok
    assert report.model is not None
    assert report.model.trained == "folded in float32"
    p, _ = reference(trained.base, "snow is old", trained.adapter)
    q, _ = reference(tmp_path / "out", "snow is old")
    assert np.abs(p - q).max() < 1e-4
    assert report.model.merged.max_kl < 1e-9


RUNTIMES = ["xllamacpp", "llama-server"]

# A `llama-server` for the test: xllamacpp's own server, which speaks the same protocol.
SERVER = """#!{python}
import sys, time
import xllamacpp as x
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
p = x.CommonParams()
p.model.path = given["-m"]; p.n_ctx = int(given["-c"]); p.port = int(given["--port"])
p.n_parallel = 1; p.n_gpu_layers = 0; p.warmup = False; p.fit_params = False; p.cpuparams.n_threads = 1; p.verbosity = -1
server = x.Server(p)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path, Path]:
    """A Hugging Face base, the same as GGUF, an adapter, prompts as numbers."""
    pytest.importorskip("xllamacpp")
    pytest.importorskip("gguf")
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gguf"))
    import gguf_zoo
    from models import make_adapter
    from peft import LoraConfig

    folder = tmp_path_factory.mktemp("gguf")
    gguf_zoo.build(folder / "hf", "llama")
    base = gguf_zoo.to_gguf(folder / "hf", "llama", folder / "base.gguf")
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    adapter = make_adapter(folder / "adapter", folder / "hf", config, scale=0.1)
    prompts = folder / "ids.jsonl"
    prompts.write_text('{"ids": [1, 5, 17, 200, 44, 9, 31]}\n{"ids": [1, 260, 33, 7, 90]}\n')
    return folder / "hf", base, adapter, prompts


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_gguf_files_answer_in_llama_cpp(
    kind: str,
    runtime: str,
    gguf: tuple[Path, Path, Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import adapterkit
    from adapterkit.gguf.quantize import Quantization

    folder, file, adapter, prompts = gguf
    if runtime == "llama-server":
        program = tmp_path / "llama-server"
        program.write_text(SERVER.format(python=sys.executable))
        program.chmod(0o755)
        monkeypatch.setattr(import_module("adapterkit.verbs.verify.model"), "find_runtime", lambda: str(program))
    adapterkit.merge(file, [adapter], tmp_path / "m.gguf", quantization=Quantization("Q8_0"))
    base = folder if kind == "folder" else file
    report = verify(tmp_path / "m.gguf", base=base, adapters=[adapter], level="model", prompts=prompts)
    assert report.ok, report.errors
    assert report.model is not None
    assert report.model.runtime == f"llama.cpp ({runtime})"
    assert report.model.trained == ("PEFT" if kind == "folder" else "folded in float32")
    assert report.model.tokens == 10
    # Q8_0 is close to what was trained, and the base is not.
    assert 0 < report.model.merged.mean_kl < 1e-3
    assert report.model.base.mean_kl > 20 * report.model.merged.mean_kl


def test_gguf_files_are_decoded_without_a_runtime(
    gguf: tuple[Path, Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import adapterkit

    folder, file, adapter, prompts = gguf
    monkeypatch.setattr(import_module("adapterkit.verbs.verify.model"), "find_runtime", lambda: None)
    adapterkit.merge(file, [adapter], tmp_path / "m.gguf")
    report = verify(tmp_path / "m.gguf", base=folder, adapters=[adapter], level="model", prompts=prompts)
    assert report.ok
    assert report.model is not None
    assert report.model.runtime == "transformers, decoded"
    assert report.model.merged.mean_kl < 1e-6


def test_replayed_inputs_are_those_of_the_running_model(trained: Trained) -> None:
    """What reaches a module of base + adapters, against hooks on PEFT's model."""
    import peft
    import transformers

    from adapterkit.verbs.verify.inputs import open_inputs
    from adapterkit.verbs.verify.replay import activations
    from adapterkit.verbs.verify.subject import subject

    tokenizer = transformers.AutoTokenizer.from_pretrained(trained.base)
    model = transformers.AutoModelForCausalLM.from_pretrained(trained.base)
    live = peft.PeftModel.from_pretrained(model, trained.adapter).eval()
    seen: dict[str, list[torch.Tensor]] = {}
    for path, module in live.base_model.model.named_modules():
        if path.endswith(("q_proj", "down_proj")):
            name = f"{path}.weight"
            module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0][0]))
    texts = trained.prompts.read_text().split("\n\n")[:2]
    with torch.no_grad():
        for text in texts:
            live(input_ids=torch.tensor([tokenizer(text.strip())["input_ids"]]))
    found, stored = open_inputs(trained.merged, trained.base)
    from adapterkit.adapters.load import load_adapter

    planned = subject(found, stored, (load_adapter(trained.adapter),), {})
    inputs, why = activations(planned, trained.prompts)
    assert why == ""
    assert len(inputs) == 14
    for name, parts in seen.items():
        wanted = torch.cat(parts)
        assert torch.allclose(inputs[name], wanted[: len(inputs[name])], atol=1e-4), name


def test_a_gguf_file_is_fed_what_its_base_is_fed(gguf: tuple[Path, Path, Path, Path], tmp_path: Path) -> None:
    import adapterkit

    folder, file, adapter, prompts = gguf
    adapterkit.merge(file, [adapter], tmp_path / "m.gguf")
    report = verify(tmp_path / "m.gguf", base=folder, adapters=[adapter], level="layers")
    assert report.ok
    assert report.layers is not None
    # There is no tokenizer for text, so numbers stand in, and it is said.
    assert report.layers.inputs == "random"
    assert any("neither MERGED nor the base has a tokenizer" in finding.text for finding in report.findings)
    report = verify(tmp_path / "m.gguf", base=folder, adapters=[adapter], level="model", prompts=prompts)
    assert report.layers is not None
    assert report.layers.inputs == "replayed"
    assert report.layers.error < 1e-6 < 1e-2 < report.layers.change
