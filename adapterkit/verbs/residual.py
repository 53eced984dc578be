"""`--residual RANK`: what rounding took of a merge, as a LoRA beside the output.

For every weight that the output encodes, D = (W + delta) - decode(what is written), and the best factors of that rank
(truncated SVD). Output and residual together are the merge: W + delta = output + D. The factors are computed in the same
run, weight by weight, from the values that a reader of the output will have.
"""

from __future__ import annotations

import json
import shlex
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from adapterkit.adapters.write_peft import Extras, peft_config
from adapterkit.checkpoint.plan import BASELINE_MEMORY, default_jobs
from adapterkit.dtypes import F16
from adapterkit.errors import CheckpointError, UsageError, option
from adapterkit.places import Address
from adapterkit.verbs.factors import FactorWork
from adapterkit.verbs.job import Job
from adapterkit.verbs.report import ModuleRank, ResidualReport

if TYPE_CHECKING:
    from adapterkit.adapters.adapter import Adapter
    from adapterkit.adapters.factors import Slot
    from adapterkit.adapters.fold import Folded
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.checkpoint.plan import Plan
    from adapterkit.checkpoint.tensor import Tensor
    from adapterkit.checkpoint.write import Room, Writing
    from adapterkit.ops.lowrank import Truncated
    from adapterkit.requests.merge import MergeRequest
    from adapterkit.verbs.outputs import Output


class OfMerge(Protocol):
    """What a residual needs of the merge that it belongs to: `adapterkit.verbs.merge.Merge`."""

    @property
    def request(self) -> MergeRequest: ...
    @property
    def base(self) -> Checkpoint: ...
    @property
    def adapters(self) -> tuple[Adapter, ...]: ...
    @property
    def output(self) -> Output: ...
    @property
    def folded(self) -> Folded: ...
    @property
    def plan(self) -> Plan: ...
    @property
    def sources(self) -> tuple[Any, ...]: ...

    def again(self) -> Output:
        """The same output with handles of its own."""


WHOLE = 1 << 28  # entries of a difference up to which it is held in memory, where it is computed once
LEAST = 0.01  # share of a loss that rounding its factors may take
MOST = 0.5  # share of what rounding takes, below which the report says that the factors hold little of it
ENDING = "-residual"


def residual_path(out: Path | Address) -> Path | Address:
    """Where the residual of an output goes: beside it, ``OUT-residual`` or ``OUT-residual.gguf``."""
    if out.suffix == ".gguf":
        return out.with_name(f"{out.name.removesuffix('.gguf')}{ENDING}.gguf")
    return out.with_name(f"{out.name}{ENDING}")


@dataclass(frozen=True)
class Lost:
    """A slot whose deltas are what rounding took.

    Attributes:
        pieces: for each of its matrices, rows ``(written, wanted)`` and the tensors that they lie in.
        nbytes: that are held while one of them is computed.
    """

    slot: Slot
    pieces: tuple[tuple[Rows, Rows, frozenset[str]], ...]
    nbytes: int


Rows = Callable[[int, int], Any]  # rows ``start:stop`` of a matrix in float32


class _Difference:
    """Rows of what is wanted minus what is written."""

    def __init__(self, shape: tuple[int, int], written: Rows, wanted: Rows) -> None:
        self.shape, self._written, self._wanted = shape, written, wanted

    def rows(self, start: int, stop: int) -> Any:
        return self._wanted(start, stop) - self._written(start, stop)


def _spoiled(cuts: Sequence[Truncated]) -> float:
    """The norm, about, of what rounding the factors to 16 bits adds; infinite where they do not fit."""
    total = 0.0
    for cut in cuts:
        off = 0.0
        for factor in (cut.factors.a, cut.factors.b):
            size, lost = float(factor.double().norm()), float((factor.half().double() - factor.double()).norm())
            off += lost / size if size else 0.0
        total += (off * cut.norm) ** 2
    return float(total**0.5)


