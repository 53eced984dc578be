"""`Merged`: a checkpoint tensor with adapters folded in, as a handle."""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.change import Weights
from adapterkit.checkpoint.tensor import BLOCK, Tensor, rounded
from adapterkit.dtypes import F32, F64
from adapterkit.ops.device import CPU, larger, opened
from adapterkit.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import torch

    from adapterkit.adapters.change import Change, Kernel
    from adapterkit.adapters.target import Piece, Target
    from adapterkit.dtypes import DType
    from adapterkit.ops.device import Device

    # Told of each block: the element it starts at, W as stored, and W' before rounding; both ``[rows, columns]``, where they
    # were computed.
    Watcher = Callable[[int, torch.Tensor, torch.Tensor], None]


KEPT = 2  # blocks of a tensor that stay on a device for who reads on


class StoredWeights(Weights):
    """A parameter's matrix, put together from the tensors that hold its pieces."""

    def __init__(self, target: Target, tensors: Mapping[str, Tensor], shape: tuple[int, int] | None = None) -> None:
        self._pieces, self._tensors = target.pieces, tensors
        self.shape = shape or target.matrix
        self.dtype = tensors[target.pieces[0].tensor].dtype

    def other(self, target: Target) -> StoredWeights:
        return StoredWeights(target, self._tensors)

    def resolved(self) -> tuple[Any, ...]:
        """What stands for it where a handle is described: of all tensors, those that it reads."""
        return (self._pieces, self.shape, [self._tensors[piece.tensor] for piece in self._pieces])

    def read(self, start: int, stop: int) -> torch.Tensor:
        return self.read_as(start, stop, F32)

    def read_as(self, start: int, stop: int, dtype: DType) -> torch.Tensor:
        """Rows ``start:stop`` in float32 or float64."""
        import torch

        columns = self.shape[1]
        out = torch.empty(stop - start, columns, dtype=dtype.torch)
        for piece in self._pieces:
            wanted = _overlap(range(piece.row, piece.row + piece.count * piece.row_step, piece.row_step), start, stop)
            if not len(wanted):
                continue
            where = slice(wanted.start - start, wanted[-1] + 1 - start, piece.row_step)
            first = (wanted.start - piece.row) // piece.row_step
            tensor = self._tensors[piece.tensor]
            if piece.transposed:
                width = tensor.shape[-1]
                held = piece.columns or columns
                turned = tensor.read_wide(piece.at * width, (piece.at + held) * width).view(held, width)
                turned = turned[:, piece.row_at + first : piece.row_at + first + len(wanted)]
                out[where, piece.held_columns(columns)] = turned.T.to(out.dtype)
            else:
                low = piece.at + first * piece.at_step
                high = low + (len(wanted) - 1) * piece.at_step + 1
                rows = tensor.read_wide(low * columns, high * columns).view(-1, columns)
                out[where] = rows[:: piece.at_step].to(out.dtype)
        return out


@dataclass(frozen=True)
class Applied:
    """One adapter's change on this tensor: which piece of which parameter, how strongly."""

    change: Change
    target: Target
    piece: Piece
    weight: float
    owner: str = ""  # what the adapter is called


class Loaded:
    """A change's kernel, loaded once and shared by every tensor that holds a piece of the parameter."""

    def __init__(self, change: Change, weights: StoredWeights, users: int = 1) -> None:
        self.change, self._weights, self._users = change, weights, users
        self._lock = threading.Lock()
        self._kernel: Kernel | None = None
        self._whole: torch.Tensor | None = None

    def kernel(self) -> Kernel:
        with self._lock:
            if self._kernel is None:
                self._kernel = self.change.load(self._weights)
            return self._kernel

    def whole(self) -> torch.Tensor:
        """W' of the whole parameter, for pieces that are stored transposed and changes that need whole rows."""
        kernel = self.kernel()
        with self._lock:
            if self._whole is None:
                rows = self._weights.shape[0]
                wide = kernel.wide and self._weights.dtype is F64
                self._whole = kernel.new(self._weights.read_as(0, rows, F64 if wide else F32), range(rows))
            return self._whole

    def release(self) -> None:
        """One tensor is finished; when the last one is, the kernel goes."""
        with self._lock:
            self._users -= 1
            if self._users <= 0:
                self._kernel = self._whole = None


