"""Rules and keys that rows of several architectures use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapterkit.errors import CheckpointError
from adapterkit.gguf.arch.config import Config, _head_dim
from adapterkit.gguf.arch.hyper import rotary_dim
from adapterkit.gguf.arch.ops import Interleave, Split, Stack
from adapterkit.gguf.arch.rope import DIVISORS, LONG, SHORT, divisors, kind_of, long_attention
from adapterkit.gguf.arch.spec import ComputedTensor, Key, Rule, block, blocks, rule

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from adapterkit.gguf.arch.ops import Op

EMBEDDINGS = (
    rule("model.embed_tokens", "token_embd"),
    rule("model.norm", "output_norm"),
    rule("lm_head", "output"),
)
NORMS = blocks(attn_norm="input_layernorm", ffn_norm="post_attention_layernorm")
# Norms before and after attention and feed-forward.
FOUR_NORMS = blocks(
    attn_norm="input_layernorm",
    post_attention_norm="post_attention_layernorm",
    ffn_norm="pre_feedforward_layernorm",
    post_ffw_norm="post_feedforward_layernorm",
)
AFTER_NORMS = blocks(post_attention_norm="post_attention_layernorm", post_ffw_norm="post_feedforward_layernorm")
QK_NORMS = blocks(attn_q_norm="self_attn.q_norm", attn_k_norm="self_attn.k_norm")
MLP = blocks(ffn_gate="mlp.gate_proj", ffn_up="mlp.up_proj", ffn_down="mlp.down_proj")
FUSED_MLP = blocks(ffn_up="mlp.gate_up_proj", ffn_down="mlp.down_proj")


def attention(*, interleave: bool = False, where: str = "self_attn.", out: str = "o_proj") -> tuple[Rule, ...]:
    """q, k, v and the projection after them; ``interleave`` for ggml's normal order of rotary pairs."""
    q: Sequence[Op] = [Interleave("heads")] if interleave else ()
    k: Sequence[Op] = [Interleave("kv_heads")] if interleave else ()
    return (
        block(f"{where}q_proj", "attn_q", ops=q),
        block(f"{where}k_proj", "attn_k", ops=k),
        block(f"{where}v_proj", "attn_v"),
        block(f"{where}{out}", "attn_output"),
    )


def experts(
    where: str = "mlp.", *, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj", router: str = "gate"
) -> tuple[Rule, ...]:
    """Experts as matrices of their own, or in one tensor each of ``gate_up_proj`` and ``down_proj``."""
    return (
        block(f"{where}{router}", "ffn_gate_inp"),
        block(f"{where}experts.{{e}}.{gate}", "ffn_gate_exps", ops=[Stack()]),
        block(f"{where}experts.{{e}}.{up}", "ffn_up_exps", ops=[Stack()]),
        block(f"{where}experts.{{e}}.{down}", "ffn_down_exps", ops=[Stack()]),
        block(
            f"{where}experts.gate_up_proj", "ffn_gate_exps.weight", "ffn_up_exps.weight", ops=[Split()], writes=False
        ),
        block(f"{where}experts.down_proj", "ffn_down_exps.weight", writes=False),
    )


def shared_expert(where: str, plain: bool = True) -> tuple[Rule, ...]:
    """An expert that every token passes; ``plain``: without a gate of its own."""
    found = blocks(
        ffn_gate_shexp=f"{where}.gate_proj", ffn_up_shexp=f"{where}.up_proj", ffn_down_shexp=f"{where}.down_proj"
    )
    return found if plain else (*found, block(f"{where}_gate", "ffn_gate_inp_shexp"))


NEEDS_ATTENTION = ("token_embd.weight", "output_norm.weight")

VOCAB_SIZE = Key("vocab_size", "vocab_size", needed=True)
ROPE_DIM = Key("rope.dimension_count", lambda c: _head_dim(c))
PARTIAL_ROPE = Key("rope.dimension_count", lambda c: rotary_dim(c))
# llama.cpp's converter writes this word for some architectures where nothing is scaled.
NO_SCALING = Key("rope.scaling.type", lambda c: "none" if kind_of(c.rope) in ("", "default") else None)
FEED_FORWARD = Key(
    "feed_forward_length",
    lambda c: c.get("intermediate_size", "n_inner", "ffn_hidden_size", default=4 * c.number("hidden")),
    field="intermediate_size",
)
EXPERT_WIDTH = Key("expert_feed_forward_length", "moe_intermediate_size")


