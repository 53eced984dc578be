"""Which modules bitsandbytes quantizes when transformers loads a model for training, from parameter names alone.

transformers replaces modules that are exactly ``nn.Linear`` or ``Conv1D``, but not the output layer, nor what a model
class keeps in float32, nor what the user listed. Embeddings, routers of a class of their own, stacked experts and the
projections of ``nn.MultiheadAttention`` stay as they are. The tables say where a two-dimensional ``.weight`` is not a
linear layer; ``bench/proofs/linear.py`` compares them with every module tree that the installed transformers builds.

Source: transformers 5.23, ``integrations/bitsandbytes.py`` (`replace_with_bnb_linear`), ``quantizers/base.py``
(`get_keys_to_not_convert`), ``quantizers/quantizers_utils.py`` (`should_convert_module`). Releases 4.x also replaced
routers, and the experts that were single modules then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import regex

from adapterkit.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

# Last words of modules that hold a matrix and are not linear layers, beside everything that is called an embedding.
# fmt: off
TABLES = frozenset({
    "audio_bos_eos_token", "bias_values", "codebook", "freq_emb", "gate", "hq_token", "iou_token", "k_norm", "mask_tokens",
    "o_a_proj", "obj_score_token", "pe_k", "pos_emb", "presence_token", "q_norm", "queries_features", "query_feat",
    "query_1024_resolution", "query_768_resolution", "rel_pos_emb", "relative_attention_bias", "router", "segment_emb",
    "shared", "w", "wpe", "wte",
})
# Linear layers in whose name an embedding occurs.
NAMED_SO = frozenset({
    "patch_embedding_projection", "token_embedding_projection", "vision_embed_tokens", "altup_unembed_projections",
    "relative_pos_embeddings", "embedding_hidden_mapping_in", "patch_embedding", "embedding_projection", "patch_embed",
    "inputs_embeds_projector", "embed_out", "embed_return", "embed_state", "embed_action", "box_linear_embeddings",
    "class_embed", "entity_embedding_dense", "enc_out_class_embed", "bbox_embed", "xpath_unitseq2_embeddings",
    "embedding_transformation",
    "predictor_embeddings",
})
# Of denoisers, whose linear layers are called `context_embedder`, `time_embed.0` or `attn.gate`, what is a table all the same,
# the text encoders in one file with them included.
DENOISERS_TABLES = frozenset({
    "class_embedding", "cond_type_embed", "embed_tokens", "embedding_table", "lyric_embs", "position_embedding",
    "relative_attention_bias", "shared", "token_embedding",
})
# fmt: on
GATES = (".router.gate", ".gateway.gate")
HEADS = regex.compile(
    r"(?:.*\.)?(?:lm_head(?:\.decoder|\.out_proj)?|lm_heads\.\d+|generator_lm_head|audio_lm_head|embed_out"
    r"|output_projection|lm_loss|pred_layer\.proj|predictions\.decoder|score|qa_outputs)|classifier(?:\.out_proj)?"
)
HEADS_OF = {
    "git": ("output",),
    "modernbert-decoder": ("decoder",),
    "rwkv": ("head",),
    "dia": ("logits_dense",),
    **dict.fromkeys(("whisper", "cohere_asr", "moonshine_streaming"), ("proj_out",)),
    **dict.fromkeys(
        ("altclip", "blip", "chinese_clip", "clip", "clipseg", "aimv2", "metaclip_2", "owlv2", "owlvit"),
        ("text_projection",),
    ),
}
# Classes of their own that inherit from nn.Linear.
SUBCLASSED = {
    "falcon": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    "ibert": ("query", "key", "value", "dense"),
}
# _keep_in_fp32_modules of the model classes, by model type.
INDEXER = ("indexer.weights_proj",)
KEPT = {
    **dict.fromkeys(("t5", "mt5", "umt5", "udop", "pop2piano"), ("wo",)),
    **dict.fromkeys(("axk2", "deepseek_v32", "glm_moe_dsa", "mistral_large4", "mistral_large4_text"), INDEXER),
    "deepseek_v4": ("self_attn.compressor.kv_proj", "self_attn.compressor.gate_proj"),
    "blip-2": ("qformer",),
}


def linear_modules(shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any]) -> list[str]:
    """Modules that are exactly ``nn.Linear`` or ``Conv1D``, in order.

    Args:
        shapes: of the parameters, by their names in the module tree.
        config: ``config.json``.
    """
    from adapterkit.adapters.families.names import family_of

    kind = _types(config)
    denoiser = "model_type" not in config and family_of(shapes) is not None
    subclassed = {name for one in kind for name in SUBCLASSED.get(one, ())}
    found = []
    for name, shape in shapes.items():
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or len(shape) != 2 or f"{module.rpartition('.')[0]}.in_proj_weight" in shapes:
            continue
        words = module.split(".")
        last = words[-2] if words[-1].isdigit() and len(words) > 1 else words[-1]
        table = last in TABLES or ("embed" in last.lower() and last not in NAMED_SO)
        if denoiser:
            table = words[-1] in DENOISERS_TABLES
        if (table and not module.endswith(GATES)) or last in subclassed:
            continue
        found.append(module)
    return found


def quantized_modules(
    shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any], skip: Iterable[str] | None = None
) -> list[str]:
    """Modules that bitsandbytes would have quantized.

    Args:
        shapes, config: see `linear_modules`.
        skip: ``llm_int8_skip_modules``; as in transformers it takes the place of the output layer that is skipped
            without it.

    Raises:
        UsageError: an entry of ``skip`` is no regular expression.
    """
    kind = _types(config)
    patterns = [pattern for one in kind for pattern in KEPT.get(one, ())]
    heads = {name for one in kind for name in HEADS_OF.get(one, ())}
    if skip is not None:
        patterns += skip
    found = []
    for module in linear_modules(shapes, config):
        head = skip is None and (HEADS.fullmatch(module) is not None or module in heads)
        if not head and not any(is_named(pattern, module) for pattern in patterns):
            found.append(module)
    return found


def _types(config: Mapping[str, Any]) -> set[str]:
    parts = (config, *(part for part in config.values() if hasattr(part, "get")))
    return {kind for part in parts if isinstance(kind := part.get("model_type"), str)}


def is_named(pattern: str, module: str) -> bool:
    """transformers' rule: from the start to the end of a word, as a regular expression, or as the end of the name."""
    if module.endswith(pattern):
        return True
    try:
        return regex.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", module, timeout=1.0) is not None
    except regex.error as error:
        raise UsageError(f"'{pattern}' is no pattern of modules to skip ({error})", "write it like lm_head") from None
