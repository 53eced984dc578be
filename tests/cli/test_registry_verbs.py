"""The registry's verbs as a user meets them, and registry names where a path is expected."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from models import plain_adapter, plain_base, read_bytes, read_tensors, write_checkpoint

from adapterkit.cli import main


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return plain_base(tmp_path / "org-base", shards=2)


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return plain_adapter(tmp_path / "adapter", base, base_model_name_or_path="someone/org-base")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], home: Path) -> Any:
    def call(*arguments: object, code: int = 0) -> Any:
        """stdout of one call, read as JSON when it was asked for."""
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert stopped.value.code == code, out + err
        return json.loads(out) if "--json" in arguments else out + err

    return call


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_register_show_and_list(run: Any, base: Path, adapter: Path) -> None:
    made = run("register", adapter, "--name", "mine", "--base", base, "--meta", "dataset=tickets", "--json")
    assert (made["ref"], made["new"]) == ("mine@1", True)
    record = made["record"]
    assert {file["path"]: file["sha256"] for file in record["files"]} == {
        path.name: sha256(path) for path in adapter.iterdir()
    }
    assert (record["kind"], record["method"], record["meta"]) == ("adapter", "lora", {"dataset": "tickets"})
    assert record["base"]["id"] == "someone/org-base"
    assert {"shapes", "skeleton", "probe", "sampled"} <= set(record["base"])
    assert "merkle" not in record["base"]

    assert (
        run("register", adapter, "--name", "mine", "--base", base, "--meta", "dataset=tickets", "--json")["new"]
        is False
    )
    full = run("register", adapter, "--name", "mine", "--base", base, "--full", "--json")["record"]
    assert full["version"] == 2
    assert set(full["base"]["files"].values()) == {sha256(path) for path in base.glob("*.safetensors")}
    assert len(full["base"]["merkle"]) == 64

    rows = run("list", "--json")["rows"]
    assert [row["ref"] for row in rows] == ["mine@1", "mine@2"]
    assert [row["ref"] for row in run("list", "--fits", base, "--json")["rows"]] == ["mine@1", "mine@2"]
    assert run("list", "other*", "--json")["rows"] == []
    shown = run("show", "mine", "--json")
    assert shown["ref"] == "mine@2"
    assert shown["record"] == full
    assert "tickets" in run("show", "mine@1")
    assert "mine@2" in run("list", "--latest")
    assert "mine@1" not in run("list", "--latest")


def test_a_sibling_base_with_the_same_shapes_does_not_fit(run: Any, base: Path, adapter: Path, tmp_path: Path) -> None:
    run("register", adapter, "--name", "mine", "--base", base)
    tensors = {name: tensor + 1 for name, tensor in read_tensors(base).items()}
    sibling = write_checkpoint(tmp_path / "sibling", tensors)
    same = write_checkpoint(tmp_path / "copy", read_tensors(base))  # in one shard
    assert run("list", "--fits", sibling, "--json")["rows"] == []
    assert [row["ref"] for row in run("list", "--fits", same, "--json")["rows"]] == ["mine@1"]


def test_names_work_where_paths_do(run: Any, base: Path, adapter: Path, tmp_path: Path) -> None:
    run("register", adapter, "--name", "mine", "--base", base)
    run("register", plain_adapter(adapter, base, seed=3), "--name", "mine")
    run("tag", "mine@1", "prod")
    run("register", base, "--name", "llama", "--kind", "merged")
    assert run("inspect", "mine@2", "--json")["ref"] == "mine@2"
    assert run("inspect", "llama", "--json")["tensors"] == 11
    assert run("check", "llama", "mine@prod", "--json")["ok"]
    by_name = run("merge", "llama", "mine", "-o", tmp_path / "by-name", "--json")
    by_path = run("merge", base, adapter, "-o", tmp_path / "by-path", "--json")
    assert [used["ref"] for used in by_name["adapters"]] == ["mine@2"]
    assert by_name["touched"] == by_path["touched"] == 6
    assert read_tensors(tmp_path / "by-name").keys() == read_tensors(tmp_path / "by-path").keys()
    for file in by_path["files"]:
        assert (tmp_path / "by-name" / file).read_bytes() == (tmp_path / "by-path" / file).read_bytes()


def test_a_folder_of_that_name_comes_first(
    run: Any, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("register", adapter, "--name", "adapter")
    plain_adapter(adapter, base, rank=2)
    monkeypatch.chdir(tmp_path)
    assert run("inspect", "adapter", "--json")["ranks"] == {"2": 6}
    assert run("inspect", "adapter@1", "--json")["ranks"] == {"4": 6}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["inspect", "mine@7"], 7, "mine has no version 7"),
        (["inspect", "mine@prod"], 7, "prod"),
        (["inspect", "nobody"], 7, "a registry name"),
        (["show", "nobody"], 7, "list shows what is"),
        (["show", "../mine"], 6, "cannot be a name"),
        (["show", "MINE"], 2, "cannot be a name"),
        (["register", "{adapter}", "--name", "a/b"], 6, "cannot be a name"),
        (["register", "{adapter}", "--name", "rn\u200b"], 6, "cannot be a name"),
        (["register", "nowhere", "--name", "a"], 7, "does not exist"),
        (["register", "org/repo", "--name", "a"], 7, "pull org/repo"),
        (["register", "{adapter}", "--name", "a", "--meta", "x"], 2, "KEY=VALUE"),
        (["register", "{adapter}", "--name", "a", "--meta", "t=hf_" + "a" * 30], 6, "token"),
        (["tag", "mine@1", "3"], 2, "cannot be an alias"),
        (["tag", "mine@1", "prod", "--expect", "4"], 3, "prod"),
        (["untag", "mine", "prod"], 7, "prod"),
        (["remove", "mine"], 2, "names no"),
        (["export", "mine", "-o", "{adapter}"], 1, "exists"),
        (["export", "mine", "mine@1", "--folder", "-o", "{adapter}2"], 2, "one REF"),
        (["import", "{adapter}/adapter_config.json"], 1, "ends too early"),
        (["lineage", "mine", "--mermaid", "--json"], 2, "two forms"),
    ],
)
def test_errors_have_their_codes(
    run: Any, adapter: Path, arguments: list[str], code: int, words: str, home: Path
) -> None:
    run("register", adapter, "--name", "mine")
    before = sorted((home / "records").rglob("*"))
    given = [argument.format(adapter=adapter) for argument in arguments]
    said = run(*given, code=code)
    text = said["error"]["message"] + said["error"]["hint"] if "--json" in given else said
    assert words in text
    assert "Traceback" not in text
    assert "a" * 30 not in text
    assert sorted((home / "records").rglob("*")) == before


def test_aliases_and_removal(run: Any, base: Path, adapter: Path) -> None:
    run("register", adapter, "--name", "mine")
    run("register", plain_adapter(adapter, base, seed=3), "--name", "mine")
    assert run("tag", "mine@1", "prod", "--json")["before"] == 0
    assert run("tag", "mine@2", "prod", "--expect", 1, "--json") == {
        "name": "mine",
        "alias": "prod",
        "version": 2,
        "digest": run("show", "mine@2", "--json")["record"]["digest"],
        "before": 1,
        "moved": True,
        "held": [],
    }
    assert [row["ref"] for row in run("list", "--tag", "prod", "--json")["rows"]] == ["mine@2"]
    assert [move["version"] for move in run("tag", "mine", "prod", "--history", "--json")] == [1, 2]
    assert "untag mine prod" in run("remove", "mine@2", code=2)
    run("untag", "mine", "prod")
    assert "out of sight" in run("remove", "mine@2", "--reason", "wrong data")
    assert [row["ref"] for row in run("list", "--json")["rows"]] == ["mine@1"]
    assert [row["ref"] for row in run("list", "--all", "--json")["rows"]] == ["mine@1", "mine@2"]
    run("remove", "mine@2", "--restore")
    assert run("show", "mine", "--json")["ref"] == "mine@2"


def test_fsck_and_gc(run: Any, adapter: Path, home: Path) -> None:
    run("register", adapter, "--name", "mine")
    assert run("fsck", "--json")["clean"]
    assert run("fsck", "--reindex", "--json")["clean"]
    run("remove", "mine@1")
    assert len(run("gc", "--keep-days", 0, "--json")["blobs"]) == 2
    assert "would free 2 blobs" in run("gc", "--keep-days", 0)
    run("remove", "mine@1", "--restore")
    blob = next(path for path in (home / "objects").rglob("*") if path.is_file())
    blob.chmod(0o644)
    blob.write_bytes(b"rotten" + blob.read_bytes()[6:])
    assert "another digest" in run("fsck", code=3)
    run("fsck", "--repair", code=0)
    assert "missing" in run("show", "mine", code=1)
    (home / "records/mine/1.json").write_text("{}")
    run("fsck", "--reindex", code=3)
    assert "cannot be read" in run("list", code=1)
    run("gc", code=3)


def test_export_and_import(
    run: Any, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("register", adapter, "--name", "mine", "--base", base)
    run("tag", "mine@1", "prod")
    run("export", "mine@prod", "-o", tmp_path / "mine.bundle")
    run("export", "mine@prod", "--folder", "-o", tmp_path / "plain")
    plain = read_bytes(tmp_path / "plain", record=True)
    assert json.loads(plain.pop("adapterkit.json"))["name"] == "mine"
    assert plain == read_bytes(adapter)
    content = run("show", "mine", "--json")["content"]
    monkeypatch.setenv("ADAPTERKIT_HOME", str(tmp_path / "elsewhere"))
    assert run("import", tmp_path / "mine.bundle", "--aliases", "--json")["versions"] == [["mine@1", "mine@1", True]]
    assert run("show", "mine@prod", "--json")["content"] == content


def test_the_verbs_start_without_what_computes_or_connects(base: Path, adapter: Path, tmp_path: Path) -> None:
    script = (
        "import sys, json\nfrom adapterkit.cli import main\n"
        "heavy = ('torch', 'numpy', 'huggingface_hub', 'transformers', 'yaml')\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    try:\n        main(arguments)\n"
        "    except SystemExit as stopped:\n        assert not stopped.code, (arguments, stopped.code)\n"
        "    found = [name for name in heavy if name in sys.modules]\n    assert not found, (arguments, found)\n"
    )
    calls = [
        ["register", str(adapter), "--name", "mine", "--base", str(base)],
        ["list", "--fits", str(base)],
        ["show", "mine"],
        ["lineage", "mine"],
        ["lineage", "mine", "--mermaid"],
        ["tag", "mine@1", "prod"],
        ["inspect", "mine@prod"],
        ["check", str(base), "mine"],
        ["untag", "mine", "prod"],
        ["remove", "mine@1"],
        ["fsck"],
        ["gc"],
    ]
    environment = {**os.environ, "ADAPTERKIT_HOME": str(tmp_path / "home"), "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(calls)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr


def test_weights_are_believed_over_names(run: Any, base: Path, adapter: Path, tmp_path: Path) -> None:
    """The base has another name than the adapter's config says, and is proved to be the one that it was trained on."""
    run("register", adapter, "--name", "mine", "--base", base)
    base = base.rename(tmp_path / "renamed")
    found = run("check", base, "mine", "--json")
    assert "same-base" in {finding["code"] for finding in found["findings"]}
    assert "other-base" not in {finding["code"] for finding in found["findings"]}
    assert "other-base" in {finding["code"] for finding in run("check", base, adapter, "--json")["findings"]}
