"""`merge`: fold adapters into a base and write the result, in one streaming pass."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.adapter import Adapter
from adapterkit.adapters.half_saved import half_saved_note
from adapterkit.bases import open_base, open_change, open_model
from adapterkit.checkpoint import odd
from adapterkit.checkpoint.checkpoint import Checkpoint
from adapterkit.checkpoint.files import fingerprint
from adapterkit.checkpoint.plan import Plan, default_jobs, parse_size
from adapterkit.checkpoint.slices import current
from adapterkit.errors import AdapterkitError, CheckFailed, UsageError, option, size
from adapterkit.places import Address, address_of
from adapterkit.requests.call import takes
from adapterkit.requests.merge import FOLDER, GGUF, MergeRequest
from adapterkit.stores.meter import moving
from adapterkit.values import dataclass
from adapterkit.verbs.outputs import Output, output

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adapterkit.adapters.fidelity import FidelityReport, Watch
    from adapterkit.adapters.fold import Folded
    from adapterkit.checkpoint.files import Source
    from adapterkit.checkpoint.listing import Listing
    from adapterkit.checkpoint.tensor import Tensor
    from adapterkit.verbs.calibration import Calibration
    from adapterkit.verbs.job import Job, Measured
    from adapterkit.verbs.report import MergeReport
    from adapterkit.verbs.residual import Residual

COARSE_BITS = 5  # formats of so many bits and fewer lose a change to values that lie on such a grid already
LOOKED_AT = 4_000_000_000  # bytes of inputs in a store of which a dry run reads a sample too
SAMPLED = 8  # tensors that are measured before a base's own grid is written again
FEW = 4  # tensors that are measured to say what another format would keep
HELD = 1 << 28  # bytes that an encoder may hold for it
MOST_LEFT = 0.5  # error in the outputs of layers beside what the change does there, above which feedback stops


@dataclass(frozen=True)
class Merge:
    """A merge that is planned: everything is checked, no tensor is read.

    Attributes:
        request: what was asked for.
        base, adapters: as opened.
        output: the fold, in the form in which it will be written.
        settings: of its planner.
        base_values: which values of its own the base has; see `open_base`.
    """

    request: MergeRequest
    base: Checkpoint
    adapters: tuple[Adapter, ...]
    output: Output
    base_values: str = "as stored"
    settings: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def residual(self) -> Residual | None:
        """What rounding takes, where it is to be written beside the output."""
        if self.request.residual is None:
            return None
        from adapterkit.verbs.residual import Residual

        return Residual(self, self.request.residual)

    def again(self) -> Output:
        """The same output with handles of its own."""
        return output(self.base, self.adapters, self.request, self.settings, values=self.base_values)

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
        return self.request.adapter_weights or (1.0,) * len(self.adapters)

    @property
    def notes(self) -> tuple[str, ...]:
        of_base = self.base.notes
        if self.output.own:
            from adapterkit.checkpoint.decoded import DECODED

            of_base = tuple(text for text in of_base if not text.startswith(DECODED))  # they stay as they are stored
        return (*of_base, *self._twice, *self.folded.notes, *self.output.notes)

    @cached_property
    def _twice(self) -> tuple[str, ...]:
        """What to say of adapters that the base holds already."""
        from adapterkit.checkpoint.folder import RECORD
        from adapterkit.checkpoint.publish import named_beside

        place = address_of(self.base.ref) or _folder_of(self.base)
        if isinstance(place, Address):
            names = getattr(self.base.sources[0], "listed", None) if self.base.sources else None
            if names is not None and RECORD not in names:
                return ()
        else:
            place = Path(self.base.ref) if self.base.format == "gguf" else place
            if place is None or not (place / RECORD if place.is_dir() else named_beside(place, RECORD)).is_file():
                return ()
        from adapterkit.provenance.held import folded_before

        found = folded_before(place, self.adapters)
        return tuple(
            f"{one} is in {self.base.ref} already, as the record beside it says: folded once more, it counts twice"
            for one in found
        )

    @property
    def sources(self) -> tuple[Source, ...]:
        """Every weight file that is read, the adapters' too."""
        return (*self.base.sources, *(source for adapter in self.adapters for source in adapter.sources))

    def rounded(self) -> dict[str, Any]:
        """Figures of rounding with feedback, for the record."""
        calibration = self.output.calibration
        if calibration is None:
            return {}
        figures = {name: float(f"{value:.6g}") for name, value in calibration.figures.items()}
        return {"rounding": {"tokens": calibration.tokens, **figures}}

    def computed(self) -> list[Tensor]:
        """What is computed: the fold, and what is written of it."""
        from adapterkit.adapters.fidelity import merged_tensors

        return [*merged_tensors(self.folded).values(), *self.view.values()]

    def _fed_back(self, dry_run: bool) -> tuple[str, ...]:
        calibration = self.output.calibration
        if calibration is None:
            return ()
        said = f"rounded with feedback, by {calibration.tokens} tokens of {self.request.calibration}"
        if dry_run:
            at_most = f"{size(calibration.disk)} of disk"
            text = self.request.calibration
            return (
                f"the merged model reads {text} first; the inputs of its layers are kept meanwhile in at most {at_most}",
            )
        figures = calibration.figures
        if not figures:
            return (said,)
        beside = f"{figures['left']:.2g} of what the change does to the outputs of layers there"
        return (f"{said}: the error is {beside} (the nearest values: {figures['nearest']:.2g})",)

    def _half_saved(self) -> tuple[str, ...]:
        found = ((adapter.ref, half_saved_note(adapter)) for adapter in self.adapters)
        return tuple(f"{ref} {words}" for ref, words in found if words)

    def _trained_elsewhere(self, dry_run: bool) -> tuple[str, ...]:
        """Adapters that say they were trained on quantized values that these are not, and how far those are."""
        from adapterkit.adapters.trained_base import already_coarse, elsewhere, how_far, trained_base

        here = not dry_run and all(source.path is not None for source in self.sources)
        said = []
        for adapter in self.adapters:
            words, trained = elsewhere(adapter, self.base, self.base_values), trained_base(adapter)
            if adapter.whole or words is None or trained is None:
                continue
            if here and self.base_values == "as stored" and self.base.format != "gguf" and already_coarse(self.folded):
                continue  # a folder that was decoded from such a grid has the values that training saw
            far = how_far(self.folded, trained.grid) if here else None
            moved = "" if far is None else f"; quantizing moves the base {far:.2g} times as far as the adapters do"
            said.append(f"{words}{moved}")
        return tuple(said)

    def _stored(self, base: Any) -> Checkpoint:
        """The base as it is stored. Values that are decoded or quantized on the way have no bytes of their own; what they
        were made from does."""
        if self.base_values == "as stored":
            return self.base
        return open_model(base) if self.base.stored is None else self.base.stored.checkpoint

    def report(
        self, measured: Measured, fidelity: FidelityReport | None = None, instead: tuple[str, ...] = ()
    ) -> MergeReport:
        """What was done, or would be; ``instead`` says what another format would have kept."""
        from adapterkit.adapters.merged import not_finite
        from adapterkit.verbs.placed import said
        from adapterkit.verbs.report import AdapterUse, MergeReport

        copied = {} if measured.dry_run else odd.sampled(self.view.values())
        computed = [self.folded.checkpoint[name] for name in self.folded.touched]
        used = zip(self.adapters, self.weights, strict=True)
        dtype, rule, asked = self.request.floats, self.request.rule, self.request
        out = asked.target
        with moving() as looked:
            notes = self.notes  # a base in a store may have a record, which is looked at for them
        return MergeReport(
            out="" if out is None else str(asked.out),
            base=self.base.ref,
            base_commit=self.base.commit,
            base_values=self.base_values,
            method="linear" if rule is None else str(rule),
            adapters=tuple(
                AdapterUse(a.ref, a.config.peft_type, w, a.commit, a.config.base, a.config.label) for a, w in used
            ),
            dtype="auto" if dtype is None else str(dtype),
            files=self.plan.names(out or Path("-")),
            nbytes=self.plan.nbytes,
            tensors=len(self.view),
            touched=len(self.folded.touched),
            copied=sum(1 for step in self.plan.steps if step.source is not None),
            added=self.folded.added,
            reused=measured.reused,
            parameters=self.folded.checkpoint.parameters,
            seconds=measured.seconds,
            peak_memory=measured.peak_memory,
            fidelity=fidelity,
            min_retention=asked.min_retention,
            min_cosine=asked.min_cosine,
            max_error=asked.max_error,
            max_dead=asked.max_dead,
            dry_run=measured.dry_run,
            residual=None if self.residual is None else self.residual.report(),
            **asdict(measured.moved + looked.moved),
            notes=(
                *notes,
                *measured.notes,
                *instead,
                *self._fed_back(measured.dry_run),
                *self._half_saved(),
                *self._trained_elsewhere(measured.dry_run),
                *not_finite(computed),
                *odd.said(copied),
                *(() if measured.dry_run else said(asked.device, self.computed())),
            ),
        )

    def job(self, base: Any = None) -> Job:
        """The merge as what an executor takes.

        Args:
            base: as the caller named it, where the request names what it is pinned to.
        """
        from adapterkit.verbs.beside import beside_of
        from adapterkit.verbs.job import Job

        asked = self.request
        named = asked.base if base is None else base
        loss = Loss(self, watched=asked.measures)
        residual = () if self.residual is None else (self.residual.job(),)
        folders = tuple(adapter.folder for adapter in self.adapters if adapter.folder is not None)
        return Job(
            plan=self.plan,
            tensors=self.view,
            sources=self.sources,
            out=asked.target,
            report=lambda measured: self.report(measured, loss.report(), loss.instead),
            side=self.side,
            record=_recorder(self, named, full=asked.full_record, measured=loss.figures),
            inputs=folders,
            beside=beside_of(
                asked,
                [named, asked.base16, *asked.given_adapters],
                source=_place_of(self.base),
                plan=self.plan,
                sources=self.sources,
            ),
            ahead=loss.ahead,
            force=asked.force,
            also=(*(() if self.output.tower is None else (self.output.tower,)), *residual),
            recorded=lambda: (self._stored(named), *self.adapters),
            sliced=asked.rule is None,
        )


