"""Handles of GGUF tensors: as they lie in the file, decoded, and encoded."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from adapterkit.checkpoint.tensor import BLOCK, Cast, Renamed, Stored, Tensor
from adapterkit.dtypes import DTYPES, F32, DType
from adapterkit.errors import CheckpointError, option
from adapterkit.gguf.types import TYPES, GGMLType
from adapterkit.ops.device import CPU, larger, opened

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    import numpy.typing as npt
    import torch

    from adapterkit.checkpoint.files import Source
    from adapterkit.gguf.reader import GGUFTensor

_PACKED = {
    kind.name: DType(kind.name, kind.size * 8, "uint8", False, kind.name.lower(), kind.block)
    for kind in TYPES.values()
    if kind.name not in DTYPES
}


def dtype_of(kind: GGMLType) -> DType:
    """The dtype of tensors of a GGUF type: a plain one where safetensors has it too, else a packed one."""
    return DTYPES.get(kind.name) or _PACKED[kind.name]


def is_plain(kind: GGMLType) -> bool:
    return kind.name in DTYPES


def kind_of(tensor: Tensor) -> GGMLType:
    """The GGUF type as which a handle can be written as it is.

    Raises:
        CheckpointError: GGUF has no such type.
    """
    found = TYPES.get(tensor.dtype.code)
    if found is None:
        raise CheckpointError(f"'{tensor.name}' is {tensor.dtype}, which GGUF has no type for", "encode it first")
    return found


def bits_per_weight(kind: GGMLType) -> float:
    return kind.size * 8 / kind.block


class Packed(Stored):
    """A quantized tensor as it lies in a GGUF file; ``read`` gives its bytes, whole blocks of elements at a time."""

    def __init__(self, info: GGUFTensor, source: Source) -> None:
        super().__init__(info.name, dtype_of(info.type), info.shape, source, info.start)
        self.kind = info.type

    def read(self, start: int, stop: int) -> torch.Tensor:
        import torch

        low, high = self.dtype.nbytes((start,)), self.dtype.nbytes((stop,))
        out = torch.empty(high - low, dtype=torch.uint8)
        if high > low:
            self.source.read_into(memoryview(out.numpy()), self.offset + low)  # type: ignore[arg-type]
        return out


def stored(info: GGUFTensor, source: Source) -> Tensor:
    """The handle of a tensor in a GGUF file."""
    if is_plain(info.type):
        return Stored(info.name, dtype_of(info.type), info.shape, source, info.start)
    return Packed(info, source)


class Dequantized(Tensor):
    """A quantized tensor as float32 values."""

    dtype = F32

    def __init__(self, inner: Packed) -> None:
        self.name, self.shape, self.inner = inner.name, inner.shape, inner

    @property
    def block(self) -> int:
        return _rows(self.shape)

    @property
    def reads(self) -> int:
        return self.inner.reads

    @property
    def how(self) -> str:
        return f"{self.inner.dtype} to f32"

    def read(self, start: int, stop: int) -> torch.Tensor:
        import torch

        from adapterkit.gguf.encode import decode

        size = self.inner.kind.block
        low, high = start - start % size, stop + -stop % size
        if high <= low:
            return torch.empty(0)
        values = decode(self.inner.kind.name, self.inner.read(low, high).numpy(), high - low)
        return torch.from_numpy(values).view(-1)[start - low : stop - low]


_WIDENED = ("F32", "F16", "BF16")  # what numpy widens as torch does, to the bit


def _leaf(tensor: Tensor) -> Stored | None:
    """The stored tensor that a handle only renames, if that is what it is."""
    while type(tensor) is Renamed:
        tensor = tensor.inner
    return tensor if type(tensor) is Stored else None


def _wide(leaf: Stored, start: int, stop: int) -> npt.NDArray[np.float32]:
    """Elements of a stored float tensor in float32, where numba compiles."""
    import numpy as np

    from adapterkit.gguf.kernels.backends import widened

    size = leaf.dtype.bits // 8
    data = np.empty((stop - start) * size, dtype=np.uint8)
    if data.size:
        leaf.source.read_into(data.data, leaf.offset + start * size)
    if leaf.dtype.code == "BF16":
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return data.view("<f4") if leaf.dtype.code == "F32" else widened(data.view("<u2"))


class Quantized(Tensor):
    """A float tensor in a quantized GGUF type, encoded from its float32 values row block by row block."""

    def __init__(self, inner: Tensor, kind: GGMLType) -> None:
        self.name, self.shape, self.inner, self.kind = inner.name, inner.shape, inner, kind
        self.dtype = dtype_of(kind)
        self.importance: npt.NDArray[np.float32] | None = None  # [matrices, columns], set once before reading
        self.device = CPU

    def place_on(self, device: str) -> None:
        if self.kind.encoder != "ggml":
            self.device = device

    @property
    def on_cpu(self) -> frozenset[str]:
        stayed = self.inner.on_cpu
        return stayed | {f"the encoder of {self.kind.name} (ggml's own)"} if self.kind.encoder == "ggml" else stayed

    @property
    def block(self) -> int:
        own = _rows(self.shape)
        if self.device == CPU:
            return own
        inner = self.inner.block
        return inner if inner % self.shape[-1] == 0 and inner > own else larger(own)

    @property
    def reads(self) -> int:
        return self.inner.reads

    @property
    def memory(self) -> int:
        return self.inner.memory

    @property
    def how(self) -> str:
        to = f"to {self.dtype}"
        how = self.inner.how.removesuffix("to f32").rstrip()
        return f"{self.inner.dtype} {to}" if how == "copy" else f"{how} {to}"

    @property
    def plain(self) -> bool:
        from adapterkit.gguf.encode import is_compiled

        inner = _leaf(self.inner)
        return (
            self.device == CPU
            and inner is not None
            and inner.dtype.code in _WIDENED
            and is_compiled(self.kind, self.importance is not None)
        )

    def read(self, start: int, stop: int) -> torch.Tensor:
        import torch

        first, rows = self._rows(start, stop)
        device = opened(self.device)
        found = self.inner.read_on(device, first, rows.stop * self.shape[-1])
        with device.at_work():
            made = self._encoded(found.float().view(len(rows), -1), rows.start)
        return torch.from_numpy(made)[self._bytes(start - first) : self._bytes(stop - first)]

    def array(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        first, rows = self._rows(start, stop)
        leaf = _leaf(self.inner)
        assert leaf is not None
        wide = _wide(leaf, first, rows.stop * self.shape[-1]).reshape(len(rows), -1)
        return self._encoded(wide, rows.start)[self._bytes(start - first) : self._bytes(stop - first)]

    def _rows(self, start: int, stop: int) -> tuple[int, range]:
        """The element at which the first row of a range begins, and its rows."""
        columns = self.shape[-1]
        return start // columns * columns, range(start // columns, -(-stop // columns))

    def _bytes(self, elements: int) -> int:
        return self.dtype.nbytes((elements,))

    def _encoded(self, rows: torch.Tensor | npt.NDArray[np.float32], first: int) -> npt.NDArray[np.uint8]:
        """The bytes of whole rows, of which ``first`` is the number of the first one.

        Raises:
            CheckpointError: a value that the type cannot hold.
        """
        import numpy as np

        from adapterkit.gguf.encode import NonFiniteWeightError, encode

        parts = []
        for at, count, importance in self._runs(first, len(rows)):
            try:
                parts.append(encode(self.kind.name, rows[at : at + count], importance).reshape(-1))
            except NonFiniteWeightError as error:
                place = f"row {first + at + error.row}, column {error.column}"
                raise CheckpointError(
                    f"'{self.name}' cannot be {self.kind.name}: its value at {place} is not finite or too large",
                    error.hint,
                ) from None
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _runs(self, first: int, rows: int) -> Iterator[tuple[int, int, npt.NDArray[np.float32] | None]]:
        """Rows with one importance: all of them, or those of one expert after the other."""
        if self.importance is None:
            yield 0, rows, None
            return
        height, at = self.shape[-2], 0
        while at < rows:
            matrix, inside = divmod(first + at, height)
            count = min(height - inside, rows - at)
            yield at, count, self.importance[matrix]
            at += count

    def release(self) -> None:
        self.inner.release()


def decoded(tensor: Tensor) -> Tensor:
    """A handle of floats: packed tensors are decoded, others are what they are."""
    floats = getattr(tensor, "decoded", None)  # a checkpoint's own packed weights know their values
    if isinstance(floats, Tensor):
        return floats
    return Dequantized(tensor) if isinstance(tensor, Packed) else tensor


def encoded(tensor: Tensor, kind: GGMLType) -> Tensor:
    """A handle of floats as one of GGUF type ``kind``; unchanged where it is that already."""
    if tensor.dtype is dtype_of(kind):
        return tensor
    return FiniteCast(tensor, dtype_of(kind)) if is_plain(kind) else Quantized(tensor, kind)


class FiniteCast(Cast):
    """A tensor in another float type of GGUF, every value of it a number."""

    def read(self, start: int, stop: int) -> torch.Tensor:
        """As `Cast.read`.

        Raises:
            NonFiniteWeightError: values that are NaN or infinite, or too large for the type.
        """
        import torch

        wide = self.inner.read(start, stop)
        found = wide.to(self.dtype.torch)
        if torch.isfinite(found).all():
            return found
        from adapterkit.gguf.encode import NonFiniteWeightError

        lost = ~torch.isfinite(found)
        first = int(lost.nonzero()[0])
        row, column = divmod(start + first, self.shape[-1] if self.shape else 1)
        value = float(wide[first])
        what = f"too large for {self.dtype}" if torch.isfinite(wide[first]) else "no number"
        error = NonFiniteWeightError(
            f"'{self.name}' holds {value:g} in row {row}, column {column}, which is {what} ({int(lost.sum())} such values "
            f"in {stop - start} around it)",
            row,
            column,
        )
        if torch.isfinite(wide[first]):
            error.hint = f"write {option('dtype', 'bf16')} or f32"
        raise error


def round_trip(kind: GGMLType, rows: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    """Rows as they come back from a type, encoded with the columns' importance: ``decode(encode(rows))``."""
    import torch

    if is_plain(kind):
        return rows.to(dtype_of(kind).torch).float()
    from adapterkit.gguf.encode import decode, encode

    matrix = rows.reshape(-1, rows.shape[-1])
    return torch.from_numpy(decode(kind.name, encode(kind.name, matrix, importance), rows.shape[-1])).view(rows.shape)


def _rows(shape: tuple[int, ...]) -> int:
    columns = shape[-1] if shape else 1
    return min(max(1, BLOCK // columns) * columns, max(prod(shape), 1))


def importance_of(tensor: Tensor, shape: tuple[int, ...]) -> torch.Tensor | None:
    """How strongly inputs use each column of a matrix, float32; None where no matrix says it, or one for each expert does."""
    import torch

    found = getattr(tensor, "importance", None)
    return torch.from_numpy(found[0]) if found is not None and found.shape == (1, shape[-1]) else None
