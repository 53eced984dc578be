"""Configs as they are published are not refused, and what a runtime option must say is right once it says it.

Sources of the configs: transformers' own defaults and docstrings, and what serving engines test their loaders with.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import arch_zoo as zoo
import pytest
from gguf_runtime import far, logprobs, of_model
from models import load_model

import adapterkit.gguf.vocab
from adapterkit.errors import AdapterkitError, TargetError, UsageError
from adapterkit.gguf.arch import omitted
from adapterkit.gguf.arch.config import Config
from adapterkit.gguf.arch.contract import held, left_out_by_transformers, unread
from adapterkit.gguf.arch.fits import sound
from adapterkit.gguf.arch.hyper import hyperparameters
from adapterkit.gguf.arch.rope import scaling
from adapterkit.gguf.arch.table import classes, spec_of
from adapterkit.verbs.convert import convert


@pytest.fixture(autouse=True)
def _no_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapterkit.gguf.vocab, "read_vocab", zoo.read_vocab)


def _layers(count: int, full: int) -> list[str]:
    return ["full_attention" if i % 4 == full else "sliding_attention" for i in range(count)]


_DEFAULT = {"rope_type": "default"}
STEP = {
    "architectures": ["Step3p7ForConditionalGeneration"],
    "vision_config": {"model_type": "perception_encoder", "width": 1536},
    "text_config": {
        "architectures": ["Step3p5ForCausalLM"],
        "model_type": "step3p5",
        "hidden_size": 4096,
        "intermediate_size": 11264,
        "num_hidden_layers": 45,
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "vocab_size": 128896,
        "num_attention_heads": 64,
        "num_attention_groups": 8,
        "moe_num_experts": 288,
        "moe_top_k": 8,
        "moe_intermediate_size": 1280,
        "share_expert_dim": 1280,
        "norm_expert_weight": True,
        "moe_router_scaling_factor": 3.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 2.0,
            "original_max_position_embeddings": 131072,
            "low_freq_factor": 1.0,
            "high_freq_factor": 32.0,
        },
        "yarn_only_types": ["full_attention"],
        "moe_layers_enum": ",".join(map(str, range(3, 45))),
        "sliding_window": 512,
        "layer_types": _layers(48, 0),
        "attention_other_setting": {"num_attention_heads": 96, "num_attention_groups": 8, "head_dim": 128},
        "partial_rotary_factors": [0.5 if i % 4 == 0 else 1.0 for i in range(48)],
        "rope_theta": [5e6 if i % 4 == 0 else 1e4 for i in range(48)],
        "num_nextn_predict_layers": 3,
    },
}
_LATENT = {"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
PUBLISHED: dict[str, dict[str, Any]] = {
    "Step 3.7": STEP,
    "Mellum 2": {
        "architectures": ["MellumForCausalLM"],
        "hidden_size": 2304,
        "intermediate_size": 7168,
        "num_hidden_layers": 28,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 896,
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "sliding_window": 1024,
        "use_sliding_window": True,
        "vocab_size": 98304,
        "layer_types": _layers(28, 3),
        "rope_parameters": {
            "full_attention": {
                "rope_type": "yarn",
                "rope_theta": 500000.0,
                "factor": 16.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "original_max_position_embeddings": 8192,
                "attention_factor": 1.2772588722239782,
            },
            "sliding_attention": {**_DEFAULT, "rope_theta": 500000.0},
        },
    },
    "Hy3": {
        "architectures": ["HYV3ForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 13312,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_experts": 192,
        "num_experts_per_tok": 8,
        "qk_norm": True,
        "moe_intermediate_size": 1536,
        "num_shared_experts": 1,
        "first_k_dense_replace": 1,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 262144,
        "router_scaling_factor": 2.826,
        "route_norm": True,
        "vocab_size": 120832,
        "rope_parameters": {**_DEFAULT, "rope_theta": 11158840.0},
    },
    "Youtu 2B": {
        "architectures": ["YoutuForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": 128256,
        "rms_norm_eps": 1e-6,
        "rope_interleave": True,
        **_LATENT,
        "max_position_embeddings": 131072,
        "hidden_act": "silu",
        "attention_bias": False,
        "rope_parameters": {**_DEFAULT, "rope_theta": 1600000},
    },
    "Qwen3 30B-A3B": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "vocab_size": 151936,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "max_position_embeddings": 40960,
        "rope_theta": 1e6,
        "rope_scaling": None,
        "sliding_window": None,
        "use_sliding_window": False,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "max_window_layers": 48,
    },
    "LLaVA 1.5": {
        "architectures": ["LlavaForConditionalGeneration"],
        "vision_config": {"hidden_size": 1024},
        "text_config": {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "vocab_size": 32064,
        },
    },
    "Pixtral 12B": {
        "architectures": ["LlavaForConditionalGeneration"],
        "vision_config": {"head_dim": 64},
        "text_config": {
            "model_type": "mistral",
            "head_dim": 128,
            "hidden_size": 5120,
            "intermediate_size": 14336,
            "max_position_embeddings": 1024000,
            "num_hidden_layers": 40,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e9,
            "sliding_window": None,
            "vocab_size": 131072,
        },
    },
    "Qwen2-Audio": {
        "architectures": ["Qwen2AudioForConditionalGeneration"],
        "audio_config": {"model_type": "qwen2_audio_encoder"},
        "text_config": {
            "model_type": "qwen2",
            "intermediate_size": 11008,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000,
            "sliding_window": 32768,
            "use_mrope": False,
        },
    },
    "gpt-oss 20B": {
        "architectures": ["GptOssForCausalLM"],
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "attention_bias": True,
        "swiglu_limit": 7.0,
        "rms_norm_eps": 1e-5,
        "sliding_window": 128,
        "max_position_embeddings": 131072,
        "initial_context_length": 4096,
        "vocab_size": 201088,
        "rope_theta": 150000,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    },
}


def _whole(config: dict[str, Any], approximate: tuple[str, ...] = ()) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Everything that a config alone decides of a file: its keys, and notes."""
    read = Config(config)
    spec = spec_of(read)
    for one in spec.factors:
        one.make(read)
    notes = held(spec, read, approximate)
    return hyperparameters(spec, read), (*notes, *scaling(spec, read).notes)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_not_refused(name: str) -> None:
    values = _whole(PUBLISHED[name])[0]
    sound(values, name)
    assert values["block_count"] == Config(PUBLISHED[name]).number("layers")
    assert values["attention.head_count"]


