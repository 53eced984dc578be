"""HELM: ``stats.json`` of a run, with ``run_spec.json`` beside it (helm/benchmark/metrics/statistic.py)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adapterkit.foreign import json_value
from adapterkit.registry.evaluation import Score
from adapterkit.results import is_number, number, spread

NAME = "HELM"


def fits(value: Any) -> bool:
    """A list of statistics."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(one, dict) and isinstance(one.get("name"), dict) and "name" in one["name"] and "count" in one
            for one in value
        )
    )


def measured(value: Any, path: Path, task: str) -> Iterator[Score]:
    """The mean of every statistic; splits and perturbations are slices."""
    task = _task(path) or task
    counts = {_slice(one["name"]): one.get("mean") for one in value if one["name"]["name"] == "num_instances"}
    for one in value:
        name = str(one["name"]["name"])
        if name == "num_instances" or not one["count"] or not is_number(one.get("mean")):
            continue
        part = _slice(one["name"])
        n = counts.get(part)
        yield Score(
            task,
            name,
            number(one["mean"], f"{task}/{name}"),
            spread(None),
            int(n) if is_number(n) and n is not None else 0,
            part,
            tool="HELM",
        )


def _slice(name: dict[str, Any]) -> str:
    changed = name.get("perturbation")
    parts = [str(name.get("split") or ""), str(name.get("sub_split") or "")]
    parts += [str(changed.get("name"))] if isinstance(changed, dict) else []
    return ",".join(part for part in parts if part).replace("[", "(").replace("]", ")")


def _task(path: Path) -> str:
    spec = path.with_name("run_spec.json")
    try:
        found = json_value(spec.read_bytes())["name"]
    except (OSError, ValueError, KeyError, TypeError):
        found = ""
    return str(found).partition(":")[0]
