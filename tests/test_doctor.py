"""`doctor`: what it finds is what there is, on this machine and on ones that lack something."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from lacking import lacking as lacking

import adapterkit
from adapterkit.cli import app
from adapterkit.errors import NotFound, OutputError
from adapterkit.verbs import doctor as module
from adapterkit.verbs.doctor import _kind, doctor

FEW = 1 << 20


def test_it_tells_what_is_installed_and_leaves_nothing(tmp_path: Path) -> None:
    from importlib.metadata import version

    import torch

    found = doctor(tmp_path, tried=FEW)
    versions = {one.name: one.version for one in found.packages}
    assert versions["torch"] == torch.__version__
    assert versions["click"] == version("click")
    assert found.ok
    assert found.version == adapterkit.__version__
    assert 1 <= found.machine.cores <= len(os.sched_getaffinity(0))  # a quota may allow fewer
    assert found.machine.torch == "cpu" if torch.version.cuda is None else found.machine.torch.startswith("cuda")
    assert os.listdir(tmp_path) == []
    assert found.disk.write > 0
    assert found.disk.free <= os.statvfs(tmp_path).f_bfree * os.statvfs(tmp_path).f_frsize
    assert {extra.name for extra in found.extras} >= {"gguf", "demo", "sign"}


def test_what_is_missing_comes_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "adapterkit.packages.Package.installed", lambda self: "" if self.name in ("numba", "regex") else "9999"
    )
    shown = CliRunner().invoke(app, ["doctor", str(tmp_path)], standalone_mode=False)
    assert shown.return_value == 3
    assert "regex            missing (needs 2024.4.16 or later)" in shown.output
    assert "without numba. It adds: quantized GGUF files as a base" in shown.output
    assert "pip install 'adapterkit[gguf]'" in shown.output
    assert "by torch, which is slower" in shown.output
    assert "note: regex is not installed: pip install regex" in shown.output


def test_json_has_the_same(tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["doctor", str(tmp_path), "--json"], standalone_mode=False)
    told = json.loads(shown.output)
    assert told["ok"] is True
    assert told["disk"]["folder"] == str(tmp_path)
    assert [row["name"] for row in told["packages"]][:2] == ["click", "huggingface-hub"]


@pytest.mark.parametrize(
    ("what", "field"), [("copy_file_range", "copy_in_kernel"), ("link", "hard_links"), ("flock", "locks")]
)
def test_a_file_system_that_lacks_something(
    lacking: Callable[[str], None], tmp_path: Path, what: str, field: str
) -> None:
    assert getattr(doctor(tmp_path, tried=FEW).disk, field) is True
    lacking(what)
    assert getattr(doctor(tmp_path, tried=FEW).disk, field) is False


def test_folders_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFound, match="there is no folder"):
        doctor(tmp_path / "nothing", tried=FEW)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(OutputError, match=r"cannot be written to \(Read-only file system\)"):
        doctor(tmp_path, tried=FEW)


def test_the_build_with_cuda_on_a_machine_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_torch", lambda: ("cuda 12.8", ()))
    (told,) = doctor(tmp_path, tried=FEW).notes
    assert "finds no GPU here" in told
    assert "--index-url https://download.pytorch.org/whl/cpu" in told


def test_the_kind_of_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "mounts"
    place = str(tmp_path.resolve()).replace(" ", "\\040")
    table.write_text(f"1 0 8:1 / / rw - ext4 /dev/a rw\n2 1 8:2 / {place} rw shared:1 - xfs /dev/b rw\n")
    monkeypatch.setattr(module, "_MOUNTS", table)
    assert _kind(tmp_path / "x") == "xfs"
    assert _kind(Path("/")) == "ext4"
