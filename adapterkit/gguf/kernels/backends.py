"""The encoders that run on this machine: compiled by numba for the CPU, or torch for any device."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    Bytes = npt.NDArray[np.uint8]
    Floats = npt.NDArray[np.float32]


def run_backend(backend: str, name: str, x: torch.Tensor, weights: torch.Tensor | None, out: Bytes) -> float:
    """One of the encoders, unchecked: ``x`` float32 [n, columns], ``out`` uint8, contiguous; the largest magnitude."""
    import torch

    if backend == "numba":
        return run_compiled(name, x.numpy(), None if weights is None else weights.numpy(), out)
    from adapterkit.gguf.kernels import eager
    from adapterkit.gguf.kernels.layouts import LAYOUTS

    target = torch.from_numpy(out)
    if x.device.type == "cpu":
        eager.run(LAYOUTS[name], x, weights, target)
    else:
        encoded = torch.empty(target.shape, dtype=torch.uint8, device=x.device)
        eager.run(LAYOUTS[name], x, weights, encoded)
        target.copy_(encoded)
    return peak_of(x)


def run_compiled(name: str, x: Floats, weights: Floats | None, out: Bytes) -> float:
    """As `run_backend` by numba, without torch: ``x`` is contiguous, ``weights`` [columns]."""
    import numpy as np

    from adapterkit.gguf.kernels.compiled import kernel

    given = np.empty(0, np.float32) if weights is None else weights
    peak = kernel(name, weights is not None)(x.reshape(-1), given, x.shape[1], out.reshape(-1))
    return float(np.uint32(min(peak, 0x7F800000)).view(np.float32))


def widened(halves: npt.NDArray[np.uint16]) -> Floats:
    """The bits of float16 values, flat, as float32: numpy's values, thirty times as fast where numba gives the same."""
    import numpy as np

    if not _widens():
        return halves.view(np.float16).astype(np.float32)
    from adapterkit.gguf.kernels.compiled import LANES
    from adapterkit.gguf.kernels.compiled import halves as kernel

    out = np.empty(halves.size, np.float32)
    whole = halves.size - halves.size % LANES
    kernel()(halves[:whole], out[:whole])
    out[whole:] = halves[whole:].view(np.float16)
    return out


@cache
def _widens() -> bool:
    """Whether numba widens every float16 on this machine as numpy does."""
    import numpy as np

    from adapterkit.gguf.kernels.compiled import halves

    every = np.arange(1 << 16, dtype=np.uint16)
    found = np.empty(every.size, np.float32)
    halves()(every, found)
    return bool(np.array_equal(found.view(np.uint32), every.view(np.float16).astype(np.float32).view(np.uint32)))


def peak_of(x: torch.Tensor) -> float:
    """The largest magnitude of ``x``; infinity when one is NaN."""
    import torch

    least, most = (float(v) for v in torch.aminmax(x))
    return max(-least, most) if least == least else float("inf")
