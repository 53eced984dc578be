"""Rows: Apertus, Jais 2, GLM, DBRX, BitNet, Bamba, Nemotron-H: decoders with an activation, a norm or a mixer of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapterkit.errors import CheckpointError
from adapterkit.gguf.arch.config import Config
from adapterkit.gguf.arch.hybrid import mamba
from adapterkit.gguf.arch.ops import Interleave, Stack, Turn, Unjoin
from adapterkit.gguf.arch.rope import SCALED, kind_of
from adapterkit.gguf.arch.shared import (
    EMBEDDINGS,
    FUSED_MLP,
    LLAMA3,
    LONGROPE,
    MLP,
    NORMS,
    PARTIAL_ROPE,
    QK_NORMS,
    ROPE_DIM,
    VOCAB_SIZE,
    attention,
    constant,
)
from adapterkit.gguf.arch.spec import ArchSpec, Key, Rule, Scalars, block, blocks, rule

if TYPE_CHECKING:
    from collections.abc import Mapping

_UP_DOWN = blocks(ffn_up="mlp.up_proj", ffn_down="mlp.down_proj")
_LAYERS = Key("block_count", lambda c: c.number("layers"))


def part_of(name: str, field: str) -> Any:
    """A field of a part of the config, such as ``attn_config``."""

    def find(config: Config) -> Any:
        part = config.get(name, default={})
        return part.get(field) if isinstance(part, dict) else None

    return find


# ------------------------------------------------------------------ BitNet


def _plain_bitnet(config: Config) -> None:
    """llama.cpp's bitnet is that of the 3B models of 2024: SiLU, and an output layer that is the embedding."""
    if config.get("hidden_act", default="relu2") != "silu":
        raise CheckpointError(
            f"{config.ref}: llama.cpp's bitnet has SiLU, and this one has '{config.get('hidden_act', default='relu2')}'",
            "run it with transformers or bitnet.cpp",
        )
    if config.raw.get("quantization_config"):
        raise CheckpointError(
            f"{config.ref}: its weights are rounded to three values when it runs (quantization_config), and in GGUF "
            "they would not be",
            "take the GGUF that it is published with",
        )


# ------------------------------------------------------------------ Nemotron-H

_KINDS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
_MAMBA, _ATTENDS = ("mamba", "linear_attention"), ("attention", "full_attention")


def _blocks(config: Config) -> list[str]:
    """What each layer is: a mixer, attention, a feed-forward network or experts."""
    found = config.get("hybrid_override_pattern", "layers_block_type", "layer_types")
    if isinstance(found, str):
        found = [_KINDS.get(letter, letter) for letter in found]
    if not isinstance(found, list) or not found:
        raise CheckpointError(f"{config.ref}: its config does not say 'layers_block_type'", "complete it from the base")
    return [str(one) for one in found]


def _nemotron_kv(config: Config) -> list[int]:
    return [config.number("kv_heads") if kind in _ATTENDS else 0 for kind in _blocks(config)]


def _nemotron_widths(config: Config) -> list[int]:
    sparse = "moe" in _blocks(config)
    width = config.number("moe_intermediate_size" if sparse else "intermediate_size")
    return [width if kind == ("moe" if sparse else "mlp") else 0 for kind in _blocks(config)]


def _nemotron_back(values: Mapping[str, Any], config: Mapping[str, Any], base: Any) -> dict[str, Any]:
    kinds = []
    for kv, width in zip(values["attention.head_count_kv"], values["feed_forward_length"], strict=True):
        feed = "moe" if "expert_count" in values else "mlp"
        kinds.append("full_attention" if kv else feed if width else "linear_attention")
    heads = values["ssm.time_step_rank"]
    found = {
        "layers_block_type": kinds,
        "num_hidden_layers": None,
        "mamba_num_heads": heads,
        "mamba_head_dim": values["ssm.inner_size"] // heads,
        "n_groups": values["ssm.group_count"],
        "layer_norm_epsilon": values["attention.layer_norm_epsilon"],
        "use_conv_bias": "blk.0.ssm_conv1d.bias" in base,
        "use_mamba_kernels": False,
        "num_experts": None,
    }
    if "expert_count" not in values:
        width = max(values["feed_forward_length"])
        return {**found, "intermediate_size": width, "mlp_bias": any(n.endswith("ffn_up.bias") for n in base)}
    return {
        **found,
        "intermediate_size": None,
        "n_routed_experts": values["expert_count"],
        "topk_group": 1,
        "scoring_func": None,
        "moe_latent_size": values.get("moe_latent_size"),
    }


