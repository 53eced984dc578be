"""Which values of a base an adapter is folded onto: as stored, decoded, the 16-bit original, or as training saw them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from adapterkit.adapters.adapter import Adapter
from adapterkit.adapters.load import load_adapter
from adapterkit.checkpoint.checkpoint import Checkpoint
from adapterkit.checkpoint.decoded import dequantized, is_plain
from adapterkit.checkpoint.files import is_gguf
from adapterkit.checkpoint.finders import place_of
from adapterkit.checkpoint.open import is_object, open_checkpoint
from adapterkit.dtypes import BY_LABEL
from adapterkit.errors import NotFound, TargetError, UsageError, option
from adapterkit.values import dataclass

Ref = str | Path


@dataclass(frozen=True)
class Trained:
    """How training quantized the base in memory.

    Attributes:
        grid: ``nf4``, ``fp4`` or ``int8``; None where it did not.
        double: nested scales.
        dtype: in which the base was loaded; ``auto`` for its own.
        skip: ``llm_int8_skip_modules`` of training.
    """

    grid: str | None = None
    double: bool = False
    dtype: str = "auto"
    skip: tuple[str, ...] | None = None


def open_model(ref: Ref | Checkpoint, *, headers_only: bool = False) -> Checkpoint:
    """Open a checkpoint of any format; no tensor is read.

    Args:
        ref: a folder, a safetensors or GGUF file, here or in a store, a registry name, or a Hub id
            ``org/name[@revision]``; an open checkpoint is given back.
        headers_only: for a Hub id, read only the headers, by HTTP range.

    Raises:
        NotFound, CheckpointError, UnsafeError, AuthError, HubError
    """
    if isinstance(ref, Checkpoint):
        return ref
    if is_object(ref, (".gguf",)):
        from adapterkit.gguf.checkpoint import open_gguf

        return open_gguf(ref)
    meant = place_of(ref)
    path = meant.file or Path(meant.place).expanduser()
    if is_gguf(path):
        from adapterkit.gguf.checkpoint import open_gguf

        return open_gguf(meant.file or ref)
    return open_checkpoint(ref, headers_only=headers_only)


def open_adapter(ref: Ref, *, headers_only: bool = False) -> Adapter:
    """Open an adapter of any format: what `load_adapter` opens, or a GGUF LoRA; no tensor is read.

    Raises:
        NotFound, AdapterError, CheckpointError, UnsafeError, AuthError, HubError
    """
    if is_gguf(Path(ref).expanduser()) or is_object(ref, (".gguf",)):
        from adapterkit.gguf.adapter import open_gguf_adapter

        found: Adapter = open_gguf_adapter(ref)
    else:
        found = load_adapter(ref, headers_only=headers_only)
    for source in found.sources:
        source.trained = True
    return found


def open_change(ref: Ref, *, headers_only: bool = False) -> Adapter:
    """Open what `merge` folds in: an adapter of any format, or a whole model that was fine-tuned from the base.

    Raises:
        NotFound, AdapterError, CheckpointError, UnsafeError, AuthError, HubError
    """
    from adapterkit.checkpoint.open import is_model

    try:
        return open_adapter(ref, headers_only=headers_only)
    except NotFound:
        if not is_model(ref, headers_only=headers_only):
            raise
    from adapterkit.adapters.whole_model import as_adapter

    return as_adapter(open_model(ref, headers_only=headers_only))


def open_base(
    base: Ref | Checkpoint,
    *,
    base16: Ref | Checkpoint | None = None,
    trained: Trained | None = None,
    headers_only: bool = False,
) -> tuple[Checkpoint, str]:
    """The base as a view of floating weights, and in a few words which values it has.

    Args:
        base: the base of the merge; when it is quantized, its decoded weights are used.
        base16: the original of a quantized base, to be used in its place.
        trained: quantize and decode what bitsandbytes would have quantized in training.
        headers_only: do not download weights from the Hub.

    Raises:
        UsageError: options that contradict each other.
        TargetError: ``base16`` is not the original of ``base``.
        NotFound, CheckpointError, UnsafeError, AuthError, HubError
    """
    opened = open_model(base, headers_only=headers_only)
    view = dequantized(opened)
    stored = not is_plain(opened) and _says_quantized(opened)
    values = "decoded" if view is not opened else "as stored"
    if base16 is not None:
        original = open_model(base16, headers_only=headers_only)
        view, values = _original(view, original), f"original ({original.ref})"
    if trained is None or trained.grid is None:
        if trained not in (None, Trained()):
            raise UsageError(
                "how training quantized was given, but not to what",
                f"add {option('as_trained', 'nf4')}, or leave the rest out",
            )
        return view, values
    if stored and base16 is None:
        raise UsageError(
            f"{opened.ref} is quantized itself", f"leave out {option('as_trained')}: its decoded weights are used"
        )
    from adapterkit.adapters.as_trained import as_trained
    from adapterkit.adapters.skipped import check_skipped
    from adapterkit.codecs.grid import Grid

    dtype = trained.dtype
    if dtype != "auto" and dtype not in ("bf16", "f16", "f32"):
        raise UsageError(f"'{dtype}' is no dtype that training loads a base in", "use bf16, f16 or f32")
    grid = Grid(trained.grid, trained.double, None if dtype == "auto" else BY_LABEL[dtype])
    check_skipped(view, trained.skip)
    return as_trained(view, grid, skip=trained.skip), f"as trained in {grid}"


def _says_quantized(checkpoint: Checkpoint) -> bool:
    from adapterkit.codecs.table import quantization

    return quantization(checkpoint.config) is not None


def _original(quantized: Checkpoint, original: Checkpoint) -> Checkpoint:
    """``original``, once it has the tensors of ``quantized``."""
    if dequantized(original) is not original:
        raise UsageError(f"{original.ref} is quantized itself", f"give the 16-bit original to {option('base16')}")
    different = sorted(
        name
        for name in quantized.shapes.keys() | original.shapes.keys()
        if quantized.shapes.get(name) != original.shapes.get(name)
    )
    if different:
        name = different[0]
        there, here = original.shapes.get(name), quantized.shapes.get(name)
        raise TargetError(
            f"{original.ref} is not the original of {quantized.ref}: '{name}' is "
            f"{list(there) if there else 'not in it'}, and {list(here) if here else 'not in the quantized base'}",
            "give the base that was quantized",
        )
    notes = (*original.notes, f"folded onto {original.ref} in place of {quantized.ref}")
    sources = (*original.sources, *quantized.sources)
    return replace(original, notes=notes, stored=quantized.stored, sources=sources)
