"""Files that are read: the descriptor is closed with the object, at the end of Python too."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from adapterkit.checkpoint import files


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_file_is_closed_though_its_module_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"x")
    found = files.LocalFile(tmp_path / "a")
    number = found.fd
    monkeypatch.setattr(files, "os", None)
    del found
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
