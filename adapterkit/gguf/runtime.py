"""What llama.cpp, and Ollama which runs it, would make of a base and an adapter: for `check --for`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.adapters.edits import adapter_edits
from adapterkit.checkpoint.decoded import dequantized
from adapterkit.errors import AdapterkitError
from adapterkit.gguf.arch.config import Config
from adapterkit.gguf.arch.contract import held
from adapterkit.gguf.arch.hyper import hyperparameters
from adapterkit.gguf.arch.table import spec_of
from adapterkit.gguf.checkpoint import GGUFCheckpoint
from adapterkit.gguf.hf import gguf_names
from adapterkit.gguf.lora import ignores
from adapterkit.gguf.text_part import text_part

if TYPE_CHECKING:
    from adapterkit.adapters.adapter import Adapter
    from adapterkit.checkpoint.checkpoint import Checkpoint


def config_refusal(base: Checkpoint) -> AdapterkitError | None:
    """Why the runtime would not compute what a base's config says; None where it does, and for a GGUF base."""
    if isinstance(base, GGUFCheckpoint):
        return None
    try:
        config = Config(dequantized(base).config, base.ref)
        spec = spec_of(config)
        held(spec, config)
        hyperparameters(spec, config)
    except AdapterkitError as error:
        return error
    return None


def unheard(base: Checkpoint, adapter: Adapter) -> list[tuple[str, str]]:
    """The parameters of an adapter that the runtime would multiply without looking for a LoRA, with the GGUF tensor.

    Empty where the architecture is not known here, which `config_refusal` says.
    """
    try:
        names = gguf_names(base)
        edits = adapter_edits(text_part(adapter)[0], names, names.config, residual_base=True, allow_unknown=True)
    except AdapterkitError:
        return []
    found = []
    for edit in edits:
        deaf = next((tensor for tensor in edit.target.tensors if ignores(tensor, names.no_lora)), None)
        if deaf is not None:
            found.append((edit.target.parameter, deaf))
    return found
