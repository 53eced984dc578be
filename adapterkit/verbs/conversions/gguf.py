"""To a GGUF model."""

from __future__ import annotations

from typing import Any

from adapterkit.errors import NotFound, UsageError
from adapterkit.verbs.conversions.conversion import Conversion, ConvertOptions, Ref


def plan(src: Ref, options: ConvertOptions, jobs: int) -> Conversion:
    """A Hugging Face model as GGUF; or a GGUF model in other types, or in parts of another size."""
    from adapterkit.bases import open_model
    from adapterkit.gguf.checkpoint import GGUFCheckpoint

    try:
        opened = open_model(src)
    except NotFound as error:
        if "is an adapter" not in error.message:
            raise
        road = "add --to gguf-lora --base BASE, or merge it: adapterkit merge BASE ADAPTER -o OUT.gguf"
        raise UsageError(f"{src} is an adapter, not a model", road) from None
    if not isinstance(opened, GGUFCheckpoint):
        return _of_hf(opened, options, jobs)
    if options.dtype != "auto" or options.pre is not None:
        raise UsageError(f"{src} is a GGUF file, with types and a tokenizer of its own", "use --quant alone")
    return _of_gguf(opened, options, jobs)


def _of_gguf(opened: Any, options: ConvertOptions, jobs: int) -> Conversion:
    from adapterkit.gguf.plan import FileLayout, plan_gguf
    from adapterkit.gguf.quantize import Quantization, typed

    if opened.kind != "model":
        raise UsageError(f"{opened.ref} is a GGUF {opened.kind}, not a model", "add --to peft, or give a model")
    asked = options.quantization or Quantization()
    found = typed(opened, opened, asked)
    layout = FileLayout(found.tensors, found.entries, opened.header.alignment, opened.sources[0])
    request = {"verb": "convert", **asked.request()}
    planned = plan_gguf(layout, max_shard_size=options.max_shard_size, jobs=jobs, request=request)
    tensors = {tensor.name: tensor for tensor in found.tensors}
    return Conversion(opened.ref, "gguf", planned, tensors, opened.sources, found.types, {}, found.notes)


def _of_hf(opened: Any, options: ConvertOptions, jobs: int) -> Conversion:
    from adapterkit.checkpoint.decoded import dequantized
    from adapterkit.gguf.from_hf import from_hf
    from adapterkit.gguf.plan import plan_gguf
    from adapterkit.gguf.quantize import Quantization
    from adapterkit.verbs.options import parse_floats

    view = dequantized(opened)
    asked = options.quantization or Quantization()
    files = {file.name: file.bytes() for file in view.side_files}
    made = from_hf(
        view,
        base=view,
        config=view.config,
        files=files,
        asked=asked,
        dtype=parse_floats(options.dtype),
        pre=options.pre,
    )
    request = {"verb": "convert", "dtype": options.dtype, "pre": options.pre, **asked.request()}
    planned = plan_gguf(made.layout, max_shard_size=options.max_shard_size, jobs=jobs, request=request)
    notes = (*view.notes, *made.notes)
    return Conversion(opened.ref, "gguf", planned, made.tensors, opened.sources, made.types, {}, notes)
