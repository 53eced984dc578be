"""Signatures: made and held offline; one changed byte, file or key is seen; the package's own tool agrees."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from models import plain_adapter, plain_base

import adapterkit
from adapterkit.cli import main
from adapterkit.errors import CheckFailed, NotFound, UnsafeError, UsageError
from adapterkit.provenance.signing import sign, verify
from adapterkit.registry import fsck, register, verbs
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
    files = [path for path in out.iterdir() if path.name not in ("adapterkit.json", "model.sig")]
    assert verify(out, public).files == len(files)
    for path in files:
        kept = path.read_bytes()
        for place in (0, len(kept) // 2, -1):
            flip(path, place)
            with pytest.raises(CheckFailed, match=f"is not what was signed: other bytes in {path.name}; get"):
                verify(out, public)
            path.write_bytes(kept)
    assert verify(out, public).files == len(files)
    # Prose and records change when something is published; it stays what was signed.
    (out / "README.md").write_text("hello")
    assert verify(out, public).files == len(files)


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

    assert run("sign", out, "--key", private) == (0, f"{out / 'model.sig'}\n")
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
