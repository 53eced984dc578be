"""A verification whose inputs are open: what is compared, and what the findings and figures mean."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.checkpoint.files import check_unchanged
from adapterkit.errors import counted, option
from adapterkit.ops.device import CPU
from adapterkit.requests.groups import OfAdapters
from adapterkit.requests.verify import LEVELS
from adapterkit.stores.files import brought
from adapterkit.verbs.placed import FIGURES, said
from adapterkit.verbs.verify.report import ERROR, NOTE, WARNING, Finding, Thresholds, VerifyReport

if TYPE_CHECKING:
    from adapterkit.adapters.adapter import Adapter
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.checkpoint.files import Source
    from adapterkit.requests.verify import VerifyRequest
    from adapterkit.verbs.verify.inputs import Asked, Digests
    from adapterkit.verbs.verify.report import ModelLevel, TensorLevel, VerifiedInput
    from adapterkit.verbs.verify.subject import Subject
    from adapterkit.verbs.verify.tensors import Judged

Ref = str | Path
Progress = Callable[[int, int], None]

LEAST_RETENTION = (
    0.5  # below, more of the change is lost than kept: not what was trained, unless a user says it will do
)
ENOUGH = 0.9  # retention below which a report warns


@dataclass(frozen=True)
class OpenVerification:
    """A verification whose inputs are open; headers have been read, and nothing else.

    Attributes:
        request: what was asked for.
        found, stored: MERGED and the base, as they are stored.
        loaded: the adapters.
        how: the options of the merge.
        planned: what is compared with what.
        every: findings that are known already.
        fed: MERGED was rounded with feedback, by its record.
        beside: the residual beside MERGED.
        digests: of the inputs, as far as they were asked for.
    """

    request: VerifyRequest
    found: Checkpoint
    stored: Checkpoint
    loaded: tuple[Adapter, ...]
    how: Asked
    planned: Subject
    every: tuple[Finding, ...]
    fed: bool
    beside: Adapter | None
    digests: Digests

    @property
    def by_tensors(self) -> bool:
        """Whether tensors are compared."""
        return self.request.depth >= LEVELS.index("tensors")

    @property
    def sources(self) -> tuple[Source, ...]:
        """Every file that is read."""
        beside = () if self.beside is None else (self.beside,)
        read = (
            self.found,
            self.stored,
            self.planned.base,
            *self.loaded,
            *beside,
        )  # planned on the original, if it has one
        return tuple({id(source): source for one in read for source in one.sources}.values())

    @property
    def thresholds(self) -> Thresholds:
        """What is asked for."""
        asked = self.request
        return Thresholds(
            *(asked.max_kl, asked.min_top1, asked.min_retention, asked.min_cosine, asked.max_error, asked.max_dead)
        )

    @property
    def options(self) -> dict[str, Any]:
        """The options of the merge that are not its own."""
        return _shown(self.planned.options)

    def inputs(self) -> tuple[VerifiedInput, ...]:
        """Everything that is read, by digest."""
        from adapterkit.verbs.verify.inputs import inputs, prompts_of, residual_of

        original = self.how.given.get("base16")
        found = inputs(self.found, self.stored, original, self.loaded, self.planned.weights, self.digests)
        beside = () if self.beside is None else (residual_of(self.beside, self.digests),)
        asked = () if self.request.prompts is None else (prompts_of(self.request.prompts),)
        return (*found, *beside, *asked)

    def compared(self, jobs: int | None, progress: Progress | None) -> tuple[Judged, ...]:
        """Every weight that is in both, compared here."""
        from adapterkit.verbs.verify.tensors import compare

        return compare(self.planned, jobs=jobs, progress=progress)

    def report(
        self, judged: tuple[Judged, ...], started: float, jobs: int | None, progress: Progress | None
    ) -> VerifyReport:
        """What compared weights and the other levels say.

        Args:
            judged: the weights, in the order of the subject's; none where tensors are not compared.
            started: when the verification began.
        """
        from adapterkit.verbs.job import peak_memory
        from adapterkit.verbs.verify.findings import findings
        from adapterkit.verbs.verify.load import loading, names
        from adapterkit.verbs.verify.sanity import sanity
        from adapterkit.verbs.verify.tensors import level as tensor_level

        request, planned, beside, how, fed = self.request, self.planned, self.beside, self.how, self.fed
        prompts = None if request.prompts is None else brought(request.prompts)
        around = sanity(planned, request.on_purpose)
        tensors = layers = model = pair = None
        every = list(self.every)
        if self.by_tensors:
            wrong, named = findings(planned, judged)
            tensors = tensor_level(planned, judged, named, started)
            if beside is not None:
                from adapterkit.checkpoint.plan import default_jobs
                from adapterkit.verbs.verify.pair import together

                pair, unfit = together(planned, tensors, beside, jobs=jobs or default_jobs(), progress=progress)
                wrong = (*wrong, *unfit)
            there = tensors if pair is None else pair
            every += [
                *wrong,
                *around,
                *loading(planned, around),
                *(_fed(there, judged, wrong) if fed else _not_fed(how)),
                *(
                    ()
                    if fed and request.min_retention is None
                    else _retention(there.retention, request.min_retention, wrong)
                ),
                *_cosine(there.cosine, request.min_cosine),
                *_error(there.error, request.max_error),
                *_dead(there, request.max_dead),
            ]
        else:
            every += [*names(planned), *around, *loading(planned, around)]
        if request.depth >= LEVELS.index("layers"):
            from adapterkit.verbs.verify.layers import compare_layers
            from adapterkit.verbs.verify.replay import activations

            replayed, why = activations(planned, prompts)
            layers = compare_layers(planned, inputs=replayed, jobs=jobs)
            if why:
                every.append(Finding("random inputs", NOTE, f"layers were fed random numbers: {why}"))
        if request.depth >= LEVELS.index("model"):
            from adapterkit.verbs.verify.model import compare_models

            model = compare_models(planned, self.stored, prompts, jobs=jobs)
            every += _answers(model, request.max_kl, request.min_top1)
            if beside is not None:
                every.append(
                    Finding("alone", NOTE, f"the models answered without {beside.ref}: the figures are of MERGED alone")
                )
        read = self.inputs()
        check_unchanged(self.sources)
        return VerifyReport(
            ok=not any(finding.severity == ERROR for finding in every),
            merged=self.found.ref,
            base=self.stored.ref,
            adapters=tuple(adapter.ref for adapter in self.loaded),
            level=LEVELS[request.depth],
            findings=tuple(every),
            tensors=tensors,
            layers=layers,
            model=model,
            residual="" if beside is None else beside.ref,
            pair=pair,
            thresholds=self.thresholds,
            options=self.options,
            record=how.record is not None,
            inputs=read,
            notes=tuple(dict.fromkeys((*planned.notes, *said(request.device, agrees=FIGURES)))),
            seconds=time.monotonic() - started,
            peak_memory=peak_memory(),
        )


def opened(request: VerifyRequest) -> OpenVerification:
    """Open what is compared, and plan the merge that MERGED claims to be; see `verify`."""
    from adapterkit.adapters.adapter import Adapter as Loaded
    from adapterkit.bases import open_change
    from adapterkit.checkpoint.limits import IN_TRANSFORMERS, MAPPED, check_memory
    from adapterkit.checkpoint.plan import BASELINE_MEMORY
    from adapterkit.verbs.verify.inputs import Digests, asked, open_inputs, same_as_recorded
    from adapterkit.verbs.verify.metadata import check_keys
    from adapterkit.verbs.verify.subject import subject

    prompts = None if request.prompts is None else brought(request.prompts)
    found, stored = open_inputs(request.merged, request.base)
    if request.depth >= LEVELS.index("tensors"):
        # torch aborts where it gets too little, and the model's class is built in transformers where that is installed.
        more = IN_TRANSFORMERS if find_spec("transformers") is not None else 0
        check_memory(BASELINE_MEMORY, "verify", mapped=MAPPED + more)
    given = request.adapters
    assert isinstance(given, tuple)
    loaded = tuple(a if isinstance(a, Loaded) else open_change(a) for a in given)
    if request.depth >= LEVELS.index("model"):
        from adapterkit.verbs.verify.model import check_models

        check_models(found, stored, prompts)
    digests = Digests()
    how = asked(found, loaded, request.of_merge(), digests)
    parts = OfAdapters(only=how.given.get("only", ()), skip=how.given.get("skip", ()))
    loaded = tuple(parts.narrowed(adapter) for adapter in loaded)
    options = {k: v for k, v in how.given.items() if k not in ("only", "skip")}
    every = [*how.findings, *same_as_recorded(how.record, stored, found, digests)]
    if request.device != CPU:
        options["device"] = request.device
    # The record speaks for the files, the base and the adapters that it names, and for no others.
    fed = how.fed and not every and not how.other_weights
    planned = subject(found, stored, loaded, options, fed=fed)
    check_keys(planned, request.on_purpose)
    beside, missing = _residual(request.residual, how, found)
    return OpenVerification(request, found, stored, loaded, how, planned, (*every, *missing), fed, beside, digests)


def _not_fed(how: Asked) -> list[Finding]:
    """What is said where the record speaks of feedback, and of other files or inputs."""
    if not how.fed:
        return []
    text = (
        "the record says that MERGED was rounded with feedback, and it is not the record of these files and inputs: "
        "weights are compared as if they were rounded to the nearest values"
    )
    hint = "give the files, the base, the adapters and the weights that the record names, or merge again"
    return [Finding("feedback", WARNING, text, hint)]


def _fed(there: TensorLevel, judged: Sequence[Judged], wrong: Sequence[Finding]) -> list[Finding]:
    """What is said of weights that were rounded with feedback. Of a small change the single weight shows little, and all
    together show whether it is there.
    """
    from adapterkit.ops.fidelity import FidelitySums
    from adapterkit.verbs.verify.tensors import is_there

    found = [one for one in judged if one.item.fed and one.item.touched]
    sums = sum((one.sums for one in found), FidelitySums())
    near = sum((one.ours for one in found), FidelitySums())
    own = all(one.item.own for one in found)
    if not any(one.severity == ERROR for one in wrong) and not is_there(sums, near, own=own):
        text = (
            f"{sums.retention:.0%} of the change is in all weights together that were rounded with feedback, and "
            f"{near.retention:.0%} in their nearest values"
        )
        hint = "merge again: the adapter was not applied, or not as the record says"
        return [Finding("other change", ERROR, text, hint, tuple(one.item.name for one in found), sums.retention)]
    ours = [(row.error, row.ours) for row in there.tensors if row.error is not None and row.ours]
    beside = (
        f", {sum(a for a, _ in ours) / sum(b for _, b in ours):.2g} times that of the nearest values" if ours else ""
    )
    text = (
        f"rounded with feedback: the error of single weights beside the change is {there.error:.3g}{beside}, for outputs of "
        "layers that are nearer"
    )
    hint = f"see {option('level', 'layers')} or {option('level', 'model')} for what is left of the change"
    return [Finding("feedback", NOTE, text, hint, figure=there.error)]


def _residual(given: Ref | None, how: Asked, found: Checkpoint) -> tuple[Adapter | None, tuple[Finding, ...]]:
    """The residual beside MERGED: the one that is given, or that the record speaks of."""
    from adapterkit.bases import open_change
    from adapterkit.verbs.verify.inputs import place
    from adapterkit.verbs.verify.pair import stated_residual

    path, missing = (given, ()) if given is not None else stated_residual(how.record, place(found))
    return None if path is None else open_change(path), missing


def _retention(there: float, asked: float | None, wrong: Sequence[Finding]) -> list[Finding]:
    """What the share of the change that survives means."""
    least = LEAST_RETENTION if asked is None else asked
    if any(finding.severity == ERROR for finding in wrong) and asked is None:
        return []  # the mistake itself is named
    if there < least:
        bound = f"{option('min_retention')} asks for {least:.1%}" if asked is not None else "less than half"
        text = f"{there:.1%} of the change survives ({bound}): the rest was swallowed by the output's dtype or format"
        hint = f"write {option('dtype', 'f16')} or f32, start from the 16-bit base, or keep the adapter beside the base"
        return [Finding("swallowed", ERROR, text, hint, figure=there)]
    if there < ENOUGH:
        text = f"{there:.1%} of the change survives: the rest is less than the output's dtype or format can hold"
        return [
            Finding("swallowed", WARNING, text, f"write {option('dtype', 'f16')} or f32 if that matters", figure=there)
        ]
    return []


def _cosine(there: float, asked: float | None) -> list[Finding]:
    """A change that is there, but lies too far from what was trained."""
    if asked is None or there >= asked:
        return []
    text = (
        f"what is there of the change has cosine {there:.4f} with it ({option('min_cosine')} asks for {asked:g}): the rest is "
        "what the output's dtype or format added"
    )
    return [Finding("swallowed", ERROR, text, f"write {option('dtype', 'f16')} or f32, or more bits", figure=there)]


def _error(there: float, asked: float | None) -> list[Finding]:
    """What is written lies too far from what was trained, beside the size of the change."""
    if asked is None or there <= asked:
        return []
    text = f"the error beside the change is {there:.3g} ({option('max_error')} allows {asked:g})"
    return [Finding("swallowed", ERROR, text, f"write {option('dtype', 'f16')} or f32, or more bits", figure=there)]


def _dead(found: TensorLevel, asked: int | None) -> list[Finding]:
    """Tensors that lose their change, which figures over all tensors hide."""
    dead = found.dead
    if asked is not None and len(dead) > asked:
        severity, allowed = ERROR, f" ({option('max_dead')} allows {asked})"
    elif dead and len(dead) < found.touched:
        severity, allowed = NOTE, ""
    else:
        return []
    names = ", ".join(one.name for one in dead)
    has = "has" if len(dead) == 1 else "have"
    some = f"{len(dead)} of {counted(found.touched, 'changed tensor')} {has}"
    text = f"{some} a cosine or a retention below 0.5{allowed}: {names}"
    hint = "write these tensors wider, or keep the adapter beside the base"
    return [Finding("dead tensors", severity, text, hint, figure=float(len(dead)))]


def _answers(found: ModelLevel, max_kl: float | None, min_top1: float | None) -> list[Finding]:
    """Thresholds that do not hold."""
    wrong = []
    if max_kl is not None and not found.merged.mean_kl <= max_kl:
        kl = found.merged.mean_kl
        text = f"the mean KL divergence from base + adapters is {kl:.3g}, and {option('max_kl')} allows {max_kl:g}"
        wrong.append(Finding("max-kl", ERROR, text, "write more bits, or allow more", figure=found.merged.mean_kl))
    if min_top1 is not None and not found.merged.top1 >= min_top1:
        text = (
            f"{found.merged.top1:.2%} of the likeliest tokens agree, and {option('min_top1')} asks for {min_top1:.2%}"
        )
        wrong.append(Finding("min-top1", ERROR, text, "write more bits, or ask for less", figure=found.merged.top1))
    return wrong


def _shown(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that differ from what a merge does by itself."""
    from adapterkit.requests.merge import MergeRequest

    plain = MergeRequest("", ("",)).stated() | {"to": options.get("to")}
    return {name: value for name, value in options.items() if value != plain.get(name)}
