"""An adapter: a config and named tensors, opened but not read."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.checkpoint.folder import ADAPTER_WEIGHTS
from adapterkit.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adapterkit.adapters.config import AdapterConfig
    from adapterkit.adapters.formats.contents import Contents
    from adapterkit.adapters.names import Names
    from adapterkit.checkpoint.checkpoint import SideFile
    from adapterkit.checkpoint.files import Source
    from adapterkit.checkpoint.tensor import Tensor

WEIGHTS = ADAPTER_WEIGHTS


@dataclass(frozen=True)
class Adapter:
    """One adapter.

    Attributes:
        ref: what the user called it.
        config: its ``adapter_config.json``.
        tensors: handles by key, without the ``base_model.model.`` prefix.
        source: the weight file.
        side_files: tokenizer and chat template, if it brings its own.
        commit: the Hub commit it was read from.
        notes: what a user should know about how it was read.
        shards: the other weight files, where it has several.
        contents: of a single file, its modules before a base is known.
        only: parts of a pipeline that were asked for by name.
        left: what of it was left out, and why.
    """

    ref: str
    config: AdapterConfig
    tensors: Mapping[str, Tensor]
    source: Source
    side_files: tuple[SideFile, ...] = ()
    commit: str | None = None
    notes: tuple[str, ...] = field(default=())
    shards: tuple[Source, ...] = field(default=())
    contents: Contents | None = field(default=None, repr=False, compare=False)
    only: tuple[str, ...] = ()
    left: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether it is a whole model, see `adapterkit.adapters.whole_model`."""
        return False

    @property
    def needs_names(self) -> bool:
        """Whether only the base says which modules its tensors belong to."""
        return False

    def fitted(self, names: Names, config: Mapping[str, Any]) -> Adapter:
        """The adapter with the module names of a base, for files that have names of their own.

        Args:
            names, config: of the base.
        """
        return self

    @property
    def sources(self) -> tuple[Source, ...]:
        """Every weight file."""
        return (self.source, *self.shards)

    @property
    def parameters(self) -> int:
        """Elements of all its tensors."""
        return sum(tensor.numel for tensor in self.tensors.values())

    @property
    def folder(self) -> Path | None:
        """The folder that is the adapter; None for a loose file, and for one that is read from the Hub by range."""
        return None if self.source.path is None or self.source.loose else self.source.path.parent

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())
