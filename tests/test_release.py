"""What a release is held to, and that each of its checks can fail."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

import adapterkit
from adapterkit.deprecation import DEPRECATIONS, deprecated
from adapterkit.packages import CORE, EXTRAS
from tools import release_check as check

ROOT = Path(__file__).parents[1]
SECTION = "# Changelog\n\n## 0.2.0 (2026-12-01)\n\n- Something.\n\n## 0.1.0 (2026-11-01)\n"


# ------------------------------------------------------------------ the checks


@pytest.mark.parametrize(
    ("version", "changelog", "said"),
    [
        ("0.2.0", SECTION, ""),
        ("0.3.0", SECTION, "its first section is of 0.2.0, the version is 0.3.0"),
        ("0.2", SECTION, "no public version"),
        ("0.2.0", SECTION.replace("2026-12-01", "unreleased"), "has no date yet"),
        ("0.2.0", SECTION.replace("- Something.", ""), "nothing is said of 0.2.0"),
        ("0.2.0", "# Changelog\n", "it has no section"),
        ("0.2.0", "## Next\n- x\n", "not 'VERSION (DATE)'"),
    ],
)
def test_version_and_changelog(version: str, changelog: str, said: str) -> None:
    found = " ".join(check.check_version(version, changelog, release=True))
    assert said in found
    assert bool(said) is bool(found)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return check.build(tmp_path_factory.mktemp("dist"), "wheel")


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if name.startswith("adapterkit/")}


def test_this_wheel_is_ready(wheel: Path) -> None:
    assert list(check.check_wheel(wheel, names(wheel))) == []
    assert names(wheel) >= {"adapterkit/py.typed", "adapterkit/adapters/names.json", "adapterkit/gguf/arch/__init__.py"}


def changed(wheel: Path, target: Path, edit: dict[str, bytes | None]) -> Path:
    """A copy of the wheel with files added, replaced or, with None, left out."""
    with zipfile.ZipFile(wheel) as archive, zipfile.ZipFile(target, "w") as copy:
        for name in archive.namelist():
            data = edit.get(name, archive.read(name))
            if data is not None:
                copy.writestr(name, data)
        for name in set(edit) - set(archive.namelist()):
            copy.writestr(name, edit[name] or b"")
    return target


def test_a_wheel_that_is_not_right(wheel: Path, tmp_path: Path) -> None:
    info = f"adapterkit-{adapterkit.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"{info}/METADATA").decode()
    edits: list[tuple[dict[str, bytes | None], str]] = [
        ({"tests/test_x.py": b""}, "tests/test_x.py does not belong in it"),
        ({"adapterkit/places.py": b"x = 1\n"}, "RECORD is wrong about adapterkit/places.py"),
        ({f"{info}/METADATA": metadata.replace("Version: 0", "Version: 9", 1).encode()}, "Version is 9"),
        (
            {f"{info}/METADATA": metadata.replace("Classifier: Typing", "Classifier: Typed", 1).encode()},
            "no classifier",
        ),
        ({f"{info}/METADATA": metadata.replace("text/markdown", "text/plain").encode()}, "not said to be Markdown"),
        (
            {f"{info}/entry_points.txt": b"[console_scripts]\nadapterkit = adapterkit.cli:nothing\n"},
            "cannot be imported",
        ),
        ({f"{info}/entry_points.txt": b"[console_scripts]\nother = adapterkit.cli:main\n"}, "no command adapterkit"),
    ]
    for number, (edit, said) in enumerate(edits):
        found = list(check.check_wheel(changed(wheel, tmp_path / f"{number}.whl", edit), names(wheel)))
        assert any(said in text for text in found), (said, found)
    assert "wheel: adapterkit/new.py is missing" in list(check.check_wheel(wheel, names(wheel) | {"adapterkit/new.py"}))


def test_a_readme_that_does_not_render() -> None:
    assert list(check.check_readme((ROOT / "README.md").read_text())) == []
    assert list(check.check_readme("x\n\n| a | b |\n| c | d |\n")) == ["README: its tables do not render"]


# ------------------------------------------------------------------ the typed API


def api(**functions: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {name: {"kind": "function", "fields": rows} for name, rows in functions.items()}


NEEDED = {"type": "str", "optional": False, "how": "POSITIONAL_OR_KEYWORD"}
OPTIONAL = {"type": "str", "optional": True, "how": "KEYWORD_ONLY"}


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        (api(f={"a": NEEDED}), api(f={"a": NEEDED, "b": OPTIONAL}, g={}), []),
        (api(f={"a": NEEDED}), api(g={}), ["f is gone"]),
        (api(f={"a": NEEDED}), api(f={}), ["f has no a any more"]),
        (api(f={"a": OPTIONAL}), api(f={"a": NEEDED}), ["f needs a now"]),
        (api(f={"a": NEEDED}), api(f={"a": {**NEEDED, "type": "int"}}), ["a of f was str and is int"]),
        (api(f={"a": NEEDED}), api(f={"a": {**NEEDED, "how": "KEYWORD_ONLY"}}), ["a of f has to be named now"]),
        (api(f={}), api(f={"b": NEEDED}), ["f needs b, which is new"]),
        (api(f={}), {"f": {"kind": "class", "members": []}}, ["f was a function and is a class"]),
    ],
)
def test_what_a_program_would_trip_over(before: dict[str, Any], now: dict[str, Any], said: list[str]) -> None:
    assert [text.removeprefix("api: ") for text in check.changes(before, now)] == said


def test_the_api_is_held_to_the_last_release(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    now = check.signatures()
    assert now["merge"]["fields"]["base"]["optional"] is False
    assert now["MergeRequest"]["fields"]["quant"] == {"type": "str | None", "optional": True}
    assert list(check.changes(now, now)) == []
    (tmp_path / "1.2.0.json").write_text(json.dumps({**now, "forgotten": {"kind": "function", "fields": {}}}))
    (tmp_path / "1.1.0.json").write_text("{}")
    assert list(check.check_api("1.3.0", False, tmp_path)) == ["api: forgotten is gone since 1.2.0"]
    assert list(check.check_api("2.0.0", False, tmp_path)) == []  # a major version may break, and says what
    assert "note: api: forgotten is gone (since 1.2.0)" in capsys.readouterr().out
    assert "tools/api/1.3.0.json is not there" in list(check.check_api("1.3.0", True, tmp_path))[1]


# ------------------------------------------------------------------ old names


def test_every_old_name_works_and_says_the_new_one() -> None:
    for row in DEPRECATIONS.values():
        if row.old.startswith("adapterkit."):
            old, new = row.old.rpartition(".")[2], row.new.rpartition(".")[2]
            with pytest.warns(DeprecationWarning, match=f"{re.escape(row.old)} is now {re.escape(row.new)}") as told:
                assert getattr(adapterkit, old) is getattr(adapterkit, new)
            assert told[0].filename == __file__  # whoever used it is blamed
            assert old not in adapterkit.__all__
        else:
            done = subprocess.run(
                [sys.executable, *row.old.split()[1:], "--help"], capture_output=True, text=True, timeout=900, cwd=ROOT
            )
            assert done.returncode == 0
            assert row.sentence in done.stderr
    with pytest.raises(KeyError):
        deprecated("adapterkit.nothing")


def test_an_old_name_goes_when_it_was_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(check.check_deprecations(adapterkit.__version__)) == []
    gone = " ".join(check.check_deprecations("0.3.0"))
    assert all(row.old in gone for row in DEPRECATIONS.values())


def test_no_other_module_warns_of_old_names() -> None:
    """One helper, one table: a DeprecationWarning that is raised elsewhere would be known to nobody."""
    users = [path.name for path in (ROOT / "adapterkit").rglob("*.py") if "DeprecationWarning" in path.read_text()]
    assert users == ["deprecation.py"]


# ------------------------------------------------------------------ where it is published


def uses(workflow: Any) -> list[str]:
    return [step["uses"] for job in workflow["jobs"].values() for step in job["steps"] if "uses" in step]


@pytest.mark.parametrize("path", sorted((ROOT / ".github/workflows").glob("*.yml")), ids=lambda path: path.name)
def test_workflows_pin_what_they_use(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    assert uses(workflow)
    for one in uses(workflow):
        assert re.fullmatch(r"[\w/.-]+@[0-9a-f]{40}", one), one
    assert "permissions" in workflow  # what is not asked for is not given
    targets = re.findall(r"^([\w.()$/-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for job in workflow["jobs"].values():
        for step in job["steps"]:
            assert "${{" not in step.get("run", ""), "values go through env, so that they are never code"
            for target in re.findall(r"\bmake ([\w./-]+)", step.get("run", "")):
                assert target in targets or target.replace(".venv", "$(VENV)") in targets


def test_publishing_needs_no_token() -> None:
    """A trusted publisher: an identity for the one job that publishes, and no secret anywhere."""
    text = (ROOT / ".github/workflows/release.yml").read_text()
    workflow = yaml.safe_load(text)
    assert "secrets." not in text
    assert workflow["permissions"] == {}
    publish = workflow["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["environment"] == "pypi"
    assert publish["needs"] == "build"
    assert any(step.get("with") == {"attestations": True} for step in publish["steps"])


def test_the_matrix_has_every_python_that_is_supported() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/clean.yml").read_text())
    versions = workflow["jobs"]["clean"]["strategy"]["matrix"]["python"]
    least = re.search(r'requires-python = ">=(3\.\d+)"', (ROOT / "pyproject.toml").read_text())
    assert least is not None
    assert versions[0] == least[1]
    numbers = [int(version.partition(".")[2]) for version in versions]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    said = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())
    assert said == versions


def test_the_conda_recipe_says_what_pyproject_says() -> None:
    text = (ROOT / "packaging/conda/meta.yaml").read_text()
    version = re.search(r'set version = "(.*?)"', text)
    assert version is not None
    assert version[1] == adapterkit.__version__
    recipe = yaml.safe_load(
        re.sub(r"\{%.*?%\}", "", text).replace("{{ version }}", version[1]).replace("{{ PYTHON }}", "python")
    )
    other = {"huggingface-hub": "huggingface_hub", "torch": "pytorch", "xxhash": "python-xxhash", "gguf": "python-gguf"}
    run = recipe["requirements"]["run"]
    core = {f"{other.get(one.name, one.name)} >={one.least}" for one in CORE}
    assert core <= set(run)
    assert {row.partition(" ")[0] for row in run} - {"python", "tomli"} == {row.partition(" ")[0] for row in core} - {
        "tomli"
    }
    wanted = {one for extra in EXTRAS if extra.name in ("gguf", "demo", "bnb") for one in extra.packages}
    assert {f"{other.get(one.name, one.name)} >={one.least}" for one in wanted} == set(
        recipe["requirements"]["run_constrained"]
    )
    assert recipe["build"]["entry_points"] == ["adapterkit = adapterkit.cli.ending:run"]


def test_the_source_is_python_3_10() -> None:
    """By the grammar of 3.10; that its standard library is enough is mypy's part, which is set to 3.10."""
    for path in [*(ROOT / "adapterkit").rglob("*.py"), ROOT / "tools/check_adapter_folders"]:
        ast.parse(path.read_text(), filename=str(path), feature_version=(3, 10))
    assert 'python_version = "3.10"' in (ROOT / "pyproject.toml").read_text()


