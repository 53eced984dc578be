"""Addresses that are no paths: refused by name, on every door, and no folder of that name is made."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from models import plain_adapter, plain_base

import adapterkit
from adapterkit.cli import app, main
from adapterkit.cli.complete import Reference
from adapterkit.cli.paths import FILE_THERE, OUT_THERE
from adapterkit.errors import AdapterkitError, UsageError
from adapterkit.places import BUCKET, HUB, OCI, Address, address_of, local, readable, remote_of, writable
from adapterkit.provenance.signable import signable
from adapterkit.registry.bundle import export_bundle
from adapterkit.stores.files import brought

ADDRESSES = (
    "r2://models/out",
    "gcs:/models/out",
    "hf://datasets/org/x",
    "oci://localhost:5000/x",
    "https://a.b/c",
    "OCI:/x",
)


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize(
    "verb",
    [
        ("merge", "base", "adapter", "-o"),
        ("convert", "base", "--to", "f16", "-o"),
        ("combine", "adapter", "-o"),
        ("resize", "adapter", "--rank", "1", "-o"),
        ("inspect",),
        ("merge", "base", "adapter", "--save-plan"),
    ],
    ids=lambda verb: f"{verb[0]}{verb[-1]}",
)
def test_an_address_is_refused(address: str, verb: tuple[str, ...], tmp_path: Path) -> None:
    plain_adapter(tmp_path / "adapter", plain_base(tmp_path / "base"))
    before = sorted(tmp_path.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-m", "adapterkit", *verb, address], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert f"{address.partition(':')[0]}:// is neither read nor written here" in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


ALSO = {
    *("inspect refs", "inspect base", "imatrix model", "attest inputs", "remake base", "serve-args base"),
    *("push repo", "pull repo", "gc uploads"),
}
"""Beside what has the type of a path: parameters that take a path as well as a name."""
LATER = {"remake base", "serve-args base", "attest inputs"}
"""Looked at when there is a version or an output that they belong to."""
GIVEN = {
    "base": "base",
    "src": "base",
    "tuned": "base",
    "merged": "base",
    "adapters": "adapter",
    "adapter": "adapter",
    "path": "adapter",
    "target": "adapter",
    "refs": "adapter",
    "ref": "tickets",
    "plan": "plan.json",
    "out": "out",
    "key": "k.pem",
    "rank": "1",
    "server": "vllm",
    "tasks": "arc_easy",
    "repo": "oci://127.0.0.1:1/x",
}
"""What is given for what a command cannot do without; a file of words for anything else."""
MORE = {"imatrix model": ["--text", "t.txt"], "inspect html": ["--compare", "base"]}


def doors(command: click.Command, words: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Every parameter that takes a path, and a command line with ``{}`` in its place."""
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            found = command.get_command(click.Context(command), name)
            assert found is not None
            yield from doors(found, [*words, name])
        return
    for one in command.params:
        name = f"{' '.join(words)} {one.name}"
        if not isinstance(one.type, (click.Path, Reference)) and name not in ALSO:
            continue
        line = [*words, *MORE.get(name, ())]
        for other in command.params:
            if other is one or other.required:
                value = "{}" if other is one else GIVEN.get(str(other.name), "t.txt")
                line += [value] if isinstance(other, click.Argument) else [other.opts[0], value]
        yield name, line


