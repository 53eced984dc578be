"""To the folder that transformers loads."""

from __future__ import annotations

from adapterkit.errors import UsageError
from adapterkit.requests.convert import ConvertRequest
from adapterkit.verbs.conversions.conversion import Conversion, count_types, gguf_file


def plan(asked: ConvertRequest, jobs: int) -> Conversion:
    """A GGUF model as Hugging Face folder, with its config and tokenizer."""
    from adapterkit.checkpoint.plan import plan_safetensors
    from adapterkit.gguf.to_hf import to_hf
    from adapterkit.requests.merge import parse_floats

    opened = gguf_file(asked.src)
    if opened is None:
        raise UsageError(f"{asked.src} is not a GGUF file", "give a .gguf file, or use adapterkit merge for folders")
    view, side, notes = to_hf(opened, parse_floats(asked.dtype))
    request = {"verb": "convert", "to": "hf", "dtype": asked.dtype}
    planned = plan_safetensors(view, max_shard_size=asked.shard_size, jobs=jobs, request=request)
    handles = dict(view.tensors)
    return Conversion(opened.ref, "hf", planned, handles, opened.sources, count_types(handles), side, tuple(notes))