def _one_kind(config: Config) -> None:
    """llama.cpp tells a layer's kind by one number of heads and one width."""
    kinds = _blocks(config)
    if "moe" in kinds and "mlp" in kinds:
        raise CheckpointError(
            f"{config.ref}: llama.cpp's nemotron_h has experts or plain networks in its layers, and this one has both",
            "run it with transformers",
        )
    if int(config.get("n_group", default=1)) > 1 and int(config.get("topk_group", default=1)) < int(
        config.get("n_group")
    ):
        raise CheckpointError(f"{config.ref}: llama.cpp's nemotron_h chooses experts of all groups", "run it elsewhere")
    if config.get("mlp_hidden_act", default="relu2") != "relu2":
        raise CheckpointError(
            f"{config.ref}: llama.cpp's nemotron_h has a squared ReLU, and this one has "
            f"'{config.get('mlp_hidden_act')}'",
            "run it with transformers",
        )


def _nemotron() -> tuple[Rule, ...]:
    inner = (
        *blocks(
            attn_norm="norm",
            attn_q="mixer.q_proj",
            attn_k="mixer.k_proj",
            attn_v="mixer.v_proj",
            attn_output="mixer.o_proj",
            ffn_up="mixer.up_proj",
            ffn_down="mixer.down_proj",
            ffn_gate_inp="mixer.gate",
            ffn_up_shexp="mixer.shared_experts.up_proj",
            ffn_down_shexp="mixer.shared_experts.down_proj",
            ffn_latent_down="mixer.fc1_latent_proj",
            ffn_latent_up="mixer.fc2_latent_proj",
        ),
        *mamba("mixer.", first=False, groups="nemotron_groups"),
        block("mixer.gate.e_score_correction_bias", "exp_probs_b.bias"),
        block("mixer.gate.e_score_correction.bias", "exp_probs_b.bias", writes=False),
        block("mixer.experts.{e}.up_proj", "ffn_up_exps", ops=[Stack()]),
        block("mixer.experts.{e}.down_proj", "ffn_down_exps", ops=[Stack()]),
        block("mixer.experts.up_proj", "ffn_up_exps.weight", writes=False),
        block("mixer.experts.down_proj", "ffn_down_exps.weight", writes=False),
    )
    return (
        rule("embeddings", "token_embd"),
        rule("norm_f", "output_norm"),
        rule("lm_head", "output"),
        *(Rule(one.hf.replace("model.layers.", "layers."), one.gguf, one.ops, one.writes) for one in inner),
    )


_NEMOTRON_KEYS = (
    _LAYERS,
    Key("context_length", "context", field="max_position_embeddings"),
    Key("embedding_length", "hidden_size", needed=True),
    Key("attention.head_count", "num_attention_heads", needed=True),
    Key("attention.head_count_kv", _nemotron_kv),
    Key("attention.layer_norm_epsilon", ("layer_norm_epsilon", "rms_norm_eps"), 1e-5),
    Key("attention.layer_norm_rms_epsilon", ("layer_norm_epsilon", "rms_norm_eps"), 1e-5, field="layer_norm_epsilon"),
    VOCAB_SIZE,
    Key("attention.key_length", "head_dim", needed=True),
    Key("attention.value_length", "head_dim", needed=True),
    Key("feed_forward_length", _nemotron_widths),
    Key("ssm.conv_kernel", "conv_kernel", 4),
    Key("ssm.state_size", "ssm_state_size", needed=True),
    Key("ssm.group_count", "n_groups", needed=True),
    Key("ssm.inner_size", lambda c: c.number("mamba_num_heads") * c.number("mamba_head_dim")),
    Key("ssm.time_step_rank", "mamba_num_heads", needed=True),
    Key("rope.scaling.finetuned", lambda c: False),
)


def _dbrx_back(values: Mapping[str, Any], config: Mapping[str, Any], base: Any) -> dict[str, Any]:
    return {
        "attn_config": {
            "kv_n_heads": values["attention.head_count_kv"],
            "clip_qkv": values["attention.clamp_kqv"],
            "rope_theta": values["rope.freq_base"],
            "attn_pdrop": 0.0,
        },
        "ffn_config": {
            "ffn_hidden_size": values["feed_forward_length"],
            "moe_num_experts": values["expert_count"],
            "moe_top_k": values["expert_used_count"],
            "ffn_act_fn": {"name": "silu"},
        },
        **dict.fromkeys(("num_key_value_heads", "num_experts", "num_experts_per_tok", "intermediate_size")),
        "rope_parameters": None,
    }


