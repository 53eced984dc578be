"""`merge`: fold adapters into a base and write the result, in one streaming pass."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.adapter import Adapter, load_adapter
from adapterkit.adapters.fold import FLOATS, Folded, fold
from adapterkit.adapters.sidecars import side_files
from adapterkit.bases import open_base, open_model
from adapterkit.checkpoint.checkpoint import Checkpoint
from adapterkit.checkpoint.plan import Plan, default_jobs, parse_size, plan_safetensors
from adapterkit.dtypes import BY_LABEL, DType
from adapterkit.errors import CheckFailed, CheckpointError, UsageError
from adapterkit.report import AdapterUse, MergeReport

if TYPE_CHECKING:
    from adapterkit.adapters.fidelity import FidelityReport
    from adapterkit.adapters.rule import Rule
    from adapterkit.checkpoint.files import Source
    from adapterkit.gguf.quantize import Quantization

CONFIG = "config.json"
SAMPLED = 8  # tensors that are measured before a base's own grid is written again

Ref = str | Path
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Merge:
    """A merge that is planned: everything is checked, no tensor is read.

    Attributes:
        base, adapters: as opened.
        folded: the view and what changed in it.
        plan: what the sink will write.
        side: small files beside the weights.
    """

    base: Checkpoint
    adapters: tuple[Adapter, ...]
    weights: tuple[float, ...]
    folded: Folded
    plan: Plan
    side: dict[str, bytes]
    dtype: DType | None
    notes: tuple[str, ...]
    base_values: str = "as stored"
    quant: str | None = None
    encoded: Checkpoint | None = None
    method: str = "linear"

    @property
    def view(self) -> Checkpoint:
        """What is written: the merge, or its quantized form."""
        return self.folded.checkpoint if self.encoded is None else self.encoded

    @property
    def sources(self) -> tuple[Source, ...]:
        """Every weight file that is read, the adapters' too."""
        return (*self.base.sources, *(adapter.source for adapter in self.adapters))

    def report(self, out: Ref, **measured: Any) -> MergeReport:
        view = self.view
        used = zip(self.adapters, self.weights, strict=True)
        return MergeReport(
            out=str(out),
            base=self.base.ref,
            base_commit=self.base.commit,
            base_values=self.base_values,
            method=self.method,
            adapters=tuple(AdapterUse(a.ref, a.config.peft_type, w, a.commit, a.config.base) for a, w in used),
            dtype="auto" if self.dtype is None else str(self.dtype),
            files=tuple(path.name for path in self.plan.targets(Path(out)).values()),
            nbytes=self.plan.nbytes,
            tensors=len(view),
            touched=len(self.folded.touched),
            copied=sum(1 for step in self.plan.steps if step.source is not None),
            added=self.folded.added,
            parameters=self.folded.checkpoint.parameters,
            notes=self.notes,
            **measured,
        )


def parse_dtype(name: str) -> DType | None:
    """The dtype of ``auto``, ``bf16``, ``f16`` or ``f32``; None for ``auto``.

    Raises:
        UsageError: another name.
    """
    if name == "auto":
        return None
    if name not in BY_LABEL or BY_LABEL[name] not in FLOATS:
        raise UsageError(f"'{name}' is no output dtype", "use auto, bf16, f16 or f32")
    return BY_LABEL[name]


