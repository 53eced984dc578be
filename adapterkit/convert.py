"""`convert`: the same content in another format, in one streaming pass."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.bases import open_model
from adapterkit.checkpoint.open import locate
from adapterkit.checkpoint.plan import Plan, default_jobs, parse_size
from adapterkit.errors import NotFound, UsageError
from adapterkit.report import ConvertReport

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adapterkit.checkpoint.files import Source
    from adapterkit.checkpoint.tensor import Tensor
    from adapterkit.gguf.quantize import Quantization

Ref = str | Path
Progress = Callable[[int, int], None]
FORMATS = ("gguf", "gguf-lora", "peft")


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
            files=tuple(file.name for file in self.plan.files),
            nbytes=self.plan.nbytes,
            tensors=len(self.plan.steps),
            copied=sum(1 for step in self.plan.steps if step.source is not None),
            types=self.types,
            notes=self.notes,
            **measured,
        )


def plan_convert(
    src: Ref,
    *,
    to: str | None = None,
    out: Ref | None = None,
    base: Ref | None = None,
    quantization: Quantization | None = None,
    max_shard_size: str | None = None,
    jobs: int | None = None,
) -> Conversion:
    """Plan a conversion from headers alone; see `convert` for the arguments."""
    form = to or _form_of(out)
    if form not in FORMATS:
        raise UsageError(f"'{form}' is no format to convert to", f"use one of {', '.join(FORMATS)}")
    if form != "gguf" and quantization is not None and quantization.request() != type(quantization)().request():
        raise UsageError(f"options of a quantization mean nothing for {form}", "leave them out")
    limit = None if max_shard_size is None else parse_size(max_shard_size)
    workers = jobs or default_jobs()
    if form == "gguf":
        return _plan_gguf(src, quantization, limit, workers)
    if base is None:
        raise UsageError(f"converting to {form} needs the base", "add --base BASE")
    if form == "gguf-lora":
        return _plan_lora(src, base, limit, workers)
    return _plan_peft(src, base, workers)


def _form_of(out: Ref | None) -> str:
    if out is not None and Path(out).suffix == ".gguf":
        return "gguf"
    raise UsageError("the output does not say its format", f"add --to, one of {', '.join(FORMATS)}")


def _plan_gguf(src: Ref, asked: Quantization | None, limit: int | None, jobs: int) -> Conversion:
    from adapterkit.gguf.checkpoint import GGUFCheckpoint
    from adapterkit.gguf.plan import Layout, plan_gguf
    from adapterkit.gguf.quantize import Quantization, typed

    opened = open_model(src) if Path(src).expanduser().is_file() else None
    if not isinstance(opened, GGUFCheckpoint):
        _must_exist(src)
        raise UsageError(f"{src} is not a GGUF file", "convert the model to a 16-bit GGUF first")
    if opened.kind != "model":
        raise UsageError(f"{src} is a GGUF {opened.kind}, not a model", "add --to peft, or give a model")
    asked = asked or Quantization()
    found = typed(opened, opened, asked)
    layout = Layout(found.tensors, found.entries, opened.header.alignment, opened.sources[0])
    plan = plan_gguf(layout, max_shard_size=limit, jobs=jobs, request={"verb": "convert", **asked.request()})
    tensors = {tensor.name: tensor for tensor in found.tensors}
    return Conversion(opened.ref, "gguf", plan, tensors, opened.sources, found.types, {}, found.notes)


def _plan_lora(src: Ref, base: Ref, limit: int | None, jobs: int) -> Conversion:
    from adapterkit.adapters.adapter import load_adapter
    from adapterkit.gguf.hf import gguf_names
    from adapterkit.gguf.lora import lora_tensors
    from adapterkit.gguf.plan import Layout, plan_gguf

    if limit is not None:
        raise UsageError("llama.cpp loads a LoRA from one file", "leave out --max-shard-size")
    adapter = load_adapter(src)
    tensors, entries = lora_tensors(adapter, gguf_names(open_model(base, headers_only=True)))
    plan = plan_gguf(Layout(tensors, entries), jobs=jobs, request={"verb": "convert", "to": "gguf-lora"})
    handles = {tensor.name: tensor for tensor in tensors}
    return Conversion(
        adapter.ref, "gguf-lora", plan, handles, (adapter.source,), count_types(handles), {}, adapter.notes
    )


def _plan_peft(src: Ref, base: Ref, jobs: int) -> Conversion:
    import json
    from dataclasses import replace

    from adapterkit.adapters.adapter import WEIGHTS
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.checkpoint.folder import ADAPTER_CONFIG
    from adapterkit.checkpoint.plan import plan_safetensors
    from adapterkit.gguf.checkpoint import GGUFCheckpoint
    from adapterkit.gguf.peft import to_peft

    opened = open_model(src) if Path(src).expanduser().is_file() else None
    if not isinstance(opened, GGUFCheckpoint):
        _must_exist(src)
        raise UsageError(f"{src} is not a GGUF LoRA", "give the .gguf file")
    tensors, config = to_peft(opened, open_model(base, headers_only=True))
    handles = {tensor.name: tensor for tensor in tensors}
    view = Checkpoint(opened.ref, handles, dict.fromkeys(handles, WEIGHTS), sources=opened.sources)
    plan = plan_safetensors(view, jobs=jobs, request={"verb": "convert", "to": "peft"})
    plan = replace(plan, files=(replace(plan.files[0], name=WEIGHTS),))
    side = {ADAPTER_CONFIG: (json.dumps(config, indent=2) + "\n").encode()}
    return Conversion(opened.ref, "peft", plan, handles, opened.sources, count_types(handles), side)


def _must_exist(src: Ref) -> None:
    if not Path(src).expanduser().exists():
        locate(src, headers_only=True)
        raise NotFound(f"{src} is not a file here", "download it first")


def convert(
    src: Ref,
    out: Ref,
    *,
    to: str | None = None,
    base: Ref | None = None,
    quantization: Quantization | None = None,
    max_shard_size: str | None = None,
    jobs: int | None = None,
    force: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> ConvertReport:
    """Write the same content in another format; nothing is loaded whole.

    Args:
        src: a GGUF model or a GGUF LoRA, or a PEFT adapter.
        out: the file or folder to make; it appears whole or not at all.
        to: ``gguf``, ``gguf-lora`` or ``peft``; by default what the suffix of ``out`` says.
        base: the base of an adapter: a GGUF file or a Hugging Face folder.
        quantization: the types of a GGUF output, as ``Quantization("Q4_K_M")``.
        max_shard_size: like ``5GB``; a GGUF output is written as a set of parts of that size.
        jobs: worker threads; the output bytes do not depend on it.
        force: replace an existing output.
        resume: continue an interrupted run, and leave the same behind if interrupted.
        progress: called now and then with bytes done and bytes in all.

    Raises:
        NotFound, CheckpointError, AdapterError, TargetError, OutputError, UsageError, UnsafeError
    """
    from adapterkit.checkpoint.write import check_output, write_safetensors
    from adapterkit.merge import peak_memory

    started = time.monotonic()
    planned = plan_convert(
        src, to=to, out=out, base=base, quantization=quantization, max_shard_size=max_shard_size, jobs=jobs
    )
    target = Path(out)
    check_output(planned.plan, planned.sources, target, force=force)
    reused = write_safetensors(
        planned.plan,
        planned.tensors,
        planned.sources,
        target,
        side_files=planned.side,
        jobs=jobs,
        force=force,
        resume=resume,
        progress=progress,
    )
    return planned.report(out, reused=reused, seconds=time.monotonic() - started, peak_memory=peak_memory())


def count_types(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """How many tensors have each type."""
    return dict(Counter(tensor.dtype.code for tensor in tensors.values()).most_common())
