"""The public names, in whichever order they are first used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import adapterkit

VERBS = ["merge", "check", "inspect", "execute", "plan_merge", "open", "save", "load_adapter", "fold", "convert"]


@pytest.mark.parametrize("first", VERBS)
def test_using_one_verb_leaves_the_others(first: str) -> None:
    """Importing the modules of the verbs must not hide the functions."""
    code = f"import adapterkit as a; a.{first}; import adapterkit.verbs.merge, adapterkit.verbs.check, "
    code += "adapterkit.verbs.verify, adapterkit.verbs.inspect, adapterkit.verbs.convert; "
    code += f"assert all(callable(getattr(a, name)) for name in {VERBS}), vars(a)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_public_name_is_there() -> None:
    assert all(hasattr(adapterkit, name) for name in adapterkit.__all__)
    assert set(dir(adapterkit)) == set(adapterkit.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = adapterkit.nothing
