"""The public names, in whichever order they are first used."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import adapterkit

VERBS = ["merge", "check", "inspect", "execute", "plan_merge", "open", "save", "load_adapter", "fold", "convert"]


@pytest.mark.parametrize("first", VERBS)
def test_using_one_verb_leaves_the_others(first: str) -> None:
    """Importing the modules of the verbs must not hide the functions."""
    code = f"import adapterkit as a; a.{first}; import adapterkit.verbs.merge, adapterkit.verbs.check, "
    code += "adapterkit.verbs.verify, adapterkit.verbs.inspect, adapterkit.verbs.convert; "
    code += f"assert all(callable(getattr(a, name)) for name in {VERBS}), vars(a)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=900)


def declared() -> dict[str, tuple[str, str]]:
    """What type checkers are told: public name to module and name, from the imports that only they see."""
    tree = ast.parse(Path(adapterkit.__file__).read_text())
    (block,) = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    return {
        alias.asname or alias.name: (node.module or "", alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if (alias.asname or alias.name) in adapterkit.__all__
    }


def test_every_public_name_is_what_type_checkers_are_told() -> None:
    assert set(declared()) | {"__version__"} == set(adapterkit.__all__)
    for name, (module, own) in declared().items():
        assert getattr(adapterkit, name) is getattr(import_module(module), own), name


def test_names_are_there_before_they_are_used() -> None:
    code = "import adapterkit; print(*dir(adapterkit)); assert 'merge' not in vars(adapterkit)"
    shown = subprocess.run([sys.executable, "-c", code], check=True, timeout=900, capture_output=True, text=True).stdout
    assert set(shown.split()) >= {"merge", "verify", "build", "open", "MergeReport", "__version__"}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = adapterkit.nothing
