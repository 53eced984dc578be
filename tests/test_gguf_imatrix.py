from __future__ import annotations

import struct

import numpy as np
import pytest

from adapterkit.errors import CheckpointError
from adapterkit.gguf.imatrix import for_tensor, from_tensors, parse_legacy


def legacy(*entries: tuple[str, int, list[float]], tail: bytes = b"") -> bytes:
    """The format as ``llama-imatrix`` wrote it: counts, names and values in little-endian."""
    data = struct.pack("<i", len(entries))
    for name, calls, values in entries:
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(values))
        data += struct.pack(f"<{len(values)}f", *values)
    return data + tail


def test_legacy_values_are_divided_by_the_calls() -> None:
    tail = struct.pack("<ii", 7, 4) + b"text"
    data = legacy(("blk.0.attn_q.weight", 4, [1.0, 2.0, 3.0]), ("x.weight", 0, [5.0]), tail=tail)
    found, dataset, chunks = parse_legacy(data)
    assert (dataset, chunks) == ("text", 7)
    assert list(found) == ["blk.0.attn_q.weight", "x.weight"]
    assert found["blk.0.attn_q.weight"].tolist() == [0.25, 0.5, 0.75]
    assert found["x.weight"].tolist() == [5.0]
    found, dataset, chunks = parse_legacy(legacy(("w", 3, [1.0])))
    assert (dataset, chunks) == ("", 0)
    third = found["w"]
    assert third.dtype == np.float32
    assert third[0] == np.float32(1.0) / np.float32(3.0)


@pytest.mark.parametrize("size", [2, 5, 12, 20, 40])
def test_a_legacy_file_cut_short(size: int) -> None:
    whole = legacy(("blk.0.attn_q.weight", 4, [1.0, 2.0, 3.0, 4.0]))
    with pytest.raises(CheckpointError, match=r"importance matrix (ends|claims)"):
        parse_legacy(whole[:size])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GGUF" + bytes(20), "is a GGUF file"),
        (struct.pack("<i", 0), "has 0 entries"),
        (struct.pack("<i", -3), "has -3 entries"),
        (legacy(("w", 1, [float("nan")])), "NaN or infinity for w"),
        (legacy(("w", 1, [0.0, 0.0])), "only zeros for w"),
        (legacy(("w", 1, [])), "claims 0 bytes of values for w"),
        (struct.pack("<ii", 1, 2**31 - 1), "claims 2147483647 bytes of a tensor name"),
    ],
)
def test_damaged_legacy_files(data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_legacy(data)


def test_sums_are_divided_by_counts_and_unused_experts_get_ones() -> None:
    tensors = {
        "blk.0.ffn_up_exps.weight.in_sum2": np.array([[2.0, 4.0], [0.0, 0.0], [9.0, 3.0]]),
        "blk.0.ffn_up_exps.weight.counts": np.array([[2.0], [0.0], [3.0]]),
        "blk.0.attn_q.weight.counts": np.array([[8.0]]),
        "blk.0.attn_q.weight.in_sum2": np.array([[8.0, 16.0, 4.0]]),
        "other": np.zeros(3),
    }
    found = from_tensors(tensors)
    assert found["blk.0.ffn_up_exps.weight"].tolist() == [1.0, 2.0, 1.0, 1.0, 3.0, 1.0]
    assert found["blk.0.attn_q.weight"].tolist() == [1.0, 2.0, 0.5]
    assert len(found) == 2


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"w.in_sum2": np.ones((1, 4))}, "has w.in_sum2 and no w.counts"),
        ({"w.counts": np.ones((1, 1))}, "has w.counts and no w.in_sum2"),
        ({"w.in_sum2": np.ones((2, 3)), "w.counts": np.ones((4, 1))}, "6 sums and 4 counts for w"),
        ({"w.in_sum2": np.ones((0, 3)), "w.counts": np.ones((0, 1))}, "0 sums and 0 counts"),
        ({"w.in_sum2": np.full((1, 3), np.inf), "w.counts": np.ones((1, 1))}, "NaN or infinity for w"),
        ({"token_embd.weight": np.ones(3)}, "no .in_sum2 tensors"),
    ],
)
def test_damaged_matrices(tensors: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        from_tensors(tensors)


def test_the_values_of_one_weight() -> None:
    matrix = {"w": np.arange(6, dtype=np.float32)}
    assert for_tensor(matrix, "absent", 6) is None
    found = for_tensor(matrix, "w", 3, matrices=2)
    assert found is not None
    assert found.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    with pytest.raises(CheckpointError, match="6 values for w, which needs 12"):
        for_tensor(matrix, "w", 4, matrices=3)