def test_every_parameter_that_takes_a_path_refuses_an_address(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of every command, from the tables that make them: a new option is held too."""
    monkeypatch.chdir(tmp_path)
    plain_adapter(Path("adapter"), plain_base(Path("base")))
    for name in ("k.pem", "t.txt"):
        Path(name).write_text("{}")
    adapterkit.merge("base", "adapter", save_plan="plan.json")
    before, seen = sorted(tmp_path.rglob("*")), set()
    for name, line in doors(app, []):
        seen.add(name)
        if name in LATER:
            continue
        with pytest.raises(SystemExit) as end:
            main(["r2:/bucket/x" if word == "{}" else word for word in line])
        said = capsys.readouterr().err
        assert (end.value.code, "r2:/" in said) == (2, True), (name, line, said)
    assert sorted(tmp_path.rglob("*")) == before
    assert len(seen) > 80
    assert seen >= ALSO | LATER
    with pytest.raises(UsageError, match="the bundle is"):
        export_bundle(("tickets",), Path("r2://models/x"), home=home)
    with pytest.raises(UsageError, match="what is signed is"), signable("r2://models/x"):
        pass


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("s3://b/k/x", Address("s3", "b", "k/x")),
        ("S3://b/k/", Address("s3", "b", "k")),
        (Path("s3://b/k"), Address("s3", "b", "k")),
        ("gs://b", Address("gs", "b", "")),
        ("az://c/m.gguf", Address("az", "c", "m.gguf")),
        ("a/b", None),
        ("hf://org/name", None),
        ("s3:", None),
    ],
)
def test_addresses_of_stores(given: str | Path, address: Address | None) -> None:
    assert address_of(given) == address


@pytest.mark.parametrize("given", ["s3://", "s3:///x", "s3://b/../x", "s3://b/a//b", "s3://b/\x07", "s3://b/a\\b"])
def test_what_no_store_can_have_is_no_address(given: str) -> None:
    with pytest.raises(UsageError, match="no address in a store"):
        address_of(given)


@pytest.mark.parametrize("out", ["gs://models", "az://models/", "s3://b"])
def test_a_whole_bucket_is_no_output(out: str) -> None:
    with pytest.raises(UsageError, match=r"a whole bucket; name a folder in it"):
        writable(out, "-o")
    for kind, words in ((OUT_THERE, "name a folder in it"), (FILE_THERE, "name a file in it")):
        with pytest.raises(UsageError, match=f"this is {out.rstrip('/')}, a whole bucket; {words}"):
            kind.convert(out, None, None)


def test_a_file_by_its_scheme_is_read_where_it_lies(tmp_path: Path) -> None:
    assert brought(f"file://{tmp_path}/a%20b.txt") == tmp_path / "a b.txt"
    with pytest.raises(UsageError, match="ftp:// is neither read nor written"):
        brought("ftp://h/x")


def test_an_address_has_the_parts_of_a_path() -> None:
    address = Address("s3", "b", "k/m-Q8.gguf")
    assert (address.name, address.stem, address.suffix) == ("m-Q8.gguf", "m-Q8", ".gguf")
    assert str(address.with_name("x") / "y") == "s3://b/k/x/y"
    assert str(Address("s3", "b", "").parent) == "s3://b"


def test_a_model_on_the_hub_by_its_scheme() -> None:
    assert readable("hf://org/name@main", "base") == "hf://org/name@main"
    for other in ("hf://datasets/org/x", "hf://spaces/org/x", "hf://"):
        with pytest.raises(UsageError, match="hf:// is neither read nor written"):
            readable(other, "base")


def test_a_recipe_and_python_refuse_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_adapter(tmp_path / "adapter", plain_base(tmp_path / "base"))
    recipe = tmp_path / "adapterkit.toml"
    recipe.write_text('base = "base"\nadapters.a = "adapter"\noutputs.m = "r2://models/out"\n')
    with pytest.raises(AdapterkitError, match=r"adapterkit.toml:3: .*r2:// is neither read nor written"):
        adapterkit.build(recipe)
    recipe.write_text('base = "base"\nadapters.a = "r2://models/a"\noutputs.m = "m"\n')
    with pytest.raises(AdapterkitError, match=r"adapterkit.toml:2: .*r2:// is neither read nor written"):
        adapterkit.build(recipe)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="oci://"):
        adapterkit.merge("base", "adapter", "oci://models/out")
    with pytest.raises(UsageError, match="oci://"):
        adapterkit.merge("oci://models/base", "adapter", "out")
    assert not [path for path in tmp_path.iterdir() if ":" in path.name]


@pytest.mark.parametrize(
    ("given", "there"),
    [("file:///a/b%20c", "/a/b c"), ("a/b", "a/b"), ("org/name@main", "org/name@main"), (Path("x"), Path("x"))],
)
def test_what_is_a_path_stays_one(given: str | Path, there: str | Path) -> None:
    assert local(given, "out") == there


def test_a_folder_of_that_name_that_is_there_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "s3:").mkdir()
    plain_base(tmp_path / "s3:/base")
    monkeypatch.chdir(tmp_path)
    assert adapterkit.open("s3:/base").ref == "s3:/base"


@pytest.mark.parametrize("verb", ["inspect", "check", "merge", "register", "sign", "evaluate"])
def test_the_home_of_a_user_who_is_not_there(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = {
        "check": ["base"],
        "merge": ["adapter", "-o", str(tmp_path / "out")],
        "register": ["--name", "x"],
        "sign": ["--key", "k"],
        "evaluate": ["--tasks", "x"],
    }
    with pytest.raises(SystemExit) as end:
        main([verb, "~nobody-here/model", *more.get(verb, [])])
    assert end.value.code == 2
    assert "no such user" in capsys.readouterr().err
    assert local("~", "x") == "~"
    assert list(tmp_path.iterdir()) == []


def test_the_kinds_of_remotes() -> None:
    assert remote_of("org/name@v1") == (HUB, "org/name@v1")
    assert remote_of("hf://org/name@v1") == (HUB, "org/name@v1")
    assert remote_of("OCI://localhost:5000/x:v1") == (OCI, "oci://localhost:5000/x:v1")
    for bucket in ("s3://models", "gs://models", "az://models", "hf://buckets/org/models"):
        assert remote_of(f"{bucket}/x@v1") == (BUCKET, f"{bucket}/x@v1")


@pytest.mark.parametrize("verb", ["push", "pull"])
@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("ftp://host/x", "is not a remote"),
        ("https://huggingface.co/org/name", "is not a remote"),
        ("hf://datasets/org/x", "is not a model repository or a bucket of the Hub"),
    ],
)
def test_what_is_no_remote_is_refused(address: str, said: str, verb: str, home: Path) -> None:
    with pytest.raises(UsageError, match=said):
        adapterkit.pull(address) if verb == "pull" else adapterkit.push("x", address)


def test_an_option_of_another_kind_of_remote_is_refused(home: Path) -> None:
    with pytest.raises(UsageError, match="share_with='base' is for OCI registries, and s3://b/x is not"):
        adapterkit.push("x", "s3://b/x", share_with=["base", "other"])
    with pytest.raises(UsageError, match="create_pr=True is for the Hub, and s3://b/x is not"):
        adapterkit.push("x", "s3://b/x", create_pr=True)
    with pytest.raises(UsageError, match="move_tag=True is for OCI registries and buckets, and org/x is not"):
        adapterkit.push("x", "org/x", move_tag=True)
    with pytest.raises(UsageError, match=r"verify=.* is for OCI registries, and hf://org/x is not"):
        adapterkit.pull("hf://org/x", verify="key.pem")


def test_a_model_repository_as_an_output_is_refused_with_the_word_that_fills_it() -> None:
    with pytest.raises(UsageError) as refused:
        writable("hf://org/name", "the output")
    assert refused.value.hint == "write a folder here, then: adapterkit push FOLDER org/name"
    with pytest.raises(UsageError) as refused:
        writable("hf://datasets/org/name", "the output")
    assert refused.value.hint is not None
    assert "push" not in refused.value.hint