def plan_merge(
    base: Ref | Checkpoint,
    adapters: Sequence[Ref | Adapter],
    *,
    weights: Sequence[float] | None = None,
    dtype: str = "auto",
    max_shard_size: str | None = None,
    jobs: int | None = None,
    residual_base: bool = False,
    allow_unknown: bool = False,
    base16: Ref | None = None,
    as_trained: str | None = None,
    double_quant: bool = False,
    quant_dtype: str = "auto",
    skip_modules: Sequence[str] | None = None,
    quant: str | None = None,
    quant_double: bool = False,
    quantization: Quantization | None = None,
    method: str = "linear",
    scale: float = 1.0,
    space: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    headers_only: bool = True,
    fingerprints: bool = True,
) -> Merge:
    """Plan a merge from headers alone; see `merge` for the arguments.

    With ``headers_only`` a base or adapter on the Hub is not downloaded, so the plan can be shown but not executed. The
    ``fingerprints`` of its inputs let `execute` see whether they changed; a plan that is only shown can do without.
    """
    rule = _rule(method, scale, space, parameters)
    opened, values = open_base(
        base,
        base16=base16,
        as_trained=as_trained,
        double_quant=double_quant,
        quant_dtype=quant_dtype,
        skip_modules=skip_modules,
        headers_only=headers_only,
    )
    loaded = tuple(a if isinstance(a, Adapter) else load_adapter(a, headers_only=headers_only) for a in adapters)
    wanted = parse_dtype(dtype)
    request = {
        "verb": "merge",
        "base": str(base.ref if isinstance(base, Checkpoint) else base),
        "adapters": [adapter.ref for adapter in loaded],
        "weights": list(weights or ()),
        "dtype": dtype,
        "max_shard_size": max_shard_size,
        "residual_base": residual_base,
        "allow_unknown": allow_unknown,
        "base16": None if base16 is None else str(base16),
        "as_trained": as_trained,
        "double_quant": double_quant,
        "quant_dtype": quant_dtype,
        "skip_modules": None if skip_modules is None else list(skip_modules),
        "quant": quant,
        "quant_double": quant_double,
        "quantization": None if quantization is None else quantization.request(),
        "method": method,
        "scale": scale,
        "space": space,
        "parameters": dict(parameters or {}),
    }
    settings: dict[str, Any] = {
        "max_shard_size": None if max_shard_size is None else parse_size(max_shard_size),
        "jobs": jobs or default_jobs(),
        "inputs": {s.name: _fingerprint(s) for s in (*opened.sources, *(a.source for a in loaded))}
        if fingerprints
        else None,
        "request": request,
    }
    side: dict[str, bytes] = {}
    notes: Sequence[str]
    encoded = None
    if opened.format == "gguf":
        from adapterkit.gguf.checkpoint import GGUFCheckpoint
        from adapterkit.gguf.fold import fold_gguf
        from adapterkit.gguf.plan import plan_gguf

        assert isinstance(opened, GGUFCheckpoint)
        if wanted is not None or quant is not None or values != "as stored":
            raise UsageError(
                f"{opened.ref} is a GGUF base, which has types of its own", "use --quant, as in --quant F16"
            )
        made = fold_gguf(
            opened,
            loaded,
            weights,
            quantization=quantization,
            residual_base=residual_base,
            allow_unknown=allow_unknown,
            rule=rule,
        )
        folded, notes = made.folded, made.notes
        plan = plan_gguf(made.layout, **settings)
    else:
        if quantization is not None:
            raise UsageError(
                f"{opened.ref} is not a GGUF base, and types were given for a GGUF output", "give a GGUF base"
            )
        how: dict[str, Any] = {"residual_base": residual_base, "allow_unknown": allow_unknown, "rule": rule}
        folded = fold(opened, loaded, weights, dtype=wanted, **how)
        side, notes = side_files(opened, folded, loaded, wanted)
        if quant is not None:
            from adapterkit.adapters.quantized import quantized

            encoded = quantized(folded.checkpoint, quant, double_quant=quant_double)
            config = json.loads(side.get(CONFIG, b"{}"))
            config["quantization_config"] = encoded.config["quantization_config"]
            side[CONFIG] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
            notes = [*notes, encoded.notes[-1]]
        plan = plan_safetensors(folded.checkpoint if encoded is None else encoded, **settings)
    factors = tuple(float(w) for w in weights) if weights else (1.0,) * len(loaded)
    return Merge(
        opened,
        loaded,
        factors,
        folded,
        plan,
        side,
        wanted,
        (*opened.notes, *folded.notes, *notes),
        values,
        quant,
        encoded,
        "linear" if rule is None else str(rule),
    )


def _rule(method: str, scale: float, space: str | None, parameters: Mapping[str, Any] | None) -> Rule | None:
    """The rule asked for; None for the plain weighted sum, which needs none."""
    if (method, scale, space) == ("linear", 1.0, None) and not parameters:
        return None
    from adapterkit.adapters.rule import Rule

    return Rule(method, space, scale, dict(parameters or {}))