# What llama.cpp decides by the numbers of layers, experts and tokens of the released sizes, which tiny models do not show.
_LLAMA4 = {
    "architectures": ["Llama4ForCausalLM"],
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 202048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "attention_chunk_size": 8192,
    "attn_scale": 0.1,
    "floor_scale": 8192,
    "num_experts_per_tok": 1,
    "max_position_embeddings": 1048576,
    "no_rope_layers": [1, 1, 1, 0] * 12,
    "num_local_experts": 16,
    "use_qk_norm": True,
    "interleave_moe_layer_step": 1,
}
_MAVERICK = {**_LLAMA4, "num_local_experts": 128, "use_qk_norm": False, "interleave_moe_layer_step": 2}
_COMMAND = {
    "architectures": ["CohereForCausalLM"],
    "hidden_size": 12288,
    "intermediate_size": 33792,
    "use_qk_norm": True,
    "num_hidden_layers": 64,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "vocab_size": 256000,
    "layer_norm_eps": 1e-5,
    "logit_scale": 0.8333,
    "rope_theta": 75e6,
    "max_position_embeddings": 131072,
}
_EXAONE = {
    "architectures": ["Exaone4ForCausalLM"],
    "hidden_size": 5120,
    "intermediate_size": 27392,
    "head_dim": 128,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "vocab_size": 102400,
    "sliding_window": 4096,
    "sliding_window_pattern": "LLLG",
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "max_position_embeddings": 131072,
}
_GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "hidden_size": 5376,
    "intermediate_size": 21504,
    "head_dim": 128,
    "num_hidden_layers": 62,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "vocab_size": 262208,
    "query_pre_attn_scalar": 168,
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_local_base_freq": 10000,
    "max_position_embeddings": 131072,
}
_MLA = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 10944,
    **_LATENT,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "q_lora_rank": None,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 768,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "vocab_size": 128256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
}
BY_SIZE: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("Llama 4 Scout", _LLAMA4, {"use_qk_norm": False}, "'use_qk_norm' is false"),
    ("Llama 4 Maverick", _MAVERICK, {"use_qk_norm": True}, "'use_qk_norm' is true"),
    ("Command R+", _COMMAND, {"use_qk_norm": False}, "wants norms of q and k"),
    (
        "Command R",
        {**_COMMAND, "use_qk_norm": False, "num_hidden_layers": 40},
        {"use_qk_norm": True},
        "only in a command",
    ),
    ("Exaone 4 32B", _EXAONE, {"sliding_window": None}, "64 layers a sliding window"),
    ("Gemma 3 27B", _GEMMA3, {"query_pre_attn_scalar": 128}, "query_pre_attn_scalar"),
    ("Kanana 2", _MLA, {"q_lora_rank": 1536}, "reads no q_lora_rank of a deepseek2 of 48 layers"),
    (
        "Moonlight",
        {**_MLA, "num_hidden_layers": 27, "vocab_size": 163840},
        {"num_hidden_layers": 30},
        "26 or 27 layers",
    ),
]


