"""Findings as GitHub's annotations and as SARIF; the rules of both forms stand here as their documents give them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from models import edit_config, plain_adapter, plain_base

from adapterkit.cli import main
from adapterkit.cli.annotate import LIMIT, append_summary
from adapterkit.lint.problems import Problem, github, line_of_key, sarif, summary, text

# The part of the SARIF 2.1.0 schema (OASIS, sections 3.13 to 3.32) that a log of ours may use, closed at every level.
TEXT = {"type": "object", "properties": {"text": {"type": "string", "minLength": 1}}, "required": ["text"]}
LEVEL = {"enum": ["none", "note", "warning", "error"]}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["$schema", "version", "runs"],
    "additionalProperties": False,
    "properties": {
        "$schema": {"type": "string", "pattern": "^https://.*sarif-schema-2.1.0.json$"},
        "version": {"const": "2.1.0"},
        "runs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["tool", "results"],
                "additionalProperties": False,
                "properties": {
                    "columnKind": {"enum": ["utf16CodeUnits", "unicodeCodePoints"]},
                    "originalUriBaseIds": {"type": "object"},
                    "tool": {
                        "type": "object",
                        "required": ["driver"],
                        "additionalProperties": False,
                        "properties": {
                            "driver": {
                                "type": "object",
                                "required": ["name"],
                                "additionalProperties": False,
                                "properties": {
                                    "name": {"type": "string"},
                                    "semanticVersion": {"type": "string"},
                                    "rules": {
                                        "type": "array",
                                        "uniqueItems": True,
                                        "items": {
                                            "type": "object",
                                            "required": ["id"],
                                            "additionalProperties": False,
                                            "properties": {
                                                "id": {"type": "string"},
                                                "name": {"type": "string", "pattern": "^\\w+$"},
                                                "shortDescription": TEXT,
                                                "defaultConfiguration": {"properties": {"level": LEVEL}},
                                            },
                                        },
                                    },
                                },
                            }
                        },
                    },
                    "results": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "required": ["message"],
                            "additionalProperties": False,
                            "properties": {
                                "ruleId": {"type": "string"},
                                "ruleIndex": {"type": "integer", "minimum": 0},
                                "level": LEVEL,
                                "message": TEXT,
                                "partialFingerprints": {"additionalProperties": {"type": "string"}},
                                "locations": {
                                    "type": "array",
                                    "items": {
                                        "type": "object",
                                        "additionalProperties": False,
                                        "properties": {
                                            "physicalLocation": {
                                                "type": "object",
                                                "required": ["artifactLocation"],
                                                "additionalProperties": False,
                                                "properties": {
                                                    "artifactLocation": {
                                                        "type": "object",
                                                        "properties": {
                                                            "uri": {
                                                                "type": "string",
                                                                "pattern": "^[^ \\\\%]*(%[0-9A-F]{2}[^ ]*)*$",
                                                            },
                                                            "uriBaseId": {"type": "string"},
                                                        },
                                                    },
                                                    "region": {"properties": {"startLine": {"minimum": 1}}},
                                                },
                                            }
                                        },
                                    },
                                },
                            },
                        },
                    },
                },
            },
        },
    },
}

PROBLEMS = [
    Problem("error", "local-base", "a path\nof 100%", "do: this, or that", "a b/c,d:e.json", 3),
    Problem("note", "x_y", "no place"),
    Problem("warning", "local-base", "whole file", file="/abs/ä.json"),
]


def test_annotations_escape_what_the_runner_would_read() -> None:
    assert github(PROBLEMS[0]) == (
        "::error file=a b/c%2Cd%3Ae.json,line=3,title=adapterkit%3A local-base::a path%0Aof 100%25; do: this, or that"
    )
    assert github(PROBLEMS[1]) == "::notice title=adapterkit%3A x_y::no place"


def test_lines_for_readers() -> None:
    assert text(PROBLEMS[2]) == "/abs/ä.json: warning: whole file [local-base]"


def test_sarif() -> None:
    log = sarif(PROBLEMS, {"local-base": "Bases have names."})
    jsonschema.validate(log, SCHEMA)
    run = log["runs"][0]
    rules = run["tool"]["driver"]["rules"]
    assert [(rule["id"], rule["shortDescription"]["text"]) for rule in rules] == [
        ("local-base", "Bases have names."),
        ("x_y", "no place"),
    ]
    for result, problem in zip(run["results"], PROBLEMS, strict=True):
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"] == problem.code
    assert run["results"][0]["locations"][0]["physicalLocation"] == {
        "artifactLocation": {"uri": "a%20b/c%2Cd%3Ae.json", "uriBaseId": "SRCROOT"},
        "region": {"startLine": 3},
    }
    assert "locations" not in run["results"][1]
    assert run["results"][2]["locations"][0]["physicalLocation"]["artifactLocation"] == {
        "uri": "file:///abs/%C3%A4.json"
    }


def test_a_fingerprint_stays_when_a_line_moves() -> None:
    one, other = (
        PROBLEMS[0],
        Problem("error", "local-base", "a path\nof 100%", "do: this, or that", "a b/c,d:e.json", 9),
    )
    prints = [row["partialFingerprints"] for row in sarif([one, other, PROBLEMS[2]], {})["runs"][0]["results"]]
    assert prints[0] == prints[1] != prints[2]


def test_no_findings_are_a_log_too() -> None:
    log = sarif([], {})
    jsonschema.validate(log, SCHEMA)
    assert log["runs"][0]["results"] == []


def test_a_summary_keeps_its_table_whole() -> None:
    shown = summary("t", [Problem("note", "a", "x | y\n<z>"), Problem("error", "b", "worse", file="f", line=2)], "bad")
    rows = [line for line in shown.split("\n") if line.startswith("| ")]
    assert rows == ["| | where | what |", "| error | f:2 | worse |", "| note |  | x \\| y &lt;z> |"]


def test_a_summary_stays_below_what_a_runner_takes(tmp_path: Path) -> None:
    file = tmp_path / "summary.md"
    for _ in range(3):
        append_summary(file, "line\n" * 100_000)
    assert LIMIT - 200_000 < file.stat().st_size <= LIMIT
    assert file.read_text().endswith("\n\n(cut off)\n")
    append_summary(None, "nothing")


def test_lines_of_keys() -> None:
    data = '{\n  "a": "b",\n  "b": 1\n}'
    assert [line_of_key(data, key) for key in ("a", "b", "c")] == [2, 3, 0]


# ------------------------------------------------------------------ check and its formats


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    base = plain_base(tmp_path / "base")
    plain_adapter(tmp_path / "style", base, base_model_name_or_path="/home/me/base", use_rslora=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


def test_check_annotates(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = folder / "style/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()), indent=2))
    line = next(n for n, text in enumerate(config.read_text().split("\n"), 1) if "base_model" in text)
    code, out, _ = run(capsys, "check", "base", "style", "--output-format", "github")
    assert code == 0
    assert f"::warning file=style/adapter_config.json,line={line},title=adapterkit%3A local-base::" in out
    code, out, _ = run(capsys, "check", "base", str(folder / "style"), "--output-format=github")
    assert "file=style/adapter_config.json," in out


def test_check_gives_sarif(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "check", "base", "style", "--for", "vllm", "--output-format", "sarif")
    log = json.loads(out)
    jsonschema.validate(log, SCHEMA)
    assert {row["ruleId"] for row in log["runs"][0]["results"]} >= {"local-base"}
    assert code in (0, 3)


def test_check_that_fails_is_annotated(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "check", "base", "nothing/", "--output-format", "github")
    assert code == 7
    assert out.startswith("::error title=adapterkit%3A NotFound::nothing/ does not exist")
    assert err.startswith("error: nothing/ does not exist")


def test_report_and_summary_go_to_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_config(folder / "style", base_model_name_or_path=None)
    code, out, _ = run(capsys, "check", "base", "style", "--report", "r.json", "--summary", "s.md")
    assert code == 0
    assert json.loads((folder / "r.json").read_text())["findings"][0]["code"] == "no-base"
    assert out.splitlines()[-1] in (folder / "s.md").read_text()
    assert "| warning | style/adapter_config.json:1 |" in (folder / "s.md").read_text()
    code, out, _ = run(capsys, "check", "base", "style", "--output-format", "json")
    assert json.loads(out) == json.loads((folder / "r.json").read_text())


def test_json_errors_by_either_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for how in (["--json"], ["--output-format", "json"]):
        code, out, _ = run(capsys, "check", "base", "nothing/", *how)
        assert (code, json.loads(out)["error"]["code"]) == (7, "NotFound")
    code, _, err = run(capsys, "check", "base", "style", "--output-format", "yaml")
    assert code == 2
    assert "yaml" in err
