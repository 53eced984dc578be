"""Every path that is taken: an address of a store works, or is refused in one sentence."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from bases import gguf_adapter, gguf_base
from models import plain_adapter, plain_base
from store_server import Proxy, client_of, download, upload

import adapterkit
from adapterkit.cli import app, main
from adapterkit.errors import AdapterkitError, CheckFailed, OutputError
from adapterkit.provenance.attest import attest
from adapterkit.provenance.register import register
from adapterkit.provenance.signing import sign, verify
from adapterkit.registry import verbs
from adapterkit.requests import every
from adapterkit.requests.option import PATH

BUCKET = "models"

# Paths of a verb that no address of a store is given for, and why (docs/stores.md says the same).
ONLY_HERE = {
    "--events": "lines are added to a file, which no object allows",
    "--summary": "lines are added to a file, which no object allows",
    "--compressor": "a program that runs here",
    "home": "the registry's folder is one of this machine; push and pull move versions",
    "--include-path": "tasks may be programs, which run here",
    "--key": "keys are read from this machine alone",
    "--sign": "keys are read from this machine alone",
    "--verify": "keys are read from this machine alone",
    "--copy": "a folder that a server reads",
    "--restart-file": "a file that a server reads",
    "demo DIR": "the example is made here",
    "doctor FOLDER": "what this machine can do is looked at",
    "build RECIPE": "its lock and its memory lie beside it",
}


def commands(command: click.Command, name: str = "") -> Iterator[tuple[str, click.Command]]:
    """Every command with its words."""
    if isinstance(command, click.Group):
        context = click.Context(command)
        for word in command.list_commands(context):
            found = command.get_command(context, word)
            assert found is not None
            yield from commands(found, f"{name} {word}".strip())
    else:
        yield name, command


def test_every_path_of_every_verb_takes_an_address_or_is_refused_by_name() -> None:
    """An option that is added tomorrow is handled, or stands in the table above."""
    from adapterkit.cli.paths import LocalPath, TargetPath

    refused = set()
    for name, command in commands(app):
        for one in command.params:
            assert type(one.type) is not click.Path, f"{name} {one.name}"
            if isinstance(one.type, LocalPath) and not isinstance(one.type, TargetPath):
                argument = isinstance(one, click.Argument)
                word = (
                    f"{name} {(one.metavar or one.name or '').strip('[]').split('.')[0]}" if argument else one.opts[0]
                )
                refused.add(word)
                with pytest.raises(
                    AdapterkitError, match=r"is s3://models/x, and s3:// is neither read nor written here"
                ):
                    one.type.convert("s3://models/x", one, None)
            if isinstance(one.type, (LocalPath, click.Path)):
                for wrong in ("ftp://h/x", "https://h/x", "S4://b/x"):
                    with pytest.raises(AdapterkitError, match=r"is neither read nor written here"):
                        one.type.convert(wrong, one, None)
    for request in every():
        for name, option in request.options().items():
            if option.kind == PATH and not option.store:
                refused.add(request.options()[name].flag or f"--{name.replace('_', '-')}" if name != "home" else name)
    assert refused == set(ONLY_HERE)
    page = (Path(__file__).parents[2] / "docs" / "stores.md").read_text()
    for word in ONLY_HERE:
        assert f"`{word}`" in page, word


@pytest.fixture
def there(s3: Proxy, place: str, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a folder with a base, an adapter, a merge, a GGUF model and its adapter, which lie in ``in`` here too."""
    monkeypatch.chdir(tmp_path)
    inputs = tmp_path / "in"
    base = plain_base(inputs / "base")
    plain_adapter(inputs / "a1", base, seed=1)
    adapterkit.merge(base, inputs / "a1", inputs / "merged")
    gguf_base(inputs)
    gguf_adapter(inputs)
    upload(s3.server, inputs, BUCKET, place)
    yield f"s3://{BUCKET}/{place}"
    assert not [one for one in tmp_path.rglob("*") if one.name.endswith(":")]


def got(s3: Proxy, at: str) -> bytes:
    key = at.removeprefix(f"s3://{BUCKET}/")
    return bytes(client_of(s3.server).get_object(Bucket=BUCKET, Key=key)["Body"].read())


