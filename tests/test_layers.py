"""The architecture, held: an import only ever points down and never in a circle, no public class name is defined twice, and
what reads headers imports nothing heavy."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from models import plain_adapter, plain_base

import adapterkit

ROOT = Path(adapterkit.__file__).parent

# From top to bottom. A unit is a module or a package right below `adapterkit`; those of one layer may use each other.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("__init__", "__main__"),
    ("cli",),
    ("recipe", "integrations"),
    ("ui",),
    ("verbs",),
    ("hub", "oci", "bucket"),
    ("provenance",),
    ("requests",),
    ("serving",),
    ("folders",),
    ("lint",),
    ("results",),
    ("bases",),
    ("pickles",),
    ("registry",),
    ("gguf",),
    ("adapters",),
    ("checkpoint",),
    ("codecs",),
    ("ops",),
    ("dtypes",),
    ("redaction",),
    ("stores",),
    ("places", "rows", "web"),
    ("disk",),
    ("packages", "deprecation"),
    ("errors", "values", "foreign", "_version"),
)
HEIGHT = {unit: len(LAYERS) - number for number, layer in enumerate(LAYERS) for unit in layer}

# Some know even less of what lies below them.
ONLY = {
    "codecs": {"ops", "dtypes", "rows", "errors", "values", "foreign"},
    "ops": {"dtypes", "errors", "values"},
}
HEAVY = ("torch", "numpy", "transformers", "peft", "safetensors", "numba", "gguf", "scipy", "pandas")


def unit_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imported(tree: ast.AST) -> list[tuple[int, str]]:
    """Line and name of every module that is imported anywhere in a file: in functions, for type checkers, and by string.

    A string counts when it is the name of a module of the package, alone or before ``:function``, and when it is the
    argument of ``import_module`` or the head of one (``f"adapterkit.adapters.methods.{family}"``).
    """
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            # `from adapterkit import x` may name a unit; anything else is named by its module.
            found += [(node.lineno, f"{module}.{a.name}" if module == "adapterkit" else module) for a in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found += [(node.lineno, name) for a in node.args for name in _head(a)]
        elif (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and _is_module(node.value.partition(":")[0])
        ):
            found.append((node.lineno, node.value.partition(":")[0]))
    return sorted(set(found))


def _head(argument: ast.expr) -> list[str]:
    """What a string, or a string with a value at its end, says of the module."""
    if isinstance(argument, ast.JoinedStr):
        argument = argument.values[0]
    return (
        [argument.value.rstrip(".")] if isinstance(argument, ast.Constant) and isinstance(argument.value, str) else []
    )


def _is_module(name: str) -> bool:
    if re.fullmatch(r"adapterkit(\.\w+)+", name) is None:
        return False
    path = ROOT.joinpath(*name.split(".")[1:])
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def upward(unit: str, tree: ast.AST) -> list[str]:
    """What is wrong with the imports of a file of ``unit``."""
    wrong = []
    for line, name in imported(tree):
        if name.startswith("."):
            wrong.append(f"line {line}: {name} is relative")
        if not name.startswith("adapterkit."):
            continue
        other = name.split(".")[1]
        if other == unit:
            continue
        if other not in HEIGHT:
            wrong.append(f"line {line}: {name} has no layer")
        elif HEIGHT[other] > HEIGHT[unit]:
            wrong.append(f"line {line}: {unit} imports {other}, which lies above it")
        elif unit in ONLY and other not in ONLY[unit]:
            wrong.append(f"line {line}: {unit} may not know of {other}")
    return wrong


def test_imports_point_down() -> None:
    files = sorted(ROOT.rglob("*.py"))
    assert len(files) > 40
    assert {unit_of(file) for file in files} <= set(HEIGHT), "a new unit needs a layer"
    wrong = [
        f"{file.relative_to(ROOT)} {what}"
        for file in files
        for what in upward(unit_of(file), ast.parse(file.read_text()))
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("unit", "text"),
    [
        ("checkpoint", "from adapterkit.adapters.fold import fold"),
        ("ops", "def f():\n    import adapterkit.checkpoint.open"),
        (
            "adapters",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from adapterkit.verbs.merge import Merge",
        ),
        ("verbs", "from adapterkit import cli"),
        ("errors", "import adapterkit.dtypes"),
        ("gguf", "from adapterkit.verbs.convert import convert"),
        ("adapters", "from adapterkit.gguf.reader import read"),
        ("codecs", "from adapterkit.checkpoint.tensor import Tensor"),
        ("verbs", "from . import report"),
        ("adapters", "import importlib\nimportlib.import_module('adapterkit.cli')"),
        ("adapters", "from importlib import import_module\nimport_module(f'adapterkit.verbs.{name}')"),
        ("checkpoint", "FINDERS = ['adapterkit.registry.finder:find']"),
        ("gguf", "WHERE = {'merge': 'adapterkit.verbs.merge'}"),
        ("verbs", "import adapterkit.utils"),
    ],
)
def test_an_import_that_points_up_is_seen(unit: str, text: str) -> None:
    assert len(upward(unit, ast.parse(text))) == 1


def modules() -> dict[str, Path]:
    """The package's files by module name."""
    files = {".".join(file.relative_to(ROOT.parent).with_suffix("").parts): file for file in ROOT.rglob("*.py")}
    return {name.removesuffix(".__init__"): file for name, file in files.items()}