def planned(request: MergeRequest, *, headers_only: bool = True, fingerprints: bool = True) -> Merge:
    """Plan a merge from headers alone; see `adapterkit.verbs.plan_merge.plan_merge`.

    Raises:
        NotFound, CheckpointError, AdapterError, TargetError, UsageError, UnsafeError, AuthError, HubError
    """
    opened, values = open_base(request.base, base16=request.base16, trained=request.trained, headers_only=headers_only)
    form = request.form or (GGUF if opened.format == "gguf" else FOLDER)
    if request.dense_modules and form == GGUF and opened.format != "gguf":
        from adapterkit.gguf.arch.dense_modules import with_dense

        opened = with_dense(opened)
    asked = replace(request, to=form)
    given = (a if isinstance(a, Adapter) else open_change(a, headers_only=headers_only) for a in asked.given_adapters)
    loaded = tuple(asked.narrowed(asked.told(adapter)) for adapter in given)
    _no_copy(loaded, asked)
    inputs = None
    if fingerprints and current() is None:
        inputs = {s.name: fingerprint(s) for s in (*opened.sources, *(source for a in loaded for source in a.sources))}
    settings: dict[str, Any] = {
        "max_shard_size": None if asked.max_shard_size is None else parse_size(asked.max_shard_size),
        "jobs": asked.jobs or default_jobs(),
        "inputs": inputs,
        "request": {
            "verb": asked.VERB,
            "base": str(getattr(asked.base, "ref", asked.base)),
            "adapters": [adapter.ref for adapter in loaded],
            **asked.stated(),
        },
    }
    made = output(opened, loaded, asked, settings, values=values)
    return Merge(asked, opened, loaded, made, values, settings)


