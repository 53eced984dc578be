"""Signatures: made and held offline; one changed byte, file or key is seen; the package's own tool agrees."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from models import plain_adapter, plain_base

import adapterkit
from adapterkit.cli import main
from adapterkit.errors import CheckFailed, NotFound, UnsafeError, UsageError
from adapterkit.provenance import dsse
from adapterkit.provenance.attest import attest
from adapterkit.provenance.attested import verify_attestation
from adapterkit.provenance.signing import sign, verify
from adapterkit.registry import fsck, register, verbs
from adapterkit.registry.beside import beside_bytes, beside_path, read_beside
from adapterkit.registry.checkout import checkout
from adapterkit.registry.home import Home

pytest.importorskip("model_signing", reason="model-signing is missing: pip install 'adapterkit[sign]'")
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa


def key_pair(folder: Path, name: str = "key", password: bytes | None = None) -> tuple[Path, Path]:
    """Private and public key as PEM, as openssl writes them."""
    key = ec.generate_private_key(ec.SECP256R1())
    locked = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked))
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return key_pair(tmp_path)


@pytest.fixture
def out(tmp_path: Path, home: Path) -> Path:
    base = plain_base(tmp_path / "base", shards=2)
    adapterkit.merge(base, [plain_adapter(tmp_path / "adapter", base)], tmp_path / "out")
    return tmp_path / "out"


def flip(path: Path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


def test_a_folder_and_every_byte_of_it(out: Path, keys: tuple[Path, Path]) -> None:
    private, public = keys
    signed = sign(out, private)
    assert signed.signature == out / "model.sig"
    files = [path for path in out.iterdir() if path.name not in ("adapterkit.intoto.jsonl", "model.sig")]
    assert verify(out, public).files == len(files)
    for path in files:
        kept = path.read_bytes()
        for place in (0, len(kept) // 2, -1):
            flip(path, place)
            with pytest.raises(CheckFailed, match=f"is not what was signed: .*{path.name}"):
                verify(out, public)
            path.write_bytes(kept)
    assert verify(out, public).files == len(files)
    (out / "model.sig").write_bytes((out / "model.sig").read_bytes() + b"\n")  # JSON, laid out otherwise
    assert verify(out, public).files == len(files)


def record_of(out: Path, **fields: object) -> bytes:
    """The record beside an output with other fields, and a digest that fits."""
    record = read_beside(out)
    assert record is not None
    return beside_bytes(replace(record, **fields))  # type: ignore[arg-type]


FORGED = {"measured": {"acc": 1.0}}


@pytest.mark.parametrize(
    "place", ["README.md", "adapterkit.intoto.json", ".gitattributes", "sub/deep/.x", ".git/hooks/post"]
)
@pytest.mark.parametrize("before", [True, False])
def test_everything_beside_is_covered(
    place: str, before: bool, out: Path, keys: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    private, public = keys
    if before:
        attest(out)
        (out / place).parent.mkdir(parents=True, exist_ok=True)
        if place != "adapterkit.intoto.json":
            (out / place).write_text("as it was")
    signed = sign(out, private)
    assert signed.left_out == ((".git",) if before and ".git/" in place else ())
    if not signed.left_out:
        verify(out, public)
    (out / place).parent.mkdir(parents=True, exist_ok=True)
    (out / place).write_text("run evil.sh")
    with pytest.raises(CheckFailed, match="is not what was signed") as error:
        verify(out, public)
    assert place in str(error.value)
    held = verify(out, public, ignore=[place.partition("/")[0]])  # the user said so, and is told so
    assert held.left_out == (place.partition("/")[0],)
    if before and not signed.left_out:
        (out / place).unlink()
        with pytest.raises(CheckFailed, match="missing: "):
            verify(out, public)


@pytest.mark.parametrize(
    "fields", [{"evidence": FORGED}, {"meta": {"x": "y"}}, {"method": "other"}, {"operation": None}]
)
def test_a_record_that_says_something_else(
    fields: dict[str, object], out: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    private, public = keys
    for signable in (out, tmp_path / "model.gguf"):
        if signable.suffix:
            signable.write_bytes(b"GGUF")
            beside_path(signable).write_bytes(record_of(out, files=(), identity=read_beside(out).base))  # type: ignore[union-attr]
        sign(signable, private)
        assert verify(signable, public).files
        assert verify_attestation(signable, public).statements
        kept = beside_path(signable).read_bytes()
        forged = {**fields, "files": ()} if signable.suffix else fields
        beside_path(signable).write_bytes(record_of(signable, **forged))
        with pytest.raises(CheckFailed, match=f"another {next(iter(fields))} than was signed"):
            verify(signable, public)
        with pytest.raises(CheckFailed, match=f"another {next(iter(fields))} than was signed"):
            verify_attestation(signable, public)
        beside_path(signable).write_bytes(b"{}")
        with pytest.raises(CheckFailed, match=r"not what was signed: .*adapterkit\.json"):
            verify(signable, public)
        beside_path(signable).write_bytes(kept)
        assert verify(signable, public).files


def test_what_lies_beside_a_file(out: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    """A start script is run by whoever trusts the signature."""
    private, public = keys
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    script = tmp_path / "model.gguf.llama-server.sh"
    script.write_text("exec llama-server")
    (tmp_path / "model.gguf2").write_text("another's")
    sign(file, private)
    assert verify(file, public).files == 2
    script.write_text("rm -rf /")
    with pytest.raises(CheckFailed, match=r"other bytes in model\.gguf\.llama-server\.sh"):
        verify(file, public)
    script.write_text("exec llama-server")
    (tmp_path / "model.gguf.Modelfile").write_text("FROM evil")
    with pytest.raises(CheckFailed, match=r"not signed: model\.gguf\.Modelfile"):
        verify(file, public)
    (tmp_path / "model.gguf.Modelfile").unlink()
    for path in list(tmp_path.glob("model.gguf*")):  # under another name it is still what was signed
        path.rename(tmp_path / path.name.replace("model.gguf", "other.gguf", 1))
    assert verify(tmp_path / "other.gguf", public).files == 2
    assert verify_attestation(tmp_path / "other.gguf", public).unnamed == ()


def test_files_more_or_less(out: Path, keys: tuple[Path, Path]) -> None:
    private, public = keys
    sign(out, private)
    (out / "extra.bin").write_bytes(b"x")
    with pytest.raises(CheckFailed, match=r"not signed: extra\.bin;"):
        verify(out, public)
    (out / "extra.bin").unlink()
    (out / "config.json").unlink()
    with pytest.raises(CheckFailed, match=r"missing: config\.json;"):
        verify(out, public)


def test_another_key_and_a_broken_signature(out: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = keys
    _, other = key_pair(tmp_path, "other")
    sign(out, private)
    with pytest.raises(CheckFailed):
        verify(out, other)
    kept = (out / "model.sig").read_bytes()
    for broken in (b"", b"{}", kept[:-20], kept.replace(b"dsseEnvelope", b"other"), b"\xff\xfe"):
        (out / "model.sig").write_bytes(broken)
        with pytest.raises(CheckFailed, match="is not what was signed"):
            verify(out, public)
    bundle = json.loads(kept)
    bundle["dsseEnvelope"]["payload"] = bundle["dsseEnvelope"]["payload"][:-8] + "AAAAAAA="
    (out / "model.sig").write_text(json.dumps(bundle))
    with pytest.raises(CheckFailed):
        verify(out, public)
    (out / "model.sig").unlink()
    with pytest.raises(NotFound, match="has no signature"):
        verify(out, public)


def test_a_registered_version(out: Path, keys: tuple[Path, Path], home: Path) -> None:
    private, public = keys
    first = register.register(out, "desk").record
    verbs.tag("desk", "prod")
    with pytest.raises(NotFound, match="desk@1 is not signed"):
        verify("desk", public)
    assert sign("desk@prod", private).ref == "desk@2"
    second = verbs.show("desk").record
    assert second.content == first.content  # the same artefact, so the same node of every lineage
    assert verbs.show("desk@prod").record == first
    assert verify("desk@2", public).files == len(first.files)
    assert fsck.fsck(home=home).clean
    flip(Home(home).blob(first.files[-1].sha256))
    with pytest.raises(CheckFailed, match="is not what was signed"):
        verify("desk", public)


def test_a_single_file(out: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = keys
    file = tmp_path / "model-Q4_K_M.gguf"
    file.write_bytes(b"GGUF and so on")
    assert sign(file, private).signature == tmp_path / "model-Q4_K_M.gguf.model.sig"
    assert verify(file, public).files == 1
    flip(file)
    with pytest.raises(CheckFailed, match=r"other bytes in \."):
        verify(file, public)


def test_a_signed_output_stays_signed_on_its_way(
    out: Path, keys: tuple[Path, Path], home: Path, tmp_path: Path
) -> None:
    """Registered, checked out, exported: the record gets a name and a time, and says the same."""
    private, public = keys
    (out / "README.md").write_text("a card")
    (out / ".gitattributes").write_text("*.safetensors filter=lfs")
    sign(out, private)
    register.register(out, "desk")
    assert verify("desk", public).files == len(list(out.iterdir())) - 3
    checkout("desk", to=tmp_path / "again")
    assert verify(tmp_path / "again", public).files == verify(out, public).files
    assert [one.words for one in verify_attestation("desk", public).statements] == [
        "SLSA provenance: urn:adapterkit:build:merge:v1, from 2 inputs",
        "record, with no evidence",
    ]
    register.register(out, "desk", evidence={"measured": {"acc": 0.9}}, new_version=True)
    with pytest.raises(CheckFailed, match="record of desk@2 has another evidence than was signed"):
        verify("desk@2", public)
    assert verify(sign("desk@2", private).ref, public).files
    assert "record, with measured" in [one.words for one in verify_attestation("desk@3", public).statements]


def test_what_a_push_and_the_hub_change(out: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    """The card is written anew and .gitattributes added: the sentence names both and the way to hold the rest."""
    private, public = keys
    (tmp_path / "out" / "README.md").write_text("a card")
    sign(out, private)
    (out / "README.md").write_text("---\nlicense: mit\n---\na card")
    (out / ".gitattributes").write_text("*.safetensors filter=lfs")
    with pytest.raises(CheckFailed, match=r"other bytes in README\.md") as refused:
        verify(out, public)
    assert refused.value.hint.endswith("ignore='README.md'")
    with pytest.raises(CheckFailed, match=r"not signed: \.gitattributes") as refused:
        verify(out, public, ignore=["README.md"])
    assert refused.value.hint.endswith("ignore='.gitattributes'")
    assert verify(out, public, ignore=["README.md", ".gitattributes"]).left_out == ("README.md", ".gitattributes")
    flip(out / "config.json")
    with pytest.raises(CheckFailed, match=r"other bytes in README\.md, config\.json") as refused:
        verify(out, public)
    assert "ignore" not in refused.value.hint


def test_a_folder_that_was_signed_before_it_had_a_record(keys: tuple[Path, Path], home: Path, tmp_path: Path) -> None:
    private, public = keys
    adapter = plain_adapter(tmp_path / "adapter", plain_base(tmp_path / "base"))
    sign(adapter, private)
    register.register(adapter, "bare")
    checkout("bare", to=tmp_path / "again")
    for place in ("bare", tmp_path / "again"):
        for held in (verify, verify_attestation):
            with pytest.raises(CheckFailed, match="it had no record then") as refused:
                held(place, public)
            assert "ignore='adapterkit.json'" in refused.value.hint
            held(place, public, ignore=["adapterkit.json"])
        assert verify(place, public, ignore=["adapterkit.json"]).left_out == ("adapterkit.json",)
    flip(tmp_path / "again" / "adapter_model.safetensors")
    with pytest.raises(CheckFailed, match="other bytes in adapter_model"):
        verify(tmp_path / "again", public, ignore=["adapterkit.json"])


def test_a_version_whose_record_nobody_signed(out: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    """As an earlier adapterkit, or model-signing itself, signs: the files hold, and the record is anybody's."""
    private, public = keys
    sign(out, private)
    (out / "adapterkit.intoto.jsonl").unlink()
    register.register(out, "desk")
    with pytest.raises(CheckFailed, match="desk@1 is not what was signed: its record is not signed"):
        verify("desk", public)


