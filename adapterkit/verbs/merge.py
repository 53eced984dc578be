"""`merge`: fold adapters into a base and write the result, in one streaming pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.adapter import Adapter
from adapterkit.adapters.experts import in_order
from adapterkit.adapters.load import load_adapter
from adapterkit.bases import open_base, open_model
from adapterkit.checkpoint.checkpoint import Checkpoint
from adapterkit.checkpoint.plan import Plan, default_jobs, parse_size
from adapterkit.errors import CheckFailed, CheckpointError
from adapterkit.ops.device import check_name, check_there
from adapterkit.verbs.options import FOLDER, GGUF, MergeOptions
from adapterkit.verbs.outputs import Output, output
from adapterkit.verbs.report import AdapterUse, MergeReport, PartReport

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adapterkit.adapters.fidelity import FidelityReport, Watch
    from adapterkit.adapters.fold import Folded
    from adapterkit.checkpoint.files import Source

SAMPLED = 8  # tensors that are measured before a base's own grid is written again

Ref = str | Path
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Merge:
    """A merge that is planned: everything is checked, no tensor is read.

    Attributes:
        base, adapters: as opened.
        options: what was asked for.
        output: the fold, in the form in which it will be written.
        base_values: which values of its own the base has; see `open_base`.
    """

    base: Checkpoint
    adapters: tuple[Adapter, ...]
    options: MergeOptions
    output: Output
    base_values: str = "as stored"

    @property
    def folded(self) -> Folded:
        return self.output.folded

    @property
    def view(self) -> Checkpoint:
        """What is written: the merge, or its quantized form."""
        return self.output.view

    @property
    def plan(self) -> Plan:
        return self.output.plan

    @property
    def side(self) -> dict[str, bytes]:
        """Small files beside the weights."""
        return self.output.side

    @property
    def weights(self) -> tuple[float, ...]:
        """One for each adapter."""
        return self.options.weights or (1.0,) * len(self.adapters)

    @property
    def notes(self) -> tuple[str, ...]:
        return (*self.base.notes, *self.folded.notes, *self.output.notes)

    @property
    def sources(self) -> tuple[Source, ...]:
        """Every weight file that is read, the adapters' too."""
        return (*self.base.sources, *(source for adapter in self.adapters for source in adapter.sources))

    def report(self, out: Ref, **measured: Any) -> MergeReport:
        used = zip(self.adapters, self.weights, strict=True)
        dtype, rule = self.options.floats, self.options.rule
        return MergeReport(
            out=str(out),
            base=self.base.ref,
            base_commit=self.base.commit,
            base_values=self.base_values,
            method="linear" if rule is None else str(rule),
            adapters=tuple(AdapterUse(a.ref, a.config.peft_type, w, a.commit, a.config.base) for a, w in used),
            dtype="auto" if dtype is None else str(dtype),
            files=tuple(path.name for path in self.plan.targets(Path(out)).values()),
            nbytes=self.plan.nbytes,
            tensors=len(self.view),
            touched=len(self.folded.touched),
            copied=sum(1 for step in self.plan.steps if step.source is not None),
            added=self.folded.added,
            parameters=self.folded.checkpoint.parameters,
            notes=self.notes,
            **measured,
        )