def _no_copy(adapters: tuple[Adapter, ...], asked: MergeRequest) -> None:
    """Refuse a merge whose result is one of its inputs.

    Raises:
        UsageError: one whole model with weight 1.
    """
    if (
        len(adapters) == 1
        and adapters[0].whole
        and asked.rule is None
        and set(asked.adapter_weights or (1.0,)) == {1.0}
    ):
        raise UsageError(
            f"{adapters[0].ref} is a whole model: merged alone with weight 1 it is itself",
            f"name several models, give it a {option('weights')}, or give an adapter",
        )


@takes(MergeRequest)
def merge(request: MergeRequest) -> MergeReport:
    """Fold adapters into a base and write a Hugging Face folder, or a GGUF file where ``out`` ends in ``.gguf``.

    The model is never loaded: tensors stream through in blocks, untouched ones are copied by the kernel. Deltas of all
    adapters are summed in float32 and rounded once. The output appears whole or not at all.

    Raises:
        CheckFailed: the output would lose the change.
        NotFound, CheckpointError, AdapterError, TargetError, OutputError, UsageError, UnsafeError, AuthError, HubError
    """
    from adapterkit.verbs.carry import carry_out
    from adapterkit.verbs.ladder import abreast, plans_of, rungs

    started = time.monotonic()
    how = {"headers_only": not request.writes, "fingerprints": request.writes or bool(request.save_plan)}
    made = [planned(one, **how) for one in rungs(request)]
    jobs = [one.job() for one in made]
    report: MergeReport = carry_out(abreast(jobs), request, started, plans_of(request, jobs))
    return report


