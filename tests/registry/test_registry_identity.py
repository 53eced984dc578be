"""Base identities: the Merkle root against RFC 6962's own recursive definition, and what two identities prove."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterkit.errors import CheckpointError, RegistryError
from adapterkit.registry.canonical import canonical, canonical_row
from adapterkit.registry.identity import (
    PROBED,
    VERDICTS,
    Identity,
    Read,
    Tensor,
    compare,
    identify,
    merkle_root,
    probed,
    sample_digest,
    tensor_digests,
    windows,
)

Weights = dict[str, tuple[str, tuple[int, ...], bytes]]


def weights(seed: int = 0, layers: int = 3, width: int = 64) -> Weights:
    rng = random.Random(seed)
    return {
        f"layers.{n}.{part}.weight": ("F16", (width, width), rng.randbytes(width * width * 2))
        for n in range(layers)
        for part in ("q", "k", "v")
    }


def opened(found: Weights, order: Sequence[str] | None = None) -> tuple[list[Tensor], Read]:
    tensors = [(name, found[name][0], found[name][1], len(found[name][2])) for name in order or found]
    return tensors, lambda name, offset, length: found[name][2][offset : offset + length]


def rfc6962(leaves: list[bytes]) -> bytes:
    """Merkle Tree Hash of RFC 6962, section 2.1, as written there."""
    if len(leaves) == 1:
        return hashlib.sha256(b"\0" + leaves[0]).digest()
    split = 1
    while split * 2 < len(leaves):
        split *= 2
    return hashlib.sha256(b"\1" + rfc6962(leaves[:split]) + rfc6962(leaves[split:])).digest()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 13, 64, 65])
def test_the_merkle_root_is_that_of_rfc_6962(count: int) -> None:
    rows = [(f"t{n:03}", "F32", (n, 2), hashlib.sha256(b"%d" % n).hexdigest()) for n in range(count)]
    leaves = [json.dumps([n, d, list(s), h], separators=(",", ":")).encode() for n, d, s, h in rows]
    shuffled = random.Random(1).sample(rows, count)
    assert merkle_root(shuffled) == rfc6962(leaves).hex()


@given(st.text(), st.sampled_from(("BF16", "F8_E4M3")), st.lists(st.integers(0, 1 << 60)))
def test_a_row_is_spelled_as_every_json_value_is(name: str, dtype: str, shape: list[int]) -> None:
    assert canonical_row(name, dtype, shape, "0f") == canonical([name, dtype, shape, "0f"])
    assert canonical_row("\ud800", shape) == canonical(["\ud800", shape])  # a name that is no Unicode has one too


@given(st.integers(0, 200_000))
def test_windows_stay_inside_and_reach_both_ends(nbytes: int) -> None:
    found = windows(nbytes)
    assert sum(length for _, length in found) == min(nbytes, 16384)
    assert all(offset >= 0 and offset + length <= nbytes for offset, length in found)
    if found:
        assert found[0][0] == 0
        assert found[-1][0] + found[-1][1] == nbytes
    assert all(a[0] + a[1] <= b[0] or nbytes <= 16384 for a, b in itertools.pairwise(found))


def test_an_identity_does_not_depend_on_the_order_of_tensors() -> None:
    found = weights()
    one = identify(*opened(found))
    assert one == identify(*opened(found, sorted(found, reverse=True)))
    assert set(one.known) == {"shapes", "skeleton", "probe", "sampled", "merkle"}


def test_every_byte_counts_for_the_root_and_the_sampled_ones_for_the_sample() -> None:
    found = weights(width=128)
    one = identify(*opened(found))
    dtype, shape, data = found["layers.1.k.weight"]
    for at, sampled in ((0, True), (len(data) - 1, True), (5000, False)):
        changed = bytearray(data)
        changed[at] ^= 1
        other = identify(*opened({**found, "layers.1.k.weight": (dtype, shape, bytes(changed))}))
        assert other.merkle != one.merkle
        assert other.skeleton == one.skeleton
        assert (other.sampled != one.sampled) is sampled


def test_siblings_are_told_apart_by_a_few_kilobytes() -> None:
    read_bytes = 0

    def counted(read: Read) -> Read:
        def inner(name: str, offset: int, length: int) -> bytes:
            nonlocal read_bytes
            read_bytes += length
            return read(name, offset, length)

        return inner

    names = [f"layers.{n}.weight" for n in range(300)]
    instruct = {name: ("BF16", (1 << 16,), random.Random(n).randbytes(1 << 17)) for n, name in enumerate(names)}
    base = {name: ("BF16", (1 << 16,), random.Random(-n - 1).randbytes(1 << 17)) for n, name in enumerate(names)}
    tensors, read = opened(instruct)
    mine = identify(tensors, read, "sampled")
    tensors, read = opened(base)
    other = identify(tensors, counted(read), "probe")
    found = compare(mine, other, "org/x-instruct", "org/x")
    assert (found.verdict, found.level, found.fits) == ("other", "probe", False)
    assert found.sentence.endswith("this was made on org/x-instruct, and this is org/x")
    assert read_bytes == PROBED * 16384


def test_the_probe_takes_32_tensors_spread_over_all() -> None:
    tensors = [(f"t{n:04}", "F16", (1,), 2) for n in range(1000)]
    taken = [int(row[0][1:]) for row in probed(tensors)]
    assert len(taken) == 32
    assert taken[-1] == 999
    assert max(b - a for a, b in itertools.pairwise([0, *taken])) <= 32


FULL = identify(*opened(weights()), known=Identity("org/base", "a" * 40, (("m.safetensors", "b" * 64),)))
OTHER_WEIGHTS = identify(*opened(weights(1)), known=Identity("org/sibling", "c" * 40, (("m.safetensors", "d" * 64),)))
OTHER_SHAPES = identify(*opened(weights(0, 4)))
OTHER_DTYPE = identify(*opened({name: ("BF16", shape, data) for name, (_, shape, data) in weights().items()}))


def only(identity: Identity, *levels: str) -> Identity:
    fields = [("id" if level == "commit" else level) for level in levels] + (["commit"] if "commit" in levels else [])
    return Identity(**{field: getattr(identity, field) for field in fields})


CASES = [
    # both sides, what they share, verdict, deciding level
    (FULL, FULL, ("commit", "files", "shapes", "skeleton", "probe", "sampled", "merkle"), "same", "merkle"),
    (FULL, FULL, ("files",), "same", "files"),
    (FULL, FULL, ("commit",), "same", "commit"),
    (FULL, FULL, ("skeleton", "sampled"), "likely", "sampled"),
    (FULL, FULL, ("skeleton", "probe"), "likely", "probe"),
    (FULL, FULL, ("skeleton",), "shapes", "skeleton"),
    (FULL, FULL, ("shapes",), "shapes", "shapes"),
    (FULL, FULL, (), "unknown", ""),
    (FULL, OTHER_WEIGHTS, ("commit", "files", "shapes", "skeleton", "probe", "sampled", "merkle"), "other", "merkle"),
    (FULL, OTHER_WEIGHTS, ("skeleton", "sampled"), "other", "sampled"),
    (FULL, OTHER_WEIGHTS, ("skeleton", "probe"), "other", "probe"),
    (FULL, OTHER_WEIGHTS, ("sampled",), "unknown", ""),  # Bytes differ, but perhaps only in dtype.
    (FULL, OTHER_WEIGHTS, ("skeleton",), "shapes", "skeleton"),
    (FULL, OTHER_WEIGHTS, ("commit",), "unknown", ""),  # Another commit may hold the same weights.
    (FULL, OTHER_WEIGHTS, ("files",), "unknown", ""),  # So may other files: resharded, or with other metadata.
    (FULL, OTHER_SHAPES, ("shapes", "skeleton", "merkle"), "misfit", "shapes"),
    (FULL, OTHER_SHAPES, ("skeleton",), "unknown", ""),
    (FULL, OTHER_DTYPE, ("shapes", "skeleton", "sampled", "merkle"), "dtype", "skeleton"),
]


@pytest.mark.parametrize(("mine", "other", "levels", "verdict", "level"), CASES)
def test_a_comparison_claims_what_the_shared_levels_prove(
    mine: Identity, other: Identity, levels: tuple[str, ...], verdict: str, level: str
) -> None:
    for one, two in ((only(mine, *levels), other), (mine, only(other, *levels)), (only(other, *levels), mine)):
        found = compare(one, two)
        assert (found.verdict, found.level) == (verdict, level)
        assert set(found.agree) | set(found.differ) <= set(levels)
        assert found.sentence.startswith(VERDICTS[verdict])


def test_weights_on_disk_are_believed_over_the_commit_they_claim() -> None:
    changed = replace(OTHER_SHAPES, id=FULL.id, commit=FULL.commit)
    assert compare(only(FULL, "commit", "shapes"), changed).verdict == "misfit"
    changed = replace(OTHER_WEIGHTS, id=FULL.id, commit=FULL.commit)
    assert compare(FULL, changed).verdict == "other"


def test_a_renamed_or_resharded_mirror_is_the_same() -> None:
    mirror = Identity("mirror/base", "e" * 40, (("other-name.safetensors", "b" * 64),))
    assert compare(only(FULL, "commit", "files"), mirror).level == "files"
    resharded = replace(FULL, files=(("1.safetensors", "1" * 64), ("2.safetensors", "2" * 64)), id="", commit="")
    assert compare(FULL, resharded).verdict == "same"


def test_short_reads_double_names_and_no_tensors_are_errors() -> None:
    tensors, read = opened(weights())
    with pytest.raises(CheckpointError, match="offset"):
        sample_digest(tensors, lambda name, offset, length: read(name, offset, length)[:-1])
    with pytest.raises(CheckpointError, match="offset"):
        list(tensor_digests(tensors, lambda name, offset, length: b""))
    with pytest.raises(CheckpointError, match="twice"):
        identify([*tensors, tensors[0]])
    with pytest.raises(CheckpointError, match="without tensors"):
        identify([])
    with pytest.raises(RegistryError):
        identify(tensors, read, "commit")