def plan_merge(
    base: Ref | Checkpoint,
    adapters: Sequence[Ref | Adapter],
    *,
    out: Ref | None = None,
    jobs: int | None = None,
    headers_only: bool = True,
    fingerprints: bool = True,
    **options: Any,
) -> Merge:
    """Plan a merge from headers alone.

    Args:
        base, adapters: see `merge`.
        out: what will be written, where that is known: a name ending in ``.gguf`` asks for a GGUF file.
        jobs: worker threads, for the estimate of memory.
        headers_only: a base or adapter on the Hub is not downloaded, so the plan can be shown but not executed.
        fingerprints: of the inputs, which let `execute` see whether they changed; a plan that is only shown can do
            without.
        options: those of `MergeOptions`.

    Raises:
        NotFound, CheckpointError, AdapterError, TargetError, UsageError, UnsafeError, AuthError, HubError
    """
    if out is not None and "to" not in options:
        options["to"] = GGUF if Path(out).suffix == ".gguf" else FOLDER
    asked = MergeOptions.of(**options)
    check_name(asked.device) if headers_only else check_there(asked.device)
    opened, values = open_base(
        base,
        base16=asked.base16,
        as_trained=asked.as_trained,
        double_quant=asked.double_quant,
        quant_dtype=asked.quant_dtype,
        skip_modules=asked.skip_modules,
        headers_only=headers_only,
    )
    if asked.to is None:
        asked = replace(asked, to=GGUF if opened.format == "gguf" else FOLDER)
    given = (a if isinstance(a, Adapter) else load_adapter(a, headers_only=headers_only) for a in adapters)
    loaded = tuple(in_order(adapter, asked.expert_order) for adapter in given)
    inputs = None
    if fingerprints:
        inputs = {s.name: _fingerprint(s) for s in (*opened.sources, *(source for a in loaded for source in a.sources))}
    settings: dict[str, Any] = {
        "max_shard_size": None if asked.max_shard_size is None else parse_size(asked.max_shard_size),
        "jobs": jobs or default_jobs(),
        "inputs": inputs,
        "request": {
            "verb": "merge",
            "base": str(base.ref if isinstance(base, Checkpoint) else base),
            "adapters": [adapter.ref for adapter in loaded],
            **asked.request(),
        },
    }
    return Merge(opened, loaded, asked, output(opened, loaded, asked, settings, values=values), values)