def replan(data: Mapping[str, Any], out: Path | Address | None) -> Merge:
    """The merge of a saved plan, planned again.

    Raises:
        CheckpointError: the request is of another version.
    """
    inputs = {"base": data["base"], "adapters": tuple(data["adapters"]), "out": out}
    return planned(MergeRequest.of_stated(data, **inputs), headers_only=False)


@dataclass
class Loss:
    """What of a change is lost: measured ahead where the base's own grid is written again, or in the pass itself."""

    merge: Merge
    watched: bool
    watch: Watch | None = field(default=None, init=False)
    sampled: FidelityReport | None = field(default=None, init=False)
    instead: tuple[str, ...] = field(default=(), init=False)

    def ahead(self) -> None:
        """See `_still_there`. Values on the Hub are not there to be measured before a download; those in a store are."""
        if self._can_look():
            asked = self.merge.request
            # The text is read for a merge that is written, also from a plan, and not for one that is shown.
            planned_to_write = asked.save_plan is not None and not asked.yes_lossy
            if asked.writes or planned_to_write or self.merge.output.calibration is None:
                self.sampled = _still_there(self.merge, yes_lossy=asked.yes_lossy or asked.residual is not None)
            if self.merge.request.writes:
                self.instead = _if_kept(self.merge)
        if self.watched and self.merge.request.writes and self.watch is None:
            self.watch = self._watch()

    def unwritten(self) -> FidelityReport | None:
        """What of the change would survive, every changed tensor computed for it; None where its values are not here.

        Raises:
            CheckFailed: see `_still_there`.
        """
        if not self._can_look():
            return None
        _still_there(self.merge, yes_lossy=self.merge.request.yes_lossy)
        return self._watch().measure() if self.watched else None

    def _can_look(self) -> bool:
        """Whether values can be read now: a plan of a large model in a store is made of headers alone."""
        sources = self.merge.sources
        stored = sum(source.size for source in sources if source.path is None)
        here = all(source.path is not None or source.version for source in sources)
        return here and (self.merge.request.writes or stored <= LOOKED_AT)

    def _watch(self) -> Watch:
        from adapterkit.adapters.fidelity import Watch, own_format

        made = self.merge.output
        if made.own:
            words = own_format(made.encodings) if made.encodings else None
            return Watch(self.merge.folded, words, lambda name, shape: None, made.encodings)
        kind = self.merge.request.folder_format or _grid_name(self.merge)
        return Watch(self.merge.folded, kind, made.through, importance=made.importance)

    def report(self) -> FidelityReport | None:
        """What was measured, if anything was."""
        return self.sampled if self.watch is None else self.watch.report()

    def figures(self) -> dict[str, Any]:
        """The evidence that a record gets when the weights are finished."""
        found, beside = self.report(), self.merge.residual
        residual = {} if beside is None else beside.evidence()
        residual |= self.merge.rounded()
        from adapterkit.verbs.placed import computed_on

        residual |= computed_on(self.merge.request.device, self.merge.computed())
        if found is None:
            return residual
        figures = {
            name: float(f"{getattr(found, name):.6g}")
            for name in ("cosine", "error", "weighed", "retention", "relative", "unmoved")
            if getattr(found, name) is not None
        }
        figures["dead"] = len(found.dead)
        return {
            **residual,
            "fidelity": {**figures, "format": found.format, "worst": found.worst.name if found.worst else ""},
        }


def _recorder(
    planned: Merge,
    base: Any,
    *,
    full: bool = False,
    measured: Callable[[], Mapping[str, Any]] | None = None,
) -> Callable[[Path | Listing], dict[str, bytes]]:
    """What writes ``adapterkit.json`` when the weights are finished."""
    return partial(_record, planned, base, full, measured)


