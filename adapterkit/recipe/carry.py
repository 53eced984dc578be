"""How each kind of step is planned and carried out: the verbs' own functions, with the options that the recipe gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.recipe.lock import Pinned
from adapterkit.recipe.steps import FOLDER_FORMATS, MERGE, Input, Step

if TYPE_CHECKING:
    from adapterkit.gguf.projector import Projector
    from adapterkit.gguf.quantize import Quantization
    from adapterkit.verbs.conversions.conversion import Conversion
    from adapterkit.verbs.merge import Merge, Wanted

Ref = str | Path
Progress = Callable[[int, int], None]
Pins = Mapping[str, Pinned]


def opened_as(one: Input, pins: Pins) -> Ref:
    """What to open for an input: its path, or what it is pinned to."""
    from adapterkit.recipe.parse import shown

    return one.path if one.path is not None else pins[shown(one.place)].pin


def merge_options(step: Step, pins: Pins) -> dict[str, Any]:
    """The keywords of `plan_merge` for a step."""
    asked, how, choice = step.asked, step.combination, step.choice
    assert choice is not None
    in_folder = asked.quant if asked.quant in FOLDER_FORMATS else None
    return {
        "to": step.to,
        "weights": [one.weight for one in step.adapters],
        "dtype": asked.dtype,
        "max_shard_size": asked.max_shard_size,
        "pre": asked.pre,
        "device": asked.device,
        "expert_order": how.expert_order,
        "residual_base": choice.residual,
        "allow_unknown": how.allow_unknown,
        "base16": None if step.base16 is None else opened_as(step.base16, pins),
        "as_trained": choice.as_trained,
        "double_quant": choice.double_quant,
        "quant_dtype": choice.quant_dtype,
        "skip_modules": choice.skip_modules or None,
        "quant": in_folder,
        "quant_double": asked.double_quant,
        "quantization": None if in_folder else quantization(step, pins),
        "method": how.method,
        "scale": how.scale,
        "space": how.space,
        "parameters": dict(how.parameters),
    }


def quantization(step: Step, pins: Pins) -> Quantization | None:
    """The types of a GGUF output, or None where the recipe names none."""
    asked = step.asked
    given: dict[str, Any] = {
        "mix": asked.quant,
        "imatrix": None if step.imatrix is None else opened_as(step.imatrix, pins),
        "pure": asked.pure,
        "tensor_types": tuple(asked.tensor_types.items()),
        "output_type": asked.output_type,
        "token_embedding_type": asked.token_embd_type,
        "leave_output": asked.leave_output,
        "keep_touched": asked.keep_touched,
        "keep_below": asked.keep_below,
        "yes_lossy": asked.yes_lossy and asked.quant not in FOLDER_FORMATS,
    }
    if not any(given.values()):
        return None
    from adapterkit.gguf.quantize import Quantization
    from adapterkit.gguf.types import ggml_type

    for kind in asked.tensor_types.values():
        ggml_type(kind)
    return Quantization(**given)


def plan_merge_step(step: Step, pins: Pins, *, jobs: int | None = None, headers_only: bool = True) -> Merge:
    """Plan a merge from headers alone."""
    from adapterkit.verbs.merge import plan_merge

    assert step.base is not None
    adapters = [opened_as(one, pins) for one in step.adapters]
    options = merge_options(step, pins)
    base = opened_as(step.base, pins)
    return plan_merge(
        base, adapters, out=step.out, jobs=jobs, headers_only=headers_only, fingerprints=not headers_only, **options
    )


def convert_options(step: Step, pins: Pins) -> dict[str, Any]:
    """The keywords of `plan_convert` for a step."""
    asked = step.asked
    given: dict[str, Any] = {} if asked.dtype == "auto" else {"dtype": asked.dtype}
    if asked.double_quant:
        given["double_quant"] = True
    if step.compressor is not None:
        given["compressor"] = step.compressor
    return {
        **given,
        "to": step.to,
        "base": None if step.base is None else opened_as(step.base, pins),
        "quantization": quantization(step, pins),
        "max_shard_size": asked.max_shard_size,
        "pre": asked.pre,
        "skip_modules": asked.skip_modules,
        "calibration": None if step.calibration is None else step.calibration.path,
        "plain": asked.plain,
        "rank": asked.rank,
        "energy": asked.energy,
    }


def plan_convert_step(step: Step, pins: Pins, *, jobs: int | None = None) -> Conversion:
    """Plan a conversion from headers alone."""
    from adapterkit.verbs.convert import plan_convert

    assert step.source is not None
    return plan_convert(opened_as(step.source, pins), out=step.out, jobs=jobs, **convert_options(step, pins))


@dataclass(frozen=True)
class How:
    """How a build writes: worker threads, whether interrupted work is used, and who is told of progress."""

    jobs: int | None = None
    resume: bool = False
    progress: Progress | None = None


def wanted_merge(step: Step, pins: Pins, how: How, *, force: bool) -> Wanted:
    """A merge that is planned and ready to be written."""
    from adapterkit.verbs.merge import Wanted

    assert step.base is not None
    planned = plan_merge_step(step, pins, jobs=how.jobs, headers_only=False)
    asked = step.asked
    base = opened_as(step.base, pins)
    return Wanted(planned, base, step.out, force, yes_lossy=asked.yes_lossy, full_record=asked.full_record)


def write_merges(wanted: Sequence[Wanted], how: How) -> list[Any]:
    """Write merges abreast; a report for each."""
    from adapterkit.verbs.merge import write_merges as write

    return list(write(wanted, jobs=how.jobs, resume=how.resume, progress=how.progress))


def convert_step(step: Step, pins: Pins, how: How, *, force: bool) -> Any:
    """Write a conversion."""
    from adapterkit.verbs.convert import convert

    assert step.source is not None
    return convert(
        opened_as(step.source, pins),
        step.out,
        jobs=how.jobs,
        force=force,
        resume=how.resume,
        progress=how.progress,
        **convert_options(step, pins),
    )


def combine_step(step: Step, pins: Pins, how: How, *, force: bool) -> Any:
    """Write a combination of adapters."""
    from adapterkit.adapters.experts import in_order
    from adapterkit.adapters.load import load_adapter
    from adapterkit.verbs.combine import combine

    asked, rule, choice = step.asked, step.combination, step.choice
    return combine(
        [in_order(load_adapter(opened_as(one, pins)), rule.expert_order) for one in step.adapters],
        step.out,
        method=rule.method,
        weights=[one.weight for one in step.adapters],
        scale=rule.scale,
        space=rule.space,
        rank=asked.rank,
        energy=asked.energy,
        base=None if step.base is None else opened_as(step.base, pins),
        dtype="f32" if asked.dtype == "auto" else asked.dtype,
        own_ranks=asked.own_ranks,
        jobs=how.jobs,
        force=force,
        residual_base=choice is not None and choice.residual,
        allow_unknown=rule.allow_unknown,
        progress=how.progress,
        **dict(rule.parameters),
    )


def projector(step: Step, *, force: bool) -> Projector:
    """The mmproj file that goes beside an output, checked; see `Projector` for what is raised."""
    from adapterkit.gguf.projector import Projector

    return Projector(None if step.mmproj is None else step.mmproj.path, step.out, force=force)


def hand_over(step: Step, pins: Pins) -> None:
    """Write what loads a GGUF output in its server beside it, where the recipe asks for that."""
    if step.asked.for_ is None:
        return
    from adapterkit.checkpoint.open import locate
    from adapterkit.serving.handover import write_handover

    place = None
    if step.base is not None and step.verb == MERGE:
        opened = opened_as(step.base, pins)
        found = locate(opened) if not Path(opened).is_file() else None
        place = getattr(found, "path", None)
    write_handover(step.out, step.asked.for_, beside=place)


_LEFT_OUT = (
    *("path", "to", "from_", "adapters", "base", "merge", "verify", "register", "push"),
    *("imatrix", "mmproj", "calibration"),
)


def settings(step: Step) -> dict[str, Any]:
    """What of a step, beside the content of its inputs, decides the bytes that it writes."""
    asked = {name: value for name, value in asdict(step.asked).items() if name not in _LEFT_OUT}
    choice = {} if step.choice is None else asdict(step.choice)
    base = {name: value for name, value in choice.items() if name not in ("ref", "base16")}
    return {"verb": step.verb, "to": step.to, "asked": asked, "combination": asdict(step.combination), "base": base}