def test_a_statement_of_another_key_or_about_other_files(out: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = keys
    other, other_public = key_pair(tmp_path, "other")
    sign(out, private)
    place = out / "adapterkit.intoto.jsonl"
    kept = place.read_bytes()
    sign(out, other)
    strange = place.read_bytes()
    sign(out, private)
    assert verify_attestation(out, other_public, attestation=_written(tmp_path / "x.jsonl", strange)).statements
    for data, said in (
        (strange, "statement 1, was not signed with this key"),
        (kept + strange, "statement 3, was not signed with this key"),
        (b"", "holds no signed statement"),
        (kept[:-30], "holds no signed statement"),
        (b"[" * 100_000, "holds no signed statement"),
        (b'{"payload": 3, "signatures": []}', "a field is missing"),
    ):
        place.write_bytes(data)
        for held in (verify, verify_attestation):
            with pytest.raises(CheckFailed, match=said):
                held(out, public)
    place.unlink()
    with pytest.raises(NotFound, match="no signed statements"):
        verify_attestation(out, public)
    place.write_bytes(kept)
    flip(out / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckFailed, match="other bytes in model-00001"):
        verify_attestation(out, public)
    attest_of_other = sealed({"_type": "https://in-toto.io/Statement/v1", "subject": []}, private)
    with pytest.raises(CheckFailed, match="no in-toto statement about files"):
        verify_attestation(out, public, attestation=_written(tmp_path / "y.jsonl", attest_of_other))


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def sealed(statement: dict[str, object], private: Path) -> bytes:
    return dsse.seal(json.dumps(statement).encode(), dsse.private_key(private))


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
def test_envelopes_are_those_of_other_tools(curve: ec.EllipticCurve, out: Path, tmp_path: Path) -> None:
    """securesystemslib, which in-toto and TUF use, takes ours, and we take its."""
    from securesystemslib.dsse import Envelope
    from securesystemslib.exceptions import VerificationError
    from securesystemslib.signer import CryptoSigner, SSlibKey

    key = ec.generate_private_key(curve)
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    private = _written(tmp_path / "k.pem", pem)
    forms = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    public = _written(tmp_path / "k.pub", key.public_key().public_bytes(*forms))
    sign(out, private)
    assert verify_attestation(out, public).statements
    for line in (out / "adapterkit.intoto.jsonl").read_text().splitlines():
        envelope = json.loads(line)
        ours = SSlibKey.from_crypto(key.public_key(), keyid=envelope["signatures"][0]["keyid"])
        read = Envelope.from_dict(envelope)
        assert read.verify([ours], 1)
        read.payload += b" "
        with pytest.raises(VerificationError):
            read.verify([ours], 1)
    if curve.key_size == 256:  # the only kind of key that its own signer makes here
        theirs = Envelope(json.dumps({"a": 1}).encode(), "application/vnd.in-toto+json", {})
        theirs.sign(CryptoSigner(key))
        (found,) = dsse.read_envelopes(json.dumps(theirs.to_dict(), indent=1).encode(), "theirs")
        assert found.signed_by(key.public_key())


def test_the_statement_that_is_sealed_is_the_one_that_lies_there(out: Path, keys: tuple[Path, Path]) -> None:
    private, public = keys
    attest(out)
    sign(out, private)
    said = verify_attestation(out, public).statements
    assert said[0].payload == (out / "adapterkit.intoto.json").read_bytes()
    files = {path.name for path in out.iterdir()} - {"adapterkit.json", "adapterkit.intoto.jsonl", "model.sig"}
    assert set(said[1].subjects) == files
    assert all(hashlib.sha256((out / name).read_bytes()).hexdigest() == sum_ for name, sum_ in said[1].subjects.items())
    flip(out / "config.json", 0)
    with pytest.raises(CheckFailed, match="not about what lies there: other bytes in config"):
        sign(out, private)


def test_it_travels_in_a_bundle(out: Path, keys: tuple[Path, Path], home: Path, tmp_path: Path) -> None:
    from adapterkit.registry import bundle

    private, public = keys
    register.register(out, "desk")
    sign("desk", private)
    bundle.export_bundle(("desk",), tmp_path / "desk.bundle")
    bundle.import_bundle(tmp_path / "desk.bundle", home=tmp_path / "other")
    assert verify("desk", public, home=tmp_path / "other").files == verify("desk", public).files


def test_the_packages_own_tool_agrees(out: Path, keys: tuple[Path, Path]) -> None:
    """Somebody without adapterkit can check it, without a network."""
    private, public = keys
    sign(out, private)
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(out)]
    command += ["--signature", str(out / "model.sig"), "--public_key", str(public)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "no_proxy": "*"})
    assert done.returncode == 0, done.stderr
    flip(out / "config.json", 0)
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0


