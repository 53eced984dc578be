"""A registry whose disk fails while it is made: whole, or finished by whoever comes next; bundles end where they end."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from adapterkit.errors import OutputError, RegistryError, UnsafeError
from adapterkit.registry.bundle import export_bundle, import_bundle
from adapterkit.registry.fsck import fsck
from adapterkit.registry.register import register


@pytest.mark.parametrize("call", ["fsync", "link", "mkdir", "replace"])
def test_every_call_fails_once(
    call: str, inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    real = getattr(os, call)
    for nth in range(1, 60):
        shutil.rmtree(home, ignore_errors=True)
        seen = 0

        def fails(*args: Any, **more: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == nth:  # noqa: B023
                raise OSError(5, "Input/output error")
            return real(*args, **more)

        with monkeypatch.context() as patched:
            patched.setattr(os, call, fails)
            try:
                register(inputs[1], "x", home=home)
            except OutputError:
                pass
        if seen < nth:
            assert nth > 1
            return
        assert fsck(home=home).problems == (), nth
        assert list((home / "staging").glob("*")) + list((home / "incoming").glob("*")) == []
        register(inputs[1], "x", home=home)
        assert fsck(home=home).problems == (), nth
    raise AssertionError("it never ended")


@pytest.mark.parametrize("tail", [b"x", bytes(512), b"\0" * 100_000])
def test_a_bundle_with_something_behind_its_end(
    tail: bytes, inputs: tuple[Path, Path], tmp_path: Path, home: Path
) -> None:
    register(inputs[1], "x")
    export_bundle(("x",), tmp_path / "good")
    data = (tmp_path / "good").read_bytes()
    (tmp_path / "bad").write_bytes(data + tail)
    with pytest.raises(RegistryError, match="goes on after its end"):
        import_bundle(tmp_path / "bad", home=tmp_path / "other")
    (tmp_path / "short").write_bytes(data[:-512])
    with pytest.raises(RegistryError):
        import_bundle(tmp_path / "short", home=tmp_path / "other")
    assert list((tmp_path / "other" / "records").iterdir()) == []
    assert import_bundle(tmp_path / "good", home=tmp_path / "other").versions


def test_a_bundle_that_is_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnsafeError, match="is a pipe"):
        import_bundle(tmp_path / "pipe", home=tmp_path / "home")


def test_what_is_registered_is_a_file(tmp_path: Path, home: Path, inputs: tuple[Path, Path]) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(inputs[1], folder)
    (folder / "README.md").unlink(missing_ok=True)
    os.mkfifo(folder / "README.md")
    try:
        register(folder, "x")
    except UnsafeError as error:
        assert "README.md" in str(error)  # noqa: PT017
