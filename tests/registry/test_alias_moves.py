"""Moves of aliases: who and why, rollback, what servers serve; one line each, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapterkit.errors import CheckFailed, NotFound, RegistryError, UnsafeError, UsageError
from adapterkit.registry import fsck, refs, register, served, verbs
from adapterkit.registry.home import Home


@pytest.fixture
def three(home: Path, make) -> Path:  # type: ignore[no-untyped-def]
    for number in range(3):
        register.register(make(content=b"weights %d" % number), "math")
    return home


def test_a_move_says_who_and_why(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTERKIT_USER", "ada")
    verbs.tag("math@1", "prod", why="first release")
    verbs.tag("math@2", "prod", by="grace")
    one, two = verbs.history("math", "prod")
    assert (one.by, one.why, one.version) == ("ada", "first release", 1)
    assert (two.by, two.why, two.version) == ("grace", "", 2)
    assert verbs.alias_now("math", "prod") == two
    assert verbs.alias_before("math", "prod") == one
    assert fsck.fsck().clean
    with pytest.raises(UsageError, match="not one printable line"):
        verbs.tag("math@3", "prod", why="a\nb")
    assert len(verbs.history("math", "prod")) == 2


def test_lines_of_an_older_registry_read_as_before(three: Path) -> None:
    """A move that states nobody has the line it always had, byte for byte."""
    step = refs.Move("math", "prod", 1, 1, "a" * 64, "2026-01-31T23:59:59Z", "")
    assert set(refs.parse(step.line, "x")) == {"name", "alias", "seq", "version", "digest", "at", "prev", "sum"}
    assert refs.read_move(step.line, "math", "prod", "x") == step


def test_rollbacks_go_back_step_by_step(three: Path) -> None:
    for version in (1, 2, 3):
        verbs.tag(f"math@{version}", "prod")
    assert verbs.rollback("math", "prod", why="it answers in Latin").version == 2
    assert verbs.rollback("math", "prod").version == 1
    with pytest.raises(NotFound, match="never anywhere else"):
        verbs.rollback("math", "prod")
    verbs.tag("math@3", "prod")
    assert verbs.rollback("math", "prod").version == 1
    moves = verbs.history("math", "prod")
    assert [(move.version, move.undoes) for move in moves] == [(1, 0), (2, 0), (3, 0), (2, 3), (1, 2), (3, 0), (1, 6)]
    assert moves[3].why == "it answers in Latin"
    assert fsck.fsck().clean


def test_a_rollback_of_an_alias_that_came_back_to_where_it_was(three: Path) -> None:
    """Taken off and set to the same version again: a rollback goes to the version before it, and does not stay."""
    for version in (1, 2):
        verbs.tag(f"math@{version}", "prod")
    verbs.untag("math", "prod")
    verbs.tag("math@2", "prod")
    found = verbs.rollback("math", "prod")
    assert (found.version, found.moved) == (1, True)
    with pytest.raises(NotFound, match="never anywhere else"):
        verbs.rollback("math", "prod")


def test_a_rollback_is_refused_when_the_alias_left_and_came_back_meanwhile(
    three: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The version is the one that was expected, and the way back from there is another one."""
    for version in (1, 3):
        verbs.tag(f"math@{version}", "prod")
    read = refs.history

    def others_move(home: Home, name: str, alias: str) -> tuple[refs.Move, ...]:
        found = read(home, name, alias)
        for version in (2, 3):
            verbs.tag(f"math@{version}", "prod")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(refs, "history", others_move)
        with pytest.raises(CheckFailed, match="moved meanwhile"):
            verbs.rollback("math", "prod")
    assert [move.version for move in verbs.history("math", "prod")] == [1, 3, 2, 3]
    assert verbs.rollback("math", "prod").version == 2


def test_a_rollback_after_an_alias_was_taken_off(three: Path) -> None:
    verbs.tag("math@1", "prod")
    verbs.untag("math", "prod")
    assert verbs.rollback("math", "prod").version == 1
    verbs.untag("math", "prod")
    verbs.tag("math@2", "prod")
    assert verbs.rollback("math", "prod").version == 1


def test_a_rollback_to_what_was_removed_is_refused(three: Path) -> None:
    verbs.tag("math@1", "prod")
    verbs.tag("math@2", "prod")
    verbs.remove("math@1")
    with pytest.raises(CheckFailed, match="math@1, where math@prod was before, was removed"):
        verbs.rollback("math", "prod")
    assert verbs.alias_now("math", "prod").version == 2  # type: ignore[union-attr]


def test_a_gate_that_refuses_moves_nothing(three: Path) -> None:
    def gate(now: refs.Move | None) -> list[str]:
        if now is not None:
            raise CheckFailed(f"not while it is at {now.version}")
        return ["acc 0.7 >= 0.6"]

    def move(version: int) -> refs.Tagged:
        return refs.move(Home(three), "math", "prod", version, verbs.show(f"math@{version}").record.digest, gate=gate)

    assert move(1).held == ("acc 0.7 >= 0.6",)
    before = (three / "history" / "math" / "prod").read_bytes()
    with pytest.raises(CheckFailed, match="not while it is at 1"):
        move(2)
    assert (three / "history" / "math" / "prod").read_bytes() == before
    assert verbs.history("math", "prod")[0].held == ("acc 0.7 >= 0.6",)


def test_what_a_server_serves(three: Path) -> None:
    one, two = verbs.show("math@1").record, verbs.show("math@2").record
    url = "http://127.0.0.1:8000/"
    first = served.record_serving(url, one, served_as="math@1", alias="prod", by="ada", since="2026-01-31T23:59:59Z")
    assert served.record_serving(url, one, served_as="math@1", alias="prod") == first  # nothing new, since stays
    served.record_serving("gpu-3", two, served_as="math", share=0.1)
    assert [(one.server, one.version, one.share) for one in served.serving()] == [
        ("gpu-3", 2, 0.1),
        ("http://127.0.0.1:8000", 1, 1.0),
    ]
    assert served.at_alias(served.serving(), "math", "prod") == (first,)
    assert served.record_stopped(url, "math@1", why="moved").state == "stopped"  # type: ignore[union-attr]
    assert served.record_stopped(url, "math@1") is None
    assert [one.server for one in served.serving()] == ["gpu-3"]
    assert [one.state for one in served.served_history(url)] == ["serving", "stopped"]
    assert fsck.fsck().clean


def test_a_server_is_named_without_credentials(three: Path) -> None:
    record = verbs.show("math@1").record
    with pytest.raises(UnsafeError, match="credentials"):
        served.record_serving("http://me:pw@host:8000", record, served_as="x")
    with pytest.raises(UsageError, match="is not a server"):
        served.record_serving("a\nb", record, served_as="x")


def test_a_damaged_chain_is_found(three: Path) -> None:
    served.record_serving("gpu-3", verbs.show("math@1").record, served_as="math")
    (path,) = (Home(three).root / "served").iterdir()
    path.write_bytes(path.read_bytes().replace(b'"version":1', b'"version":2'))
    with pytest.raises(RegistryError, match="does not have the sum"):
        served.serving()
    assert [problem.kind for problem in fsck.fsck().problems] == ["served"]