@dataclass
class Residual:
    """The residual of one merge: planned from headers, computed when its job runs.

    Attributes:
        merge: whose output it stands beside.
        rank: the largest that a weight gets.
        found: what was kept of each weight, once that is known.
    """

    merge: OfMerge
    rank: int
    found: tuple[ModuleRank, ...] = field(default=(), init=False)

    @property
    def out(self) -> Path | Address | None:
        target = self.merge.request.target
        return None if target is None else residual_path(target)

    @cached_property
    def _form(self) -> FolderForm | GGUFForm:
        form = GGUFForm if self.merge.request.form == "gguf" or self.merge.request.to == "gguf" else FolderForm
        return form(self.merge, self.merge.output)

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        """The places that get factors.

        Raises:
            UsageError: the output encodes nothing, or no weight that a LoRA can stand beside.
        """
        slots = tuple(self._form.slots)
        if not slots:
            why = self._form.skipped[0] if self._form.skipped else "no weight of this output is put on a grid"
            raise UsageError(f"there is nothing for a residual: {why}", f"leave out {option('residual')}")
        return slots

    def job(self) -> Job:
        """The residual as a job beside that of the output."""
        work = self.work
        out = self.out
        jobs = self.merge.request.jobs or default_jobs()
        widest = sorted((self._form.held(slot) for slot in self.slots), reverse=True)
        plan = replace(work.plan(), peak_memory=BASELINE_MEMORY + sum(widest[:jobs]))
        return Job(
            plan=plan,
            tensors={},
            sources=self.merge.sources,
            out=out,
            report=lambda measured: None,
            inputs=tuple(a.folder for a in self.merge.adapters if a.folder is not None),
            stage=self._stage,
            force=self.merge.request.force,
        )

    def _stage(self, room: Room) -> Writing:
        made = self.work.stage(self.out)(room)
        self.found = made.facts["modules"]
        return made

    @cached_property
    def work(self) -> FactorWork:
        """How the factors are computed."""
        shown, merge = self._form, self.merge
        fresh: list[FolderForm | GGUFForm] = []
        lock = threading.Lock()

        def form() -> FolderForm | GGUFForm:
            # Handles of its own: those of the output are read by its writer at the same time.
            with lock:
                if not fresh:
                    fresh.append(type(shown)(merge, merge.again()))
                return fresh[0]

        def compute(slot: Slot) -> tuple[int, Sequence[Truncated]] | None:
            cuts = self._cuts(form(), slot)
            return (0, cuts) if any(cut.norm for cut in cuts) else None

        def extras(used: Sequence[Slot]) -> Extras:
            if not used:
                raise UsageError("rounding took nothing of this merge", f"leave out {option('residual')}")
            return Extras(side={"README.md": self._card().encode()})

        def config(used: Sequence[Slot], extras: Extras) -> Mapping[str, Any]:
            return shown.config(used, self._named())

        return FactorWork(
            self.slots,
            [8 * slot.count * slot.shape[0] * slot.shape[1] for slot in self.slots],
            compute,
            extras,
            config,
            lambda slot: min(self.rank, slot.largest_rank),
            merge.sources,
            {**merge.plan.request, "part": "residual"},
            dtype=F16,
            form=shown.form,
        )

    def _cuts(self, form: FolderForm | GGUFForm, slot: Slot) -> list[Truncated]:
        from adapterkit.ops.extract import low_rank
        from adapterkit.ops.rows import Dense, materialize

        lost = form.lost(slot)
        cuts = []
        for at, (written, wanted, tensors) in enumerate(lost.pieces):
            delta: Any = _Difference(slot.shape, written, wanted)
            if slot.shape[0] * slot.shape[1] <= WHOLE:
                delta = Dense(materialize(delta))
            cuts.append(low_rank(delta, rank=min(self.rank, slot.largest_rank)))
            still = lost.pieces[at + 1][2] if at + 1 < len(lost.pieces) else frozenset()
            form.release(tensors - still)
        if _spoiled(cuts) > LEAST * sum(cut.norm**2 for cut in cuts) ** 0.5:
            raise CheckpointError(
                f"what rounding took of '{slot.parameter}' is too large or too small for factors of 16 bits",
                f"leave out {option('residual')}",
            )
        return cuts

    def _named(self) -> str:
        """What the residual calls the output that it stands beside."""
        target = self.merge.request.target
        return "" if target is None else target.name

    @property
    def command(self) -> str:
        """What serves output and residual together; empty where no output is named."""
        from adapterkit.serving.servers import servers

        target, out = self.merge.request.target, self.out
        if target is None or out is None:
            return ""
        gguf = isinstance(self._form, GGUFForm)
        server = servers()["llama.cpp" if gguf else "vllm"]
        row, ranks, path = server.launch, server.ranks, shlex.quote(str(out))
        assert row is not None
        rank = max(min(self.rank, slot.largest_rank) for slot in self.slots)
        # vLLM takes the factors of stacked experts in the order of an older PEFT.
        stacked = any(slot.kind == "stacked" for slot in self.slots)
        if not gguf and (stacked or not self._generates or (ranks is not None and rank > ranks.largest)):
            return f"PeftModel.from_pretrained(model, {str(out)!r}), where model is that of {str(target)!r} in transformers"
        rank = next((step for step in (ranks.steps if ranks is not None else ()) if step >= rank), rank)
        each = row.each.format(name=out.name.removesuffix(".gguf"), path=path)
        first = self.merge.plan.names(target)[0] if gguf else ""
        base = str(target.with_name(first.rpartition("/")[2])) if first else str(target)
        return row.adapters.format(base=shlex.quote(base), each=each, count=1, rank=rank)

    @property
    def _generates(self) -> bool:
        """Whether the model is one that answers: what vLLM serves adapters of."""
        named = self.merge.folded.checkpoint.config.get("architectures") or ()
        ends = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
        return not named or any(str(name).endswith(ends) for name in named)

    def _card(self) -> str:
        name = self._named()
        return (
            f"---\nbase_model: {json.dumps(name)}\nlibrary_name: peft\ntags:\n- lora\n---\n\n# What rounding took of {name}\n\n"
            f"`{name}` is a base with an adapter folded in, written in a coarse format. These factors of rank {self.rank} are\n"
            "what its rounding took. Load them on that output, always: together they are the model that was trained; the\n"
            "output alone is not.\n\n"
            "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
            f"model = AutoModelForCausalLM.from_pretrained({name!r})\n"
            f"model = PeftModel.from_pretrained(model, {name + ENDING!r})\n```\n"
        )

    def report(self) -> ResidualReport:
        """What is written beside the output; its size as planned, which is less where ranks come out smaller."""
        total = sum(one.norm**2 for one in self.found)
        left = sum((one.norm * one.error) ** 2 for one in self.found)
        held = 1 - left / total if total else None
        notes = tuple(self._form.skipped)
        if held is not None and held < MOST:
            notes = (
                f"the residual holds {held:.1%} of what rounding takes: the rest is noise of no small rank",
                *notes,
            )
        return ResidualReport(
            "" if self.out is None else str(self.out),
            self.rank,
            len(self.found) or len(self.slots),
            self.work.plan().nbytes,
            held,
            self.command,
            notes,
        )

    def evidence(self) -> dict[str, Any]:
        """Figures for the record of the output."""
        said = self.report()
        held = None if said.held is None else float(f"{said.held:.6g}")
        return {"residual": {"rank": said.rank, "modules": said.modules, "bytes": said.nbytes, "held": held}}