def _deepstack(config: Config) -> int:
    """Layers that take what a vision part saw; a text part that came from a GGUF file says their number itself."""
    found = config.get("n_deepstack_layers")
    return len(config.raw.get("vision_config", {}).get("deepstack_visual_indexes", ())) if found is None else int(found)


DEEPSTACK = Key("n_deepstack_layers", _deepstack, field="n_deepstack_layers")


def of_sections(config: Config, other: str) -> str | None:
    """The row of a text part whose rotary dimensions have sections."""
    return other if isinstance(config.rope_by_kind.get("mrope_section"), list) else None


RANK_YES, RANK_NO = "rank_yes_id", "rank_no_id"
"""Fields that stand in a config while a reranker is written: the tokens whose scores are compared."""


def reranks(config: Config) -> str | None:
    """The row that writes a qwen3 as a reranker, where that was asked (`adapterkit.gguf.arch.rerank`)."""
    if config.raw.get(RANK_YES) is None:
        return None
    return "qwen3_reranker_tied" if config.get("tie_word_embeddings", default=False) else "qwen3_reranker"


def text_of(model_type: str, cls: str) -> Callable[[Mapping[str, Any], Mapping[str, Any], Any], dict[str, Any]]:
    """A config of the class that computes the same of text as the text part of a model that sees."""

    def back(values: Mapping[str, Any], config: Mapping[str, Any], base: Any) -> dict[str, Any]:
        sections = [one for one in values.get("rope.dimension_sections", ()) if one]
        rope = {**config.get("rope_parameters", {}), "mrope_section": sections}
        layers = values.get("n_deepstack_layers")
        return {"model_type": model_type, "architectures": [cls], "rope_parameters": rope, "n_deepstack_layers": layers}

    return back


def constant(name: str, value: Any) -> Key:
    """A key that does not depend on the config."""
    return Key(name, lambda config: value)


def window_pattern(config: Config) -> list[bool] | None:
    """Layers with a sliding window."""
    kinds = config.get("layer_types")
    return [kind == "sliding_attention" for kind in kinds] if isinstance(kinds, list) else None


def unusual_pattern(every: int) -> Key:
    """Layers with a window, where these are not all but each ``every``-th, which llama.cpp has by itself."""

    def find(config: Config) -> list[bool] | None:
        layers = config.number("layers")
        found, said = window_pattern(config), config.get("sliding_window_pattern")
        if found is None and isinstance(said, int) and said > 1:
            found = [(i + 1) % said != 0 for i in range(layers)]
        return None if found == [(i + 1) % every != 0 for i in range(layers)] else found

    return Key("attention.sliding_window_pattern", find)


def _divisors(config: Config) -> list[float] | None:
    return divisors(config, _head_dim(config))


LLAMA3 = ComputedTensor(DIVISORS, _divisors, True)


def _long(name: str) -> Any:
    def make(config: Config) -> list[float] | None:
        rope = config.rope
        found = rope.get(f"{name}_factor")
        other = rope.get("long_factor" if name == "short" else "short_factor")
        if not found and not other:
            return None
        half = (config.number("qk_rope_head_dim") if config.get("qk_rope_head_dim") else rotary_dim(config)) // 2
        if not isinstance(found, list) or len(found) != half:
            raise CheckpointError(
                f"{config.ref}: 'long_factor' and 'short_factor' must be {half} numbers each",
                "complete its config.json",
            )
        return [float(one) for one in found]

    return make


LONGROPE = (ComputedTensor(LONG, _long("long"), True), ComputedTensor(SHORT, _long("short"), True))
LONG_ATTENTION = Key("rope.scaling.attn_factor", long_attention)
# For architectures whose runtime loads all three tensors.
ROPE_TENSORS = (LLAMA3, *LONGROPE)
