"""`imatrix`: run a model over a text, and write how much each input column of each weight matters for quantizing it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.checkpoint.limits import IN_TRANSFORMERS, MAPPED, check_memory
from adapterkit.checkpoint.plan import BASELINE_MEMORY
from adapterkit.dtypes import BF16, F16, F32, FLOATS
from adapterkit.errors import CheckpointError, UsageError, counted, option
from adapterkit.ops.device import CPU, check_there
from adapterkit.ops.device import opened as open_device
from adapterkit.packages import need
from adapterkit.places import Address, address_of, writable
from adapterkit.stores.files import brought, copied, making, reading
from adapterkit.verbs.plain_text import read_text, text_ids

if TYPE_CHECKING:
    import torch

    from adapterkit.adapters.names import Names
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.checkpoint.files import Source
    from adapterkit.checkpoint.tensor import Tensor

Progress = Callable[[int, int], None]
CHUNK = 512  # tokens, as llama-imatrix


@dataclass(frozen=True)
class ImatrixReport:
    """What was gathered.

    Attributes:
        tensors: weights that the file has values for.
        chunks, chunk: how many stretches of how many tokens the model ran over.
        computed: the dtype of activations, as ``f32``.
        missing: weights that nothing was multiplied by.
    """

    model: str
    out: str
    text: str
    tensors: int
    chunks: int
    chunk: int
    computed: str = ""
    missing: tuple[str, ...] = ()
    seconds: float = 0.0
    notes: tuple[str, ...] = ()


def imatrix(
    model: str | Path,
    text: str | Path | Address,
    out: str | Path | Address,
    *,
    chunk: int = CHUNK,
    chunks: int | None = None,
    dtype: str = "auto",
    device: str = CPU,
    force: bool = False,
    progress: Progress | None = None,
) -> ImatrixReport:
    """Gather an importance matrix with transformers, and write it as llama-imatrix would.

    The text is cut into chunks; each begins with the token that the tokenizer puts before texts, and is run alone.

    Args:
        model: a Hugging Face folder (merged, if adapters are to be in it), a GGUF file, a registry name or a Hub id. A GGUF
            file is decoded to a folder beside ``out`` for as long as the model runs.
        text: a file of plain text like what the model will see.
        out: the ``.gguf`` to make; it appears whole or not at all.
        chunk: tokens at a time.
        chunks: at most so many; by default all of the text.
        dtype: to compute in: ``bf16``, ``f16`` or ``f32``, which weights have in memory too. ``auto`` is float32 on the CPU,
            on weights that stay in memory as they are stored (a quantized model: its own), and the model's own on a device.
        device: where the model runs: cpu, cuda, cuda:1, mps. Sums are as far those of the CPU as the dtype computes.
        force: replace an existing output.
        progress: called with chunks done and chunks in all.

    Raises:
        NotFound, UsageError: no such file, too little text, or a device that is not there.
        CheckpointError, TargetError: a model that transformers cannot run here, or that GGUF has no names for.
        OutputError
    """
    check_memory(
        BASELINE_MEMORY, str(out), mapped=MAPPED + IN_TRANSFORMERS
    )  # torch, which is imported here, aborts where it gets too little
    from adapterkit.bases import open_model
    from adapterkit.checkpoint.files import check_unchanged
    from adapterkit.checkpoint.publish import check_output
    from adapterkit.gguf.activations import in_gguf
    from adapterkit.gguf.checkpoint import GGUFCheckpoint
    from adapterkit.gguf.plan import plan_gguf

    started = time.monotonic()
    check_there(device)
    place = writable(out, "the output", "file")
    again = partial(imatrix, text=text, chunk=chunk, chunks=chunks, dtype=dtype, device=device, progress=progress)
    if isinstance(place, Address):
        with making(place, force=force) as path:
            made = again(model, out=path)
        return replace(made, out=str(place))
    if chunk < 2:
        raise UsageError(f"a chunk of {chunk} tokens says nothing", f"use {option('chunk', 512)}")
    with reading(text) as here:
        said = read_text(here)
    address = address_of(model)
    if address is not None and address.suffix != ".gguf":
        # transformers loads folders of this machine, also where a file in one is named.
        name = address.name if address.suffix == ".safetensors" else ""
        _check_loaded(address, name)
        with copied(address.parent if name else address, wanted=lambda one: _is_loaded(one, alone=bool(name))) as lent:
            found_here = again(lent / name, out=place, force=force)
        return replace(found_here, model=str(address), seconds=time.monotonic() - started)
    opened = open_model(model)
    _check_loaded(opened.ref, "" if Path(opened.ref).is_dir() else Path(opened.ref).name)
    if isinstance(opened, GGUFCheckpoint):
        nothing = _layout({}, [str(text)], 0, chunk)
        check_output(plan_gguf(nothing), opened.sources, place, force=force)  # before a folder is made for nothing
        with _as_folder(model, place) as folder:
            found_there = again(folder, out=out, force=force)
        return replace(found_there, model=opened.ref, seconds=time.monotonic() - started)
    names, shapes, arrays = _maps(opened)
    # The plan is made again when the values are there; this one has the same sizes, and finds out what cannot be written.
    blank = _layout({name: _zeros(array.shape) for name, array in arrays.items()}, [str(text)], 0, chunk)
    check_output(plan_gguf(blank), opened.sources, place, force=force)
    sums, done, computed = _run(opened, names, said, (chunk, chunks), (dtype, device), progress)
    check_unchanged(opened.sources)
    found = in_gguf(sums, names, shapes, arrays)
    if not found:
        raise CheckpointError(
            f"{opened.ref}: nothing was seen of its weights", "give the model in 16 bits, not quantized by a library"
        )
    layout = _layout(found, [str(text)], done, chunk)
    _write(layout, (), place, force)
    missing = tuple(name for name in arrays if name not in found)
    notes: tuple[str, ...] = (
        ()
        if not missing
        else (
            f"{counted(len(missing), 'weight was', 'weights were')} not seen, as {missing[0]}; no values are written there",
        )
    )
    unused = sum(bool((counts == 0).any()) for _, counts in found.values())
    if unused:
        notes += (f"{unused} stacks have experts that no token of this text was sent to; use more text",)
    if device != CPU:
        facts = open_device(device).said()
        notes += (f"run on {device} ({facts['name']}): sums are the CPU's but for rounding",)
    seconds = time.monotonic() - started
    return ImatrixReport(opened.ref, str(out), str(text), len(found), done, chunk, computed, missing, seconds, notes)


def _check_loaded(ref: str | Address, file: str) -> None:
    """See that a safetensors file that was named, if one was, is what transformers loads of its folder.

    Raises:
        UsageError
    """
    from adapterkit.checkpoint.folder import SINGLE

    if file.endswith(".safetensors") and file != SINGLE:
        raise UsageError(
            f"{ref}: transformers runs the model, and of a folder it loads {SINGLE} or what an index names",
            f"name the folder, or call the file {SINGLE} in a folder of its own",
        )


def _is_loaded(name: str, *, alone: bool) -> bool:
    """Whether transformers may read an object of a model's folder; where a file in it was named, others may lie below it."""
    parts = name.split("/")
    return not any(part.startswith(".") for part in parts) and not (alone and len(parts) > 1)


