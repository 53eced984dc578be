"""A build that is killed, or whose disk fails, at any name that it gives: the next plain build goes on, and replaces nothing
that is not its own."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from children import fork, wait

from adapterkit.disk import calls
from adapterkit.errors import OutputError
from adapterkit.recipe import run
from adapterkit.recipe.report import UNCHANGED
from adapterkit.recipe.run import build

RECIPE = """\
base = "base"

[adapters]
style = "style"

[outputs.merged]
path = "made/merged"
verify = {level = "tensors", html = "made/page.html"}

[outputs.half]
path = "made/half"
dtype = "f16"

[outputs.small]
path = "made/small.gguf"
mmproj = "tower.gguf"
for = "llama.cpp"
"""
NAMES = ("rename_new", "replace", "rename", "exchange")
KILLED = 77


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the example, with a vision tower."""
    import gguf
    import numpy as np

    root = tmp_path_factory.mktemp("cut-off") / "inputs"
    script = Path(__file__).parents[2] / "examples/recipe/make_inputs.py"
    subprocess.run([sys.executable, str(script), str(root)], check=True, timeout=900)
    writer = gguf.GGUFWriter(root / "tower.gguf", "clip")
    writer.add_tensor("v.w", np.ones((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (root / "adapterkit.toml").write_text(RECIPE)
    return root


@pytest.fixture
def recipe(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADAPTERKIT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    return Path(shutil.copytree(inputs, tmp_path / "work")) / "adapterkit.toml"


def made(recipe: Path) -> dict[str, bytes]:
    """Everything that lies where the outputs go, hidden or not."""
    folder = recipe.parent / "made"
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: b"" if name == "page.html" else path.read_bytes() for name, path in found.items()}  # it says how long


def counted(work: Callable[[], object], nth: int, act: Callable[[], object]) -> int:
    """Do ``work``, and ``act`` before the nth name that is given or taken; how many there were."""
    seen = 0

    def watched(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == nth:
                act()
            return real(*args, **more)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in NAMES:
            where: Any = calls if name in ("rename_new", "exchange") else os
            patch.setattr(where, name, watched(getattr(where, name)))
        work()
    return seen


def fail() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def cut_off(recipe: Path, nth: int, act: Callable[[], object]) -> int:
    return wait(fork(lambda: counted(lambda: build(recipe, jobs=1), nth, act)))


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True], ids=["first", "replaced"])
def test_a_build_goes_on_after_a_kill_at_any_name(again: bool, recipe: Path) -> None:
    """``again``: outputs of another adapter's scale lie there, which this recipe made."""
    good = recipe.read_text()
    other = good.replace('style = "style"', 'style = {ref = "style", weight = 0.5}')
    steps = counted(lambda: build(recipe, jobs=1), 0, fail)
    right = made(recipe)
    assert steps > 10
    for nth in range(1, steps + 1):
        if again:
            shutil.rmtree(recipe.parent / "made")
            recipe.write_text(other)
            build(recipe, jobs=1)
            recipe.write_text(good)
        else:
            for name in ("made", ".adapterkit"):
                shutil.rmtree(recipe.parent / name, ignore_errors=True)
        code = cut_off(recipe, nth, (lambda: os._exit(KILLED)) if nth % 3 else fail)
        assert code in (KILLED, OutputError.exit_code, 0), nth
        build(recipe, jobs=1)
        assert made(recipe) == right, nth
        assert {row.state for row in build(recipe, jobs=1).outputs} == {UNCHANGED}, nth


def test_what_was_coming_is_taken_up_and_nothing_else(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, and a state that says what would have come, are no reason to replace a file."""
    build(recipe, jobs=1)
    right = made(recipe)
    folder = recipe.parent / "made"
    beside = ("small.gguf.llama-server.sh", "small.gguf.adapterkit.json", "tower.gguf")
    others = ("merged/model.safetensors", "merged/mine.txt", "half/config.json", "small.gguf", *beside)
    for name, step in (("", "merged"), ("", "small"), *((one, "") for one in others)):
        for gone in (folder, recipe.parent / ".adapterkit"):
            shutil.rmtree(gone)
        step = step or ("small" if "small" in name or "tower" in name else "merged")
        real = run._Build._note_made

        def stops(self: Any, one: Any, *args: Any, step: str = step, real: Any = real) -> Any:
            if one.name == step:
                raise KeyboardInterrupt
            return real(self, one, *args)

        # Everything of the step has its name, and that is not noted.
        with monkeypatch.context() as patch:
            patch.setattr(run._Build, "_note_made", stops)
            with pytest.raises(KeyboardInterrupt):
                build(recipe, jobs=1)
        if not name:
            build(recipe, jobs=1)
            assert made(recipe) == right
            continue
        (folder / name).write_bytes(b"mine")
        with pytest.raises(OutputError, match="exists"):
            build(recipe, jobs=1)
        assert (folder / name).read_bytes() == b"mine"
    build(recipe, jobs=1, force=True)
    assert set(made(recipe)) == set(right)
