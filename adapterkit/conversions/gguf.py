"""To a GGUF model."""

from __future__ import annotations

from adapterkit.conversions.conversion import Conversion, ConvertOptions, Ref, gguf_file
from adapterkit.errors import UsageError


def plan(src: Ref, options: ConvertOptions, jobs: int) -> Conversion:
    """A GGUF model in other types, or in parts of another size."""
    from adapterkit.gguf.plan import Layout, plan_gguf
    from adapterkit.gguf.quantize import Quantization, typed

    opened = gguf_file(src)
    if opened is None:
        raise UsageError(f"{src} is not a GGUF file", "convert the model to a 16-bit GGUF first")
    if opened.kind != "model":
        raise UsageError(f"{src} is a GGUF {opened.kind}, not a model", "add --to peft, or give a model")
    asked = options.quantization or Quantization()
    found = typed(opened, opened, asked)
    layout = Layout(found.tensors, found.entries, opened.header.alignment, opened.sources[0])
    request = {"verb": "convert", **asked.request()}
    planned = plan_gguf(layout, max_shard_size=options.max_shard_size, jobs=jobs, request=request)
    tensors = {tensor.name: tensor for tensor in found.tensors}
    return Conversion(opened.ref, "gguf", planned, tensors, opened.sources, found.types, {}, found.notes)
