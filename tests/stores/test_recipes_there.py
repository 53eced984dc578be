"""Recipes whose inputs and outputs lie in a store."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from models import edit_config, plain_adapter, plain_base
from store_server import Proxy, client_of, download, upload

import adapterkit
from adapterkit.errors import CheckFailed, CheckpointError, NotFound, OutputError, RecipeError, UnsafeError, UsageError
from adapterkit.recipe.run import build, plan_build

BUCKET = "models"


@pytest.fixture
def inputs(s3: Proxy, place: str, tmp_path: Path) -> Path:
    """A base and two adapters, here and below the place in the bucket."""
    base = plain_base(tmp_path / "in" / "base", shards=2)
    for seed in (1, 2):
        plain_adapter(tmp_path / "in" / f"a{seed}", base, seed=seed)
    upload(s3.server, tmp_path / "in", BUCKET, place)
    return tmp_path / "in"


def recipe(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


def in_the_bucket(s3: Proxy, prefix: str) -> dict[str, bytes]:
    return {name: data for name, data in download(s3.server, BUCKET, prefix).items() if not name.startswith(".")}


def put(s3: Proxy, key: str, data: bytes) -> None:
    client_of(s3.server).put_object(Bucket=BUCKET, Key=key, Body=data)


def steps(at: str) -> str:
    """A recipe with every kind of step below an address, or in the recipe's folder."""
    return f"""
        [adapters]
        one = "IN/a1"
        two = {{ ref = "IN/a2", weight = 0.5 }}
        made = {{ from = "both" }}
        [base]
        ref = "IN/base"
        [outputs.merged]
        path = "{at}merged"
        adapters = ["one", "two"]
        verify = "tensors"
        [outputs.f16]
        path = "{at}f16"
        adapters = ["one", "two"]
        dtype = "f16"
        [outputs.both]
        to = "adapter"
        path = "{at}both"
        adapters = ["one", "two"]
        [outputs.kohya]
        to = "kohya"
        path = "{at}one.safetensors"
        adapters = ["one"]
        [outputs.again]
        path = "{at}again"
        adapters = ["made"]
        """


