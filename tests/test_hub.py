"""Checkpoints and adapters on the Hub: the real client against a Hub on the loopback interface."""

from __future__ import annotations

import io
import logging
from contextlib import redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING

import pytest
import torch
from hub import TOKEN, Hub, client_of, without_waits
from models import plain_adapter, plain_base, read_bytes, read_tensors
from safetensors.torch import save_file

import adapterkit
from adapterkit.adapters.load import load_adapter
from adapterkit.checkpoint.open import open_checkpoint
from adapterkit.checkpoint.plan import Plan
from adapterkit.errors import (
    AdapterkitError,
    AuthError,
    CheckpointError,
    HubError,
    NotFound,
    UnsafeError,
    UnsupportedAdapter,
)
from adapterkit.verbs.job import Measured

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub of our own, an empty cache, and a client that asks nobody else and has no token."""
    without_waits(monkeypatch)
    with Hub() as served, client_of(served, tmp_path / "cache", monkeypatch):
        yield served


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """3.4 MB, so that a header is a small part of it."""
    return plain_base(tmp_path / "base", layers=3, width=512, shards=2)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return plain_adapter(tmp_path / "adapter", base)


# ------------------------------------------------------------------ what is fetched


def test_headers_only_come_by_range(hub: Hub, base: Path) -> None:
    hub.add("org/base", base)
    opened = open_checkpoint("org/base", headers_only=True)
    local = open_checkpoint(base)
    assert opened.shapes == local.shapes
    assert opened.shards == local.shards
    assert opened.commit == hub.repos["org/base"].refs["main"]
    weights = [call for call in hub.calls if "/storage/" in call.path and call.sent]
    assert len(weights) == 2
    assert all(call.ranged and call.status == 206 and call.sent <= 1 << 17 for call in weights)
    assert hub.sent < local.nbytes / 4


def test_header_that_is_longer_than_the_first_range(hub: Hub, tmp_path: Path) -> None:
    from models import write_checkpoint

    tensors = {f"{'x' * 200}.{index}": torch.zeros(2) for index in range(1000)}
    hub.add("org/wide", write_checkpoint(tmp_path / "wide", tensors))
    assert set(open_checkpoint("org/wide", headers_only=True)) == set(tensors)
    assert 2 <= sum("/storage/" in call.path and call.sent > 0 for call in hub.calls) <= 3


def test_rows_can_be_read_by_range(hub: Hub, base: Path) -> None:
    hub.add("org/base", base)
    opened = open_checkpoint("org/base", headers_only=True)
    before = hub.sent
    name = "model.layers.2.mlp.up_proj.weight"
    assert torch.equal(opened[name].read(512, 1024), read_tensors(base)[name][1])
    assert hub.sent - before == 1024


def test_server_without_ranges(hub: Hub, base: Path) -> None:
    hub.add("org/base", base)
    hub.ranges = False
    assert open_checkpoint("org/base", headers_only=True).shapes == open_checkpoint(base).shapes


def test_file_that_changes_while_it_is_read(hub: Hub, base: Path) -> None:
    hub.add("org/base", base)
    opened = open_checkpoint("org/base", headers_only=True)
    files = hub.repos["org/base"].commits[opened.commit or ""]
    files.update({name: data + b"more" for name, data in files.items()})
    with pytest.raises(CheckpointError, match="changed while it was read"):
        opened["model.layers.2.mlp.up_proj.weight"].read(0, 512)


def test_dry_run_downloads_no_weights(hub: Hub, base: Path, adapter: Path) -> None:
    hub.add("org/base", base)
    hub.add("org/adapter", adapter)
    planned = adapterkit.plan_merge("org/base", ["org/adapter"])
    assert [step.tensor for step in planned.plan.steps] == [
        step.tensor for step in adapterkit.plan_merge(base, [adapter]).plan.steps
    ]
    assert hub.sent < 600_000
    assert planned.report(Measured()).base_commit == hub.repos["org/base"].refs["main"]


def test_a_conversion_is_planned_from_headers_and_written_from_a_download(hub: Hub, base: Path, tmp_path: Path) -> None:
    hub.add("org/base", base)
    planned = adapterkit.plan_convert("org/base", to="nf4")
    assert hub.sent < 600_000
    made = adapterkit.convert("org/base", tmp_path / "nf4", to="nf4")
    adapterkit.convert(base, tmp_path / "local", to="nf4")
    assert (made.nbytes, made.tensors) == (planned.plan.nbytes, len(planned.plan.steps))
    assert read_bytes(tmp_path / "nf4").keys() == read_bytes(tmp_path / "local").keys()
    assert all((tmp_path / "nf4" / f).read_bytes() == (tmp_path / "local" / f).read_bytes() for f in made.files)


def test_merge_from_the_hub(hub: Hub, base: Path, adapter: Path, tmp_path: Path) -> None:
    hub.add("org/base", base)
    hub.add("org/adapter", adapter)
    adapterkit.merge(base, [adapter], tmp_path / "local")
    report = adapterkit.merge("org/base", ["org/adapter"], tmp_path / "out")
    assert read_bytes(tmp_path / "out") == read_bytes(tmp_path / "local")
    assert report.adapters[0].commit == hub.repos["org/adapter"].refs["main"]
    before = len(hub.calls)
    adapterkit.merge("org/base", ["org/adapter"], tmp_path / "again")
    assert not any("/storage/" in call.path for call in hub.calls[before:])  # all of it was in the cache


def test_a_plan_made_from_headers_is_executed_from_a_download(
    hub: Hub, base: Path, adapter: Path, tmp_path: Path
) -> None:
    """The commit tells of the values, so the plan knows a file by the same words whether it was downloaded or not."""
    hub.add("org/base", base)
    hub.add("me/adapter", adapter)
    adapterkit.merge(base, adapter, tmp_path / "local")
    adapterkit.merge("org/base", "me/adapter", save_plan=tmp_path / "plan.json")
    plan = Plan.from_json((tmp_path / "plan.json").read_bytes())
    for part in range(len(plan.files)):
        adapterkit.execute(plan, tmp_path / "parts", part=part)
    adapterkit.execute(plan, tmp_path / "parts")
    made, want = read_tensors(tmp_path / "parts"), read_tensors(tmp_path / "local")
    assert made.keys() == want.keys()
    assert all(torch.equal(made[name], want[name]) for name in want)
    (base / "README.md").write_text("another commit\n")
    hub.add("org/base", base)
    with pytest.raises(CheckpointError, match=r"org/base/model-.* changed since the plan was made"):
        adapterkit.execute(plan, tmp_path / "other", part=0)


def test_what_is_trained_beside_an_adapter_comes_from_the_hub_too(
    hub: Hub, base: Path, adapter: Path, tmp_path: Path
) -> None:
    """ms-swift's whole parameters, a value head, the modules of sentence-transformers; LLaVA's pickle is refused there too."""
    save_file({"base_model.model.lm_head.weight": torch.ones(40, 512)}, adapter / "vit.safetensors")
    save_file({"v_head.summary.weight": torch.ones(1, 512)}, adapter / "value_head.safetensors")
    for name in ("modules.json", "1_Pooling/config.json", "additional_chat_templates/tools.jinja"):
        (adapter / name).parent.mkdir(exist_ok=True)
        (adapter / name).write_text("{}")
    hub.add("org/adapter", {**read_bytes(adapter), "checkpoint-9/config.json": b"{}"})
    adapterkit.merge(base, [adapter], tmp_path / "local")
    adapterkit.merge(base, ["org/adapter"], tmp_path / "out")
    assert bool((read_tensors(tmp_path / "out")["lm_head.weight"] == 1).all())
    assert read_bytes(tmp_path / "out") == read_bytes(tmp_path / "local")
    assert {"value_head.safetensors", "1_Pooling/config.json", "additional_chat_templates/tools.jinja"} <= set(
        read_bytes(tmp_path / "out")
    )
    assert not any("checkpoint-9" in call.path for call in hub.calls)
    hub.add("org/llava", {**read_bytes(adapter), "non_lora_trainables.bin": b"PK"})
    with pytest.raises(UnsupportedAdapter, match="half of what was trained"):
        adapterkit.merge(base, ["org/llava"], tmp_path / "no")


def test_adapter_in_a_sub_folder(hub: Hub, base: Path, adapter: Path, tmp_path: Path) -> None:
    files = {f"runs/last/{name}": data for name, data in read_bytes(adapter).items()}
    hub.add("org/many", {**files, "runs/first/adapter_config.json": b"{}", "README.md": b"x"})
    adapterkit.merge(base, [adapter], tmp_path / "local")
    adapterkit.merge(base, ["org/many/runs/last"], tmp_path / "out")
    assert read_bytes(tmp_path / "out") == read_bytes(tmp_path / "local")
    headers = load_adapter("org/many/runs/last", headers_only=True)
    assert set(headers.tensors) == set(load_adapter(adapter).tensors)
    with pytest.raises(NotFound, match=r"sub-folders \(runs/first, runs/last\)"):
        load_adapter("org/many", headers_only=True)
    with pytest.raises(NotFound, match="no such folder"):
        load_adapter("org/many/runs/none")


def test_revisions(hub: Hub, base: Path, tmp_path: Path) -> None:
    first = hub.add("org/base", base, "main", "v1")
    other = plain_base(tmp_path / "other", layers=2, width=512)
    second = hub.add("org/base", other, "main", "refs/pr/3")
    for revision, sha, layers in (("v1", first, 3), (first, first, 3), ("main", second, 2), ("refs/pr/3", second, 2)):
        for headers_only in (True, False):
            opened = open_checkpoint(f"org/base@{revision}", headers_only=headers_only)
            assert opened.commit == sha
            assert sum("q_proj" in name for name in opened) == layers
    with pytest.raises(NotFound, match="no such revision") as caught:
        open_checkpoint("org/base@nope")
    assert caught.value.exit_code == 7


def test_a_moved_branch_is_not_taken_from_the_cache(hub: Hub, base: Path, tmp_path: Path) -> None:
    hub.add("org/base", base)
    assert len(open_checkpoint("org/base")) == 11
    hub.add("org/base", plain_base(tmp_path / "other", layers=1, width=512))
    assert len(open_checkpoint("org/base")) == 5


def test_other_copies_of_the_weights_are_not_downloaded(hub: Hub, base: Path, adapter: Path, tmp_path: Path) -> None:
    extra = {"model.Q4_K_M.gguf": b"g" * 999, "pytorch_model.bin": b"p" * 999, "onnx/model.onnx": b"o" * 999}
    hub.add("org/base", {**read_bytes(base), **extra, "tokenizer.json": b"{}", "odd[1].json": b"{}"})
    adapterkit.merge("org/base", [adapter], tmp_path / "out")
    asked = " ".join(call.path for call in hub.calls)
    assert not any(name in asked for name in extra)
    assert {"tokenizer.json", "odd[1].json"} <= set(read_bytes(tmp_path / "out"))


def test_a_merged_model_comes_with_its_record(hub: Hub, base: Path, adapter: Path, tmp_path: Path) -> None:
    """`verify` takes the options of the merge from it; without them a right model looks wrong."""
    adapterkit.merge(base, adapter, tmp_path / "half", weights=0.5)
    hub.add("org/half", tmp_path / "half")
    report = adapterkit.verify("org/half", base=base, adapters=adapter)
    assert report.record
    assert report.ok
    adapterkit.merge("org/half", adapter, tmp_path / "again", weights=0.25)  # a model that is a base has its own record
    assert adapterkit.verify(tmp_path / "again", base="org/half", adapters=adapter).ok


# ------------------------------------------------------------------ what goes wrong

BOTH = pytest.mark.parametrize("headers_only", [True, False], ids=["headers", "whole"])


@BOTH
def test_unknown_repository(hub: Hub, headers_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a token the Hub does not say whether a repository is private or not there."""
    with pytest.raises(AuthError, match="does not show org/none") as caught:
        open_checkpoint("org/none", headers_only=headers_only)
    assert caught.value.exit_code == 4
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(NotFound, match="org/none is not on the Hub") as missing:
        open_checkpoint("org/none", headers_only=headers_only)
    assert missing.value.exit_code == 7


