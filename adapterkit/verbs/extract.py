"""`extract`: the difference of two checkpoints as an adapter."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.brought import is_brought
from adapterkit.adapters.embeddings import holds_factors
from adapterkit.adapters.factors import Kind, Slot
from adapterkit.adapters.linear import linear_modules
from adapterkit.adapters.merged import StoredWeights
from adapterkit.adapters.names import Names
from adapterkit.adapters.orientation import is_conv1d
from adapterkit.adapters.target import Target, transposed
from adapterkit.adapters.ties import is_tied
from adapterkit.adapters.write_peft import Extras, InMemory, peft_config
from adapterkit.bases import open_base
from adapterkit.checkpoint.limits import check_memory
from adapterkit.checkpoint.plan import BASELINE_MEMORY
from adapterkit.checkpoint.tensor import Renamed, Tensor
from adapterkit.errors import CheckpointError, TargetError, counted
from adapterkit.ops.device import opened
from adapterkit.provenance.record import base_parent, recorder
from adapterkit.requests.adapters import ExtractRequest
from adapterkit.requests.call import takes
from adapterkit.verbs.beside import beside_of
from adapterkit.verbs.carry import carry_out
from adapterkit.verbs.combine import check_rank, output_dtype
from adapterkit.verbs.factors import ESTIMATED, FactorWork, sent
from adapterkit.verbs.job import Job, Measured
from adapterkit.verbs.placed import FACTORS, computed_on, said
from adapterkit.verbs.report import ExtractReport

if TYPE_CHECKING:
    import torch

    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.checkpoint.listing import Listing
    from adapterkit.ops.device import Device
    from adapterkit.ops.lowrank import Truncated
    from adapterkit.places import Address

DEFAULT_RANK = 32

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
}


@dataclass(frozen=True)
class Extraction:
    """A difference that is planned as an adapter. Of the weights, only what is no matrix has been read.

    Attributes:
        request: what was asked for.
        pair: the two checkpoints.
        found: what differs.
        rank: the largest that is allowed.
        notes: what a user should know.
    """

    request: ExtractRequest
    pair: ModelPair
    found: _Found
    rank: int | None
    notes: tuple[str, ...]

    def job(self) -> Job:
        """The extraction as what an executor takes."""
        asked, pair = self.request, self.pair
        work = self.work()
        out = None if asked.out is None else asked.target
        sources = (*pair.base.sources, *pair.tuned.sources)
        return Job(
            plan=work.plan(),
            tensors={},
            sources=sources,
            out=out,
            report=self.report,
            inputs=tuple(one.path if one.loose else one.path.parent for one in sources if one.path is not None),
            beside=() if out is None else beside_of(asked, [asked.base, asked.tuned]),
            stage=work.stage(out),
            results=work.results(out),
            record=work.record,
            force=asked.force,
        )

    def work(self) -> FactorWork:
        """How the adapter is computed, slot by slot."""
        asked, pair, found = self.request, self.pair, self.found

        def compute(slot: Slot) -> tuple[int, Sequence[Truncated]] | None:
            targets = found.targets[slot.parameter]
            cuts = pair.factors(slot, targets, self.rank, asked.energy, asked.exact, opened(asked.device))
            return (0, cuts) if any(cut.norm for cut in cuts) else None

        def extras(used: Sequence[Slot]) -> Extras:
            if not used and not found.whole:
                raise pair.alike()
            return Extras(found.whole, side=_side(pair, []))

        def config(used: Sequence[Slot], extras: Extras) -> Mapping[str, Any]:
            return peft_config(used, [pair.config(list(used), found.whole)], extras)

        again = {
            "verb": asked.VERB,
            "base": pair.base.ref,
            "tuned": pair.tuned.ref,
            **asked.stated(*_STATED),
            "rank": asked.rank,
        }
        return FactorWork(
            found.slots,
            [8 * slot.count * slot.shape[0] * slot.shape[1] for slot in found.slots],
            compute,
            extras,
            config,
            self.bound,
            (*pair.base.sources, *pair.tuned.sources),
            again,
            self._record,
            output_dtype(asked.dtype),
            asked.own_ranks,
            asked.styled("diffusers" if "_class_name" in pair.base.config else "comfyui"),
            Names(pair.base.shapes, pair.base.config),
            device=asked.device,
            again={"differ": list(found.differ), "state": pair.state()},
        )

    def bound(self, slot: Slot) -> int:
        """The largest rank that a layer can come out with."""
        return min(self.rank or slot.largest_rank, slot.largest_rank)

    def _record(self, folder: Path | Listing) -> Mapping[str, bytes]:
        asked = {**self.request.stated(*_STATED), "rank": self.rank}
        made_of = [base_parent(self.pair.base), base_parent(self.pair.tuned, "tuned")]
        return recorder("extract", "adapter", asked, made_of, method="lora", evidence=self._evidence)(folder)

    def _evidence(self) -> dict[str, Any]:
        return computed_on(self.request.device, agrees=FACTORS)

    def report(self, measured: Measured) -> ExtractReport:
        """What was done, or would be."""
        asked, found, facts = self.request, self.found, measured.facts
        config, modules = facts.get("config", {}), facts.get("modules", ())
        bounds = [self.bound(slot) for slot in found.slots]
        same = 0 if measured.dry_run else len(found.slots) - len(modules)
        return ExtractReport(
            out="" if asked.out is None else str(asked.out),
            base=self.pair.base.ref,
            tuned=self.pair.tuned.ref,
            rank=int(config.get("r", max(bounds, default=1))),
            own_ranks=bool(config.get("rank_pattern", asked.own_ranks and measured.dry_run)),
            modules=modules,
            saved=tuple(found.whole),
            unchanged=found.unchanged + same,
            nbytes=0 if measured.plan is None else measured.plan.nbytes,
            seconds=measured.seconds,
            peak_memory=measured.peak_memory,
            reused=facts.get("known", 0),
            dry_run=measured.dry_run,
            **sent(measured),
            notes=(
                *self.notes,
                *([ESTIMATED] if measured.dry_run else said(asked.device, agrees=FACTORS)),
                *measured.notes,
            ),
        )


_STATED = ("rank", "energy", "exact", "dtype")


def planned(request: ExtractRequest, known: KnownDifferences | None = None) -> Extraction:
    """Plan an extraction; see `extract`. Which tensors differ is found by reading them, in a stream.

    Args:
        known: what an earlier plan of the same files found, so that they are not read again.
    """
    check_rank(request.rank, request.energy, ())
    check_memory(
        BASELINE_MEMORY, str(request.out)
    )  # torch, which finds the differences, aborts where it gets too little
    pair = ModelPair(open_base(request.base)[0], open_base(request.tuned)[0])
    found = pair.differences(None if known is None or not known.state or known.state != pair.state() else known.differ)
    if not found.slots and not found.whole:
        raise pair.alike()
    rank = request.rank
    if rank is None and request.energy is None:
        rank = min(DEFAULT_RANK, max((slot.largest_rank for slot in found.slots), default=1))
    notes = [*found.notes, *check_rank(rank, request.energy, found.slots)]
    _side(pair, notes)
    return Extraction(request, pair, found, rank, tuple(notes))


@takes(ExtractRequest)
def extract(request: ExtractRequest) -> ExtractReport:
    """Write the difference of two checkpoints as a LoRA adapter of the first.

    Both are streamed. Matrices become factors within 1 % of the best of their rank, which is 32 when neither ``rank`` nor
    ``energy`` is given; a changed vector (norm, bias), a vocabulary that grew, and what the base does not have are stored
    whole (``modules_to_save``).

    Raises:
        UsageError: a bound that nothing can meet.
        TargetError: the two are not the same model, or nothing differs.
        CheckpointError: NaN or infinite values.
        NotFound, OutputError, UnsafeError, AuthError, HubError
    """
    started = time.monotonic()
    report: ExtractReport = carry_out(planned(request).job(), request, started)
    return report


def replan(data: Mapping[str, Any], out: Path | Address | None) -> Extraction:
    """The extraction of a saved plan, planned again."""
    given = {name: value for name, value in data.items() if name in ExtractRequest.options()}
    return planned(ExtractRequest.bound({**given, "out": out}), KnownDifferences.of(data))


@dataclass(frozen=True)
class KnownDifferences:
    """What a saved plan says of two checkpoints.

    Attributes:
        differ: the parameters that differ.
        state: what the files were then; see `ModelPair.state`.
    """

    differ: frozenset[str]
    state: Mapping[str, str]

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> KnownDifferences | None:
        """Out of a plan's request; None where it does not say it."""
        differ, state = data.get("differ"), data.get("state")
        if not isinstance(differ, list) or not isinstance(state, Mapping):
            return None
        return cls(frozenset(map(str, differ)), dict(state))


