"""Rows: T5, mT5 and UMT5, whose decoder attends to what an encoder made of the prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapterkit.errors import CheckpointError
from adapterkit.gguf.arch.config import Config
from adapterkit.gguf.arch.ops import Copies, Each, Scale
from adapterkit.gguf.arch.spec import ArchSpec, Key, Rule, rule

if TYPE_CHECKING:
    from collections.abc import Mapping

_ATTENTION = {"q": "q", "k": "k", "v": "v", "o": "o", "relative_attention_bias": "rel_b"}


def _part(side: str, gguf: str, cross: bool, gated: bool) -> tuple[Rule, ...]:
    """The layers of the encoder or of the decoder."""
    names = {f"layer.0.SelfAttention.{hf}": f"attn_{one}" for hf, one in _ATTENTION.items()}
    names["layer.0.layer_norm"] = "attn_norm"
    feed = "layer.1."
    if cross:
        names |= {f"layer.1.EncDecAttention.{hf}": f"cross_attn_{one}" for hf, one in _ATTENTION.items()}
        names["layer.1.layer_norm"] = "cross_attn_norm"
        feed = "layer.2."
    dense = f"{feed}DenseReluDense."
    names |= {f"{feed}layer_norm": "ffn_norm", f"{dense}wo": "ffn_down"}
    names |= {f"{dense}wi_0": "ffn_gate", f"{dense}wi_1": "ffn_up"} if gated else {f"{dense}wi": "ffn_up"}
    return (
        rule(f"{side}.final_layer_norm", f"{gguf}.output_norm"),
        *(rule(f"{side}.block.{{i}}.{hf}", f"{gguf}.blk.{{i}}.{one}") for hf, one in names.items()),
    )


def _gated(config: Config) -> bool:
    """Whether the feed-forward network has a gate.

    Raises:
        CheckpointError: an activation that llama.cpp's t5 has not.
    """
    kind = str(config.get("feed_forward_proj", default="relu"))
    if kind not in ("relu", "gated-gelu"):
        raise CheckpointError(
            f"{config.ref}: llama.cpp's t5 has ReLU or a gated GELU, and this one '{kind}'", "run it with transformers"
        )
    return kind != "relu"


def _scaled(config: Config) -> bool:
    """Whether the decoder's output is multiplied with the root of one over its width before the embedding is applied."""
    if config.model_type == "mt5":
        return False
    found = config.get("scale_decoder_outputs")
    if found is not None and config.model_type != "umt5":
        return bool(found)
    return config.get("tie_word_embeddings", default=True) is not False


def _which(config: Config) -> str:
    return f"t5_{'gated' if _gated(config) else 'relu'}_{'scaled' if _scaled(config) else 'apart'}"


def _check(config: Config) -> None:
    _gated(config)
    layers = config.number("num_layers")
    if int(config.get("num_decoder_layers", default=layers)) > layers:
        raise CheckpointError(
            f"{config.ref}: llama.cpp's t5 has no more layers in its decoder than in its encoder (num_decoder_layers)",
            "run it with transformers",
        )


def _back(values: Mapping[str, Any], config: Mapping[str, Any], base: Any) -> dict[str, Any]:
    own = "dec.blk.1.attn_rel_b.weight" in base
    scaled = str(config["model_type"]).endswith("scaled")
    names = ("umt5", "UMT5ForConditionalGeneration") if own else ("t5", "T5ForConditionalGeneration")
    return {
        "model_type": names[0],
        "architectures": [names[1]],
        "feed_forward_proj": "gated-gelu" if "gated" in str(config["model_type"]) else "relu",
        "num_layers": values["block_count"],
        "tie_word_embeddings": scaled,
        "scale_decoder_outputs": None if own else scaled,
        "is_encoder_decoder": True,
        **dict.fromkeys(
            ("hidden_size", "intermediate_size", "num_attention_heads", "head_dim", "num_hidden_layers", "rms_norm_eps")
        ),
    }


_KEYS = (
    Key("context_length", "n_positions", 512),
    Key("embedding_length", "d_model", needed=True),
    Key("feed_forward_length", "d_ff", needed=True),
    Key("block_count", lambda c: c.number("num_layers"), field="num_layers"),
    Key(
        "decoder_block_count",
        lambda c: c.get("num_decoder_layers", default=c.number("num_layers")),
        field="num_decoder_layers",
    ),
    Key("attention.head_count", "num_heads", needed=True),
    Key("attention.key_length", "d_kv", needed=True),
    Key("attention.value_length", "d_kv", needed=True),
    Key("attention.layer_norm_epsilon", "layer_norm_epsilon", needed=True),
    Key("attention.relative_buckets_count", "relative_attention_num_buckets", needed=True),
    Key("attention.layer_norm_rms_epsilon", "layer_norm_epsilon", needed=True),
    Key("decoder_start_token_id", "decoder_start_token_id", 0),
)


def _row(gated: bool, scaled: bool) -> ArchSpec:
    name = f"t5_{'gated' if gated else 'relu'}_{'scaled' if scaled else 'apart'}"
    # llama.cpp does not scale the decoder's output, so the table that it is multiplied with is.
    table = (
        rule(
            "shared.weight",
            "token_embd.weight",
            "output.weight",
            ops=[Copies(2), Each((None, Scale(("one_over_root_width",))))],
        )
        if scaled
        else rule("shared", "token_embd")
    )
    gate = "enc.blk.0.ffn_gate.weight"
    return ArchSpec(
        "t5",
        (),
        name,
        (
            table,
            *(() if scaled else (rule("lm_head", "output"),)),
            *_part("encoder", "enc", False, gated),
            *_part("decoder", "dec", True, gated),
        ),
        _KEYS,
        common=False,
        drops=(r"^(encoder|decoder)\.embed_tokens\.",),
        needs=("token_embd.weight", "enc.output_norm.weight", "dec.output_norm.weight"),
        uneven=True,
        vocab="unigram",
        check=_check,
        when=lambda base: (gate in base) == gated and _is_scaled(base) == scaled,
        back=_back,
        output_apart=scaled,
    )


def _is_scaled(base: Any) -> bool:
    """Whether the output layer of a file is its embedding times the root of one over its width."""
    table, output = base.get("token_embd.weight"), base.get("output.weight")
    if table is None or output is None or table.shape != output.shape:
        return False
    from adapterkit.gguf.tensors import decoded

    few = min(table.numel, 4096)
    one, other = decoded(table).read(0, few).float(), decoded(output).read(0, few).float()
    factor = table.shape[1] ** -0.5
    return bool((one * factor - other).abs().max() <= 0.1 * (one * factor).abs().max())


_ROWS = tuple(_row(gated, scaled) for gated in (False, True) for scaled in (True, False))
SPECS = (
    ArchSpec(
        "t5",
        (
            "T5ForConditionalGeneration",
            "T5WithLMHeadModel",
            "MT5ForConditionalGeneration",
            "UMT5ForConditionalGeneration",
            "UMT5Model",
        ),
        "t5",
        _ROWS[0].rules,
        _KEYS,
        types=("mt5", "umt5"),
        common=False,
        variant=_which,
        when=lambda base: False,
    ),
    *_ROWS,
)
