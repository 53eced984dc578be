"""What a merge becomes on disk: a folder of safetensors, or a GGUF file."""

from __future__ import annotations

import json
from dataclasses import field, replace
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.fold import Folded, fold
from adapterkit.adapters.sidecars import side_files
from adapterkit.checkpoint.pipeline import components
from adapterkit.checkpoint.plan import Plan, plan_safetensors
from adapterkit.errors import UsageError, most_like, option
from adapterkit.ops.device import CPU
from adapterkit.requests.merge import FEEDBACK, FOLDER, GGUF, folder_formats, parse_floats
from adapterkit.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from adapterkit.adapters.adapter import Adapter
    from adapterkit.adapters.fidelity import Importance, Through
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.checkpoint.encoded import Encoding
    from adapterkit.gguf.quantize import Quantization
    from adapterkit.requests.merge import MergeRequest
    from adapterkit.verbs.calibration import Calibration
    from adapterkit.verbs.job import Job

CONFIG = "config.json"
KEEP = "keep"


@dataclass(frozen=True)
class Output:
    """A merge in the form in which it will be written.

    Attributes:
        folded: the view and what changed in it.
        view: what is written: the fold, or its quantized form.
        plan: what the sink will do.
        side: small files beside the weights, where the output is a folder.
        through: where changed tensors are quantized: a tensor's name and shape to a function that encodes and decodes
            some of its rows, for the report on fidelity.
        encodings: changed tensors that are written in the base's own format.
        importance: how strongly inputs use each column of a changed tensor, where an importance matrix says it.
        own: the output is in the base's own format.
        aware: training saw the sum on that format's grid, so nothing of it is lost there.
        tower: what writes the tower's file beside it, where that is made.
        calibration: what weights are rounded by, where that is with feedback.
    """

    folded: Folded
    view: Checkpoint
    plan: Plan
    side: dict[str, bytes]
    notes: tuple[str, ...]
    through: Callable[[str, tuple[int, ...]], Through | None] | None = None
    encodings: Mapping[str, Encoding] = field(default_factory=dict)
    importance: Importance | None = None
    own: bool = False
    aware: bool = False
    tower: Job | None = None
    calibration: Calibration | None = None


def output(
    base: Checkpoint,
    adapters: Sequence[Adapter],
    asked: MergeRequest,
    settings: Mapping[str, Any],
    *,
    values: str = "as stored",
) -> Output:
    """Fold, and plan what is written in the form that was asked for.

    Args:
        values: which values of its own the base has; see `open_base`.
        settings: of the planner: shard size, jobs, fingerprints, the request.

    Raises:
        UsageError: no such form, or options that mean nothing for it.
        AdapterError, TargetError, CheckpointError
    """
    if asked.makes_tower and (base.format == "gguf" or asked.to != GGUF):
        raise UsageError(
            f"{base.ref} holds no tower" if base.format == "gguf" else "an mmproj file belongs beside a GGUF file",
            "merge into the Hugging Face base, and name the output like OUT.gguf",
        )
    if components(base.config):
        _check_pipeline(base, asked)
    found = _OUTPUTS.get((base.format == "gguf", asked.to))
    if found is None:
        raise UsageError(
            f"{base.ref} is a GGUF base and becomes a .gguf file, not a folder",
            "name the output so, or convert it first: adapterkit convert BASE.gguf --to hf -o DIR",
        )
    made = found(base, adapters, asked, settings, values)
    if asked.device == CPU:
        return made
    from adapterkit.verbs.placed import place

    place(made.view.values(), asked.device)
    if made.tower is not None:
        place(made.tower.tensors.values(), asked.device)
    return made


def _check_pipeline(base: Checkpoint, asked: MergeRequest) -> None:
    """A pipeline is written as it is stored, to a folder.

    Raises:
        UsageError: anything else is asked for.
    """
    given = {
        option("quant"): asked.quant,
        option("dtype"): None if asked.dtype == "auto" else asked.dtype,
        option("max_shard_size"): asked.max_shard_size,
        option("residual"): asked.residual,
    }
    wrong = next((name for name, value in given.items() if value is not None), None)
    if wrong is not None:
        raise UsageError(f"{base.ref} is a pipeline, for which {wrong} means nothing", "merge into one of its folders")
    if asked.to != FOLDER or one_file(asked):
        raise UsageError(f"{base.ref} is a pipeline and becomes a folder", f"name a folder: {option('out')} DIR")


