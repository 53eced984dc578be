"""A table of one's own: ``{"acc": 0.71, "acc_stderr": 0.02, "n": 500}``, or with words about it:

{"task": "tickets", "date": "2026-01-31", "tool": "ours", "n": 500,
 "metrics": {"acc": 0.71}, "slices": {"lang=de": {"n": 120, "acc": 0.66}}}
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adapterkit.registry.evaluation import Score
from adapterkit.results import count, is_number, number, spread, utc

NAME = "a table {metric: value}"
_WORDS = {"task", "date", "tool", "tool_version", "n", "metrics", "slices", "settings"}


def fits(value: Any) -> bool:
    """Numbers by name, or ``metrics`` and ``slices`` that hold some, and nothing else."""
    if not isinstance(value, dict):
        return False
    tables = [value.get("metrics", {})]
    tables += list(value["slices"].values()) if isinstance(value.get("slices"), dict) else []
    if "metrics" not in value and "slices" not in value:
        tables.append({key: item for key, item in value.items() if key not in _WORDS})
    elif not value.keys() <= _WORDS:
        return False
    return (
        any(isinstance(table, dict) and table for table in tables)
        and all(isinstance(table, dict) and all(map(is_number, table.values())) for table in tables)
        and all(isinstance(value.get(key, ""), str) for key in ("task", "date", "tool", "tool_version"))
        and isinstance(value.get("settings", {}), dict)
    )


def measured(value: Any, path: Path, task: str) -> Iterator[Score]:
    """Every metric, for all samples and for each slice."""
    whole = value.get("metrics")
    if whole is None and "slices" not in value:
        whole = {key: item for key, item in value.items() if key not in _WORDS}
    tables = {"": {"n": value.get("n"), **(whole or {})}, **value.get("slices", {})}
    for part, table in tables.items():
        for metric, figure in table.items():
            if metric == "n" or (metric.endswith("_stderr") and metric.removesuffix("_stderr") in table):
                continue
            yield Score(
                value.get("task") or task,
                metric,
                number(figure, metric),
                spread(table.get(f"{metric}_stderr")),
                count(table.get("n")),
                part,
                when=utc(value.get("date")),
                tool=value.get("tool") or "table",
                tool_version=value.get("tool_version", ""),
                settings=value.get("settings", {}),
            )
