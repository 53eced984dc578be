"""lm-evaluation-harness: ``results_*.json`` of ``--output_path`` (lm_eval/loggers/evaluation_tracker.py)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adapterkit.registry.evaluation import Score
from adapterkit.results import count, is_number, number, spread, utc

NAME = "lm-evaluation-harness"


def fits(value: Any) -> bool:
    """Results by task, and the configs and versions of the tasks."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("results"), dict)
        and ("configs" in value or "n-shot" in value or "lm_eval_version" in value)
        and all(isinstance(one, dict) for one in value["results"].values())
    )


def measured(value: Any, path: Path, task: str) -> Iterator[Score]:
    """Every ``metric,filter`` of every task; its standard error stands beside it as ``metric_stderr,filter``."""
    shots, counts = value.get("n-shot") or {}, value.get("n-samples") or {}
    hashes, versions = value.get("task_hashes") or {}, value.get("versions") or {}
    config = value.get("config") if isinstance(value.get("config"), dict) else {}
    when, version = utc(value.get("date")), str(value.get("lm_eval_version") or "")
    for name, figures in value["results"].items():
        said = {
            "num_fewshot": shots.get(name),
            "task_version": versions.get(name),
            "task_hash": hashes.get(name),
        }
        settings = {key: item for key, item in said.items() if isinstance(item, (int, float, str))}
        # That there was no limit or no template is said too: only what both figures state is held against each other.
        if "limit" in config and (config["limit"] is None or is_number(config["limit"])):
            settings["limit"] = config["limit"]
        if "chat_template_sha" in value:
            settings["chat_template"] = bool(value["chat_template_sha"])
        samples = counts.get(name)
        effective = samples.get("effective") if isinstance(samples, dict) else None
        for key, figure in figures.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not is_number(figure):
                continue
            yield Score(
                name,
                metric if kind == "none" else f"{metric}:{kind}",
                number(figure, f"{name}/{metric}"),
                spread(figures.get(f"{metric}_stderr,{kind}")),
                count(effective) or count(figures.get("sample_len")),
                when=when,
                tool="lm-eval",
                tool_version=version,
                settings=settings,
            )
