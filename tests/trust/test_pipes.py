"""A pipe in the place of a file is refused and not waited for; bytes that no such file holds are one sentence."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from models import plain_adapter, plain_base

import adapterkit
from adapterkit.checkpoint.sharded import sharded_checkpoint
from adapterkit.cli import app
from adapterkit.errors import AdapterkitError, CheckpointError, UnsafeError
from adapterkit.gguf.importance import load_importance
from adapterkit.gguf.quantize import Quantization, _importance
from adapterkit.gguf.said import _of_file, read_pairs
from adapterkit.integrations import llamafactory
from adapterkit.oci.client import login_of
from adapterkit.oci.signatures import _private, _public
from adapterkit.provenance import dsse
from adapterkit.recipe.lock import read_lock
from adapterkit.serving.handover import _generation
from adapterkit.verbs.engines.written import _template
from adapterkit.verbs.evaluate import _check_peft, _null_adapter
from adapterkit.verbs.imatrix import added, read_text
from adapterkit.verbs.verify.prompts import read_prompts


@pytest.fixture(autouse=True)
def _in_time() -> Iterator[None]:
    def late(number: int, frame: FrameType | None) -> None:
        raise AssertionError("it waits for the pipe")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def _command(*words: str) -> None:
    app.main(list(words), standalone_mode=False)


class Asked:
    """As much of a request as reads a template."""

    on = "slurm"

    def __init__(self, template: Path) -> None:
        self.template = template


READERS: dict[str, Callable[[Path], Any]] = {
    "a saved plan": lambda path: adapterkit.run(path, out=path.with_name("out")),
    "a template of a job": lambda path: _template(Asked(path)),
    "a file of prompts": read_prompts,
    "a lock": read_lock,
    "a plan that is executed": lambda path: _command("execute", str(path), "-o", str(path.with_name("out"))),
    "a text for an imatrix": read_text,
    "an importance matrix": load_importance,
    "an importance matrix of a merge": lambda path: _importance(Quantization("Q4_0", imatrix=path), {}),
    "matrices to add up": lambda path: added([path, path], path.with_name("out.gguf")),
    "a file of tensor types": read_pairs,
    "metadata of a GGUF file": _of_file,
    "a config of LLaMA-Factory": lambda path: llamafactory.main([str(path)]),
    "a private key of an artifact": _private,
    "a public key of an artifact": _public,
    "a private key": dsse.private_key,
    "a public key": dsse.public_key,
}


@pytest.mark.parametrize("what", READERS)
def test_a_named_pipe_is_refused(what: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnsafeError, match="pipe"):
        READERS[what](tmp_path / "pipe")


@pytest.mark.parametrize(
    "data", [b"[" * 100_000, b'{"r":' + b"9" * 6000 + b"}", b'{"x":"\xff"}'], ids=["deep", "long", "odd"]
)
def test_bytes_that_no_sensible_file_holds_are_one_sentence(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "adapter_config.json"
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        _check_peft(tmp_path)
    for read in (READERS["a lock"], READERS["a saved plan"]):
        with pytest.raises(AdapterkitError):
            read(file)
    (tmp_path / "generation_config.json").write_bytes(data)
    assert _generation(tmp_path) == {}


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_that_is_evaluated_holds_no_pipes(name: str, tmp_path: Path) -> None:
    adapter = plain_adapter(tmp_path / "adapter", plain_base(tmp_path / "base"))
    _check_peft(adapter)
    (adapter / name).unlink()
    os.mkfifo(adapter / name)
    with pytest.raises(UnsafeError, match="pipe"):
        _check_peft(adapter)


def test_a_pipe_beside_a_model_is_no_sampling(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "generation_config.json")
    assert _generation(tmp_path) == {}


ODD = {"deep": b"[" * 100_000, "long": b'{"r":' + b"9" * 6000 + b"}", "odd": b'{"x":"\xff"}', "zero": b"\0" * 64}


@pytest.mark.parametrize("what", sorted(set(READERS) - {"a file of prompts", "a template of a job"}))
def test_bytes_of_another_kind_are_one_sentence(what: str, tmp_path: Path) -> None:
    for name, data in ODD.items():
        (tmp_path / name).write_bytes(data)
        if what == "a text for an imatrix" and name != "odd":
            continue  # any text is one
        with pytest.raises(AdapterkitError) as refused:
            READERS[what](tmp_path / name)
        assert len(refused.value.message.splitlines()) == 1
        assert len(refused.value.message) < 600 + len(str(tmp_path))


def test_a_device_is_refused() -> None:
    for what in ("a text for an imatrix", "an importance matrix", "a file of tensor types", "a public key"):
        with pytest.raises(UnsafeError, match="device"):
            READERS[what](Path("/dev/zero"))


def test_the_step_that_deepspeed_names_is_not_guessed(tmp_path: Path) -> None:
    for step in ("global_step1", "global_step2"):
        (tmp_path / step).mkdir()
        (tmp_path / step / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"")
    latest = tmp_path / "latest"
    latest.write_text("global_step1\n")
    assert (found := sharded_checkpoint(tmp_path)) is not None
    assert found.folder.name == "global_step1"
    latest.unlink()
    os.mkfifo(latest)
    with pytest.raises(UnsafeError, match="pipe"):
        sharded_checkpoint(tmp_path)
    latest.unlink()
    latest.write_bytes(b"x" * 5000)
    with pytest.raises(CheckpointError, match="latest"):
        sharded_checkpoint(tmp_path)


@pytest.mark.parametrize("data", [*ODD.values(), b"[1]", b'{"auths": 1}', b'{"auths": {"host": 2}}'])
def test_a_login_that_cannot_be_read_is_none(data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "auth"))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    (tmp_path / "auth").write_bytes(data)
    os.mkfifo(tmp_path / "config.json")
    assert login_of("host") == ""


@pytest.mark.parametrize("given", ["--key", "--signature"])
def test_a_signature_is_held_against_no_pipe(given: str, tmp_path: Path) -> None:
    pytest.importorskip("model_signing")
    private, public = _keys(tmp_path)
    adapter = plain_adapter(tmp_path / "adapter", plain_base(tmp_path / "base"))
    _command("sign", str(adapter), "--key", str(private))
    words = {"--key": str(public), "--signature": str(adapter / "model.sig")}
    said = [word for pair in words.items() for word in pair]
    _command("verify-signature", str(adapter), *said)
    os.mkfifo(tmp_path / "pipe")
    said = [word for pair in {**words, given: str(tmp_path / "pipe")}.items() for word in pair]
    with pytest.raises(UnsafeError, match="pipe"):
        _command("verify-signature", str(adapter), *said)
    (adapter / "pipe").symlink_to(tmp_path / "pipe")
    with pytest.raises(AdapterkitError):
        _command("verify-signature", str(adapter), *[word for pair in words.items() for word in pair])


def _keys(folder: Path) -> tuple[Path, Path]:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    plain = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "private.pem").write_bytes(plain)
    half = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / "public.pem").write_bytes(half)
    return folder / "private.pem", folder / "public.pem"


def test_a_null_adapter_keeps_its_config(tmp_path: Path) -> None:
    adapter = plain_adapter(tmp_path / "adapter", plain_base(tmp_path / "base"))
    _null_adapter(adapter, tmp_path / "zeros", "zeros")
    config = "adapter_config.json"
    assert json.loads((tmp_path / "zeros" / config).read_bytes()) == json.loads((adapter / config).read_bytes())
