"""The fidelity of a merge, measured while it is written: what of each change survives the output's dtype or format."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import partial
from math import prod, sqrt
from typing import TYPE_CHECKING

from adapterkit.adapters.as_trained import quantized_targets
from adapterkit.adapters.merged import Merged
from adapterkit.codecs.table import find_kind
from adapterkit.dtypes import F32
from adapterkit.errors import option

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from adapterkit.adapters.fold import Folded
    from adapterkit.checkpoint.encoded import Encoding
    from adapterkit.dtypes import DType
    from adapterkit.ops.fidelity import FidelitySums

    Through = Callable[[torch.Tensor], torch.Tensor]
    Importance = Callable[[str, tuple[int, ...]], torch.Tensor | None]

ENOUGH = 0.9  # retention below which a report warns
# Cosine or retention below which a tensor's change counts as lost: more of what is written is something else.
DEAD = 0.5
# Of a large tensor one row in so many is measured. What a format adds is so much larger than what a dtype does that its
# mean needs more of them: with an error of NF4's size (0.09 |W|) the retention of n entries is within 0.09 |W|/|delta|/sqrt(n).
SAMPLE, SAMPLE_FORMAT = 16, 8
BASE = "\0base"  # after a tensor's name: the sums of the base below it
WHOLE = 1 << 20  # elements up to which a tensor is measured whole
ROWS = 1 << 17  # elements of a tensor that are looked at for a coarse grid
RANGES = 4  # of a tensor that is looked at before it is written


@dataclass(frozen=True)
class TensorFidelity:
    """One tensor: |delta|/|W|, share of entries that did not move, retention, cosine, error; see `adapterkit.ops.fidelity`.

    ``weighed`` is the error with every column times its importance, where there is an importance matrix.

    ``base_error`` is |W - decode(encode(W))| / |delta| where the base is taken as trained: what the adapter would have to
    do without if it were folded onto W instead.
    """

    name: str
    relative: float
    unmoved: float
    retention: float
    cosine: float
    base_error: float | None = None
    error: float = 0.0
    weighed: float | None = None

    @property
    def dead(self) -> bool:
        """Whether less than half of the change is left, or what is written points elsewhere."""
        return self.retention < DEAD or self.cosine < DEAD


@dataclass(frozen=True)
class FidelityReport:
    """What survives of a merge.

    Cosine and error come first: they order real outputs as their answers do. Retention alone does not: noise can raise it.

    Attributes:
        retention, cosine, relative, unmoved, error: over all measured tensors together.
        worst: the tensor with the least cosine.
        tensors: every measured tensor, those of the least cosine first.
        format: what the numbers are for, as ``bf16`` or ``nf4``.
        weighed: the error with every column times its importance, over the tensors that have one; None without any.
    """

    retention: float
    cosine: float
    relative: float
    unmoved: float
    worst: TensorFidelity | None
    tensors: tuple[TensorFidelity, ...]
    format: str
    error: float = 0.0
    weighed: float | None = None

    @property
    def base_error(self) -> float | None:
        """The median |W - decode(encode(W))| / |delta| over the tensors whose base is taken as trained."""
        found = sorted(row.base_error for row in self.tensors if row.base_error is not None)
        return found[len(found) // 2] if found else None

    @property
    def summary(self) -> str:
        """One line."""
        if self.worst is None:
            return "nothing was changed"
        weighed = "" if self.weighed is None else f" ({self.weighed:.2g} by importance)"
        return (
            f"cosine {self.cosine:.3f} with the change in {self.format}, error beside it {self.error:.2g}{weighed}, "
            f"{self.retention:.1%} of it survives; worst: {self.worst.name} {self.worst.cosine:.3f}{self._lost}"
        )

    @property
    def dead(self) -> tuple[TensorFidelity, ...]:
        """Tensors of whose change less than half is left, or that point elsewhere: a mean over all hides them."""
        return tuple(row for row in self.tensors if row.dead)

    @property
    def _lost(self) -> str:
        """Words for the tensors that a mean hides."""
        if not self.dead:
            return ""
        if len(self.dead) == len(self.tensors):
            return f"; below {DEAD:g} in every tensor: what {self.format} adds or loses is larger than the change"
        names = ", ".join(row.name for row in self.dead)
        return (
            f"; {len(self.dead)} of {len(self.tensors)} tensors are dead (cosine or retention below {DEAD:g}): {names}"
        )

    @property
    def advice(self) -> str:
        """What to do when little survives; empty when enough does."""
        if self.retention >= ENOUGH:
            if not self.dead or len(self.dead) == len(self.tensors):
                return ""
            return f"keep the dead tensors wider ({option('keep_touched')}), or keep the adapter beside the base"
        if self.format in ("bf16", "fp8"):
            return f"write {option('dtype', 'f16')}, or keep the adapter beside the base"
        road = f"start from the 16-bit base ({option('base16')}), keep these layers at 8 bits"
        return f"{road}, or keep the adapter beside the base"


class Watch:
    """Collects the sums of the tensors that a fold touches while they are computed.

    Args:
        folded: what `fold` made; its touched tensors are watched from now on.
        kind: the format the view will be written in: None for its own dtypes, else ``nf4``, ``fp4``, ``int8`` or ``fp8``, or
            a name for what ``through`` does.
        through: for another format, a tensor's name and shape to a function that encodes and decodes some of its rows, or
            to None where it stays in its dtype.
        encodings: tensors that are written in the base's own format, where ``kind`` is the name of that.
        importance: a tensor's name and shape to how strongly inputs use each of its columns, or to None.
    """

    def __init__(
        self,
        folded: Folded,
        kind: str | None = None,
        through: Callable[[str, tuple[int, ...]], Through | None] | None = None,
        encodings: Mapping[str, Encoding] | None = None,
        importance: Importance | None = None,
    ) -> None:
        view = folded.checkpoint
        self._importance = importance or (lambda name, shape: None)
        self._encodings = encodings or {}
        self._sums: dict[str, dict[int, FidelitySums]] = {}
        self._lock = threading.Lock()
        self._tensors = merged_tensors(folded)
        self._share = SAMPLE if kind is None else SAMPLE_FORMAT
        dtypes = sorted({str(tensor.dtype) for tensor in self._tensors.values()})
        self._format = kind or "/".join(dtypes) or "its dtype"
        if through is None:
            targets = quantized_targets(view) if kind and not self._encodings else []
            encoded = {name for target in targets for name in target.tensors}

            def through(name: str, shape: tuple[int, ...]) -> Through | None:
                return through_format(kind, shape, self._tensors[name].dtype) if kind and name in encoded else None

        for name, tensor in self._tensors.items():
            encoding = self._encodings.get(name)
            if encoding is not None:
                encoding.witness = partial(self._written, name, tensor)
                continue
            by = self._importance(name, tensor.shape)
            tensor.watch = partial(self._add, name, tensor, (through(name, tensor.shape), by))
            if isinstance(tensor.base, Merged):  # the base as trained: its change is what quantization did to it
                tensor.base.watch = partial(self._add, name + BASE, tensor.base, (None, None))

    def measure(self, tensors: int | None = None) -> FidelityReport:
        """The numbers without writing: every tensor, or at most so many, is computed for them."""
        names = list(self._tensors)
        if tensors is not None and len(names) > tensors:
            names = [names[index * len(names) // tensors] for index in range(tensors)]
        for name in names:
            tensor, encoding = self._tensors[name], self._encodings.get(name)
            if encoding is not None:
                encoding.measure()
                continue
            for start in range(0, tensor.numel, tensor.block):
                tensor.read(start, min(start + tensor.block, tensor.numel))
            tensor.release()
        self.stop()
        return self.report()

    def stop(self) -> None:
        """Watch no longer."""
        for tensor in self._tensors.values():
            tensor.watch = None
            if isinstance(tensor.base, Merged):
                tensor.base.watch = None
        for encoding in self._encodings.values():
            encoding.witness = None

    def report(self) -> FidelityReport:
        """The numbers of all blocks seen so far."""
        from adapterkit.ops.fidelity import Fidelity, FidelitySums

        total = FidelitySums()
        found = []
        for name in self._tensors:
            blocks = self._sums.get(name, {})
            if blocks:
                # In the order of the blocks, so that the last bit does not depend on the threads.
                sums = sum((blocks[start] for start in sorted(blocks)), FidelitySums())
                total += sums
                one = Fidelity.of(sums)
                below = sum(self._sums.get(name + BASE, {}).values(), FidelitySums())
                error = sqrt(below.dd / below.count / (sums.dd / sums.count)) if below.count and sums.dd else None
                found.append(
                    TensorFidelity(
                        name, one.relative, one.unmoved, one.retention, one.cosine, error, one.error, one.weighed
                    )
                )
        found.sort(key=lambda item: (item.cosine, item.name))
        whole = Fidelity.of(total)
        return FidelityReport(
            whole.retention,
            whole.cosine,
            whole.relative,
            whole.unmoved,
            found[0] if found else None,
            tuple(found),
            self._format,
            whole.error,
            whole.weighed,
        )

    def _written(
        self, name: str, tensor: Merged, start: int, base: torch.Tensor, wanted: torch.Tensor, written: torch.Tensor
    ) -> None:
        """A range that was encoded: every value is measured."""
        from adapterkit.ops.fidelity import block_sums

        sums = block_sums(base, wanted, written, error=True)
        with self._lock:
            self._sums.setdefault(name, {})[start] = sums

    def _add(
        self,
        key: str,
        tensor: Merged,
        how: tuple[Through | None, torch.Tensor | None],
        start: int,
        base: torch.Tensor,
        wanted: torch.Tensor,
    ) -> None:
        from adapterkit.ops.fidelity import block_sums

        through, importance = how
        rows = base.shape[0]
        if tensor.numel > WHOLE and rows >= self._share:
            # Some rows of every block, not always the first.
            count = rows // self._share
            first = start // tensor.block % self._share * count
            base, wanted = base[first : first + count], wanted[first : first + count]
        written = wanted.to(tensor.dtype.torch) if through is None else through(wanted).to(wanted.device)
        importance = None if importance is None else importance.to(wanted.device)
        sums = block_sums(base, wanted, written, error=True, importance=importance)
        with self._lock:
            self._sums.setdefault(key, {})[start] = sums


WHOLE_GROUPS = 128  # columns that the groups of every format divide


def through_format(
    kind: str, shape: tuple[int, ...], dtype: DType | None = None, *, turned: bool = False
) -> Through | None:
    """decode(encode(.)) of whole rows, with scales from these rows alone and not quantized a second time.

    Weights are decoded to ``dtype`` where the format does that and ``dtype`` is given; else to float32.

    Args:
        turned: the weight is encoded on its side, so that scales run down these rows.
    """
    form, columns = find_kind(kind), shape[-1]
    if not turned and form.encoder("", (prod(shape[:-1]), columns), dtype or F32, False) is None:
        return None

    def through(rows: torch.Tensor) -> torch.Tensor:
        import torch

        if turned:
            held = rows.reshape(-1, columns)
            upright = torch.zeros(columns, -(-held.shape[0] // WHOLE_GROUPS) * WHOLE_GROUPS, device=rows.device)
            upright[:, : held.shape[0]] = held.T
            return put(upright, upright.shape[1])[:, : held.shape[0]].T.reshape(rows.shape)
        return put(rows, columns)

    def put(rows: torch.Tensor, columns: int) -> torch.Tensor:
        flat = rows.reshape(-1)
        some = (flat.numel() // columns, columns)
        encoder = (form.some or form.encoder)("", some, dtype or F32, False)
        assert encoder is not None
        return encoder.values(0, encoder.encode(0, flat, None)).view(rows.shape)

    return through


def merged_tensors(folded: Folded) -> dict[str, Merged]:
    """The tensors that adapters change by adding to them; what they replace whole is kept as it is."""
    found = ((name, folded.checkpoint[name]) for name in folded.touched)
    return {name: tensor for name, tensor in found if isinstance(tensor, Merged)}


def left_in_own_format(
    folded: Folded, encodings: Mapping[str, Encoding], *, tensors: int | None = None
) -> FidelityReport:
    """How much of a merge is left when it is written in its base's own format, without writing it.

    Args:
        folded: what `fold` made.
        encodings: the weights that are encoded again.
        tensors: at most so many tensors, spread over the model, and some ranges of each; None measures all.
    """
    names = list(encodings)
    if tensors is not None and len(names) > tensors:
        names = [names[index * len(names) // tensors] for index in range(tensors)]
    watch = Watch(folded, own_format(encodings), lambda name, shape: None, encodings)
    for name in names:
        encodings[name].measure(None if tensors is None else RANGES)
    watch.stop()
    return watch.report()


def own_format(encodings: Mapping[str, Encoding]) -> str:
    """What the formats of some encodings are called."""
    return " and ".join(sorted({encoding.words for encoding in encodings.values()})) or "its own format"


def left_on_grid(
    folded: Folded,
    kind: str,
    *,
    tensors: int | None = None,
    through: Callable[[str, tuple[int, ...]], Through | None] | None = None,
) -> FidelityReport:
    """How much of a merge is left when it is written in ``kind``, without writing it.

    From a base that already sits on that grid almost nothing is left until the change reaches half a step: a warning, or
    a question, belongs before such an output.

    Args:
        folded: what `fold` made.
        kind: ``nf4``, ``fp4``, ``int8`` or ``fp8``, or a name for what ``through`` does.
        tensors: at most so many tensors, spread over the model; None measures all.
        through: of another format, as of `Watch`.
    """
    return Watch(folded, kind, through).measure(tensors)


def coarse_tensors(folded: Folded, *, tensors: int = 8) -> list[str]:
    """Merged tensors, of some that are looked at, whose base values lie on a grid of five bits or fewer.

    Values alone are asked, so that a folder that was decoded from a GGUF file, GPTQ or NF4 is known without a record.

    Args:
        folded: what `fold` made.
        tensors: at most so many are looked at, spread over the model.
    """
    from adapterkit.ops.coarse import is_coarse

    merged = [(name, tensor) for name, tensor in merged_tensors(folded).items() if len(tensor.shape) in (2, 3)]
    chosen = merged if len(merged) <= tensors else [merged[i * len(merged) // tensors] for i in range(tensors)]
    found = []
    for name, tensor in chosen:
        height, columns = tensor.shape[-2:]  # of a stack the first expert is looked at
        rows = min(height, max(64, ROWS // max(columns, 1)))
        values = tensor.base.read_wide(0, rows * columns).view(rows, columns)
        tensor.base.release()
        if is_coarse(values):
            found.append(name)
    return found


def already_on_grid(folded: Folded, kind: str) -> list[str]:
    """Merged tensors whose base values sit on the grid of ``kind``: writing them so again loses the change.

    They were decoded from it, or are taken as trained on it.
    """
    from adapterkit.checkpoint.decoded import Decoded
    from adapterkit.checkpoint.tensor import Transposed

    found = []
    for name, tensor in merged_tensors(folded).items():
        base = tensor.base.inner if isinstance(tensor.base, Transposed) else tensor.base
        decoded = isinstance(base, Decoded) and base.weight.how.split()[0] == kind
        trained = isinstance(base, Merged) and f"{base.how} ".startswith(f"as trained in {kind} ")
        if decoded or trained:
            found.append(name)
    return found
