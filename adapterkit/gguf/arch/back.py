"""From a GGUF file to the ``config.json`` of the Hugging Face model that it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from adapterkit.errors import CheckpointError, TargetError
from adapterkit.gguf.arch.config import ALIASES, Config, llama3_factors, single
from adapterkit.gguf.arch.fields import MORE, NULL, floats, shortest
from adapterkit.gguf.arch.hyper import GATING
from adapterkit.gguf.arch.mapping import Mapper
from adapterkit.gguf.arch.rope import ATTENTION, OWN_YARN, mscale
from adapterkit.gguf.arch.table import specs_of

if TYPE_CHECKING:
    from collections.abc import Collection

    from adapterkit.gguf.arch.spec import ArchSpec
    from adapterkit.gguf.checkpoint import GGUFCheckpoint

    Values = Mapping[str, Any]

# The fields of keys that most architectures share.
COMMON = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "layer_norm_eps",
    "attention.key_length": "head_dim",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
}
_SPECIAL = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
_ROPE = {
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_ext_factor": "extrapolation_factor",
    "rope.scaling.yarn_attn_factor": "attention_factor",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
_SWITCHED_OFF = 1e20  # a divisor that stops a frequency
# Positions that models were trained with before Llama 3.1's scaling, the usual ones first.
_TRAINED = (8192, 4096, 2048, 16384, 32768, 65536, 131072, *(2**k for k in range(4, 11)), 262144, 524288)
ATTENTION_FACTOR = "attention_factor"
# Tensors whose presence a config says: (a tensor of layer 0 or of none, model types, fields).
_BIASES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("attn_q.bias", ("attention_bias", "qkv_bias", "use_qkv_bias")),
    ("ffn_up.bias", ("mlp_bias", "use_bias")),
)


def spec_of_gguf(base: GGUFCheckpoint) -> ArchSpec:
    """The row of a GGUF model.

    Raises:
        TargetError: there is none.
    """
    rows = specs_of(base.arch)
    if not rows:
        raise TargetError(
            f"{base.ref}: how GGUF stores the matrices of '{base.arch}' is not known here",
            "merge into the Hugging Face base and convert the result with its own tools",
        )
    many = base.number("expert_count") > 0
    fitting = [row for row in rows if row.experts in (None, many)] or list(rows)
    chosen = [row for row in fitting if row.when is not None and row.when(base)]
    return chosen[0] if chosen else next((row for row in fitting if row.when is None), fitting[0])


def mapper_of_gguf(base: GGUFCheckpoint) -> Mapper:
    """The rules of a GGUF model, with what stands for its config."""
    spec = spec_of_gguf(base)
    return Mapper(spec, Config(config_of(base, spec), base.ref, where="metadata"))


def config_of(base: GGUFCheckpoint, spec: ArchSpec) -> dict[str, Any]:
    """A ``config.json`` that says what the file's metadata says.

    It is complete for transformers as far as GGUF goes; what only training asks (dropout, initialisation) is left out.
    """
    prefix = f"{base.arch}."
    values = {key[len(prefix) :]: shortest(base.header[key]) for key in base.header.keys if key.startswith(prefix)}
    config: dict[str, Any] = {"architectures": [spec.classes[0]] if spec.classes else [], "model_type": spec.model_type}
    own = {key.name: field for key in spec.keys for field in key.fields if field not in ALIASES or key.field}
    needed = {key.name for key in spec.keys if key.needed}
    for name, field in {**own, **{name: field for name, field in COMMON.items() if name not in own}}.items():
        if values.get(name) or values.get(name) is False or (name in values and name in needed):
            config.setdefault(field, values[name])
    said = frozenset(config)
    if isinstance(config.get("num_key_value_heads"), list):
        config["num_key_value_heads"] = next((n for n in config["num_key_value_heads"] if n), 0)
    gating = {number: word for word, number in GATING.items()}.get(values.get("expert_gating_func", 0))
    if gating is not None:
        config.setdefault("scoring_func", gating)
    rope = _rope(values, base, config)
    if rope:
        config["rope_parameters"] = rope
    embedding = base.tensors.get("token_embd.weight")
    if embedding is not None:
        config["vocab_size"] = embedding.shape[0]
    config["tie_word_embeddings"] = "output.weight" not in base and not spec.encoder
    for name, field in _SPECIAL.items():
        number = base.header.get(f"tokenizer.ggml.{name}_token_id")
        config[field] = number if isinstance(number, int) else NULL
    for tensor, fields in _BIASES:
        present = f"blk.0.{tensor}" in base
        config |= dict.fromkeys(fields, present)
    config |= spec.defaults
    more = spec.back or MORE.get(spec.model_type)
    if more is not None:
        try:
            config |= more(values, config, base)
        except KeyError as error:  # each row reads keys that the runtime needs too
            raise CheckpointError(
                f"{base.ref}: its metadata does not say '{error.args[0]}', which {spec.model_type} needs",
                "download it again",
            ) from None
    config |= _classifier(config, values, base)
    _scaled(config, rope)
    config |= _built_in(spec, config, said, base)
    return {name: None if value is NULL else value for name, value in config.items() if value is not None}


def _classifier(config: Mapping[str, Any], values: Mapping[str, Any], base: GGUFCheckpoint) -> dict[str, Any]:
    """The labels of a classifier, and its class where a row has that of the model without a head first."""
    names = values.get("classifier.output_labels")
    if not isinstance(names, list) or "cls.output.weight" not in base:
        return {}
    cls = str((config.get("architectures") or [""])[0])
    found: dict[str, Any] = {"id2label": {str(i): str(name) for i, name in enumerate(names)}}
    found["label2id"] = {name: int(i) for i, name in found["id2label"].items()}
    if cls.endswith("Model"):
        found["architectures"] = [f"{cls.removesuffix('Model')}ForSequenceClassification"]
    return found


def _scaled(config: dict[str, Any], rope: Mapping[str, Any]) -> None:
    """The scaling of positions, where a row's own fields say the rest of its rotary embeddings anew."""
    full = rope.get("full_attention", rope)
    own = config.get("rope_parameters")
    if full.get("rope_type", "default") == "default" or not isinstance(own, dict):
        return
    mine = own.get("full_attention", own)
    if mine.get("rope_type", "default") == "default":
        mine |= {name: value for name, value in full.items() if name not in mine or name == "rope_type"}
    elif ATTENTION_FACTOR in full:
        mine.setdefault(ATTENTION_FACTOR, full[ATTENTION_FACTOR])