@dataclass
class _Found:
    """What may differ: matrices that become factors, and tensors that are stored whole.

    Attributes:
        differ: the parameters that both have and that were found to differ.
    """

    slots: list[Slot] = field(default_factory=list)
    targets: dict[str, tuple[Target, Target]] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    unchanged: int = 0
    notes: list[str] = field(default_factory=list)
    differ: list[str] = field(default_factory=list)


class Difference:
    """Rows of one checkpoint's parameter minus another's, in float32."""

    def __init__(self, before: StoredWeights, after: StoredWeights, rows: range, what: str) -> None:
        self._before, self._after, self._rows, self._what = before, after, rows, what
        self.shape = (len(rows), before.shape[1])

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows ``start:stop``."""
        rows = self._rows[start:stop]
        found = self._after.read(rows.start, rows.stop) - self._before.read(rows.start, rows.stop)
        if not bool(found.isfinite().all()):
            raise CheckpointError(f"{self._what} has NaN or infinite values", "use an earlier checkpoint")
        return found


class ModelPair:
    """Two checkpoints of one model, seen through the names of their parameters."""

    def __init__(self, base: Checkpoint, tuned: Checkpoint) -> None:
        self.base, self.tuned = base, tuned
        one, other = str(base.config.get("model_type", "")), str(tuned.config.get("model_type", ""))
        if one != other:
            raise TargetError(f"{base.ref} is a {one or 'model'} and {tuned.ref} a {other or 'model'}", "give its base")
        self.names = Names(base.shapes, base.config), Names(tuned.shapes, tuned.config)
        parameters = dict.fromkeys(self.names[1].parameters())
        self.targets = {name: target for name in parameters if (target := self.names[1].find(name)) is not None}
        shapes = {name: target.shape for name, target in self.targets.items()}
        self._linear = frozenset(linear_modules(shapes, tuned.config))

    def alike(self) -> TargetError:
        """That nothing differs."""
        return TargetError(f"{self.tuned.ref} is the same as {self.base.ref}", "there is nothing to extract")

    def state(self) -> dict[str, str]:
        """What tells that the files are still those that were read: by name, the size, and the time of the last change, the
        ETag or the commit. Empty where one of them has none of these.
        """
        found = {}
        for checkpoint in (self.base, self.tuned):
            for source in checkpoint.sources:
                changed = source.version or checkpoint.commit or ""
                if source.path is not None:
                    changed = str(os.stat(source.path).st_mtime_ns)
                if not changed:
                    return {}
                found[source.name] = f"{source.size}:{changed}"
        return found

    def differences(self, known: Collection[str] | None = None) -> _Found:
        """What differs, from headers and values.

        Args:
            known: the parameters that differ, where that was found before.

        Raises:
            TargetError: the two are not the same model.
        """
        found = _Found()

        def differs(name: str, before: Target, after: Target) -> bool:
            if name in known if known is not None else self._differs(before, after):
                found.differ.append(name)
                return True
            return False

        if not any(self.names[0].find(name) is not None for name in self.targets):
            raise TargetError(f"{self.base.ref} and {self.tuned.ref} have no parameter in common", "give its base")
        for name, after in self.targets.items():
            before = self.names[0].find(name)
            if before is None:
                self._save(found, name, after, "is not in the base")
            elif before.shape != after.shape:
                if before.shape[1:] != after.shape[1:] or not _embeds(name):
                    raise TargetError(
                        f"{name} is {list(before.shape)} in {self.base.ref} and {list(after.shape)} in {self.tuned.ref}",
                        "give the base that it was trained from",
                    )
                self._save(found, name, after, f"has {after.shape[0]} rows, and {before.shape[0]} in the base")
            elif len(after.shape) < 2 or (not name.endswith(".weight") and not after.stacked):
                if differs(name, before, after):
                    self._save(found, name, after, "")
                else:
                    found.unchanged += 1
            elif differs(name, before, after):
                why = self.without_factors(name)
                if why:
                    self._save(found, name, after, why)
                    continue
                slot = self.slot(name, after)
                found.slots.append(slot)
                turned = self.turned(slot)
                found.targets[name] = (transposed(before), transposed(after)) if turned else (before, after)
            else:
                found.unchanged += 1
        missing = [name for name in self.names[0].parameters() if name not in self.targets]
        if missing:
            some = counted(len(missing), "parameter of the base is", "parameters of the base are")
            found.notes.append(f"{some} not in {self.tuned.ref}, as {missing[0]}")
        if self._tied() and any(slot.kind == "embedding" for slot in found.slots):
            found.notes.append("the output layer shares the embedding's values: the adapter says ensure_weight_tying")
        return found

    def factors(
        self,
        slot: Slot,
        targets: tuple[Target, Target],
        rank: int | None,
        energy: float | None,
        exact: bool,
        device: Device,
    ) -> list[Truncated]:
        """The difference of one slot at its rank, one per expert, on a device."""
        from adapterkit.ops.extract import low_rank
        from adapterkit.ops.there import there

        before = StoredWeights(targets[0], self.base.tensors)
        after = StoredWeights(targets[1], self.tuned.tensors)
        height = slot.shape[0]
        parts = [
            Difference(
                before, after, range(i * height, (i + 1) * height), f"{self.tuned.ref} or its base: {slot.parameter}"
            )
            for i in range(slot.count)
        ]
        return [low_rank(there(device, part), rank=rank, energy=energy, exact=exact) for part in parts]

    def config(self, slots: list[Slot], whole: Mapping[str, Tensor]) -> dict[str, Any]:
        """What the adapter's config says of its base and its targets."""
        modules = {slot.module for slot in slots}
        leaves = {module.rpartition(".")[2] for module in modules}
        tree = {name.removesuffix(".weight") for name in self.targets if name.endswith(".weight")}
        alike = {leaf: {module for module in tree if module.rpartition(".")[2] == leaf} for leaf in leaves}
        architectures = self.tuned.config.get("architectures") or [""]
        # PEFT takes what `modules_to_save` names for the module's own and unties it; what it does not name stays tied.
        asked = [key for key in whole if not self.names[1].sharers(key)]
        saved = {key.rpartition(".")[0] for key in asked if not key.endswith(".bias") or self._alone(key, whole)}
        return {
            "base_model_name_or_path": self.base.ref,
            "revision": self.base.commit,
            "task_type": next((task for end, task in _TASKS.items() if str(architectures[0]).endswith(end)), None),
            "target_modules": sorted(leaf for leaf, found in alike.items() if found <= modules),
            "modules_to_save": sorted(module for module in saved - modules if not self._has_modules(module)),
            "ensure_weight_tying": self._tied() and any(slot.kind == "embedding" for slot in slots),
        }

    def _has_modules(self, module: str) -> bool:
        """True if ``module`` has submodules: PEFT would copy those too, so it must not be listed in modules_to_save."""
        return any(name.startswith(module + ".") and "." in name[len(module) + 1 :] for name in self.targets)

    def _alone(self, key: str, whole: Mapping[str, Tensor]) -> bool:
        return f"{key.rpartition('.')[0]}.weight" in whole

    def _tied(self) -> bool:
        head = "lm_head.weight"
        return is_tied(self.tuned.config) and head not in self.targets

    def without_factors(self, name: str) -> str:
        """Why a matrix cannot have the factors of a LoRA; empty where it can."""
        if _embeds(name) and self.names[1].sharers(name) and not name.endswith("embed_tokens.weight"):
            # `ensure_weight_tying` knows no other name, and factors on one side would part the two.
            return "is also the output layer"
        return "" if holds_factors(name, self.tuned.config) else "does more than look up what it is given"

    def turned(self, slot: Slot) -> bool:
        """Whether a slot's factors lie across its parameter: a Conv1D of transformers."""
        return slot.kind == "linear" and is_conv1d(self.names[1].model_types, slot.module)

    def slot(self, name: str, target: Target) -> Slot:
        """Where a LoRA acts on a parameter."""
        module = name.rpartition(".")[0]
        if target.stacked and len(target.shape) == 3:
            shape = (target.shape[1], target.shape[2])
            swapped = self.names[1].turned(name)
            return Slot(name, module, "stacked", shape, target.shape[0], swapped=swapped)
        if len(target.shape) > 2:
            return Slot(name, module, "conv", target.matrix, kernel=target.shape[2:])
        if module in self._linear:
            turned = is_conv1d(self.names[1].model_types, module)
            return Slot(name, module, "linear", target.matrix[::-1] if turned else target.matrix)
        kind: Kind = "embedding" if _embeds(name) else "parameter"
        return Slot(name, module, kind, target.matrix)

    def _differs(self, before: Target, after: Target) -> bool:
        import torch

        one, other = StoredWeights(before, self.base.tensors), StoredWeights(after, self.tuned.tensors)
        step = max(1, (1 << 20) // max(one.shape[1], 1))
        return any(
            not torch.equal(one.read(at, min(at + step, one.shape[0])), other.read(at, min(at + step, one.shape[0])))
            for at in range(0, one.shape[0], step)
        )

    def _save(self, found: _Found, name: str, target: Target, why: str) -> None:
        found.whole[name] = self._handle(name, target)
        # A module is stored with all of its parameters, or PEFT would fill in the rest from the base.
        for other in self.names[1].find_module(name.rpartition(".")[0]):
            beside = self.targets.get(other)
            if beside is not None and len(beside.shape) < 2 and other not in found.whole:
                found.whole[other] = self._handle(other, beside)
        if why:
            found.notes.append(f"{name} {why}: stored whole")

    def _handle(self, name: str, target: Target) -> Tensor:
        """A parameter as it is stored, or put together where the checkpoint holds it in parts."""
        piece = target.pieces[0]
        stored = self.tuned[piece.tensor]
        if len(target.pieces) == 1 and not piece.transposed and stored.shape == target.shape:
            return Renamed(name, stored)
        whole = StoredWeights(target, self.tuned.tensors)
        return InMemory(name, whole.read(0, whole.shape[0]).view(target.shape))


def _embeds(name: str) -> bool:
    """Whether a parameter counts tokens or positions: an embedding, or an output layer."""
    leaf = name.removesuffix(".weight").rpartition(".")[2]
    return "embed" in leaf.lower() or leaf in ("wte", "wpe", "shared", "lm_head", "embed_out")


def _side(pair: ModelPair, notes: list[str]) -> dict[str, bytes]:
    """The tuned checkpoint's tokenizer, where it is not the base's."""
    files = dict(_tokenizer(pair.tuned))
    if files == dict(_tokenizer(pair.base)):
        return {}
    notes.append("the tokenizer is not that of the base and goes with the adapter")
    return files


def _tokenizer(checkpoint: Checkpoint) -> Iterator[tuple[str, bytes]]:
    for file in checkpoint.side_files:
        if is_brought(file.name):
            yield file.name, file.bytes()
