"""`deploy` against servers that do as they should, and against ones that do not: the old version stays, the record too."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from models import plain_adapter, plain_base
from stub_servers import Stub, running

from adapterkit.cli import main
from adapterkit.errors import AdapterkitError, AuthError, CheckFailed, NotFound, RegistryError, ServerError, UsageError
from adapterkit.provenance.register import register
from adapterkit.registry import endpoints, refs, served, verbs
from adapterkit.registry.checkout import checkout
from adapterkit.registry.home import Home
from adapterkit.verbs.deploy import add_server, deploy, remove_server, undeploy
from adapterkit.verbs.deployed import status

BASE = "org/base"
TOLD = ("vllm", "sglang")
Start = Callable[..., Stub]


@pytest.fixture
def start() -> Iterator[Start]:
    with ExitStack() as stack:
        yield lambda kind, base=BASE, **more: stack.enter_context(running(Stub(kind, base, **more)))


@pytest.fixture
def two(home: Path, tmp_path: Path) -> Path:
    """Two versions of one adapter; ``prod`` is at the first."""
    base = plain_base(tmp_path / "base")
    for seed in (1, 2):
        folder = plain_adapter(tmp_path / f"a{seed}", base, seed=seed, base_model_name_or_path=BASE)
        register(folder, "tickets")
    verbs.tag("tickets@1", "prod")
    return home


def names(stub: Stub) -> set[str]:
    return set(stub.loaded)


def short(version: int) -> str:
    return f"tickets@{verbs.show(f'tickets@{version}').record.content[:12]}"


@pytest.mark.parametrize("kind", TOLD)
def test_a_server_is_brought_to_the_alias_and_follows_it(kind: str, two: Path, start: Start) -> None:
    stub = start(kind)
    first = deploy("tickets@prod", stub.url, kind=kind)
    assert (first.ref, first.served, first.before, first.new) == ("tickets@1", short(1), "", True)
    assert names(stub) == {short(1)}
    again = deploy("tickets@prod", stub.url)  # the server is known by its address now
    assert not again.new
    assert len(served.served_history(again.server, home=two)) == 1
    verbs.tag("tickets@2", "prod")
    (state,) = status()
    assert (state.state, state.behind, state.alias_version, state.ok) == ("served", True, 2, False)
    second = deploy("tickets@prod", first.server)
    assert (second.before, second.ref) == ("tickets@1", "tickets@2")
    assert names(stub) == {short(1), short(2)}  # the way back is short
    verbs.tag("tickets@1", "prod")
    loads = sum("/load" in path for _, path, _ in stub.calls)
    assert deploy("tickets@prod", first.server).ref == "tickets@1"
    assert sum("/load" in path for _, path, _ in stub.calls) == loads
    (state,) = status()
    assert state.ok
    steps = [(step.version, step.state) for step in served.served_history(first.server, home=two)]
    assert steps == [(1, "serving"), (2, "serving"), (1, "stopped"), (1, "serving"), (2, "stopped")]


@pytest.mark.parametrize("kind", TOLD)
@pytest.mark.parametrize(
    ("fault", "error", "said"),
    [
        ("silent", CheckFailed, "does not list it"),
        ("hides", CheckFailed, "does not list it"),
        ("stale", CheckFailed, "exactly as with tickets@1"),
        ("base", CheckFailed, "exactly as with its base"),
        ("mute", CheckFailed, "with nothing"),
        ("slow", ServerError, "in time"),
        ("dies", ServerError, "overloaded"),
        ("fixed", NotFound, "load_lora_adapter"),
    ],
)
def test_where_a_server_goes_wrong_the_old_version_and_the_record_stay(
    kind: str, fault: str, error: type[AdapterkitError], said: str, two: Path, start: Start
) -> None:
    stub = start(kind)
    server = deploy("tickets@prod", stub.url, kind=kind).server
    before = served.served_history(server, home=two)
    verbs.tag("tickets@2", "prod")
    stub.faults.add(fault)
    with pytest.raises(error, match=said) as caught:
        deploy("tickets@prod", server, timeout=0.7 if fault == "slow" else 20)
    assert caught.value.exit_code == error.exit_code
    assert served.served_history(server, home=two) == before
    assert refs.get(Home(two), "tickets", "prod").version == 2  # type: ignore[union-attr]
    assert short(1) in names(stub)
    if fault not in ("dies", "slow", "hides"):
        assert names(stub) == {short(1)}
    stub.faults.clear()
    assert deploy("tickets@prod", server).ref == "tickets@2"  # and when it is well again, it goes on


def test_a_rank_that_is_refused_is_a_refusal_whatever_its_status(two: Path, start: Start, tmp_path: Path) -> None:
    register(plain_adapter(tmp_path / "wide", tmp_path / "base", rank=32, base_model_name_or_path=BASE), "wide")
    for kind, faults in (("sglang", {"old"}), ("sglang", set[str]()), ("vllm", set[str]())):
        stub = start(kind)
        stub.faults |= faults
        with pytest.raises(CheckFailed, match="rank 32 is greater"):
            deploy("wide", stub.url, kind=kind)
        assert not stub.loaded
    assert endpoints.running(Home(two)) == ()


def test_older_versions_are_unloaded_and_the_one_before_is_kept(two: Path, start: Start, tmp_path: Path) -> None:
    register(plain_adapter(tmp_path / "a3", tmp_path / "base", seed=3, base_model_name_or_path=BASE), "tickets")
    stub = start("vllm")
    stub.loaded["somebody-else"] = "/elsewhere"
    for version in (1, 2, 3):
        deploy(f"tickets@{version}", stub.url, kind="vllm")
    assert names(stub) == {"somebody-else", short(2), short(3)}
    assert not deploy("tickets@3", stub.url).new
    assert names(stub) == {"somebody-else", short(2), short(3)}


def test_what_does_not_suit_is_refused_before_the_server_is_told(two: Path, start: Start, tmp_path: Path) -> None:
    base = tmp_path / "base"
    dora = plain_adapter(tmp_path / "dora", base, base_model_name_or_path=BASE, modules_to_save=["lm_head"])
    register(dora, "whole")
    register(plain_adapter(tmp_path / "stray", base, base_model_name_or_path="org/other"), "stray")
    register(plain_adapter(tmp_path / "huge", base, rank=1024, base_model_name_or_path=BASE), "huge")
    register(base, "model", kind="merged")
    stub = start("vllm")
    with pytest.raises(CheckFailed, match=r"modules_to_save.*refused") as caught:
        deploy("whole", stub.url, kind="vllm")
    assert "adapterkit merge" in caught.value.hint
    with pytest.raises(CheckFailed, match=r"trained on org/other, and .* serves org/base"):
        deploy("stray", stub.url, kind="vllm")
    with pytest.raises(CheckFailed, match="512 is the largest rank"):
        deploy("huge", stub.url, kind="vllm")
    with pytest.raises(UsageError, match="is merged"):
        deploy("model", stub.url, kind="vllm")
    with pytest.raises(UsageError, match="gives no share"):
        deploy("tickets", stub.url, kind="vllm", canary=0.1)
    with pytest.raises(UsageError, match="cannot be told"):
        deploy("tickets", stub.url, kind="ollama")
    with pytest.raises(UsageError, match="nobody said what runs"):
        deploy("tickets", stub.url)
    assert not any(method == "POST" for method, _, _ in stub.calls)


def test_the_base_is_told_apart_by_its_weights_and_not_by_its_name(home: Path, start: Start, tmp_path: Path) -> None:
    base = plain_base(tmp_path / "mine" / "base")
    from models import random_tensors, read_tensors, write_checkpoint

    shapes = {name: tuple(t.shape) for name, t in read_tensors(base).items()}
    config = json.loads((base / "config.json").read_text())
    sibling = write_checkpoint(tmp_path / "theirs" / "base", random_tensors(shapes, "bfloat16", 9), config)
    folder = plain_adapter(tmp_path / "a", base, base_model_name_or_path=BASE)
    register(folder, "tickets", base=base)
    with pytest.raises(CheckFailed, match="same shapes, other weights"):
        deploy("tickets", start("vllm", str(sibling)).url, kind="vllm")
    found = deploy("tickets", start("vllm", str(base)).url, kind="vllm")
    assert any("same weights" in text for text in found.notes)
    with pytest.raises(CheckFailed, match="other weights"):
        deploy("tickets", start("vllm", BASE).url, kind="vllm", base=str(sibling))
    renamed = start("sglang", "a-mirror/of-it")
    assert deploy("tickets", renamed.url, kind="sglang", base=str(base)).new


def test_lorax_loads_by_the_path_and_tgi_has_to_be_started_anew(two: Path, start: Start, tmp_path: Path) -> None:
    lorax = start("lorax")
    found = deploy("tickets@prod", lorax.url, kind="lorax")
    assert Path(found.served, "adapter_model.safetensors").is_file()
    lorax.faults.add("stale")
    with pytest.raises(CheckFailed, match="exactly as with tickets@1"):
        deploy("tickets@2", found.server)
    tgi = start("tgi")
    script = tmp_path / "start.sh"
    with pytest.raises(CheckFailed, match="only when it starts"):
        deploy("tickets@prod", tgi.url, kind="tgi", restart_file=script)
    words = script.read_text().split()
    assert words[words.index("--model-id") + 1] == BASE
    tgi.start_tgi(words)
    first = deploy("tickets@prod", tgi.url, kind="tgi")
    assert (first.served, first.new) == (short(1).replace("@", "-"), True)
    assert not deploy("tickets@prod", tgi.url, kind="tgi").new
    assert set(tgi.loaded) == {first.served}
    # The next one is started beside it: what it has is nowhere listed, so that it comes from the record.
    with pytest.raises(CheckFailed, match="exactly as with its base"):
        deploy("tickets@2", tgi.url, kind="tgi", restart_file=script)
    tgi.loaded.clear()
    assert [one.state for one in status(server=first.server)] == ["missing"]
    tgi.start_tgi(script.read_text().split())
    assert len(tgi.loaded) == 2
    assert [one.state for one in status(server=first.server)] == ["served"]
    assert deploy("tickets@2", tgi.url, kind="tgi").before == "tickets@1"
    with pytest.raises(UsageError, match="takes a path apart"):
        deploy("tickets@1", start("tgi").url, kind="tgi", copy=str(tmp_path / "of@here"))
    with pytest.raises(UsageError, match="text as a prompt"):
        deploy("tickets@prod", tgi.url, kind="tgi", probe=[1, 2])
    assert {one.state for one in status()} == {"served"}


def test_a_copy_for_a_server_that_sees_another_folder(two: Path, start: Start, tmp_path: Path) -> None:
    stub = start("sglang")
    stub.faults.add("silent")
    add_server("gpu", stub.url, kind="sglang", copy=str(tmp_path / "served"), seen_as="/adapters")
    with pytest.raises(CheckFailed, match="does not list"):
        deploy("tickets@1", "gpu")
    (asked,) = [body for _, path, body in stub.calls if path == "/load_lora_adapter"]
    folder = tmp_path / "served" / short(1).replace("@", "-")
    assert asked["lora_path"] == f"/adapters/{folder.name}"
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    (folder / "adapter_model.safetensors").write_bytes(b"other")
    with pytest.raises(CheckFailed, match="is not the file of tickets@1"):
        deploy("tickets@1", "gpu")


@pytest.mark.parametrize("planted", ["link", "dangling", "inside", "more", "owner", "pipe", "file"])
def test_what_another_prepared_at_the_place_of_a_copy_is_not_served(
    planted: str, two: Path, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name can be foreseen, and whoever may write there could change what is served afterwards."""
    stub = start("sglang")
    add_server("gpu", stub.url, kind="sglang", copy=str(tmp_path / "served"))
    folder = tmp_path / "served" / short(1).replace("@", "-")
    theirs = checkout("tickets@1", to=tmp_path / "theirs")
    folder.parent.mkdir()
    if planted in ("link", "dangling"):
        folder.symlink_to(theirs if planted == "link" else tmp_path / "nowhere")
    elif planted == "file":
        folder.write_text("x")
    else:
        theirs.rename(folder)
        if planted == "inside":
            weights = folder / "adapter_model.safetensors"
            weights.rename(tmp_path / "elsewhere")
            weights.symlink_to(tmp_path / "elsewhere")
        elif planted == "more":
            (folder / "chat_template.jinja").write_text("{{ 'theirs' }}")
        elif planted == "pipe":
            os.mkfifo(folder / "tokenizer.json")
        else:
            monkeypatch.setattr("adapterkit.disk.is_of_user", lambda path: False)
    with pytest.raises(AdapterkitError, match=r"link|belongs to another|is no file of tickets@1|exists|no folder"):
        deploy("tickets@1", "gpu")
    assert not stub.loaded
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("kind", TOLD)
def test_what_is_served_from_another_folder_comes_back_where_the_new_one_fails(
    kind: str, two: Path, start: Start, tmp_path: Path
) -> None:
    stub = start(kind)
    deploy("tickets@1", stub.url, kind=kind)
    before = dict(stub.loaded)
    add_server("gpu", stub.url, kind=kind, copy=str(tmp_path / "served"), seen_as="/adapters")
    with pytest.raises(AdapterkitError):
        deploy("tickets@1", "gpu")  # the server sees no such folder
    assert stub.loaded == before
    (state,) = status()
    assert state.state == "served"


