"""A Hugging Face base as GGUF would name it: names and shapes only, for adapters that are converted beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapterkit.errors import TargetError
from adapterkit.gguf.archs import ARCHS
from adapterkit.gguf.checkpoint import GGUFCheckpoint
from adapterkit.gguf.names import GGUFNames, Model

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adapterkit.checkpoint.checkpoint import Checkpoint

# Other names of the config fields that are asked for.
_FIELDS = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "heads": ("num_attention_heads", "n_head", "num_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads"),
}


def gguf_names(base: Checkpoint) -> GGUFNames:
    """The names that a base has, or would have, in GGUF.

    Raises:
        TargetError: an architecture that is not known here.
    """
    if isinstance(base, GGUFCheckpoint):
        return GGUFNames(base.shapes, base.config, Model.of(base))
    model = model_of(base.config, base.ref)
    shapes = GGUFNames({}, base.config, model).shapes_of(base.shapes)
    return GGUFNames(shapes, base.config, model)


def model_of(config: Mapping[str, Any], ref: str) -> Model:
    """The architecture that a ``config.json`` describes.

    Raises:
        TargetError: it does not say what is needed.
    """
    text = next((part for key in ("text_config", "llm_config") if isinstance(part := config.get(key), dict)), config)
    kind = str(text.get("model_type") or config.get("model_type") or "")
    arch = ARCHS.get(kind, kind)
    found = {}
    for name, keys in _FIELDS.items():
        found[name] = next((text[key] for key in keys if isinstance(text.get(key), int) and text[key] > 0), 0)
    if kind == "falcon" and text.get("multi_query", True) and not text.get("new_decoder_architecture"):
        found["kv_heads"] = 1
    if not found["layers"] or not found["heads"]:
        raise TargetError(f"{ref}: its config.json does not describe a language model", "give the base's own folder")
    layers = found["layers"]
    return Model(arch, layers, (found["heads"],) * layers, (found["kv_heads"] or found["heads"],) * layers)
