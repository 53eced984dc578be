"""`gc --uploads FOLDER`: every name that a run can leave on a disk goes when it is old, and nothing else does."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from models import plain_adapter, plain_base, read_bytes

import adapterkit
from adapterkit.cli import main
from adapterkit.disk import partial_folder, staging


def gc(where: Path, *more: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["gc", "--uploads", str(where), *more])
    return int(ended.value.code or 0)


def test_every_name_that_a_run_leaves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def swept(where: Path, *more: str) -> dict[str, list[str]]:
        capsys.readouterr()
        assert gc(where, "--json", *more) == 0
        found = json.loads(capsys.readouterr().out)
        return {name: [Path(path).name for path in found[name]] for name in ("left", "kept")}

    base = plain_base(tmp_path / "base", shards=2)
    adapter, place = plain_adapter(tmp_path / "adapter", base), tmp_path / "place"
    place.mkdir()

    def interrupt(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    for name in ("whole", "parts"):
        with pytest.raises(KeyboardInterrupt):
            adapterkit.merge(base, adapter, place / name, resume=True, progress=interrupt)
    adapterkit.merge(base, adapter, save_plan=tmp_path / "plan.json")
    adapterkit.run(tmp_path / "plan.json", place / "parts", task=0, tasks=2)
    adapterkit.merge(base, adapter, place / "out")
    before = read_bytes(place / "out")
    # Killed while one output took the place of another: the old one lies aside.
    aside = place / ".out.replaced"
    aside.mkdir()
    aside.chmod(0o1755)
    (place / "out").rename(aside / "old")
    (place / f".config.json.{'a' * 16}.part").write_text("{")
    (place / f".{'b' * 24}").mkdir()
    lent = [
        place / ".adapterkit-imatrix-abcd1234",
        place / "sub" / "adapterkit-ab_d1234",
        place / "adapterkit-verify-abcd1234",
    ]
    for folder in lent:
        folder.mkdir(parents=True)
        folder.chmod(0o700)  # as tempfile makes them
        (folder / "x").write_text("")
    files = [f".config.json.{'a' * 16}.part", f".{'b' * 24}", *(one.name for one in lent)]
    ours = sorted([".whole.partial", ".parts.partial", aside.name, *files])
    # Of others: no mark of ours, something in it, another name.
    (place / ".theirs.partial").mkdir()
    (place / ".theirs.partial" / "x").write_text("")
    (place / f".{'c' * 24}").mkdir()
    (place / f".{'c' * 24}" / "x").write_text("")
    (place / "adapterkit-notes.txt").write_text("")
    for name, mode in (
        ("adapterkit-examples", 0o700),
        ("adapterkit-model_v2", 0o755),
    ):  # eight characters after the dash
        (place / name).mkdir()
        (place / name).chmod(mode)
        (place / name / "x").write_text("")
    (place / ".x.part").write_text("")
    assert swept(place) == {"left": [], "kept": []}  # young
    assert sorted(swept(place, "--keep-days", "0")["left"]) == ours
    with staging(place / "whole", resume=True):  # somebody is at it
        assert ".whole.partial" not in swept(place, "--keep-days", "0")["left"]
    assert swept(place / "whole", "--keep-days", "0")["left"] == [".whole.partial"]  # of one output
    old = time.time() - 3 * 86400
    os.utime(place / f".{'b' * 24}", (old, old))
    assert swept(place)["left"] == [f".{'b' * 24}"]
    assert sorted(swept(place, "--keep-days", "0", "--apply")["left"]) == ours
    assert read_bytes(place / "out") == before
    left = sorted(path.name for path in place.iterdir())
    theirs = ["adapterkit-examples", "adapterkit-model_v2", "adapterkit-notes.txt"]
    assert left == [f".{'c' * 24}", ".theirs.partial", ".x.part", *theirs, "out", "sub"]
    assert not partial_folder(place / "whole").exists()
    assert gc(place / "nothing") == 7
    assert "nothing does not exist; give a folder, an output, or an address" in capsys.readouterr().err


def test_below_a_folder_that_cannot_be_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As homes of users lie below one that is open for passing through alone; of a long name, ours repeat the beginning."""
    out = tmp_path / "above" / ("out" * 80)
    for lost in (partial_folder(out), partial_folder(out / "inner")):
        lost.mkdir(parents=True)
        lost.chmod(0o1755)
    listed, scanned = os.listdir, os.scandir

    def check(path: object) -> None:
        if str(path) == str(out.parent):
            raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", lambda path=".": (check(path), listed(path))[1])
    monkeypatch.setattr(os, "scandir", lambda path=".": (check(path), scanned(path))[1])
    assert gc(out, "--keep-days", "0", "--json") == 0
    left = json.loads(capsys.readouterr().out)["left"]
    assert left == sorted(map(str, (partial_folder(out), partial_folder(out / "inner"))))


@pytest.mark.parametrize("name", ["out" * 80, "ü" * 120])
def test_an_output_of_a_long_name_is_put_back_under_it(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ours repeats the beginning of the name alone, so it does not say what the output was called."""
    aside = partial_folder(tmp_path / name).with_suffix(".replaced")
    (aside / "old").mkdir(parents=True)
    aside.chmod(0o1755)
    (aside / "old" / "weights").write_text("w")
    assert gc(tmp_path, "--keep-days", "0", "--apply", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["left"] == found["kept"] == [str(aside)]
    assert gc(tmp_path / name, "--keep-days", "0", "--apply") == 0
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name / "weights").read_text() == "w"