class Merged(Tensor):
    """W + sum of w_k (f_k(W) - W), accumulated in float32 and rounded once to ``dtype``; in float64 where W is stored so.

    Every change sees the unmerged W, so the order of adapters does not matter. A single change of weight 1 is W' itself.

    Args:
        base: the tensor as stored (or what an adapter stored in its place).
        applied: the changes and where they act.
        loaded: their kernels, shared between the pieces of one parameter.
        dtype: of the result.
        columns: of the matrix as which it is walked.
        device: where low-rank additions, sums and the rounding run; what else a method computes runs on the CPU.
        factor: by which the sum is multiplied before it is rounded.
    """

    def __init__(
        self,
        name: str,
        base: Tensor,
        applied: tuple[tuple[Applied, Loaded], ...],
        dtype: DType,
        columns: int,
        device: str = CPU,
        factor: float = 1.0,
    ) -> None:
        self.name, self.base, self.applied, self.dtype = name, base, applied, dtype
        self.factor = factor
        self.shape = base.shape
        self.columns, self.device = max(columns, 1), device
        held = base.block
        self._step = held if held % self.columns == 0 else max(1, BLOCK // self.columns) * self.columns
        if device != CPU:
            self._step = larger(self._step)
        self._recent = _Recent()
        self._stayed: set[str] = set()
        self.watch: Watcher | None = None
        self.odd: dict[int, int] = {}  # how many values of a block are NaN or infinite, where some are

    @property
    def block(self) -> int:
        return self._step

    @property
    def reads(self) -> int:
        return self.base.reads + sum(applied.change.reads for applied, _ in self.applied)

    @property
    def memory(self) -> int:
        whole = any(applied.piece.transposed for applied, _ in self.applied) * 8 * self.numel
        return self.base.memory + whole + sum(applied.change.memory for applied, _ in self.applied)

    @property
    def how(self) -> str:
        words = [f"{a.change.how}{'' if a.weight == 1 else f' *{a.weight:g}'}" for a, _ in self.applied]
        found = " + ".join(dict.fromkeys(words)) or "copy"
        return found if self.factor == 1 else f"{found}, all *{self.factor:g}"

    @property
    def on_cpu(self) -> frozenset[str]:
        return frozenset(self._stayed)

    def read(self, start: int, stop: int) -> torch.Tensor:
        device = opened(self.device)
        found = self._wide(start, stop)
        with device.at_work():
            found = rounded(found, self.dtype, self.name)
        return device.down(found)

    def read_wide(self, start: int, stop: int) -> torch.Tensor:
        return opened(self.device).down(self._wide(start, stop))

    def read_on(self, device: Device, start: int, stop: int) -> torch.Tensor:
        return self._wide(start, stop) if device.name == self.device else super().read_on(device, start, stop)

    def _wide(self, start: int, stop: int) -> torch.Tensor:
        import torch

        step = self._step
        first = start - start % step
        blocks = [self._block(at) for at in range(first, stop, step)]
        found = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        return found[start - first : stop - first]

    def both(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Elements ``start:stop`` of W' before rounding, and of W as stored, both flat, float32 or float64 as `Merged` says."""
        import torch

        step = self._step
        first = start - start % step
        blocks = [self._pair(at) for at in range(first, stop, step)]
        found = tuple(
            part[0].view(-1) if len(part) == 1 else torch.cat([one.view(-1) for one in part])
            for part in zip(*blocks, strict=True)
        )
        new, old = (one[start - first : stop - first] for one in (found[1], found[0].to(found[1].dtype)))
        device = opened(self.device)
        return device.down(new), device.down(old)

    def release(self) -> None:
        self._recent.clear()
        self.base.release()
        for _, loaded in self.applied:
            loaded.release()

    def _block(self, start: int) -> torch.Tensor:
        return self._pair(start)[1].view(-1)

    def _pair(self, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A block of W as stored and of W', both ``[rows, columns]``, on the device.

        A block of a device is large, and views between here and the output read it in pieces of their own: it is kept for them.
        """
        if self.device == CPU:
            return self._computed(start)
        return self._recent.get(start, self._computed)

    def _computed(self, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        device = opened(self.device)
        stop = min(start + self._step, self.numel)
        columns = self.columns
        low, high = start // columns, stop // columns
        for _, loaded in self.applied:
            loaded.kernel()  # reads the adapter: not while others wait for the device
        stored = device.gather(self.base.read_wide, start, stop, self.base.block).view(-1, columns)
        with device.at_work():
            acc = stored if stored.dtype == torch.float64 else stored.float()
            if acc is stored:
                acc = stored.clone()
            one = self.applied[0][0] if self.applied else None
            same = one is not None and all(applied.change is one.change for applied, _ in self.applied)
            alone = one is not None and one.weight == 1 and same
            for applied, loaded in self.applied:
                add = _add_transposed if applied.piece.transposed else _add
                if not add(acc, stored, applied, loaded, low, high, alone):
                    self._stayed.add(applied.change.how.partition(" ")[0])
            if self.factor != 1:
                acc.mul_(self.factor)
                stored = stored.to(acc.dtype) * self.factor
            if not math.isfinite(float(acc.sum())):
                self.odd[start] = int((~torch.isfinite(acc)).sum())
            if self.watch is not None:
                self.watch(start, stored, acc)
        return stored, acc


class _Recent:
    """The blocks that were computed last, by where they start; one thread computes a block, others wait for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[int, _Once] = {}

    def get(
        self, start: int, compute: Callable[[int], tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with self._lock:
            once = self._held.pop(start, None) or _Once()
            self._held[start] = once  # the last that was asked for
            while len(self._held) > KEPT:
                del self._held[next(iter(self._held))]
        with once.lock:
            if once.made is None:
                once.made = compute(start)
            return once.made

    def clear(self) -> None:
        with self._lock:
            self._held.clear()


class _Once:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.made: tuple[torch.Tensor, torch.Tensor] | None = None


def not_finite(tensors: Iterable[Tensor]) -> tuple[str, ...]:
    """What to say of values that came out as NaN or infinite, of the blocks computed so far."""
    found = {one.name: sum(one.odd.values()) for one in tensors if isinstance(one, Merged) and one.odd}
    found = {name: count for name, count in found.items() if count}
    if not found:
        return ()
    first = next(iter(found))
    more = f" and {len(found) - 1} more tensors" if len(found) > 1 else ""
    return (f"{sum(found.values()):,} merged values are not finite (NaN or infinite), in {first}{more}",)


def _overlap(rows: range, start: int, stop: int) -> range:
    """The part of ``rows`` (ascending) that lies in ``start:stop``."""
    low = max(0, -((rows.start - start) // rows.step))
    high = min(len(rows), -((rows.start - stop) // rows.step))
    return rows[low:high] if high > low else rows[:0]


def _add(
    acc: torch.Tensor, stored: torch.Tensor, applied: Applied, loaded: Loaded, low: int, high: int, alone: bool
) -> bool:
    """Add a change to rows ``low:high``; whether all of it was computed where ``acc`` is."""
    import torch

    piece, kernel = applied.piece, loaded.kernel()
    held = range(piece.at, piece.at + piece.count * piece.at_step, piece.at_step)
    wanted = _overlap(held, low, high)
    if not len(wanted):
        return True
    where = slice(wanted.start - low, wanted[-1] + 1 - low, piece.at_step)
    first = piece.row + (wanted.start - piece.at) // piece.at_step * piece.row_step
    rows = range(first, first + len(wanted) * piece.row_step, piece.row_step)
    out = acc[where]
    parts = kernel.parts(rows)
    if parts is not None:
        for sub, left, right, scale in parts:
            both = (factor.to(acc.device, acc.dtype) for factor in (left, right))
            torch.addmm(out[sub], *both, alpha=scale * applied.weight, out=out[sub])
        return True
    w = stored[where].to(acc.dtype if kernel.wide else torch.float32)
    there = w if kernel.anywhere else w.cpu()
    new = kernel.new(there, rows)
    if alone and new.dtype == acc.dtype:
        acc[where] = new.to(acc.device)
    else:
        acc[where] += (applied.weight * (new - there)).to(acc.device, acc.dtype)
    return there is w


def _add_transposed(
    acc: torch.Tensor, stored: torch.Tensor, applied: Applied, loaded: Loaded, low: int, high: int, alone: bool
) -> bool:
    piece = applied.piece
    held = range(applied.target.matrix[1])[piece.held_columns(applied.target.matrix[1])]
    wanted = _overlap(range(piece.at, piece.at + len(held)), low, high)
    if not len(wanted):
        return True
    kernel = loaded.kernel()
    where = slice(wanted.start - low, wanted.stop - low)
    columns = slice(held[wanted.start - piece.at], held[wanted.stop - piece.at - 1] + 1, held.step)
    rows = range(piece.row, piece.row + piece.count * piece.row_step, piece.row_step)
    beside = slice(piece.row_at, piece.row_at + piece.count)
    out = acc[where, beside]
    parts = kernel.parts(rows)
    if parts is not None:
        for sub, left, right, scale in parts:
            part = out[:, sub]
            there = (factor.to(acc.device, acc.dtype) for factor in (right[:, columns].T, left.T))
            part.addmm_(*there, alpha=scale * applied.weight)
        return True
    new = loaded.whole()[rows.start : rows.stop : rows.step, columns].T
    if alone and new.dtype == acc.dtype:
        acc[where, beside] = new.to(acc.device)
    else:
        before = stored[where, beside].to(new.device, new.dtype)
        out += (applied.weight * (new - before)).to(acc.device, acc.dtype)
    return new.device == acc.device


def merged_columns(applied: tuple[Applied, ...], shape: tuple[int, ...]) -> int:
    """Columns of the matrix as which a tensor is walked: those of its parameters, all the same for one tensor."""
    for item in applied:
        if not item.piece.transposed:
            return item.target.matrix[1]
    return shape[-1] if len(shape) > 1 else 1


def as_float32(tensor: Merged) -> Merged:
    """The same tensor before its one rounding, for what comes after the merge in the same pass."""
    return in_dtype(tensor, F32)


def in_dtype(tensor: Merged, dtype: DType) -> Merged:
    """The same tensor, rounded once to another dtype."""
    return Merged(tensor.name, tensor.base, tensor.applied, dtype, tensor.columns, tensor.device, tensor.factor)