class FolderForm:
    """PEFT's form: slots are parameters of the module tree, put together from the tensors that hold them."""

    form = None

    def __init__(self, merge: OfMerge, output: Output) -> None:
        from adapterkit.verbs.extract import ModelPair

        self._view, self._own = output.view, output.own
        self.floats: Checkpoint = output.folded.checkpoint
        self.encoded = encoded_weights(output, merge.base if output.own else None)
        self._plain = _plain(output, self.encoded, merge.base if output.own else None)
        self._pair = ModelPair(self.floats, self.floats)
        # The values that readers of the output have, by the names of decoded weights.
        self._written = {**self.floats.tensors, **{name: self._back(name) for name in self.encoded}}
        self.skipped: list[str] = []
        self.slots = list(self._slots())

    def _slots(self) -> Any:
        seen: set[str] = set()
        taken: list[Any] = []  # of encoded weights; a name that is tied to another has its pieces
        for name, target in self._pair.targets.items():
            there = {piece.tensor for piece in target.pieces}
            if not there & self.encoded.keys() or (there <= seen and target.pieces in taken):
                continue
            taken.append(target.pieces)
            matrix = len(target.shape) > 1 and (name.endswith(".weight") or target.stacked)
            why = self._pair.without_factors(name) if matrix else "is no matrix"
            seen |= there
            if why:
                self.skipped.append(f"{name} {why}, so what rounding took of it is in no residual")
                continue
            yield self._pair.slot(name, target)
        missed = sorted(self.encoded.keys() - seen)
        if missed:
            others = f" and {len(missed) - 1} more" if len(missed) > 1 else ""
            self.skipped.append(f"{missed[0]}{others} belongs to no module that a LoRA can name: it is in no residual")

    def _back(self, name: str) -> Tensor:
        from adapterkit.checkpoint.read_back import ReadBack

        return ReadBack(self.floats[name], partial(self._load, name), sum(t.nbytes for t in self.encoded[name]))

    def _load(self, name: str) -> Tensor:
        from adapterkit.checkpoint.decoded import dequantized
        from adapterkit.checkpoint.read_back import InFull
        from adapterkit.dtypes import F32

        held: dict[str, Tensor] = dict(self._plain)
        for tensor in self.encoded[name]:
            held[tensor.name] = InFull(tensor) if tensor.extent is None else tensor
        for tensor in self.encoded[name]:
            if tensor.extent is None:
                tensor.release()
        alone = replace(self._view, tensors=held, shards={}, side_files=(), notes=(), index=None, stored=None)
        return dequantized(alone, F32)[name]

    def held(self, slot: Slot) -> int:
        """Bytes that are held while a slot is computed."""
        target = self._pair.targets[slot.parameter]
        codes = sum(t.nbytes for piece in target.pieces for t in self.encoded.get(piece.tensor, ()))
        below = max(self.floats[piece.tensor].memory for piece in target.pieces)
        return codes + below + 4 * min(slot.shape[0] * slot.shape[1], WHOLE)

    def lost(self, slot: Slot) -> Lost:
        """What is subtracted from what."""
        from adapterkit.adapters.merged import StoredWeights
        from adapterkit.adapters.target import transposed

        target = self._pair.targets[slot.parameter]
        target = transposed(target) if self._pair.turned(slot) else target
        written = StoredWeights(target, self._written)
        wanted = StoredWeights(target, self.floats.tensors)
        height = slot.shape[0]
        pieces = []
        for at in range(slot.count):
            first = at * height
            inside = frozenset(
                piece.tensor
                for piece in target.pieces
                if piece.row < first + height and piece.row + (piece.count - 1) * piece.row_step >= first
            )
            pieces.append((partial(_shifted, written, first), partial(_shifted, wanted, first), inside))
        return Lost(slot, tuple(pieces), self.held(slot))

    def release(self, tensors: frozenset[str]) -> None:
        """Let go of what was loaded for some tensors."""
        for name in tensors:
            self._written[name].release()
            self.floats[name].release()

    def config(self, used: Sequence[Slot], base: str) -> Mapping[str, Any]:
        """The adapter's config but its ranks."""
        said = {**self._pair.config(list(used), {}), "base_model_name_or_path": base, "revision": None}
        return peft_config(used, [said], Extras())


