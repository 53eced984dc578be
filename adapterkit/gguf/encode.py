"""Float32 rows to the bytes of a GGUF tensor type, identical to what x86-64 builds of llama-quantize write.

Other builds of llama.cpp (ARM, or compiled with FMA) round some sums differently and write slightly other bytes.
"""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from adapterkit.errors import AdapterkitError, CheckpointError, UsageError
from adapterkit.gguf.kernels.backends import peak_of, run_backend
from adapterkit.gguf.types import GGMLType, ggml_type
from adapterkit.packages import missing

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    Bytes = npt.NDArray[np.uint8]
    Floats = npt.NDArray[np.float32]

Backend = Literal["auto", "numba", "torch"]
LARGE = 16384.0
"""Weights below it cannot give a scale that float16 lacks."""
NVFP4_LARGEST = 6.0 * 448.0  # ggml makes larger ones this without a word
HOPELESS = 1e9
"""Weights above it are out of reach of every type with float16 scales, and their squares upset the searches."""


class NonFiniteWeightError(CheckpointError):
    """Weights with NaN, infinity, or values too large for the type: ``row`` and ``column`` of the first."""

    def __init__(self, message: str, row: int, column: int) -> None:
        super().__init__(message, "check the checkpoint, and the adapter's scaling if one was merged")
        self.row = row
        self.column = column


def encode(
    type_name: str,
    rows: torch.Tensor | npt.NDArray[np.floating[Any]],
    importance: torch.Tensor | Floats | None = None,
    backend: Backend = "auto",
) -> Bytes:
    """The bytes of ``rows`` as a tensor of type ``type_name``.

    Args:
        type_name: a name of :data:`adapterkit.gguf.types.TYPES`, such as ``"Q4_K"``.
        rows: float [n, columns]; other floats are widened to float32. A tensor on a GPU is encoded there.
        importance: float32 [columns], how much each input column matters; types that have no use for it ignore it.
        backend: ``"numba"`` (CPU, compiled), ``"torch"`` (any device), or the first that is there.

    Returns:
        uint8 [n, bytes per row].

    Raises:
        NonFiniteWeightError: a weight is NaN, infinite, or too large for the type's float16 scales.
        UsageError: the shape does not fit the type, the type needs importance, or nothing installed encodes it.
    """
    import numpy as np

    out = np.empty((rows.shape[0], ggml_type(type_name).row_bytes(rows.shape[1])), dtype=np.uint8)
    encode_into(type_name, rows, out, importance, backend)
    return out


def encode_into(
    type_name: str,
    rows: torch.Tensor | npt.NDArray[np.floating[Any]],
    out: Bytes,
    importance: torch.Tensor | Floats | None = None,
    backend: Backend = "auto",
) -> None:
    """:func:`encode` into ``out``, uint8 [n, bytes per row], C-contiguous, such as a slice of a memory map's rows.

    Threads may call this at once on different rows; the compiled backend holds no lock while it works.
    """
    import numpy as np

    kind = ggml_type(type_name)
    if isinstance(rows, np.ndarray) and backend == "auto" and is_compiled(kind, importance is not None):
        with np.errstate(over="ignore"):  # a float64 that float32 lacks is refused by its place
            x32 = np.ascontiguousarray(rows, dtype=np.float32)
        _encode_array(kind, x32, out, importance)
        return
    import torch

    x = (rows if isinstance(rows, torch.Tensor) else torch.from_numpy(rows)).detach().to(torch.float32).contiguous()
    _check_shapes(kind, tuple(x.shape), out)
    weights = _importance(kind, x, importance)
    if not x.numel():
        return
    if kind.encoder == "cast":
        cast = x.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind.name])
        torch.from_numpy(out).copy_(cast.view(torch.uint8))
        peak = peak_of(x)
        _check_weights(kind, x, peak)
        if peak >= LARGE:
            _refuse(kind, ~torch.isfinite(cast), 1)
        return
    if kind.encoder == "own":
        peak = _run(kind, x, weights, out, backend)
    elif kind.encoder == "ggml":
        from adapterkit.gguf.kernels import native

        peak = peak_of(x)
        _check_weights(kind, x, peak)  # ggml aborts the process on NaN
        if kind.name == "NVFP4" and peak > NVFP4_LARGEST:
            _refuse(kind, x.abs() > NVFP4_LARGEST, 1)
        native.run(kind, x.cpu().numpy(), None if weights is None else weights.cpu().numpy(), out)
    else:
        raise UsageError(f"{kind.name} cannot be encoded", "choose another type")
    _check_encoded(kind, x, peak, out)