@contextmanager
def _as_folder(model: str | Path, out: Path) -> Iterator[Path]:
    """A GGUF file as a Hugging Face folder, for as long as it is needed."""
    from adapterkit.verbs.convert import convert

    place = out.absolute().parent
    with tempfile.TemporaryDirectory(prefix=".adapterkit-imatrix-", dir=place if place.is_dir() else None) as lent:
        convert(model, Path(lent) / "hf", to="hf")
        yield Path(lent) / "hf"


def added(files: Sequence[str | Path | Address], out: str | Path | Address, *, force: bool = False) -> ImatrixReport:
    """Add importance matrices of one model up, as `llama-imatrix --in-file A --in-file B` does.

    Args:
        files: GGUF matrices, of other texts or of other parts of one.
        out: the ``.gguf`` to make; it appears whole or not at all.
        force: replace an existing output.

    Raises:
        NotFound, CheckpointError: no such file, no such matrix, or those of different models.
        UsageError: fewer than two.
        OutputError
    """
    from adapterkit.gguf.importance import add_up

    started = time.monotonic()
    if len(files) < 2:
        raise UsageError("one matrix is nothing to add up", f"give {option('in_file')} at least twice")
    place = writable(out, "the output", "file")
    if isinstance(place, Address):
        with making(place, force=force) as path:
            made = added(files, path)
        return replace(made, out=str(place))
    sums = add_up([brought(one) for one in files])
    layout = _layout(sums.found, sums.datasets, sums.chunks, sums.chunk)
    _write(layout, sums.sources, place, force)
    seconds = time.monotonic() - started
    text = ", ".join(sums.datasets)
    return ImatrixReport("", str(out), text, len(sums.found), sums.chunks, sums.chunk, seconds=seconds)


def _maps(opened: Checkpoint) -> tuple[Any, dict[str, tuple[int, ...]], dict[str, Any]]:
    """Names of parameters, shapes of tensors, and the weights of layers as GGUF has them."""
    from adapterkit.adapters.names import Names
    from adapterkit.checkpoint.decoded import dequantized
    from adapterkit.gguf.arch.config import Config
    from adapterkit.gguf.arch.mapping import Mapper
    from adapterkit.gguf.arch.table import spec_of

    view = dequantized(opened)
    config = Config(view.config, view.ref)
    mapped = Mapper(spec_of(config), config).to_gguf(view.shapes, view.ref)
    weights = {
        name: array
        for name, array in mapped.arrays.items()
        if name.startswith("blk.") and name.endswith(".weight") and len(array.shape) > 1 and "_norm." not in name
    }
    return Names(view.shapes, view.config), view.shapes, weights


