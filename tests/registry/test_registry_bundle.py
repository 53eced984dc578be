"""Bundles: whole, reproducible, and nothing hostile gets in."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from adapterkit.errors import AdapterkitError, NotFound, OutputError, RegistryError, UnsafeError
from adapterkit.registry import bundle, fsck, listing, register, verbs
from adapterkit.registry.home import Home
from adapterkit.registry.identity import Identity
from adapterkit.registry.lineage import lineage, tree_text
from adapterkit.registry.record import Operation, Parent


@pytest.fixture
def packed(home: Path, make: Any, tmp_path: Path) -> Path:
    base = Identity("org/base", "b" * 40)
    register.register_base(base, "base")
    one = register.register(make("a", b"a"), "lora", base=base).record
    register.register(make("a2", b"unrelated"), "lora", base=base)
    parents = [Parent("adapter", one.content, record=one.digest, parameters={"weight": 0.5})]
    register.register(make("m", b"m" * 3000), "chat", kind="merged", operation=Operation("merge"), parents=parents)
    verbs.tag("chat@1", "prod")
    found = bundle.export_bundle(("chat@prod",), tmp_path / "chat.tar")
    assert found.refs == ("base@1", "chat@1", "lora@1")
    return tmp_path / "chat.tar"


def test_a_bundle_carries_versions_ancestors_and_bytes_to_another_home(
    packed: Path, tmp_path: Path, home: Path
) -> None:
    other = tmp_path / "other"
    found = bundle.import_bundle(packed, aliases=True, home=other)
    assert [new for _, _, new in found.versions] == [True] * 3
    assert found.aliases == ("chat@prod",)
    assert verbs.show("chat@prod", home=other).record == verbs.show("chat@prod").record
    assert verbs.show("chat", home=other).missing == ()
    assert tree_text(lineage("chat", home=other)) == tree_text(lineage("chat"))
    assert fsck.fsck(home=other).clean
    again = bundle.import_bundle(packed, aliases=True, home=other)
    assert [new for _, _, new in again.versions] == [False] * 3
    assert (again.stored, again.aliases) == (0, ())


def test_the_same_versions_give_the_same_bytes_which_tar_can_read(packed: Path, tmp_path: Path) -> None:
    bundle.export_bundle(("chat",), tmp_path / "again.tar")
    assert (tmp_path / "again.tar").read_bytes() == packed.read_bytes()
    with tarfile.open(packed) as found:
        names = found.getnames()
        assert names[0] == "bundle.json"
        assert all(member.isreg() and member.mode == 0o444 for member in found)
        head = json.load(found.extractfile("bundle.json"))  # type: ignore[arg-type]
    assert len(names) == 1 + len(head["records"]) + len(head["blobs"])
    with pytest.raises(OutputError):
        bundle.export_bundle(("chat",), packed)


def test_a_version_arrives_under_the_next_number_and_keeps_its_lineage(packed: Path, tmp_path: Path, make: Any) -> None:
    other = tmp_path / "other"
    register.register(make("x", b"x"), "chat", home=other)
    verbs.tag("chat@1", "prod", home=other)
    found = bundle.import_bundle(packed, aliases=True, home=other)
    assert ("chat@1", "chat@2", True) in found.versions
    assert found.aliases == ()
    assert verbs.show("chat@prod", home=other).record.version == 1
    assert "lora@1" in tree_text(lineage("chat@2", home=other))


def test_without_parents_only_what_was_asked_for_is_packed(packed: Path, tmp_path: Path) -> None:
    assert bundle.export_bundle(("chat",), tmp_path / "one.tar", parents=False).refs == ("chat@1",)


def test_what_is_not_here_cannot_be_packed(packed: Path, tmp_path: Path, home: Path) -> None:
    record = verbs.show("chat").record
    Home(home).blob(record.files[1].sha256).unlink()
    with pytest.raises(NotFound):
        bundle.export_bundle(("chat",), tmp_path / "x.tar")
    with pytest.raises(NotFound):
        bundle.import_bundle(tmp_path / "nothing.tar")


def test_a_rotten_blob_is_never_packed(packed: Path, tmp_path: Path, home: Path) -> None:
    blob = Home(home).blob(verbs.show("chat").record.files[1].sha256)
    blob.chmod(0o644)
    blob.write_bytes(b"X" + blob.read_bytes()[1:])
    with pytest.raises(RegistryError, match="damaged"):
        bundle.export_bundle(("chat",), tmp_path / "x.tar")
    assert not (tmp_path / "x.tar").exists()


def refused(path: Path, home: Path, error: type[AdapterkitError] = AdapterkitError) -> None:
    """A bundle that is refused leaves no record behind, and a home that fsck calls clean."""
    with pytest.raises(error) as caught:
        bundle.import_bundle(path, aliases=True, home=home)
    assert "\n" not in str(caught.value)
    assert listing.listing(home=home).rows == ()
    assert fsck.fsck(home=home).clean


def test_damaged_bundles_are_refused_whole(packed: Path, tmp_path: Path) -> None:
    good = packed.read_bytes()
    bad = tmp_path / "bad.tar"
    padding = {place for place, byte in enumerate(good) if not byte}
    for number, place in enumerate(range(0, len(good) - 1024, 389)):
        bad.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        if place not in padding:
            refused(bad, tmp_path / f"other-{number}")
    for size in (0, 100, 512, 1000, len(good) // 2, len(good) - 2000):
        bad.write_bytes(good[:size])
        refused(bad, tmp_path / f"short-{size}", RegistryError)


def repacked(packed: Path, to: Path, change: Any) -> Path:
    """The members of a bundle after ``change`` rewrote their list, packed by the standard library."""
    with tarfile.open(packed) as source:
        members = [(member, source.extractfile(member).read()) for member in source]  # type: ignore[union-attr]
    with tarfile.open(to, "w", format=tarfile.GNU_FORMAT) as target:
        for member, data in change(members):
            member.size = len(data) if member.isreg() else 0
            target.addfile(member, io.BytesIO(data))
    return to


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize(
    "bad",
    [
        member("../../etc/cron.d/x"),
        member("/etc/passwd"),
        member("objects/../../x"),
        member("objects/" + "A" * 64),
        member("records/x.json"),
        member("objects/" + "a" * 64, tarfile.SYMTYPE, "/etc/passwd"),
        member("objects/" + "a" * 64, tarfile.LNKTYPE, "bundle.json"),
        member("objects/" + "a" * 64, tarfile.CHRTYPE),
        member("objects/" + "a" * 64, tarfile.FIFOTYPE),
        member("objects", tarfile.DIRTYPE),
        member("x" * 300),
    ],
    ids=lambda info: f"{info.name[:20]}-{info.type!r}",
)
@pytest.mark.parametrize("first", [True, False])
def test_hostile_members_are_refused(packed: Path, tmp_path: Path, bad: tarfile.TarInfo, first: bool) -> None:
    path = repacked(packed, tmp_path / "bad.tar", lambda rows: [(bad, b"x"), *rows] if first else [*rows, (bad, b"x")])
    refused(path, tmp_path / "other", UnsafeError)
    assert not (tmp_path / "etc").exists()


def test_other_orders_doubles_and_lies_are_refused(packed: Path, tmp_path: Path) -> None:
    def head_with(**changes: Any) -> Any:
        def change(rows: list[tuple[tarfile.TarInfo, bytes]]) -> list[tuple[tarfile.TarInfo, bytes]]:
            head = {**json.loads(rows[0][1]), **changes}
            head.pop("sum")
            seal = hashlib.sha256(json.dumps(head, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
            return [(rows[0][0], json.dumps({**head, "sum": seal}).encode()), *rows[1:]]

        return change

    changes = [
        lambda rows: rows[1:],
        lambda rows: rows[:-1],
        lambda rows: [*rows, rows[-1]],
        lambda rows: [rows[0], rows[2], rows[1], *rows[3:]],
        lambda rows: [*rows[:-1], (rows[-1][0], b"other bytes")],
        lambda rows: [rows[0], (rows[1][0], rows[2][1]), *rows[2:]],
        head_with(format=2),
        head_with(format="1"),
        head_with(type="x"),
        head_with(records=None),
        head_with(blobs=[]),
        head_with(blobs=[{"sha256": "../x", "size": 1}]),
        head_with(blobs=[{"sha256": "a" * 64, "size": -1}]),
        head_with(blobs=[{"sha256": "a" * 64, "size": 1 << 60}]),
        head_with(records=[{"digest": "a" * 64, "aliases": ["../x"]}]),
    ]
    for number, change in enumerate(changes):
        refused(repacked(packed, tmp_path / f"{number}.tar", change), tmp_path / f"home-{number}")


def test_random_bytes_are_no_bundle(tmp_path: Path) -> None:
    for size in (10, 512, 5000):
        (tmp_path / "x.tar").write_bytes(os.urandom(size))
        refused(tmp_path / "x.tar", tmp_path / "home")
