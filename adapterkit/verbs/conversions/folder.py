"""To the folder that transformers loads: plain weights of one dtype, or quantized as bitsandbytes and transformers do it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.fold import FLOATS
from adapterkit.bases import open_model
from adapterkit.checkpoint.checkpoint import Checkpoint, SideFile
from adapterkit.checkpoint.decoded import dequantized
from adapterkit.checkpoint.files import BytesFile
from adapterkit.checkpoint.plan import plan_safetensors
from adapterkit.checkpoint.tensor import Cast
from adapterkit.dtypes import BF16, F16, F32, DType
from adapterkit.errors import UsageError
from adapterkit.verbs.conversions.conversion import Conversion, ConvertOptions, Ref, count_types

if TYPE_CHECKING:
    from collections.abc import Mapping

CONFIG = "config.json"


def open_folder(src: Ref, options: ConvertOptions, to: str) -> Checkpoint:
    """A Hugging Face checkpoint as it is stored.

    Raises:
        UsageError: a GGUF file.
        NotFound, CheckpointError, UnsafeError, AuthError, HubError
    """
    opened = open_model(src, headers_only=options.headers_only)
    if opened.format == "gguf":
        raise UsageError(
            f"{opened.ref} is a GGUF file, and {to} is a format of Hugging Face folders",
            "give the folder that it was made from, or use --to gguf",
        )
    return opened


def _plain(dtype: DType, src: Ref, options: ConvertOptions, jobs: int) -> Conversion:
    """A checkpoint of any format as plain weights, all floating tensors in ``dtype``."""
    from adapterkit.adapters.sidecars import name_dtype

    opened = open_folder(src, options, str(dtype))
    view = dequantized(opened, dtype)
    tensors = {
        name: Cast(tensor, dtype) if tensor.dtype in FLOATS and tensor.dtype is not dtype else tensor
        for name, tensor in view.items()
    }
    config = json.loads(json.dumps(dict(view.config)))
    name_dtype(config, dtype)
    return planned_folder(
        opened, with_config(replace(view, tensors=tensors), config), str(dtype), "converted", options, jobs
    )


def _quantized(kind: str, src: Ref, options: ConvertOptions, jobs: int) -> Conversion:
    """A checkpoint with its linear layers quantized; a quantized one is decoded first, and the report says so."""
    from adapterkit.adapters.quantized import quantized

    opened = open_folder(src, options, kind)
    view = dequantized(opened)
    if view is not opened:
        if stored_formats(view) & set(_GRIDS[kind]):
            raise UsageError(f"{opened.ref} is {kind} already", "copy it, or give the 16-bit original")
        view = replace(
            view,
            notes=(
                *view.notes,
                f"what {opened.ref} had lost stays lost, and {kind} adds its own error; the 16-bit original loses less",
            ),
        )
    skip = options.skip_modules or None
    view = quantized(view, kind, double_quant=options.double_quant, skip=skip)
    return planned_folder(opened, view, kind, "quantized", options, jobs)


# What codecs call weights that are on the grid of a format already.
_GRIDS = {
    "nf4": ("nf4 64", "nf4 64 double"),
    "fp4": ("fp4 64", "fp4 64 double"),
    "int8": ("int8",),
    "fp8": ("fp8 128x128",),
}


def stored_formats(view: Checkpoint) -> set[str]:
    """How the weights of a dequantized view are stored, as codecs call it."""
    from adapterkit.checkpoint.decoded import Decoded
    from adapterkit.checkpoint.tensor import Transposed

    handles = (tensor.inner if isinstance(tensor, Transposed) else tensor for tensor in view.values())
    return {handle.weight.how for handle in handles if isinstance(handle, Decoded)}


def with_config(view: Checkpoint, config: Mapping[str, Any]) -> Checkpoint:
    """The view with another ``config.json``, where it had one."""
    if view.side_file(CONFIG) is None or config == view.config:
        return view
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    others = tuple(file for file in view.side_files if file.name != CONFIG)
    return replace(view, config=config, side_files=(*others, SideFile(CONFIG, BytesFile(CONFIG, text.encode()))))


@dataclass(frozen=True)
class FolderConversion(Conversion):
    """A conversion with a record beside its output; ``opened`` is the source as it is stored."""

    opened: Checkpoint = field(kw_only=True)
    kind: str = field(kw_only=True)
    asked: Mapping[str, Any] = field(kw_only=True)

    def record(self) -> Callable[[Path], dict[str, bytes]]:
        from adapterkit.provenance.record import base_parent, parameters_of, recorder

        method = self.to if self.kind == "quantized" else ""
        return recorder("convert", self.kind, parameters_of(self.asked), [base_parent(self.opened)], method=method)


def planned_folder(
    opened: Checkpoint, view: Checkpoint, to: str, kind: str, options: ConvertOptions, jobs: int
) -> Conversion:
    """The plan of a view as a folder with its side files and a record."""
    asked = {
        "verb": "convert",
        "to": to,
        "double_quant": options.double_quant,
        "skip_modules": list(options.skip_modules),
    }
    plan = plan_safetensors(view, max_shard_size=options.max_shard_size, jobs=jobs, request=asked)
    side = {file.name: file.bytes() for file in view.side_files}
    return FolderConversion(
        opened.ref, to, plan, view, opened.sources, count_types(view), side, view.notes,
        opened=opened, kind=kind, asked=asked,
    )  # fmt: skip


bf16, f16, f32 = (partial(_plain, dtype) for dtype in (BF16, F16, F32))
nf4, fp4, int8, fp8 = (partial(_quantized, kind) for kind in ("nf4", "fp4", "int8", "fp8"))
