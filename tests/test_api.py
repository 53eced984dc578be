"""The public names, and that a bare import costs nothing."""

from __future__ import annotations

import subprocess
import sys

import adapterkit


def test_public_names_are_sorted_and_there() -> None:
    assert adapterkit.__all__ == sorted(adapterkit.__all__)
    for name in adapterkit.__all__:
        assert getattr(adapterkit, name) is not None


def test_import_is_light() -> None:
    script = "import adapterkit, sys; print(sorted({'torch', 'numpy', 'click', 'huggingface_hub'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"