def _dbrx(config: Config) -> None:
    part = config.get("ffn_config", default={})
    if part.get("moe_normalize_expert_weights", 1) != 1:
        raise CheckpointError(f"{config.ref}: llama.cpp's dbrx makes the weights of its experts add up to 1", "")
    if config.get("attn_config", default={}).get("clip_qkv") is None:
        raise CheckpointError(f"{config.ref}: llama.cpp's dbrx needs 'clip_qkv' in attn_config", "run it elsewhere")


def _bamba_back(values: Mapping[str, Any], config: Mapping[str, Any], base: Any) -> dict[str, Any]:
    heads = values["ssm.time_step_rank"]
    width = config["hidden_size"]
    return {
        "attn_layer_indices": [i for i, kv in enumerate(values["attention.head_count_kv"]) if kv],
        "mamba_d_head": values["ssm.inner_size"] // heads,
        "mamba_expand": values["ssm.inner_size"] // width,
        "mamba_n_groups": values["ssm.group_count"],
        "num_experts": None,
        "head_dim": None,
    }


SPECS = (
    ArchSpec(
        "apertus",
        ("ApertusForCausalLM",),
        "apertus",
        (
            *EMBEDDINGS,
            *blocks(attn_norm="attention_layernorm", ffn_norm="feedforward_layernorm"),
            *attention(),
            *QK_NORMS,
            *_UP_DOWN,
        ),
        (VOCAB_SIZE, ROPE_DIM),
        own_output=True,
        factors=(LLAMA3, *LONGROPE),
        scalars=(
            Scalars("model.layers.{i}.mlp.act_fn.alpha_n", "xielu.alpha_n", (1,)),
            Scalars("model.layers.{i}.mlp.act_fn.alpha_p", "xielu.alpha_p", (1,)),
            Scalars("model.layers.{i}.mlp.act_fn.beta", "xielu.beta"),
            Scalars("model.layers.{i}.mlp.act_fn.eps", "xielu.eps"),
        ),
    ),
    ArchSpec(
        "jais2",
        ("Jais2ForCausalLM",),
        "jais2",
        (*EMBEDDINGS, *NORMS, *attention(), *_UP_DOWN),
        (ROPE_DIM,),
    ),
    ArchSpec(
        "chatglm",
        ("GlmForCausalLM",),
        "glm",
        (*EMBEDDINGS, *NORMS, *attention(), *FUSED_MLP),
        (
            Key(
                "rope.dimension_count",
                lambda c: int(float(c.rope.get("partial_rotary_factor", 0.5)) * c.number("head_dim")),
            ),
        ),
    ),
    ArchSpec(
        "dbrx",
        ("DbrxForCausalLM",),
        "dbrx",
        (
            rule("transformer.wte", "token_embd"),
            rule("transformer.norm_f", "output_norm"),
            rule("lm_head", "output"),
            *(
                rule(f"transformer.blocks.{{i}}.{hf}", f"blk.{{i}}.{gguf}", ops=ops)
                for gguf, hf, ops in (
                    ("attn_norm", "norm_attn_norm.norm_1", ()),
                    ("attn_output_norm", "norm_attn_norm.norm_2", ()),
                    ("attn_qkv", "norm_attn_norm.attn.Wqkv", ()),
                    ("attn_output", "norm_attn_norm.attn.out_proj", ()),
                    ("ffn_gate_inp", "ffn.router.layer", ()),
                    ("ffn_gate_exps.weight", "ffn.experts.mlp.w1", (Unjoin("dbrx_experts"),)),
                    ("ffn_up_exps.weight", "ffn.experts.mlp.v1", (Unjoin("dbrx_experts"),)),
                    ("ffn_down_exps.weight", "ffn.experts.mlp.w2", (Unjoin("dbrx_experts"), Turn())),
                )
            ),
        ),
        (
            _LAYERS,
            Key("context_length", "max_seq_len", needed=True),
            Key("embedding_length", "d_model", needed=True),
            Key("feed_forward_length", part_of("ffn_config", "ffn_hidden_size")),
            Key("attention.head_count", "n_heads", needed=True),
            Key("attention.head_count_kv", part_of("attn_config", "kv_n_heads")),
            Key("rope.freq_base", lambda c: c.rope.get("rope_theta") or part_of("attn_config", "rope_theta")(c)),
            Key("attention.clamp_kqv", part_of("attn_config", "clip_qkv")),
            Key("expert_count", part_of("ffn_config", "moe_num_experts")),
            Key("expert_used_count", part_of("ffn_config", "moe_top_k")),
            constant("attention.layer_norm_epsilon", 1e-5),
        ),
        common=False,
        check=_dbrx,
        back=_dbrx_back,
    ),
    ArchSpec(
        "bitnet",
        ("BitNetForCausalLM", "BitnetForCausalLM"),
        "bitnet",
        (
            *EMBEDDINGS,
            *NORMS,
            *attention(),
            *MLP,
            *blocks(attn_sub_norm="self_attn.attn_sub_norm", ffn_sub_norm="mlp.ffn_sub_norm"),
            # The models of 2024 call them so.
            block("self_attn.inner_attn_ln", "attn_sub_norm", writes=False),
            block("mlp.ffn_layernorm", "ffn_sub_norm", writes=False),
        ),
        (
            VOCAB_SIZE,
            Key("rope.scaling.type", lambda c: None if kind_of(c.rope) in SCALED else "linear"),
            Key("rope.scaling.factor", lambda c: None if kind_of(c.rope) in SCALED else 1.0),
        ),
        tied=True,
        check=_plain_bitnet,
        back=lambda values, config, base: {
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            **(
                {"rope_parameters": {"rope_type": "default", "rope_theta": values.get("rope.freq_base", 10000.0)}}
                if values.get("rope.scaling.factor", 1.0) == 1.0
                else {}
            ),
        },
    ),
    ArchSpec(
        "granitehybrid",
        ("BambaForCausalLM",),
        "bamba",
        (
            rule("model.embed_tokens", "token_embd"),
            rule("model.final_layernorm", "output_norm"),
            rule("lm_head", "output"),
            *blocks(attn_norm="input_layernorm", ffn_norm="pre_ff_layernorm"),
            # Rotary pairs are those of the part of a head that is rotated.
            block("self_attn.q_proj", "attn_q", ops=[Interleave("heads", "rotary_dim")]),
            block("self_attn.k_proj", "attn_k", ops=[Interleave("kv_heads", "rotary_dim")]),
            *blocks(attn_v="self_attn.v_proj", attn_output="self_attn.o_proj"),
            *blocks(
                ffn_gate="feed_forward.gate_proj", ffn_up="feed_forward.up_proj", ffn_down="feed_forward.down_proj"
            ),
            *mamba("mamba.", first=False),
        ),
        (
            VOCAB_SIZE,
            PARTIAL_ROPE,
            Key("ssm.conv_kernel", "mamba_d_conv", 4),
            Key("ssm.state_size", "mamba_d_state", needed=True),
            Key("ssm.group_count", lambda c: c.number("ssm_groups")),
            Key("ssm.inner_size", lambda c: c.number("ssm_inner")),
            Key("ssm.time_step_rank", "mamba_n_heads", needed=True),
            Key(
                "attention.head_count_kv",
                lambda c: [
                    c.number("kv_heads") if i in (c.get("attn_layer_indices") or ()) else 0
                    for i in range(c.number("layers"))
                ],
            ),
            Key("rope.scaling.finetuned", lambda c: True),
        ),
        when=lambda base: (
            base.header.get("granitehybrid.rope.scaling.finetuned") is True
            and "blk.0.ffn_gate.weight" in base
            and f"{base.arch}.embedding_scale" not in base.header.keys
        ),
        experts=False,
        back=_bamba_back,
    ),
    ArchSpec(
        "nemotron_h",
        ("NemotronHForCausalLM",),
        "nemotron_h",
        _nemotron(),
        _NEMOTRON_KEYS,
        common=False,
        prefixes=("backbone.", "model."),
        root="backbone.",
        drops=(r"^mtp\.",),
        check=_one_kind,
        variant=lambda c: "nemotron_h_moe" if "moe" in _blocks(c) else None,
        uneven=True,
        back=_nemotron_back,
    ),
    ArchSpec(
        "nemotron_h_moe",
        (),
        "nemotron_h_moe",
        _nemotron(),
        (
            *_NEMOTRON_KEYS,
            Key("expert_used_count", "num_experts_per_tok", needed=True),
            Key("expert_feed_forward_length", "moe_intermediate_size", needed=True),
            Key("expert_shared_feed_forward_length", "moe_shared_expert_intermediate_size", needed=True),
            Key("expert_count", "n_routed_experts", needed=True),
            Key("expert_shared_count", "n_shared_experts", needed=True),
            Key("expert_weights_norm", "norm_topk_prob", needed=True),
            Key("expert_weights_scale", "routed_scaling_factor", needed=True),
            Key("expert_group_count", "n_group", needed=True),
            Key("moe_latent_size", "moe_latent_size"),
        ),
        common=False,
        prefixes=("backbone.", "model."),
        root="backbone.",
        drops=(r"^mtp\.",),
        check=_one_kind,
        uneven=True,
        defaults={"model_type": "nemotron_h", "architectures": ["NemotronHForCausalLM"]},
        back=_nemotron_back,
    ),
)
