"""What has to be true of a release: `make release-check`, and `make release-check RELEASE=1` for the one that is published.

Looks at the version, the changelog, old names that should be gone, sdist and wheel (contents, metadata, README, entry points,
the same bytes when built again), and the typed API beside the one that the last release stored in `tools/api/`. Every finding
is a line; the exit code is 1 if there is one. ``--write`` stores the API of this version: the last step before a tag.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from email.parser import Parser
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
API = ROOT / "tools/api"
# The public versions of PEP 440, without epochs.
VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)((a|b|rc)\d+)?(\.post\d+)?(\.dev\d+)?")


def numbers(version: str) -> tuple[int, ...]:
    """``0.2.1rc1`` as (0, 2, 1)"""
    found = VERSION.fullmatch(version)
    return tuple(int(part) for part in found.groups()[:3]) if found else ()


# ------------------------------------------------------------------ version and changelog


def check_version(version: str, changelog: str, release: bool) -> Iterator[str]:
    """The version is one, and the top of the changelog is about it."""
    if VERSION.fullmatch(version) is None:
        yield f"version: {version} is no public version of PEP 440"
    heading = re.search(r"^## (.*)$", changelog, re.MULTILINE)
    if heading is None:
        yield "changelog: it has no section"
        return
    found = re.fullmatch(r"(\S+) \((unreleased|\d{4}-\d{2}-\d{2})\)", heading[1])
    if found is None:
        yield f"changelog: its first section is '{heading[1]}', not 'VERSION (DATE)'"
        return
    if found[1] != version:
        yield f"changelog: its first section is of {found[1]}, the version is {version}"
    if release and found[2] == "unreleased":
        yield f"changelog: {version} has no date yet"
    rest = changelog[heading.end() :]
    section = rest[: rest.index("\n## ")] if "\n## " in rest else rest
    if not re.search(r"^- ", section, re.MULTILINE):
        yield f"changelog: nothing is said of {found[1]}"


def check_deprecations(version: str) -> Iterator[str]:
    """Nothing is left that this version was to be without."""
    from adapterkit.deprecation import DEPRECATIONS

    for row in DEPRECATIONS.values():
        if numbers(row.removed) <= numbers(version):
            yield f"deprecation: {row.old} was to go in {row.removed}; take it out, with its row"
        if numbers(row.since) >= numbers(row.removed):
            yield f"deprecation: {row.old} goes in {row.removed}, which is not after {row.since}"


# ------------------------------------------------------------------ sdist and wheel


def build(folder: Path, what: str) -> Path:
    """One sdist or wheel of the working tree."""
    folder.mkdir(parents=True, exist_ok=True)
    around = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000"}
    command = [sys.executable, "-m", "hatchling", "build", "-t", what, "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, env=around, check=True, capture_output=True)
    (made,) = folder.glob("*.whl" if what == "wheel" else "*.tar.gz")
    return made


def tracked(*under: str) -> set[str]:
    """Files that git knows."""
    told = subprocess.check_output(["git", "ls-files", "--", *under], cwd=ROOT, text=True)
    return {name for name in told.splitlines() if (ROOT / name).exists()}


def check_wheel(wheel: Path, expected: set[str]) -> Iterator[str]:
    """It holds the package, all of it and nothing else, and its own list of files is right."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = next(name for name in names if name.endswith(".dist-info/METADATA")).rpartition("/")[0]
        package = {name for name in names if not name.startswith(f"{info}/")}
        yield from (f"wheel: {name} is missing" for name in sorted(expected - package))
        yield from (f"wheel: {name} does not belong in it" for name in sorted(package - expected))
        if "adapterkit/py.typed" not in package:
            yield "wheel: without py.typed type checkers do not read it"
        for line in archive.read(f"{info}/RECORD").decode().splitlines():
            name, digest, size = line.rsplit(",", 2)
            if not digest:
                continue
            data = archive.read(name)
            said = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            if digest != f"sha256={said}" or int(size) != len(data):
                yield f"wheel: RECORD is wrong about {name}"
        yield from check_metadata(archive.read(f"{info}/METADATA").decode())
        yield from check_entry_points(archive.read(f"{info}/entry_points.txt").decode())


def check_metadata(text: str) -> Iterator[str]:
    """What an index shows: a summary, classifiers that exist, a README that renders."""
    from adapterkit._version import __version__

    said = Parser().parsestr(text)
    wanted = {
        "Name": "adapterkit",
        "Version": __version__,
        "License-Expression": "Apache-2.0",
        "Requires-Python": ">=3.10",
    }
    for name, value in wanted.items():
        if said[name] != value:
            yield f"metadata: {name} is {said[name]}, not {value}"
    if not said["Summary"] or len(said["Summary"]) > 120:
        yield "metadata: a summary of one line is missing"
    from trove_classifiers import classifiers, deprecated_classifiers

    for one in said.get_all("Classifier") or []:
        if one not in classifiers:
            yield f"metadata: there is no classifier '{one}'"
        elif one in deprecated_classifiers:
            yield f"metadata: the classifier '{one}' is deprecated"
    if said["Description-Content-Type"] != "text/markdown":
        yield "metadata: the README is not said to be Markdown"
    yield from check_readme(str(said.get_payload()))


def check_readme(text: str) -> Iterator[str]:
    """It renders as an index renders it."""
    from readme_renderer.markdown import render

    shown = render(text)
    if not shown:
        yield "README: it does not render"
        return
    if text.count("\n| ") and "<table" not in shown:
        yield "README: its tables do not render"
    if shown.count("<pre") < text.count("```") // 2:
        yield "README: not every block of code renders"


