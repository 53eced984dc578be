"""What a plan says of values in local files: other ones are another file, and the same ones on another machine are the same."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from models import plain_adapter, plain_base, read_bytes

import adapterkit
from adapterkit.checkpoint import values
from adapterkit.checkpoint.files import LocalFile, fingerprint
from adapterkit.checkpoint.plan import Plan
from adapterkit.checkpoint.values import is_planned, known_by
from adapterkit.errors import CheckpointError
from adapterkit.verbs.execute import OpenPlan


def a_file(path: Path, nbytes: int, flipped: int | None = None, trained: bool = False) -> LocalFile:
    """A file with a header of two bytes."""
    data = bytearray((2).to_bytes(8, "little") + b"{}" + bytes(nbytes - 10))
    if flipped is not None:
        data[flipped] ^= 1
    path.write_bytes(data)
    found = LocalFile(path)
    found.trained = trained
    return found


def test_an_adapter_is_known_by_every_byte_and_a_base_by_pieces(tmp_path: Path) -> None:
    size = 64 * values.PIECE
    between = values.PIECE + 10  # behind the first of the pieces
    for trained, seen in ((True, True), (False, False)):
        one = a_file(tmp_path / "one", size, trained=trained)
        other = a_file(tmp_path / "other", size, between, trained)
        assert fingerprint(one) == fingerprint(other)
        assert (known_by(one) != known_by(other)) is seen
        assert is_planned(other, known_by(one)) is not seen
        assert is_planned(LocalFile(tmp_path / "other"), known_by(other))  # whoever opens it knows not what it is
        last = a_file(tmp_path / "last", size, size - 1, trained)
        assert not is_planned(last, known_by(one))
        assert known_by(one, known_by(one)) == known_by(one)
    small = [a_file(tmp_path / f"small{at}", 16 * values.PIECE, at) for at in (None, between)]
    assert known_by(small[0]) != known_by(small[1])
    (tmp_path / "last").write_bytes(b"another")
    with pytest.raises(CheckpointError, match="last changed"):
        known_by(last)


@pytest.mark.parametrize("what", ["adapter", "base"])
def test_another_copy_under_the_same_headers_is_refused_by_its_name(what: str, tmp_path: Path) -> None:
    """Of two machines one has a model that was trained further. Nothing was done there yet that would tell."""
    base = plain_base(tmp_path / "base", shards=2)
    adapter = plain_adapter(tmp_path / "adapter", base, seed=1)
    adapterkit.merge(base, adapter, tmp_path / "whole")
    adapterkit.merge(base, adapter, save_plan=tmp_path / "plan.json")
    plan = Plan.from_json((tmp_path / "plan.json").read_bytes())
    shutil.copytree(tmp_path / what, tmp_path / "kept")
    if what == "adapter":
        plain_adapter(adapter, base, seed=2)
        shutil.copy(tmp_path / "kept" / "adapter_config.json", adapter)
    else:
        for file in base.glob("*.safetensors"):
            data = file.read_bytes()
            start = 8 + int.from_bytes(data[:8], "little")
            file.write_bytes(data[:start] + bytes(byte ^ 1 for byte in data[start:]))
    for door in (
        lambda: OpenPlan(plan, tmp_path / "out").execute(0),
        lambda: adapterkit.execute(plan, tmp_path / "out"),
    ):
        with pytest.raises(CheckpointError, match=rf"{what}/.*\.safetensors changed since the plan was made"):
            door()
    shutil.rmtree(tmp_path / what)
    shutil.copytree(tmp_path / "kept", tmp_path / what)  # the same values: times and inodes are of this copy
    for part in range(len(plan.files)):
        OpenPlan(plan, tmp_path / "out").execute(part)
    adapterkit.execute(plan, tmp_path / "out")
    assert read_bytes(tmp_path / "out") == read_bytes(tmp_path / "whole")
