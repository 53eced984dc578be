"""To the folder that transformers loads: plain weights of one dtype, or quantized as bitsandbytes and transformers do it."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.bases import open_model
from adapterkit.checkpoint.checkpoint import Checkpoint, SideFile
from adapterkit.checkpoint.decoded import dequantized
from adapterkit.checkpoint.files import BytesFile
from adapterkit.checkpoint.pipeline import component_configs, components
from adapterkit.checkpoint.plan import plan_safetensors
from adapterkit.checkpoint.tensor import Cast
from adapterkit.codecs.kinds import written
from adapterkit.dtypes import BF16, F16, F32, FLOATS, DType
from adapterkit.errors import UsageError, option
from adapterkit.ops.device import CPU
from adapterkit.requests.convert import ConvertRequest
from adapterkit.requests.merge import FEEDBACK
from adapterkit.verbs.conversions.conversion import Conversion, count_types
from adapterkit.verbs.placed import computed_on, device_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adapterkit.checkpoint.listing import Listing
    from adapterkit.verbs.calibration import Calibration
    from adapterkit.verbs.job import Recorder

CONFIG = "config.json"


def open_folder(asked: ConvertRequest, to: str, *, pipelines: bool = False) -> Checkpoint:
    """A Hugging Face checkpoint as it is stored.

    Args:
        pipelines: a whole pipeline of diffusers will do.

    Raises:
        UsageError: a GGUF file, or a pipeline.
        NotFound, CheckpointError, UnsafeError, AuthError, HubError
    """
    opened = open_model(asked.src, headers_only=getattr(asked, "headers_only", False))
    if opened.format == "gguf":
        raise UsageError(
            f"{opened.ref} is a GGUF file, and {to} is a format of Hugging Face folders",
            f"give the folder that it was made from, or use {option('to', 'gguf')}",
        )
    if components(opened.config) and not pipelines:
        raise UsageError(
            f"{opened.ref} is a pipeline, and {to} is the format of one model",
            f"convert one of its folders ({', '.join(components(opened.config))})",
        )
    return opened


def _plain(dtype: DType, asked: ConvertRequest, jobs: int) -> Conversion:
    """A checkpoint of any format as plain weights, all floating tensors in ``dtype``."""
    from adapterkit.adapters.sidecars import name_dtype

    opened = open_folder(asked, str(dtype), pipelines=True)
    view = dequantized(opened, dtype)
    tensors = {
        name: Cast(tensor, dtype) if tensor.dtype in FLOATS and tensor.dtype is not dtype else tensor
        for name, tensor in view.items()
    }
    config = json.loads(json.dumps(dict(view.config)))
    name_dtype(config, dtype)
    view = with_config(replace(view, tensors=tensors), config)
    for name, said in component_configs(opened.config).items():
        mine = json.loads(json.dumps(said))
        name_dtype(mine, dtype)
        if mine != said:
            view = _with_file(view, f"{name}/{CONFIG}", mine)
    return planned_folder(opened, view, str(dtype), "converted", asked, jobs)


def _quantized(kind: str, asked: ConvertRequest, jobs: int) -> Conversion:
    """A checkpoint with its linear layers quantized; a quantized one is decoded first, and the report says so."""
    from adapterkit.adapters.quantized import quantized
    from adapterkit.adapters.skipped import check_skipped
    from adapterkit.codecs.table import find_kind, has_layout, kinds_of

    opened = open_folder(asked, kind)
    view = dequantized(opened)
    if view is not opened:
        form = kinds_of(opened.config)[kind]
        if stored_formats(view) & set(form.already) and has_layout(opened.config, form):
            raise UsageError(f"{opened.ref} is {kind} already", "copy it, or give the 16-bit original")
        view = replace(
            view,
            notes=(
                *view.notes,
                f"what {opened.ref} had lost stays lost, and {kind} adds its own error; the 16-bit original loses less",
            ),
        )
    skip = asked.skip_modules or None
    check_skipped(view, skip, around=bool(find_kind(kind).program))
    calibration = _calibration(opened, kind, asked)
    fed = None if calibration is None else calibration.fed
    view = quantized(view, kind, double_quant=asked.double_quant, skip=skip, fed=fed)
    made = planned_folder(opened, view, kind, "quantized", asked, jobs)
    if calibration is None:
        return made
    plan = replace(
        made.plan,
        inputs={**made.plan.inputs, "calibration": calibration.digest()},
        peak_memory=max(made.plan.peak_memory, calibration.memory),
    )
    return replace(made, plan=plan, calibration=calibration)


def _calibration(opened: Checkpoint, kind: str, asked: ConvertRequest) -> Calibration | None:
    """What weights are rounded by, where that is with feedback: the model reads the text, before it is rounded.

    Raises:
        NotFound, UsageError: see `adapterkit.verbs.calibration.Calibration.check`; or options that do not go together.
    """
    if asked.calibration is None or asked.rounding != FEEDBACK:
        if asked.calibration is not None:
            raise UsageError(
                f"the nearest values of {kind} need no text", f"add {option('rounding', FEEDBACK)}, or leave it out"
            )
        return None
    from adapterkit.verbs.calibration import Calibration as Made

    made = Made(lambda: dequantized(open_folder(asked, kind)), asked.calibration, asked.target)
    made.check(opened.ref, opened.config)
    return made


def stored_formats(view: Checkpoint) -> set[str]:
    """How the weights of a dequantized view are stored, as codecs call it."""
    from adapterkit.checkpoint.decoded import Decoded
    from adapterkit.checkpoint.tensor import Transposed

    handles = (tensor.inner if isinstance(tensor, Transposed) else tensor for tensor in view.values())
    return {handle.weight.how for handle in handles if isinstance(handle, Decoded)}


def with_config(view: Checkpoint, config: Mapping[str, Any]) -> Checkpoint:
    """The view with another ``config.json``, where it had one."""
    if view.side_file(CONFIG) is None or config == view.config:
        return view
    return replace(_with_file(view, CONFIG, config), config=config)


def _with_file(view: Checkpoint, name: str, said: Mapping[str, Any]) -> Checkpoint:
    """The view with one JSON file beside it that says this."""
    text = json.dumps(said, indent=2, ensure_ascii=False) + "\n"
    others = tuple(file for file in view.side_files if file.name != name)
    return replace(view, side_files=(*others, SideFile(name, BytesFile(name, text.encode()))))


def folder_recorder(
    opened: Checkpoint, to: str, kind: str, stated: Mapping[str, Any], view: Checkpoint | None = None
) -> Recorder:
    """What writes the record of a folder that was made from ``opened``.

    Args:
        view: what is written, where the record says on which device that was computed.
    """

    def write(folder: Path | Listing) -> Mapping[str, bytes]:
        from adapterkit.provenance.record import base_parent, parameters_of, recorder

        method = to if kind == "quantized" else ""
        tensors = () if view is None else view.values()
        figures = partial(computed_on, device_of(stated), tensors)
        stating = parameters_of(stated)
        return recorder("convert", kind, stating, [base_parent(opened)], method=method, evidence=figures)(folder)

    return write


def planned_folder(
    opened: Checkpoint, view: Checkpoint, to: str, kind: str, asked: ConvertRequest, jobs: int
) -> Conversion:
    """The plan of a view as a folder with its side files and a record."""
    stated: dict[str, Any] = {
        "verb": "convert",
        "to": to,
        "double_quant": asked.double_quant,
        "skip_modules": list(asked.skip_modules),
    }
    if asked.device != CPU:
        stated["device"] = asked.device
    if asked.rounding == FEEDBACK:
        stated |= {"rounding": FEEDBACK, "calibration": str(asked.calibration)}
    plan = plan_safetensors(view, max_shard_size=asked.shard_size, jobs=jobs, request=stated)
    side = {file.name: file.bytes() for file in view.side_files}
    record = folder_recorder(opened, to, kind, stated, view)
    return Conversion(
        opened.ref, to, plan, view, opened.sources, count_types(view), side, view.notes, record, named=(opened,)
    )


bf16, f16, f32 = (partial(_plain, dtype) for dtype in (BF16, F16, F32))


def __getattr__(name: str) -> Any:
    """The planner of a quantized format, by the word for it."""
    if name in written():
        return partial(_quantized, name)
    raise AttributeError(name)