@pytest.mark.parametrize(("config", "change", "words"), [row[1:] for row in BY_SIZE], ids=[row[0] for row in BY_SIZE])
def test_what_the_runtime_tells_by_sizes(config: dict[str, Any], change: dict[str, Any], words: str) -> None:
    """A released size converts, and the same size with another value there is refused."""
    sound(_whole(config)[0], "config.json")
    with pytest.raises(AdapterkitError, match=words):
        _whole({**config, **change})


def test_what_a_text_part_leaves_out_is_its_classs(tmp_path: Path) -> None:
    """The config of a whole model without all that its text part's class says: the same file."""
    tiny = zoo.ZOO["llava"]
    text = {**tiny.config["text_config"], "num_hidden_layers": 1, "num_attention_heads": 32, "num_key_value_heads": 8}
    text = {**text, "model_type": "mistral", "hidden_size": 64, "head_dim": 2, "rms_norm_eps": 1e-6}
    zoo.ZOO["changed"] = replace(tiny, config={**tiny.config, "text_config": text})
    zoo.build(tmp_path / "hf", "changed")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    convert(tmp_path / "hf", tmp_path / "whole.gguf")
    for name in ("num_attention_heads", "num_key_value_heads", "rms_norm_eps"):
        del config["text_config"][name]
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    convert(tmp_path / "hf", tmp_path / "short.gguf")
    assert (tmp_path / "short.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


@pytest.mark.slow
def test_the_defaults_are_those_of_transformers() -> None:
    import dataclasses

    from transformers import CONFIG_MAPPING

    for kind in {line.split()[0] for line in omitted._ROWS.split("\n") if line}:
        defaults = {one.name: one.default for one in dataclasses.fields(CONFIG_MAPPING[kind])}
        assert omitted.of_class(kind), kind
        for name, value in omitted.of_class(kind).items():
            assert defaults[name] == value, (kind, name)
    for kind, theta in omitted.THETAS.items():
        assert CONFIG_MAPPING[kind].default_theta == theta, kind
    assert Config({"model_type": "hy_v3", "architectures": ["HYV3ForCausalLM"]}).rope["rope_theta"] == 11158840.0


# Fields that publishers set, where transformers' own default is a model that llama.cpp does not compute.
SET_BY_PUBLISHERS: dict[str, dict[str, Any]] = {
    "AfmoeForCausalLM": {"mup_enabled": True},
    "DbrxForCausalLM": {"attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "rope_theta": 500000}},
    "Dots1ForCausalLM": {"n_shared_experts": 2},
    "Exaone4ForCausalLM": {"num_hidden_layers": 64, "layer_types": None, "sliding_window_pattern": "LLLG"},
    "LagunaForCausalLM": {"layer_types": _layers(40, 0)},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv"] * 16 + ["full_attention"] * 16},
    "MiniMaxM3SparseForConditionalGeneration": {
        "layer_types": ["full_attention"] * 3 + ["minimax_m3_sparse"] * 57,
        "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 57,
    },
    "NemotronHForCausalLM": {"layers_block_type": None, "hybrid_override_pattern": "MEMEM*E", "num_hidden_layers": 7},
    "PhimoeForCausalLM": {"attention_bias": True, "lm_head_bias": True},
    "Qwen3MoeForCausalLM": {"norm_topk_prob": True},
    "Step3p7ForConditionalGeneration": {"rope_parameters": None, "partial_rotary_factors": [0.5] * 45},
}
SET_BY_PUBLISHERS["Exaone4_5_ForConditionalGeneration"] = SET_BY_PUBLISHERS["Exaone4ForCausalLM"]
# Published as they are, and written only for those who allow the field that differs past a limit.
BY_PERMISSION = {
    "MistralForCausalLM": "sliding_window",
    "FalconMambaForCausalLM": "mixer_rms_eps",
    "MiniMaxForCausalLM": "rms_norm_eps",
}
# llama.cpp computes no published model of these.
NOT_COMPUTED = {"BitNetForCausalLM": "relu2"}


@pytest.mark.slow
def test_the_defaults_of_every_class_are_computed_or_told_apart() -> None:
    """transformers' defaults are those of a published model of each family, but for `SET_BY_PUBLISHERS`."""
    import transformers

    refused, tried = {}, 0
    for name in sorted(classes()):
        made = getattr(getattr(transformers, name, None), "config_class", None)
        if made is None:
            continue
        config = json.loads(json.dumps(made().to_dict(), default=str))
        inner = next((config[key] for key in ("text_config", "thinker_config") if key in config), config)
        inner |= SET_BY_PUBLISHERS.get(name, {})
        allowed = (BY_PERMISSION[name],) if name in BY_PERMISSION else ()
        tried += 1
        try:
            _whole({**config, "architectures": [name]}, allowed)
        except AdapterkitError as err:
            refused[name] = str(err)
    assert tried > 140
    assert set(refused) == set(NOT_COMPUTED), {k: v for k, v in refused.items() if k not in NOT_COMPUTED}
    assert all(word in refused[name] for name, word in NOT_COMPUTED.items())


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LAGUNA = {
    "full_attention": {
        **YARN,
        "original_max_position_embeddings": 512,
        "beta_fast": 64.0,
        "beta_slow": 10.0,
        "attention_factor": 1.3,
        "partial_rotary_factor": 0.5,
    },
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
}


@pytest.mark.parametrize(
    ("kind", "rope"), [("laguna", LAGUNA), ("qwen3", {**YARN, "beta_fast": 3.0, "beta_slow": 2.0})]
)
def test_bounds_of_yarn_that_no_file_says_are_given_to_the_runtime(
    kind: str, rope: dict[str, Any], tmp_path: Path
) -> None:
    tiny = zoo.ZOO[kind]
    zoo.ZOO["changed"] = replace(tiny, config={**tiny.config, "rope_parameters": rope})
    expected = of_model(zoo.build(tmp_path / "hf", "changed"))
    with pytest.raises(TargetError, match=r"beta_fast.*yarn-beta-fast \d+.*allow_approximate='rope.beta_fast'"):
        convert(tmp_path / "hf", tmp_path / "o.gguf")
    inner = rope.get("full_attention", rope)
    allowed = [f"rope.{name}" for name in ("beta_fast", "beta_slow") if name in inner]
    report = convert(tmp_path / "hf", tmp_path / "o.gguf", allow_approximate=allowed)
    assert any("yarn-beta-fast" in note for note in report.notes)
    bounds = (inner["beta_fast"], inner.get("beta_slow", 1.0))
    assert far(logprobs(tmp_path / "o.gguf", bounds=bounds)[0], expected) < 1e-5
    assert far(logprobs(tmp_path / "o.gguf")[0], expected) > 1e-4
    convert(tmp_path / "o.gguf", tmp_path / "back", to="hf")
    said = Config(json.loads((tmp_path / "back/config.json").read_text())).rope
    assert said["beta_fast"] == inner["beta_fast"]


def test_llama3s_frequencies_turn_half_a_head_in_step(tmp_path: Path) -> None:
    """As published (lists, one scaling for the layers that see all) and as transformers saves it again."""
    tiny = zoo.ZOO["step3p7"]
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3["original_max_position_embeddings"] = 32
    text = dict(tiny.config["text_config"])
    rope = text["rope_parameters"]
    rope = {**rope, "full_attention": {**rope["full_attention"], **llama3}}
    zoo.ZOO["changed"] = replace(tiny, config={**tiny.config, "text_config": {**text, "rope_parameters": rope}})
    expected = of_model(zoo.build(tmp_path / "hf", "changed"))
    convert(tmp_path / "hf", tmp_path / "saved.gguf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    del config["text_config"]["rope_parameters"]
    config["text_config"] |= {"rope_theta": [50000.0, 10000.0], "partial_rotary_factors": [0.5, 1.0]}
    config["text_config"] |= {"rope_scaling": llama3, "yarn_only_types": ["full_attention"]}
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    convert(tmp_path / "hf", tmp_path / "published.gguf")
    for found in logprobs(tmp_path / "saved.gguf", tmp_path / "published.gguf"):
        assert far(found, expected) < tiny.tolerance * 2
    config["text_config"]["yarn_only_types"] = ["full_attention", "sliding_attention"]
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterkitError, match="yarn_only_types"):
        convert(tmp_path / "hf", tmp_path / "other.gguf")


def test_what_a_class_of_transformers_leaves_out_is_said() -> None:
    plain = {"architectures": ["MiniMaxForCausalLM"], "head_dim": 16, "hidden_size": 64, "num_attention_heads": 4}
    assert left_out_by_transformers(Config(plain)) == ()
    for more in ({"rotary_dim": 8}, {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}):
        (note,) = left_out_by_transformers(Config({**plain, **more}))
        assert "that part of a head" in note
    assert left_out_by_transformers(Config({**plain, "rotary_dim": 8, "architectures": ["MiniMaxM1ForCausalLM"]})) == ()


@pytest.mark.parametrize(
    ("kind", "change", "given"),
    [
        ("mistral", {"sliding_window": 8}, {"allow_approximate": ["sliding_window"]}),
        ("qwen3", {}, {"as_reranker": True}),
    ],
)
def test_verify_knows_what_was_asked(kind: str, change: dict[str, Any], given: dict[str, Any], tmp_path: Path) -> None:
    from gguf_runtime import lora
    from models import make_adapter

    import adapterkit

    tiny = zoo.ZOO[kind]
    zoo.ZOO["changed"] = replace(tiny, config={**tiny.config, **change})
    zoo.build(tmp_path / "hf", "changed")
    (tmp_path / "hf/tokenizer.json").write_text(json.dumps({"model": {"vocab": {"yes": 20, "no": 30}}}))
    adapter = make_adapter(tmp_path / "a", tmp_path / "hf", lora(), scale=0.1)
    with pytest.raises(UsageError, match="options of a GGUF output"):
        adapterkit.merge(tmp_path / "hf", [adapter], tmp_path / "folder", **given)
    adapterkit.merge(tmp_path / "hf", [adapter], tmp_path / "o.gguf", **given)
    report = adapterkit.verify(tmp_path / "o.gguf", base=tmp_path / "hf", adapters=[adapter])
    assert report.ok
    assert not report.findings


_GROUPS = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
    "n_group": 4,
    "topk_group": 2,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-6,
}
_HUNYUAN = {"alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0, "type": "dynamic"}
_AS_SAID: dict[str, tuple[str, dict[str, Any]]] = {
    "HunYuan dense": (
        "HunYuanDenseV1ForCausalLM",
        {"model_type": "hunyuan_v1_dense", "head_dim": 16, "rope_theta": 10000.0, "rope_scaling": _HUNYUAN},
    ),
    "HunYuan MoE": (
        "HunYuanMoEV1ForCausalLM",
        {
            "model_type": "hunyuan_v1_moe",
            "head_dim": 16,
            "rope_theta": 10000.0,
            "rope_scaling": _HUNYUAN,
            "num_experts": 4,
            "moe_topk": [2, 2],
            "num_shared_expert": [1, 1],
            "moe_intermediate_size": [48, 48],
        },
    ),
    "DeepSeek V2 with groups that choose nothing": (
        "DeepseekV2ForCausalLM",
        {"model_type": "deepseek_v2", **_GROUPS, "topk_method": "greedy", "norm_topk_prob": False},
    ),
}


@pytest.mark.parametrize("name", _AS_SAID)
def test_a_config_as_it_is_published_computes_the_same(name: str, tmp_path: Path) -> None:
    """By the file that was published, not by one that transformers saves of it."""
    import torch
    import transformers
    from models import randomize

    cls, said = _AS_SAID[name]
    plain = {"vocab_size": 288, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    plain |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5}
    config = {"architectures": [cls], **plain, **said, "tie_word_embeddings": False, "torch_dtype": "float32"}
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    read = transformers.AutoConfig.from_pretrained(hf)
    model = transformers.AutoModelForCausalLM.from_config(read).float().eval()
    randomize(model, scale=0.1)
    model.save_pretrained(hf)
    (hf / "config.json").write_text(json.dumps(config))
    report = convert(hf, tmp_path / "o.gguf")
    assert not any("dynamic" in note for note in report.notes)
    assert far(logprobs(tmp_path / "o.gguf")[0], of_model(model)) < 1e-5


def test_groups_of_experts_by_their_best_are_refused() -> None:
    said = {"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", **_GROUPS}
    said |= {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    config = Config({**said, "topk_method": "group_limited_greedy"})
    with pytest.raises(TargetError, match="topk_method"):
        held(spec_of(config), config)
    for more in ({"n_group": 1, "topk_group": 1}, {"topk_group": 4}):
        config = Config({**said, "topk_method": "group_limited_greedy", **more})
        held(spec_of(config), config)


def test_the_word_of_dots_llm1_for_its_sigmoid_is_known() -> None:
    said = {"architectures": ["Dots1ForCausalLM"], "model_type": "dots1", "scoring_func": "noaux_tc", **_GROUPS}
    said |= {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96}
    said |= {"routed_scaling_factor": 2.5, "norm_topk_prob": True, "max_position_embeddings": 128}
    config = Config({**said, "n_group": 1, "topk_group": 1})
    assert hyperparameters(spec_of(config), config)["expert_gating_func"] == 2


def test_what_published_configs_say_of_nothing_is_no_note() -> None:
    """Qwen2.5's windows that are switched off, and how a cache is kept."""
    said = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 64, "num_attention_heads": 4}
    said |= {"num_hidden_layers": 2, "sliding_window": 32768, "use_sliding_window": False, "use_mrope": False}
    said |= {"cache_implementation": "hybrid", "max_window_layers": 28}
    config = Config(said)
    held(spec_of(config), config)
    assert not any(word in note for note in unread(config) for word in ("sliding", "mrope", "cache"))


def test_an_epsilon_of_compressed_parts_is_said() -> None:
    said = {"architectures": ["Glm4MoeLiteForCausalLM"], "kv_lora_rank": 32, "rms_norm_eps": 1e-5}
    (note,) = left_out_by_transformers(Config(said))
    assert "'rms_norm_eps' is 1e-05" in note
    assert left_out_by_transformers(Config({**said, "rms_norm_eps": 1e-6})) == ()


def test_all_of_a_latent_heads_own_part_turns(tmp_path: Path) -> None:
    """The way back of a DeepSeek V3 with yarn and parts of the published kind: half of the query's head turns."""
    tiny = zoo.ZOO["deepseek_v3"]
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
    change = {"qk_rope_head_dim": 16, "rope_parameters": {**rope, "mscale": 1.0, "mscale_all_dim": 1.0}}
    zoo.ZOO["changed"] = replace(tiny, config={**tiny.config, **change})
    expected = of_model(zoo.build(tmp_path / "hf", "changed"))
    convert(tmp_path / "hf", tmp_path / "o.gguf")
    convert(tmp_path / "o.gguf", tmp_path / "back", to="hf")
    assert far(of_model(load_model(tmp_path / "back").float().eval()), expected) < 1e-5