def _shifted(weights: Any, first: int, start: int, stop: int) -> Any:
    return weights.read(first + start, first + stop)


def encoded_weights(output: Output, base: Checkpoint | None) -> dict[str, list[Tensor]]:
    """For each weight that a folder's output encodes, the tensors that hold it.

    Args:
        base: whose own format is kept; parts that stay as they are count too.
    """
    from adapterkit.checkpoint.encoded import Encoded

    found: dict[str, list[Tensor]] = {}
    for tensor in output.view.values():
        if isinstance(tensor, Encoded):
            found.setdefault(tensor.weight.name, []).append(tensor)
    form = None if base is None else base.stored
    for name, tensors in found.items():
        there = {tensor.name for tensor in tensors}
        parts = () if form is None or name not in form.weights else form.weights[name].parts
        tensors += [output.view[p.name] for p in parts if p.name not in there and p.name in output.view]
    return found


def _plain(output: Output, encoded: Mapping[str, Sequence[Tensor]], base: Checkpoint | None) -> dict[str, Tensor]:
    """What an output does not quantize: a config names such modules, and readers look for them."""
    parts = {tensor.name for tensors in encoded.values() for tensor in tensors}
    form = None if base is None else base.stored
    if form is not None:  # but not what is written wider now
        stored = {part.name for weight in form.weights.values() for part in weight.parts}
        parts |= {name for name in stored if output.view.get(name) is form.checkpoint.get(name)}
    return {name: tensor for name, tensor in output.view.items() if name not in parts}


