"""The tower of a model that sees or hears, as an mmproj file."""

from __future__ import annotations

from typing import Any

from adapterkit.errors import UsageError
from adapterkit.requests.convert import ConvertRequest
from adapterkit.verbs.conversions.conversion import Conversion


def plan(asked: ConvertRequest, jobs: int) -> Conversion:
    """Plan the mmproj file of a Hugging Face model, which llama.cpp loads beside the GGUF of its language model."""
    from adapterkit.bases import open_model
    from adapterkit.checkpoint.decoded import dequantized
    from adapterkit.gguf.checkpoint import GGUFCheckpoint
    from adapterkit.gguf.plan import plan_gguf
    from adapterkit.gguf.quantize import Quantization
    from adapterkit.gguf.said import with_said
    from adapterkit.gguf.towers.make import from_tower
    from adapterkit.requests.merge import parse_floats

    src: Any = asked.src
    opened = open_model(src)
    if isinstance(opened, GGUFCheckpoint):
        raise UsageError(
            f"{opened.ref} is a GGUF file, which holds no tower", "give the Hugging Face model that it was made from"
        )
    view = dequantized(opened)
    types = asked.types or Quantization()
    files = {file.name: file.bytes() for file in view.side_files}
    made = from_tower(view, base=view, config=view.config, files=files, asked=types, dtype=parse_floats(asked.dtype))
    stated = {"verb": "convert", "dtype": asked.dtype, **types.request()}
    planned = plan_gguf(with_said(made.layout, asked.said), jobs=jobs, request=stated)
    notes = (*view.notes, *made.notes)
    return Conversion(opened.ref, "mmproj", planned, made.tensors, opened.sources, made.types, {}, notes)