def check_entry_points(text: str) -> Iterator[str]:
    """Each command can be imported and called."""
    rows = re.findall(r"^([\w-]+) = ([\w.]+):(\w+)$", text, re.MULTILINE)
    if "adapterkit" not in {name for name, _, _ in rows}:
        yield "entry points: there is no command adapterkit"
    for name, module, attribute in rows:
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            yield f"entry points: {name} cannot be imported ({error})"
            continue
        if not callable(found):
            yield f"entry points: {name} is no function"


def check_sdist(sdist: Path, expected: set[str]) -> Iterator[str]:
    """It holds what tests and builds need."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    yield from (f"sdist: {name} is missing" for name in sorted(expected - names))
    yield from (f"sdist: {name} does not belong in it" for name in sorted(names) if "__pycache__" in name)


# ------------------------------------------------------------------ the typed API


def signatures() -> dict[str, Any]:
    """Every public name: of a function its parameters, of a dataclass its fields, each with type and default."""
    import adapterkit

    found: dict[str, Any] = {}
    for name in sorted(set(adapterkit.__all__) - {"__version__"}):
        value = getattr(adapterkit, name)
        if inspect.isclass(value) and is_dataclass(value):
            rows = {one.name: {"type": str(one.type), "optional": _has_default(one)} for one in fields(value)}
            found[name] = {"kind": "dataclass", "fields": rows}
        elif inspect.isclass(value):
            members = [one for one, _ in inspect.getmembers(value, callable) if not one.startswith("_")]
            found[name] = {"kind": "class", "members": members}
        else:
            found[name] = {"kind": "function", "fields": _parameters(value)}
    return found


def _has_default(one: Any) -> bool:
    from dataclasses import MISSING

    return one.default is not MISSING or one.default_factory is not MISSING


def _parameters(function: Any) -> dict[str, Any]:
    return {
        name: {
            "type": str(one.annotation),
            "optional": one.default is not one.empty or one.kind in (one.VAR_KEYWORD, one.VAR_POSITIONAL),
            "how": one.kind.name,
        }
        for name, one in inspect.signature(function).parameters.items()
    }


def changes(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """What a program written for ``before`` would trip over. New names, and new parameters that are optional, are none."""
    for name, old in before.items():
        new = now.get(name)
        if new is None:
            yield f"api: {name} is gone"
            continue
        if new["kind"] != old["kind"]:
            yield f"api: {name} was a {old['kind']} and is a {new['kind']}"
            continue
        for member in old.get("members", ()):
            if member not in new["members"]:
                yield f"api: {name}.{member} is gone"
        rows = new.get("fields", {})
        for field, said in old.get("fields", {}).items():
            if field not in rows:
                yield f"api: {name} has no {field} any more"
            elif said["optional"] and not rows[field]["optional"]:
                yield f"api: {name} needs {field} now"
            elif said["type"] != rows[field]["type"]:
                yield f"api: {field} of {name} was {said['type']} and is {rows[field]['type']}"
            elif said.get("how") == "POSITIONAL_OR_KEYWORD" and rows[field].get("how") == "KEYWORD_ONLY":
                yield f"api: {field} of {name} has to be named now"
        for field, said in rows.items():
            if field not in old.get("fields", {}) and not said["optional"] and new["kind"] == "function":
                yield f"api: {name} needs {field}, which is new"


def last_release(version: str, folder: Path = API) -> Path | None:
    """The stored API of the newest version before this one."""
    stored = [path for path in folder.glob("*.json") if numbers(path.stem) and numbers(path.stem) < numbers(version)]
    return max(stored, key=lambda path: numbers(path.stem), default=None)


def check_api(version: str, release: bool, folder: Path = API) -> Iterator[str]:
    """Names of the last release are there as they were, unless the version says that they may not be."""
    before = last_release(version, folder)
    if before is not None:
        old, new = numbers(before.stem), numbers(version)
        # Semantic versions: a new major version may break, and before 1.0 a new minor one.
        may_break = new[0] > old[0] or (new[0] == 0 and new[1] > old[1])
        found = list(changes(json.loads(before.read_text()), signatures()))
        if may_break:
            print(*(f"note: {text} (since {before.stem})" for text in found), sep="\n", end="\n" if found else "")
        else:
            yield from (f"{text} since {before.stem}" for text in found)
    if release and not (folder / f"{version}.json").exists():
        yield f"api: tools/api/{version}.json is not there; run tools/release_check.py --write"


# ------------------------------------------------------------------ all of it


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--release", action="store_true", help="This is the tree that is published.")
    parser.add_argument("--write", action="store_true", help="Store the API of this version and stop.")
    asked = parser.parse_args()
    from adapterkit._version import __version__ as version

    if asked.write:
        API.mkdir(exist_ok=True)
        (API / f"{version}.json").write_text(json.dumps(signatures(), indent=1) + "\n")
        return 0
    found = [
        *check_version(version, (ROOT / "CHANGELOG.md").read_text(), asked.release),
        *check_deprecations(version),
        *check_api(version, asked.release),
    ]
    if asked.release and subprocess.check_output(["git", "status", "--porcelain"], cwd=ROOT, text=True).strip():
        found.append("git: the tree has changes that are not committed")
    with tempfile.TemporaryDirectory() as place:
        wheel = build(Path(place, "one"), "wheel")
        again = build(Path(place, "two"), "wheel")
        if wheel.read_bytes() != again.read_bytes():
            found.append("wheel: built again it has other bytes")
        found += check_wheel(wheel, tracked("adapterkit"))
        found += check_sdist(
            build(Path(place, "three"), "sdist"), tracked("adapterkit", "tests", "README.md", "LICENSE")
        )
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB")
    print(*found, sep="\n", end="\n" if found else "")
    print(f"{version}: {'ready' if not found else f'{len(found)} things are in the way'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
