"""The contract with the runtime: a config that llama.cpp does not compute is refused by name; what it computes, it does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import arch_zoo as zoo
import numpy as np
import pytest
from gguf import GGUFReader
from gguf_runtime import far, logprobs, of_model

import adapterkit.gguf.vocab
from adapterkit.errors import AdapterkitError, TargetError, UsageError
from adapterkit.gguf.arch import dense, encoders, gemma, hybrid, moe, older
from adapterkit.gguf.arch.config import Config
from adapterkit.gguf.arch.contract import HARMLESS, held, unread
from adapterkit.gguf.arch.fixed import FIXED
from adapterkit.gguf.arch.rope import divisors, scaling
from adapterkit.gguf.arch.table import spec_of
from adapterkit.verbs.check import check
from adapterkit.verbs.convert import convert


@pytest.fixture(autouse=True)
def _no_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapterkit.gguf.vocab, "read_vocab", zoo.read_vocab)


def _build(folder: Path, kind: str, **change: Any) -> Any:
    tiny = (zoo.ZOO | zoo.ENCODERS)[kind]
    zoo.ZOO["changed"] = replace(tiny, config={**tiny.config, **change})
    return zoo.build(folder, "changed")


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}

# What no key of GGUF says: (kind, change, words of the sentence).
BUILT_IN = {
    "activation": ("qwen2", {"hidden_act": "relu"}, ("'hidden_act' is 'relu'", "computes silu")),
    "gelu in llama": ("llama", {"hidden_act": "gelu"}, ("'hidden_act' is 'gelu'", "computes silu")),
    "experts not renormalised": ("qwen3_moe", {"norm_topk_prob": False}, ("norm_topk_prob", "by their sum")),
    "experts renormalised": ("olmoe", {"norm_topk_prob": True}, ("norm_topk_prob", "as they are")),
    "scale of queries": ("gemma3", {"query_pre_attn_scalar": 64}, ("query_pre_attn_scalar", "head size")),
    "dense layers": ("qwen3_moe", {"mlp_only_layers": [0]}, ("mlp_only_layers", "every layer")),
    "positions left out": ("smollm3", {"no_rope_layers": [0, 1]}, ("no_rope_layers", "every fourth layer")),
    "a window": ("mistral", {"sliding_window": 8}, ("sliding_window", "more than 8 tokens", "allow_approximate")),
    "a window switched on": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
        ("sliding_window", "more than 8 tokens"),
    ),
    "yarn's bounds": ("qwen3", {"rope_parameters": {**YARN, "beta_fast": 16.0}}, ("beta_fast", "16", "qwen3")),
    "llama3 without its tensor": (
        "qwen3",
        {"rope_parameters": {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
        ("'llama3'", "does not compute in a qwen3"),
    ),
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_what_the_runtime_has_built_in_is_refused(name: str, tmp_path: Path) -> None:
    kind, change, words = BUILT_IN[name]
    _build(tmp_path / "hf", kind, **change)
    with pytest.raises(TargetError) as raised:
        convert(tmp_path / "hf", tmp_path / "o.gguf")
    assert all(word in str(raised.value) for word in words), str(raised.value)
    assert not (tmp_path / "o.gguf").exists()


def test_a_model_without_experts_uses_none(tmp_path: Path) -> None:
    """llama.cpp stops where a file without experts says how many are used; transformers does not look."""
    _build(tmp_path / "hf", "granite4_micro", num_local_experts=0, num_experts_per_tok=1)
    convert(tmp_path / "hf", tmp_path / "o.gguf")
    assert GGUFReader(tmp_path / "o.gguf").fields["granite.expert_used_count"].contents() == 0


_LOCAL = {"rope_type": "default", "rope_theta": 10000.0}
_STRETCHED = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
_BY_KIND = {"full_attention": _LOCAL, "sliding_attention": _STRETCHED}
_LOUD = {"full_attention": {**YARN, "attention_factor": 1.7}, "sliding_attention": _LOCAL}
_ONE_KIND = {"layer_types": ["full_attention", "sliding_attention", "full_attention", "full_attention"]}

# The same, without a model: (kinds, change, words of the sentence).
SAID: dict[str, tuple[tuple[str, ...], dict[str, Any], tuple[str, ...]]] = {
    "a scaling of layers with windows": (
        ("gemma3", "mellum", "laguna", "olmo3", "mimo_v2_flash", "modernbert"),
        {"rope_parameters": _BY_KIND},
        ("'linear'", "'sliding_attention'"),
    ),
    "both kinds of layers scaled": (
        ("mellum", "mimo_v2_flash"),
        {"rope_parameters": {"full_attention": _STRETCHED, "sliding_attention": _STRETCHED}},
        ("'linear'", "'sliding_attention'"),
    ),
    "an attention factor of some layers": (
        ("gemma3", "mimo_v2_flash", "modernbert"),
        {"rope_parameters": _LOUD},
        ("attention factor of 1.7", "sliding_attention"),
    ),
    "two rotary bases": (
        ("olmo3",),
        {"rope_parameters": {"full_attention": {**_LOCAL, "rope_theta": 500.0}, "sliding_attention": _LOCAL}},
        ("rope_theta", "one rotary base"),
    ),
    "biases": (
        ("afmoe", "cohere2_moe", "mellum", "laguna", "hy_v3", "minicpm3", "bitnet", "youtu", "kimi_linear", "eurobert"),
        {"attention_bias": True},
        ("attention_bias", "no such biases"),
    ),
    "biases that must be there": (("bamba",), {"mamba_conv_bias": False}, ("mamba_conv_bias", "without them")),
    "windows elsewhere": (("afmoe", "laguna"), _ONE_KIND, ("layer_types", "every f")),
    "a large epsilon": (
        ("glm4_moe_lite", "youtu", "minicpm3", "deepseek_v32", "glm_moe_dsa", "kimi_linear"),
        {"rms_norm_eps": 0.03},
        ("rms_norm_eps", "one epsilon"),
    ),
    "latent attention, stretched": (
        ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "youtu"),
        {"rope_parameters": _STRETCHED},
        ("'linear'", "deepseek2"),
    ),
    "yarn that scales the rotated part alone": (
        ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "youtu", "deepseek_v32"),
        {"rope_parameters": YARN},
        ("mscale", "mscale_all_dim"),
    ),
    "shared keys that come from no pair": (
        ("gemma4",),
        {"layer_types": ["full_attention", "sliding_attention"] * 3, "num_kv_shared_layers": 2},
        ("num_kv_shared_layers", "pair"),
    ),
}


@pytest.mark.parametrize("name", SAID)
def test_it_is_refused_from_the_config_alone(name: str) -> None:
    kinds, change, words = SAID[name]
    for kind in kinds:
        tiny = (zoo.ZOO | zoo.ENCODERS)[kind]
        plain = {"num_hidden_layers": 2, "max_position_embeddings": 128, **tiny.config, "architectures": [tiny.cls]}
        said = {**plain, **change}
        if "layer_types" in change:
            said |= {"num_hidden_layers": len(change["layer_types"]), "sliding_window": 8}
        config = Config(said)
        spec = spec_of(config)
        with pytest.raises(AdapterkitError) as raised:
            if spec.check is not None:
                spec.check(config)
            held(spec, config)
            scaling(spec, config)
        assert all(word in str(raised.value) for word in words), (kind, str(raised.value))


def test_a_scaling_of_a_kind_of_layers_that_is_not_there_is_none() -> None:
    tiny = zoo.ZOO["mellum"]
    config = Config({**tiny.config, "architectures": [tiny.cls], "layer_types": ["full_attention"] * 2})
    config.rope_by_kind.clear()
    config.rope_by_kind.update(_BY_KIND)
    assert scaling(spec_of(config), config).keys == {}


@pytest.mark.parametrize(
    ("sections", "theta", "context", "covered"),
    [
        ([24, 20, 20], 5e6, 262144, True),  # Qwen3-VL: two of 64 are not covered, and turn too slowly to show
        ([24, 20, 20], 10000.0, 32768, False),
        ([22, 21, 21], 10000.0, 32768, True),
    ],
)
def test_interleaved_sections_cover_all_frequencies(
    sections: list[int], theta: float, context: int, covered: bool
) -> None:
    rope = {"rope_type": "default", "rope_theta": theta, "mrope_section": sections, "mrope_interleaved": True}
    config = Config(
        {
            "architectures": ["Qwen3VLForConditionalGeneration"],
            "text_config": {"head_dim": 128, "rope_parameters": rope, "max_position_embeddings": context},
        }
    )
    spec = spec_of(config)
    if covered:
        assert held(spec, config) == ()
        return
    with pytest.raises(TargetError, match=r"mrope_section.*more than \d+ tokens"):
        held(spec, config)
    assert len(held(spec, config, ["rope.mrope_section"])) == 1


SCALED_BACK = {
    "attention": {**YARN, "attention_factor": 1.7},
    "mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0},
    "bounds": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0},
    "truncate": {**YARN, "truncate": False},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 48,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0 + i for i in range(8)],
        "attention_factor": 1.3,
    },
}


@pytest.mark.parametrize("name", SCALED_BACK)
def test_a_scaling_of_positions_comes_back_from_the_file(name: str, tmp_path: Path) -> None:
    """What transformers computes of the folder that was a file is what it computed of the model."""
    from models import load_model

    model = _build(tmp_path / "hf", "llama", rope_parameters=SCALED_BACK[name])
    convert(tmp_path / "hf", tmp_path / "o.gguf")
    convert(tmp_path / "o.gguf", tmp_path / "back", to="hf")
    assert far(of_model(load_model(tmp_path / "back")), of_model(model)) < 1e-5


def test_a_factor_of_attention_without_a_scaling_comes_back(tmp_path: Path) -> None:
    from models import load_model

    _build(tmp_path / "hf", "llama")
    convert(tmp_path / "hf", tmp_path / "o.gguf", override_kv="llama.rope.scaling.attn_factor=float:1.3")
    convert(tmp_path / "o.gguf", tmp_path / "back", to="hf")
    assert far(of_model(load_model(tmp_path / "back")), logprobs(tmp_path / "o.gguf")[0]) < 1e-5


WRITTEN = {
    "scaled positions of a bitnet": ("bitnet", {"rope_parameters": YARN}),
    "the output of a tied apertus": ("apertus", {"tie_word_embeddings": True}),
    "softmax over the chosen experts": ("cohere2_moe", {"norm_topk_prob": False}),
    "the base of dbrx": ("dbrx", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "windows of gemma3": ("gemma3", {"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]}),
    "windows of cohere2": (
        "cohere2",
        {"sliding_window": 4, "num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "base of gemma's frequencies": ("gemma", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "yarn's attention": ("llama", {"rope_parameters": {**YARN, "attention_factor": 1.7}}),
    "yarn's bounds as divisors": ("llama", {"rope_parameters": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0}}),
    "yarn without rounding": ("llama", {"rope_parameters": {**YARN, "truncate": False}}),
    "yarn's scales": ("qwen3", {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.0}}),
    "a tied model that needs its output": ("olmo2", {"tie_word_embeddings": True}),
    "all groups of experts": ("deepseek_v3", {"topk_group": 2}),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_a_key_or_a_tensor_says_is_computed(name: str, tmp_path: Path) -> None:
    kind, change = WRITTEN[name]
    expected = of_model(_build(tmp_path / "hf", kind, **change))
    convert(tmp_path / "hf", tmp_path / "o.gguf")
    assert far(logprobs(tmp_path / "o.gguf")[0], expected) < zoo.ZOO[kind].tolerance * 2


def test_a_difference_past_a_limit_is_written_when_it_is_allowed() -> None:
    config = Config({"architectures": ["MistralForCausalLM"], "sliding_window": 8, "max_position_embeddings": 128})
    spec = spec_of(config)
    notes = held(spec, config, ["sliding_window"])
    assert "other results for texts of more than 8 tokens" in notes[0]
    with pytest.raises(UsageError, match="hidden_act"):
        held(spec, config, ["sliding_window", "hidden_act"])
    # A window that is as long as the context never shows.
    assert held(spec, Config({**config.raw, "sliding_window": 128})) == ()


def test_fields_that_nobody_read_are_a_note() -> None:
    config = Config(
        {"architectures": ["LlamaForCausalLM"], "use_cache": True, "value_temperature": 1.5, "rms_norm_eps": 1}
    )
    config.need("rms_norm_eps")
    (note,) = unread(config)
    assert note.endswith("value_temperature=1.5")


def test_an_unknown_class_is_not_taken_for_a_sibling() -> None:
    with pytest.raises(TargetError, match="LlamaWithMemoryForCausalLM is not known"):
        spec_of(Config({"architectures": ["LlamaWithMemoryForCausalLM"], "model_type": "llama"}))
    with pytest.raises(TargetError, match="no place for the head of a LlamaForSequenceClassification"):
        spec_of(Config({"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"}))
    assert spec_of(Config({"model_type": "llama"})).arch == "llama"


def test_divisors_are_those_of_transformers() -> None:
    import torch
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for more in ({"beta_fast": 16.0, "beta_slow": 2.0}, {"truncate": False}):
        said = {"hidden_size": 64, "num_attention_heads": 4, "rope_parameters": {**YARN, **more}}
        wanted, attention = ROPE_INIT_FUNCTIONS["yarn"](LlamaConfig(**said), torch.device("cpu"))
        config = Config({"architectures": ["LlamaForCausalLM"], **said})
        found = divisors(config, 16)
        assert found is not None
        plain = 10000.0 ** -(np.arange(0, 16, 2) / 16)
        np.testing.assert_allclose(plain / found, wanted.numpy(), rtol=1e-5)
        assert scaling(spec_of(config), config).keys["rope.scaling.attn_factor"] == pytest.approx(attention)


def test_an_output_layer_is_compared_and_not_believed(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    hf = tmp_path / "hf"
    zoo.build(hf, "llama_tied")
    stored = load_file(hf / "model.safetensors")
    for name, head in (("same", stored["model.embed_tokens.weight"].clone()), ("other", torch.randn(288, 64) * 0.1)):
        save_file({**stored, "lm_head.weight": head}, hf / "model.safetensors", metadata={"format": "pt"})
        report = convert(hf, tmp_path / f"{name}.gguf")
        tensors = [tensor.name for tensor in GGUFReader(str(tmp_path / f"{name}.gguf")).tensors]
        assert ("output.weight" in tensors) == (name == "other")
        assert any("ties the output layer" in note for note in report.notes) == (name == "other")
    expected = of_model(AutoModelForCausalLM.from_pretrained(hf).float().eval())
    assert far(logprobs(tmp_path / "other.gguf")[0], expected) < 1e-5


def test_an_output_layer_of_its_own_is_refused_where_gguf_has_none(tmp_path: Path) -> None:
    _build(tmp_path / "hf", "cohere", tie_word_embeddings=False)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(AdapterkitError, match=r"'lm_head\.weight' has values of its own"):
        convert(tmp_path / "hf", tmp_path / "o.gguf")


def test_every_row_states_its_activation() -> None:
    """A row without a word on its activation function would take any."""
    rows = (*dense.SPECS, *gemma.SPECS, *moe.SPECS, *older.SPECS, *hybrid.SPECS, *encoders.SPECS)
    silent = {
        row.model_type
        for row in rows
        if not any("act" in one.field or "feed_forward_proj" in one.field for one in FIXED.get(row.model_type, ()))
    }
    assert silent == {"bloom", "mpt", "lfm2"}  # their configs have no such field
    fields = {one.field for row in FIXED.values() for one in row}
    assert fields & HARMLESS <= {"is_decoder"}


@pytest.mark.parametrize("server", ["llama.cpp", "ollama"])
def test_check_asks_the_same_contract(server: str, tmp_path: Path) -> None:
    from gguf_runtime import lora
    from models import make_adapter

    _build(tmp_path / "hf", "qwen3_moe", norm_topk_prob=False)
    adapter = make_adapter(tmp_path / "a", tmp_path / "hf", lora(target_modules=["q_proj"]), scale=0.1)
    report = check(tmp_path / "hf", [adapter], server=server)
    assert not report.ok
    assert any(one.code == f"{server}-config" and "norm_topk_prob" in one.message for one in report.findings)
    _build(tmp_path / "mla", "deepseek_v3")
    adapter = make_adapter(tmp_path / "b", tmp_path / "mla", lora(target_modules=["q_a_proj"]), scale=0.1)
    report = check(tmp_path / "mla", [adapter], server=server)
    assert [one.code for one in report.findings if one.code.startswith(server)][:1] == [f"{server}-unheard"]


@pytest.mark.parametrize(
    ("cls", "change"),
    [
        ("LlamaBidirectionalModel", {"hidden_act": "relu"}),
        ("Sarashina2VisionForCausalLM", {"hidden_act": "relu"}),
        ("Lfm2BidirectionalModel", {"conv_bias": True}),
        ("SarvamMoEForCausalLM", {"hidden_act": "relu"}),
        ("Qwen3OmniMoeForConditionalGeneration", {"norm_topk_prob": False}),
        ("Qwen3OmniMoeForConditionalGeneration", {"hidden_act": "relu"}),
        ("GlmOcrForConditionalGeneration", {"hidden_act": "relu"}),
        ("PaddleOCRVLForConditionalGeneration", {"hidden_act": "relu"}),
        ("HunYuanVLForConditionalGeneration", {"attention_bias": True}),
    ],
)
def test_a_class_that_another_row_computes_is_held_to_what_that_has_built_in(cls: str, change: dict[str, Any]) -> None:
    config = {"architectures": [cls], "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, **change}
    with pytest.raises(TargetError, match=next(iter(change))):
        held(spec_of(Config(config)), Config(config))
