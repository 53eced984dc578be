"""Problems found in files, and the forms in which other programs take them: GitHub's annotations and SARIF.

GitHub: "Workflow commands" of its documentation (``::error file=...,line=...::message``). SARIF: the OASIS standard 2.1.0,
as far as code scanning reads it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapterkit._version import __version__

ERROR, WARNING, NOTE = "error", "warning", "note"
SARIF_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
_COMMANDS = {ERROR: "error", WARNING: "warning", NOTE: "notice"}


@dataclass(frozen=True)
class Problem:
    """Something that is wrong, or worth knowing, at a place in a file.

    Attributes:
        level: ``error``, ``warning`` or ``note``.
        code: a stable word for scripts.
        message, hint: what, and what to do.
        file: where, relative to the working directory if it can be; empty where no file is to blame.
        line: in it, from 1; 0 for the whole file.
    """

    level: str
    code: str
    message: str
    hint: str = ""
    file: str = ""
    line: int = 0

    @property
    def sentence(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message

    @property
    def place(self) -> str:
        """``file:line``, as far as it is known."""
        return f"{self.file}:{self.line}" if self.line else self.file


def text(problem: Problem) -> str:
    """One line for readers."""
    where = f"{problem.place}: " if problem.file else ""
    return f"{where}{problem.level}: {problem.sentence} [{problem.code}]"


def github(problem: Problem) -> str:
    """A workflow command that GitHub shows at the line in question."""
    fields = {"file": problem.file, "line": str(problem.line or ""), "title": f"adapterkit: {problem.code}"}
    given = ",".join(f"{name}={_property(value)}" for name, value in fields.items() if value)
    return f"::{_COMMANDS[problem.level]} {given}::{_data(problem.sentence)}"


def _data(value: str) -> str:
    return value.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(value: str) -> str:
    return _data(value).replace(":", "%3A").replace(",", "%2C")


def sarif(problems: Sequence[Problem], rules: Mapping[str, str]) -> dict[str, Any]:
    """A SARIF 2.1.0 log of one run.

    Args:
        rules: what each code means, in a sentence; a code that is not in it gets its first message.
    """
    codes = list(dict.fromkeys(problem.code for problem in problems))
    return {
        "$schema": SARIF_SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "adapterkit",
                        "semanticVersion": __version__,
                        "rules": [_rule(code, rules, problems) for code in codes],
                    }
                },
                "columnKind": "unicodeCodePoints",
                "originalUriBaseIds": {"SRCROOT": {"description": {"text": "the folder that was checked from"}}},
                "results": [_result(problem, codes) for problem in problems],
            }
        ],
    }


def _rule(code: str, rules: Mapping[str, str], problems: Iterable[Problem]) -> dict[str, Any]:
    first = next(problem for problem in problems if problem.code == code)
    return {
        "id": code,
        "name": "".join(part.capitalize() for part in code.replace("_", "-").split("-")),
        "shortDescription": {"text": rules.get(code, first.message)},
        "defaultConfiguration": {"level": first.level},
    }


def _result(problem: Problem, codes: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "ruleId": problem.code,
        "ruleIndex": codes.index(problem.code),
        "level": problem.level,
        "message": {"text": problem.sentence},
        "partialFingerprints": {"adapterkit/v1": _fingerprint(problem)},
    }
    if problem.file:
        place: dict[str, Any] = {"artifactLocation": _location(problem.file)}
        if problem.line:
            place["region"] = {"startLine": problem.line}
        found["locations"] = [{"physicalLocation": place}]
    return found


def _location(file: str) -> dict[str, str]:
    from pathlib import PurePosixPath
    from urllib.parse import quote

    path = file.replace("\\", "/")
    if PurePosixPath(path).is_absolute():
        return {"uri": f"file://{quote(os.fsencode(path))}"}
    return {"uri": quote(os.fsencode(path)), "uriBaseId": "SRCROOT"}


def _fingerprint(problem: Problem) -> str:
    """The same for the same problem after its file was edited elsewhere."""
    return hashlib.sha256(
        f"{problem.code}\0{problem.file}\0{problem.message}".encode(errors="backslashreplace")
    ).hexdigest()[:32]


def summary(title: str, problems: Sequence[Problem], verdict: str) -> str:
    """Markdown for a job summary: a verdict and a table, errors first."""
    order = [ERROR, WARNING, NOTE]
    rows = sorted(problems, key=lambda problem: order.index(problem.level))
    lines = [f"### {title}", "", verdict, ""]
    if rows:
        lines += ["| | where | what |", "|---|---|---|"]
        lines += [f"| {row.level} | {_cell(row.place)} | {_cell(row.sentence)} |" for row in rows]
        lines.append("")
    return "\n".join(lines)


def _cell(value: str) -> str:
    return value.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def line_of_key(data: str, key: str) -> int:
    """The line of a JSON text on which ``key`` stands as a key, or 0."""
    found = re.search(re.escape(json.dumps(key)) + r"\s*:", data)
    return data.count("\n", 0, found.start()) + 1 if found is not None else 0
