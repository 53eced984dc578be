"""Rows: the text part of models that see or hear: GLM-OCR, HunYuan-VL, PaddleOCR-VL, Step 3.7, Qwen3-ASR and Omni."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from adapterkit.errors import CheckpointError
from adapterkit.gguf.arch import dense, gemma, moe
from adapterkit.gguf.arch.config import Config
from adapterkit.gguf.arch.ops import RotaryHalves
from adapterkit.gguf.arch.rope import DIVISORS, NTK_ALPHA, divisors
from adapterkit.gguf.arch.shared import DEEPSTACK, EMBEDDINGS, EXPERT_WIDTH, MLP, NORMS, QK_NORMS, attention, text_of
from adapterkit.gguf.arch.spec import ArchSpec, ComputedTensor, Key, block, blocks, plus_one
from adapterkit.gguf.arch.windows import SIGMOID, dense_lead, kinds

if TYPE_CHECKING:
    from collections.abc import Mapping

# Whole models whose text part is of a kind that has a row: it is told by the model type of `text_config`.
WRAPPERS = frozenset(
    (
        "AudioFlamingo3ForConditionalGeneration",
        "AyaVisionForConditionalGeneration",
        "Cohere2VisionForConditionalGeneration",
        "Exaone4_5_ForConditionalGeneration",
        "FastVlmForConditionalGeneration",
        "GlmAsrForConditionalGeneration",
        "GotOcr2ForConditionalGeneration",
        "GraniteSpeechForConditionalGeneration",
        "GraniteSpeechPlusForConditionalGeneration",
        "Idefics3ForConditionalGeneration",
        "InternVLForConditionalGeneration",
        "JanusForConditionalGeneration",
        "LightOnOcrForConditionalGeneration",
        "LlavaForConditionalGeneration",
        "LlavaNextForConditionalGeneration",
        "LlavaNextVideoForConditionalGeneration",
        "LlavaOnevisionForConditionalGeneration",
        "MiniCPMV4_6ForConditionalGeneration",
        "MusicFlamingoForConditionalGeneration",
        "Ovis2ForConditionalGeneration",
        "PerceptionLMForConditionalGeneration",
        "Qwen2AudioForConditionalGeneration",
        "SmolVLMForConditionalGeneration",
        "VideoLlavaForConditionalGeneration",
        "VipLlavaForConditionalGeneration",
        "VoxtralForConditionalGeneration",
    )
)


def spec(arch: str, model_type: str, rows: tuple[ArchSpec, ...]) -> ArchSpec:
    """A row of another file."""
    return next(one for one in rows if one.arch == arch and one.model_type == model_type)


# ------------------------------------------------------------------ Step 3.5 and 3.7


def step_kinds(config: Config) -> list[str]:
    """What each layer attends to; entries of layers that predict further tokens are left out."""
    found = config.get("layer_types", default=["full_attention"] * config.number("layers"))
    return [str(one) for one in found][: config.number("layers")]


def _step_heads(full: str, local: str, nested: str, other: str) -> Any:
    """Heads of each layer: those with a window may have another number."""

    def find(config: Config) -> list[int]:
        base = config.number(full) if config.get(full) is not None else config.number(other)
        inner = config.get(local, default=config.get("attention_other_setting", default={}).get(nested, base))
        return [int(inner) if kind == "sliding_attention" else base for kind in step_kinds(config)]

    return find


def _theta(config: Config, kind: str) -> float | None:
    found = config.get("rope_theta")
    if isinstance(found, list):
        return next((float(x) for x, one in zip(found, step_kinds(config), strict=False) if one == kind), None)
    own = config.rope_by_kind.get(kind)
    return own.get("rope_theta") if isinstance(own, dict) else config.rope.get("rope_theta")


def _step_check(config: Config) -> None:
    shares = config.get("partial_rotary_factors")
    for index, kind in enumerate(step_kinds(config)):
        wanted = 1.0 if kind == "sliding_attention" else 0.5
        rope = config.rope_by_kind.get(kind)
        found = rope.get("partial_rotary_factor", 1.0) if isinstance(rope, dict) else None
        found = float(shares[index]) if isinstance(shares, list) and index < len(shares) else found
        if found is not None and float(found) != wanted:
            raise CheckpointError(
                f"{config.ref}: llama.cpp's step35 turns {wanted} of a head in layers of '{kind}', and this one {found}",
                "run it with transformers",
            )
    scaled = config.get("yarn_only_types")
    if config.rope.get("rope_type", "default") != "default" and scaled not in (None, ["full_attention"]):
        raise CheckpointError(
            f"{config.ref}: llama.cpp's step35 scales the positions of layers that see all, and this one has "
            f"'yarn_only_types' {scaled}",
            "run it with transformers",
        )
    scalar = config.get("query_pre_attn_scalar")
    if scalar is not None and float(scalar) != config.number("head_dim"):
        raise CheckpointError(f"{config.ref}: llama.cpp's step35 has no 'query_pre_attn_scalar'", "run it elsewhere")


def _step_lead(config: Config) -> int:
    listed = config.get("moe_layers_enum")
    if isinstance(listed, str) and listed.strip():
        listed = [int(one) for one in listed.split(",")]
    return min(listed) if isinstance(listed, list) and listed else dense_lead(config)


def _limits(name: str) -> Any:
    def find(config: Config) -> list[float] | None:
        found = config.get(name)
        if not isinstance(found, list) or not any(found):
            return None
        return [float(one or 0.0) for one in found][: config.number("layers")]

    return find


def _step_factors(config: Config) -> list[float] | None:
    """The divisors for the half of a head that layers which see all turn; ones for the rest."""
    size = config.number("head_dim")
    found = divisors(config, size // 2, theta=_theta(config, "full_attention") or 10000.0)
    return None if found is None else found + [1.0] * (size // 2 - len(found))


def _step_back(values: Mapping[str, Any], config: Mapping[str, Any], base: Any) -> dict[str, Any]:
    heads = values["attention.head_count"]
    found = kinds(values)
    slides = values["attention.sliding_window_pattern"]
    rope = config.get("rope_parameters", {})
    full = {**rope.get("full_attention", rope), "partial_rotary_factor": 0.5}
    local = {**rope.get("sliding_attention", {"rope_type": "default"}), "partial_rotary_factor": 1.0}
    local.setdefault("rope_theta", full.get("rope_theta", 10000.0))
    lead = values["leading_dense_block_count"]
    return {
        **found,
        "model_type": "step3p5",
        "architectures": ["Step3p5ForCausalLM"],
        "num_attention_heads": next((n for n, one in zip(heads, slides, strict=True) if not one), heads[0]),
        "num_sliding_attention_heads": next((n for n, one in zip(heads, slides, strict=True) if one), heads[0]),
        "n_routed_experts": values["expert_count"],
        "moe_intermediate_size": values["expert_feed_forward_length"],
        "share_expert_dim": values["expert_shared_feed_forward_length"],
        "moe_router_scaling_factor": values.get("expert_weights_scale", 1.0),
        "swiglu_limits": values.get("swiglu_clamp_exp"),
        "swiglu_limits_shared": values.get("swiglu_clamp_shexp"),
        "mlp_layer_types": ["dense"] * lead + ["sparse"] * (values["block_count"] - lead),
        "query_pre_attn_scalar": values["attention.key_length"],
        "rope_parameters": {"full_attention": full, "sliding_attention": local},
        "num_experts": None,
        "moe_layers_enum": None,
    }


# ------------------------------------------------------------------ HunYuan


def _hunyuan_sections(config: Config) -> list[int] | None:
    found = config.rope_by_kind.get("xdrope_section", config.rope_by_kind.get("mrope_section"))
    if isinstance(found, list) and len(found) > 3:
        raise CheckpointError(
            f"{config.ref}: llama.cpp gives text the position 0 on the fourth of its rotary axes, and this model its own",
            "run it with transformers",
        )
    return [*found, 0, 0, 0, 0][:4] if isinstance(found, list) else None


def _hunyuan_back(values: Mapping[str, Any], config: Mapping[str, Any], base: Any) -> dict[str, Any]:
    return {"architectures": ["HunYuanVLForConditionalGeneration"]}


_GLM4, _GLM4V = spec("glm4", "glm4", dense.SPECS), spec("glm4", "glm4v", dense.SPECS)
_ERNIE = spec("ernie4_5", "ernie4_5", dense.SPECS)
_HUNYUAN = spec("hunyuan-dense", "hunyuan_v1_dense", dense.SPECS)
_GEMMA4 = spec("gemma4", "gemma4_text", gemma.SPECS)
_QWEN_MOE = spec("qwen3vlmoe", "qwen3_vl_moe", moe.SPECS)
_QWEN = spec("qwen3vl", "qwen3_vl", dense.SPECS)

_GLM_ROPE = Key(
    "rope.dimension_count", lambda c: int(float(c.rope.get("partial_rotary_factor", 1.0)) * c.number("head_dim"))
)


def _width(base: Any) -> int:
    return int(base.number("embedding_length")) // max(int(base.number("attention.head_count")), 1)


def _paddle_back(values: Mapping[str, Any], config: Mapping[str, Any], base: Any) -> dict[str, Any]:
    """A Llama, which computes the same of text; the sections are kept for the way to GGUF."""
    rope = {**config.get("rope_parameters", {}), "mrope_section": values["rope.dimension_sections"][:3]}
    return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_parameters": rope}


SPECS: tuple[ArchSpec, ...] = (
    ArchSpec(
        "step35",
        ("Step3p7ForConditionalGeneration", "Step3p5ForCausalLM"),
        "step3p7",
        plus_one(
            (
                *EMBEDDINGS,
                *NORMS,
                *attention(),
                *QK_NORMS,
                *MLP,
                block("self_attn.g_proj", "attn_gate"),
                *blocks(
                    ffn_gate_inp="moe.gate",
                    ffn_gate_exps="moe.gate_proj",
                    ffn_up_exps="moe.up_proj",
                    ffn_down_exps="moe.down_proj",
                    ffn_gate_shexp="share_expert.gate_proj",
                    ffn_up_shexp="share_expert.up_proj",
                    ffn_down_shexp="share_expert.down_proj",
                ),
                block("moe.router_bias", "exp_probs_b.bias"),
            )
        ),
        (
            Key(
                "attention.head_count",
                _step_heads("heads", "num_sliding_attention_heads", "num_attention_heads", "heads"),
            ),
            Key(
                "attention.head_count_kv",
                _step_heads("num_attention_groups", "_", "num_attention_groups", "kv_heads"),
            ),
            Key("attention.sliding_window", lambda c: c.get("sliding_window") or 0, field="sliding_window"),
            Key("attention.sliding_window_pattern", lambda c: [kind == "sliding_attention" for kind in step_kinds(c)]),
            Key("attention.value_length", "head_dim", needed=True),
            Key("rope.freq_base", lambda c: _theta(c, "full_attention")),
            Key("rope.freq_base_swa", lambda c: _theta(c, "sliding_attention")),
            Key("expert_count", ("moe_num_experts", "n_routed_experts"), needed=True, field="n_routed_experts"),
            Key("expert_used_count", ("moe_top_k", "num_experts_per_tok"), needed=True, field="num_experts_per_tok"),
            EXPERT_WIDTH,
            Key("expert_shared_feed_forward_length", "share_expert_dim", needed=True),
            Key("expert_weights_scale", "moe_router_scaling_factor"),
            Key("expert_weights_norm", "norm_expert_weight", True),
            SIGMOID,
            Key("leading_dense_block_count", _step_lead),
            Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", 1e-5),
            Key("swiglu_clamp_exp", _limits("swiglu_limits")),
            Key("swiglu_clamp_shexp", _limits("swiglu_limits_shared")),
        ),
        factors=(ComputedTensor(DIVISORS, _step_factors, True),),
        types=("step3p5",),
        drops=(r"^vit_", r"^model\.vision_model"),
        uneven=True,
        check=_step_check,
        back=_step_back,
    ),
    ArchSpec(
        "glm4",
        ("GlmOcrForConditionalGeneration",),
        "glm_ocr",
        _GLM4.rules,
        (_GLM_ROPE,),
        types=("glm_ocr_text",),
        # Where every frequency is turned, and the sections are those of an image, GLM-4.1V's rules serve.
        variant=lambda c: "glm_ocr_sections" if "mrope_section" in c.rope_by_kind else None,
        when=lambda base: False,
    ),
    ArchSpec(
        "glm4",
        (),
        "glm_ocr_sections",
        tuple(
            replace(one, ops=tuple(replace(op, rotary="rotary_dim") for op in one.ops if isinstance(op, RotaryHalves)))
            if any(isinstance(op, RotaryHalves) for op in one.ops)
            else one
            for one in _GLM4V.rules
        ),
        (_GLM_ROPE,),
        when=lambda base: (
            "glm4.rope.dimension_sections" in base.header.keys
            and base.number("rope.dimension_count") == (base.number("attention.key_length") or _width(base))
        ),
        back=dense.glm_sections_back,
    ),
    ArchSpec(
        "hunyuan_vl",
        ("HunYuanVLForConditionalGeneration",),
        "hunyuan_vl_text",
        _HUNYUAN.rules,
        (
            NTK_ALPHA,
            Key("rope.dimension_sections", _hunyuan_sections),
        ),
        leave=("expert_count", "expert_used_count"),
        types=("hunyuan_vl",),
        back=_hunyuan_back,
    ),
    ArchSpec(
        "paddleocr",
        ("PaddleOCRVLForConditionalGeneration",),
        "paddleocr_vl_text",
        _ERNIE.rules,
        (),
        types=("paddleocr_vl",),
        drops=(r"^mlp_AR\.", r"^visual\."),
        back=_paddle_back,
    ),
    ArchSpec(
        "qwen3vl",
        ("Qwen3ASRForConditionalGeneration",),
        "qwen3_asr",
        _QWEN.rules,
        (Key("n_deepstack_layers", lambda c: 0),),
        # llama.cpp's qwen3vl needs sections; without them the text is that of a qwen3.
        variant=lambda c: None if "mrope_section" in c.rope_by_kind else "qwen3",
        when=lambda base: False,
    ),
    ArchSpec(
        "qwen3vlmoe",
        ("Qwen3OmniMoeForConditionalGeneration", "Qwen3OmniMoeThinkerForConditionalGeneration"),
        "qwen3_omni_moe",
        spec("qwen3moe", "qwen3_moe", moe.SPECS).rules,
        (EXPERT_WIDTH, DEEPSTACK),
        types=("qwen3_omni_moe_thinker", "qwen3_omni_moe_text"),
        # Experts as Qwen3-MoE stores them; those of Qwen3-VL lie on their side.
        when=lambda base: not base.number("n_deepstack_layers"),
        defaults={"norm_topk_prob": True},
        back=text_of("qwen3_moe", "Qwen3MoeForCausalLM"),
    ),
)
