"""MLX adapters: ``adapters.safetensors`` and ``adapter_config.json`` as mlx-lm trains and loads them.

LoRA there is ``y = W x + scale * (x lora_a) lora_b`` with ``lora_a [in, r]`` and ``lora_b [r, out]``: both factors are PEFT's,
transposed, and alpha is ``scale * r``. On an embedding W ``[V, d]`` they are ``[V, r]`` and ``[r, d]``. DoRA has the magnitude
``m [out]`` beside them; on an embedding it is per token, where PEFT's is per dimension. Stacked experts have
``lora_a [experts, r, in]`` and ``lora_b [experts, out, r]``. ``fine_tune_type: full`` means whole parameters.

Source: mlx-lm (MIT) at 2026-08, ``tuner/lora.py``, ``tuner/dora.py``, ``tuner/utils.py``.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.config import AdapterConfig
from adapterkit.adapters.formats.views import part, turned
from adapterkit.adapters.stacks import NUMBERED, NUMBERED_BLOCK, STACK
from adapterkit.checkpoint.tensor import Renamed
from adapterkit.errors import AdapterError, UnsupportedAdapter

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from adapterkit.checkpoint.tensor import Tensor

WEIGHTS = "adapters.safetensors"
OTHER_WEIGHTS = "weights.safetensors"  # mlx-vlm looks for it too
EMBEDDINGS = frozenset(
    {"embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "embeddings", "embedding"}
)


# Where MLX keeps the parts of a multimodal model that Hugging Face has below one `model.`.
NESTED = ("language_model.", "vision_tower.", "audio_tower.", "multi_modal_projector.")
VISUAL = ("model.visual.", "visual.")  # Qwen's vision tower
_ONE_EXPERT = re.compile(r"(.*?)([^.]+)\.experts\.(\d+)\.([^.]+)")


_OLDER = {"A": "lora_a", "B": "lora_b"}  # what mlx-vlm called the factors until 2025


def mlx_file(names: frozenset[str], config: Mapping[str, Any]) -> str | None:
    """The weight file of an MLX adapter in a folder with these files and this ``adapter_config.json``; None for another."""
    if "peft_type" in config:
        return None
    return WEIGHTS if WEIGHTS in names else OTHER_WEIGHTS if OTHER_WEIGHTS in names and is_mlx_config(config) else None


def is_mlx_config(config: Mapping[str, Any]) -> bool:
    """Whether an ``adapter_config.json`` is of mlx-lm or mlx-vlm, of today or older."""
    return "peft_type" not in config and bool({"fine_tune_type", "lora_parameters", "lora_layers"} & set(config))


def is_nested(paths: Iterable[str]) -> bool:
    """Whether modules of a multimodal model are among these."""
    return any(path.startswith(VISUAL) or path.removeprefix("model.").startswith(NESTED) for path in paths)


def mlx_path(path: str, nested: bool) -> tuple[str, int | None]:
    """What MLX calls a module of Hugging Face, and which of the experts there it is.

    Args:
        nested: it is a module of a multimodal model.
    """
    if path.startswith("model.language_model."):
        path = "language_model.model." + path.removeprefix("model.language_model.")
    elif path.startswith("model.") and path.removeprefix("model.").startswith(NESTED):
        path = path.removeprefix("model.")
    elif path.startswith(VISUAL):
        path = NESTED[1] + path.partition("visual.")[2]
    elif nested and path == "lm_head":
        path = "language_model.lm_head"
    found = _ONE_EXPERT.fullmatch(path)
    if found is None:
        return path, None
    head, block, expert, name = found.groups()
    alone = next((one for one, other in NUMBERED.items() if other == name), name)
    return f"{head}{block}.{STACK}.{alone}", int(expert)


def read_mlx(
    stored: Mapping[str, Tensor], raw: Mapping[str, Any], where: str
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """The config and tensors of the same adapter in PEFT's terms.

    Raises:
        AdapterError: the config lacks what the formula needs, or a factor stands alone.
        UnsupportedAdapter: factors are quantized.
    """
    kind = raw.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora", "full"):
        raise AdapterError(f"{where}: 'fine_tune_type' is {kind!r}; known are lora, dora, full", "update adapterkit")
    quantized = next((name for name in stored if name.endswith((".lora_a_scales", ".lora_b_scales"))), None)
    if quantized is not None:
        raise UnsupportedAdapter(f"{where}: '{quantized}' belongs to quantized factors", "give the unquantized adapter")
    fields: dict[str, Any] = {
        "peft_type": "LORA",
        "base_model_name_or_path": raw.get("model"),
        "use_dora": kind == "dora",
    }
    if kind != "full":
        rank, scale = _strength(raw, where)
        fields |= {"r": rank, "lora_alpha": scale * rank}
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        path, _, leaf = name.rpartition(".")
        leaf = _OLDER.get(leaf, leaf)
        if kind == "full" or leaf not in ("lora_a", "lora_b", "m"):
            tensors[name] = tensor
            continue
        older = name.rpartition(".")[2] in _OLDER
        pair = ("A", "B") if older else ("lora_a", "lora_b")
        other = f"{path}.{pair[leaf == 'lora_a']}"
        if other not in stored:
            raise AdapterError(f"{where}: '{name}' stands without its {other}", "save the adapter again")
        for key, found in _named(path, leaf, tensor, kind == "dora", where).items():
            tensors[key] = found
    return AdapterConfig({name: value for name, value in fields.items() if value is not None}, where), tensors


def _strength(raw: Mapping[str, Any], where: str) -> tuple[int, float]:
    parameters = raw.get("lora_parameters")
    if parameters is None and isinstance(raw.get("rank"), int) and isinstance(raw.get("alpha"), (int, float)):
        rank, alpha = raw["rank"], raw["alpha"]
        raise UnsupportedAdapter(
            f"{where} is of mlx-vlm before 0.7, whose scale was alpha ({alpha:g}) while it trained; mlx-vlm loads it with "
            f"alpha / rank ({alpha / max(rank, 1):g}) since",
            f'write "lora_parameters": {{"rank": {rank}, "scale": SCALE}} there, with the scale that it was used with',
        )
    parameters = parameters if isinstance(parameters, dict) else {}
    rank, scale = parameters.get("rank"), parameters.get("scale")
    if type(rank) is not int or rank < 1 or isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise AdapterError(f"{where} has no lora_parameters with a rank and a scale", "restore the config")
    if "alpha" in parameters and "num_layers" not in raw:
        # mlx-lm multiplied the scale by alpha/r until June 2024 and kept the field for a while after.
        raise AdapterError(
            f"{where} is of 2024, when mlx-lm changed what 'alpha' means",
            f"remove alpha; if it was trained before June 2024, set scale to {scale:g} * alpha / {rank} first",
        )
    return rank, float(scale)


def _named(path: str, leaf: str, tensor: Tensor, dora: bool, where: str) -> dict[str, Tensor]:
    """One tensor under PEFT's names."""
    if leaf == "m":
        return {f"{path}.lora_magnitude_vector": Renamed(f"{path}.lora_magnitude_vector", tensor)}
    if len(tensor.shape) == 3:
        side = "lora_A" if leaf == "lora_a" else "lora_B"
        keys = [f"{_expert(path, index)}.{side}.weight" for index in range(tensor.shape[0])]
        return {key: part(key, tensor, index) for index, key in enumerate(keys)}
    if len(tensor.shape) != 2:
        raise AdapterError(f"{where}: '{path}.{leaf}' is {list(tensor.shape)}, no factor", "save the adapter again")
    if path.rpartition(".")[2] not in EMBEDDINGS:
        key = f"{path}.{'lora_A' if leaf == 'lora_a' else 'lora_B'}.weight"
        return {key: turned(key, tensor)}
    if dora:
        # Norms of rows: the rule of a linear layer whose outputs are the tokens, so its B is lora_a as it stands.
        key = f"{path}.{'lora_B' if leaf == 'lora_a' else 'lora_A'}.weight"
        return {key: Renamed(key, tensor)}
    key = f"{path}.lora_embedding_{'A' if leaf == 'lora_a' else 'B'}"
    return {key: turned(key, tensor)}


def _expert(path: str, index: int) -> str:
    """The module of one expert of a stack."""
    found = re.fullmatch(rf"(.*?)([^.]+)\.{STACK}\.([^.]+)", path)
    if found is None:
        return f"{path}.{index}"
    head, block, name = found.groups()
    return f"{head}{block}.experts.{index}.{NUMBERED.get(name, name) if block == NUMBERED_BLOCK else name}"