def put(s3: Proxy, at: str, data: bytes) -> None:
    client_of(s3.server).put_object(Bucket=BUCKET, Key=at.removeprefix(f"s3://{BUCKET}/"), Body=data)


def run(*words: Any) -> tuple[int, str]:
    """The exit code of a command line, and what it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return int(end.value.code or 0), out.getvalue()


def test_plans_reports_and_pages_are_written_to_a_store_and_read_from_it(s3: Proxy, there: str, tmp_path: Path) -> None:
    code, said = run("merge", f"{there}/base", "in/a1", "--save-plan", f"{there}/plan.json")
    assert (code, said.count(f"plan written to {there}/plan.json")) == (0, 1)
    assert json.loads(got(s3, f"{there}/plan.json"))
    assert run("run", f"{there}/plan.json", "-o", f"{there}/by-plan", "--task", 0, "--tasks", 1)[0] == 0
    assert run("run", f"{there}/plan.json", "-o", f"{there}/by-plan", "--task", 0, "--tasks", 1)[0] == 0  # was done
    assert run("execute", f"{there}/plan.json", "-o", "by-plan", "--json")[0] == 0
    name = "model.safetensors"
    assert (
        got(s3, f"{there}/by-plan/{name}") == Path("by-plan", name).read_bytes() == Path("in/merged", name).read_bytes()
    )
    checked = ("verify", f"{there}/by-plan", "--base", "in/base", "--adapter", f"{there}/a1")
    key = f"/{there.removeprefix('s3://')}/by-plan/adapterkit.json"
    s3.rule = lambda asked: (403, "AccessDenied") if (asked.method, asked.path) == ("PUT", key) else None
    code, said = run(*checked)  # who may only read, and did not ask for it, hears of it
    assert (code, "the figures are not in the record of" in said) == (0, True)
    assert run(*checked, "--attach")[0] == 4
    s3.rule = lambda asked: (405, "MethodNotAllowed") if (asked.method, asked.path) == ("PUT", key) else None
    code, said = run(*checked)  # whatever word it refuses by
    assert (code, "the figures are not in the record of" in said) == (0, True)
    s3.rule = None
    assert run(*checked, "--no-attach")[0] == 0
    assert "verification" not in json.loads(got(s3, f"{there}/by-plan/adapterkit.json")).get("evidence", {})
    assert run(*checked, "--html", f"{there}/v.html", "--markdown", f"{there}/v.md", "-o", f"{there}/v.json")[0] == 0
    assert b"<html" in got(s3, f"{there}/v.html")
    assert json.loads(got(s3, f"{there}/v.json"))["ok"]
    assert got(s3, f"{there}/v.md")
    record = json.loads(got(s3, f"{there}/by-plan/adapterkit.json"))
    assert record["evidence"]["verification"]["tensors"]
    assert run("check", "in/base", f"{there}/a1", "--report", f"{there}/check.json")[0] == 0
    assert json.loads(got(s3, f"{there}/check.json"))["findings"]
    assert run("inspect", "in/a1", f"{there}/a1", "--compare", "--html", f"{there}/map.html")[0] == 0
    assert b"<!doctype html>" in got(s3, f"{there}/map.html")


def test_files_of_options_are_read_from_a_store(s3: Proxy, there: str, tmp_path: Path) -> None:
    put(s3, f"{there}/meta.json", b'{"general.author": "somebody"}')
    put(s3, f"{there}/types.txt", b"ffn_down=Q8_0\n")
    put(s3, f"{there}/bad.json", b"{")
    Path("meta.json").write_bytes(b'{"general.author": "somebody"}')
    Path("types.txt").write_bytes(b"ffn_down=Q8_0\n")
    asked = ("merge", "in/base.gguf", "in/gguf-adapter", "--quant", "Q4_0", "--yes-lossy")
    assert run(*asked, "-o", "here.gguf", "--metadata", "meta.json", "--tensor-type-file", "types.txt")[0] == 0
    stored = ("--metadata", f"{there}/meta.json", "--tensor-type-file", f"{there}/types.txt")
    assert run(*asked, "-o", f"{there}/x.gguf", *stored, "--for", "llama.cpp", "--attest")[0] == 0
    assert got(s3, f"{there}/x.gguf") == Path("here.gguf").read_bytes()
    assert b"./x.gguf" in got(s3, f"{there}/x.gguf.llama-server.sh")
    statement = json.loads(got(s3, f"{there}/x.gguf.adapterkit.intoto.json"))
    assert [one["name"] for one in statement["subject"]] == ["x.gguf"]
    code, said = run(*asked, "-o", "y.gguf", "--metadata", f"{there}/bad.json")
    assert code == 2
    assert f"error: {there}/bad.json is not JSON" in said
    code, said = run(*asked, "-o", "y.gguf", "--imatrix", f"{there}/none.gguf")
    assert (code, said.count(f"error: {there}/none.gguf does not exist")) == (7, 1)
    put(s3, f"{there}/none.gguf", b"GGUFoops")
    code, said = run(*asked, "-o", "y.gguf", "--imatrix", f"{there}/none.gguf")
    assert code == 1
    assert f"{there}/none.gguf" in said
    assert "Traceback" not in said


def test_a_tower_and_a_template_come_from_a_store(s3: Proxy, there: str, tmp_path: Path) -> None:
    from gguf_files import random_array, write_gguf

    from adapterkit.verbs.engines.written import template_of

    tower = write_gguf(tmp_path / "mmproj-F16.gguf", {"v.w": random_array(4, 32)}, arch="clip").read_bytes()
    put(s3, f"{there}/mmproj-F16.gguf", tower)
    asked = ("merge", f"{there}/base.gguf", f"{there}/gguf-adapter", "--quant", "F16", "--mmproj")
    # Beside its own file it stays as it is, elsewhere a copy is made.
    for out in (f"{there}/q.gguf", f"{there}/out/q.gguf"):
        code, said = run(*asked, f"{there}/mmproj-F16.gguf", "-o", out)
        assert code == 0, said
        assert got(s3, f"{out.removesuffix('q.gguf')}mmproj-F16.gguf") == tower
    code, said = run(*asked, f"{there}/mmproj-F16.gguf", "-o", f"{there}/out/r.gguf")
    assert (code, said.count(f"{there}/out/mmproj-F16.gguf exists")) == (1, 1)
    code, said = run(*asked, f"{there}/base.gguf", "-o", f"{there}/other/q.gguf")
    assert (code, said.count(f"{there}/base.gguf is no mmproj file")) == (2, 1)
    recipe = Path("recipe.toml")
    recipe.write_text(
        f'base = "{there}/base.gguf"\nadapters.one = "{there}/gguf-adapter"\n[outputs.q]\npath = "{there}/built/q.gguf"\n'
        f'quant = "F16"\nmmproj = "{there}/mmproj-F16.gguf"\n'
    )
    assert run("build", "--outside", recipe)[0] == 0
    assert got(s3, f"{there}/built/mmproj-F16.gguf") == tower
    assert run("build", "--outside", "--locked", recipe)[0] == 0

    put(s3, f"{there}/job.sh", template_of("slurm").replace("#SBATCH", "#SBATCH --comment=ours\n#SBATCH", 1).encode())
    assert run("merge", f"{there}/base", f"{there}/a1", "--save-plan", "plan.json")[0] == 0
    asked = ("run", "plan.json", "-o", f"{there}/by-slurm", "--on", "slurm", "--workers", 2, "--template")
    code, said = run(*asked, f"{there}/job.sh")
    assert code == 0, said
    assert [one for one in tmp_path.rglob("*.sh") if "#SBATCH --comment=ours" in one.read_text()]
    code, said = run(*asked, f"{there}/none.sh")
    assert (code, said.count(f"{there}/none.sh does not exist")) == (7, 1)


def test_matrices_and_texts_come_from_a_store(s3: Proxy, there: str, tmp_path: Path) -> None:
    """What transformers runs there is what it runs here: a folder, a file in it, a GGUF file."""
    pytest.importorskip("transformers")
    from test_imatrix_verb import build
    from vocab_zoo import byte_level

    from adapterkit.gguf.vocab import pretokenizers

    row = pretokenizers.row_of("qwen2")
    assert row is not None
    tokenizer = str(byte_level(pretokenizers.as_json(row), size=280).to_str())
    model = build(tmp_path / "lm" / "model", "Qwen2ForCausalLM", tokenizer)
    plain_adapter(tmp_path / "lm" / "adapter", model)
    Path("lm/text.txt").write_text("The quick brown fox jumps over 12 lazy dogs.\n" * 9)
    Path("lm/short.txt").write_text("one")
    (tmp_path / "lm" / "model" / "elsewhere").mkdir()
    Path("lm/model/elsewhere/model.safetensors").write_bytes(b"of another model")
    upload(s3.server, tmp_path / "lm", BUCKET, f"{there.removeprefix(f's3://{BUCKET}/')}/lm")
    there = f"{there}/lm"

    def measured(of: str, text: str, out: str) -> tuple[int, str]:
        return run("imatrix", of, "--text", text, "--chunk", 32, "--chunks", 2, "-o", out)

    assert measured("lm/model", "lm/text.txt", "here.gguf")[0] == 0
    for number, name in enumerate(("model", "model/model.safetensors")):
        code, said = measured(f"{there}/{name}", f"{there}/text.txt", f"{there}/{number}.gguf")
        assert code == 0, said
        assert values_of(got(s3, f"{there}/{number}.gguf")) == values_of(Path("here.gguf").read_bytes())
    code, said = measured(f"{there}/model", f"{there}/short.txt", f"{there}/x.gguf")
    assert (code, "fewer than one chunk" in said) == (2, True)
    put(s3, f"{there}/broken/config.json", b'{"model_type": "llama"}')
    put(s3, f"{there}/broken/model.safetensors", b"x")
    code, said = measured(f"{there}/broken", f"{there}/text.txt", f"{there}/x.gguf")
    assert code == 1
    assert f"{there}/broken" in said
    assert "/adapterkit-" not in said

    quantized = ("convert", "lm/model", "--quant", "Q4_0", "--imatrix")
    code, said = run(*quantized, f"{there}/0.gguf", "-o", f"{there}/q.gguf")
    assert code == 0, said
    assert run(*quantized, "here.gguf", "-o", "q.gguf")[0] == 0
    assert values_of(got(s3, f"{there}/q.gguf")) == values_of(Path("q.gguf").read_bytes())
    fed = ("--quant", "nf4", "--yes-lossy", "--rounding", "feedback", "--calibration")
    for out, base, text in (
        (f"{there}/fed", f"{there}/model", f"{there}/text.txt"),
        ("fed", "lm/model", "lm/text.txt"),
    ):
        code, said = run("merge", base, "lm/adapter", "-o", out, *fed, text)
        assert code == 0, said
    assert got(s3, f"{there}/fed/model.safetensors") == Path("fed/model.safetensors").read_bytes()


def values_of(data: bytes) -> dict[str, bytes]:
    """The tensors of a GGUF file, whatever it says of where they come from."""
    import gguf

    path = Path("read.gguf")
    path.write_bytes(data)
    return {one.name: one.data.tobytes() for one in gguf.GGUFReader(path).tensors}


def test_versions_come_from_a_store(s3: Proxy, there: str, home: Path) -> None:
    here = register("in/a1", "here", base="in/base").record
    killed = home / "pulling" / "adapterkit-abcd_123"
    killed.mkdir(parents=True)
    (killed / "model.safetensors").write_bytes(b"half")
    for one in (killed / "model.safetensors", killed):
        os.utime(one, (0, 0))
    fetching = home / "pulling" / "adapterkit-efgh_456"  # a folder keeps its time while a file in it grows
    fetching.mkdir()
    (fetching / "model.safetensors").write_bytes(b"half")
    os.utime(fetching, (0, 0))
    stored = register(f"{there}/a1", "there", base=f"{there}/base").record
    assert (stored.content, stored.base, stored.kind) == (here.content, here.base, here.kind)
    assert stored.meta["from"] == f"{there}/a1"
    assert register(f"{there}/a1", "own", base="in/base", meta={"from": "us"}).record.meta["from"] == "us"
    assert [(one.path, one.sha256) for one in stored.files] == [(one.path, one.sha256) for one in here.files]
    assert list((home / "pulling").iterdir()) == [fetching]
    merged = register(f"{there}/merged", "merged").record
    assert merged.operation is not None
    assert merged.operation.name == "merge"
    put(s3, f"{there}/merged/model.safetensors", Path("in/base/model.safetensors").read_bytes())
    with pytest.raises(CheckFailed, match=rf"{re.escape(there)}/merged.* describes other weights"):
        register(f"{there}/merged", "merged")
    put(s3, f"{there}/results.json", b'{"acc": 0.5, "n": 10}')
    assert run("evidence", "add", "there@1", f"{there}/results.json")[0] == 0
    assert run("export", "there@1", "-o", f"{there}/b.bundle")[0] == 0
    with pytest.raises(OutputError, match=r"b.bundle exists"):
        adapterkit.registry.bundle.export_bundle(("there@1",), adapterkit.places.address_of(f"{there}/b.bundle"))  # type: ignore[arg-type]
    other = home.parent / "other"
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("ADAPTERKIT_HOME", str(other))
        assert run("import", f"{there}/b.bundle")[0] == 0
        assert verbs.show("there@1").record.content == here.content
    assert run("push", f"{there}/a1", f"{there}/remote", "--tag", "v1")[0] == 0
    for verb in ("show", "lineage", "tag"):
        code, said = run(verb, f"{there}/a1", *(("prod",) if verb == "tag" else ()))
        assert code in (2, 6)
        assert "is an address, and a name of the registry is wanted; register it" in said
    code, said = run("evaluate", f"{there}/merged", "--tasks", "arc_easy")
    assert (code, said.count(f"{there}/merged is in a store; register it")) == (2, 1)


def test_outputs_in_a_store_are_attested_and_signed(s3: Proxy, there: str, tmp_path: Path) -> None:
    pytest.importorskip("model_signing")
    from test_signing import key_pair

    attest("in/merged", ["in/base"])
    made = attest(f"{there}/merged", [f"{there}/base"])
    assert str(made.path) == f"{there}/merged/adapterkit.intoto.json"
    assert got(s3, str(made.path)) == Path("in/merged/adapterkit.intoto.json").read_bytes()
    private, public = key_pair(tmp_path)
    signed = sign(f"{there}/merged", private)
    assert str(signed.signature) == f"{there}/merged/model.sig"
    sign("in/merged", private)
    assert verify(f"{there}/merged", public).files == verify("in/merged", public).files
    put(s3, f"{there}/merged/config.json", b"{}")
    with pytest.raises(CheckFailed, match=re.escape(f"{there}/merged")):
        verify(f"{there}/merged", public)
    assert os.listdir(tmp_path / "in" / "merged")

    # A file lies among others, and what bears its name is its own.
    file = f"{there}/alone/q.gguf"
    assert run("merge", f"{there}/base.gguf", f"{there}/gguf-adapter", "--quant", "F16", "-o", file, "--attest")[0] == 0
    put(s3, f"{there}/alone/q.gguf-other", b"x")
    put(s3, f"{there}/alone/other.gguf", b"x")
    alone = sign(file, private)
    assert (str(alone.signature), str(alone.statements)) == (f"{file}.model.sig", f"{file}.adapterkit.intoto.jsonl")
    assert verify(file, public).files == 3  # with its record and its statement
    stored = register(file, "alone").record
    assert stored.operation is not None
    assert "q.gguf" in {one.path for one in stored.files}
    assert not {"q.gguf-other", "other.gguf"} & {one.path for one in stored.files}
    put(s3, file, got(s3, file) + b"x")
    with pytest.raises(CheckFailed, match=re.escape(file)):
        verify(file, public)
    assert download(s3.server, BUCKET, f"{there.removeprefix('s3://models/')}/merged/")["model.sig"]
