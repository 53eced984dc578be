"""What the road from a Hugging Face folder to GGUF refuses, and what it takes along."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("gguf")
import arch_zoo as zoo
from gguf_files import random_array, write_gguf
from models import read_tensors, write_adapter

import adapterkit
from adapterkit.bases import open_model
from adapterkit.cli import main
from adapterkit.gguf.quantize import Quantization
from adapterkit.verbs.convert import convert


@pytest.fixture(autouse=True)
def _vocab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapterkit.gguf.vocab.read_vocab", zoo.read_vocab)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    zoo.build(tmp_path / "hf", "llama")
    return tmp_path / "hf"


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    from safetensors.torch import save_file

    tensors = read_tensors(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def config(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        said = {**json.loads(path.read_text()), **fields}
        path.write_text(json.dumps({k: v for k, v in said.items() if v is not None}))

    return change


def dropped(name: str) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda tensors: tensors.pop(name))


def added(name: str, *shape: int) -> Callable[[Path], None]:
    import torch

    return lambda folder: rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(shape)}))


# what is done to a good folder, and the sentence
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "architecture": (
        config(architectures=["RwkvForCausalLM"], model_type="rwkv"),
        "how GGUF stores a RwkvForCausalLM is not known here",
    ),
    "no architecture": (config(architectures=None, model_type=None), "its config.json names no architecture"),
    "strange tensor": (
        added("model.layers.0.self_attn.q_gate.weight", 4, 4),
        "nothing is known of 'model.layers.0.self_attn.q_gate.weight'",
    ),
    "missing tensor": (
        dropped("model.layers.1.mlp.up_proj.weight"),
        "the tensor that becomes 'blk.1.ffn_up.weight' is missing",
    ),
    "no embedding": (dropped("model.embed_tokens.weight"), "the tensor that becomes 'token_embd.weight' is missing"),
    "no number of heads": (config(num_attention_heads=None), "does not say 'num_attention_heads'"),
    "no number of layers": (config(num_hidden_layers=None), "does not say 'n_layers' or 'num_hidden_layers'"),
    "heads of another model": (config(num_attention_heads=7, head_dim=None), "not a multiple of 7 heads"),
    "no number": (config(num_attention_heads="four"), "where a whole number belongs"),
    "twice": (added("language_model.model.norm.weight", 64), "two spellings of one tensor"),
    "yarn without numbers": (
        config(rope_parameters={"rope_type": "yarn", "factor": 4.0}),
        "yarn scaling without 'original_max_position_embeddings'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_sentence(name: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, sentence = REFUSED[name]
    change(llama)
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit) as end:
        main(["convert", str(llama), "-o", str(tmp_path / "o.gguf"), "--json"])
    error = json.loads(capsys.readouterr().out)["error"]
    assert sentence in error["message"], error
    assert error["hint"]
    assert end.value.code == 1
    assert {path.name for path in tmp_path.iterdir()} == before
    if name == "architecture":
        assert "adapterkit merge BASE.gguf ADAPTER" in error["hint"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--quant", "Q4_K_M", "--dtype", "bf16"], "both say the type"),
        (["--quant", "Q9"], "no quantization"),
        (["--mmproj", "none.gguf"], "does not exist"),
        (["--to", "hf"], "is not a GGUF file"),
    ],
)
def test_options_that_contradict(
    arguments: list[str], sentence: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["convert", str(llama), "-o", str(tmp_path / "o.gguf"), "--json", *arguments])
    assert sentence in json.loads(capsys.readouterr().out)["error"]["message"]
    assert end.value.code in (2, 7)
    assert not (tmp_path / "o.gguf").exists()


def test_an_adapter_on_what_gguf_does_not_hold(tmp_path: Path) -> None:
    import torch

    hf = tmp_path / "hf"
    zoo.build(hf, "llama")
    rewrite(hf, lambda tensors: tensors.update({"vision_tower.proj.weight": torch.zeros(8, 8)}))
    config(vision_config={"hidden_size": 8})(hf)
    report = convert(hf, tmp_path / "o.gguf")
    assert any("the text part alone: 1 other tensor belongs" in note for note in report.notes)
    key = "base_model.model.vision_tower.proj"
    factors = {f"{key}.lora_A.weight": torch.ones(4, 8), f"{key}.lora_B.weight": torch.ones(8, 4)}
    adapter = write_adapter(tmp_path / "adapter", factors, target_modules=["proj"])
    with pytest.raises(
        adapterkit.errors.TargetError, match=r"changes 'vision_tower\.proj\.weight', which a GGUF llama"
    ):
        adapterkit.merge(hf, [adapter], tmp_path / "m.gguf")


def test_mmproj_is_copied_beside(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tower").mkdir()
    tower = write_gguf(tmp_path / "tower" / "mmproj-F16.gguf", {"v.w": random_array(4, 32)}, arch="clip")
    other = write_gguf(tmp_path / "tower" / "other.gguf", {"w": random_array(4, 32)})
    with pytest.raises(SystemExit):
        main(["convert", str(llama), "-o", str(tmp_path / "o.gguf"), "--mmproj", str(tower)])
    assert (tmp_path / "mmproj-F16.gguf").read_bytes() == tower.read_bytes()
    with pytest.raises(SystemExit):
        main(["convert", str(llama), "-o", str(tmp_path / "p.gguf"), "--mmproj", str(other)])
    assert "no mmproj file" in capsys.readouterr().err
    assert not (tmp_path / "p.gguf").exists()


def test_one_pass_is_two(tmp_path: Path) -> None:
    """Quantizing in the same pass gives the types, and from float32 the bytes, of quantizing afterwards."""
    import gguf

    hf = tmp_path / "hf"
    zoo.ZOO["llama_256"] = zoo.Tiny(
        "LlamaForCausalLM", {**zoo.ZOO["llama"].config, "hidden_size": 256, "intermediate_size": 512}
    )
    zoo.build(hf, "llama_256")
    convert(hf, tmp_path / "plain.gguf", dtype="f32")
    convert(tmp_path / "plain.gguf", tmp_path / "two.gguf", quantization=Quantization("Q4_K_M"))
    convert(hf, tmp_path / "one.gguf", quantization=Quantization("Q4_K_M"))
    one, two = (gguf.GGUFReader(tmp_path / f"{name}.gguf") for name in ("one", "two"))
    assert [t.name for t in one.tensors] == [t.name for t in two.tensors]
    assert {"Q4_K", "Q6_K", "F32"} == {t.tensor_type.name for t in one.tensors}
    for a, b in zip(one.tensors, two.tensors, strict=True):
        assert (a.tensor_type, a.data.tobytes()) == (b.tensor_type, b.data.tobytes())


def test_general_metadata(llama: Path, tmp_path: Path) -> None:
    card = {"license": "apache-2.0", "tags": ["text"], "language": ["en", "de"], "base_model": "org/some-base-7B"}
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in card.items())
    (llama / "README.md").write_text(f"---\n{front}\n---\n# A model\n")
    (llama / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_k": 20}))
    convert(llama, tmp_path / "o.gguf")
    header = adapterkit.bases.open_model(tmp_path / "o.gguf").header  # type: ignore[attr-defined]
    assert header["general.license"] == "apache-2.0"
    assert header["general.languages"] == ["en", "de"]
    assert header["general.base_model.0.name"] == "Some Base 7B"
    assert header["general.base_model.0.repo_url"] == "https://huggingface.co/org/some-base-7B"
    assert header["general.sampling.top_k"] == 20
    assert abs(header["general.sampling.temp"] - 0.6) < 1e-6
    assert header["general.size_label"] == "99K"
    # And back.
    convert(tmp_path / "o.gguf", tmp_path / "back", to="hf")
    convert(tmp_path / "back", tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "o.gguf").read_bytes()


def test_a_quantized_base_in_the_same_pass(llama: Path, tmp_path: Path) -> None:
    """NF4 is decoded on the way, and a change is not rounded to 16 bits in between."""
    import gguf
    import torch

    plain = read_tensors(llama)
    factors: dict[str, Any] = {}
    for name in plain:
        if name.endswith("q_proj.weight"):
            key = f"base_model.model.{name.removesuffix('.weight')}"
            generator = torch.Generator().manual_seed(1)
            factors[f"{key}.lora_A.weight"] = torch.randn(4, 64, generator=generator) * 0.1
            factors[f"{key}.lora_B.weight"] = torch.randn(64, 4, generator=generator) * 0.1
    adapter = write_adapter(tmp_path / "adapter", factors, target_modules=["q_proj"])
    adapterkit.merge(llama, [adapter], tmp_path / "nf4", quant="nf4", weights=[1e-9])
    adapterkit.merge(tmp_path / "nf4", [adapter], tmp_path / "wide", dtype="f32")
    convert(tmp_path / "wide", tmp_path / "two.gguf")
    adapterkit.merge(tmp_path / "nf4", [adapter], tmp_path / "one.gguf", dtype="f32")
    one, two = ({t.name: t.data for t in gguf.GGUFReader(tmp_path / f"{n}.gguf").tensors} for n in ("one", "two"))
    assert set(one) == set(two)
    assert all((one[name] == two[name]).all() for name in one)


def test_fidelity_of_a_gguf_output(llama: Path, tmp_path: Path) -> None:
    import torch

    key = "base_model.model.model.layers.0.mlp.up_proj"
    generator = torch.Generator().manual_seed(1)
    factors = {
        f"{key}.lora_A.weight": torch.randn(4, 64, generator=generator) * 0.01,
        f"{key}.lora_B.weight": torch.randn(96, 4, generator=generator) * 0.01,
    }
    adapter = write_adapter(tmp_path / "adapter", factors, target_modules=["up_proj"])
    kept = {}
    for mix in ("F32", "Q8_0", "Q4_0"):
        report = adapterkit.merge(
            llama, [adapter], tmp_path / f"{mix}.gguf", quantization=Quantization(mix), fidelity=True
        )
        assert report.fidelity is not None
        kept[mix] = report.fidelity.cosine
        assert report.fidelity.format == mix
    assert kept["F32"] > 0.999 > kept["Q8_0"] > kept["Q4_0"]


@pytest.mark.parametrize("to", ["fp8", "nf4"])
def test_a_quantized_base_is_decoded_on_the_way(to: str, tmp_path: Path) -> None:
    import torch

    tiny = zoo.ZOO["llama"]
    zoo.ZOO["llama_128"] = zoo.Tiny(tiny.cls, {**tiny.config, "hidden_size": 128, "intermediate_size": 256})
    zoo.build(tmp_path / "hf", "llama_128")
    key = "base_model.model.model.layers.0.self_attn.q_proj"
    shapes = {f"{key}.lora_A.weight": (4, 128), f"{key}.lora_B.weight": (128, 4)}
    factors = {name: torch.from_numpy(random_array(*shape)) for name, shape in shapes.items()}
    adapter = write_adapter(tmp_path / "adapter", factors, target_modules=["q_proj"])
    convert(tmp_path / "hf", tmp_path / "small", to=to)
    convert(tmp_path / "small", tmp_path / "decoded", to="f32")
    adapterkit.merge(tmp_path / "small", [adapter], tmp_path / "one.gguf", dtype="f32")
    adapterkit.merge(tmp_path / "decoded", [adapter], tmp_path / "two.gguf")
    one, two = open_model(tmp_path / "one.gguf"), open_model(tmp_path / "two.gguf")
    assert list(one) == list(two)
    assert all(one[name].raw() == two[name].raw() for name in one)
