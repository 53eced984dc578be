"""Does a backend give llama.cpp's bytes on this machine? Asked once per process, type and backend.

The expected digests are those of ``ggml_quantize_chunk`` (llama.cpp, x86-64) on :func:`vector`; the test suite computes
them again with the installed llama.cpp.
"""

from __future__ import annotations

from functools import cache
from hashlib import sha256
from threading import Lock
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

ROWS, COLUMNS = 19, 512
DIGESTS: dict[tuple[str, bool], str] = {
    ("Q8_0", False): "34e8409f7f7d1a04",
    ("Q4_0", False): "00320e35278f855f",
    ("Q4_0", True): "7027be4d920869bf",
    ("Q4_1", False): "50f9c191920a84b6",
    ("Q4_1", True): "ced7338d77c4a8ac",
    ("Q5_0", False): "98ff7139aeb8b9e0",
    ("Q5_0", True): "11bbd1b7e79bae14",
    ("Q5_1", False): "165e2abddc0cf19e",
    ("Q5_1", True): "f6638ad482282fa7",
    ("Q2_K", False): "7096ada2ed64cf9e",
    ("Q2_K", True): "1a53d19bcd435902",
    ("Q3_K", False): "d3411d051b92c201",
    ("Q3_K", True): "cbf9eac49b1fe486",
    ("Q4_K", False): "06a85d86b832e84b",
    ("Q4_K", True): "65a916b5caef8f2e",
    ("Q5_K", False): "c79d9daca01dcade",
    ("Q5_K", True): "b7a92ce78e9218eb",
    ("Q6_K", False): "f92e29353870134a",
    ("Q6_K", True): "40bfd1e99ce82063",
    ("IQ4_NL", False): "de6983c7130e3b59",
    ("IQ4_NL", True): "ef4de5e06f31847d",
    ("IQ4_XS", False): "5131c5379358ecdb",
    ("IQ4_XS", True): "3b9139d80bc5e939",
    ("TQ1_0", False): "296011128359cd3e",
    ("TQ2_0", False): "32e2827b994bd39c",
    ("MXFP4", False): "db110965784995ff",
}
_LOCK = Lock()


def vector() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Rows [19, 512] and importance [512], exact in float32: bell-shaped, sparse, coarse, constant and tiny rows."""
    import numpy as np

    def noise(count: int, seed: int) -> Any:
        mixed = (np.arange(count, dtype=np.uint64) + np.uint64(seed)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        return ((mixed >> np.uint64(44)).astype(np.float64) - 524288.0) / 524288.0  # twenty bits, -1 .. 1

    size = ROWS * COLUMNS
    bell = sum(noise(size, 1000003 * k) for k in range(4)).reshape(ROWS, COLUMNS)
    scale = 2.0 ** -(np.arange(ROWS) % 12)
    rows = bell * scale[:, None]
    rows[3] *= np.abs(noise(COLUMNS, 77)) > 0.9
    rows[5] = np.round(bell[5] * 4) / 4
    rows[7] = 0.125
    rows[8] = -0.125
    rows[9] = 0.0
    rows[10] *= 2.0**-40
    rows[11] = np.abs(rows[11]) + 1.0
    return rows.astype(np.float32), (noise(COLUMNS, 5) + 1.0625).astype(np.float32)


def digest(data: npt.NDArray[np.uint8]) -> str:
    """Sixteen hex digits that stand for the bytes."""
    return sha256(data.tobytes()).hexdigest()[:16]


@cache
def _outcome(backend: str, name: str, weighted: bool, device: str) -> str | None:
    import numpy as np

    from adapterkit.gguf.kernels.backends import run_backend, run_compiled
    from adapterkit.gguf.types import TYPES

    rows, importance = vector()
    out = np.empty((ROWS, TYPES[name].row_bytes(COLUMNS)), dtype=np.uint8)
    try:
        if backend == "numba":
            run_compiled(name, rows, importance if weighted else None, out)
        else:
            import torch

            weights = torch.from_numpy(importance).to(device) if weighted else None
            run_backend(backend, name, torch.from_numpy(rows).to(device), weights, out)
    except Exception as error:  # a compiler has many ways to fail, and there is another backend
        first = next(iter(str(error).splitlines()), "")
        return f"does not run for {name} ({type(error).__name__}: {first})"
    if digest(out) != DIGESTS[name, weighted]:
        return f"gives other bytes for {name} than llama.cpp"
    return None


def complaint(backend: str, name: str, weighted: bool, device: str) -> str | None:
    """What is wrong with the backend for a type, with or without importance; None when its bytes are llama.cpp's."""
    with _LOCK:
        return _outcome(backend, name, weighted, device)
