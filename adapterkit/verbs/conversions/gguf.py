"""To a GGUF model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from adapterkit.errors import NotFound, UsageError, option
from adapterkit.requests.convert import ConvertRequest
from adapterkit.verbs.conversions.conversion import Conversion

if TYPE_CHECKING:
    from adapterkit.gguf.metadata import Entry
    from adapterkit.verbs.job import Job


def plan(asked: ConvertRequest, jobs: int) -> Conversion:
    """A Hugging Face model as GGUF; or a GGUF model in other types, or in parts of another size."""
    from adapterkit.bases import open_model
    from adapterkit.gguf.checkpoint import GGUFCheckpoint

    src: Any = asked.src
    try:
        opened = open_model(src)
    except NotFound as error:
        if "is an adapter" not in error.message:
            raise
        road = "add --to gguf-lora --base BASE, or merge it: adapterkit merge BASE ADAPTER -o OUT.gguf"
        raise UsageError(f"{src} is an adapter, not a model", road) from None
    if not isinstance(opened, GGUFCheckpoint):
        return _of_hf(opened, asked, jobs)
    if asked.makes_tower:
        raise UsageError(
            f"{src} is a GGUF file, which holds no tower",
            f"give the Hugging Face model it was made from, or leave out {option('mmproj', 'auto')}",
        )
    if asked.dtype != "auto" or asked.pre is not None:
        raise UsageError(f"{src} is a GGUF file, with types and a tokenizer of its own", f"use {option('quant')} alone")
    for name in ("as_reranker", "allow_approximate", "dense_modules"):
        if getattr(asked, name):
            raise UsageError(f"{src} is a GGUF file, which is a model of its kind", f"leave out {option(name)}")
    return _of_gguf(opened, asked, jobs)


def _of_gguf(opened: Any, request: ConvertRequest, jobs: int) -> Conversion:
    from adapterkit.gguf.plan import FileLayout, plan_gguf
    from adapterkit.gguf.prune import layers_of, pruned
    from adapterkit.gguf.quantize import Quantization, typed
    from adapterkit.gguf.said import with_said

    if opened.kind != "model":
        raise UsageError(
            f"{opened.ref} is a GGUF {opened.kind}, not a model", f"add {option('to', 'peft')}, or give a model"
        )
    asked = request.types or Quantization()
    changed: list[Entry] = []
    if request.vocab_only:
        raise UsageError(
            f"the tokenizer alone is written of a Hugging Face model, and {opened.ref} is a GGUF file",
            f"leave out {option('vocab_only', True)}",
        )
    if request.prune_layers is not None:
        if asked.imatrix is not None:
            raise UsageError(
                "an importance matrix is of all layers, and some are left out",
                f"leave out the layers first, then add {option('imatrix')} to the next conversion",
            )
        opened, changed = pruned(opened, layers_of(request.prune_layers))
    found = typed(opened, opened, asked)
    layout = FileLayout(found.tensors, found.entries, opened.header.alignment, opened.sources[0])
    stated = {"verb": "convert", **asked.request()}
    layout = with_said(with_said(layout, changed), request.said)
    planned = plan_gguf(layout, max_shard_size=request.shard_size, jobs=jobs, request=stated)
    tensors = {tensor.name: tensor for tensor in found.tensors}
    return Conversion(opened.ref, "gguf", planned, tensors, opened.sources, found.types, {}, found.notes)


def _of_hf(opened: Any, request: ConvertRequest, jobs: int) -> Conversion:
    from adapterkit.checkpoint.decoded import dequantized
    from adapterkit.gguf.arch.dense_modules import with_dense
    from adapterkit.gguf.from_hf import from_hf
    from adapterkit.gguf.plan import plan_gguf
    from adapterkit.gguf.quantize import FILE_TYPE, QUANTIZATION_VERSION, Quantization
    from adapterkit.gguf.said import with_said
    from adapterkit.gguf.towers.make import from_tower
    from adapterkit.requests.merge import parse_floats
    from adapterkit.verbs.tower import tower_job

    if request.prune_layers is not None:
        raise UsageError(
            f"layers are left out of a GGUF file, and {opened.ref} is none",
            f"convert it first, without {option('prune_layers')}",
        )
    if request.dense_modules:
        opened = with_dense(opened)
    view = dequantized(opened)
    asked = request.types or Quantization()
    if request.vocab_only and (request.types is not None or request.makes_tower or request.as_reranker):
        raise UsageError(
            f"{option('vocab_only', True)} writes no tensors", "leave out what says how tensors are written"
        )
    files = {file.name: file.bytes() for file in view.side_files}
    also: tuple[Job, ...] = ()
    held: frozenset[str] = frozenset()
    if request.makes_tower:
        tower = from_tower(view, base=view, config=view.config, files=files, dtype=parse_floats(request.dtype))
        held = tower.held
        if request.target is not None:
            settings = {"jobs": jobs, "request": {"verb": "convert", "dtype": request.dtype}}
            also = (tower_job(tower, request.target, opened.sources, settings, force=request.force),)
    made = from_hf(
        view,
        base=view,
        config=view.config,
        files=files,
        asked=asked,
        dtype=parse_floats(request.dtype),
        pre=request.pre,
        approximate=tuple(request.allow_approximate),
        as_reranker=request.as_reranker,
        elsewhere=held,
    )
    stated = {"verb": "convert", "dtype": request.dtype, "pre": request.pre, **asked.request()}
    if request.vocab_only:
        without = tuple(one for one in made.layout.entries if one.key not in (FILE_TYPE, QUANTIZATION_VERSION))
        made = replace(made, layout=replace(made.layout, tensors=(), entries=without), types={})
    planned = plan_gguf(
        with_said(made.layout, request.said), max_shard_size=request.shard_size, jobs=jobs, request=stated
    )
    notes = (*view.notes, *made.notes)
    return Conversion(opened.ref, "gguf", planned, made.tensors, opened.sources, made.types, {}, notes, also=also)