def test_keys_that_cannot_be_used(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private, public = key_pair(tmp_path, "locked", b"a password")
    with pytest.raises(UsageError, match="cannot be used as a private key"):
        sign(out, private)
    monkeypatch.setenv("ADAPTERKIT_KEY_PASSWORD", "a password")
    sign(out, private)
    assert verify(out, public).files
    with pytest.raises(NotFound, match=r"key .* does not exist"):
        sign(out, tmp_path / "none.pem")
    (tmp_path / "junk.pem").write_text("junk")
    with pytest.raises(UsageError, match="private key"):
        sign(out, tmp_path / "junk.pem")
    with pytest.raises(UsageError, match="public key"):
        verify(out, tmp_path / "junk.pem")
    other = rsa.generate_private_key(65537, 2048)
    (tmp_path / "rsa.pem").write_bytes(
        other.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    monkeypatch.delenv("ADAPTERKIT_KEY_PASSWORD")
    with pytest.raises(UsageError, match="elliptic curve"):
        sign(out, tmp_path / "rsa.pem")


def test_links_are_refused(out: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    private, _ = keys
    shutil.move(out / "config.json", tmp_path / "config.json")
    (out / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(UnsafeError, match="cannot be signed"):
        sign(out, private)
    assert not [path for path in out.iterdir() if path.suffix in (".sig", ".tmp") or path.name.startswith(".")]


def test_the_verbs(out: Path, keys: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    private, public = keys

    def run(*arguments: object) -> tuple[object, str]:
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        return stopped.value.code, capsys.readouterr().out

    assert run("sign", out, "--key", private) == (0, f"{out / 'model.sig'}\n{out / 'adapterkit.intoto.jsonl'}\n")
    code, said = run("verify-signature", out, "--key", public)
    assert (code, said.endswith("files are as they were signed\n")) == (0, True)
    flip(out / "config.json", 0)
    code, said = run("verify-signature", out, "--key", public, "--json")
    assert code == 3
    assert json.loads(said)["error"]["code"] == "CheckFailed"


def test_without_the_extra(out: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("model_signing", "model_signing.signing", "model_signing.hashing", "model_signing.verifying"):
        monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"pip install 'adapterkit\[sign\]'"):
        sign(out, keys[0])


def test_pieces_of_two_signed_outputs_are_not_one(out: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = keys
    sign(out, private)
    other = tmp_path / "other"
    other.mkdir()
    (other / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')  # transformers would load it
    beside_path(other).write_bytes(record_of(out, files=(), evidence=FORGED))
    sign(other, private)
    (out / "adapter_config.json").write_bytes((other / "adapter_config.json").read_bytes())
    statements = out / "adapterkit.intoto.jsonl"
    both = statements.read_bytes() + (other / "adapterkit.intoto.jsonl").read_bytes()
    statements.write_bytes(both)
    with pytest.raises(CheckFailed, match=r"not signed: adapter_config\.json"):
        verify(out, public)
    (out / "adapter_config.json").unlink()
    kept = statements.read_bytes()
    other_record = beside_path(other).read_bytes()
    # Another output of which every file lies in this one too, and whose record says more.
    shutil.rmtree(other)
    other.mkdir()
    shutil.copy(out / "config.json", other)
    beside_path(other).write_bytes(other_record)
    sign(other, private)
    statements.write_bytes(kept.splitlines()[0] + b"\n" + kept.splitlines()[1] + b"\n")
    assert verify(out, public).files
    statements.write_bytes(statements.read_bytes() + (other / "adapterkit.intoto.jsonl").read_bytes())
    beside_path(out).write_bytes(beside_path(other).read_bytes())
    with pytest.raises(CheckFailed, match=r"not signed: adapterkit\.json"):
        verify(out, public)


def test_a_file_beside_under_a_name_that_nobody_signed(keys: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = keys
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    (tmp_path / "model.gguf.Modelfile").write_text("FROM model.gguf")
    sign(model, private)
    assert verify(model, public).files == 2
    shutil.copy(tmp_path / "model.gguf.Modelfile", tmp_path / "model.gguf.start.sh")
    with pytest.raises(CheckFailed, match=r"not signed: model\.gguf\.start\.sh"):
        verify(model, public)


@pytest.mark.parametrize("leads", ["a folder", "a pipe", "nowhere", "a file"])
def test_a_link_that_was_added_is_not_followed(leads: str, out: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = keys
    sign(out, private)
    place = tmp_path / "place"
    if leads == "a folder":
        place.mkdir()
    elif leads == "a pipe":
        os.mkfifo(place)
    elif leads == "a file":
        place.write_text("x")
    (out / "extra").symlink_to(place)
    with pytest.raises(CheckFailed if leads == "a file" else UnsafeError, match="extra"):
        verify(out, public)
    if leads == "a file":
        assert verify_attestation(out, public).unnamed == ("extra",)
        return
    with pytest.raises(UnsafeError, match="extra is a link that leads to no file"):
        verify_attestation(out, public)
    (out / "extra").unlink()
    (out / "adapterkit.json").unlink()
    (out / "adapterkit.json").symlink_to(place)
    with pytest.raises(UnsafeError, match=r"adapterkit\.json is a link that leads to no file"):
        verify(out, public)
