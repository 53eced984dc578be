"""`ui` over HTTP: what it answers, what it refuses, and that text from records stays text."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from adapterkit.cli import app
from adapterkit.registry import register, store, verbs
from adapterkit.registry.evidence import attach_verification
from adapterkit.registry.home import Home
from adapterkit.registry.identity import Identity
from adapterkit.registry.record import FileEntry, Operation, Parent, Record
from adapterkit.registry.verification import Verification
from adapterkit.ui.overview import Query, overview

Serve = Callable[[], str]
QWEN = Identity("Qwen/Qwen3-8B", "a" * 40)


def add(home: Path, name: str, number: int = 0, kind: str = "adapter", **fields: object) -> Record:
    at = Home(home)
    at.create()
    files = (FileEntry("adapter_model.safetensors", 1000, f"{number:064x}", stored=False),)
    with at.store_lock(shared=True):
        return store.add_record(at, Record(kind, files, **fields), name).record  # type: ignore[arg-type]


def ask(url: str, path: str = "/", method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
    host = url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=900)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}, body


def test_an_empty_registry_says_how_to_begin(serve: Serve, home: Path) -> None:
    status, _, body = ask(serve())
    assert status == 200
    assert "Nothing is registered yet" in body
    assert "adapterkit register my-adapter/" in body
    assert not home.exists()  # looking made nothing


def test_it_listens_on_the_loopback_only(serve: Serve) -> None:
    url = serve()
    port = int(url.rpartition(":")[2])
    assert url.startswith("http://127.0.0.1:")
    with socket.socket() as other:
        other.settimeout(2)
        # Another address of this machine: all of 127/8 is the loopback, and only one address of it is ours.
        assert other.connect_ex(("127.0.0.2", port)) != 0


@pytest.mark.parametrize(
    "host", ["attacker.example", "attacker.example:PORT", "127.0.0.1", "127.0.0.1:1", "[::1]:PORT", ""]
)
def test_another_name_is_refused(serve: Serve, home: Path, host: str) -> None:
    add(home, "secret-adapter")
    url = serve()
    status, _, body = ask(url, Host=host.replace("PORT", url.rpartition(":")[2]))
    assert status == 421
    assert "secret-adapter" not in body
    assert ask(url, Host=f"LOCALHOST:{url.rpartition(':')[2]}")[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"])
def test_nothing_but_reading(serve: Serve, method: str) -> None:
    status, headers, _ = ask(serve(), method=method)
    assert status == 405
    assert headers["allow"] == "GET, HEAD"


def test_head_is_get_without_its_body(serve: Serve, home: Path) -> None:
    add(home, "math")
    url = serve()
    status, headers, body = ask(url, method="HEAD")
    assert (status, body) == (200, "")
    assert int(headers["content-length"]) == len(ask(url)[2].encode())


def test_every_answer_keeps_other_sites_out(serve: Serve, home: Path) -> None:
    add(home, "math")
    url = serve()
    for path in ("/", "/v/math/1", "/static/ui.js", "/static/ui.css", "/nothing", "/v/math"):
        _, headers, _ = ask(url, path)
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["cache-control"] == "no-store"
        assert "access-control-allow-origin" not in headers
        assert "python" not in headers["server"].lower()


@pytest.mark.parametrize(
    "path",
    [
        *("/../../etc/passwd", "/static/../ui.css", "/static/%2e%2e/server.py", "/static//etc/passwd", "/static/"),
        *(
            "/v/../1",
            "/v/..%2f..%2fetc/1",
            "/v/%2e%2e/1",
            "/v/a%00b/1",
            "/v/math/0",
            "/v/math/99999999999",
            "/v/math/2",
        ),
        *("/v/math/1/x", "/v/Math/1", "/v/%D0%B0/1", "/" + "x" * 5000, "/v/nobody", "/v/math%0d%0aX:1/1"),
    ],
)
def test_an_address_is_never_a_path(serve: Serve, home: Path, path: str) -> None:
    add(home, "math")
    status, headers, body = ask(serve(), path)
    assert status in (400, 404)
    assert "root:" not in body
    assert "Traceback" not in body
    assert "x" not in headers


def test_what_is_no_http_is_no_harm(serve: Serve, home: Path) -> None:
    add(home, "math")
    url = serve()
    host, port = "127.0.0.1", int(url.rpartition(":")[2])
    for sent in (
        b"\x00\xff\xfe\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"a" * 70000,
        b"",
    ):
        with socket.create_connection((host, port), timeout=900) as raw:
            raw.sendall(sent)
            raw.shutdown(socket.SHUT_WR)
            raw.recv(4096)
    assert ask(url)[0] == 200


def test_text_from_records_stays_text(serve: Serve, home: Path) -> None:
    evil = "<img src=x onerror=alert(1)>\"'&"
    parent = Parent("adapter", "f" * 64, label=evil)
    record = add(
        home,
        "evil",
        meta={evil: f"{evil}\x1b[31m\u202e", "token": "hf_abcdefghijklmnopqrstuvwx"},
        parameters={evil: [evil, {evil: 1}]},
        evidence={"fidelity": {evil: evil}},
        parents=(parent,),
        operation=Operation("merge", {evil: evil}),
    )
    attach_verification(record.ref, [Verification("model", False, {evil: evil}, {evil: 1})], home=home)
    url = serve()
    for path in ("/", "/v/evil/2", f"/?{'q=%3Cimg%20src%3Dx%20onerror%3D%22a'}&kind=%3Cb%3E&base=%3Cb%3E"):
        _, _, body = ask(url, path)
        assert "<img" not in body
        assert "onerror=alert(1)>" not in body
        assert "\x1b" not in body
        assert "\u202e" not in body
        assert "hf_abcdefghijkl" not in body
    assert "&lt;img src=x" in ask(url, "/v/evil/2")[2]


def test_the_overview_groups_by_the_weights(home: Path) -> None:
    same = "5" * 64
    add(home, "from-hub", 1, base=QWEN)
    add(home, "other-commit", 2, base=Identity("Qwen/Qwen3-8B", "b" * 40))
    add(home, "measured", 3, base=Identity("Qwen/Qwen3-8B", "", (), sampled=same))
    add(home, "from-a-folder", 4, "merged", base=Identity(sampled=same))  # the same weights without a name
    merged = Identity(sampled="7" * 64)
    add(home, "merge", 7, "merged", base=Identity(sampled=same), identity=merged)
    add(home, "small", 8, "quantized", base=merged)
    add(home, "elsewhere", 5, base=Identity(sampled="6" * 64))
    add(home, "nameless", 6)
    base = Home(home)
    with base.store_lock(shared=True):
        store.add_record(base, Record("base", identity=Identity("Qwen/Qwen3-8B", sampled=same)), "qwen")
        store.add_record(base, Record("base", identity=Identity(sampled="6" * 64)), "house-model")
    found = overview(Query(), home)
    names = {group.base: [entry.row.name for entry in group.entries] for group in found.groups}
    assert names == {
        "Qwen/Qwen3-8B": ["from-hub", "measured", "other-commit", "from-a-folder", "merge", "small", "qwen"],
        "house-model": ["elsewhere", "house-model"],
        "no base recorded": ["nameless"],
    }
    assert [group.base for group in overview(Query(base="house-model"), home).groups] == ["house-model"]
    assert [entry.row.name for group in overview(Query(q="FOLDER qwen"), home).groups for entry in group.entries] == [
        "from-a-folder"
    ]
    assert overview(Query(kind="merged"), home).names == 2
    assert overview(Query(q="nobody"), home).names == 0


def test_what_cannot_be_read_is_said(serve: Serve, home: Path) -> None:
    add(home, "good")
    add(home, "rotten", 2)
    path = Home(home).record("rotten", 1)
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-9])
    url = serve()
    body = ask(url)[2]
    assert "1 record cannot be read and is not shown, rotten@1 for one." in body
    assert "good" in body
    status, _, body = ask(url, "/v/rotten/1")
    assert status == 500
    assert "rotten/1.json" in body
    assert "Traceback" not in body


def test_pages_of_a_hundred(serve: Serve, home: Path) -> None:
    for number in range(103):
        add(home, f"a-{number:03d}", number, base=QWEN)
    url = serve()
    first, second = ask(url)[2], ask(url, "/?page=2")[2]
    assert "a-099" in first
    assert "a-100" not in first
    assert "page 1 of 2" in first
    assert len(re.findall(r'href="/v/a-\d+/1"', second)) == 3
    for wrong in ("/?page=0", "/?page=-1", "/?page=x", "/?page=999999999", "/?page=%FF", "/?" + "a=1&" * 50, "/?q=%00"):
        assert ask(url, wrong)[0] == 200
    assert "page 2 of 2" in ask(url, "/?page=7")[2]


def test_a_version_page_has_its_commands_and_figures(serve: Serve, home: Path) -> None:
    adapter = add(home, "tone", 1, base=QWEN, method="lora", parameters={"r": 16})
    verbs.tag("tone", "prod", home=home)
    parents = (
        Parent("base", identity=QWEN, label=QWEN.label),
        Parent("adapter", adapter.content, parameters={"weight": 0.5}),
    )
    add(home, "desk", 2, "merged", base=QWEN, parents=parents, operation=Operation("merge", {"dtype": "bf16"}))
    level = Verification("model", True, {"kl": 0.001, "top1": 0.99}, {"max_kl": 0.01}, "2026-02-03T04:05:06Z")
    attach_verification("desk", [level], home=home)
    url = serve()
    body = ask(url, "/v/tone/1")[2]
    assert "adapterkit merge Qwen/Qwen3-8B tone@prod -o merged" in body
    assert 'href="/v/desk/2"' in body
    body = ask(url, "/v/desk/2")[2]
    assert "adapterkit serve-args desk@2 --for vllm" in body
    assert "weight 0.5" in body
    assert "max 0.01" in body
    assert "2026-02-03, adapterkit" in body
    status, headers, _ = ask(url, "/v/desk")
    assert (status, headers["location"]) == (302, "/v/desk/2")
    # The commands are ones that exist.
    for line in re.findall(r"<code>adapterkit (\S+)[^<]*</code>", body):
        assert line in app.list_commands(None)  # type: ignore[arg-type]


def test_a_removed_version_and_lost_bytes_are_marked(serve: Serve, home: Path, tmp_path: Path) -> None:
    from adapterkit.registry import register

    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    record = register.register(folder, "math").record
    Home(home).blob(record.files[1].sha256).unlink()
    verbs.remove("math@1")
    url = serve()
    body = ask(url, "/v/math/1")[2]
    assert "adapterkit remove --restore math@1" in body
    assert "1 of 2 files have lost their bytes" in body
    assert "math" not in ask(url)[2].partition("<main")[2]


def test_the_command(home: Path, tmp_path: Path) -> None:
    add(home, "math", base=QWEN)
    environment = {**os.environ, "ADAPTERKIT_HOME": str(home)}
    command = [sys.executable, "-m", "adapterkit", "ui", "--port", "0", "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
    ) as running:
        assert running.stdout is not None
        said = ""
        while not said.endswith("}\n"):
            said += running.stdout.readline()
        url = json.loads(said)["url"].rstrip("/")
        try:
            assert "math" in ask(url)[2]
            port = url.rpartition(":")[2]
            taken = CliRunner().invoke(app, ["ui", "--port", port], standalone_mode=False)
            assert f"port {port} of 127.0.0.1 cannot be used" in str(taken.exception)
        finally:
            running.send_signal(signal.SIGINT)
        assert running.wait(20) == 0


def test_a_page_of_verify_can_do_nothing_to_ours(serve: Serve, home: Path, tmp_path: Path) -> None:
    """It came with the version, from whoever made that: it runs in an origin of its own, without a network."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    register.register(folder, "math")
    page = b"<!doctype html><script>fetch('/')</script>"
    found = attach_verification("math", [Verification("tensors", True, {})], page=page)
    # A page of another minute shows the same figures: no new version.
    again = attach_verification("math", [Verification("tensors", True, {})], page=page + b"<p>later</p>")
    assert (again.new, again.record) == (False, found.record)
    url = serve()
    status, headers, body = ask(url, "/v/math/2/verify/")
    assert (status, body.encode()) == (200, page)
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert policy.endswith("sandbox allow-scripts")
    assert "The page that verify wrote" in ask(url, "/v/math/2")[2]
    status, headers, body = ask(url, "/v/math/1/verify/")
    assert (status, "keeps no page of verify" in body) == (404, True)
    assert "unsafe-inline" not in headers["content-security-policy"]
    assert ask(url, "/v/math/9/verify/")[0] == 404


def test_a_signed_version_takes_no_page(home: Path, tmp_path: Path) -> None:
    """Its signature covers all files that there are."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in ("adapter_config.json", "model.sig"):
        (folder / name).write_text("{}")
    register.register(folder, "math")
    found = attach_verification("math", [Verification("tensors", True, {})], page=b"<p>").record
    assert [file.path for file in found.files] == ["adapter_config.json", "model.sig"]
