"""GGUF files of image and video models: the original checkpoint's own tensors, under its own names.

Source: city96/ComfyUI-GGUF, tools/convert.py, which writes them: nothing is renamed or permuted; a tensor that does not go
into blocks as it is has other dimensions, and ``comfy.gguf.orig_shape.NAME`` keeps its own.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from adapterkit.adapters.names import Names
from adapterkit.errors import CheckpointError, UsageError, option
from adapterkit.gguf.arch.views import Reshaped
from adapterkit.gguf.names import EMBEDDING
from adapterkit.gguf.reader import DIFFUSION

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adapterkit.checkpoint.tensor import Tensor
    from adapterkit.gguf.checkpoint import GGUFCheckpoint
    from adapterkit.gguf.quantize import Quantization

ORIGINAL_SHAPE = "comfy.gguf.orig_shape."


def is_diffusion(base: GGUFCheckpoint) -> bool:
    """Whether a GGUF file holds an image or video model."""
    return base.arch in DIFFUSION and EMBEDDING not in base


def original_shapes(base: GGUFCheckpoint) -> dict[str, tuple[int, ...]]:
    """The dimensions that its tensors had in the checkpoint, of those that have others in the file.

    Raises:
        CheckpointError: they are of another size.
    """
    found = {}
    for key in base.header.keys:
        name = key.removeprefix(ORIGINAL_SHAPE)
        if name == key or name not in base:
            continue
        said = base.header[key]
        shape = tuple(said) if isinstance(said, list) and all(type(size) is int for size in said) else ()
        if prod(shape) != base[name].numel:
            raise CheckpointError(
                f"{base.ref}: '{key}' is {said}, and '{name}' {list(base[name].shape)}", "save it again"
            )
        if shape != base[name].shape:
            found[name] = shape
    return found


def in_shapes(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The same tensors, some in other dimensions."""
    return {
        name: Reshaped(name, shapes[name], tensor) if name in shapes and tensor.shape != shapes[name] else tensor
        for name, tensor in tensors.items()
    }


def diffusion_names(base: GGUFCheckpoint, shapes: Mapping[str, tuple[int, ...]]) -> Names:
    """The parameters of such a model; ``shapes`` as of `original_shapes`."""
    return Names({**base.shapes, **shapes}, {})


def check_types(base: GGUFCheckpoint, asked: Quantization | None) -> None:
    """Refuse the mixes of language models, which go by names that image models do not have.

    Raises:
        UsageError: one was asked for.
    """
    if asked is not None and asked.mix is not None:
        raise UsageError(
            f"{base.ref} is an image or video model, and {asked.mix} is chosen by the names of a language model's tensors",
            f"leave out {option('quant')}, so that every tensor keeps its type, and quantize with ComfyUI-GGUF's tools",
        )