@BOTH
def test_private_repository(hub: Hub, base: Path, headers_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/base", base, private=True)
    with pytest.raises(AuthError, match="set HF_TOKEN"):
        open_checkpoint("org/base", headers_only=headers_only)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert len(open_checkpoint("org/base", headers_only=headers_only)) == 11


@BOTH
def test_wrong_token(hub: Hub, base: Path, headers_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/base", base, private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_anotherTokenOfSomebodyElse")
    with pytest.raises(AuthError) as caught:
        open_checkpoint("org/base", headers_only=headers_only)
    assert "hf_anotherTokenOfSomebodyElse" not in str(caught.value)


@BOTH
def test_gated_repository(hub: Hub, base: Path, headers_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/base", base, gated=True)
    with pytest.raises(AuthError, match=r"gated.*accept its terms") as caught:
        open_checkpoint("org/base", headers_only=headers_only)
    assert caught.value.exit_code == 4
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert len(open_checkpoint("org/base", headers_only=headers_only)) == 11


@BOTH
@pytest.mark.parametrize("status", [500, 502, 503, 504, 429])
@pytest.mark.parametrize("where", ["/api/models/", "/resolve/", "/storage/"])
def test_server_that_fails(hub: Hub, base: Path, where: str, status: int, headers_only: bool) -> None:
    hub.add("org/base", base)
    hub.fail(where, status, times=10**6)
    with pytest.raises(HubError) as caught:
        open_checkpoint("org/base", headers_only=headers_only)
    assert caught.value.exit_code == 5
    assert "\n" not in str(caught.value)


@BOTH
@pytest.mark.parametrize("where", ["/api/models/", "/resolve/", "/storage/"])
def test_connection_that_drops(hub: Hub, base: Path, where: str, headers_only: bool) -> None:
    hub.add("org/base", base)
    hub.fail(where, None, times=10**6, after=7)
    with pytest.raises(HubError) as caught:
        open_checkpoint("org/base", headers_only=headers_only)
    assert caught.value.exit_code == 5
    assert str(caught.value).isprintable()


def test_one_failure_of_many_requests_is_tried_again(hub: Hub, base: Path) -> None:
    """A checkpoint of two hundred shards is two hundred requests; one of them will meet a busy server."""
    hub.add("org/base", base)
    hub.fail("/storage/", 503, times=1)
    assert len(open_checkpoint("org/base", headers_only=True)) == 11


@BOTH
def test_no_network(hub: Hub, headers_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub.__exit__()
    hub.__enter__()  # another port: nobody listens where the client asks
    assert hub.url != constants.ENDPOINT
    with pytest.raises(HubError) as caught:
        open_checkpoint("org/base", headers_only=headers_only)
    assert caught.value.exit_code == 5


@BOTH
def test_offline(hub: Hub, base: Path, headers_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in the cache is used, what is not is said."""
    from huggingface_hub import constants

    sha = hub.add("org/base", base)
    open_checkpoint("org/base")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(hub.calls)
    assert open_checkpoint("org/base", headers_only=headers_only).commit == sha
    with pytest.raises(HubError, match=r"not in the cache") as caught:
        open_checkpoint("org/none", headers_only=headers_only)
    assert caught.value.exit_code == 5
    assert len(hub.calls) == before


@pytest.mark.parametrize("verb", ["check", "merge"])
@pytest.mark.parametrize(("trouble", "code"), [("unknown", 7), ("no token", 4), ("no network", 5)])
def test_exit_codes_of_the_command_line(
    trouble: str,
    code: int,
    verb: str,
    hub: Hub,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from adapterkit.cli import main

    if trouble == "unknown":
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    if trouble == "no network":
        hub.fail("/api/models/", None, times=10**6)
    out = ["-o", str(tmp_path / "out")] if verb == "merge" else []
    before = sorted(path for path in tmp_path.iterdir() if path.name != "cache")
    with pytest.raises(SystemExit) as stopped:
        main([verb, "org/none", str(adapter), *out])
    said = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == code
    assert len(said) == 1
    assert said[0].startswith("error: ")
    assert "org/none" in said[0]
    assert TOKEN not in said[0]
    assert sorted(path for path in tmp_path.iterdir() if path.name != "cache") == before


@BOTH
def test_pickles_on_the_hub_are_not_even_fetched(hub: Hub, headers_only: bool) -> None:
    hub.add("org/old", {"pytorch_model.bin": b"\x80\x04.", "config.json": b"{}"})
    with pytest.raises(UnsafeError, match="only as a pickle"):
        open_checkpoint("org/old", headers_only=headers_only)
    assert not any("pytorch_model" in call.path for call in hub.calls)


@BOTH
@pytest.mark.parametrize("file", ["../../escaped.safetensors", "/etc/passwd", "https://example.com/x.safetensors"])
def test_index_on_the_hub_that_leads_out(hub: Hub, base: Path, file: str, headers_only: bool) -> None:
    files = read_bytes(base)
    index = files["model.safetensors.index.json"].replace(b"model-00001-of-00002.safetensors", file.encode(), 1)
    hub.add("org/base", {**files, "model.safetensors.index.json": index})
    with pytest.raises(UnsafeError, match="out of its folder"):
        open_checkpoint("org/base", headers_only=headers_only)


@BOTH
@pytest.mark.parametrize("ref", ["org/na--me", "org/name.git", "org/a..b", f"org/{'x' * 200}", "-org/name"])
def test_what_is_no_repository_name(hub: Hub, ref: str, headers_only: bool) -> None:
    with pytest.raises(AdapterkitError) as caught:
        open_checkpoint(ref, headers_only=headers_only)
    assert caught.value.exit_code in (4, 7)


# ------------------------------------------------------------------ the token


@BOTH
def test_token_goes_to_the_hub_alone(
    hub: Hub, base: Path, adapter: Path, headers_only: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.add("org/base", base, private=True)
    hub.add("org/adapter", adapter, private=True)
    said, logged = io.StringIO(), io.StringIO()
    handler = logging.StreamHandler(logged)
    logging.getLogger().addHandler(handler)
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.DEBUG)
    try:
        with redirect_stdout(said), redirect_stderr(said):
            planned = adapterkit.plan_merge("org/base", ["org/adapter"], headers_only=headers_only)
            text = planned.plan.to_json() + repr(planned) + repr(planned.report(Measured()))
            hub.fail("/storage/", 500, times=10**6)
            with pytest.raises(HubError) as caught:
                if headers_only:
                    planned.base["model.layers.2.mlp.up_proj.weight"].read(0, 10)
                else:
                    hub.add("org/more", {**read_bytes(base), "model-00001-of-00002.safetensors": b"x"}, private=True)
                    open_checkpoint("org/more")
            text += repr(caught.value) + str(caught.value)
    finally:
        logging.getLogger().removeHandler(handler)
        logging.getLogger().setLevel(level)
    storage = [call for call in hub.calls if call.host.startswith("localhost")]
    assert storage
    assert not any(call.token for call in storage)
    assert any(call.token == f"Bearer {TOKEN}" for call in hub.calls)
    assert TOKEN not in text + said.getvalue() + logged.getvalue()
    assert TOKEN.encode() not in b"".join(p.read_bytes() for p in (tmp_path / "cache").rglob("*") if p.is_file())
