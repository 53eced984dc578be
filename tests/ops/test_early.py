"""torch's library is in memory before torch is imported, and nothing is said where it cannot be."""

import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from adapterkit.ops import early

CHILD = """
import sys
from adapterkit.ops.early import map_torch
map_torch().join()
assert "torch" not in sys.modules
print("libtorch_cpu.so" in open("/proc/self/maps").read())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the library has another name elsewhere")
def test_the_library_is_mapped_without_the_module() -> None:
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_nothing_is_done_where_torch_is_there_or_nowhere_or_may_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", early)
    assert early.map_torch() is None
    monkeypatch.delitem(sys.modules, "torch")
    with monkeypatch.context() as limited:
        limited.setattr(early, "_limited", lambda: True)
        assert early.map_torch() is None
    monkeypatch.setattr(early, "find_spec", lambda name: None)
    assert early.map_torch() is None


def test_a_library_that_cannot_be_linked_is_torch_s_to_speak_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    spec = ModuleSpec("torch", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(early, "find_spec", lambda name: spec)
    monkeypatch.setattr(early, "_limited", lambda: False)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert early.map_torch() is None
    (tmp_path / "lib").mkdir()
    tmp_path.joinpath(*early.LIBRARY).write_text("no library")
    thread = early.map_torch()
    assert thread is not None
    thread.join()
    assert capfd.readouterr() == ("", "")
