"""What moved between two stored results."""

from __future__ import annotations

from typing import Any

import pytest

from tools import bench_compare as tool


def result(**cells: float) -> dict[str, Any]:
    heads = ["", *cells]
    return {"figures": {"memory_mb": 100}, "tables": {"main": {"heads": heads, "rows": [["ours", *cells.values()]]}}}


def test_only_what_moved_and_which_of_it_is_a_ratio() -> None:
    before, after = result(seconds=2.0, **{"over cp": 1.0}, same=3.0), result(seconds=1.0, **{"over cp": 1.2}, same=3.0)
    found = {one.figure: one for one in tool.compare(before, after, "merge")}
    assert set(found) == {"main: ours, seconds", "main: ours, over cp"}
    assert found["main: ours, over cp"].ratio
    assert found["main: ours, over cp"].change == pytest.approx(0.2)
    assert not found["main: ours, seconds"].ratio
    assert tool.compare(before, {"figures": {"new": 1}, "tables": {}}, "merge") == []


@pytest.mark.parametrize(("after", "code"), [(1.05, 0), (1.2, 1), (0.5, 0)])
def test_a_ratio_that_is_worse_fails(
    after: float, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    import json

    (tmp_path / "bench/results").mkdir(parents=True)
    (tmp_path / "bench/results/merge.json").write_text(json.dumps(result(**{"over cp": after})))
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(tool, "git", lambda *words: json.dumps(result(**{"over cp": 1.0})))
    monkeypatch.setattr("sys.argv", ["bench_compare.py", "v1"])
    assert tool.main() == code
    assert ("worse: merge, main: ours, over cp" in capsys.readouterr().out) is bool(code)
