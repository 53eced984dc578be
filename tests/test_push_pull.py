"""`push` and `pull`: the real huggingface_hub client against a Hub on the loopback interface."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_writes import SILENT, TOKEN, WritableHub, writable_hub  # noqa: F401  (the fixture hub)
from models import edit_config, plain_adapter, plain_base, read_tensors, write_checkpoint

import adapterkit
from adapterkit.checkpoint import hub as client
from adapterkit.checkpoint.open import open_checkpoint
from adapterkit.errors import (
    AdapterkitError,
    AuthError,
    CheckFailed,
    HubError,
    NotFound,
    OutputError,
    RegistryError,
    UnsafeError,
    UsageError,
)
from adapterkit.hub.files import allowed
from adapterkit.hub.pull import pull
from adapterkit.hub.push import push
from adapterkit.provenance.register import register
from adapterkit.registry import lineage, verbs
from adapterkit.verbs.check import check

REPO = "my-org/mine"
# The client uploads with an argument that its own HTTP library has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return plain_base(tmp_path / "base", shards=2)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return plain_adapter(tmp_path / "adapter", base, base_model_name_or_path="someone/base")


@pytest.fixture
def registered(adapter: Path, base: Path, hub: WritableHub) -> str:
    return register(adapter, "mine", base=base).record.ref


def front_of(card: bytes) -> Any:
    return yaml.safe_load(card.decode().split("---\n")[1])


# ------------------------------------------------------------------ the road there and back


def test_push_is_one_commit_and_a_tag(hub: WritableHub, registered: str, adapter: Path) -> None:
    found = push(registered, REPO, private=True, tag="v1")
    files = hub.files(REPO)
    assert hub.commits_made == 1
    assert hub.repos[REPO].private
    assert hub.tags[REPO] == {"v1": found.commit}
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors", "adapterkit.json"}
    assert files["adapter_model.safetensors"] == (adapter / "adapter_model.safetensors").read_bytes()
    front = front_of(files["README.md"])
    assert front["base_model"] == "someone/base"
    assert front["base_model_relation"] == "adapter"
    assert front["library_name"] == "peft"
    assert {"adapterkit", "lora"} <= set(front["tags"])
    record = json.loads(files["adapterkit.json"])
    assert (record["name"], record["version"]) == ("", 0)
    assert record["base"]["sampled"] == verbs.show("mine").record.base.sampled

    again = push(registered, REPO, private=True, tag="v1")
    assert (again.new, again.commit, hub.commits_made) == (False, found.commit, 1)


def test_pull_on_another_home_keeps_lineage(
    hub: WritableHub, registered: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapterkit.merge(base, ["mine"], tmp_path / "out")
    register(tmp_path / "out", "merged")
    push("mine", REPO, tag="v1")
    push("merged", "my-org/merged")
    content = verbs.show("mine").record.content
    monkeypatch.setenv("ADAPTERKIT_HOME", str(tmp_path / "elsewhere"))
    found = pull(f"{REPO}@v1")
    assert found.record.ref == "mine@1"
    assert found.record.content == content
    assert found.record.origin.repo == REPO
    assert found.record.origin.commit == hub.tags[REPO]["v1"]
    assert not pull(REPO).new
    merged = pull("my-org/merged", name="theirs")
    nodes = {node.label for node in lineage.lineage("theirs").nodes}
    assert len(nodes) == 3  # one base, known by its weights: the adapter names it, the merge used a folder of it
    assert nodes - {"base", "someone/base"} == {"theirs@1", "mine@1"}
    assert merged.record.identity.sampled
    assert check(base, ["mine"]).bases[0].verdict == "likely"
    assert front_of(hub.files("my-org/merged")["README.md"])["library_name"] == "transformers"


def test_a_new_version_takes_old_files_away_and_keeps_the_users_own(
    hub: WritableHub, base: Path, tmp_path: Path
) -> None:
    register(base, "model", kind="merged")
    push("model", REPO)
    hub.add(REPO, {**hub.files(REPO), "mine.png": b"png"})
    one = write_checkpoint(tmp_path / "one", read_tensors(base))
    register(one, "model", kind="merged")
    found = push("model", REPO)
    assert set(found.deleted) == {path.name for path in base.iterdir() if "-of-" in path.name or "index" in path.name}
    assert set(hub.files(REPO)) == {"README.md", "adapterkit.json", "config.json", "mine.png", "model.safetensors"}


def test_create_pr_leaves_main_alone_and_proposes_once(hub: WritableHub, registered: str) -> None:
    hub.add(REPO, {"README.md": b"# Hello\n"})
    first = push(registered, REPO, create_pr=True)
    second = push(registered, REPO, create_pr=True)
    assert first.pull_request == second.pull_request == f"{hub.url}/{REPO}/discussions/1"
    assert set(hub.files(REPO)) == {"README.md"}
    assert "adapter_model.safetensors" in hub.files(REPO, "refs/pr/1")


# ------------------------------------------------------------------ the card


def test_prose_and_front_matter_of_the_user_stay(hub: WritableHub, registered: str) -> None:
    front = b"license: mit\ntags:\n- tickets\n- base_model:adapter:/home/me/base\nbase_model: /home/me/base\n"
    card = b"---\n" + front + b"---\n# Mine\n\nProse.\n"
    hub.add(REPO, {"README.md": card})
    push(registered, REPO)
    front = front_of(hub.files(REPO)["README.md"])
    assert front["license"] == "mit"
    assert front["tags"][0] == "tickets"
    assert b"/home/me" not in hub.files(REPO)["README.md"]
    changed = hub.files(REPO)["README.md"].replace(b"Prose.", b"Better prose.") + b"\nAfter.\n"
    hub.add(REPO, {**hub.files(REPO), "README.md": changed})
    assert push(registered, REPO).new is False
    assert hub.files(REPO)["README.md"] == changed


@pytest.mark.parametrize(
    "card",
    [
        b"---\ntags: [a\n---\n# x\n",
        b"---\n- a\n- b\n---\n",
        b"---\na: &x 1\nb: *x\n---\n",
        b"---\nt: !!python/object/apply:os.system [id]\n---\n",
        b"\xff\xfe---\n",
        b"---\n" + b"a: " + b"x" * 70000 + b"\n---\n",
    ],
)
def test_a_broken_card_is_not_written_over(hub: WritableHub, registered: str, card: bytes) -> None:
    hub.add(REPO, {"README.md": card})
    with pytest.raises(RegistryError, match="README"):
        push(registered, REPO)
    assert hub.files(REPO) == {"README.md": card}
    push(registered, REPO, replace_card=True)
    assert front_of(hub.files(REPO)["README.md"])["base_model"] == "someone/base"


def test_the_hub_has_the_last_word_on_a_card(hub: WritableHub, adapter: Path) -> None:
    edit_config(adapter, base_model_name_or_path="gpt2")  # a base without an organization
    register(adapter, "mine")
    with pytest.raises(RegistryError, match="refused the card"):
        push("mine", REPO)
    assert hub.commits_made == 0


# ------------------------------------------------------------------ what may not be published


def test_only_the_allow_list_is_published(hub: WritableHub, adapter: Path) -> None:
    for name in ("notes.txt", "adapter_model.bin", "train.py", "tokenizer.json"):
        (adapter / name).write_bytes(b"{}")
    (adapter / ".env").write_text(f"HF_TOKEN={TOKEN}")
    found = push(str(adapter), REPO)
    assert set(found.left_out) == {"notes.txt", "adapter_model.bin", "train.py"}
    assert set(hub.files(REPO)) == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "adapterkit.json", "tokenizer.json"),
    }


@pytest.mark.parametrize(
    ("path", "fine"),
    [
        ("adapter_model.safetensors", True),
        ("model-00001-of-00002.safetensors", True),
        ("1_Pooling/config.json", True),
        ("LICENSE.txt", True),
        ("model.Q4_K_M.gguf", True),
        ("pytorch_model.bin", False),
        ("config.json.bak", False),
        (".env", False),
        (".git/config.json", False),
        ("a/b/config.json", False),
        ("id_rsa", False),
    ],
)
def test_allow_list(path: str, fine: bool) -> None:
    assert allowed(path) is fine


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("README.md", f"my token is {TOKEN}"),
        ("generation_config.json", '{"key": "sk-' + "a1" * 20 + '"}'),
        ("LICENSE", "-----BEGIN RSA PRIVATE KEY-----"),
        ("tokenizer_config.json", '{"cache": "/home/me/models/base"}'),
        ("config.json", '{"x": {"y": ["/tmp/run/1"]}}'),
        ("generation_config.json", "not json"),
    ],
)
def test_secrets_and_paths_are_refused(hub: WritableHub, adapter: Path, name: str, text: str) -> None:
    (adapter / name).write_text(text)
    with pytest.raises(UnsafeError, match=name) as raised:
        push(str(adapter), REPO)
    assert TOKEN not in str(raised.value)
    assert hub.calls == []


def test_secrets_in_weights_metadata_are_refused(hub: WritableHub, base: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = plain_adapter(tmp_path / "a", base)
    save_file(read_tensors(folder), folder / "adapter_model.safetensors", metadata={"format": "pt", "by": TOKEN})
    with pytest.raises(UnsafeError, match="adapter_model"):
        push(str(folder), REPO)


def test_links_are_refused(hub: WritableHub, adapter: Path) -> None:
    (adapter / "LICENSE").symlink_to(adapter / "adapter_config.json")
    with pytest.raises(UnsafeError, match="link"):
        push(str(adapter), REPO)
    assert hub.calls == []


def test_a_local_base_is_named_by_its_hub_id_or_refused(hub: WritableHub, base: Path, tmp_path: Path) -> None:
    folder = plain_adapter(tmp_path / "local", base, base_model_name_or_path=str(base))
    register(folder, "mine", base=base)
    with pytest.raises(UnsafeError, match=r"base.id"):
        push("mine", REPO)
    assert hub.calls == []
    found = push("mine", REPO, base_id="someone/base")
    files = hub.files(REPO)
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "someone/base"
    assert not any(str(tmp_path).encode() in data for data in files.values())
    assert json.loads(files["adapterkit.json"])["parents"][0]["content"] == verbs.show("mine").record.content
    assert found.notes
    assert pull(REPO, name="theirs").record.base.id == "someone/base"


def test_private_never_goes_to_a_public_repository(hub: WritableHub, registered: str) -> None:
    hub.add(REPO, {"README.md": b""})
    with pytest.raises(UnsafeError, match="public"):
        push(registered, REPO, private=True)
    assert hub.commits_made == 0


def test_rotten_bytes_are_not_published(hub: WritableHub, registered: str, tmp_path: Path) -> None:
    blob = max((p for p in (tmp_path / "home/objects").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    blob.chmod(0o644)
    blob.write_bytes(bytes(blob.stat().st_size))
    with pytest.raises(CheckFailed, match="not those of its record"):
        push(registered, REPO)
    assert hub.calls == []


# ------------------------------------------------------------------ a Hub that says no, fails or lies


@pytest.mark.parametrize(
    ("words", "status", "error", "said"),
    [
        ("/api/models/my-org/mine", 500, HubError, "500"),
        ("/api/models/my-org/mine", 429, HubError, "429"),
        ("POST /api/repos/create", 401, AuthError, "401"),
        ("POST /api/repos/create", 403, AuthError, "403"),
        ("/preupload/", 403, AuthError, "403"),
        ("PUT /storage/", 403, AuthError, "403"),
        ("PUT /storage/", 500, HubError, "500"),
        ("/commit/", 403, AuthError, "write"),
        ("/commit/", 409, HubError, "meanwhile"),
        ("/commit/", 412, HubError, "meanwhile"),
        ("/commit/", 429, HubError, "429"),
        ("/commit/", 503, HubError, "503"),
        ("/commit/", None, HubError, "could not be reached"),
        ("/tag/", 500, HubError, "500"),
    ],
)
def test_a_failed_push_says_why_and_the_next_one_finishes(
    hub: WritableHub, registered: str, words: str, status: int | None, error: type[AdapterkitError], said: str
) -> None:
    hub.break_write(words, status, times=9 if status in (429, 500, 503) else 1)
    with pytest.raises(error, match=said):
        push(registered, REPO, tag="v1")
    assert hub.commits_made == (1 if words == "/tag/" else 0)
    hub.write_faults.clear()
    found = push(registered, REPO, tag="v1")
    assert hub.commits_made == 1
    assert hub.tags[REPO]["v1"] == found.commit


@pytest.mark.parametrize("status", [None, 500, 504])
def test_a_lost_answer_is_no_failure(hub: WritableHub, registered: str, status: int | None) -> None:
    hub.break_write("/commit/", status, after=True)
    found = push(registered, REPO, tag="v1")
    assert found.new
    assert hub.commits_made == 1
    assert hub.tags[REPO]["v1"] == found.commit
    hub.tags.clear()
    hub.break_write("/tag/", status, after=True)
    assert push(registered, REPO, tag="v2").new is False


def test_a_lost_answer_to_a_proposal_makes_no_second_one(hub: WritableHub, registered: str) -> None:
    hub.add(REPO, {"README.md": b"# Hello\n"})
    hub.break_write("/commit/", None, after=True)
    assert push(registered, REPO, create_pr=True).pull_request == f"{hub.url}/{REPO}/discussions/1"
    assert len(hub.proposals[REPO]) == 1


def test_whoever_was_faster_is_not_overwritten(
    hub: WritableHub, registered: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, {"README.md": b"# one\n"})
    from huggingface_hub import HfApi

    real = HfApi.create_commit

    def slow(self: HfApi, *arguments: Any, **options: Any) -> Any:
        hub.add(REPO, {"README.md": b"# two\n"})
        return real(self, *arguments, **options)

    monkeypatch.setattr(HfApi, "create_commit", slow)
    with pytest.raises(HubError, match="meanwhile"):
        push(registered, REPO)
    assert hub.files(REPO) == {"README.md": b"# two\n"}


def test_a_tag_is_never_moved(hub: WritableHub, registered: str, base: Path, adapter: Path) -> None:
    push(registered, REPO, tag="v1")
    before = dict(hub.tags[REPO])
    register(plain_adapter(adapter, base, seed=3, base_model_name_or_path="someone/base"), "mine")
    with pytest.raises(OutputError, match="not moved"):
        push("mine", REPO, tag="v1")
    assert hub.tags[REPO] == before
    assert hub.commits_made == 1


def test_without_a_token(hub: WritableHub, registered: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(AuthError):
        push(registered, REPO)
    hub.add("my-org/secret", {"config.json": b"{}"}, private=True)
    with pytest.raises(AuthError):
        pull("my-org/secret")


def test_pull_checks_every_byte(hub: WritableHub, adapter: Path, tmp_path: Path) -> None:
    import hashlib

    hub.add(REPO, adapter)
    data = (adapter / "adapter_model.safetensors").read_bytes()
    hub.lies[hashlib.sha256(data).hexdigest()] = data[:-1] + bytes([data[-1] ^ 1])
    with pytest.raises(CheckFailed, match="not those of commit"):
        pull(REPO)
    home = tmp_path / "home"
    assert not (home / "records/mine").exists()
    assert list((home / "pulling").iterdir()) == []
    hub.lies.clear()
    assert pull(REPO).record.ref == "mine@1"


def test_pull_takes_what_is_there_now(hub: WritableHub, adapter: Path, base: Path) -> None:
    first = hub.add(REPO, adapter)
    assert pull(REPO).commit == first
    second = hub.add(REPO, plain_adapter(adapter, base, seed=3))
    hub.break_write("/api/models/my-org/mine", 503, times=9)
    with pytest.raises(HubError):
        pull(REPO)  # not what the cache remembers of main
    hub.write_faults.clear()
    assert pull(REPO).commit == second
    assert pull(f"{REPO}@{first}").record.ref == "mine@1"


def test_pull_refuses_a_record_about_other_files(hub: WritableHub, registered: str) -> None:
    push(registered, REPO)
    hub.add(REPO, {**hub.files(REPO), "adapter_config.json": b'{"peft_type": "LORA", "r": 1}'})
    with pytest.raises(CheckFailed, match="describes another"):
        pull(REPO, name="other")
    assert pull(REPO, name="other", ignore_record=True).record.base is None


@pytest.mark.parametrize(
    ("words", "status", "error"),
    [
        ("/api/models/", 401, AuthError),
        ("/api/models/", 403, AuthError),
        ("/api/models/", 429, HubError),
        ("/api/models/", 500, HubError),
        ("/api/models/", None, HubError),
        ("/resolve/", 403, HubError),
        ("/resolve/", 503, HubError),
        ("/storage/", 500, HubError),
        ("/storage/", None, HubError),
    ],
)
def test_a_failed_pull_leaves_nothing_and_the_next_one_finishes(
    hub: WritableHub, adapter: Path, tmp_path: Path, words: str, status: int | None, error: type[AdapterkitError]
) -> None:
    hub.add(REPO, adapter)
    hub.fail(words, status, times=40)
    with pytest.raises(error):
        pull(REPO)
    home = tmp_path / "home"
    assert not (home / "records/mine").exists()
    assert not (home / "pulling").exists() or list((home / "pulling").iterdir()) == []
    hub.faults.clear()
    assert pull(REPO).record.ref == "mine@1"


@pytest.mark.parametrize(
    ("ref", "error"),
    [
        ("nobody/nothing", NotFound),
        (f"{REPO}@nowhere", NotFound),
        ("mine", UsageError),
        (f"{REPO}/sub", UsageError),
        ("my-org/pickles", NotFound),
    ],
)
def test_pull_of_what_is_not_there(hub: WritableHub, adapter: Path, ref: str, error: type[AdapterkitError]) -> None:
    hub.add(REPO, adapter)
    hub.add("my-org/pickles", {"pytorch_model.bin": b"x"})
    with pytest.raises(error):
        pull(ref)


def test_offline(hub: WritableHub, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub.add(REPO, adapter)
    pull(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.calls)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        pull(REPO)
    with pytest.raises(HubError):
        push("mine", "my-org/other")
    assert len(hub.calls) == asked


def test_hostile_names_in_a_repository(hub: WritableHub, adapter: Path, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in adapter.iterdir()}
    hub.add(REPO, {**files, "../../evil.safetensors": b"x"})
    with pytest.raises(AdapterkitError, match="not a relative path"):
        pull(REPO)
    assert not list(tmp_path.rglob("evil*"))


# ------------------------------------------------------------------ which base


def test_siblings_are_told_apart_without_downloading_them(hub: WritableHub, tmp_path: Path) -> None:
    one = plain_base(tmp_path / "base", layers=3, width=512, shards=2)
    hub.add("org/base", one)
    tensors = {name: tensor * 1.1 for name, tensor in read_tensors(one).items()}
    hub.add("org/base-instruct", write_checkpoint(tmp_path / "instruct", tensors, shards=2))
    adapter = plain_adapter(tmp_path / "adapter", one, base_model_name_or_path="org/base-instruct")
    register(adapter, "mine", base="org/base-instruct")
    whole = open_checkpoint(one).nbytes
    for base, verdict in (("org/base", "other"), ("org/base-instruct", "same")):
        before = hub.sent
        report = check(base, ["mine"])
        assert report.bases[0].verdict == verdict
        assert hub.sent - before < 1_000_000 < whole
    report = check("org/base", ["mine"])
    assert not report.ok
    said = next(finding for finding in report.findings if finding.code == "other-weights")
    assert "made on org/base-instruct@" in said.message
    assert "this is org/base@" in said.message


def test_what_the_hub_states_is_enough_for_the_same_files(hub: WritableHub, base: Path, tmp_path: Path) -> None:
    """The base was registered from a folder in full; its copy on the Hub has the same files under another commit."""
    hub.add("org/mirror", base)
    adapter = plain_adapter(tmp_path / "adapter", base)
    register(adapter, "mine", base=base, full=True)
    report = check("org/mirror", ["mine"])
    assert (report.bases[0].verdict, report.bases[0].level) == ("same", "files")
    assert not any("resolve" in call.path and call.ranged is False and call.sent > 4096 for call in hub.calls)


@pytest.mark.parametrize("words", ["/api/models/my-org/mine", "/repos/create", "/preupload/", "/commit/", "/tag/"])
def test_a_hub_that_goes_silent_is_not_waited_for(
    hub: WritableHub, registered: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "SILENCE", 0.5)
    hub.break_write(words, SILENT, times=99)
    try:
        with pytest.raises(HubError, match=r"could not be reached|timed out"):
            push(registered, REPO, tag="v1")
        hub.write_faults.clear()
    finally:
        hub.speak.set()
    monkeypatch.setattr(client, "SILENCE", 60)
    assert push(registered, REPO, tag="v1").commit == hub.tags[REPO]["v1"]


def test_a_silent_hub_is_not_waited_for_when_it_is_read(
    hub: WritableHub, registered: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(registered, REPO)
    monkeypatch.setenv("ADAPTERKIT_HOME", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(client, "SILENCE", 0.5)
    hub.break_write("/api/models/my-org/mine", SILENT, times=99)  # files have limits of the client's own
    with pytest.raises(HubError):
        pull(REPO)
    hub.write_faults.clear()
    hub.speak.set()
    monkeypatch.setattr(client, "SILENCE", 60)
    assert pull(REPO).record.name
