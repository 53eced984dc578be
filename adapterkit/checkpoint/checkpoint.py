"""A checkpoint: a lazy, read-only mapping of tensors, with its config and side files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import field
from typing import TYPE_CHECKING, Any, ClassVar

from adapterkit.values import dataclass

if TYPE_CHECKING:
    from adapterkit.checkpoint.files import Source
    from adapterkit.checkpoint.tensor import Tensor
    from adapterkit.codecs.codec import Weight


@dataclass(frozen=True)
class SideFile:
    """A file that travels with the weights: config, tokenizer, chat template. ``name`` is a relative posix path."""

    name: str
    source: Source

    def bytes(self) -> bytes:
        return self.source.read(0, self.source.size)


@dataclass(frozen=True)
class StoredForm:
    """What a view of decoded weights was decoded from.

    Attributes:
        checkpoint: as it lies on disk.
        weights: its quantized weights, by the names that they have when decoded.
    """

    checkpoint: Checkpoint
    weights: Mapping[str, Weight]


@dataclass(frozen=True)
class Checkpoint(Mapping[str, "Tensor"]):
    """Tensors by name, in the order of their files.

    Attributes:
        ref: what the user called it.
        tensors: name to handle.
        shards: name of a tensor to the file that held it (the base's own sharding).
        config: ``config.json`` as data, empty when there is none.
        side_files: everything else worth carrying over.
        metadata: the string metadata of the first weight file.
        commit: the Hub commit it was read from.
        sources: the weight files.
        notes: what a user should know about how it was read.
        index: the file that says which shard holds which tensor, where there is one.
        stored: of a view of decoded weights, what it was decoded from.
    """

    format: ClassVar[str] = "safetensors"
    ref: str
    tensors: Mapping[str, Tensor]
    shards: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    side_files: tuple[SideFile, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    commit: str | None = None
    sources: tuple[Source, ...] = ()
    notes: tuple[str, ...] = ()
    index: SideFile | None = None
    stored: StoredForm | None = None

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return sum(tensor.numel for tensor in self.tensors.values())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def side_file(self, name: str) -> SideFile | None:
        return next((file for file in self.side_files if file.name == name), None)
