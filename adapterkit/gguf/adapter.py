"""A GGUF LoRA as an adapter: its modules get the names of PEFT when the base is known."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.adapter import Adapter
from adapterkit.adapters.config import AdapterConfig
from adapterkit.adapters.keys import PREFIX
from adapterkit.errors import AdapterError, option
from adapterkit.gguf.arch.config import Config
from adapterkit.gguf.arch.mapping import Mapper
from adapterkit.gguf.arch.table import spec_of
from adapterkit.gguf.checkpoint import GGUFCheckpoint, open_gguf, source_of
from adapterkit.gguf.lora import ALPHA, INVOCATION, left_out, lora_of, norms_of
from adapterkit.gguf.names import GGUFNames
from adapterkit.gguf.peft import peft_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adapterkit.adapters.names import Names


@dataclass(frozen=True)
class GGUFAdapter(Adapter):
    """A LoRA file of llama.cpp; ``opened`` is the file."""

    opened: GGUFCheckpoint | None = field(default=None, kw_only=True)

    @property
    def needs_names(self) -> bool:
        return True

    def fitted(self, names: Names, config: Mapping[str, Any]) -> Adapter:
        """The PEFT adapter that does the same to a base.

        Raises:
            TargetError: it belongs to another base.
        """
        assert self.opened is not None
        if not isinstance(names, GGUFNames):
            read = Config(config, "the base")
            names = GGUFNames(Mapper(spec_of(read), read), names.checkpoint_shapes, "the base")
        tensors, said = peft_of(self.opened, names)
        named = {tensor.name.removeprefix(PREFIX): tensor for tensor in tensors}
        return Adapter(self.ref, AdapterConfig(said, self.ref), named, self.source, notes=self.notes)


def open_gguf_adapter(ref: str | Path) -> GGUFAdapter:
    """Open a GGUF LoRA; no tensor is read.

    Raises:
        AdapterError: a GGUF file that is no LoRA.
        NotFound, CheckpointError, UnsafeError
    """
    opened = open_gguf(ref)
    if opened.header.get("adapter.type") != "lora":
        raise AdapterError(
            f"{ref} is a GGUF {opened.kind}, and no LoRA",
            f"give an adapter: a folder, or a GGUF made with {option('to', 'gguf-lora')}",
        )
    if opened.header.get(INVOCATION):
        raise AdapterError(
            f"{ref} is an aLoRA, which acts from its invocation tokens on; folded in, it would act on every token",
            f"load it beside the model: llama-server -m BASE.gguf {option('lora')} FILE",
        )
    ranks = [b.shape[-1] for _, b in lora_of(opened.tensors).values()]
    config = {
        "peft_type": "LORA",
        "r": max(ranks, default=1),
        "lora_alpha": opened.header.get(ALPHA, 0.0),
        "base_model_name_or_path": opened.header.get("general.base_model.0.name"),
    }
    norms = norms_of(opened.tensors)
    tensors = {name: tensor for name, tensor in opened.tensors.items() if name not in norms}
    notes = ("read as a GGUF LoRA", *left_out(opened.tensors))
    return GGUFAdapter(
        str(ref), AdapterConfig(config, str(ref)), tensors, source_of(ref, loose=True),
        notes=notes, opened=opened,
    )  # fmt: skip
