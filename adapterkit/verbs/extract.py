"""`extract`: the difference of two checkpoints as an adapter."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.factors import Kind, Slot
from adapterkit.adapters.linear import linear_modules
from adapterkit.adapters.load import is_brought
from adapterkit.adapters.merged import StoredWeights
from adapterkit.adapters.names import Names
from adapterkit.adapters.orientation import is_conv1d
from adapterkit.adapters.target import Target, transposed
from adapterkit.adapters.ties import is_tied
from adapterkit.adapters.write_peft import Extras, InMemory, PeftWriter, peft_config
from adapterkit.bases import open_base
from adapterkit.checkpoint.files import check_unchanged
from adapterkit.checkpoint.plan import default_jobs
from adapterkit.checkpoint.publish import check_target, staging
from adapterkit.checkpoint.tensor import Renamed, Tensor
from adapterkit.errors import CheckpointError, TargetError
from adapterkit.provenance.record import base_parent, recorder
from adapterkit.verbs.combine import check_rank, module_rank, output_dtype
from adapterkit.verbs.merge import peak_memory
from adapterkit.verbs.ordered import in_order
from adapterkit.verbs.report import ExtractReport, ModuleRank

if TYPE_CHECKING:
    import torch

    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.ops.lowrank import Truncated

Ref = str | Path

DEFAULT_RANK = 32

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
}


def extract(
    base: Ref | Checkpoint,
    tuned: Ref | Checkpoint,
    out: Ref,
    *,
    rank: int | None = None,
    energy: float | None = None,
    exact: bool = False,
    dtype: str = "f32",
    own_ranks: bool = False,
    jobs: int | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ExtractReport:
    """Write the difference of two checkpoints as a LoRA adapter of the first.

    Both are streamed. Matrices become factors within 1 % of the best of their rank; a changed vector (norm, bias), a
    vocabulary that grew, and what the base does not have are stored whole (``modules_to_save``).

    Args:
        base: folder, file or Hub id, or an open `Checkpoint`.
        tuned: the checkpoint that training made of it.
        out: the folder to make; it appears whole or not at all.
        rank: at most this rank in every layer; 32 when neither it nor ``energy`` is given.
        energy: the smallest rank that keeps this share of a layer's squared difference.
        exact: a dense SVD of every layer instead of subspace iteration.
        dtype: of the factors: ``f32``, ``bf16`` or ``f16``.
        own_ranks: every layer keeps its own rank, instead of one for all.
        jobs: worker threads; the output does not depend on it.
        force: replace an existing folder.
        progress: called now and then with bytes done and bytes in all.

    Raises:
        UsageError: a bound that nothing can meet.
        TargetError: the two are not the same model, or nothing differs.
        CheckpointError: NaN or infinite values.
        NotFound, OutputError, UnsafeError, AuthError, HubError
    """
    started = time.monotonic()
    stored = output_dtype(dtype)
    check_rank(rank, energy, ())
    pair = _Pair(open_base(base)[0], open_base(tuned)[0])
    found = pair.differences()
    if rank is None and energy is None:
        rank = min(DEFAULT_RANK, max((slot.largest_rank for slot in found.slots), default=1))
    notes = [*found.notes, *check_rank(rank, energy, found.slots)]
    target = Path(out)
    folders = [s.path.parent for s in (*pair.base.sources, *pair.tuned.sources) if s.path is not None]
    check_target(target, folders, _estimate(found, rank), force=force)
    rows: list[ModuleRank] = []
    used: list[Slot] = []
    with staging(target, resume=False) as folder:
        writer = PeftWriter(folder, stored)
        try:

            def work(slot: Slot) -> tuple[Slot, list[Truncated]]:
                return slot, pair.factors(slot, found.targets[slot.parameter], rank, energy, exact)

            sizes = [8 * slot.count * slot.shape[0] * slot.shape[1] for slot in found.slots]
            for slot, cuts in in_order(work, found.slots, jobs or default_jobs(), sizes, progress):
                if any(cut.norm for cut in cuts):
                    writer.add(slot, [cut.factors for cut in cuts])
                    rows.append(module_rank(slot, cuts))
                    used.append(slot)
            if not used and not found.whole:
                raise TargetError(f"{pair.tuned.ref} is the same as {pair.base.ref}", "there is nothing to extract")
            extras = Extras(found.whole, side=_side(pair, notes))
            config = peft_config(used, [pair.config(used, found.whole)], extras)
            asked = {"rank": rank, "energy": energy, "exact": exact, "dtype": dtype}
            made_of = [base_parent(pair.base), base_parent(pair.tuned, "tuned")]
            record = recorder("extract", "adapter", asked, made_of, method="lora")
            check_unchanged((*pair.base.sources, *pair.tuned.sources))
            config = writer.finish(target, config, extras, own_ranks=own_ranks, force=force, record=record)
        finally:
            writer.close()
    return ExtractReport(
        out=str(out),
        base=pair.base.ref,
        tuned=pair.tuned.ref,
        rank=int(config["r"]),
        own_ranks=bool(config["rank_pattern"]),
        modules=tuple(rows),
        saved=tuple(found.whole),
        unchanged=found.unchanged + len(found.slots) - len(used),
        nbytes=(target / "adapter_model.safetensors").stat().st_size,
        seconds=time.monotonic() - started,
        peak_memory=peak_memory(),
        notes=tuple(notes),
    )


@dataclass
class _Found:
    """What may differ: matrices that become factors, and tensors that are stored whole."""

    slots: list[Slot] = field(default_factory=list)
    targets: dict[str, tuple[Target, Target]] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    unchanged: int = 0
    notes: list[str] = field(default_factory=list)


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


class _Pair:
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

    def differences(self) -> _Found:
        """From headers, and from the values of what is no matrix.

        Raises:
            TargetError: the two are not the same model.
        """
        found = _Found()
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
                if self._differs(before, after):
                    self._save(found, name, after, "")
                else:
                    found.unchanged += 1
            elif self._differs(before, after):
                if _embeds(name) and self.names[1].sharers(name) and not name.endswith("embed_tokens.weight"):
                    # `ensure_weight_tying` knows no other name, and factors on one side would part the two.
                    self._save(found, name, after, "is also the output layer")
                    continue
                slot = self._slot(name, after)
                found.slots.append(slot)
                turned = slot.kind == "linear" and is_conv1d(self.names[1].model_types, slot.module)
                found.targets[name] = (transposed(before), transposed(after)) if turned else (before, after)
            else:
                found.unchanged += 1
        missing = [name for name in self.names[0].parameters() if name not in self.targets]
        if missing:
            found.notes.append(f"{len(missing)} parameters of the base are not in {self.tuned.ref}, as {missing[0]}")
        if self._tied() and any(slot.kind == "embedding" for slot in found.slots):
            found.notes.append("the output layer shares the embedding's values: the adapter says ensure_weight_tying")
        return found

    def factors(
        self, slot: Slot, targets: tuple[Target, Target], rank: int | None, energy: float | None, exact: bool
    ) -> list[Truncated]:
        """The difference of one slot at its rank, one per expert."""
        from adapterkit.ops.extract import low_rank

        before = StoredWeights(targets[0], self.base.tensors)
        after = StoredWeights(targets[1], self.tuned.tensors)
        height = slot.shape[0]
        parts = [
            Difference(
                before, after, range(i * height, (i + 1) * height), f"{self.tuned.ref} or its base: {slot.parameter}"
            )
            for i in range(slot.count)
        ]
        return [low_rank(part, rank=rank, energy=energy, exact=exact) for part in parts]

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
        """Whether it holds other modules, which PEFT would copy with it; its own tensors are loaded without its name."""
        return any(name.startswith(module + ".") and "." in name[len(module) + 1 :] for name in self.targets)

    def _alone(self, key: str, whole: Mapping[str, Tensor]) -> bool:
        return f"{key.rpartition('.')[0]}.weight" in whole

    def _tied(self) -> bool:
        head = "lm_head.weight"
        return is_tied(self.tuned.config) and head not in self.targets

    def _slot(self, name: str, target: Target) -> Slot:
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


def _estimate(found: _Found, rank: int | None) -> int:
    factors = sum(8 * s.count * min(rank or DEFAULT_RANK, s.largest_rank) * sum(s.shape) for s in found.slots)
    return factors + sum(tensor.nbytes for tensor in found.whole.values())


def _side(pair: _Pair, notes: list[str]) -> dict[str, bytes]:
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
