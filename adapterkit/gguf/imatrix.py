"""Importance matrices of llama-imatrix: how much each input column of a weight matters.

Formats: ``common_imatrix_load`` and ``load_imatrix`` of llama.cpp. A value is the mean square of the activations that
a column was multiplied by; a tensor of several matrices (experts) has one row of values per matrix.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from adapterkit.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]

MAGIC = b"GGUF"
SUMS, COUNTS = ".in_sum2", ".counts"


def parse_legacy(data: bytes) -> tuple[dict[str, Floats], str, int]:
    """The values of a ``.dat`` file by tensor name, float32 [columns * matrices], the data set's name, the chunks.

    The file is little-endian: the number of entries, then for each the length of its name, the name, the number of
    calls, the number of values, the values summed over the calls. The chunk count and the data set's name may follow.

    Raises:
        CheckpointError: the bytes are no such file, or end early.
    """
    import numpy as np

    if data[:4] == MAGIC:
        raise CheckpointError("this importance matrix is a GGUF file, not the older .dat", "read it as GGUF")
    at = 0

    def number() -> int:
        nonlocal at
        if at + 4 > len(data):
            raise CheckpointError(f"the importance matrix ends at byte {len(data)}, inside an entry", "copy it again")
        at += 4
        return int(struct.unpack_from("<i", data, at - 4)[0])

    def piece(count: int, what: str) -> bytes:
        nonlocal at
        if count < 1 or at + count > len(data):
            message = f"the importance matrix claims {count} bytes of {what} at byte {at} of {len(data)}"
            raise CheckpointError(message, "it is damaged or no importance matrix; make it again")
        at += count
        return data[at - count : at]

    found: dict[str, Floats] = {}
    entries = number()
    if entries < 1:
        raise CheckpointError(f"the importance matrix has {entries} entries", "make it again with llama-imatrix")
    for _ in range(entries):
        name = piece(number(), "a tensor name").decode("utf-8", "replace")
        calls = number()
        values = np.frombuffer(piece(4 * number(), f"values for {name}"), dtype="<f4").astype(np.float32)
        with np.errstate(all="ignore"):  # what is not finite is refused
            values = values / np.float32(calls) if calls > 0 else values
        found[name] = _finite(name, values)
    chunks = number() if at + 4 <= len(data) else 0
    length = number() if at + 4 <= len(data) else 0
    dataset = data[at : at + length] if 0 < length <= len(data) - at else b""
    return found, dataset.decode("utf-8", "replace"), chunks


def from_tensors(tensors: Mapping[str, npt.NDArray[np.floating]]) -> dict[str, Floats]:
    """The values of a GGUF importance matrix, from its tensors as arrays by name.

    ``<weight>.in_sum2`` [matrices, columns] is divided by ``<weight>.counts`` [matrices, 1]; a matrix that was never
    called (an expert that got no token) gets ones, as llama-quantize gives it.

    Raises:
        CheckpointError: a tensor has no partner, or their shapes differ.
    """
    import numpy as np

    found: dict[str, Floats] = {}
    for name in tensors:
        weight, dot, kind = name.rpartition(".")
        if dot + kind not in (SUMS, COUNTS):
            continue
        if weight + SUMS not in tensors or weight + COUNTS not in tensors:
            other = COUNTS if dot + kind == SUMS else SUMS
            raise CheckpointError(f"the importance matrix has {name} and no {weight}{other}", "make it again")
        if dot + kind == COUNTS:
            continue
        counts = np.asarray(tensors[weight + COUNTS], dtype=np.float32).reshape(-1)
        sums = np.asarray(tensors[name], dtype=np.float32)
        if counts.size == 0 or sums.size == 0 or sums.size % counts.size:
            message = f"the importance matrix has {sums.size} sums and {counts.size} counts for {weight}"
            raise CheckpointError(message, "make it again")
        rows = sums.reshape(counts.size, -1)
        called = counts > 0
        means = np.ones_like(rows)
        with np.errstate(over="ignore"):  # what is too large is said below
            means[called] = rows[called] / counts[called, None]
        found[weight] = _finite(weight, means.reshape(-1))
    if not found:
        raise CheckpointError("the file has no .in_sum2 tensors, so it is no importance matrix", "pass another file")
    return found


def for_tensor(matrix: Mapping[str, Floats], name: str, columns: int, matrices: int = 1) -> Floats | None:
    """The values for a weight as float32 [matrices, columns], or None when the file has none for it.

    Raises:
        CheckpointError: there are too many or too few, which means that the file was made for another model.
    """
    values = matrix.get(name)
    if values is None:
        return None
    if values.size != columns * matrices:
        message = f"the importance matrix has {values.size} values for {name}, which needs {columns * matrices}"
        raise CheckpointError(message, "use the one made for this model")
    return values.reshape(matrices, columns)


def _finite(name: str, values: Floats) -> Floats:
    import numpy as np

    if not np.isfinite(values).all():
        raise CheckpointError(f"the importance matrix has NaN or infinity for {name}", "make it again")
    if not values.any():
        raise CheckpointError(f"the importance matrix has only zeros for {name}", "make it again with more text")
    return values
