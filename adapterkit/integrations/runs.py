"""What a training run says of itself: code, data, seed, settings, figures, and where it can be looked at.

Everything is looked up where it is and taken as it is found; what cannot be found is left out. Paths of this machine and
secrets are left out too, since a record travels.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from adapterkit.redaction import holds_secret, without_login

_ROWS = 1024
"""Rows of a data set that its fingerprint reads, evenly spread, the first and the last among them."""
_LOCAL = re.compile(r"(?:/|~[/\\]|\.{1,2}[/\\]|[A-Za-z]:[/\\]|\\\\|file:)")
_LONGEST = 2000  # characters of a setting


def code(folder: Path | None = None) -> dict[str, str]:
    """``git``: the commit of the script's repository, with ``+changes`` where tracked files differ from it."""
    main = Path(sys.argv[0]) if sys.argv and sys.argv[0] else Path()
    where = folder or (main.resolve().parent if main.is_file() else Path.cwd())
    commit = _git(where, ["rev-parse", "HEAD"])
    if not commit:
        return {}
    changed = _git(where, ["status", "--porcelain", "--untracked-files=no"])
    return {"git": commit + ("+changes" if changed else "")}


def _git(folder: Path, words: list[str]) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def data(dataset: Any, name: str = "") -> dict[str, str]:
    """``data`` (its name), ``data.rows``, ``data.fingerprint`` (see `fingerprint`) and the library's own ``data.id``."""
    found = {"data": name or _name_of(dataset)}
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        found["data.rows"] = str(len(dataset))
        found["data.fingerprint"] = fingerprint(dataset)
    own = getattr(dataset, "_fingerprint", None)
    found["data.id"] = own if isinstance(own, str) else ""
    return {key: value for key, value in found.items() if value}


def _name_of(dataset: Any) -> str:
    info = getattr(dataset, "info", None)
    for value in (getattr(info, "dataset_name", None), getattr(info, "builder_name", None)):
        if isinstance(value, str) and value:
            return value
    return ""


def fingerprint(dataset: Any) -> str:
    """``rows-N:`` and a sha256 over the number of rows and the content of at most 1,024 of them, evenly spread.

    Data sets with the same rows in the same order have the same fingerprint, whatever library or machine holds them.
    """
    count = len(dataset)
    some = min(count, _ROWS)
    places = [round(index * (count - 1) / (some - 1)) for index in range(some)] if some > 1 else list(range(some))
    total = hashlib.sha256(str(count).encode())
    for place in places:
        total.update(b"\n" + json.dumps(_plain(dataset[place]), sort_keys=True, ensure_ascii=True).encode())
    return f"rows-{some}:{total.hexdigest()[:32]}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):  # a tensor or an array
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return repr(value)
    if value is None or isinstance(value, (str, int, bool)):
        return value
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    return f"{type(value).__name__}"


def link() -> dict[str, str]:
    """``run`` and ``run.name``: where the run can be looked at, by what is running in this process or by the CI."""
    wandb, mlflow = sys.modules.get("wandb"), sys.modules.get("mlflow")
    found: dict[str, str] = {}
    run = getattr(wandb, "run", None)
    if run is not None:
        found = {"run": str(getattr(run, "url", "") or ""), "run.name": str(getattr(run, "name", "") or run.id)}
    elif mlflow is not None and hasattr(mlflow, "active_run") and (active := mlflow.active_run()) is not None:
        uri = without_login(str(mlflow.get_tracking_uri())).rstrip("/")
        page = f"{uri}/#/experiments/{active.info.experiment_id}/runs/{active.info.run_id}"
        found = {"run": page if uri.startswith("http") else f"mlflow:{active.info.run_id}"}
        found["run.name"] = str(active.info.run_name or active.info.run_id)
    elif "GITHUB_RUN_ID" in os.environ and "GITHUB_REPOSITORY" in os.environ:
        server = os.environ.get("GITHUB_SERVER_URL", "https://github.com")
        found = {"run": f"{server}/{os.environ['GITHUB_REPOSITORY']}/actions/runs/{os.environ['GITHUB_RUN_ID']}"}
    elif "CI_JOB_URL" in os.environ:
        found = {"run": os.environ["CI_JOB_URL"]}
    return {key: value for key, value in found.items() if value and not holds_secret(value)}


def settings(said: Mapping[str, Any], usual: Mapping[str, Any], always: Iterable[str] = ()) -> dict[str, Any]:
    """Settings that differ from the usual ones, as plain JSON, without paths and secrets.

    Args:
        usual: the defaults.
        always: keys that are kept in any case.
    """
    kept = set(always)
    found: dict[str, Any] = {}
    for key, value in sorted(said.items()):
        if key not in kept and key in usual and usual[key] == value:
            continue
        plain = _setting(value)
        if plain is not None:
            found[key] = plain
    return found


def _setting(value: Any) -> Any:
    if isinstance(value, bool) or (isinstance(value, int) and abs(value) < 1 << 62):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, str):
        local = _LOCAL.match(value) or os.path.isabs(value) or os.path.exists(value)
        return (
            None
            if not value or local or holds_secret(value) or value.startswith("<") or len(value) > _LONGEST
            else value
        )
    if isinstance(value, (list, tuple)):
        inner = [_setting(item) for item in value]
        return [item for item in inner if item is not None] or None
    if isinstance(value, Mapping):
        return {str(key): item for key, part in value.items() if (item := _setting(part)) is not None} or None
    return None


def figures(log: Iterable[Mapping[str, Any]], step: int) -> dict[str, Any]:
    """The last figure of each name that was logged up to a step, such as ``loss`` and ``eval_loss``."""
    found: dict[str, Any] = {}
    for row in log:
        if int(row.get("step", 0)) > step:
            continue
        for key, value in row.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and re.fullmatch(r"[\w./-]{1,80}", key):
                found[key] = value if math.isfinite(value) else str(value)
    return found
