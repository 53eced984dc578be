"""From a Hugging Face folder to GGUF in one pass: a real llama.cpp computes what transformers and PEFT compute."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")
import arch_zoo as zoo
from gguf_runtime import embeddings, embeddings_of, logprobs, of_model
from models import load_model, make_adapter

import adapterkit
from adapterkit.errors import TargetError, UnsupportedAdapter, UsageError
from adapterkit.gguf.quantize import Quantization
from adapterkit.verbs.convert import convert

BACK = ("llama3", "deepseek_v3", "qwen3_5")
LIVE = ("granite4_micro", "qwen3_5")
FAST = ("llama", "gemma2", "phi3_longrope", "bamba")
# Latent attention and such: weights that the runtime multiplies without looking for a LoRA.
NO_LORA_FILE = ("deepseek", "glm4_moe_lite", "youtu", "minicpm3", "kimi_linear", "glm_moe_dsa", "gemma4_moe")


@pytest.fixture(autouse=True)
def _vocab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapterkit.gguf.vocab.read_vocab", zoo.read_vocab)


@pytest.mark.parametrize("kind", [k if k in FAST else pytest.param(k, marks=pytest.mark.slow) for k in zoo.ZOO])
def test_the_runtime_agrees(kind: str, tmp_path: Path) -> None:
    tiny, hf = zoo.ZOO[kind], tmp_path / "hf"
    plain = of_model(zoo.build(hf, kind))
    convert(hf, tmp_path / "base.gguf")
    assert far(logprobs(tmp_path / "base.gguf")[0], plain) < tiny.tolerance

    adapter = make_adapter(tmp_path / "adapter", hf, lora(tiny), scale=0.1)
    expected = live(hf, adapter, tiny.patch)
    assert far(expected, plain) > 0.01
    adapterkit.merge(hf, [adapter], tmp_path / "merged.gguf")
    assert far(logprobs(tmp_path / "merged.gguf")[0], expected) < tiny.tolerance


@pytest.mark.parametrize("kind", [k if k in LIVE else pytest.param(k, marks=pytest.mark.slow) for k in zoo.ZOO])
def test_a_gguf_base_and_a_lora_beside_it(kind: str, tmp_path: Path) -> None:
    """The same rules carry an adapter onto a GGUF base, and its factors into a LoRA file."""
    tiny, hf, base = zoo.ZOO[kind], tmp_path / "hf", tmp_path / "base.gguf"
    zoo.build(hf, kind)
    convert(hf, base)
    adapter = make_adapter(tmp_path / "adapter", hf, lora(tiny), scale=0.1)
    expected = live(hf, adapter, tiny.patch)
    if kind == "falcon_h1":
        with pytest.raises(TargetError, match="multiplied into the weights"):
            adapterkit.merge(base, [adapter], tmp_path / "merged.gguf")
    else:
        adapterkit.merge(base, [adapter], tmp_path / "merged.gguf")
        assert far(logprobs(tmp_path / "merged.gguf")[0], expected) < tiny.tolerance
    if kind.startswith(NO_LORA_FILE):
        with pytest.raises(UnsupportedAdapter, match="applies no LoRA"):
            convert(adapter, tmp_path / "lora.gguf", to="gguf-lora", base=hf)
        return
    convert(adapter, tmp_path / "lora.gguf", to="gguf-lora", base=hf)
    assert far(logprobs(base, lora=tmp_path / "lora.gguf")[0], expected) < tiny.tolerance


@pytest.mark.parametrize("kind", [k if k in BACK else pytest.param(k, marks=pytest.mark.slow) for k in zoo.ZOO])
def test_there_and_back(kind: str, tmp_path: Path) -> None:
    """GGUF -> Hugging Face -> GGUF gives the same bytes, and transformers computes the same with what lies between."""
    tiny, hf = zoo.ZOO[kind], tmp_path / "hf"
    plain = of_model(zoo.build(hf, kind))
    convert(hf, tmp_path / "one.gguf")
    report = convert(tmp_path / "one.gguf", tmp_path / "back", to="hf")
    assert report.to == "hf"
    convert(tmp_path / "back", tmp_path / "two.gguf")
    assert (tmp_path / "two.gguf").read_bytes() == (tmp_path / "one.gguf").read_bytes()
    if not tiny.alone:
        return
    model = load_model(tmp_path / "back").float().eval()
    if tiny.patch is not None:
        tiny.patch(model)
    assert far(of_model(model), plain) < 1e-5


@pytest.mark.parametrize(
    "kind", [k if k == "internlm2" else pytest.param(k, marks=pytest.mark.slow) for k in zoo.DISGUISES]
)
def test_what_only_its_own_code_runs(kind: str, tmp_path: Path) -> None:
    plain = of_model(zoo.disguise(kind, tmp_path / "hf"))
    convert(tmp_path / "hf", tmp_path / "base.gguf")
    assert far(logprobs(tmp_path / "base.gguf")[0], plain) < 1e-5


@pytest.mark.parametrize("kind", [k if k == "bert" else pytest.param(k, marks=pytest.mark.slow) for k in zoo.ENCODERS])
def test_encoders(kind: str, tmp_path: Path) -> None:
    tiny, hf = zoo.ENCODERS[kind], tmp_path / "hf"
    plain = embeddings_of(zoo.build(hf, kind))
    convert(hf, tmp_path / "base.gguf")
    assert far(embeddings(tmp_path / "base.gguf"), plain) < tiny.tolerance
    adapter = make_adapter(tmp_path / "adapter", hf, lora(tiny), scale=0.1)
    from peft import PeftModel

    expected = embeddings_of(PeftModel.from_pretrained(load_model(hf), adapter).float().eval())
    assert far(expected, plain) > 0.01
    adapterkit.merge(hf, [adapter], tmp_path / "merged.gguf")
    assert far(embeddings(tmp_path / "merged.gguf"), expected) < tiny.tolerance
    convert(tmp_path / "base.gguf", tmp_path / "back", to="hf")
    if "roberta" not in kind:  # told from a bert by its tokenizer, which these models do not have
        convert(tmp_path / "back", tmp_path / "again.gguf")
        assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "base.gguf").read_bytes()
        assert far(embeddings_of(load_model(tmp_path / "back").float().eval()), plain) < 1e-6


def lora(tiny: zoo.Tiny) -> Any:
    from peft import LoraConfig

    more = {"target_parameters": list(tiny.parameters)} if tiny.parameters else {}
    return LoraConfig(r=4, lora_alpha=8, target_modules=tiny.lora, **more)


def live(base: Path, adapter: Path, patch: Any = None) -> Any:
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_model(base), adapter).float().eval()
    if patch is not None:
        patch(model)
    return of_model(model)


def far(one: Any, other: Any) -> float:
    return float(abs(one - other).max())


# ------------------------------------------------------------------ MXFP4


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def as_mxfp4(folder: Path, tiny: str = "gpt_oss") -> dict[str, Any]:
    """A tiny gpt-oss whose experts are random MXFP4, saved as the released one is; the experts' own values."""
    import torch
    from models import read_tensors
    from safetensors.torch import save_file

    zoo.build(folder, tiny)
    stored, values = read_tensors(folder), {}
    generator = torch.Generator().manual_seed(3)
    for name in [n for n in stored if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, height, width = stored.pop(name).shape
        codes = torch.randint(0, 16, (experts, width, height), generator=generator)
        scales = torch.randint(121, 125, (experts, width, height // 32), generator=generator)
        factors = torch.exp2(scales.float() - 127).repeat_interleave(32, -1)
        values[name] = (torch.tensor(E2M1)[codes] * factors).transpose(1, 2).contiguous()
        pairs = codes.view(experts, width, height // 32, 16, 2)
        stored[f"{name}_blocks"] = (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8)
        stored[f"{name}_scales"] = scales.to(torch.uint8)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))
    return values


@pytest.fixture
def mxfp4(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    zoo.ZOO["gpt_oss_64"] = replace(
        zoo.ZOO["gpt_oss"], config={**zoo.ZOO["gpt_oss"].config, "intermediate_size": 64}, parameters=()
    )
    return tmp_path / "hf", as_mxfp4(tmp_path / "hf", "gpt_oss_64")


def test_mxfp4_experts_keep_their_bits(mxfp4: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    import gguf

    hf, values = mxfp4
    convert(hf, tmp_path / "o.gguf")
    reader = gguf.GGUFReader(tmp_path / "o.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert reader.fields["general.file_type"].contents() == 38  # MOSTLY_MXFP4_MOE of llama.cpp
    for layer in range(2):
        fused = values[f"model.layers.{layer}.mlp.experts.gate_up_proj"].transpose(1, 2)
        down = values[f"model.layers.{layer}.mlp.experts.down_proj"].transpose(1, 2)
        for name, wanted in {"gate": fused[:, ::2], "up": fused[:, 1::2], "down": down}.items():
            found = tensors[f"blk.{layer}.ffn_{name}_exps.weight"]
            assert found.tensor_type == gguf.GGMLQuantizationType.MXFP4
            assert (gguf.dequantize(found.data, found.tensor_type) == wanted.numpy()).all()
    convert(hf, tmp_path / "q.gguf", quantization=Quantization("Q4_0"))
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "q.gguf").tensors}
    assert kinds["blk.0.ffn_gate_exps.weight"] == "MXFP4"
    assert kinds["blk.0.attn_q.weight"] == "Q4_0"
    logits = logprobs(tmp_path / "o.gguf")[0]
    model = load_model_of(hf, values)
    assert far(logits, of_model(model)) < 2e-2  # llama.cpp rounds activations to 8 bits before MXFP4 weights


def load_model_of(hf: Path, values: dict[str, Any]) -> Any:
    """The same model in transformers, with the experts as floats."""
    import torch
    import transformers
    from models import read_tensors

    config = json.loads((hf / "config.json").read_text())
    config.pop("quantization_config")
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**config)).float().eval()
    stored = {n: t for n, t in read_tensors(hf).items() if not n.endswith(("_blocks", "_scales"))}
    missing = model.load_state_dict({**stored, **values}, strict=False)
    assert not missing.unexpected_keys
    assert torch.isfinite(next(model.parameters())).all()
    return model


def test_a_change_does_not_go_back_onto_mxfp4(mxfp4: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    hf, values = mxfp4
    model = load_model_of(hf, values)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    peft = get_peft_model(model, config)
    import torch

    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    peft.save_pretrained(tmp_path / "adapter")
    adapterkit.merge(hf, [tmp_path / "adapter"], tmp_path / "m.gguf")
    assert far(logprobs(tmp_path / "m.gguf")[0], of_model(peft.eval())) < 2e-2
    with pytest.raises(UsageError, match="would be rounded away"):
        mix = Quantization("MXFP4_MOE")
        adapterkit.merge(hf, [tmp_path / "adapter"], tmp_path / "no.gguf", quantization=mix)
    assert not (tmp_path / "no.gguf").exists()
