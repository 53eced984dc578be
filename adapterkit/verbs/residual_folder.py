"""A residual beside a folder, in PEFT's form: slots are parameters of the module tree, put together from what holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.write_peft import Extras, peft_config
from adapterkit.errors import UsageError, option
from adapterkit.verbs.residual_of import WHOLE, Lost, OfMerge

if TYPE_CHECKING:
    from adapterkit.adapters.factors import Slot
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.checkpoint.tensor import Tensor
    from adapterkit.verbs.outputs import Output


class FolderForm:
    """PEFT's form: slots are parameters of the module tree, put together from the tensors that hold them."""

    form = None

    def __init__(self, merge: OfMerge, output: Output) -> None:
        from adapterkit.verbs.extract import ModelPair

        self._view, self._own = output.view, output.own
        self.floats: Checkpoint = output.folded.checkpoint
        self.encoded = encoded_weights(output, merge.base if output.own else None)
        apart = next((name for name in self.encoded if name not in self.floats), None)
        if apart is not None:
            raise UsageError(
                f"'{apart}' is taken from a stack of experts, beside which a residual is not written here",
                f"leave out {option('residual')}",
            )
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
