"""What a conversion was asked for, and a conversion that is planned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.bases import open_model
from adapterkit.checkpoint.open import locate
from adapterkit.errors import NotFound, UsageError
from adapterkit.verbs.report import ConvertReport

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adapterkit.checkpoint.files import Source
    from adapterkit.checkpoint.plan import Plan
    from adapterkit.checkpoint.tensor import Tensor
    from adapterkit.gguf.checkpoint import GGUFCheckpoint
    from adapterkit.gguf.quantize import Quantization

Ref = str | Path
Progress = Callable[[int, int], None]
Recorder = Callable[[Path], "Mapping[str, bytes]"]
"""Given the finished folder that is not in its place yet, the record to write beside it; see `adapterkit.provenance`."""


@dataclass(frozen=True)
class ConvertOptions:
    """Options of a conversion. A format's row says which of them it takes; another one that is given is an error.

    Attributes:
        base: the base of an adapter: a GGUF file or a Hugging Face folder.
        quantization: the types of a GGUF output, as ``Quantization("Q4_K_M")``.
        max_shard_size: bytes of tensors in each file of a set.
        dtype: of a GGUF made from a Hugging Face model: ``auto``, ``bf16``, ``f16`` or ``f32``.
        pre: the name of its pre-tokenizer; by default recognised.
        plain: an adapter as plain LoRA of one rank and one alpha, whatever it was.
        rank, energy: of a delta that has to be decomposed: at most this rank, or the smallest that keeps this share of its
            squared norm; by default all of it.
        double_quant: nested scales of a 4-bit format.
        skip_modules: modules that stay in 16 bits, in the place of the output layer, as ``llm_int8_skip_modules``.
        calibration: a text file for formats that need one.
        compressor: the Python that has llm-compressor, where that is not this one.
        headers_only: a source on the Hub is not downloaded, so the conversion can be shown but not written.
    """

    base: Ref | None = None
    quantization: Quantization | None = None
    max_shard_size: int | None = None
    dtype: str = "auto"
    pre: str | None = None
    plain: bool = False
    rank: int | None = None
    energy: float | None = None
    double_quant: bool = False
    skip_modules: tuple[str, ...] = ()
    calibration: Path | None = None
    compressor: Path | None = None
    headers_only: bool = False

    def given(self) -> set[str]:
        """The names of the options that differ from their defaults."""
        given = {one.name for one in fields(self) if getattr(self, one.name) != one.default}
        return given - {"headers_only"}

    def need_base(self, form: str) -> Ref:
        """The base.

        Raises:
            UsageError: none was given.
        """
        if self.base is None:
            raise UsageError(f"converting to {form} needs the base", "add --base BASE")
        return self.base


@dataclass(frozen=True)
class Run:
    """How a conversion is written: ``record`` makes the files beside it, for the rest see `convert`."""

    record: Recorder | None = None
    jobs: int | None = None
    force: bool = False
    resume: bool = False
    progress: Progress | None = None


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

    @property
    def peak_memory(self) -> int:
        """The estimate, in bytes."""
        return self.plan.peak_memory

    def record(self) -> Callable[[Path], dict[str, bytes]] | None:
        """What writes ``adapterkit.json`` beside the output, if anything does."""
        return None

    def write(self, out: Path, run: Run) -> dict[str, Any]:
        """Write it, whole or not at all, with the files of its record; what the report says beyond the plan.

        Raises:
            OutputError, CheckpointError, UnsafeError
        """
        from adapterkit.checkpoint.write import check_output, write_safetensors

        check_output(self.plan, self.sources, out, force=run.force)
        reused = write_safetensors(
            self.plan,
            self.tensors,
            self.sources,
            out,
            side_files=self.side,
            record=run.record or self.record(),
            jobs=run.jobs,
            force=run.force,
            resume=run.resume,
            progress=run.progress,
        )
        return {"reused": reused}

    def report(self, out: Ref, **measured: Any) -> ConvertReport:
        planned: dict[str, Any] = {
            "files": tuple(path.name for path in self.plan.targets(Path(out)).values()),
            "nbytes": self.plan.nbytes,
            "tensors": len(self.plan.steps),
            "copied": sum(1 for step in self.plan.steps if step.source is not None),
            "types": self.types,
            "notes": self.notes,
        }
        return ConvertReport(src=self.src, out=str(out), to=self.to, **(planned | measured))


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