def _is_gguf_type(quant: str | None) -> None:
    """What ``--quant`` says is of GGUF, since it is no format of folders.

    Raises:
        UsageError: it is of neither.
    """
    from adapterkit.gguf.filetypes import ALIASES, FILE_TYPES

    if quant is not None and quant.upper() not in {*FILE_TYPES, *ALIASES}:
        meant = most_like(quant, ("f16", "bf16", "f32"))
        if meant:
            road = f"16 bits are written with {option('dtype', meant)}, and F16 or BF16 in an output like OUT.gguf"
            raise UsageError(f"{quant!r} is no quantization of a folder", road)
        formats = ", ".join(folder_formats())
        raise UsageError(f"{quant!r} is no quantization", f"use {formats}; GGUF types are for an output like OUT.gguf")


def _folder(
    base: Checkpoint, adapters: Sequence[Adapter], asked: MergeRequest, settings: Mapping[str, Any], values: str
) -> Output:
    alike = _stored_in(base).get((asked.folder_format, asked.quant_double))
    if alike is False:
        raise UsageError(
            f"{base.ref} has the numbers of {asked.quant} already, in another layout",
            f"use {option('quant', 'keep')}, and convert the base or the result to {asked.quant} where that layout is needed",
        )
    own = asked.quant == KEEP or alike is True
    if asked.keep_touched is not None and not own:
        raise UsageError(
            "what changed can be kept wider only in a format that the rest has already",
            f"add {option('quant')} keep, or leave it out",
        )
    of_gguf = asked.pre is not None or asked.said or asked.as_reranker or asked.dense_modules or asked.allow_approximate
    if asked.gguf_types is not None or of_gguf:
        _is_gguf_type(asked.quant)
        raise UsageError("options of a GGUF output were given for a folder", "name the output like OUT.gguf")
    if own:
        return _one_file(_kept(base, adapters, asked, settings), asked)
    dtype, calibration, through = asked.floats, None, None
    folded = fold(base, adapters, asked.adapter_weights, dtype=dtype, **_how(asked))
    side, notes = side_files(base, folded, adapters, dtype)
    view = folded.checkpoint
    if asked.folder_format is not None:
        from adapterkit.adapters.quantized import quantized
        from adapterkit.codecs.table import KEYS, find_kind

        if asked.residual is not None and find_kind(asked.folder_format).program:
            raise UsageError(
                f"{option('residual')} is an adapter of PEFT, which mlx-lm does not load beside {asked.folder_format}",
                f"leave it out, or write more bits ({option('quant', 'mlx-8bit')})",
            )
        calibration = _calibration(base, adapters, asked)
        fed = None if calibration is None else calibration.fed
        view = quantized(view, asked.folder_format, double_quant=asked.quant_double, fed=fed)
        through = _through(view, folded, asked.folder_format)
        config = json.loads(side.get(CONFIG, b"{}"))
        config |= {key: view.config[key] for key in KEYS if key in view.config}
        side[CONFIG] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
        notes = [*notes, *view.notes[len(folded.checkpoint.notes) :]]
    if base.stored is not None:
        from adapterkit.adapters.kept import sizes

        notes = [*notes, f"{sizes(base.stored, view)}; {option('quant', 'keep')} writes the base's own format"]
        if any(isinstance(adapter.config.get("nvfp4_merge_aware"), dict) for adapter in adapters):
            notes.append(
                f"the adapter was trained with its sum on the NVFP4 grid, which {option('quant')} keep writes; this is not it"
            )
    if one_file(asked):
        view = replace(view, shards=dict.fromkeys(view, _ONE))
    plan = _with_text(plan_safetensors(view, **settings), calibration)
    return _one_file(Output(folded, view, plan, side, tuple(notes), through, calibration=calibration), asked)


