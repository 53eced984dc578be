"""GGUF headers with damage, and gguf's own reading of a file as something that can be compared."""

from __future__ import annotations

import random
import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

EXTREMES = (0, 1, 2, 7, 31, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def mutants(data: bytes, header: int, count: int, seed: int = 0) -> Iterator[bytes]:
    """``count`` damaged copies of a file whose header is ``header`` bytes long."""
    rng = random.Random(seed)
    for _ in range(count):
        found = bytearray(data)
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            _damage(found, header, rng)
        yield bytes(found)


def _damage(data: bytearray, header: int, rng: random.Random) -> None:
    at = rng.randrange(max(min(header, len(data) - 9), 1))
    kind = rng.randrange(7)
    if kind == 0:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        data[at] = rng.randrange(256)
    elif kind == 2:
        struct.pack_into("<Q", data, at, rng.choice(EXTREMES))
    elif kind == 3:
        struct.pack_into("<I", data, at, rng.choice(EXTREMES) & 0xFFFFFFFF)
    elif kind == 4:
        del data[at:]
        data.extend(b"\0" * max(0, 16 - len(data)))
    elif kind == 5:
        other = rng.randrange(header)
        size = rng.randrange(1, 64)
        data[at : at + size] = data[other : other + size]
    else:
        data[at:at] = rng.randbytes(rng.randrange(1, 9))


def as_gguf_reads(path: Path) -> dict[str, Any]:
    """Metadata and tensors by the package's reader: bytes of values, and for tensors type, shape and place."""
    import gguf

    reader = gguf.GGUFReader(path)
    values = {
        name: b"".join(part.tobytes() for part in field.parts[3:])
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    tensors = {
        t.name: (int(t.tensor_type), tuple(reversed(t.shape.tolist())), t.data_offset, t.n_bytes)
        for t in reader.tensors
    }
    return {"values": values, "tensors": tensors}


def as_we_read(header: Any) -> dict[str, Any]:
    values = {name: header.raw[entry.value : entry.stop] for name, entry in header.keys.items()}
    tensors = {t.name: (t.type.id, t.shape, t.start, t.nbytes) for t in header.tensors.values()}
    return {"values": values, "tensors": tensors}
