"""The architecture, held: an import only ever points down, and what reads headers imports nothing heavy."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
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
    ("recipe",),
    ("ui",),
    ("verbs",),
    ("serving",),
    ("hub",),
    ("provenance",),
    ("folders",),
    ("lint",),
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
    ("errors", "_version"),
)
HEIGHT = {unit: len(LAYERS) - number for number, layer in enumerate(LAYERS) for unit in layer}

# Some know even less of what lies below them.
ONLY = {
    "codecs": {"ops", "dtypes", "errors"},
    "ops": {"dtypes", "errors"},
}
HEAVY = ("torch", "numpy", "transformers", "peft", "safetensors", "numba", "gguf", "scipy", "pandas")


def unit_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imported(tree: ast.AST) -> list[tuple[int, str]]:
    """Line and name of every module that is imported anywhere in a file, in functions and for type checkers too."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            # `from adapterkit import x` may name a unit; anything else is named by its module.
            found += [(node.lineno, f"{module}.{a.name}" if module == "adapterkit" else module) for a in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found += [
                (node.lineno, a.value) for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)
            ]
    return found


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
        ("verbs", "import adapterkit.utils"),
    ],
)
def test_an_import_that_points_up_is_seen(unit: str, text: str) -> None:
    assert len(upward(unit, ast.parse(text))) == 1


def test_import_that_points_down_is_fine() -> None:
    text = (
        "import os\nfrom adapterkit.ops.lora import to_norm\nfrom adapterkit.errors import AdapterError\nimport torch"
    )
    assert upward("adapters", ast.parse(text)) == []


def test_transformers_is_imported_by_nobody_who_merges() -> None:
    """But by what runs a model: the demo, importance, llm-compressor's child process, and answers to verify."""
    allowed = [
        ROOT / name
        for name in ("verbs/demo.py", "verbs/imatrix.py", "verbs/conversions/oneshot.py", "verbs/verify/answers.py")
    ]
    for file in ROOT.rglob("*.py"):
        names = {name.partition(".")[0] for _, name in imported(ast.parse(file.read_text()))}
        assert file in allowed or not names & {"transformers", "peft", "safetensors"}, file


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
    done = subprocess.run(command, capture_output=True, timeout=120, check=False)
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
    assert subprocess.check_output([sys.executable, "-c", code], timeout=60).strip() == b"[]"


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
)


@pytest.mark.parametrize("name", ["check", "dry_run"])
def test_tables_that_most_runs_do_not_need_stay_out(name: str, folders: tuple[Path, Path, Path]) -> None:
    """Start-up is the sum of what is imported: methods to combine by, records and other formats come in when asked for."""
    places = dict(zip(("BASE", "ADAPTER", "OUT"), folders, strict=True))
    assert loaded([places.get(word, word) for word in LIGHT[name]], TABLES) == []


def test_the_table_of_methods_is_read_when_a_method_is_named(folders: tuple[Path, Path, Path]) -> None:
    base, adapter, out = folders
    command = ["merge", base, adapter, adapter, "-o", out, "--dry-run", "--method", "ties", "--density", "0.5"]
    assert loaded(command, TABLES) == ["adapterkit.ops.rules"]