def merge(
    base: Ref | Checkpoint,
    adapters: Sequence[Ref | Adapter],
    out: Ref,
    *,
    weights: Sequence[float] | None = None,
    dtype: str = "auto",
    max_shard_size: str | None = None,
    jobs: int | None = None,
    force: bool = False,
    resume: bool = False,
    residual_base: bool = False,
    allow_unknown: bool = False,
    base16: Ref | None = None,
    as_trained: str | None = None,
    double_quant: bool = False,
    quant_dtype: str = "auto",
    skip_modules: Sequence[str] | None = None,
    quant: str | None = None,
    quant_double: bool = False,
    quantization: Quantization | None = None,
    fidelity: bool = False,
    yes_lossy: bool = False,
    full_record: bool = False,
    method: str = "linear",
    scale: float = 1.0,
    space: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> MergeReport:
    """Fold adapters into a base and write a Hugging Face folder, or a GGUF file when the base is one.

    The model is never loaded: tensors stream through in blocks, untouched ones are copied by the kernel. Deltas of all
    adapters are summed in float32 and rounded once.

    Args:
        base: folder, safetensors or GGUF file, or Hub id ``org/name[@revision]``, or an open `Checkpoint`.
        adapters: PEFT folders or Hub ids, or open `Adapter`s.
        out: the folder to make, or the ``.gguf`` file; it appears whole or not at all.
        weights: one per adapter, 1 each by default; may be negative.
        dtype: ``auto`` keeps every tensor's own; ``bf16``, ``f16`` or ``f32`` converts all floating tensors.
        max_shard_size: like ``5GB``; by default the base's own shards are kept.
        jobs: worker threads; the output bytes do not depend on it.
        force: replace an existing folder.
        resume: continue an interrupted run, and leave the same behind if interrupted.
        residual_base: the base is what training left behind (PiSSA, LoRA-GA, ...), not the original model.
        allow_unknown: go on where an adapter's config has fields that are not known here.
        base16: the original of a quantized base, to be folded onto in its place.
        as_trained: ``nf4``, ``fp4`` or ``int8``: fold onto the values that QLoRA training saw; see `open_base` for this
            and for ``double_quant``, ``quant_dtype`` and ``skip_modules``.
        quant: write ``nf4``, ``fp4``, ``int8`` (bitsandbytes) or ``fp8`` as transformers does; see `quantized`.
        quant_double: with double quantization.
        fidelity: measure what of the change survives in the output, in the same pass.
        yes_lossy: write a quantized base's own format again although the change does not survive it.
        quantization: the types of a GGUF output; by default every tensor keeps its own.
        method: how deltas of several adapters become one, a row of `adapterkit.ops.methods.METHODS`; nothing is
            truncated. Whole parameters, token rows and biases are not combined by it.
        scale, space, parameters: of the method, as in `combine`.
        full_record: hash every byte of base and output for ``adapterkit.json``, instead of 16 KiB of each tensor.
        progress: called now and then with bytes done and bytes in all.

    Raises:
        CheckFailed: the output would lose the change.
        NotFound, CheckpointError, AdapterError, TargetError, OutputError, UsageError, UnsafeError, AuthError, HubError
    """
    # Planning alone (`--dry-run`) never needs what writes.
    from adapterkit.checkpoint.write import check_output, write_safetensors

    started = time.monotonic()
    planned = plan_merge(
        base,
        adapters,
        weights=weights,
        dtype=dtype,
        max_shard_size=max_shard_size,
        jobs=jobs,
        residual_base=residual_base,
        allow_unknown=allow_unknown,
        base16=base16,
        as_trained=as_trained,
        double_quant=double_quant,
        quant_dtype=quant_dtype,
        skip_modules=skip_modules,
        quant=quant,
        quant_double=quant_double,
        quantization=quantization,
        method=method,
        scale=scale,
        space=space,
        parameters=parameters,
        headers_only=False,
    )
    if (Path(out).suffix == ".gguf") != (planned.plan.layout == "file"):
        kind = "a GGUF base becomes a .gguf file" if planned.plan.layout == "file" else "a folder becomes a folder"
        raise UsageError(
            f"the output {out} does not go with the base: {kind}", "name the output so, or convert the base"
        )
    check_output(planned.plan, planned.sources, Path(out), force=force, inputs=_adapter_folders(planned))
    lossy = _still_there(planned, yes_lossy=yes_lossy)
    watch = None
    if fidelity:
        from adapterkit.adapters.fidelity import Watch

        watch = Watch(planned.folded, quant)
    reused = write_safetensors(
        planned.plan,
        planned.view,
        planned.sources,
        Path(out),
        side_files=planned.side,
        record=_recorder(planned, base, full=full_record),
        jobs=jobs,
        force=force,
        resume=resume,
        progress=progress,
    )
    return planned.report(
        out,
        reused=reused,
        seconds=time.monotonic() - started,
        peak_memory=peak_memory(),
        fidelity=lossy if watch is None else watch.report(),
    )


def _recorder(planned: Merge, base: Ref | Checkpoint, *, full: bool = False) -> Callable[[Path], dict[str, bytes]]:
    """What writes ``adapterkit.json`` when the weights are finished."""
    from adapterkit.provenance import adapter_parent, base_parent, parameters_of, recorder

    request = planned.plan.request
    # Values that are decoded or quantized on the way have no bytes of their own; what they were made from does.
    stored = planned.base
    if planned.base_values != "as stored":
        stored = base if isinstance(base, Checkpoint) else open_model(base)
    parents = [base_parent(stored, full=full)]
    if request.get("base16") is not None:
        parents.append(base_parent(open_model(request["base16"]), "original", full=full))
    parents += [adapter_parent(a, weight=w) for a, w in zip(planned.adapters, planned.weights, strict=True)]
    changed = planned.quant is not None or request.get("quantization") is not None
    kind = "quantized" if changed else "merged"
    return recorder("merge", kind, parameters_of(request), parents, method=planned.quant or "", full=full)


def _still_there(planned: Merge, *, yes_lossy: bool) -> FidelityReport | None:
    """What is left of the change, when it is to be written on the grid that its base was decoded from.

    Raises:
        CheckFailed: hardly anything, and nobody said that this is fine.
    """
    if planned.quant is None:
        return None
    from adapterkit.adapters.fidelity import ENOUGH, already_on_grid, left_on_grid

    if not already_on_grid(planned.folded, planned.quant):
        return None
    found = left_on_grid(planned.folded, planned.quant, tensors=SAMPLED)
    if found.retention < ENOUGH and not yes_lossy:
        raise CheckFailed(
            f"{planned.base.ref} is {planned.quant} already, and of this change {found.retention:.1%} would survive that "
            "grid again",
            "give the 16-bit original with --base16, write 16 bits or another format, or insist with --yes-lossy",
        )
    return found


def execute(plan: Plan, out: Ref, *, part: int | None = None, jobs: int | None = None, force: bool = False) -> None:
    """Execute a saved plan: one part of it into the hidden folder beside ``out``, or the end of it when all are done.

    The inputs are opened again and the plan is made again; it must come out the same.

    Raises:
        CheckpointError: the inputs are not those of the plan.
    """
    from adapterkit.checkpoint.parts import finish_parts, write_part

    arguments: dict[str, Any] = {name: plan.request[name] for name in _REQUEST if name in plan.request}
    if plan.request.get("verb") != "merge" or not {"base", "adapters"} <= set(arguments):
        raise CheckpointError("this plan does not say which merge it is of", "write one with merge --save-plan")
    types = plan.request.get("quantization")
    if types is not None:
        from adapterkit.gguf.quantize import Quantization

        arguments["quantization"] = Quantization.of_request(types)
    planned = plan_merge(**arguments, headers_only=False)
    if (planned.plan.files, planned.plan.inputs) != (plan.files, plan.inputs):
        raise CheckpointError("the base or an adapter changed since the plan was made", "make the plan again")
    if part is None:
        finish_parts(
            plan, Path(out), side_files=planned.side, force=force, record=_recorder(planned, plan.request["base"])
        )
    else:
        write_part(plan, part, planned.view, planned.sources, Path(out), jobs=jobs)


_REQUEST = (
    "base",
    "adapters",
    "weights",
    "dtype",
    "max_shard_size",
    "residual_base",
    "allow_unknown",
    "base16",
    "as_trained",
    "double_quant",
    "quant_dtype",
    "skip_modules",
    "quant",
    "quant_double",
    "method",
    "scale",
    "space",
    "parameters",
)


def _adapter_folders(planned: Merge) -> list[Path]:
    return [adapter.source.path.parent for adapter in planned.adapters if adapter.source.path is not None]


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