def _run(
    opened: Checkpoint,
    names: Names,
    said: str,
    size: tuple[int, int | None],
    where: tuple[str, str],
    progress: Progress | None,
) -> tuple[dict[str, Any], int, str]:
    """Sums by parameter, how many chunks the model ran over, and the dtype of what it computed."""
    import torch

    need("transformers", "tokenizers", what="imatrix runs the model in transformers", extra="demo")
    from transformers import AutoTokenizer

    from adapterkit.gguf.activations import Activations
    from adapterkit.gguf.as_float32 import AsFloat32

    folder = opened.sources[0].path
    assert folder is not None
    (chunk, most), (dtype, place) = size, where
    there = open_device(place)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder.parent)
        kept = dtype == "auto" and there.here and not _by_library(opened.config)
        model = _loaded(folder.parent, dtype, partial(_stored, opened, names) if kept else None)
    except (ImportError, OSError, RuntimeError, ValueError, KeyError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise CheckpointError(
            f"transformers cannot load {opened.ref} ({reason})", "give a model that it can run"
        ) from None
    first, ids = text_ids(tokenizer, said)
    count = len(ids) // chunk
    if most is not None:
        count = min(count, most)
    if count < 1:
        message = f"the text has {len(ids)} tokens, fewer than one chunk of {chunk}"
        raise UsageError(message, f"give more text, or a smaller {option('chunk')}")
    if not there.here:
        model.to(there.place)
    gathering, wide = Activations(model), AsFloat32(model.parameters() if kept else ())
    with torch.no_grad(), there.models():
        for number in range(count):
            row = ids[number * chunk : (number + 1) * chunk]
            if first is not None:
                row[0] = first
            with wide, gathering:
                model(input_ids=there.up(torch.tensor([row])), use_cache=False, logits_to_keep=1)
            if progress is not None:
                progress(number + 1, count)
    with wide:
        found = model.dtype
    computed = next((row.label for row in FLOATS if row.torch == found), str(found).removeprefix("torch."))
    return gathering.sums, count, computed


def _by_library(config: Mapping[str, Any]) -> bool:
    """Whether a model is quantized: it computes as its library has it."""
    from adapterkit.codecs.table import quantization

    return quantization(config) is not None


def _loaded(folder: Path, dtype: str, stored: Callable[[str], torch.dtype] | None) -> Any:
    """The model, in one dtype, or each parameter as it is stored."""
    from adapterkit.requests.merge import parse_floats
    from adapterkit.verbs.stored_model import load_stored

    if stored is not None:
        return load_stored(folder, stored, experts_implementation="eager").eval()
    from transformers import AutoModelForCausalLM

    floats = parse_floats(dtype)
    asked = "auto" if floats is None else floats.torch
    return AutoModelForCausalLM.from_pretrained(folder, dtype=asked, experts_implementation="eager").eval()


def _stored(opened: Checkpoint, names: Names, parameter: str) -> torch.dtype:
    """The dtype that a parameter has in the files, if it is one of 16 bits; else float32, which holds it."""
    target = names.find(parameter) or names.find(names.tied(parameter) or "")
    found = {opened[piece.tensor].dtype for piece in target.pieces} if target is not None else set()
    return (found.pop() if len(found) == 1 and found <= {BF16, F16} else F32).torch


def _zeros(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    matrices = shape[0] if len(shape) == 3 else 1
    return torch.zeros(matrices, shape[-1]), torch.zeros(matrices)


def _write(layout: Any, sources: Sequence[Source], place: Path, force: bool) -> None:
    from adapterkit.checkpoint.write import Writing, write_together
    from adapterkit.gguf.plan import plan_gguf

    tensors: dict[str, Tensor] = {one.name: one for one in layout.tensors}
    planned = plan_gguf(layout, request={"verb": "imatrix"})
    write_together([Writing(planned, tensors, tuple(sources), place)], force=[force])


def _layout(found: dict[str, tuple[torch.Tensor, torch.Tensor]], texts: Sequence[str], done: int, chunk: int) -> Any:
    """The file, keys and order as llama-imatrix has them."""
    from adapterkit.gguf.imatrix import COUNTS, SUMS
    from adapterkit.gguf.lora import PlannedFactor
    from adapterkit.gguf.metadata import array, u32
    from adapterkit.gguf.metadata import text as string
    from adapterkit.gguf.plan import FileLayout
    from adapterkit.gguf.reader import STRING

    entries = [
        string("general.type", "imatrix"),
        array("imatrix.datasets", STRING, list(texts)),
        u32("imatrix.chunk_count", done),
        u32("imatrix.chunk_size", chunk),
    ]
    tensors = []
    for name in sorted(found):
        squares, counts = found[name]
        one = len(counts) == 1  # ggml leaves out a last dimension of 1
        tensors.append(PlannedFactor(name + SUMS, squares[0].float() if one else squares.float(), "activations"))
        tensors.append(PlannedFactor(name + COUNTS, counts.float() if one else counts.float()[:, None], "activations"))
    return FileLayout(tensors, entries)