def _built_in(spec: ArchSpec, config: Mapping[str, Any], said: Collection[str], base: GGUFCheckpoint) -> dict[str, Any]:
    """Fields that no key of a file says, where they are not what the runtime has built in for this one."""
    read = Config({name: value for name, value in config.items() if value is not NULL}, base.ref, where="metadata")
    found: dict[str, Any] = {}
    for one in spec.fixed:
        if one.field in said or "." in one.field or one.limit is not None or one.field == "layer_types":
            continue
        differs = one.differs(read)
        if differs is not None:
            value = differs[1]
            found[one.field] = int(value) if isinstance(value, float) and value.is_integer() else value
    return found


def _rope(values: Values, base: Collection[str], config: Mapping[str, Any]) -> dict[str, Any]:
    rope: dict[str, Any] = {}
    if "rope.freq_base" in values:
        rope["rope_theta"] = values["rope.freq_base"]
    kind = values.get("rope.scaling.type")
    if kind == "linear" and values.get("rope.scaling.factor", 1.0) == 1.0:
        kind = None
    rope["rope_type"] = kind if kind in ("linear", "yarn", "longrope") else "default"
    if rope["rope_type"] != "default":
        rope |= {field: values[key] for key, field in _ROPE.items() if key in values}
    extra = values.get(ATTENTION)
    if extra is not None and kind == "yarn":
        rope[ATTENTION_FACTOR] = shortest(float(extra) * mscale(float(rope.get("factor", 1.0))))
    elif extra is not None:
        rope[ATTENTION_FACTOR] = extra
    log = values.get(OWN_YARN)
    if log is not None and kind == "yarn":
        rope["mscale"] = rope["mscale_all_dim"] = shortest(single(log / 0.1))
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    size = config.get("head_dim") or (
        width // heads if isinstance(heads, int) and heads and isinstance(width, int) else 0
    )
    rotated = values.get("rope.dimension_count")
    # Heads of latent attention have a part of their own that turns, all of it.
    latent = "attention.kv_lora_rank" in values
    if isinstance(size, int) and size and isinstance(rotated, int) and rotated != size and not latent:
        rope["partial_rotary_factor"] = rotated / size
    if "rope.dimension_sections" in values:
        rope["mrope_section"] = [one for one in values["rope.dimension_sections"] if one]
    if isinstance(config.get("original_max_position_embeddings"), int):
        rope.setdefault("original_max_position_embeddings", config["original_max_position_embeddings"])
    _factors(rope, base, int(rotated or size or 0), config.get("max_position_embeddings"))
    if rope["rope_type"] == "default" and rope.get(ATTENTION_FACTOR, 1.0) != 1.0:
        _for_all_lengths(rope, [1.0] * (int(rotated or size or 0) // 2), config.get("max_position_embeddings"))
    if rope["rope_type"] == "default":
        rope.pop(ATTENTION_FACTOR, None)
    if "rope.freq_base_swa" in values:
        local = {"rope_type": "default", "rope_theta": values["rope.freq_base_swa"]}
        return {"full_attention": rope, "sliding_attention": local}
    return rope if len(rope) > 1 else {}


def _factors(rope: dict[str, Any], base: Any, size: int, context: Any) -> None:
    """What made the divisors of the rotary frequencies: longrope's lists, or the four numbers of Llama 3.1.

    Divisors of another origin (yarn with bounds of its own) become longrope's lists too, with the same for all lengths.
    """
    for name in ("long", "short"):
        found = base.get(f"rope_factors_{name}.weight") if hasattr(base, "get") else None
        if found is not None:
            rope["rope_type"] = "longrope"
            rope[f"{name}_factor"] = [shortest(one) for one in floats(found)]
    found = base.get("rope_freqs.weight") if hasattr(base, "get") else None
    if found is None:
        return
    wanted = floats(found)
    if max(wanted, default=1.0) >= _SWITCHED_OFF:
        return  # frequencies that are left out, which a row's own fields say
    factor = shortest(max(wanted, default=1.0))
    for old in _TRAINED:
        for low, high in ((1.0, 4.0), (1.0, 2.0), (1.0, 8.0), (2.0, 4.0)):
            tried = {
                "rope_type": "llama3",
                "rope_theta": rope.get("rope_theta", 10000.0),
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": old,
            }
            if ATTENTION_FACTOR not in rope and [single(one) for one in llama3_factors(tried, size)] == wanted:
                rope |= tried
                return
    if len(wanted) == size // 2:
        _for_all_lengths(rope, [shortest(one) for one in wanted], context)


def _for_all_lengths(rope: dict[str, Any], divisors: list[Any], context: Any) -> None:
    """Divisors of frequencies, and a factor of attention, as longrope says them: the same for short texts and long ones."""
    if not divisors or not isinstance(context, int):
        return
    rope |= {"rope_type": "longrope", "short_factor": divisors, "long_factor": divisors}
    rope.setdefault(ATTENTION_FACTOR, 1.0)
    rope.setdefault("original_max_position_embeddings", context)
