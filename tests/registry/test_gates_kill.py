"""Writers of evidence and aliases, killed for real. The full-size run is ``python -m bench proofs gates_kill``."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapterkit.registry import policies, verbs
from bench.proofs import gates_kill


def test_writers_that_are_killed_lose_nothing(tmp_path: Path) -> None:
    found = gates_kill.run(tmp_path / "home", writers=6, each=4, kills=8, seed=1, pause=0.05)
    assert found["killed"] >= 3
    assert found["figures"] >= 24
    assert found["moves"] >= 1


def test_the_proof_would_notice(tmp_path: Path) -> None:
    home = gates_kill.filled(tmp_path / "home")
    with pytest.raises(AssertionError, match="figures that were acknowledged are gone"):
        gates_kill.checked(home, [["figure", "1", "never-added"]])
    with pytest.raises(AssertionError, match="moves that were acknowledged are gone"):
        gates_kill.checked(home, [["move", "1", "never-made"]])
    policies.keep_policy("model", "prod", "", home=tmp_path / "home")
    verbs.tag("model@2", "prod", home=tmp_path / "home")
    with pytest.raises(AssertionError, match="past its policy"):
        gates_kill.checked(home, [])
