"""To a LoRA that llama.cpp loads beside its model."""

from __future__ import annotations

from adapterkit.bases import open_model
from adapterkit.requests.convert import ConvertRequest
from adapterkit.verbs.conversions.conversion import Conversion, count_types


def plan(asked: ConvertRequest, jobs: int) -> Conversion:
    """An adapter as GGUF LoRA, with all scalings folded in."""
    from adapterkit.adapters.load import load_adapter
    from adapterkit.gguf.hf import gguf_names
    from adapterkit.gguf.lora import lora_tensors
    from adapterkit.gguf.plan import FileLayout, plan_gguf

    base = asked.need_base("gguf-lora")
    adapter = load_adapter(asked.src)
    tensors, entries, notes = lora_tensors(adapter, gguf_names(open_model(base, headers_only=True)))
    planned = plan_gguf(FileLayout(tensors, entries), jobs=jobs, request={"verb": "convert", "to": "gguf-lora"})
    handles = {tensor.name: tensor for tensor in tensors}
    notes = (*adapter.notes, *notes)
    return Conversion(adapter.ref, "gguf-lora", planned, handles, adapter.sources, count_types(handles), {}, notes)
