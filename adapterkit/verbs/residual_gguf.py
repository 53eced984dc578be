"""A residual beside a GGUF file, as a LoRA file of llama.cpp: slots are the tensors of the output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from adapterkit.errors import UsageError, option
from adapterkit.verbs.residual_of import WHOLE, Lost, OfMerge

if TYPE_CHECKING:
    from adapterkit.adapters.factors import Slot
    from adapterkit.checkpoint.tensor import Tensor
    from adapterkit.verbs.outputs import Output


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
                why = f"llama.cpp applies no LoRA to '{name}'"
                if name == EMBEDDING:
                    why = f"'{name}' is the embedding{' and output layer' if tied else ''}"
                self.skipped.append(f"{why}: what rounding took of it is in no residual")
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
