"""lighteval: ``results_*.json`` (lighteval/logging/evaluation_tracker.py)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adapterkit.foreign import is_whole
from adapterkit.registry.evaluation import Score
from adapterkit.results import count, is_number, number, spread

NAME = "lighteval"


def fits(value: Any) -> bool:
    """Results by task, and a general config."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("config_general"), dict)
        and isinstance(value.get("results"), dict)
        and all(isinstance(one, dict) for one in value["results"].values())
    )


def measured(value: Any, path: Path, task: str) -> Iterator[Score]:
    """Every metric of every task; a name ends with the number of examples, as ``leaderboard|arc:challenge|25``."""
    tasks = value.get("config_tasks") or {}
    versions = value.get("versions") or {}
    for name, figures in value["results"].items():
        if name == "all":  # the mean of everything, whatever that was
            continue
        front, bar, shots = name.rpartition("|")
        plain = front if bar and is_whole(shots) else name
        config = tasks.get(name) or tasks.get(plain) or {}
        said = {"num_fewshot": int(shots) if bar and is_whole(shots) else None, "task_version": versions.get(name)}
        settings = {key: item for key, item in said.items() if isinstance(item, (int, str))}
        for metric, figure in figures.items():
            if metric.endswith("_stderr") or not is_number(figure):
                continue
            yield Score(
                plain,
                metric,
                number(figure, f"{name}/{metric}"),
                spread(figures.get(f"{metric}_stderr")),
                count(config.get("effective_num_docs")) if isinstance(config, dict) else 0,
                tool="lighteval",
                settings=settings,
            )
