"""Whether the files around the weights tell the truth: what a loader would make of MERGED."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from adapterkit.verbs.verify.companions import companions
from adapterkit.verbs.verify.inputs import place
from adapterkit.verbs.verify.metadata import metadata
from adapterkit.verbs.verify.report import ERROR, NOTE, WARNING, Finding

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.verbs.verify.subject import Subject

# Fields of a config that say nothing about how the weights are used.
_SILENT = frozenset(
    {
        *("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "_attn_implementation"),
        *("_attn_implementation_autoset", "quantization_config", "tie_word_embeddings", "vocab_size", "auto_map"),
        *("output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward", "is_encoder_decoder"),
        *("problem_type", "torchscript", "finetuning_task", "prefix", "id2label", "label2id", "tokenizer_class"),
    }
)
# What decides which module tree the weights are loaded into.
_SHAPING = frozenset(
    {
        *("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
        *("intermediate_size", "rms_norm_eps", "layer_norm_eps", "rope_theta", "rope_scaling", "rope_parameters"),
        *("hidden_act", "num_experts", "num_local_experts", "num_experts_per_tok", "norm_topk_prob", "sliding_window"),
        *("n_embd", "n_layer", "n_head", "attention_bias", "mlp_bias", "max_position_embeddings"),
    }
)


def sanity(subject: Subject, on_purpose: Sequence[str] = ()) -> list[Finding]:
    """What is wrong beside the weights; see `metadata` for ``on_purpose``."""
    found = list(metadata(subject, on_purpose))
    if subject.found.format == "gguf":
        return found
    return [*_config(subject), *_files(subject.found), *companions(subject)]


def _config(subject: Subject) -> Iterator[Finding]:
    config, wanted = subject.found.config, subject.config or {}
    if not config and not subject.base.config:
        return  # a checkpoint of one file, which never had one
    if not config:
        yield Finding("no config", ERROR, "MERGED has no config.json", "copy the base's, or merge again")
        return
    yield from _quantization(subject)
    yield from _tie(subject)
    yield from _vocabulary(subject)
    for key in sorted(_SHAPING & (config.keys() | wanted.keys())):
        mine, theirs = wanted.get(key), config.get(key)
        # Another version of transformers writes defaults out, or leaves them out.
        if mine != theirs and mine is not None and theirs is not None:
            severity = ERROR if key == "model_type" else WARNING
            text = f"config.json says {key}: {_short(theirs)}, and the base says {_short(mine)}"
            yield Finding("config", severity, text, "take the base's config.json")
    said = config.get("dtype", config.get("torch_dtype"))
    counts: dict[str, int] = {}
    for item in subject.items:
        if item.format is None and item.values.dtype.is_float:
            counts[item.values.dtype.torch_name] = counts.get(item.values.dtype.torch_name, 0) + item.values.numel
    most = max(counts, key=lambda name: counts[name], default=None)
    if isinstance(said, str) and most is not None and subject.kind is None and said not in counts:
        text = f"config.json says dtype: {said}, and the weights are {most}"
        yield Finding("config", WARNING, text, f"loaders with dtype='auto' will cast; write {most} there")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _quantization(subject: Subject) -> Iterator[Finding]:
    from adapterkit.codecs.table import method_of, quantization

    said = quantization(subject.found.config)
    if said is not None and all(item.format is None for item in subject.items):
        text = f"config.json says that the weights are quantized ({method_of(said)}), and they are not"
        yield Finding("quantization_config left", ERROR, text, "remove quantization_config from config.json")


def _tie(subject: Subject) -> Iterator[Finding]:
    from adapterkit.adapters.names import Names
    from adapterkit.adapters.ties import is_tied

    found = subject.found
    names = Names(found.shapes, found.config)
    for embedding, head in names.declared_ties():
        one, other = (names.find(name) for name in (embedding, head))
        if one is None or "embed" in head:  # encoder and decoder may share one table, whatever the config says of heads
            continue
        if other is None and not is_tied(found.config) and is_tied(subject.config or {}):
            text = f"config.json says tie_word_embeddings: false, and MERGED has no {head}"
            yield Finding("tied head", ERROR, text, "set it to true, or write the output layer", (head,))
        if other is not None and is_tied(found.config) and subject.folded.untied:
            text = (
                f"MERGED has a {head} of its own, and config.json says that it is the embedding: servers will drop it"
            )
            yield Finding("tied head", ERROR, text, "write tie_word_embeddings: false in config.json", (head,))


def _vocabulary(subject: Subject) -> Iterator[Finding]:
    from adapterkit.adapters.names import Names

    found = subject.found
    parts = [found.config, *(part for part in found.config.values() if isinstance(part, Mapping))]
    names = Names(found.shapes, found.config)
    sizes = [part["vocab_size"] for part in parts if isinstance(part.get("vocab_size"), int)]
    for embedding, _ in names.declared_ties()[:1]:
        target = names.find(embedding)
        if target is not None and sizes and target.shape[0] not in sizes and subject.folded.vocab is not None:
            text = f"config.json says vocab_size: {sizes[0]}, and the embedding has {target.shape[0]} rows"
            yield Finding("vocab_size", ERROR, text, f"write vocab_size: {target.shape[0]} in config.json")


def _files(found: Checkpoint) -> Iterator[Finding]:
    folder = place(found)
    if folder is None or not folder.is_dir():
        return
    if (folder / "adapter_config.json").exists():
        text = "adapter_config.json lies in MERGED: transformers would load that adapter on top of the merged weights"
        yield Finding("applied twice", ERROR, text, "remove adapter_config.json and adapter_model.safetensors from it")
    names = {path.name for path in folder.iterdir()}
    if "_class_name" not in found.config and not names & {
        "tokenizer.json",
        "tokenizer.model",
        "vocab.json",
        "vocab.txt",
        "tokenizer_config.json",
    }:
        yield Finding("no tokenizer", NOTE, "MERGED has no tokenizer", "copy the base's, if it is a language model")