def _through(view: Checkpoint, folded: Folded, kind: str) -> Callable[[str, tuple[int, ...]], Through | None]:
    """Which tensors of a fold are encoded in a view of it, and how."""
    from adapterkit.adapters.fidelity import through_format
    from adapterkit.adapters.mlx_view import made_of
    from adapterkit.adapters.unstacked import OfStack
    from adapterkit.checkpoint.encoded import Encoded
    from adapterkit.codecs.table import find_kind

    turned: dict[str, bool] = {}  # name: whether it is encoded on its side
    for tensor in view.values():
        if isinstance(tensor, Encoded):
            one = tensor.weight
            if find_kind(kind).program:
                # Under names of its own, and stacks along rows that are whole.
                turned.update(dict.fromkeys(made_of(one), False))
                continue
            name, side = (one.stack, one.turned) if isinstance(one, OfStack) else (one.name, len(one.shape) == 3)
            turned[name] = side

    def through(name: str, shape: tuple[int, ...]) -> Through | None:
        dtype = folded.checkpoint[name].dtype
        return through_format(kind, shape, dtype, turned=turned[name]) if name in turned else None

    return through


_ONE = "model.safetensors"


def one_file(asked: MergeRequest) -> bool:
    """Whether the output is one safetensors file, not a folder."""
    return asked.target is not None and asked.target.suffix == ".safetensors"


def _one_file(made: Output, asked: MergeRequest) -> Output:
    """The same output as a file of the name that was asked for; what would stand beside it in a folder is left out.

    Raises:
        UsageError: it would be several files.
    """
    if not one_file(asked):
        return made
    if len(made.plan.files) != 1:
        raise UsageError("one file was asked for, and this output is in shards", "name a folder, without .safetensors")
    left = sorted(made.side)
    said = (f"one file was asked for, so these are not written: {', '.join(left[:4])}",) if left else ()
    return replace(made, plan=replace(made.plan, layout="file"), side={}, notes=(*made.notes, *said))


def _stored_in(base: Checkpoint) -> dict[tuple[str | None, bool], bool]:
    """The words for the format of a quantized base, where 16-bit weights are written in it too, each with whether its
    scales are nested; and whether its layout is that of the word, too."""
    if base.stored is None:
        return {}
    from adapterkit.codecs.table import has_layout, kinds_of

    how = {weight.how for weight in base.stored.weights.values()}
    nested = any(word.endswith(" double") for word in how)
    # A weight no larger than a tile is called otherwise ("per row"); its numbers are the same.
    alike = len({word.split()[0] for word in how}) == 1
    said = base.stored.checkpoint.config
    found: dict[tuple[str | None, bool], bool] = {}
    for kind in kinds_of(said).values() if alike else ():
        same = has_layout(said, kind)
        # Of a format in several numbers, a word that is not the config's is another format, not another layout.
        if how & set(kind.already) and (same or kind.said is None):
            found[kind.name, nested] = same
    return found


def _kept(base: Checkpoint, adapters: Sequence[Adapter], asked: MergeRequest, settings: Mapping[str, Any]) -> Output:
    """In the format that the base is stored in."""
    from adapterkit.adapters.kept import FP8, keep_index, kept, sizes, stored_form, trained_on_the_grid

    form = stored_form(base)
    if asked.dtype != "auto" or (asked.quant_double and asked.quant == KEEP):
        raise UsageError(
            "an output in the base's own format has its types",
            f"leave out {option('dtype')} and {option('double_quant')}",
        )
    folded = fold(base, adapters, asked.adapter_weights, **_how(asked))
    rule = trained_on_the_grid(adapters, asked.adapter_weights)
    touched_as = FP8 if asked.keep_touched == FP8 else parse_floats(asked.keep_touched or "auto")
    calibration = _calibration(base, adapters, asked)
    if calibration is not None and rule is not None:
        raise UsageError(
            "the adapter was trained with its sum on this grid, which the nearest value keeps as it is",
            f"leave out {option('rounding')}",
        )
    made = kept(folded, touched_as, rule, None if calibration is None else calibration.fed)
    view = made.view
    wider = {name: view[name] for name in made.wider}
    folded = replace(folded, checkpoint=replace(folded.checkpoint, tensors={**folded.checkpoint.tensors, **wider}))
    # The config is the base's own, with what else the merge changed.
    said = replace(folded, checkpoint=replace(folded.checkpoint, config=view.config))
    side, notes = side_files(replace(form.checkpoint, side_files=view.side_files), said, adapters, None)
    plan = _with_text(plan_safetensors(view, like=form.checkpoint.tensors, **settings), calibration)
    side |= keep_index(form.checkpoint, plan)
    aware = rule is not None and all(rule in form.weights[name].others for name in made.encodings)
    said_of = (*notes, *view.notes[len(folded.checkpoint.notes) :], sizes(form, view))
    if aware:
        said_of += ("the adapter was trained with its sum on this grid: what is written is what training saw",)
    how: dict[str, Any] = {"encodings": made.encodings, "own": True, "aware": aware, "calibration": calibration}
    return Output(folded, view, plan, side, said_of, **how)