def test_a_recipe_from_a_store_into_it_makes_what_one_here_makes(
    s3: Proxy, inputs: Path, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    there = f"s3://{BUCKET}/{place}"
    build(recipe(tmp_path / "here", steps("").replace("IN", str(inputs))))
    path = recipe(tmp_path / "stored", steps(f"{there}/out/").replace("IN", there))
    with pytest.raises(UnsafeError, match=r"recipe.toml:\d+: outputs.merged.path lies outside"):
        build(path)
    planned = plan_build(path, outside=True)
    assert {row.state for row in planned.outputs} == {"new"}
    assert not in_the_bucket(s3, f"{place}/out")
    made = build(path, outside=True)
    assert [row.state for row in made.outputs] == ["new"] * 5

    found = {
        name: data
        for name, data in in_the_bucket(s3, f"{place}/out/").items()
        if not name.endswith(("adapterkit.json", "adapter_config.json"))  # which name their inputs
    }
    files = [one for one in (tmp_path / "here").rglob("*") if one.is_file()]
    here = {one.relative_to(tmp_path / "here").as_posix(): one.read_bytes() for one in files}
    assert "merged/model-00001-of-00002.safetensors" in found
    assert found == {name: data for name, data in here.items() if name in found}
    weights = {name for name in here if name.endswith(".safetensors")}
    assert weights == {name for name in found if name.endswith(".safetensors")}
    assert sorted(one.name for one in (tmp_path / "stored").iterdir()) == [".adapterkit", "recipe.lock", "recipe.toml"]
    assert not [one for one in tmp_path.rglob("*") if one.name.endswith(":")]

    s3.clear()
    again = build(path, outside=True)
    assert again.changed == 0
    assert s3.up == 0
    assert build(path, outside=True, locked=True).changed == 0

    # What changes in the store is seen, and what hangs on it is made anew; nothing else is.
    changed = plain_adapter(tmp_path / "other", inputs / "base", seed=9)
    upload(s3.server, changed, BUCKET, f"{place}/a2")
    with pytest.raises(CheckFailed, match=r"s3://.*/a2/adapter_model.safetensors changed \(\d+:\w{32} -> \d+:\w{32}\)"):
        build(path, outside=True, locked=True)
    states = {row.name: row.state for row in build(path, outside=True).outputs}
    assert states == {"merged": "again", "f16": "again", "both": "again", "kohya": "unchanged", "again": "again"}
    adapterkit.merge(inputs / "base", [inputs / "a1", changed], tmp_path / "apart", weights=[1, 0.5])
    name = "model-00001-of-00002.safetensors"
    assert in_the_bucket(s3, f"{place}/out/merged/")[name] == (tmp_path / "apart" / name).read_bytes()

    # An output that somebody changed is not this recipe's any more.
    put(s3, f"{place}/out/f16/config.json", b"{}")
    assert {row.name: row.why for row in plan_build(path, outside=True).outputs}["f16"] == "changed since it was made"
    with pytest.raises(OutputError, match="exists"):
        build(path, outside=True)
    assert {row.name for row in build(path, outside=True, force=True).outputs if row.state != "unchanged"} == {"f16"}


def test_a_build_that_is_killed_when_its_output_is_there_knows_it_again(
    s3: Proxy, inputs: Path, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = f"s3://{BUCKET}/{place}"
    text = f'base = "{there}/base"\nadapters.one = "{there}/a1"\noutputs.merged.path = "{there}/out/merged"\n'
    path = recipe(tmp_path / "r", text)

    class Killed(BaseException):
        pass

    def killed(*args: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr("adapterkit.recipe.run._Build._note_made", killed)
        with pytest.raises(Killed):
            build(path, outside=True)
    before = in_the_bucket(s3, f"{place}/out/")
    assert "merged/config.json" in before
    report = build(path, outside=True)
    assert [row.state for row in report.outputs] == ["unchanged"]
    assert in_the_bucket(s3, f"{place}/out/") == before

    with monkeypatch.context() as patched:  # and one that somebody replaced before it was opened
        real = adapterkit.recipe.run.job_of  # type: ignore[attr-defined]

        def replaced(*args: Any, **how: Any) -> Any:
            put(s3, f"{place}/a1/adapter_model.safetensors", (inputs / "a2" / "adapter_model.safetensors").read_bytes())
            return real(*args, **how)

        put(s3, f"{place}/out/merged/config.json", b"{}")
        patched.setattr("adapterkit.recipe.run.job_of", replaced)
        with pytest.raises(CheckpointError, match=r"a1/adapter_model.safetensors changed after the build looked at it"):
            build(path, outside=True, force=True)


def test_files_beside_a_recipe_may_lie_in_a_store(
    s3: Proxy, inputs: Path, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bases import gguf_adapter, gguf_base

    monkeypatch.chdir(tmp_path)
    gguf_base(inputs)
    gguf_adapter(inputs)
    said = {"meta.json": '{"general.author": "one"}', "types.txt": "ffn_down=Q8_0\n"}
    for name, text in said.items():
        (inputs / name).write_text(text)
    upload(s3.server, inputs, BUCKET, place)
    there = f"s3://{BUCKET}/{place}"
    text = """
        base = "AT/base.gguf"
        adapters.one = "AT/gguf-adapter"
        [outputs.q]
        path = "OUT/q.gguf"
        quant = "Q4_0"
        metadata = "AT/meta.json"
        tensor-type-file = "AT/types.txt"
        yes-lossy = true
        """
    path = recipe(tmp_path / "r", text.replace("AT", there).replace("OUT", f"{there}/out"))
    local = recipe(tmp_path / "l", text.replace("AT", str(inputs)).replace("OUT", "."))
    build(path, outside=True)
    build(local)
    found = in_the_bucket(s3, f"{place}/out/")
    assert sorted(found) == ["q.gguf", "q.gguf.adapterkit.json"]
    assert found["q.gguf"] == (tmp_path / "l" / "q.gguf").read_bytes()
    held = json.loads(path.with_name("recipe.lock").read_text())["inputs"]
    assert held["outputs.q.metadata"]["files"]["meta.json"].startswith(f"{len(said['meta.json'])}:")

    # Such a file counts by what it holds, in a store and here.
    put(s3, f"{place}/meta.json", b'{"general.author": "two"}')
    (inputs / "meta.json").write_text('{"general.author": "two"}')
    assert [row.state for row in build(path, outside=True).outputs] == ["again"]
    assert [row.state for row in build(local).outputs] == ["again"]
    assert in_the_bucket(s3, f"{place}/out/")["q.gguf"] == (tmp_path / "l" / "q.gguf").read_bytes()
    assert b"two" in (tmp_path / "l" / "q.gguf").read_bytes()


def test_every_part_of_a_split_base_counts_and_the_config_beside_the_file_of_an_adapter(
    s3: Proxy, inputs: Path, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bases import gguf_adapter, gguf_base

    monkeypatch.chdir(tmp_path)
    adapter = gguf_adapter(inputs)
    adapterkit.convert(gguf_base(inputs), inputs / "split.gguf", max_shard_size="20kB")
    parts = sorted(inputs.glob("split-*.gguf"))
    assert len(parts) > 2
    upload(s3.server, inputs, BUCKET, place)
    there = f"s3://{BUCKET}/{place}"
    text = f"""
        base = "AT/{parts[0].name}"
        adapters.one = "AT/gguf-adapter/adapter_model.safetensors"
        [outputs.q]
        path = "OUT/q.gguf"
        quant = "F16"
        """
    path = recipe(tmp_path / "r", text.replace("AT", there).replace("OUT", f"{there}/out"))
    local = recipe(tmp_path / "l", text.replace("AT", str(inputs)).replace("OUT", "."))

    def built(state: str, name: str) -> bytes:
        for one in (path, local):
            assert [row.state for row in build(one, outside=True).outputs] == [state]
        adapterkit.merge(parts[0], adapter, tmp_path / name, quant="F16")
        made = in_the_bucket(s3, f"{place}/out/")["q.gguf"]
        assert made == (tmp_path / "l" / "q.gguf").read_bytes() == (tmp_path / name).read_bytes()
        return made

    found = [built("new", "1.gguf")]
    parts[-1].write_bytes(parts[-1].read_bytes()[:-64] + bytes(64))
    put(s3, f"{place}/{parts[-1].name}", parts[-1].read_bytes())
    found.append(built("again", "2.gguf"))
    edit_config(adapter, lora_alpha=99)
    put(s3, f"{place}/gguf-adapter/adapter_config.json", (adapter / "adapter_config.json").read_bytes())
    found.append(built("again", "3.gguf"))
    assert len(set(found)) == 3


def test_an_output_in_a_store_is_verified_with_a_page_there_registered_and_pushed(
    s3: Proxy, inputs: Path, place: str, home: Path, tmp_path: Path
) -> None:
    there = f"s3://{BUCKET}/{place}"
    text = f"""
        base = "{there}/base"
        adapters.one = "{there}/a1"
        [outputs.merged]
        path = "{there}/out/merged"
        verify = {{ level = "tensors", html = "{there}/page.html" }}
        register = "tone"
        push = "{there}/registered"
        [outputs.f16]
        path = "{there}/out/f16"
        dtype = "f16"
        push = "{there}/pushed"
        """
    path = recipe(tmp_path / "r", text)
    merged, f16 = (one.after for one in build(path, outside=True).outputs)
    assert (list(merged), list(f16)) == (["verify", "register", "push"], ["push"])
    assert b"<html" in in_the_bucket(s3, f"{place}/page.html")[""]
    made = in_the_bucket(s3, f"{place}/out/")
    record = adapterkit.registry.verbs.show("tone@1").record
    assert record.meta["from"] == f"{there}/out/merged"
    weights = [f"{name}/model-0000{part}-of-00002.safetensors" for name in ("merged", "f16") for part in (1, 2)]
    for to, name in (("registered", "merged"), ("pushed", "f16")):
        pulled = adapterkit.pull(f"{there}/{to}", home=tmp_path / to).record
        digests = {file.sha256 for file in pulled.files}
        assert {hashlib.sha256(made[one]).hexdigest() for one in weights if one.startswith(name)} <= digests
    s3.clear()
    again = build(path, outside=True)
    assert (again.changed, s3.up) == (0, 0)
    assert [one.after for one in again.outputs] == [merged, f16]
    client_of(s3.server).delete_object(Bucket=BUCKET, Key=f"{place}/page.html")
    build(path, outside=True)
    assert b"<html" in in_the_bucket(s3, f"{place}/page.html")[""]


REFUSED = {
    "ftp://h/base": (UsageError, r"recipe.toml:1: base.ref is ftp://h/base, and ftp:// is neither read nor written"),
    "s3://": (UsageError, "is no address in a store"),
    "hf://datasets/o/n": (UsageError, "hf:// is neither read nor written"),
    "s3://models/nothing-here": (NotFound, r"recipe.toml:1: nothing lies below s3://models/nothing-here/"),
}


def test_what_a_recipe_does_not_take_is_refused_by_name(s3: Proxy, inputs: Path, place: str, tmp_path: Path) -> None:
    there = f"s3://{BUCKET}/{place}"
    for ref, (kind, words) in REFUSED.items():
        path = recipe(tmp_path / "r", f'base = "{ref}"\nadapters.one = "{there}/a1"\noutputs.merged.path = "merged"\n')
        with pytest.raises(kind, match=words):
            build(path)
    wrong = {
        f'outputs.merged.path = "{there}/base"': "written in or over the input|lies in or around|what outputs.merged makes",
        f'outputs.merged.path = "{there}/base/merged"': "would be written in or over the input",
        'outputs.merged.path = "ftp://h/x"': "outputs.merged.path is ftp://h/x, and ftp:// is neither",
        f'outputs.merged.path = "{there}/x"\noutputs.other.path = "{there}/x/y"': "lies in or around where",
        'outputs.merged.path = "m.gguf"\noutputs.merged.metadata = "ftp://h/x"': "ftp:// is neither read nor written",
    }
    for line, words in wrong.items():
        path = recipe(tmp_path / "r", f'base = "{there}/base"\nadapters.one = "{there}/a1"\n{line}\n')
        with pytest.raises((RecipeError, UsageError), match=words):
            build(path, outside=True)
    path = recipe(
        tmp_path / "r", f'base = "s3://{BUCKET}"\nadapters.one = "{there}/a1"\noutputs.m.path = "{there}/m"\n'
    )
    with pytest.raises(RecipeError, match=f"would be written in or over the input s3://{BUCKET}"):
        build(path, outside=True)
    path = recipe(tmp_path / "r", f'base = "file://{inputs}/base"\nadapters.one = "{there}/a1"\noutputs.m.path = "m"\n')
    assert build(path).changed == 1
    assert not [one for one in tmp_path.rglob("*") if one.name.endswith(":")]
