"""Adapter folders as they lie in a repository: what should not be committed. Needs nothing but Python itself.

    python -m adapterkit.lint [--output-format text|github|sarif] FILE_OR_FOLDER...

Exits with 3 when something is wrong, as `check` does.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from adapterkit.foreign import json_value
from adapterkit.lint.problems import ERROR, NOTE, WARNING, Problem, github, line_of_key, sarif, text
from adapterkit.redaction import holds_secret

CONFIG = "adapter_config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
WEIGHTS = ("adapter_model.safetensors", "adapters.safetensors")
_SHARD = re.compile(r"adapter_model-\d+-of-\d+\.safetensors")
RULES = {
    "pickle": "A pickle can run code when it is loaded.",
    "training-state": "State of a training run has no place beside an adapter.",
    "bad-config": "An adapter's config must be a JSON object.",
    "no-base": "An adapter is worth nothing without the base that it was trained on.",
    "local-base": "A base named by a path means nothing on another machine.",
    "local-path": "A path of one machine says who trained where, and means nothing elsewhere.",
    "no-revision": "The base may move; its revision says which one was meant.",
    "no-weights": "An adapter's config without weights is no adapter.",
    "damaged-weights": "A safetensors file starts with a header that says what it holds.",
    "secret": "A token in a repository is everybody's.",
}
_TRAINING = re.compile(r"(?:optimizer|scheduler|scaler|training_args|rng_state.*|trainer_state)\.(?:pt|bin|pth|json)")
_LOCAL = re.compile(r"(?:/|~[/\\]|\.{1,2}(?:[/\\]|$)|[A-Za-z]:[/\\]|\\\\|file:)")
_MACHINE = re.compile(
    r"(?:file:/*|[A-Za-z]:\\|~/|/(?:home|Users|root|tmp|var|mnt|media|data|workspace|content|scratch|opt|srv)/)"
)
_TEXTS = (CONFIG, "config.json", "README.md", "tokenizer_config.json", "adapterkit.json")
_LIMIT = 4 << 20  # bytes of a text that is looked through
_POINTER = b"version https://git-lfs"


def check_folders(paths: Iterable[str | Path]) -> tuple[list[Problem], int]:
    """What is wrong with the adapter folders that paths name or lie in, and how many of those there are.

    Args:
        paths: folders (looked through with all below them) or files, as a commit names them.
    """
    folders: dict[Path, None] = {}
    for given in paths:
        path = Path(given)
        if path.is_dir():
            folders |= dict.fromkeys(config.parent for config in sorted(path.rglob(CONFIG)))
        elif (path.parent / CONFIG).is_file():
            folders[path.parent] = None
    found = [problem for folder in folders for problem in check_folder(folder)]
    return found, len(folders)


def check_folder(folder: Path) -> list[Problem]:
    """What is wrong with one adapter folder."""
    found = [*_config(folder / CONFIG), *_files(folder)]
    for name in _TEXTS:
        path = folder / name
        if path.is_file() and path.stat().st_size <= _LIMIT:
            found += _secrets(path)
    if (folder / "README.md").is_file():
        found += _card(folder / "README.md")
    return found


def _config(path: Path) -> list[Problem]:
    file = str(path)
    try:
        data = path.read_bytes()[:_LIMIT].decode("utf-8")
        config = json_value(data)
    except (ValueError, OSError) as error:
        return [Problem(ERROR, "bad-config", f"it is not JSON ({error})", "save the adapter again", file, 1)]
    if not isinstance(config, dict):
        return [Problem(ERROR, "bad-config", "it is not a JSON object", "save the adapter again", file, 1)]
    found = []
    key = (
        "model" if "fine_tune_type" in config and "peft_type" not in config else "base_model_name_or_path"
    )  # of mlx-lm
    base, line = config.get(key), line_of_key(data, key)
    if not isinstance(base, str) or not base:
        hint = f"set {key} to the base's Hub id"
        found.append(Problem(ERROR, "no-base", "it does not say which base it was trained on", hint, file, line))
    elif _LOCAL.match(base):
        hint = f"set {key} to the base's Hub id"
        found.append(Problem(ERROR, "local-base", f"it names its base by a local path ({base})", hint, file, line))
    elif not config.get("revision"):
        hint = "set revision to the commit that it was trained on"
        at = line_of_key(data, "revision")
        found.append(Problem(NOTE, "no-revision", "it does not say which revision of its base", hint, file, at))
    for name, value in _strings({name: value for name, value in config.items() if name != key}, ""):
        if _MACHINE.match(value):
            at = line_of_key(data, name.partition(".")[0])
            found.append(
                Problem(ERROR, "local-path", f"'{name}' holds a path of a machine ({value})", "take it out", file, at)
            )
    return found


def _files(folder: Path) -> list[Problem]:
    found = []
    names = {path.name for path in folder.iterdir() if path.is_file()}
    for name in sorted(names):
        file = str(folder / name)
        if _TRAINING.fullmatch(name):
            message = "it is the state of a training run" + (", and a pickle" if name.endswith(PICKLES) else "")
            level = ERROR if name.endswith(PICKLES) else WARNING
            found.append(Problem(level, "training-state", message, "leave it out of the commit", file))
        elif name.endswith(PICKLES):
            hint = "save it again with safe_serialization=True"
            found.append(Problem(ERROR, "pickle", "it is a pickle, which can run code when loaded", hint, file))
    weights = [name for name in WEIGHTS if name in names] or sorted(filter(_SHARD.fullmatch, names))
    if not weights:
        message = "there are no weights beside it"
        found.append(Problem(WARNING, "no-weights", message, f"add {WEIGHTS[0]}", str(folder / CONFIG)))
    for name in weights:
        found += _safetensors(folder / name)
    return found


def _safetensors(path: Path) -> list[Problem]:
    with open(path, "rb") as file:
        first = file.read(64)
    if first.startswith(_POINTER):
        return []  # Git LFS keeps the file itself elsewhere
    size, length = path.stat().st_size, int.from_bytes(first[:8], "little")
    if len(first) < 9 or length > size - 8 or first[8:9] != b"{":
        hint = "save it again, or fetch it whole"
        return [Problem(ERROR, "damaged-weights", f"its {size} bytes are no safetensors file", hint, str(path))]
    return []


def _secrets(path: Path) -> list[Problem]:
    found = []
    for number, line in enumerate(path.read_text("utf-8", "replace").split("\n"), 1):
        if holds_secret(line):
            hint = "take it out, and revoke it if it is real"
            found.append(Problem(ERROR, "secret", "it holds what looks like a token or key", hint, str(path), number))
    return found


def _card(path: Path) -> list[Problem]:
    """The base in the head of a model card."""
    data = path.read_text("utf-8", "replace")
    if not data.startswith("---\n") or "\n---" not in data[4:]:
        return []
    found = []
    inside = False
    for number, line in enumerate(data[4 : data.index("\n---", 4)].split("\n"), 2):
        key = re.match(r"base_model\s*:", line)
        inside = key is not None or (inside and line.startswith((" ", "-")))
        if not inside:
            continue
        value = line[key.end() :] if key is not None else line.strip().removeprefix("-")
        value = value.strip().strip("\"'")
        if _LOCAL.match(value):
            message = f"it names its base by a local path ({value})"
            found.append(Problem(ERROR, "local-base", message, "give the base's Hub id", str(path), number))
    return found


def _strings(value: Any, where: str) -> Iterable[tuple[str, str]]:
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, where)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the module."""
    import argparse

    parser = argparse.ArgumentParser("adapterkit.lint", description="Check adapter folders before they are committed.")
    parser.add_argument("--output-format", choices=("text", "github", "sarif"), default="text")
    parser.add_argument("paths", nargs="*", default=["."])
    given = parser.parse_args(arguments)
    found, folders = check_folders(given.paths)
    if given.output_format == "sarif":
        print(json.dumps(sarif(found, RULES), indent=2))
    else:
        show = github if given.output_format == "github" else text
        for problem in found:
            if given.output_format == "github" or problem.level != NOTE:
                print(show(problem))
    wrong = sum(problem.level == ERROR for problem in found)
    if wrong and given.output_format == "text":
        print(f"{wrong} errors in {folders} adapter folders", file=sys.stderr)
    return 3 if wrong else 0