def _with_text(plan: Plan, calibration: Calibration | None) -> Plan:
    """A plan that belongs to its calibration text too."""
    if calibration is None:
        return plan
    inputs = {**plan.inputs, "calibration": calibration.digest()} if plan.inputs else {}
    return replace(plan, inputs=inputs, peak_memory=max(plan.peak_memory, calibration.memory))


def _calibration(base: Checkpoint, adapters: Sequence[Adapter], asked: MergeRequest) -> Calibration | None:
    """What weights are rounded by, where that is with feedback: base + adapters read the text.

    Raises:
        NotFound, UsageError: see `adapterkit.verbs.calibration.Calibration.check`.
    """
    if asked.rounding != FEEDBACK or asked.calibration is None:
        return None
    from adapterkit.verbs.calibration import Calibration as Made

    def view() -> Checkpoint:
        return fold(base, adapters, asked.adapter_weights, **_how(asked)).checkpoint

    made = Made(view, asked.calibration, asked.target)
    made.check(base.ref, base.config)
    return made


def _gguf(
    base: Checkpoint, adapters: Sequence[Adapter], asked: MergeRequest, settings: Mapping[str, Any], values: str
) -> Output:
    from adapterkit.gguf.checkpoint import GGUFCheckpoint
    from adapterkit.gguf.fold import fold_gguf
    from adapterkit.gguf.plan import plan_gguf
    from adapterkit.gguf.said import with_said

    assert isinstance(base, GGUFCheckpoint)
    if asked.pre is not None:
        raise UsageError(f"{base.ref} is a GGUF base, which has a tokenizer of its own", f"leave out {option('pre')}")
    for name in ("as_reranker", "allow_approximate", "dense_modules"):
        if getattr(asked, name):
            raise UsageError(f"{base.ref} is a GGUF base, which is a model of its kind", f"leave out {option(name)}")
    if asked.dtype != "auto" or asked.folder_format is not None or values != "as stored":
        raise UsageError(
            f"{base.ref} is a GGUF base, which has types of its own",
            f"use {option('quant')}, as in {option('quant', 'F16')}",
        )
    how: dict[str, Any] = {**_how(asked), "quantization": _beside(_freely(asked.gguf_types), asked)}
    made = fold_gguf(base, adapters, asked.adapter_weights, **how)
    notes: tuple[str, ...] = ()
    if asked.gguf_types is not None and asked.gguf_types.keep_below is not None:
        how["too_lossy"], notes = _too_lossy(made.folded, made.through, asked.gguf_types)
        made = fold_gguf(base, adapters, asked.adapter_weights, **{**how, "quantization": asked.gguf_types})
    plan = plan_gguf(with_said(made.layout, asked.said), **settings)
    notes = (*notes, *made.notes)
    return Output(made.folded, made.written, plan, {}, notes, made.through, importance=made.importance)


