"""Rows: RWKV 6 and 7, as their own code and flash-linear-attention store them, and RWKV 7 in the place of Qwen's attention.

Names and keys are those of llama.cpp's converter.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from adapterkit.gguf.arch.builtin import Fixed
from adapterkit.gguf.arch.coded import LAYERS, SILU
from adapterkit.gguf.arch.config import Config
from adapterkit.gguf.arch.ops import Copies, Each, Seen, Stack, Turn
from adapterkit.gguf.arch.shared import EMBEDDINGS, MLP, NORMS, constant
from adapterkit.gguf.arch.spec import ArchSpec, Key, Rule, named_items, rule, tree

if TYPE_CHECKING:
    from collections.abc import Mapping

_CONTEXT = constant("context_length", 1048576)  # there is no limit
_NO_HEADS = constant("attention.head_count", 0)
_VECTOR = Seen(("hidden",), (1, 1, "hidden"))


# ------------------------------------------------------------------ RWKV 6


def _rwkv6_extra(small: int, large: int) -> Any:
    """The widths of its low-rank parts, which its code has built in."""
    return lambda config: large if config.number("hidden") == 4096 else small


def _rwkv6_width(config: Config) -> int:
    found = config.get("intermediate_size")
    return int(found) if found is not None else int(config.number("hidden") * 3.5) // 32 * 32


def _rwkv6_back(values: Mapping[str, Any], config: Mapping[str, Any], base: Any) -> dict[str, Any]:
    return {
        "head_size": values["wkv.head_size"],
        "rescale_every": 0,
        "attention_hidden_size": values["embedding_length"],
        "tie_word_embeddings": False,
        **dict.fromkeys(("num_attention_heads", "rope_parameters", "max_position_embeddings")),
    }


_RWKV6 = (
    rule("rwkv.embeddings", "token_embd"),
    rule("rwkv.blocks.0.pre_ln", "token_embd_norm"),
    rule("rwkv.ln_out", "output_norm"),
    rule("head", "output"),
    *tree(
        "rwkv.blocks.{i}.",
        {
            "attn_norm": "ln1",
            "attn_norm_2": "ln2",
            "time_mix_lerp_x.weight": "attention.time_maa_x",
            "time_mix_w1.weight": "attention.time_maa_w1",
            "time_mix_w2.weight": "attention.time_maa_w2",
            "time_mix_decay.weight": "attention.time_decay",
            "time_mix_decay_w1.weight": "attention.time_decay_w1",
            "time_mix_decay_w2.weight": "attention.time_decay_w2",
            "time_mix_first.weight": "attention.time_faaaa",
            "time_mix_receptance": "attention.receptance",
            "time_mix_key": "attention.key",
            "time_mix_value": "attention.value",
            "time_mix_gate": "attention.gate",
            "time_mix_output": "attention.output",
            "time_mix_ln": "attention.ln_x",
            "channel_mix_lerp_k.weight": "feed_forward.time_maa_k",
            "channel_mix_lerp_r.weight": "feed_forward.time_maa_r",
            "channel_mix_key": "feed_forward.key",
            "channel_mix_receptance": "feed_forward.receptance",
            "channel_mix_value": "feed_forward.value",
        },
        {
            **dict.fromkeys(
                (
                    "time_mix_lerp_x.weight",
                    "time_mix_decay.weight",
                    "channel_mix_lerp_k.weight",
                    "channel_mix_lerp_r.weight",
                ),
                (_VECTOR,),
            ),
            **dict.fromkeys(
                (
                    "time_mix_w1.weight",
                    "time_mix_w2.weight",
                    "time_mix_decay_w1.weight",
                    "time_mix_decay_w2.weight",
                ),
                (Turn(),),
            ),
        },
    ),
    named_items(
        "rwkv.blocks.{i}.attention.time_maa_",
        ("w", "k", "v", "r", "g"),
        "blk.{i}.time_mix_lerp_fused.weight",
        Stack(),
    ),
)


# ------------------------------------------------------------------ RWKV 7


def _rank(field: str, power: float, times: float) -> Any:
    """The rank of a low-rank part, where its config leaves it to its code."""

    def find(config: Config) -> int:
        found = config.get(*(field, _OLDER_RANKS[field]))
        return int(found) if found is not None else max(1, round(config.number("hidden") ** power * times / 32)) * 32

    return find


_OLDER_RANKS = {
    "decay_low_rank_dim": "lora_rank_decay",
    "a_low_rank_dim": "lora_rank_iclr",
    "v_low_rank_dim": "lora_rank_value_residual_mix",
    "gate_low_rank_dim": "lora_rank_gate",
}
_RANKS = (
    Key("attention.decay_lora_rank", _rank("decay_low_rank_dim", 0.5, 1.8), field="decay_low_rank_dim"),
    Key("attention.iclr_lora_rank", _rank("a_low_rank_dim", 0.5, 1.8), field="a_low_rank_dim"),
    Key("attention.value_residual_mix_lora_rank", _rank("v_low_rank_dim", 0.5, 1.3), field="v_low_rank_dim"),
    Key("attention.gate_lora_rank", _rank("gate_low_rank_dim", 0.8, 0.6), field="gate_low_rank_dim"),
)


def _low_rank(at: str, name: str, gguf: str, *, bias: bool = True, both: str = "") -> tuple[Rule, ...]:
    """Two matrices and what is added: ``w1``, ``w2`` and ``w0``; ``both``: of the first layer twice, as `both` too."""
    found = []
    stored = (("lora.0.weight", "1"), ("lora.2.weight", "2"), *((("lora.2.bias", "0"),) if bias else ()))
    for end, digit in stored:
        hf, into = f"{at}{name}_lora.{end}", f"blk.{{i}}.time_mix_{gguf}{digit}.weight"
        if both:
            twice = (into.replace("{i}", "0"), f"blk.0.time_mix_{both}{digit}.weight")
            found.append(Rule(hf.replace("{i}", "0"), twice, (Copies(2),), layers=lambda c, layer: layer == 0))
        found.append(Rule(hf, (into,), layers=(lambda c, layer: layer > 0) if both else None))
    return tuple(found)


def _rwkv7_back(values: Mapping[str, Any], config: Mapping[str, Any], base: Any) -> dict[str, Any]:
    return {
        "head_dim": values["wkv.head_size"],
        "norm_eps": values["attention.layer_norm_epsilon"],
        "layer_norm_eps": None,
        "hidden_act": "sqrelu",
        "norm_first": True,
        "tie_word_embeddings": False,
        **dict.fromkeys(("num_attention_heads", "rope_parameters", "max_position_embeddings")),
    }


def _no_value_mix(at: str) -> tuple[Rule, ...]:
    """The first layer mixes no earlier values; some files have these tensors all the same."""
    return tuple(Rule(f"{at.replace('{i}', '0')}v_lora.{end}", ()) for end in ("lora.0", "lora.2"))


_LERPS = ("r", "w", "k", "v", "a", "g")
_AT = "model.layers.{i}.attn."
_RWKV7 = (
    rule("model.embeddings", "token_embd"),
    rule("model.layers.0.pre_norm", "token_embd_norm"),
    rule("model.norm", "output_norm"),
    rule("lm_head", "output"),
    *_no_value_mix(_AT),
    *_low_rank(_AT, "w", "w"),
    *_low_rank(_AT, "a", "a", both="v"),
    *_low_rank(_AT, "v", "v"),
    *_low_rank(_AT, "g", "g", bias=False),
    named_items(f"{_AT}x_", _LERPS, "blk.{i}.time_mix_lerp_fused.weight", Stack()),
    replace(
        rule(f"{_AT}x_x", "blk.{i}.time_mix_lerp_fused.weight", ops=[Seen((6, 1, 1, "hidden"), (6, "hidden"))]),
        writes=False,
    ),
    *tree(
        "model.layers.{i}.",
        {
            "attn_norm": "attn_norm",
            "attn_norm_2": "ffn_norm",
            "time_mix_k_k.weight": "attn.k_k",
            "time_mix_k_a.weight": "attn.k_a",
            "time_mix_r_k.weight": "attn.r_k",
            "time_mix_receptance": "attn.r_proj",
            "time_mix_key": "attn.k_proj",
            "time_mix_value": "attn.v_proj",
            "time_mix_output": "attn.o_proj",
            "time_mix_ln": "attn.g_norm",
            "channel_mix_lerp_k.weight": "ffn.x_k",
            "channel_mix_key": "ffn.key",
            "channel_mix_value": "ffn.value",
        },
        {"time_mix_r_k.weight": [Seen(("hidden",), ("rwkv_heads", "head_dim"))]},
    ),
)


# ------------------------------------------------------------------ RWKV 7 in the place of Qwen's attention

_MIX = "model.layers.{i}.self_attn.time_mixer."


def _mixed(name: str, gguf: str, both: str = "") -> tuple[Rule, ...]:
    """A low-rank part whose matrices stand on their side; ``both`` as in `_low_rank`."""
    found = []
    for digit, op in (("0", _VECTOR), ("1", Turn()), ("2", Turn())):
        hf, into = f"{_MIX}{name}{digit}", f"blk.{{i}}.time_mix_{gguf}{digit}.weight"
        if both:
            twice = (into.replace("{i}", "0"), f"blk.0.time_mix_{both}{digit}.weight")
            ops = (Copies(2), Each((op, op)))
            found.append(Rule(hf.replace("{i}", "0"), twice, ops, layers=lambda c, layer: layer == 0))
        found.append(Rule(hf, (into,), (op,), layers=(lambda c, layer: layer > 0) if both else None))
    return tuple(found)


def _lerps(config: Config) -> bool:
    return bool(config.get("wkv_has_gate", default=True))


def _hybrid(model_type: str, items: str, gate: tuple[Rule, ...], classes: tuple[str, ...], **more: Any) -> ArchSpec:
    return ArchSpec(
        "arwkv7",
        classes,
        model_type,
        (
            *EMBEDDINGS,
            *NORMS,
            *MLP,
            *(Rule(f"{_MIX.replace('{i}', '0')}v{digit}", ()) for digit in "012"),
            *_mixed("w", "w"),
            *_mixed("a", "a", both="v"),
            *_mixed("v", "v"),
            *gate,
            named_items(f"{_MIX}x_", tuple(items), "blk.{i}.time_mix_lerp_fused.weight", Stack()),
            *tree(
                _MIX,
                {
                    "time_mix_k_k.weight": "k_k",
                    "time_mix_k_a.weight": "k_a",
                    "time_mix_r_k.weight": "r_k",
                    "time_mix_receptance": "receptance",
                    "time_mix_key": "key",
                    "time_mix_value": "value",
                    "time_mix_output": "output",
                    "time_mix_ln": "ln_x",
                },
                {
                    "time_mix_k_k.weight": [_VECTOR],
                    "time_mix_k_a.weight": [_VECTOR],
                    "time_mix_r_k.weight": [Seen(("hidden",), ("rwkv_heads", "head_size"))],
                },
            ),
        ),
        (
            _CONTEXT,
            Key("embedding_length", "hidden_size", needed=True),
            LAYERS,
            Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", needed=True),
            Key("wkv.head_size", "head_size", needed=True),
            # Ranks that its code has built in.
            constant("attention.decay_lora_rank", 64),
            constant("attention.iclr_lora_rank", 64),
            constant("attention.value_residual_mix_lora_rank", 32),
            constant("attention.gate_lora_rank", 128 if gate else 0),
            Key("feed_forward_length", "intermediate_size", needed=True),
            constant("token_shift_count", 1),
            _NO_HEADS,
        ),
        common=False,
        own_output=True,
        uneven=True,
        fixed=(Fixed("wkv_version", 7, "has the seventh version in this architecture"), SILU),
        back=lambda values, config, base: {
            "model_type": "rwkv_hybrid",
            "architectures": ["RwkvHybridForCausalLM"],
            "wkv_version": 7,
            "wkv_has_gate": bool(gate),
            "tie_word_embeddings": False,
            **dict.fromkeys(("num_attention_heads", "rope_parameters", "max_position_embeddings")),
        },
        **more,
    )


_GATE = tuple(Rule(f"{_MIX}g{digit}", (f"blk.{{i}}.time_mix_g{digit}.weight",), (Turn(),)) for digit in "12")


SPECS = (
    ArchSpec(
        "rwkv6",
        ("Rwkv6ForCausalLM",),
        "rwkv6",
        _RWKV6,
        (
            _CONTEXT,
            Key("embedding_length", "hidden_size", needed=True),
            LAYERS,
            Key("attention.layer_norm_epsilon", "layer_norm_epsilon", needed=True),
            # Halving is for half precision; the weights here are as they are stored, and nothing is halved.
            constant("rescale_every_n_layers", 0),
            Key("wkv.head_size", "head_size", needed=True),
            Key("time_mix_extra_dim", _rwkv6_extra(32, 64)),
            Key("time_decay_extra_dim", _rwkv6_extra(64, 128)),
            Key("feed_forward_length", _rwkv6_width, field="intermediate_size"),
            _NO_HEADS,
        ),
        common=False,
        own_output=True,
        vocab="world",
        back=_rwkv6_back,
    ),
    ArchSpec(
        "rwkv7",
        ("RWKV7ForCausalLM", "Rwkv7ForCausalLM"),
        "rwkv7",
        _RWKV7,
        (
            _CONTEXT,
            Key("embedding_length", "hidden_size", needed=True),
            LAYERS,
            Key("attention.layer_norm_epsilon", ("norm_eps", "layer_norm_epsilon"), needed=True),
            Key("wkv.head_size", ("head_dim", "head_size"), needed=True),
            *_RANKS,
            Key(
                "feed_forward_length",
                lambda c: int(c.get("intermediate_size", default=4 * c.number("hidden"))),
                field="intermediate_size",
            ),
            _NO_HEADS,
        ),
        common=False,
        own_output=True,
        uneven=True,
        vocab="world",
        fixed=(Fixed("hidden_act", "sqrelu", "computes a squared ReLU in this architecture"),),
        back=_rwkv7_back,
    ),
    _hybrid(
        "rwkv_hybrid",
        "rwkvag",
        _GATE,
        ("RwkvHybridForCausalLM",),
        variant=lambda c: None if _lerps(c) else "rwkv_hybrid_plain",
        when=lambda base: "blk.0.time_mix_g1.weight" in base,
    ),
    _hybrid("rwkv_hybrid_plain", "rwkva", (), (), when=lambda base: "blk.0.time_mix_g1.weight" not in base),
)