def merge(
    base: Ref | Checkpoint,
    adapters: Sequence[Ref | Adapter],
    out: Ref,
    *,
    jobs: int | None = None,
    force: bool = False,
    resume: bool = False,
    fidelity: bool = False,
    yes_lossy: bool = False,
    full_record: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> MergeReport:
    """Fold adapters into a base and write a Hugging Face folder, or a GGUF file where ``out`` ends in ``.gguf``.

    The model is never loaded: tensors stream through in blocks, untouched ones are copied by the kernel. Deltas of all
    adapters are summed in float32 and rounded once.

    Args:
        base: folder, safetensors or GGUF file, or Hub id ``org/name[@revision]``, or an open `Checkpoint`.
        adapters: PEFT folders or Hub ids, or open `Adapter`s.
        out: the folder to make, or the ``.gguf`` file; it appears whole or not at all.
        jobs: worker threads; the output bytes do not depend on it.
        force: replace an existing folder.
        resume: continue an interrupted run, and leave the same behind if interrupted.
        fidelity: measure what of the change survives in the output, in the same pass.
        yes_lossy: write a quantized base's own format again although the change does not survive it.
        full_record: hash every byte of base and output for ``adapterkit.json``, instead of 16 KiB of each tensor.
        progress: called now and then with bytes done and bytes in all.
        options: those of `MergeOptions`: ``weights``, ``dtype``, ``method``, ``as_trained``, ``quantization``, ...

    Raises:
        CheckFailed: the output would lose the change.
        NotFound, CheckpointError, AdapterError, TargetError, OutputError, UsageError, UnsafeError, AuthError, HubError
    """
    started = time.monotonic()
    planned = plan_merge(base, adapters, out=out, jobs=jobs, headers_only=False, **options)
    wanted = Wanted(planned, base, Path(out), force, fidelity, yes_lossy, full_record)
    return write_merges([wanted], jobs=jobs, resume=resume, progress=progress, started=started)[0]


@dataclass(frozen=True)
class Wanted:
    """A planned merge and where it goes; see `merge` for the rest.

    Attributes:
        base: as `plan_merge` was given it.
    """

    planned: Merge
    base: Ref | Checkpoint
    out: Path
    force: bool = False
    fidelity: bool = False
    yes_lossy: bool = False
    full_record: bool = False


def write_merges(
    wanted: Sequence[Wanted],
    *,
    jobs: int | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    started: float | None = None,
) -> list[MergeReport]:
    """Write planned merges, abreast: where they share a base its bytes come from the disk once. A report for each.

    ``started`` is the time (`time.monotonic`) from which their seconds count.

    Raises:
        CheckFailed: an output would lose the change.
        OutputError, CheckpointError, AdapterError, UnsafeError
    """
    from adapterkit.checkpoint.write import Writing, check_output, write_together

    started = time.monotonic() if started is None else started
    lossy, watches, writings = [], [], []
    for one in wanted:
        planned = one.planned
        folders = _adapter_folders(planned)
        check_output(planned.plan, planned.sources, one.out, force=one.force, inputs=folders)
        lossy.append(_still_there(planned, yes_lossy=one.yes_lossy))
        watches.append(_watch(planned) if one.fidelity else None)
        record = _recorder(planned, one.base, full=one.full_record, measured=partial(_measured, watches[-1], lossy[-1]))
        writings.append(Writing(planned.plan, planned.view, planned.sources, one.out, planned.side, record))
    force = [one.force for one in wanted]
    reused = write_together(writings, jobs=jobs, force=force, resume=resume, progress=progress)
    spent = {"seconds": time.monotonic() - started, "peak_memory": peak_memory()}
    return [
        one.planned.report(one.out, reused=again, fidelity=lost if watch is None else watch.report(), **spent)
        for one, again, lost, watch in zip(wanted, reused, lossy, watches, strict=True)
    ]


def _watch(planned: Merge) -> Watch:
    from adapterkit.adapters.fidelity import Watch, own_format

    if planned.output.own:
        encodings = planned.output.encodings
        words = own_format(encodings) if encodings else None
        return Watch(planned.folded, words, lambda name, shape: None, encodings)
    kind = planned.options.quant or _grid_name(planned)
    return Watch(planned.folded, kind, planned.output.through)


def _measured(watch: Watch | None, lossy: FidelityReport | None) -> dict[str, Any]:
    """The evidence that a record gets when the weights are finished."""
    found = lossy if watch is None else watch.report()
    if found is None:
        return {}
    figures = {name: float(f"{getattr(found, name):.6g}") for name in ("retention", "cosine", "relative", "unmoved")}
    return {"fidelity": {**figures, "format": found.format, "worst": found.worst.name if found.worst else ""}}


def _recorder(
    planned: Merge,
    base: Ref | Checkpoint,
    *,
    full: bool = False,
    measured: Callable[[], Mapping[str, Any]] | None = None,
) -> Callable[[Path], dict[str, bytes]]:
    """What writes ``adapterkit.json`` when the weights are finished."""
    from adapterkit.provenance.record import adapter_parent, base_parent, parameters_of, recorder

    options = planned.options
    # Values that are decoded or quantized on the way have no bytes of their own; what they were made from does.
    stored = planned.base
    if planned.base_values != "as stored":
        stored = base if isinstance(base, Checkpoint) else open_model(base)
    parents = [base_parent(stored, full=full)]
    if options.base16 is not None:
        parents.append(base_parent(open_model(options.base16), "original", full=full))
    parents += [adapter_parent(a, weight=w) for a, w in zip(planned.adapters, planned.weights, strict=True)]
    changed = options.quant is not None or options.quantization is not None
    kind = "quantized" if changed else "merged"
    # The words alone: which original it was stands among the parents.
    asked = {**parameters_of(planned.plan.request), "base_values": planned.base_values.partition(" (")[0]}
    return recorder("merge", kind, asked, parents, method=options.quant or "", evidence=measured, full=full)


def _grid_name(planned: Merge) -> str | None:
    """What a GGUF output's types are called, when they are not the base's own."""
    asked = planned.options.quantization
    if planned.output.through is None:
        return None
    if asked is not None and asked.mix is not None:
        return asked.mix
    return "its GGUF types" if planned.base.format == "gguf" else None


def _still_there(planned: Merge, *, yes_lossy: bool) -> FidelityReport | None:
    """What is left of the change, when it is to be written on the grid that its base was decoded from.

    Raises:
        CheckFailed: hardly anything, and nobody said that this is fine.
    """
    quant = planned.options.quant
    if quant is None:
        return None
    from adapterkit.adapters.fidelity import ENOUGH, already_on_grid, left_in_own_format, left_on_grid

    if planned.output.own:
        found = left_in_own_format(planned.folded, planned.output.encodings, tensors=SAMPLED)
        if found.worst is not None and found.retention < ENOUGH and not yes_lossy:
            raise CheckFailed(
                f"the values of {planned.base.ref} are {found.format} already, and of this change {found.retention:.1%} "
                "would survive that grid again",
                "keep what changed wider (--quant keep --keep-touched bf16), fold onto the 16-bit original (--base16), write "
                "16 bits (no --quant), keep the adapter beside the base, or insist with --yes-lossy",
            )
        return found if found.worst is not None else None

    if not already_on_grid(planned.folded, quant):
        return None
    found = left_on_grid(planned.folded, quant, tensors=SAMPLED)
    if found.retention < ENOUGH and not yes_lossy:
        raise CheckFailed(
            f"the values of {planned.base.ref} are {quant} already, and of this change {found.retention:.1%} would "
            "survive that grid again",
            "fold onto the 16-bit original (--base16, or no --as-trained), write 16 bits or another format, or insist "
            "with --yes-lossy",
        )
    return found


def execute(
    plan: Plan,
    out: Ref,
    *,
    part: int | None = None,
    jobs: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> PartReport | MergeReport:
    """Execute a saved plan: one part of it into the hidden folder beside ``out``, or the end of it when all are done.

    The inputs are opened again and the plan is made again; it must come out the same.

    Raises:
        CheckpointError: the inputs are not those of the plan.
        UsageError: there is no such part.
        OutputError: parts are missing or the disk is full.
    """
    from adapterkit.checkpoint.parts import finish_parts, write_part

    started = time.monotonic()
    if plan.request.get("verb") != "merge" or not {"base", "adapters"} <= set(plan.request):
        raise CheckpointError("this plan does not say which merge it is of", "write one with merge --save-plan")
    options = MergeOptions.of_request(plan.request)
    base, adapters = plan.request["base"], plan.request["adapters"]
    planned = plan_merge(base, adapters, headers_only=False, **vars(options))
    if (planned.plan.files, planned.plan.inputs) != (plan.files, plan.inputs):
        raise CheckpointError("the base or an adapter changed since the plan was made", "make the plan again")
    if part is None:
        record = _recorder(planned, plan.request["base"])
        finish_parts(plan, Path(out), side_files=planned.side, force=force, record=record)
        return planned.report(out, seconds=time.monotonic() - started, peak_memory=peak_memory())
    write_part(plan, part, planned.view, planned.sources, Path(out), jobs=jobs, progress=progress)
    file = plan.files[part]
    return PartReport(
        str(out), part, len(plan.files), file.name, file.nbytes, time.monotonic() - started, peak_memory()
    )


def _adapter_folders(planned: Merge) -> list[Path]:
    return [adapter.folder for adapter in planned.adapters if adapter.folder is not None]


def _fingerprint(source: Source) -> str:
    """Size and hash of the header: enough to see that a plan belongs to these files, without reading them."""
    import hashlib

    first = source.read(0, 8)
    if first[:4] == b"GGUF":
        return f"{source.size}:{hashlib.sha256(source.read(0, 1 << 20)).hexdigest()}"
    length = min(int.from_bytes(first, "little"), source.size)
    return f"{source.size}:{hashlib.sha256(source.read(8, length)).hexdigest()}"


def peak_memory() -> int:
    """The largest resident set of this process so far, in bytes.

    Linux's own high-water mark is used where there is one: ``getrusage`` also counts what the process was forked from.
    """
    import resource
    import sys

    status = Path("/proc/self/status")
    if status.exists():
        found = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM:")), "")
        if found:
            return int(found.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
