"""What a conversion was asked for, and a conversion that is planned."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.bases import open_model
from adapterkit.checkpoint.open import locate
from adapterkit.errors import NotFound, UsageError
from adapterkit.report import ConvertReport

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adapterkit.checkpoint.files import Source
    from adapterkit.checkpoint.plan import Plan
    from adapterkit.checkpoint.tensor import Tensor
    from adapterkit.gguf.checkpoint import GGUFCheckpoint
    from adapterkit.gguf.quantize import Quantization

Ref = str | Path


@dataclass(frozen=True)
class ConvertOptions:
    """Options of a conversion. A format's row says which of them it takes; another one that is given is an error.

    Attributes:
        base: the base of an adapter: a GGUF file or a Hugging Face folder.
        quantization: the types of a GGUF output, as ``Quantization("Q4_K_M")``.
        max_shard_size: bytes of tensors in each file of a set.
    """

    base: Ref | None = None
    quantization: Quantization | None = None
    max_shard_size: int | None = None

    def given(self) -> set[str]:
        """The names of the options that differ from their defaults."""
        return {one.name for one in fields(self) if getattr(self, one.name) != one.default}

    def need_base(self, form: str) -> Ref:
        """The base.

        Raises:
            UsageError: none was given.
        """
        if self.base is None:
            raise UsageError(f"converting to {form} needs the base", "add --base BASE")
        return self.base


@dataclass(frozen=True)
class Conversion:
    """A conversion that is planned: everything is checked, no tensor is read.

    Attributes:
        src: what is converted.
        to: the format.
        plan: what the sink will write, from ``tensors`` and ``sources``.
        side: small files beside the weights, where the output is a folder.
    """

    src: str
    to: str
    plan: Plan
    tensors: Mapping[str, Tensor]
    sources: tuple[Source, ...]
    types: dict[str, int]
    side: dict[str, bytes]
    notes: tuple[str, ...] = ()

    def report(self, out: Ref, **measured: Any) -> ConvertReport:
        return ConvertReport(
            src=self.src,
            out=str(out),
            to=self.to,
            files=tuple(path.name for path in self.plan.targets(Path(out)).values()),
            nbytes=self.plan.nbytes,
            tensors=len(self.plan.steps),
            copied=sum(1 for step in self.plan.steps if step.source is not None),
            types=self.types,
            notes=self.notes,
            **measured,
        )


def gguf_file(src: Ref) -> GGUFCheckpoint | None:
    """The GGUF file that ``src`` names, or None where it names something else.

    Raises:
        NotFound: there is no such file or folder.
        CheckpointError, UnsafeError, AuthError, HubError
    """
    from adapterkit.gguf.checkpoint import GGUFCheckpoint

    path = Path(src).expanduser()
    if path.is_file():
        opened = open_model(src)
        return opened if isinstance(opened, GGUFCheckpoint) else None
    if not path.exists():
        locate(src, headers_only=True)
        raise NotFound(f"{src} is not a file here", "download it first")
    return None


def count_types(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """How many tensors have each type."""
    return dict(Counter(tensor.dtype.code for tensor in tensors.values()).most_common())