def _record(
    planned: Merge, base: Any, full: bool, measured: Callable[[], Mapping[str, Any]] | None, folder: Path | Listing
) -> dict[str, bytes]:
    from adapterkit.provenance.record import adapter_parent, base_parent, parameters_of, recorder

    asked = planned.request
    stored = planned._stored(base)
    parents = [base_parent(stored, full=full)]
    if asked.base16 is not None:
        parents.append(base_parent(open_model(asked.base16), "original", full=full))
    parents += [adapter_parent(a, weight=w) for a, w in zip(planned.adapters, planned.weights, strict=True)]
    changed = asked.folder_format is not None or asked.gguf_types is not None
    kind = "quantized" if changed else "merged"
    # The words alone: which original it was stands among the parents.
    stated = {**parameters_of(planned.plan.request), "base_values": planned.base_values.partition(" (")[0]}
    name = "" if asked.target is None else asked.target.name
    write = recorder(
        *("merge", kind, stated, parents),
        method=asked.folder_format or "",
        evidence=measured,
        full=full,
        name=name,
    )
    return write(folder)


def _grid_name(planned: Merge) -> str | None:
    """What a GGUF output's types are called, when they are not the base's own."""
    asked = planned.request.gguf_types
    if planned.output.through is None or planned.request.folder_format is not None:
        return None
    if asked is not None and asked.mix is not None:
        return str(asked.mix)
    return "its GGUF types" if planned.base.format == "gguf" else None


def _still_there(planned: Merge, *, yes_lossy: bool) -> FidelityReport | None:
    """What is left of the change, when it is to be written on the grid that its base was decoded from.

    Raises:
        CheckFailed: hardly anything, and nobody said that this is fine.
    """
    quant = planned.request.folder_format
    if quant is None:
        return _still_there_in_gguf(planned, yes_lossy=yes_lossy)
    from adapterkit.adapters.fidelity import (
        DEAD,
        ENOUGH,
        already_on_grid,
        coarse_tensors,
        left_in_own_format,
        left_on_grid,
    )
    from adapterkit.codecs.table import find_kind

    if planned.output.own:
        found = left_in_own_format(planned.folded, planned.output.encodings, tensors=SAMPLED)
        # A change folded onto the original is spread by rounding, and kept on average; on the grid itself it is there or not.
        calibration = planned.output.calibration
        if calibration is not None:
            return _fed(planned, calibration, found, yes_lossy=yes_lossy)
        lost = found.retention < ENOUGH or (found.cosine < DEAD and planned.request.base16 is None)
        if found.worst is not None and lost and not (yes_lossy or planned.output.aware):
            raise CheckFailed(
                f"the values of {planned.base.ref} are {found.format} already, and of this change {found.retention:.1%} "
                f"would survive that grid again (cosine {found.cosine:.2f})",
                f"keep what changed wider ({option('quant', 'keep')} {option('keep_touched', 'bf16')}), fold onto the 16-bit "
                f"original ({option('base16')}), write 16 bits (no {option('quant')}), keep what rounding takes "
                f"beside the output ({option('residual', '16')}), or insist with {option('yes_lossy', True)}",
            )
        return found if found.worst is not None else None

    # What stays in 16 bits keeps its change, and would hide in the sums what others lose.
    through, folded = planned.output.through, planned.folded
    if through is not None:
        shapes = folded.checkpoint.shapes
        folded = replace(folded, touched=tuple(n for n in folded.touched if through(n, shapes[n]) is not None))
    same = bool(already_on_grid(folded, quant))
    if not same and (find_kind(quant).bits > COARSE_BITS or not coarse_tensors(folded)):
        return None
    found = left_on_grid(folded, quant, tensors=SAMPLED, through=through)
    if (found.retention < ENOUGH or (same and found.cosine < DEAD)) and not yes_lossy:
        raise CheckFailed(
            f"the values of {planned.base.ref} are {quant if same else 'on a coarse grid'} already, and of this change "
            f"{found.retention:.1%} would survive {'that grid again' if same else f'that of {quant}'} "
            f"(cosine {found.cosine:.2f})",
            f"fold onto the 16-bit original ({option('base16')}, or no {option('as_trained')}), write 16 bits or another "
            f"format, or insist with {option('yes_lossy', True)}",
        )
    return found


