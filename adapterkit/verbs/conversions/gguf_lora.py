"""To a LoRA that llama.cpp loads beside its model."""

from __future__ import annotations

from adapterkit.bases import open_model
from adapterkit.errors import UsageError, option
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
    kind = _factor_type(asked)
    tensors, entries, notes = lora_tensors(adapter, gguf_names(open_model(base, headers_only=True)), kind=kind)
    request = {"verb": "convert", "to": "gguf-lora"} | ({} if kind == "F32" else {"type": kind})
    planned = plan_gguf(FileLayout(tensors, entries), jobs=jobs, request=request)
    handles = {tensor.name: tensor for tensor in tensors}
    notes = (*adapter.notes, *notes)
    return Conversion(adapter.ref, "gguf-lora", planned, handles, adapter.sources, count_types(handles), {}, notes)


def _factor_type(asked: ConvertRequest) -> str:
    """The type of the factors, by ``--dtype`` or ``--quant``.

    Raises:
        UsageError: both were given, or another type.
    """
    from adapterkit.gguf.lora import FACTOR_TYPES

    if asked.quant is not None and asked.dtype != "auto":
        raise UsageError(
            f"{option('dtype')} and {option('quant')} both say the type of the factors", "give one of them"
        )
    kind = (asked.quant or ("f32" if asked.dtype == "auto" else asked.dtype)).upper()
    if kind not in FACTOR_TYPES:
        raise UsageError(f"factors of a LoRA file are not written as {kind}", f"use {', '.join(FACTOR_TYPES)}")
    return kind