def is_compiled(kind: GGMLType, weighted: bool) -> bool:
    """Whether numba encodes the type here, and right: then arrays are encoded without torch."""
    if kind.encoder != "own" or find_spec("numba") is None:
        return False
    from adapterkit.gguf.kernels.selftest import complaint

    return complaint("numba", kind.name, _uses(kind, weighted), "cpu") is None


def _uses(kind: GGMLType, weighted: bool) -> bool:
    """Whether importance changes what is written of the type."""
    from adapterkit.gguf.kernels.layouts import LAYOUTS

    return weighted and LAYOUTS[kind.name].given is not None


def _encode_array(kind: GGMLType, x: Floats, out: Bytes, importance: Any) -> None:
    """:func:`encode_into` by the compiled encoders, of arrays. What is wrong with weights is said by torch's functions."""
    import numpy as np

    from adapterkit.gguf.kernels.backends import run_compiled

    _check_shapes(kind, x.shape, out)
    weights = None
    if importance is not None and not isinstance(importance, np.ndarray):
        importance = importance.detach().cpu().numpy()
    if importance is not None:
        weights = np.ascontiguousarray(importance, dtype=np.float32)
        _check_importance(weights.shape, x.shape[1], bool(np.isfinite(weights).all() and (weights >= 0).all()))
    elif kind.needs_importance:
        raise _needs_importance(kind)
    if not x.size:
        return
    peak = run_compiled(kind.name, x, weights if _uses(kind, weights is not None) else None, out)
    if not peak < LARGE:
        import torch

        _check_encoded(kind, torch.from_numpy(x), peak, out)


def _check_shapes(kind: GGMLType, shape: tuple[int, ...], out: Bytes) -> None:
    if len(shape) != 2 or out.shape != (shape[0], kind.row_bytes(shape[1])) or not out.flags.c_contiguous:
        message = f"rows of shape {shape} and a buffer of shape {out.shape} do not fit {kind.name}"
        raise UsageError(message, "pass [n, columns] and a contiguous [n, bytes per row]")


def _check_encoded(kind: GGMLType, x: torch.Tensor, peak: float, out: Bytes) -> None:
    """What cannot be held is refused: by the weights, and by scales that became infinite."""
    import torch

    _check_weights(kind, x, peak)
    if peak >= LARGE and kind.halves:
        blocks = torch.from_numpy(out.reshape(x.shape[0], -1, kind.size))
        halves = [blocks[:, :, at : at + 2].contiguous().view(torch.float16)[..., 0] for at in kind.halves]
        _refuse(kind, ~torch.isfinite(torch.stack(halves)).all(dim=0), kind.block)


def find_non_finite(rows: torch.Tensor) -> tuple[int, int] | None:
    """Row and column of the first NaN or infinity of ``rows`` [n, columns], or None."""
    import torch

    bad = torch.nonzero(~torch.isfinite(rows))
    return None if bad.shape[0] == 0 else (int(bad[0, 0]), int(bad[0, 1]))


def decode(type_name: str, data: Bytes, columns: int) -> Floats:
    """Float32 [n, columns] from the bytes of a tensor, by the ``gguf`` package.

    Raises:
        UsageError: ``gguf`` is not installed or cannot decode the type.
    """
    kind = ggml_type(type_name)
    if kind.name in _BITS:
        return _few_bits(kind, data, columns)
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as error:
        raise missing(error.name or "gguf", f"{kind.name} of GGUF is decoded by the package gguf", "gguf") from error
    import numpy as np

    raw = np.ascontiguousarray(data).reshape(-1, kind.row_bytes(columns))
    try:
        return np.asarray(dequantize(raw, GGMLQuantizationType[kind.name]), dtype=np.float32).reshape(-1, columns)
    except (KeyError, NotImplementedError) as error:
        raise UsageError(f"the installed gguf cannot decode {kind.name}", "pip install -U gguf") from error


_BITS = {"Q1_0": 1, "Q2_0": 2}