def _fed(planned: Merge, calibration: Calibration, found: FidelityReport, *, yes_lossy: bool) -> FidelityReport | None:
    """The report of a merge that is rounded with feedback, whose loss is that of the outputs of layers: single weights move
    away from what was wanted so that sums of them do not.

    Raises:
        CheckFailed: most of what the change does there is lost, and nobody said that this is fine.
    """
    figures = calibration.figures
    if figures and figures["left"] > MOST_LEFT and not yes_lossy:
        raise CheckFailed(
            f"rounded with feedback onto {found.format}, the outputs of layers are off by {figures['left']:.2f} of what this "
            f"change does to them (the nearest values: {figures['nearest']:.2f})",
            f"keep what changed wider ({option('quant', 'keep')} {option('keep_touched', 'bf16')}), keep what rounding takes "
            f"beside the output ({option('residual', '16')}, with the nearest values), or insist with "
            f"{option('yes_lossy', True)}",
        )
    return found if found.worst is not None else None


def _if_kept(planned: Merge) -> tuple[str, ...]:
    """What the base's own format would keep of the bytes and of the change, where it is not what is written."""
    form = planned.base.stored
    if form is None or planned.output.own or planned.request.to != FOLDER or planned.base.format == "gguf":
        return ()
    from adapterkit.adapters.fidelity import left_in_own_format
    from adapterkit.adapters.kept import kept

    name = option("quant", "keep")
    try:
        made = kept(planned.folded)
        # What would have to be held or read whole is left out: this is only said beside another output.
        small = {
            weight: one
            for weight, one in made.encodings.items()
            if one.encoder.memory <= HELD and not one.encoder.twice
        }
        found = left_in_own_format(planned.folded, small, tensors=FEW) if small else None
    except AdapterkitError as error:
        return (f"{name} could not write this: {error.message}",)
    new = sum(tensor.nbytes for tensor in made.view.values())
    whole = sum(tensor.nbytes for tensor in planned.view.values())
    said = f"{name} would write {size(new)} in place of {size(whole)}"
    if found is None or found.worst is None:
        return (said,)
    return (f"{said} and keep about {found.retention:.0%} of the change (cosine {found.cosine:.2f})",)


def _still_there_in_gguf(planned: Merge, *, yes_lossy: bool) -> FidelityReport | None:
    """What is left of the change in a GGUF file, when the values of a folder lie on a coarse grid already.

    A folder whose record says that it was decoded from a GGUF file is measured whatever that file's types were, so that the
    report warns; it is refused when its values show a coarse grid too.

    Raises:
        CheckFailed: hardly anything, and nobody said that this is fine.
    """
    through, types = planned.output.through, planned.request.gguf_types
    if through is None or planned.base.format == "gguf" or (types is not None and types.keep_below is not None):
        return None
    from adapterkit.adapters.fidelity import ENOUGH, left_on_grid, merged_tensors
    from adapterkit.gguf.grids import few_bits

    merged = [tensor for tensor in merged_tensors(planned.folded).values() if len(tensor.shape) > 1]
    some = merged if len(merged) <= SAMPLED else [merged[i * len(merged) // SAMPLED] for i in range(SAMPLED)]
    coarse = any(few_bits(tensor.base) for tensor in some)
    if not some or not (coarse or _was_gguf(planned.base)):
        return None
    kind = _grid_name(planned) or "its GGUF types"
    found = left_on_grid(planned.folded, kind, tensors=SAMPLED, through=through)
    if coarse and found.retention < ENOUGH and not yes_lossy:
        raise CheckFailed(
            f"the values of {planned.base.ref} are on a coarse grid already, and of this change {found.retention:.1%} would "
            f"survive {kind}",
            f"fold onto the 16-bit original, keep what changed wider ({option('keep_touched', 'Q8_0')}), or insist with "
            f"{option('yes_lossy', True)}",
        )
    return found


def _was_gguf(base: Checkpoint) -> bool:
    """Whether the record beside a folder says that it was decoded from a GGUF file."""
    from adapterkit.provenance.record import was_converted

    folder = _place_of(base)
    return folder is not None and was_converted(folder, "hf")


def _place_of(base: Checkpoint) -> Path | Address | None:
    """The folder of a Hugging Face base, here or in a store."""
    return _folder_of(base) or (None if base.format == "gguf" else address_of(base.ref))


def _folder_of(base: Checkpoint) -> Path | None:
    """The folder of a Hugging Face base on this disk."""
    from adapterkit.checkpoint.pipeline import folder_of

    return None if base.format == "gguf" else folder_of(base)


__all__ = ["Merge", "merge", "planned", "replan"]