def _hf_to_gguf(
    base: Checkpoint, adapters: Sequence[Adapter], asked: MergeRequest, settings: Mapping[str, Any], values: str
) -> Output:
    from adapterkit.adapters.sidecars import patched_config
    from adapterkit.gguf.from_hf import from_hf
    from adapterkit.gguf.plan import plan_gguf
    from adapterkit.gguf.said import with_said

    if asked.folder_format is not None:
        raise UsageError(
            f"{asked.folder_format} is a format of folders", f"use a GGUF type, as in {option('quant', 'Q4_K_M')}"
        )
    folded = fold(base, adapters, asked.adapter_weights, **_how(asked))
    files, notes = side_files(base, folded, adapters, None)
    how: dict[str, Any] = {
        "base": base,
        "config": patched_config(base, folded, adapters, None),
        "adapters": adapters,
        "touched": folded.touched,
        "files": files,
        "asked": _beside(_freely(asked.gguf_types), asked),
        "dtype": asked.floats,
        "pre": asked.pre,
        "approximate": tuple(asked.allow_approximate),
        "as_reranker": asked.as_reranker,
    }
    tower = None
    if asked.makes_tower:
        tower, how["elsewhere"] = _tower(folded.checkpoint, how, asked, settings)
    made = from_hf(folded.checkpoint, **how)
    if asked.gguf_types is not None and asked.gguf_types.keep_below is not None:
        measured = replace(folded, checkpoint=made.folded)
        how["too_lossy"], said = _too_lossy(measured, made.through, asked.gguf_types)
        notes = [*notes, *said]
        made = from_hf(folded.checkpoint, **{**how, "asked": asked.gguf_types})
    folded = replace(folded, checkpoint=made.folded)
    view = replace(folded.checkpoint, tensors=made.tensors)
    plan = plan_gguf(with_said(made.layout, asked.said), **settings)
    said_of = (*notes, *made.notes)
    return Output(folded, view, plan, {}, said_of, made.through, importance=made.importance, tower=tower)


def _tower(
    view: Checkpoint, how: Mapping[str, Any], asked: MergeRequest, settings: Mapping[str, Any]
) -> tuple[Job | None, frozenset[str]]:
    """The job of the tower's file, with what adapters change in it, and the tensors that it holds."""
    from adapterkit.gguf.towers.make import from_tower
    from adapterkit.verbs.tower import tower_job

    given = {name: how[name] for name in ("base", "config", "adapters", "touched", "files", "dtype")}
    made = from_tower(view, **given)
    if asked.target is None:
        return None, made.held
    return tower_job(made, asked.target, how["base"].sources, settings, force=asked.force), made.held


def _freely(asked: Quantization | None) -> Quantization | None:
    """The types without what keeps changed tensors wider, where that has to be measured first."""
    if asked is None or asked.keep_below is None:
        return asked
    return replace(asked, keep_touched=None, keep_below=None, yes_lossy=True)


def _beside(types: Quantization | None, asked: MergeRequest) -> Quantization | None:
    """The types of an output whose rounding is kept beside it: nothing of the change is lost there."""
    if asked.residual is None:
        return types
    from adapterkit.gguf.quantize import Quantization as Types

    return replace(types or Types(), yes_lossy=True)


def _too_lossy(
    folded: Folded, through: Callable[[str, tuple[int, ...]], Through | None], asked: Quantization
) -> tuple[frozenset[str], tuple[str, ...]]:
    from adapterkit.gguf.too_lossy import too_lossy

    assert asked.keep_below is not None
    found, measured = too_lossy(folded, through, asked.keep_below)
    note = f"{len(found)} of {measured} changed tensors would come out with a cosine below {asked.keep_below:g}"
    return found, (f"{note}; they are kept as {asked.keep_touched}",)


def _how(asked: MergeRequest) -> dict[str, Any]:
    return {
        "residual_base": asked.residual_base,
        "allow_unknown": asked.allow_unknown,
        "rule": asked.rule,
        "device": asked.device,
    }


# (the base is a GGUF file, the form of the output): what makes it
_OUTPUTS: dict[
    tuple[bool, str | None],
    Callable[[Checkpoint, Sequence[Adapter], MergeRequest, Mapping[str, Any], str], Output],
] = {
    (False, FOLDER): _folder,
    (False, GGUF): _hf_to_gguf,
    (True, GGUF): _gguf,
}
