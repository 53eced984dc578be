"""inspect-ai: a log in JSON (``inspect eval --log-format json``, or ``inspect log dump``; inspect_ai/log/_log.py)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adapterkit.errors import CheckFailed
from adapterkit.registry.evaluation import Score
from adapterkit.results import count, is_number, number, spread, utc

NAME = "inspect-ai"


def fits(value: Any) -> bool:
    """A status and what was evaluated."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("eval"), dict)
        and "task" in value["eval"]
        and isinstance(value.get("status"), str)
    )


def measured(value: Any, path: Path, task: str) -> Iterator[Score]:
    """Every metric of every scorer; the metric ``stderr`` is the standard error of the others."""
    if value["status"] != "success":
        raise CheckFailed(f"the run in {path} ended with '{value['status']}'", "give the log of a run that finished")
    about = value["eval"]
    results = value.get("results") or {}
    packages = about.get("packages") if isinstance(about.get("packages"), dict) else {}
    when = utc((value.get("stats") or {}).get("completed_at")) or utc(about.get("created"))
    version = about.get("task_version")
    settings = {"task_version": version} if isinstance(version, (int, str)) else {}
    for score in results.get("scores") or ():
        metrics = {
            name: one.get("value") for name, one in (score.get("metrics") or {}).items() if isinstance(one, dict)
        }
        error = spread(metrics.get("stderr"))
        several = len(results["scores"]) > 1
        for name, figure in metrics.items():
            if name in ("stderr", "std", "var") or not is_number(figure):
                continue
            yield Score(
                str(about["task"]),
                f"{name}:{score.get('name')}" if several else name,
                number(figure, f"{about['task']}/{name}"),
                error,
                count(results.get("completed_samples")) or count(results.get("total_samples")),
                when=when,
                tool="inspect-ai",
                tool_version=str(packages.get("inspect_ai") or ""),
                settings=settings,
            )
