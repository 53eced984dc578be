"""Sentences name an option as the user's own door spells it: a flag on the command line, a keyword in Python."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from models import plain_adapter, plain_base

import adapterkit
from adapterkit.cli import main
from adapterkit.errors import UsageError, option, spelled
from adapterkit.requests import every

ROOT = Path(adapterkit.__file__).parent
FLAG = re.compile(r"(?:^|[ ('])--[a-z][a-z-]+")
# Commands that a user may type, and what only the command line has.
ABOVE = (
    "cli",
    "requests",
    "ui",
    "lint",
    "serving",
    "verbs/demo.py",
    "verbs/verify/page.py",
    "verbs/heatmap.py",
    "recipe/summary.py",
)
ALONE = {
    "checkpoint/hub_bytes.py": "Python has a function for it, set_verify_downloads",
    "packages.py": "the flags of pip and uv, which are the same for every door",
}


def flags_in(text: str) -> list[tuple[int, str]]:
    """Strings that name a flag, but for docstrings, whole commands of adapterkit, and lists of words for other programs."""
    tree = ast.parse(text)
    words = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, (ast.List, ast.Tuple, ast.Compare))
        for part in ast.iter_child_nodes(node)
    }
    quiet = words | {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            text = "".join(part.value if isinstance(part, ast.Constant) else "X" for part in node.values)
            quiet |= {id(part) for part in node.values}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in quiet:
            text = node.value
        else:
            continue
        if FLAG.search(text) and "adapterkit " not in text:
            found.append((node.lineno, text))
    return found


def test_no_sentence_below_the_command_line_names_a_flag() -> None:
    found = {
        f"{path.relative_to(ROOT)}:{line}": text
        for path in sorted(ROOT.rglob("*.py"))
        if not str(path.relative_to(ROOT)).startswith(ABOVE) and str(path.relative_to(ROOT)) not in ALONE
        for line, text in flags_in(path.read_text())
    }
    assert found == {}


def test_a_flag_in_a_sentence_is_seen() -> None:
    assert flags_in('raise Error(f"{x} is coarse", "add --yes-lossy")') == [(1, "add --yes-lossy")]
    assert (
        flags_in('"""See --help."""\ncommand = ["--jobs", "2"]\nhint = f"run adapterkit convert {x} --to gguf"') == []
    )


def test_names_in_sentences_are_declared() -> None:
    """Each is a field of a request, or a keyword of a function that has no request."""
    known = {name for request in every() for name in request.options()}
    others = {
        "chunk",
        "conv1d",
        "copy",
        "locked",
        "outside",
        "private",
        "replace_card",
        "signature",
        "text",
        "port",
        "follow_links",
        "lora",
        "normalize",
        "health",
        "ignore",
        "in_file",
        *("allow_same", "canary", "probe", "token_env", "move_tag", "tag"),
        *("tasks", "null", "base"),
    }
    used = {
        node.args[0].value
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "option"
        and node.args
        and isinstance(node.args[0], ast.Constant)
    }
    assert len(used) > 20
    assert used - known - others == set()


def test_python_reads_keywords_and_the_command_line_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = plain_base(tmp_path / "base")
    adapter = plain_adapter(tmp_path / "adapter", base)
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="give one weights= for each adapter"):
        adapterkit.fold(adapterkit.open(base), [adapterkit.load_adapter(adapter)], weights=[1, 2])
    with pytest.raises(adapterkit.AdapterkitError, match="force=True"):
        adapterkit.merge(base, [adapter], tmp_path / "out")
    with pytest.raises(SystemExit):
        main(["merge", str(base), str(adapter), "-o", str(tmp_path / "out")])
    told = capsys.readouterr().err
    assert "--force" in told
    assert "force=" not in told
    assert option("force", True) == "force=True"  # and afterwards Python is Python again


def test_flags_are_those_that_are_declared() -> None:
    from adapterkit.cli import _as_flag

    with spelled(_as_flag):
        assert option("weights") == "--weight"
        assert option("server", "ollama") == "--for ollama"
        assert option("max_shard_size", "2GB") == "--max-shard-size 2GB"
        assert option("yes_lossy", True) == "--yes-lossy"
