"""Results files of harnesses: what is read out of each, and what is refused by name."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adapterkit.errors import AdapterkitError, CheckFailed, NotFound, UsageError
from adapterkit.registry.evaluation import Score
from adapterkit.results import harnesses, read_results

# As lm-eval 0.4.13 writes it, without what nobody reads here.
LM_EVAL = {
    "results": {
        "colours": {"alias": "colours", "sample_len": 6, "acc,none": 0.8333, "acc_stderr,none": 0.1667},
        "gsm": {
            "alias": "gsm",
            "exact_match,strict": 0.5,
            "exact_match_stderr,strict": "N/A",
            "exact_match,flexible": 0.6,
        },
    },
    "configs": {"colours": {"task": "colours"}},
    "versions": {"colours": "Yaml", "gsm": 3.0},
    "n-shot": {"colours": 0, "gsm": 5},
    "n-samples": {"colours": {"original": 6, "effective": 6}, "gsm": {"original": 1319, "effective": 100}},
    "config": {"model": "hf", "model_args": {"pretrained": "/somewhere/base"}, "limit": 100.0},
    "date": 1795868520.59,
    "lm_eval_version": "0.4.13",
}
INSPECT: dict[str, Any] = {
    "version": 2,
    "status": "success",
    "eval": {
        "task": "tickets",
        "task_version": 1,
        "created": "2026-05-02T10:00:00+02:00",
        "packages": {"inspect_ai": "0.3"},
    },
    "results": {
        "total_samples": 40,
        "completed_samples": 39,
        "scores": [
            {
                "name": "match",
                "metrics": {
                    "accuracy": {"name": "accuracy", "value": 0.75},
                    "stderr": {"name": "stderr", "value": 0.07},
                },
            }
        ],
    },
}
LIGHTEVAL = {
    "config_general": {"lighteval_sha": "abc"},
    "results": {"leaderboard|arc:challenge|25": {"acc": 0.5, "acc_stderr": 0.05}, "all": {"acc": 0.5}},
    "versions": {"leaderboard|arc:challenge|25": 0},
    "config_tasks": {"leaderboard|arc:challenge": {"effective_num_docs": 100}},
}
HELM = [
    {"name": {"name": "exact_match", "split": "test"}, "count": 1, "sum": 0.4, "mean": 0.4},
    {"name": {"name": "num_instances", "split": "test"}, "count": 1, "sum": 50, "mean": 50},
    {"name": {"name": "exact_match", "split": "test", "perturbation": {"name": "typos"}}, "count": 1, "mean": 0.3},
    {"name": {"name": "never", "split": "test"}, "count": 0},
]


def written(path: Path, value: object) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def plain(found: tuple[Score, ...]) -> dict[str, tuple[float, float | None, int]]:
    return {one.label: (one.value, one.stderr, one.n) for one in found}


def test_lm_eval(tmp_path: Path) -> None:
    found = read_results(written(tmp_path / "results.json", LM_EVAL))
    assert plain(found) == {
        "colours/acc": (0.8333, 0.1667, 6),
        "gsm/exact_match:strict": (0.5, None, 100),
        "gsm/exact_match:flexible": (0.6, None, 100),
    }
    colours, gsm, _ = found
    assert (colours.tool, colours.tool_version, colours.when) == ("lm-eval", "0.4.13", "2026-11-28T12:22:00Z")
    assert dict(gsm.settings) == {"num_fewshot": 5, "task_version": 3.0, "limit": 100.0}
    whole = {**LM_EVAL, "config": {"limit": None}, "chat_template_sha": "ab12"}  # the harness puts the template's here
    assert read_results(written(tmp_path / "all.json", whole))[1].settings["limit"] is None
    assert read_results(written(tmp_path / "all.json", whole))[1].settings["chat_template"] is True
    assert "/somewhere" not in json.dumps([one.to_json() for one in found])  # no path of a machine is kept
    assert len(colours.source) == 64


def test_inspect_ai(tmp_path: Path) -> None:
    (one,) = read_results(written(tmp_path / "log.json", INSPECT))
    assert (one.label, one.value, one.stderr, one.n, one.when) == (
        "tickets/accuracy",
        0.75,
        0.07,
        39,
        "2026-05-02T08:00:00Z",
    )
    with pytest.raises(CheckFailed, match="ended with 'cancelled'"):
        read_results(written(tmp_path / "log.json", {**INSPECT, "status": "cancelled"}))


def test_lighteval(tmp_path: Path) -> None:
    (one,) = read_results(written(tmp_path / "results.json", LIGHTEVAL))
    assert (one.task, one.metric, one.value, one.stderr, one.n) == ("leaderboard|arc:challenge", "acc", 0.5, 0.05, 100)
    assert dict(one.settings) == {"num_fewshot": 25, "task_version": 0}


def test_helm(tmp_path: Path) -> None:
    written(tmp_path / "run" / "run_spec.json", {"name": "tickets:model=x"})
    found = read_results(written(tmp_path / "run" / "stats.json", HELM))
    assert plain(found) == {
        "tickets[test]/exact_match": (0.4, None, 50),
        "tickets[test,typos]/exact_match": (0.3, None, 0),
    }


def test_a_table(tmp_path: Path) -> None:
    found = read_results(written(tmp_path / "tickets.json", {"acc": 0.71, "acc_stderr": 0.02, "n": 500, "loss": 1}))
    assert plain(found) == {"tickets/acc": (0.71, 0.02, 500), "tickets/loss": (1.0, None, 500)}
    words = {
        "task": "mail",
        "date": "2026-01-31",
        "n": 500,
        "metrics": {"acc": 0.71},
        "slices": {"lang=de": {"n": 120, "acc": 0.66}},
    }
    found = read_results(written(tmp_path / "x.json", words), subject="base")
    assert plain(found) == {"mail/acc": (0.71, None, 500), "mail[lang=de]/acc": (0.66, None, 120)}
    assert [one.key for one in found] == ["base:mail/acc", "base:mail[lang=de]/acc"]
    assert found[0].when == "2026-01-31T00:00:00Z"
    assert read_results(written(tmp_path / "y.json", {"acc": 1}), task="mine")[0].task == "mine"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([], "a list and not an object"),
        ("text", "a str and not an object"),
        ({}, "an object with nothing in it"),
        ({"results": {"acc": 1}}, "an object with results"),
        ({"loss": "low"}, "an object with loss"),
        ({"acc": True}, "an object with acc"),
        ({"log_history": [], "epoch": 3.0}, "an object with log_history, epoch"),
        ({"metrics": {"acc": 1}, "else": 2}, "an object with metrics, else"),
        ({"n": 5}, "an object with n"),
    ],
)
def test_other_shapes_are_refused_by_name(tmp_path: Path, value: object, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        read_results(written(tmp_path / "x.json", value))
    assert said in refused.value.message
    assert "lm-evaluation-harness" in refused.value.hint


def test_figures_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match="acc is nan"):
        read_results(written(tmp_path / "x.json", {"acc": float("nan")}))
    with pytest.raises(UsageError, match="not JSON"):
        (tmp_path / "x.json").write_bytes(b"PK\x03\x04\xff")
        read_results(tmp_path / "x.json")
    with pytest.raises(NotFound):
        read_results(tmp_path / "nothing.json")
    with pytest.raises(UsageError, match="holds no figure"):
        read_results(written(tmp_path / "x.json", {"results": {}, "n-shot": {}}))
    with pytest.raises(AdapterkitError, match="without brackets"):
        read_results(written(tmp_path / "x.json", {"task": "a\nb", "metrics": {"acc": 1}}))


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in plain JSON but the whole."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield (*at, key)
        yield from places(item, (*at, key))


TABLE = {"task": "t", "n": 3, "metrics": {"acc": 0.5, "acc_stderr": 0.1}, "slices": {"de": {"acc": 0.4}}}


@pytest.mark.parametrize("whole", [LM_EVAL, INSPECT, LIGHTEVAL, HELM, TABLE], ids=lambda value: str(value)[:12])
def test_any_value_of_another_shape_is_read_or_refused(tmp_path: Path, whole: Any) -> None:
    whole = {**whole, "stats": {"completed_at": "2026-01-31"}} if whole is INSPECT else whole
    refused = 0
    for place in places(whole):
        for odd in (None, True, -1, 10**400, float("inf"), "", "\ud800", [], [1], {}, {"a": [1]}):
            value = copy.deepcopy(whole)
            inner = value
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = odd
            try:
                read_results(written(tmp_path / "run" / "x.json", value))
            except AdapterkitError:
                refused += 1
    assert refused


@pytest.mark.parametrize(
    ("whole", "change"),
    [
        (LM_EVAL, {"n-shot": [1]}),
        (INSPECT, {"results": [1]}),
        (INSPECT, {"stats": "x"}),
        (LIGHTEVAL, {"config_tasks": ["x"]}),
        (TABLE, {"slices": [1]}),
        (TABLE, {"metrics": {"acc": 10**400}}),
    ],
)
def test_a_part_of_another_shape_is_named_with_the_file(tmp_path: Path, whole: Any, change: Any) -> None:
    with pytest.raises(UsageError, match=r"x\.json (looks like a file of .* another shape|is not JSON)"):
        read_results(written(tmp_path / "x.json", {**whole, **change}))


def test_every_harness_is_found() -> None:
    assert [one.NAME for one in harnesses()] == [
        *("HELM", "inspect-ai", "lighteval", "lm-evaluation-harness"),
        "a table {metric: value}",
    ]
