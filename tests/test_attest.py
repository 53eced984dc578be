"""What every verb leaves beside its output: a record, and on demand a statement in the published form of in-toto and SLSA.

The statements are read by the in-toto project's own protocol buffers, which refuse every field they do not know.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from models import plain_adapter, plain_base, read_bytes

import adapterkit
from adapterkit.cli import main
from adapterkit.errors import CheckFailed, NotFound, UsageError
from adapterkit.provenance.attest import attest
from adapterkit.provenance.register import register
from adapterkit.registry import lineage

pytest.importorskip(
    "in_toto_attestation", reason="in-toto's own structures are missing: pip install 'adapterkit[test]'"
)

SCHEMA = json.loads((Path(adapterkit.__file__).parent / "registry/record.schema.json").read_text())


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADAPTERKIT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def run(*arguments: object, code: int = 0) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert stopped.value.code == code


def checked(path: Path) -> Any:
    """The statement, after in-toto's and SLSA's own structures have taken it."""
    from google.protobuf.json_format import ParseDict
    from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
    from in_toto_attestation.v1 import statement_pb2
    from in_toto_attestation.v1.resource_descriptor import ResourceDescriptor
    from in_toto_attestation.v1.statement import Statement

    found = json.loads(path.read_text())
    renamed = {("type" if key == "_type" else key): value for key, value in found.items()}
    Statement.copy_from_pb(ParseDict(renamed, statement_pb2.Statement())).validate()
    provenance = ParseDict(found["predicate"], provenance_pb2.Provenance())
    assert provenance.build_definition.build_type
    assert provenance.run_details.builder.id
    for one in [*provenance.build_definition.resolved_dependencies, *provenance.run_details.byproducts]:
        ResourceDescriptor.copy_from_pb(one).validate()
    assert found["predicateType"] == "https://slsa.dev/provenance/v1"
    return found


def digests(found: Any) -> dict[str, str]:
    """name -> sha256 of all dependencies that have one."""
    dependencies = found["predicate"]["buildDefinition"]["resolvedDependencies"]
    return {one["name"]: one["digest"]["sha256"] for one in dependencies if "sha256" in one.get("digest", {})}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return plain_base(tmp_path / "base-7b", shards=2)


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return plain_adapter(tmp_path / "tone", base)


def test_a_merge_by_its_inputs(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = plain_adapter(tmp_path / "policy", base, seed=3)
    out = tmp_path / "out"
    run("merge", base, adapter, other, "-o", out, "--weight", 0.5, "--weight", 2, "--dtype", "f32", "--attest")
    found = checked(out / "adapterkit.intoto.json")
    # Every file but the record itself, by the digest that sha256sum gives.
    assert {one["name"]: one["digest"]["sha256"] for one in found["subject"]} == {
        path.name: sha256(path) for path in out.iterdir() if not path.name.startswith("adapterkit.")
    }
    build = found["predicate"]["buildDefinition"]
    assert build["buildType"] == "urn:adapterkit:build:merge:v1"
    assert build["externalParameters"]["dtype"] == "f32"
    assert build["externalParameters"]["inputs"] == [
        {"role": "base", "name": "base-7b"},
        {"role": "adapter", "name": "tone", "weight": 0.5},
        {"role": "adapter", "name": "policy", "weight": 2.0},
    ]
    assert digests(found) == {
        f"{folder.name}/{path.name}": sha256(path) for folder in (base, adapter, other) for path in folder.iterdir()
    }
    run_details = found["predicate"]["runDetails"]
    assert run_details["builder"]["version"] == {"adapterkit": adapterkit.__version__}
    assert run_details["byproducts"][0]["digest"] == {"sha256": sha256(out / "adapterkit.json")}
    assert "metadata" not in run_details  # no time is stated unless SOURCE_DATE_EPOCH is set
    text = (out / "adapterkit.intoto.json").read_text()
    assert str(tmp_path) not in text
    assert os.uname().nodename not in text


def gguf_base(folder: Path) -> Path:
    sys.path.insert(0, str(Path(__file__).parent / "gguf"))
    from gguf_files import write_gguf
    from test_gguf_outputs import HEADS, OTHERS, tensors

    return write_gguf(folder / "base.gguf", tensors(), metadata={**HEADS, **OTHERS})


def gguf_adapter(folder: Path) -> Path:
    import torch
    from models import write_adapter

    generator = torch.Generator().manual_seed(3)
    key = "base_model.model.model.layers.0.self_attn.q_proj"
    shapes = {f"{key}.lora_A.weight": (4, 64), f"{key}.lora_B.weight": (64, 4)}
    return write_adapter(
        folder / "tone-64", {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    )


Verb = Callable[[Path, Path, Path], list[object]]
VERBS: dict[str, tuple[str, str, Verb]] = {
    "merge": ("out", "merged", lambda t, b, a: ["merge", b, a]),
    "merge, nf4": ("out", "quantized", lambda t, b, a: ["merge", b, a, "--quant", "nf4"]),
    "combine": (
        "out",
        "combined",
        lambda t, b, a: ["combine", a, plain_adapter(t / "two", b, seed=5), "--method", "cat"],
    ),
    "resize": ("out", "adapter", lambda t, b, a: ["resize", a, "--rank", 2]),
    "extract": ("out", "adapter", lambda t, b, a: ["extract", b, merged(t, b, a), "--rank", 2]),
    "convert to mlx": ("out", "adapter", lambda t, b, a: ["convert", a, "--to", "mlx"]),
    "convert to plain": ("out", "adapter", lambda t, b, a: ["convert", a, "--to", "peft", "--plain"]),
    "convert to gguf": ("out.gguf", "converted", lambda t, b, a: ["convert", gguf_base(t)]),
    "convert to Q8_0": ("out.gguf", "quantized", lambda t, b, a: ["convert", gguf_base(t), "--quant", "Q8_0"]),
    "merge to gguf": ("out.gguf", "merged", lambda t, b, a: ["merge", gguf_base(t), gguf_adapter(t)]),
    "convert to gguf-lora": (
        "out-lora.gguf",
        "adapter",
        lambda t, b, a: ["convert", gguf_adapter(t), "--to", "gguf-lora", "--base", gguf_base(t)],
    ),
}


def merged(folder: Path, base: Path, adapter: Path) -> Path:
    adapterkit.merge(base, [adapter], folder / "tuned", dtype="f32")
    return folder / "tuned"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_leaves_a_record_that_registers(verb: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    name, kind, arguments = VERBS[verb]
    asked = arguments(tmp_path, base, adapter)
    out = tmp_path / name
    run(*asked, "-o", out, "--attest")
    beside = out / "adapterkit.json" if out.is_dir() else out.with_name(f"{name}.adapterkit.json")
    record = json.loads(beside.read_text())
    jsonschema.validate(record, SCHEMA)
    assert (record["kind"], record["operation"]["name"]) == (kind, str(asked[0]))
    assert record["parents"]
    assert all(parent["content"] or parent["identity"] for parent in record["parents"])
    assert str(tmp_path) not in json.dumps(record)
    statement = out / "adapterkit.intoto.json" if out.is_dir() else out.with_name(f"{name}.adapterkit.intoto.json")
    found = checked(statement)
    assert [one["name"] for one in found["subject"]] or out.is_file()
    # Every input is named by the sha256 of its files.
    inputs = [path for path in map(Path, map(str, asked[1:])) if path.exists()]
    files = [file for path in inputs for file in ([path] if path.is_file() else path.iterdir())]
    wanted = {sha256(file) for file in files if not file.name.startswith("adapterkit.")}
    assert wanted <= set(digests(found).values())
    # And the record is taken over when the output is registered, so that its lineage is known.
    registered = register(out, "made").record
    assert (registered.kind, registered.operation.name) == (kind, str(asked[0]))  # type: ignore[union-attr]
    assert len(lineage.lineage("made").edges) == len(record["parents"])


def test_the_same_run_gives_the_same_statement(base: Path, adapter: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        run("merge", base, adapter, "-o", tmp_path / name, "--attest")
    assert (tmp_path / "one/adapterkit.intoto.json").read_bytes() == (
        tmp_path / "two/adapterkit.intoto.json"
    ).read_bytes()


def test_a_time_is_stated_where_it_is_given(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1760000000")
    run("merge", base, adapter, "-o", tmp_path / "out", "--attest")
    details = checked(tmp_path / "out/adapterkit.intoto.json")["predicate"]["runDetails"]
    assert details["metadata"] == {"finishedOn": "2025-10-09T08:53:20Z"}


def test_registered_inputs_are_found_by_themselves(base: Path, adapter: Path, tmp_path: Path) -> None:
    register(adapter, "tone", base=base)
    adapterkit.merge(base, ["tone"], tmp_path / "out")
    made = attest(tmp_path / "out")
    found = checked(made.path)
    assert digests(found) == {f"tone@1/{path.name}": sha256(path) for path in adapter.iterdir()}
    # The base is named by its identity: nobody said where it is.
    first = found["predicate"]["buildDefinition"]["resolvedDependencies"][0]
    assert first["annotations"]["role"] == "base"
    assert len(first["annotations"]["sampled"]) == 64


def test_a_hub_base_is_named_by_its_commit(tmp_path: Path, base: Path, adapter: Path) -> None:
    from adapterkit.provenance.attest import statement
    from adapterkit.registry.identity import Identity
    from adapterkit.registry.record import FileEntry, Operation, Parent, Record

    identity = Identity("org/base", "a" * 40, (("model.safetensors", "b" * 64),))
    parent = Parent("base", identity=identity, label=identity.label)
    file = FileEntry("model.safetensors", 1, "c" * 64)
    record = Record("merged", (file,), operation=Operation("merge"), parents=(parent,))
    found = statement(record, [file], b"{}", [()])
    one, two = found["predicate"]["buildDefinition"]["resolvedDependencies"]
    assert (one["uri"], one["digest"]) == (f"pkg:huggingface/org/base@{'a' * 40}", {"gitCommit": "a" * 40})
    assert (two["name"], two["digest"]) == ("org/base@aaaaaaa/model.safetensors", {"sha256": "b" * 64})


def test_what_cannot_be_attested(base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"adapterkit\.json does not exist"):
        attest(adapter)
    with pytest.raises(NotFound, match="nowhere does not exist"):
        attest(tmp_path / "nowhere")
    adapterkit.combine([adapter, adapter], tmp_path / "out", method="cat")
    with pytest.raises(UsageError, match="base-7b is none of what the record names"):
        attest(tmp_path / "out", [adapter, base])
    weights = tmp_path / "out/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    before = read_bytes(tmp_path / "out", record=True)
    with pytest.raises(CheckFailed, match=r"describes another adapter_model\.safetensors"):
        attest(tmp_path / "out")
    assert read_bytes(tmp_path / "out", record=True) == before


def test_nothing_heavy_is_imported(base: Path, adapter: Path, tmp_path: Path) -> None:
    adapterkit.combine([adapter, adapter], tmp_path / "out", method="cat")
    code = (
        "import sys; from adapterkit.provenance.attest import attest; attest(sys.argv[1]);"
        "print([m for m in ('torch', 'transformers', 'numpy', 'sigstore') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