def test_who_waited_for_another_deployment_deploys_what_the_alias_says_now(
    two: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = endpoints.server_lock

    def lock(*given: Any) -> Any:
        verbs.tag("tickets@2", "prod")  # while it waits
        return kept(*given)

    monkeypatch.setattr(endpoints, "server_lock", lock)
    assert deploy("tickets@prod", start("vllm").url, kind="vllm").ref == "tickets@2"
    assert status()[0].ok


@pytest.mark.parametrize("kind", TOLD)
def test_what_is_taken_off_goes_with_the_version_before_it(kind: str, two: Path, start: Start) -> None:
    stub = start(kind)
    for version in (1, 2):
        deploy(f"tickets@{version}", stub.url, kind=kind)
    stub.loaded["somebody-else"] = "/elsewhere"
    undeploy("tickets", stub.url)
    assert names(stub) == {"somebody-else"}


def test_a_token_is_read_from_its_variable_and_kept_nowhere(
    two: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = start("vllm", token="s3cret-token")
    with pytest.raises(AuthError, match="right token"):
        deploy("tickets@1", stub.url, kind="vllm")
    add_server("gpu", stub.url, kind="vllm", token_env="GPU_TOKEN")
    with pytest.raises(AuthError, match="GPU_TOKEN holds no token"):
        deploy("tickets@1", "gpu")
    monkeypatch.setenv("GPU_TOKEN", "s3cret-token")
    assert deploy("tickets@1", "gpu").new
    assert not any(b"s3cret" in path.read_bytes() for path in two.rglob("*") if path.is_file())
    for url in ("ftp://host", "http://user:password@host", "gpu:8000", "http://host/?token=x"):
        with pytest.raises(UsageError):
            add_server("other", url, kind="vllm")
    with pytest.raises(UsageError, match="not the token"):
        add_server("other", stub.url, kind="vllm", token_env="s3cret token")


def test_taking_off_forgetting_and_states(two: Path, start: Start) -> None:
    stub = start("vllm")
    server = deploy("tickets@prod", stub.url, kind="vllm").server
    stub.loaded.clear()
    (state,) = status()
    assert (state.state, state.ok) == ("missing", False)
    stub.faults.add("broken")
    assert status()[0].state == "unreachable"
    stub.faults.clear()
    deploy("tickets@prod", server)
    verbs.untag("tickets", "prod")
    assert status()[0].behind
    undeploy("tickets", server)
    assert names(stub) == set()
    assert status() == ()
    with pytest.raises(NotFound, match="not deployed"):
        undeploy("tickets", server)
    assert remove_server(server)
    assert not remove_server(server)
    with pytest.raises(NotFound, match="no server is called"):
        deploy("tickets@1", server)


def test_a_history_that_was_touched_is_seen(two: Path, start: Start) -> None:
    stub = start("vllm")
    server = deploy("tickets@1", stub.url, kind="vllm").server
    deploy("tickets@2", server)
    (path,) = (two / "served").iterdir()
    lines = path.read_bytes().splitlines(keepends=True)
    for data in (lines[1], lines[0].replace(b'"version":1', b'"version":2'), lines[0] + lines[0], b"{}\n"):
        path.write_bytes(data)
        with pytest.raises(RegistryError, match="damaged"):
            status()


def test_the_command_line_says_what_is_served_and_its_exit_codes(
    two: Path, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(["deploy", *words])
        return (int(end.value.code or 0), *capsys.readouterr())

    stub = start("vllm")
    assert run("--add-server", "gpu", stub.url, "--kind", "vllm")[0] == 0
    code, out, err = run("tickets@prod", "--to", "gpu")
    assert code == 0, err
    assert out.startswith(f"gpu serves tickets@1 as {short(1)}\nit answered: answer ")
    code, out, _ = run("--status", "--json")
    (row,) = json.loads(out)["deployments"]
    assert (code, row["ok"], row["ref"], row["alias"], row["state"]) == (0, True, "tickets@1", "prod", "served")
    verbs.tag("tickets@2", "prod")
    code, out, _ = run("--status")
    assert code == 3
    assert "prod is at version 2 now" in out
    stub.faults.add("silent")
    assert run("tickets@prod", "--to", "gpu")[0] == 3
    stub.faults.add("broken")
    assert run("tickets@prod", "--to", "gpu")[0] == 5
    assert run("tickets@prod", "--to", "nowhere")[0] == 7
    assert run("tickets@prod", "--to", "http://127.0.0.1:9", "--kind", "vllm")[0] == 5
    for words in (["tickets"], ["--status", "tickets"], [], ["tickets", "--to", "gpu", "--kind", "vllm"]):
        assert run(*words)[0] == 2, words
    url = stub.url
    for words in (
        ["--status", "--kind", "vllm"],
        ["--status", "--off"],
        ["--status", "--probe", "x"],
        ["tickets", "--to", "gpu", "--off", "--canary", "0.1"],
        ["tickets", "--to", "gpu", "--off", "--restart-file", "x"],
        ["--add-server", "other", url, "--kind", "vllm", "--to", "gpu"],
        ["--remove-server", "gpu", "--allow-same"],
    ):
        code, _, err = run(*words)
        assert (code, "has no meaning with" in err) == (2, True), words
    assert run("tickets", "--to", "gpu", "--canary", "0.1")[0] == 2
    stub.faults.clear()
    assert run("tickets", "--to", "gpu", "--off")[:2] == (
        0,
        "tickets is no longer served by gpu, where it was tickets@1\n",
    )
    assert run("--remove-server", "gpu")[0] == 0


@pytest.mark.parametrize("said", ["ADAPTERKIT_USER", "GITHUB_ACTOR"])
def test_who_deployed_it_is_written_down(said: str, two: Path, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ADAPTERKIT_USER", raising=False)
    monkeypatch.setenv(said, "release-bot")
    deploy("tickets@1", start("vllm").url, kind="vllm")
    assert status()[0].by == "release-bot"