def _few_bits(kind: GGMLType, data: Bytes, columns: int) -> Floats:
    """Q1_0 and Q2_0, which the ``gguf`` package does not decode: a float16 scale, then codes from the lowest bit on.

    A code of one bit is -1 or 1, one of two bits -1, 0, 1 or 2 (``dequantize_row_q1_0``, ``_q2_0`` of ggml-quants.c).
    """
    import numpy as np

    bits = _BITS[kind.name]
    blocks = np.ascontiguousarray(data).reshape(-1, kind.size)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (blocks[:, 2:, None] >> shifts & ((1 << bits) - 1)).reshape(len(blocks), kind.block).astype(np.float32)
    levels = 2 * codes - 1 if bits == 1 else codes - 1
    return np.asarray(levels * scale, dtype=np.float32).reshape(-1, columns)


def _importance(kind: GGMLType, x: torch.Tensor, importance: Any) -> torch.Tensor | None:
    import torch

    if importance is None:
        if kind.needs_importance:
            raise _needs_importance(kind)
        return None
    weights = importance if isinstance(importance, torch.Tensor) else torch.from_numpy(importance)
    weights = weights.to(dtype=torch.float32, device=x.device).contiguous()
    _check_importance(tuple(weights.shape), x.shape[1], bool((torch.isfinite(weights) & (weights >= 0)).all()))
    return weights


def _needs_importance(kind: GGMLType) -> UsageError:
    return UsageError(f"{kind.name} needs an importance matrix", "pass one, or choose a type of more bits")


def _check_importance(shape: tuple[int, ...], columns: int, right: bool) -> None:
    if shape != (columns,):
        message = f"importance of shape {shape} does not fit rows of {columns} weights"
        raise UsageError(message, "pass one number per column")
    if not right:
        raise UsageError("importance has negative or non-finite numbers", "compute the importance matrix again")


def _check_weights(kind: GGMLType, x: torch.Tensor, peak: float) -> None:
    if not peak < float("inf"):
        found = find_non_finite(x)
        assert found is not None
        message = f"row {found[0]}, column {found[1]} is {float(x[found])}, which {kind.name} cannot hold"
        raise NonFiniteWeightError(message, *found)
    if peak >= HOPELESS and kind.encoder != "cast" and kind.name != "MXFP4":
        _refuse(kind, x.abs() >= HOPELESS, 1)


def _refuse(kind: GGMLType, bad: torch.Tensor, block: int) -> None:
    """What ``ggml_validate_row_data`` refuses: numbers that became infinite in ``kind``, by row and block."""
    import torch

    places = torch.nonzero(bad)
    if places.shape[0]:
        row, column = int(places[0, 0]), int(places[0, 1]) * block
        message = f"weights at row {row}, column {column} are too large for {kind.name}"
        raise NonFiniteWeightError(message, row, column)


def _run(kind: GGMLType, x: torch.Tensor, weights: torch.Tensor | None, out: Bytes, backend: Backend) -> float:
    """Encode with the first backend that passes its self-test; the largest magnitude, infinity for NaN."""
    from adapterkit.gguf.kernels.selftest import complaint

    if not _uses(kind, weights is not None):
        weights = None
    candidates = _candidates(x, backend)
    for name in candidates:
        wrong = complaint(name, kind.name, weights is not None, x.device.type)
        if wrong is None:
            return run_backend(name, kind.name, x, weights, out)
        if name != candidates[-1]:
            message = f"the {name} encoder {wrong} on this machine; using {candidates[-1]}"
            warnings.warn(message, RuntimeWarning, stacklevel=4)
    raise AdapterkitError(
        f"the {candidates[-1]} encoder {wrong} on this machine",
        "choose another type, or report the processor and the versions of torch and numba",
    )


def _candidates(x: torch.Tensor, backend: Backend) -> list[str]:
    """The backends to try in turn; more than one only when the caller left the choice."""
    if backend not in ("auto", "numba", "torch"):
        raise UsageError(f"backend {backend!r} does not exist", "use auto, numba or torch")
    has_numba = x.device.type == "cpu" and find_spec("numba") is not None
    if backend == "numba" and not has_numba:
        if x.device.type == "cpu":
            raise missing("numba", "the compiled encoders need numba (the backend torch does not)")
        raise UsageError("the compiled encoders need tensors on the CPU", "use backend torch")
    if backend == "auto":
        return ["numba", "torch"] if has_numba else ["torch"]
    return [backend]
