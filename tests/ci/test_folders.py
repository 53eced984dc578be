"""Adapter folders as they are committed: what is wrong with them, said with its line, by Python alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from models import edit_config, plain_adapter, plain_base

from adapterkit.lint.folders import RULES, check_folder, check_folders, main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    base = plain_base(tmp_path / "base")
    return plain_adapter(tmp_path / "style", base, base_model_name_or_path="someone/base", revision="a" * 40)


def codes(folder: Path) -> dict[str, tuple[str, int]]:
    """Code to (file, line)."""
    return {problem.code: (Path(problem.file).name, problem.line) for problem in check_folder(folder)}


def test_a_clean_folder(adapter: Path) -> None:
    assert check_folders([adapter]) == ([], 1)


@pytest.mark.parametrize(
    "base", ["/home/me/base", "./base", "../base", "~/base", "C:\\models\\base", "file:///x", ".."]
)
def test_a_base_that_is_a_path(adapter: Path, base: str) -> None:
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": base}, indent=2))
    line = next(n for n, text in enumerate(config.read_text().split("\n"), 1) if "base_model" in text)
    assert codes(adapter) == {"local-base": ("adapter_config.json", line)}


@pytest.mark.parametrize("base", [None, "", 3])
def test_no_base(adapter: Path, base: Any) -> None:
    assert codes(edit_config(adapter, base_model_name_or_path=base)) == {"no-base": ("adapter_config.json", 1)}


def test_a_path_of_a_machine_elsewhere_in_the_config(adapter: Path) -> None:
    found = check_folder(edit_config(adapter, megatron_core={"cache": "/home/me/.cache"}))
    assert [(problem.code, "megatron_core.cache" in problem.message) for problem in found] == [("local-path", True)]


def test_no_revision_is_only_a_note(adapter: Path) -> None:
    found = check_folder(edit_config(adapter, revision=None))
    assert [(problem.level, problem.code) for problem in found] == [("note", "no-revision")]
    assert main([str(adapter)]) == 0


@pytest.mark.parametrize("name", ["adapter_model.bin", "weights.pt", "x.pkl", "y.ckpt", "z.pth"])
def test_a_pickle(adapter: Path, name: str) -> None:
    (adapter / name).write_bytes(b"\x80\x04.")
    assert codes(adapter) == {"pickle": (name, 0)}


@pytest.mark.parametrize(("name", "level"), [("optimizer.pt", "error"), ("trainer_state.json", "warning")])
def test_training_state(adapter: Path, name: str, level: str) -> None:
    (adapter / name).write_bytes(b"{}")
    assert [(problem.level, problem.code) for problem in check_folder(adapter)] == [(level, "training-state")]


@pytest.mark.parametrize("data", [b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_config_that_is_none(adapter: Path, data: bytes) -> None:
    (adapter / "adapter_config.json").write_bytes(data)
    assert codes(adapter) == {"bad-config": ("adapter_config.json", 1)}


def test_weights(adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for data in (whole[:20], b"", b"\x00" * 64, b"PK\x03\x04" + whole):
        weights.write_bytes(data)
        assert codes(adapter) == {"damaged-weights": (weights.name, 0)}
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    assert codes(adapter) == {}
    weights.unlink()
    assert codes(adapter) == {"no-weights": ("adapter_config.json", 0)}


def test_a_card_that_names_a_path(adapter: Path) -> None:
    card = adapter / "README.md"
    card.write_text("---\nlicense: mit\nbase_model: /home/me/base\ntags:\n- /not/a/base\n---\nbase_model: /prose\n")
    assert codes(adapter) == {"local-base": ("README.md", 3)}
    card.write_text("---\nbase_model:\n  - org/one\n  - '../two'\n---\n")
    assert codes(adapter) == {"local-base": ("README.md", 4)}
    card.write_text("---\nbase_model: org/one\n---\n")
    assert codes(adapter) == {}


def test_a_secret_is_found_and_not_repeated(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    token = "hf_" + "b" * 32
    (adapter / "README.md").write_text(f"# x\n\nuse {token}\n")
    assert codes(adapter) == {"secret": ("README.md", 3)}
    assert main([str(adapter)]) == 3
    assert token not in capsys.readouterr().out


def test_an_mlx_adapter_names_its_base_otherwise(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "lora", "model": "org/base"}))
    (tmp_path / "adapters.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    assert [problem.code for problem in check_folder(tmp_path)] == ["no-revision"]


def test_files_and_folders_lead_to_the_same(adapter: Path, tmp_path: Path) -> None:
    (adapter / "x.pt").write_bytes(b"")
    (tmp_path / "alone.pt").write_bytes(b"")  # no adapter's folder: nothing of ours
    by_folder = check_folders([tmp_path])
    assert by_folder[1] == 1
    files = [adapter / "x.pt", adapter / "adapter_config.json", tmp_path / "alone.pt"]
    assert check_folders(files) == by_folder


def test_every_code_has_its_rule(adapter: Path) -> None:
    (adapter / "x.pt").write_bytes(b"")
    (adapter / "optimizer.pt").write_bytes(b"")
    edit_config(adapter, base_model_name_or_path="/x", other="/home/me")
    assert set(codes(adapter)) <= set(RULES)


def test_the_hook_needs_nothing_but_python(adapter: Path, tmp_path: Path) -> None:
    """As pre-commit runs it: the script of a checkout, by a Python without any package."""
    edit_config(adapter, base_model_name_or_path="../base")
    hook = ROOT / "tools/check_adapter_folders"
    assert os.access(hook, os.X_OK)
    command = [sys.executable, "-I", "-S", str(hook), "style/adapter_config.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 3, done.stderr
    assert done.stdout.startswith("style/adapter_config.json:1: error: it names its base by a local path (../base);")


def test_pre_commit_runs_the_hook(adapter: Path, tmp_path: Path) -> None:
    """The real pre-commit on a real commit; the hook comes from a clone of this repository's files."""
    env = {
        **os.environ,
        "GIT_CONFIG_GLOBAL": "/dev/null",
        "GIT_CONFIG_SYSTEM": "/dev/null",
        "PRE_COMMIT_HOME": str(tmp_path / "cache"),
        **{f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
    }
    for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"):
        env.pop(name, None)

    def git(where: Path, *arguments: str) -> str:
        return subprocess.check_output(["git", *arguments], cwd=where, env=env, text=True).strip()

    hooks = tmp_path / "hooks"
    for name in (".pre-commit-hooks.yaml", "tools/check_adapter_folders"):
        (hooks / name).parent.mkdir(parents=True, exist_ok=True)
        (hooks / name).write_bytes((ROOT / name).read_bytes())
    (hooks / "tools/check_adapter_folders").chmod(0o755)
    for file in (ROOT / "adapterkit").rglob("*.py"):
        target = hooks / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    git(hooks, "init", "-q")
    git(hooks, "add", "-A")
    git(hooks, "commit", "-qm", "x")
    commit = git(hooks, "rev-parse", "HEAD")
    work = tmp_path / "work"
    work.mkdir()
    git(work, "init", "-q")
    adapter.rename(work / "style")
    (work / ".pre-commit-config.yaml").write_text(
        f"repos:\n- repo: {hooks}\n  rev: {commit}\n  hooks:\n  - id: adapterkit-check\n"
    )
    git(work, "add", "-A")

    def run() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pre_commit", "run", "--color", "never"]
        return subprocess.run(command, cwd=work, env=env, capture_output=True, text=True, timeout=900, check=False)

    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "check adapter folders" in done.stdout
    edit_config(work / "style", base_model_name_or_path="/home/me/base")
    git(work, "add", "-A")
    done = run()
    assert done.returncode == 1
    assert "style/adapter_config.json:1: error: it names its base by a local path (/home/me/base)" in done.stdout