class GGUFForm:
    """A LoRA file of llama.cpp: slots are the tensors of the GGUF output."""

    def __init__(self, merge: OfMerge, output: Output) -> None:
        from adapterkit.adapters.factors import Slot
        from adapterkit.checkpoint.read_back import ReadBack
        from adapterkit.gguf.names import EMBEDDING, OUTPUT
        from adapterkit.gguf.tensors import Quantized

        self._merge = merge
        self._tensors = {tensor.name: tensor for tensor in output.view.values() if isinstance(tensor, Quantized)}
        self._written = {
            name: ReadBack(tensor.inner, partial(self._load, name), tensor.nbytes)
            for name, tensor in self._tensors.items()
        }
        self.skipped: list[str] = []
        self.slots = []
        arch, ends = _runtime(merge)
        self._arch = arch
        from adapterkit.gguf.lora import ignores

        tied = OUTPUT not in output.view
        for name, tensor in self._tensors.items():
            if ignores(name, ends) or name == EMBEDDING or len(tensor.shape) not in (2, 3):
                shared = " and output layer" if tied and name == EMBEDDING else ""
                self.skipped.append(
                    f"llama.cpp applies no LoRA to '{name}'{shared}: what rounding took of it is in no residual"
                    if name != EMBEDDING
                    else f"'{name}' is the embedding{shared}: what rounding took of it is in no residual"
                )
                continue
            *experts, rows, columns = tensor.shape
            stacked = bool(experts)
            self.slots.append(
                Slot(name, name, "stacked" if stacked else "linear", (rows, columns), experts[0] if experts else 1)
            )

    def _load(self, name: str) -> Tensor:
        from adapterkit.checkpoint.read_back import InFull
        from adapterkit.gguf.tensors import Dequantized

        tensor: Any = InFull(self._tensors[name])
        tensor.kind = self._tensors[name].kind
        return Dequantized(tensor)

    def held(self, slot: Slot) -> int:
        """As `FolderForm.held`."""
        tensor = self._tensors[slot.parameter]
        return tensor.nbytes + tensor.memory + 4 * min(slot.shape[0] * slot.shape[1], WHOLE)

    def lost(self, slot: Slot) -> Lost:
        """As `FolderForm.lost`."""
        written, wanted = self._written[slot.parameter], self._tensors[slot.parameter].inner
        m, n = slot.shape

        def rows(tensor: Tensor, matrix: int, start: int, stop: int) -> Any:
            at = matrix * m * n
            return tensor.read_wide(at + start * n, at + stop * n).float().view(-1, n)

        only = frozenset({slot.parameter})
        pieces = tuple((partial(rows, written, at), partial(rows, wanted, at), only) for at in range(slot.count))
        return Lost(slot, pieces, self.held(slot))

    def release(self, tensors: frozenset[str]) -> None:
        """As `FolderForm.release`."""
        for name in tensors:
            self._written[name].release()
            self._tensors[name].release()

    def config(self, used: Sequence[Slot], base: str) -> Mapping[str, Any]:
        """Nothing: the file's metadata says it."""
        return {}

    def form(self, ranks: Mapping[Slot, int], read: Callable[[Slot], Any]) -> Any:
        """The plan and the tensors of the file."""
        from adapterkit.gguf.lora import factor_tensors, lora_entries
        from adapterkit.gguf.plan import FileLayout, plan_gguf

        tensors = factor_tensors(ranks, read)
        target = self._merge.request.target
        name = "" if target is None else target.name
        entries = lora_entries(self._arch, float(max(ranks.values(), default=1)), "F16", name)
        plan = plan_gguf(FileLayout(tensors, entries), request={**self._merge.plan.request, "part": "residual"})
        return plan, tensors


def _runtime(merge: OfMerge) -> tuple[str, Sequence[str]]:
    """The architecture of a GGUF output, and the ends of the names to which llama.cpp applies no LoRA.

    Raises:
        UsageError: llama.cpp loads no LoRA beside such a model.
    """
    from adapterkit.gguf.checkpoint import GGUFCheckpoint

    base = merge.base
    if isinstance(base, GGUFCheckpoint):
        from adapterkit.gguf.arch.back import mapper_of_gguf
        from adapterkit.gguf.diffusion import is_diffusion
        from adapterkit.gguf.hf import gguf_names
        from adapterkit.gguf.scales import scales_of

        if is_diffusion(base):
            raise UsageError(
                f"{base.ref} is an image model, beside which no server loads a GGUF LoRA",
                f"leave out {option('residual')}",
            )
        if scales_of(base, mapper_of_gguf(base)).of:
            raise UsageError(
                f"{base.ref} has scales beside its weights, and what a residual holds is in units of the weights",
                f"leave out {option('residual')}",
            )
        names = gguf_names(base)
        return names.arch, names.no_lora
    from adapterkit.gguf.arch.config import Config
    from adapterkit.gguf.arch.table import spec_of

    spec = spec_of(Config(merge.folded.checkpoint.config, base.ref))
    return spec.arch, spec.no_lora