def imports(known: dict[str, ast.AST]) -> dict[str, set[str]]:
    """For every module the modules of ``known`` that it imports, wherever in the file that is."""
    found: dict[str, set[str]] = {}
    for module, tree in known.items():
        names = {name for _, name in imported(tree)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                parts = {f"{node.module}.{alias.name}" for alias in node.names}
                # `from package import module` is an import of the module; the package's own file is not meant.
                if parts <= known.keys():
                    names.discard(node.module)
                names |= parts
        found[module] = (names & known.keys()) - {module}
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, the first again at the end; empty when there is none."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for other in sorted(graph[module]):
            round_ = walk(other, [*path, module])
            if round_:
                return round_
        done.add(module)
        return []

    return next((found for found in (walk(module, []) for module in sorted(graph)) if found), [])


def test_no_files_import_each_other_in_a_circle() -> None:
    assert circle(imports({name: ast.parse(file.read_text()) for name, file in modules().items()})) == []


def test_a_circle_is_seen() -> None:
    texts = {
        "a": "import b",
        "b": "def f():\n    from c import x",
        "c": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a",
        "d": "import a",
    }
    assert circle(imports({name: ast.parse(text) for name, text in texts.items()})) == ["a", "b", "c", "a"]
    assert circle(imports({name: ast.parse(text) for name, text in texts.items() if name != "c"})) == []


def test_import_that_points_down_is_fine() -> None:
    text = (
        "import os\nfrom adapterkit.ops.lora import to_norm\nfrom adapterkit.errors import AdapterError\nimport torch"
    )
    assert upward("adapters", ast.parse(text)) == []


def test_transformers_is_imported_by_nobody_who_merges() -> None:
    """But by what runs a model (the demo, importance, llm-compressor's child, answers to verify) or is called by a trainer."""
    names = ("verbs/demo.py", "verbs/imatrix.py", "verbs/stored_model.py", "verbs/conversions/oneshot.py")
    allowed = [ROOT / name for name in (*names, "verbs/verify/answers.py", "integrations/transformers.py")]
    for file in ROOT.rglob("*.py"):
        names = {name.partition(".")[0] for _, name in imported(ast.parse(file.read_text()))}
        assert file in allowed or not names & {"transformers", "peft", "safetensors"}, file


# ------------------------------------------------------------------ one word, one thing


def twice(files: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Public class names that are defined more than once in ``(file, text)`` pairs, with the files."""
    places: dict[str, list[str]] = {}
    for file, text in files:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(file)
    return {name: files for name, files in places.items() if len(files) > 1}


def test_no_public_class_name_is_defined_twice() -> None:
    found = twice((str(file.relative_to(ROOT)), file.read_text()) for file in sorted(ROOT.rglob("*.py")))
    assert found == {}


def test_a_name_that_is_defined_twice_is_seen() -> None:
    files = [("a.py", "class Rule: ...\nclass _Kept: ..."), ("b.py", "def f():\n    class Rule: ...\nclass _Kept: ...")]
    assert twice(files) == {"Rule": ["a.py", "b.py"]}


# ------------------------------------------------------------------ what a verb imports when it runs

CHILD = """
import json, os, sys
sys.stdout.flush()
kept = os.dup(1)
os.dup2(2, 1)
from adapterkit.cli import main
try:
    main(json.loads(sys.argv[1]))
    code = 0
except SystemExit as end:
    code = end.code
heavy = sorted(name for name in json.loads(sys.argv[2]) if name in sys.modules)
os.write(kept, json.dumps([code, heavy]).encode())
"""


def loaded(arguments: list[Any], names: tuple[str, ...] = HEAVY) -> list[str]:
    """Which of ``names`` the process of a command line has imported in the end."""
    command = [sys.executable, "-c", CHILD, json.dumps([str(a) for a in arguments]), json.dumps(names)]
    done = subprocess.run(command, capture_output=True, timeout=900, check=False)
    code, heavy = json.loads(done.stdout)
    assert code in (0, 3), done.stderr.decode()  # 3: the check itself did not hold
    return list(heavy)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("light")
    base = plain_base(folder / "base", layers=3, shards=2)
    return base, plain_adapter(folder / "adapter", base, base_model_name_or_path="someone/base"), folder / "out"


LIGHT = {
    "help": ["--help"],
    "version": ["--version"],
    "merge_help": ["merge", "--help"],
    "verify_help": ["verify", "--help"],
    "imatrix_help": ["imatrix", "--help"],
    "inspect_help": ["inspect", "--help"],
    "inspect_adapter": ["inspect", "ADAPTER"],
    "inspect_adapter_json": ["inspect", "ADAPTER", "--base", "BASE", "--json"],
    "inspect_checkpoint": ["inspect", "BASE"],
    "check": ["check", "BASE", "ADAPTER"],
    "check_for": ["check", "BASE", "ADAPTER", "--for", "vllm", "--json"],
    "dry_run": ["merge", "BASE", "ADAPTER", "-o", "OUT", "--dry-run"],
    "dry_run_json": ["merge", "BASE", "ADAPTER", "ADAPTER", "-o", "OUT", "--dry-run", "--json", "--dtype", "f32"],
    "dry_run_sharded": ["merge", "BASE", "ADAPTER", "-o", "OUT", "--dry-run", "--max-shard-size", "2KB"],
}


@pytest.mark.parametrize("name", LIGHT)
def test_verbs_that_read_headers_import_nothing_heavy(name: str, folders: tuple[Path, Path, Path]) -> None:
    places = dict(zip(("BASE", "ADAPTER", "OUT"), folders, strict=True))
    heavy = loaded([places.get(word, word) for word in LIGHT[name]])
    assert heavy == []
    assert not folders[2].exists()


def test_the_package_alone_imports_nothing_heavy() -> None:
    code = f"import sys, adapterkit; print([name for name in {HEAVY} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], timeout=900).strip() == b"[]"


def test_a_merge_is_seen_to_import_torch(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """The probe above can fail."""
    heavy = loaded(["merge", folders[0], folders[1], "-o", tmp_path / "out"])
    assert "torch" in heavy
    assert not {"transformers", "peft", "safetensors"} & set(heavy)


TABLES = (
    "adapterkit.ops.rules",
    "adapterkit.codecs.table",
    "adapterkit.registry.record",
    "adapterkit.adapters.formats.parts",
    "adapterkit.adapters.formats.mlx",
    "adapterkit.serving.server",
    "adapterkit.gguf.reader",
)
# What only a run that writes needs, and modules of the standard library that take as long as ten of ours.
WRITERS = ("adapterkit.checkpoint.write", "adapterkit.checkpoint.sink", "adapterkit.checkpoint.journal")
SLOW = ("concurrent.futures", "logging", "ctypes", "hashlib", "base64", "pkgutil")
STAY_OUT = {
    "help": ("adapterkit.requests", "adapterkit.checkpoint.tensor", *TABLES, *WRITERS, *SLOW, "pathlib"),
    "inspect_adapter": ("adapterkit.requests", "adapterkit.adapters.fold", *TABLES, *WRITERS, *SLOW, "lzma"),
    "inspect_checkpoint": ("adapterkit.requests", "adapterkit.adapters.fold", *TABLES, *WRITERS, *SLOW, "lzma"),
    "check": (
        "adapterkit.verbs.report",
        "adapterkit.verbs.job",
        "adapterkit.requests.merge_plan",
        *TABLES,
        *WRITERS,
        *SLOW,
        "lzma",
    ),
    "dry_run": ("adapterkit.provenance", "adapterkit.requests.merge_plan", *TABLES, *WRITERS, *SLOW, "lzma"),
}


@pytest.mark.parametrize("name", STAY_OUT)
def test_what_a_verb_does_not_need_stays_out(name: str, folders: tuple[Path, Path, Path]) -> None:
    """Start-up is the sum of what is imported: writers, reports and tables come in when they are asked for."""
    places = dict(zip(("BASE", "ADAPTER", "OUT"), folders, strict=True))
    assert loaded([places.get(word, word) for word in LIGHT[name]], STAY_OUT[name]) == []


# The modules of the package that are imported, and a few to spare. A new one costs a quarter of a millisecond and more.
MOST = {"help": 15, "inspect_adapter": 66, "inspect_checkpoint": 66, "check": 103, "dry_run": 101}


@pytest.mark.parametrize("name", MOST)
def test_verbs_that_read_headers_import_few_modules(name: str, folders: tuple[Path, Path, Path]) -> None:
    places = dict(zip(("BASE", "ADAPTER", "OUT"), folders, strict=True))
    every = tuple(modules())
    assert len(loaded([places.get(word, word) for word in LIGHT[name]], every)) <= MOST[name]


def test_the_table_of_methods_is_read_when_a_method_is_named(folders: tuple[Path, Path, Path]) -> None:
    base, adapter, out = folders
    command = ["merge", base, adapter, adapter, "-o", out, "--dry-run", "--method", "ties", "--density", "0.5"]
    assert loaded(command, TABLES) == ["adapterkit.ops.rules"]