# ------------------------------------------------------------------ the container


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, in order."""
    text = re.sub(
        r"\\\n\s*",
        "",
        "\n".join(line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")),
    )
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in text.splitlines() if line.strip()]


def test_the_container() -> None:
    rows = instructions()
    known = {"ARG", "FROM", "ENV", "RUN", "COPY", "USER", "WORKDIR", "ENTRYPOINT", "CMD"}
    assert {name for name, _ in rows} <= known
    last = rows[max(i for i, (name, _) in enumerate(rows) if name == "FROM") :]
    assert [value for name, value in last if name == "USER"] == ["adapterkit"]  # not root
    assert json.loads(next(value for name, value in last if name == "ENTRYPOINT")) == ["adapterkit"]
    assert not any("pip install" in value for name, value in last)  # no compiler and no cache in what is shipped
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for name, value in rows:
        if name == "COPY" and "--from" not in value:
            for source in value.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert f"!{source}" in ignored, source
    said = dict(part.split("=", 1) for name, value in last if name == "ENV" for part in value.split())
    assert said["NUMBA_CACHE_DIR"].startswith("/tmp")  # with a read-only root there is nothing else to write to
    assert said["ADAPTERKIT_HOME"].startswith("/models")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_steps_of_the_container_in_a_plain_environment(tmp_path: Path) -> None:
    """Its build stage, run as it stands but for the places; then a merge on a root file system that refuses to be written."""
    import shutil

    (tmp_path / "src").mkdir()
    shell = "set -e\n"
    for name, value in instructions():
        value = value.replace("/opt/adapterkit", f"{tmp_path}/opt").replace("/src", f"{tmp_path}/src")
        if name == "FROM" and "AS build" not in value:
            break
        if name == "ARG" and "=" in value:
            shell += f"export {value}\n"
        if name == "ENV":
            shell += f"export {value}\n"
        if name == "RUN":
            shell += f"{value}\n"
        if name == "COPY":
            *sources, target = value.split()
            for source in sources:
                shell += f"cp -r {ROOT / source} {target}\n"
    # Where the index of PyTorch cannot be reached the same version comes from the usual one.
    shell = shell.replace('--index-url "$TORCH_INDEX" ', "")
    python = shutil.which("python3") or sys.executable
    shell = shell.replace("RUN python ", "RUN ").replace("python -m venv", f"{python} -m venv")
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-2000:]
    from models import plain_adapter, plain_base

    base = plain_base(tmp_path / "models/base")
    plain_adapter(tmp_path / "models/adapter", base)
    run = [str(tmp_path / "opt/bin/adapterkit"), "merge", "base", "adapter", "-o", "merged"]
    done = subprocess.run(run, cwd=tmp_path / "models", capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "models/merged/model.safetensors").is_file()
