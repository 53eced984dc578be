"""Push and pull of OCI artifacts, against a real registry, and against one that goes wrong."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from models import plain_adapter, plain_base, read_bytes
from registries import PASSWORD, Proxy, docker_registry, proxied

from adapterkit.cli import main
from adapterkit.errors import (
    AdapterkitError,
    AuthError,
    CheckFailed,
    NotFound,
    OutputError,
    ServerError,
    UnsafeError,
    UsageError,
)
from adapterkit.oci.client import OciRegistry
from adapterkit.oci.pull import pull_oci
from adapterkit.oci.push import push_oci
from adapterkit.oci.reference import parse_oci
from adapterkit.provenance.register import register
from adapterkit.registry import verbs
from adapterkit.registry.canonical import canonical
from adapterkit.registry.checkout import checkout


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("registry")


@pytest.fixture(scope="module")
def host(stored: Path) -> Iterator[str]:
    with docker_registry(stored) as found:
        yield found


@pytest.fixture
def proxy(host: str) -> Iterator[Proxy]:
    with proxied(host) as found:
        yield found


@pytest.fixture
def tickets(home: Path, tmp_path: Path) -> Path:
    """A registered adapter with a licence and a card; its folder."""
    base = plain_base(tmp_path / "base")
    folder = plain_adapter(tmp_path / "a1", base, base_model_name_or_path="org/base")
    (folder / "README.md").write_text("# Tickets\n")
    (folder / "LICENSE").write_text("do as you like\n")
    register(folder, "tickets", base=base)
    return folder


def elsewhere(tmp_path: Path, address: str, **more: Any) -> Any:
    return pull_oci(address, home=tmp_path / "elsewhere", **more)


def raw(registry: OciRegistry, layers: list[dict[str, Any]], tag: str = "bad", **more: Any) -> str:
    """A manifest by hand; its address."""
    config = b"{}"
    digest = hashlib.sha256(config).hexdigest()
    registry.put_blob(digest, len(config), config)
    value = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json"}
    value |= {"config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": f"sha256:{digest}", "size": 2}}
    registry.put_manifest(tag, canonical({**value, "layers": layers, **more}))
    return f"oci://{registry.reference.host}/{registry.reference.name}:{tag}"


def blob(registry: OciRegistry, data: bytes, path: str | None, **more: Any) -> dict[str, Any]:
    digest = hashlib.sha256(data).hexdigest()
    registry.put_blob(digest, len(data), data)
    notes = {} if path is None else {"annotations": {"org.cncf.model.filepath": path}}
    row = {"mediaType": "application/vnd.cncf.model.weight.v1.raw", "digest": f"sha256:{digest}", "size": len(data)}
    return {**row, **notes, **more}


def test_pushed_here_and_pulled_there_it_is_the_same_version(host: str, tickets: Path, tmp_path: Path) -> None:
    record = verbs.show("tickets").record
    done = push_oci("tickets", f"oci://{host}/team/tickets:v1")
    assert done.new
    assert set(done.uploaded) >= {"adapter_model.safetensors", "adapter_config.json", "README.md", "LICENSE"}
    found = elsewhere(tmp_path, f"oci://{host}/team/tickets:v1")
    assert (found.record.content, found.record.base) == (record.content, record.base)
    assert found.record.meta["oci"] == f"oci://{host}/team/tickets@sha256:{done.digest}"
    folder = checkout(found.record.ref, home=tmp_path / "elsewhere")
    assert read_bytes(folder) == read_bytes(tickets)
    again = push_oci("tickets", f"oci://{host}/team/tickets:v1")
    assert (again.new, again.digest, again.sent) == (False, done.digest, 0)
    by_digest = elsewhere(tmp_path, found.address)
    assert (by_digest.new, by_digest.record.ref) == (False, found.record.ref)
    # From there to a second registry's name: the same artifact, by digest.
    moved = push_oci("tickets", f"oci://{host}/mirror/tickets:v1", home=tmp_path / "elsewhere")
    assert moved.digest == done.digest


def test_it_is_a_modelpack_that_other_tools_read_and_copy(host: str, tickets: Path, tmp_path: Path) -> None:
    """github.com/modelpack/model-spec: docs/config.md, schema/config-schema.json, specs-go/v1/mediatype.go."""
    jsonschema = pytest.importorskip("jsonschema")
    done = push_oci("tickets", f"oci://{host}/team/pack:v1")
    registry = OciRegistry(parse_oci(f"oci://{host}/team/pack:v1"))
    manifest = registry.manifest("v1")
    assert manifest is not None
    value = manifest.value
    assert value["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert value["config"]["mediaType"] == "application/vnd.cncf.model.config.v1+json"
    kinds = {
        row["annotations"]["org.cncf.model.filepath"]: row["mediaType"].split(".model.")[1] for row in value["layers"]
    }
    assert kinds["adapter_model.safetensors"] == "weight.v1.raw"
    assert kinds["adapter_config.json"] == "weight.config.v1.raw"
    assert kinds["LICENSE"] == kinds["README.md"] == "doc.v1.raw"
    assert all(
        row["annotations"]["org.opencontainers.image.title"] == row["annotations"]["org.cncf.model.filepath"]
        for row in value["layers"]
    )
    config = json.loads(registry.read_blob(value["config"]["digest"][7:], value["config"]["size"]))
    jsonschema.validate(
        config,
        {
            "type": "object",
            "required": ["descriptor", "config", "modelfs"],
            "additionalProperties": False,
            "properties": {
                "descriptor": {"type": "object", "properties": {"name": {"minLength": 1}}},
                "config": {"type": "object", "properties": {"format": {"enum": ["safetensors"]}}},
                "modelfs": {
                    "type": "object",
                    "required": ["type", "diffIds"],
                    "additionalProperties": False,
                    "properties": {"type": {"enum": ["layers"]}, "diffIds": {"minItems": len(value["layers"])}},
                },
            },
        },
    )
    assert config["modelfs"]["diffIds"] == [row["digest"] for row in value["layers"]]
    skopeo = shutil.which("skopeo")
    if skopeo is None:
        pytest.skip("skopeo is not installed (a package of Debian)")
    source = f"docker://{host}/team/pack:v1"
    seen = subprocess.run(
        [skopeo, "inspect", "--raw", "--tls-verify=false", source], capture_output=True, check=True, timeout=60
    )
    assert hashlib.sha256(seen.stdout).hexdigest() == done.digest
    copy = [
        "copy",
        "-q",
        "--src-tls-verify=false",
        "--dest-tls-verify=false",
        source,
        f"docker://{host}/copied/pack:v1",
    ]
    subprocess.run([skopeo, "--insecure-policy", *copy], check=True, timeout=900, capture_output=True)
    assert elsewhere(tmp_path, f"oci://{host}/copied/pack@sha256:{done.digest}").new


def test_files_that_are_there_are_not_sent_again(host: str, tickets: Path, tmp_path: Path) -> None:
    """A base, and what was made of it, share blobs in one repository, and in two where that is asked for."""
    base = plain_base(tmp_path / "shared", shards=2)
    register(base, "model", kind="merged")
    first = push_oci("model", f"oci://{host}/org/model:v1")
    shard = base / "model-00002-of-00002.safetensors"
    from models import read_tensors
    from safetensors.torch import save_file

    tensors = {name: tensor + 1 for name, tensor in read_tensors(base).items()}
    names = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    changed = {name: tensor for name, tensor in tensors.items() if names[name] == shard.name}
    save_file(changed, shard, metadata={"format": "pt"})
    register(base, "model", kind="merged")
    second = push_oci("model@2", f"oci://{host}/org/model:v2")
    assert set(second.kept) >= {"model-00001-of-00002.safetensors", "config.json"}
    assert {path for path in second.uploaded if path.endswith(".safetensors")} == {shard.name}
    assert 0 < second.sent < first.sent
    third = push_oci("model@2", f"oci://{host}/other/model:v2", share_with=["org/model"])
    assert set(third.mounted) >= {shard.name, "model-00001-of-00002.safetensors"}
    assert third.digest == second.digest


def test_a_tag_is_moved_only_when_that_is_asked_for(host: str, tickets: Path, tmp_path: Path) -> None:
    to = f"oci://{host}/team/moving:prod"
    first = push_oci("tickets", to)
    register(plain_adapter(tmp_path / "a2", tmp_path / "base", seed=2, base_model_name_or_path="org/base"), "tickets")
    with pytest.raises(OutputError, match="is not moved"):
        push_oci("tickets@2", to)
    assert OciRegistry(parse_oci(to)).manifest("prod").digest == first.digest  # type: ignore[union-attr]
    assert push_oci("tickets@2", to, move_tag=True).digest != first.digest
    assert elsewhere(tmp_path, f"{to}@sha256:{first.digest}").new  # and the old one is there by its digest


@pytest.mark.parametrize("step", ["blob", "manifest", "tag", "cut"])
def test_a_push_that_breaks_off_shows_nothing_and_is_finished_by_the_next(
    step: str, proxy: Proxy, tickets: Path, tmp_path: Path
) -> None:
    name = f"team/broken-{step}"
    to = f"oci://{proxy.host}/{name}:v1"
    puts: list[str] = []

    def rule(method: str, path: str, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes] | None:
        if method != "PUT":
            return None
        puts.append(path)
        wrong = {
            "blob": "/blobs/uploads/" in path and len(puts) == 3,
            "cut": "/blobs/uploads/" in path and len(puts) == 2,
            "manifest": "/manifests/sha256:" in path,
            "tag": path.endswith("/manifests/v1"),
        }[step]
        return (507 if step == "blob" else 503, {}, b"full") if wrong else None

    proxy.rule = rule
    with pytest.raises(ServerError, match="failed at PUT"):
        push_oci("tickets", to)
    proxy.rule = lambda *_: None
    with pytest.raises(NotFound, match="does not exist"):
        elsewhere(tmp_path, to)
    done = push_oci("tickets", to)
    # Two uploads came before the third broke off: the config and a file.
    assert len(done.kept) == {"blob": 1, "cut": 0}.get(step, len(done.kept) + len(done.uploaded))
    assert elsewhere(tmp_path, to).record.content == verbs.show("tickets").record.content


def test_bytes_that_were_tampered_with_are_refused(proxy: Proxy, stored: Path, tickets: Path, tmp_path: Path) -> None:
    to = f"oci://{proxy.host}/team/tampered:v1"
    push_oci("tickets", to)
    weights = (tickets / "adapter_model.safetensors").read_bytes()
    hexed = hashlib.sha256(weights).hexdigest()
    for bad in (weights[:-1] + b"x", weights[:-1], weights + b"x"):
        proxy.alter = lambda method, path, data, bad=bad: bad if path.endswith(hexed) and method == "GET" else data
        with pytest.raises(AdapterkitError) as caught:
            elsewhere(tmp_path, to)
        assert caught.value.exit_code in (3, 5)
    proxy.alter = lambda *given: given[2]
    # On the registry's own disk.
    (file,) = (stored / "data").rglob(f"{hexed}/data")
    file.write_bytes(weights[:-1] + b"x")
    try:
        with pytest.raises(CheckFailed, match="not those of its digest"):
            elsewhere(tmp_path, to)
    finally:
        file.write_bytes(weights)
    proxy.alter = lambda method, path, data: (
        data.replace(b"weight.v1.raw", b"weight.v2.raw") if "/manifests/" in path else data
    )
    with pytest.raises(CheckFailed, match="another manifest"):
        elsewhere(tmp_path, to)
    assert not list((tmp_path / "elsewhere" / "records").iterdir())


def test_layers_of_other_kinds_are_refused(host: str, tickets: Path, tmp_path: Path) -> None:
    registry = OciRegistry(parse_oci(f"oci://{host}/team/odd:bad"))
    weights = (tickets / "adapter_model.safetensors").read_bytes()
    good = blob(registry, weights, "adapter_model.safetensors")
    config = blob(registry, (tickets / "adapter_config.json").read_bytes(), "adapter_config.json")
    for path in ("../adapter_model.safetensors", "/etc/model.safetensors", "a\\b.safetensors", "", "x/../y.gguf"):
        with pytest.raises(UnsafeError):
            elsewhere(tmp_path, raw(registry, [{**good, "annotations": {"org.cncf.model.filepath": path}}]))
    with pytest.raises(UnsafeError):
        elsewhere(tmp_path, raw(registry, [blob(registry, b"x", None)]))
    with pytest.raises(UnsafeError, match="twice"):
        elsewhere(
            tmp_path,
            raw(registry, [good, {**good, "annotations": {"org.cncf.model.filepath": "ADAPTER_model.safetensors"}}]),
        )
    beside = blob(registry, b"x", "LICENSE"), blob(registry, b"{}", "LICENSE/config.json")
    with pytest.raises(UnsafeError, match="as a file and as a folder"):
        elsewhere(tmp_path, raw(registry, [good, config, *beside]))
    with pytest.raises(CheckFailed, match="archive"):
        elsewhere(tmp_path, raw(registry, [{**good, "mediaType": "application/vnd.cncf.model.weight.v1.tar"}]))
    with pytest.raises(NotFound, match="no safetensors"):
        elsewhere(tmp_path, raw(registry, [config]))
    # Another client's artifact: titles alone, and a file that is not ours to fetch.
    titled = [
        {**row, "annotations": {"org.opencontainers.image.title": row["annotations"]["org.cncf.model.filepath"]}}
        for row in (good, config, blob(registry, b"import os", "run.py"))
    ]
    found = elsewhere(tmp_path, raw(registry, titled))
    assert found.left_out == ("run.py",)
    assert {file.path: file.sha256 for file in found.record.files} == {
        name: hashlib.sha256((tickets / name).read_bytes()).hexdigest()
        for name in ("adapter_config.json", "adapter_model.safetensors")
    }


def test_wrong_digests_and_sizes_in_a_manifest(proxy: Proxy, tickets: Path, tmp_path: Path) -> None:
    """A registry checks a manifest that it takes; one that lies is played by the proxy."""
    to = f"oci://{proxy.host}/team/lying:v1"
    push_oci("tickets", to)
    good = OciRegistry(parse_oci(to)).manifest("v1")
    assert good is not None
    for change in (
        {"digest": "md5:00"},
        {"digest": "sha256:" + "0" * 63},
        {"size": -1},
        {"size": "7"},
        {"digest": None},
        {"annotations": 5},
    ):
        value = json.loads(good.data)
        value["layers"][0] |= change
        data = json.dumps(value).encode()
        headers = {"Content-Type": value["mediaType"]}
        proxy.rule = lambda method, path, _, data=data, headers=headers: (
            (200, headers, data) if "/manifests/v1" in path else None
        )
        with pytest.raises(CheckFailed, match="without a sha256"):
            elsewhere(tmp_path, to)
    value = json.loads(good.data)
    value["layers"][0]["size"] += 1
    data = json.dumps(value).encode()
    proxy.rule = lambda method, path, _: (200, {}, data) if "/manifests/v1" in path else None
    with pytest.raises(CheckFailed, match="not those of its digest"):
        elsewhere(tmp_path, to)
    proxy.rule = lambda method, path, _: (200, {}, b"<html>") if "/manifests/v1" in path else None
    with pytest.raises(ServerError, match="no manifest"):
        elsewhere(tmp_path, to)


def key_pair(folder: Path) -> tuple[Path, Path]:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder.mkdir(exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / "key.pem", folder / "key.pub"
    plain = serialization.NoEncryption()
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, form))
    return private, public


def test_signatures_are_those_of_cosign(host: str, tickets: Path, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    private, public = key_pair(tmp_path / "mine")
    other_private, other_public = key_pair(tmp_path / "theirs")
    to = f"oci://{host}/team/signed:v1"
    push_oci("tickets", to)
    with pytest.raises(CheckFailed, match="is not signed"):
        elsewhere(tmp_path, to, key=public)
    done = push_oci("tickets", to, key=private)
    assert (done.new, bool(done.signature)) == (False, True)
    assert elsewhere(tmp_path, to, key=public).signed
    with pytest.raises(CheckFailed, match="another key"):
        elsewhere(tmp_path, to, key=other_public)
    assert push_oci("tickets", to, key=private).signature == done.signature  # once is enough
    push_oci("tickets", to, key=other_private)
    assert elsewhere(tmp_path, to, key=other_public).signed
    assert elsewhere(tmp_path, to, key=public).signed
    # cosign's specs/SIGNATURE_SPEC.md, read and verified here by OpenSSL, without a line of ours.
    registry = OciRegistry(parse_oci(to))
    found = registry.manifest(f"sha256-{done.digest}.sig")
    assert found is not None
    layer = found.value["layers"][0]
    payload = registry.read_blob(layer["digest"][7:], layer["size"])
    image = json.loads(payload)["critical"]["image"]
    assert (layer["mediaType"], image) == (
        "application/vnd.dev.cosign.simplesigning.v1+json",
        {"docker-manifest-digest": f"sha256:{done.digest}"},
    )
    assert found.value["subject"]["digest"] == f"sha256:{done.digest}"
    (tmp_path / "payload").write_bytes(payload)
    (tmp_path / "sig").write_bytes(base64.b64decode(layer["annotations"]["dev.cosignproject.cosign/signature"]))
    openssl = ["openssl", "dgst", "-sha256", "-verify", str(public), "-signature", str(tmp_path / "sig")]
    assert subprocess.run([*openssl, str(tmp_path / "payload")], check=False, capture_output=True).returncode == 0
    # A signature of something else proves nothing.
    stolen = f"oci://{host}/team/signed:other"
    register(plain_adapter(tmp_path / "a2", tmp_path / "base", seed=2, base_model_name_or_path="org/base"), "tickets")
    second = push_oci("tickets@2", stolen)
    registry.put_manifest(f"sha256-{second.digest}.sig", found.data)
    with pytest.raises(CheckFailed, match="no signature"):
        elsewhere(tmp_path, stolen, key=public)


def test_logins(tickets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    monkeypatch.delenv("REGISTRY_AUTH_FILE", raising=False)
    (tmp_path / "docker").mkdir()
    config = tmp_path / "docker" / "config.json"
    with docker_registry(tmp_path / "closed", login=True) as host:
        to = f"oci://{host}/team/tickets:v1"
        with pytest.raises(AuthError, match="docker login"):
            push_oci("tickets", to)
        for said in ({"auth": base64.b64encode(b"ci:wrong").decode()}, {"username": "ci", "password": "wrong"}):
            config.write_text(json.dumps({"auths": {host: said}}))
            with pytest.raises(AuthError):
                push_oci("tickets", to)
        config.write_text(json.dumps({"auths": {host: {"auth": base64.b64encode(f"ci:{PASSWORD}".encode()).decode()}}}))
        assert push_oci("tickets", to).new
        assert elsewhere(tmp_path, to).new
        config.write_text(json.dumps({"credHelpers": {host: "pass"}}))
        with pytest.raises(AuthError, match="helper program"):
            push_oci("tickets", to)


def test_tokens_go_to_the_registry_alone(host: str, tickets: Path, tmp_path: Path) -> None:
    """A registry that wants a bearer token, and keeps blobs on another host."""
    seen: list[tuple[str, str]] = []
    with proxied(host) as store, proxied(host) as front:

        def ask_for_a_token(
            method: str, path: str, headers: dict[str, str]
        ) -> tuple[int, dict[str, str], bytes] | None:
            seen.append(("front", headers.get("Authorization", "")))
            if path.startswith("/token?"):
                assert "repository%3Ateam%2Ftokens%3Apull" in path
                return 200, {}, b'{"token": "t0ken"}'
            if headers.get("Authorization") != "Bearer t0ken":
                asked = f'Bearer realm="http://{front.host}/token",service="here"'
                return 401, {"WWW-Authenticate": asked}, b"{}"
            if method == "GET" and "/blobs/" in path:
                return 307, {"Location": f"http://{store.host}{path}"}, b""
            return None

        def watch(method: str, path: str, headers: dict[str, str]) -> None:
            seen.append(("store", headers.get("Authorization", "")))

        front.rule, store.rule = ask_for_a_token, watch
        to = f"oci://{front.host}/team/tokens:v1"
        push_oci("tickets", to)
        assert elsewhere(tmp_path, to).new
        assert ("front", "Bearer t0ken") in seen
        assert {said for where, said in seen if where == "store"} == {""}


@pytest.mark.parametrize(
    "text",
    [
        "oci://",
        "oci://host",
        "oci://host/",
        "oci://host/UPPER",
        "oci://user@host/name",
        "oci://host/name:",
        "oci://host/name@sha256:12",
        "oci://host/../name",
        "host/name",
    ],
)
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(UsageError):
        parse_oci(text)


def test_references() -> None:
    found = parse_oci("oci://registry.example.com/a/b:v1")
    assert (found.host, found.name, found.tag, found.plain) == ("registry.example.com", "a/b", "v1", False)
    assert parse_oci("oci://localhost:5000/a").address == "http://localhost:5000"
    assert parse_oci("oci://localhost:5000/a").tag == "latest"
    assert parse_oci("oci://127.0.0.1.example.com/a").address == "https://127.0.0.1.example.com"
    exact = parse_oci(f"oci://host/a:v1@sha256:{'0' * 64}")
    assert exact.pointer == f"sha256:{'0' * 64}"


def test_the_command_line(
    host: str, tickets: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run(*words: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            main(list(words))
        return int(end.value.code or 0), capsys.readouterr().out

    to = f"oci://{host}/team/cli:v1"
    code, out = run("push", "tickets", to)
    assert code == 0
    assert f"{to}@sha256:" in out
    assert run("push", "tickets", to)[1].strip().endswith("was there already")
    monkeypatch.setenv("ADAPTERKIT_HOME", str(tmp_path / "other"))
    code, out = run("pull", to, "--json")
    assert (code, json.loads(out)["ref"]) == (0, "cli@1")
    assert run("pull", f"oci://{host}/team/nothing:v1")[0] == 7
    assert run("pull", "oci://127.0.0.1:9/team/nothing:v1")[0] == 5
    assert run("push", "cli", to, "--private")[0] == 2
    assert run("push", "cli", "org/name", "--move-tag")[0] == 2
    assert run("pull", "org/name", "--plain-http")[0] == 2
