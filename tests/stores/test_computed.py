"""Adapters that are computed (combined, extracted, resized, in another style) and written to a bucket."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from models import plain_adapter, plain_base
from safetensors import safe_open
from store_server import Asked, Proxy, client_of, download, upload

import adapterkit
from adapterkit.checkpoint.plan import Plan
from adapterkit.checkpoint.store_out import StoreOut
from adapterkit.errors import OutputError, StoreError, UsageError
from adapterkit.verbs.execute import OpenPlan, execute


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a model trained from it, and two adapters."""
    folder = tmp_path_factory.mktemp("made")
    base = plain_base(folder / "base")
    for seed in (1, 2):
        plain_adapter(folder / f"a{seed}", base, seed=seed)
    adapterkit.merge(base, folder / "a1", folder / "tuned")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def unnamed(found: dict[str, bytes]) -> dict[str, bytes]:
    """Without what says by which address an input was read."""
    config = {name: json.loads(data) for name, data in found.items() if name == "adapter_config.json"}
    for said in config.values():
        said.pop("base_model_name_or_path")
    rest = {name: data for name, data in found.items() if name not in ("adapter_config.json", "adapterkit.json")}
    return rest | {name: json.dumps(said).encode() for name, said in config.items()}


def test_every_verb_that_computes_an_adapter_writes_the_bytes_of_a_local_run(
    s3: Proxy, made: Path, place: str, tmp_path: Path
) -> None:
    for name in ("base", "tuned", "a1", "a2"):
        upload(s3.server, made / name, "models", f"{place}/{name}")
    where = f"s3://models/{place}"

    def both(out: str, run: Any) -> Any:
        run(made, tmp_path / out)
        s3.clear()
        done = run(where, f"{where}/{out}")
        assert (done.requests, done.bytes_down, done.bytes_up) == (s3.count(), s3.down, s3.up)
        found = download(s3.server, "models", f"{place}/{out}")
        here = {f"/{name}": data for name, data in files(tmp_path / out).items()} or {"": (tmp_path / out).read_bytes()}
        strip = {name.removeprefix("/"): data for name, data in found.items() if name != ".adapterkit.json"}
        assert unnamed(strip) == unnamed({name.removeprefix("/"): data for name, data in here.items()})
        assert any(name.endswith("adapterkit.json") for name in found)
        return done

    both("sum", lambda at, out: adapterkit.combine([f"{at}/a1", f"{at}/a2"], out))
    both("low", lambda at, out: adapterkit.resize(f"{at}/a1", out, rank=2))
    both("difference", lambda at, out: adapterkit.extract(f"{at}/base", f"{at}/tuned", out, rank=4))
    both("one.safetensors", lambda at, out: adapterkit.combine([f"{at}/a1", f"{at}/a2"], out, to="kohya"))
    # Its metadata state hashes of it, which are put in before the first byte is sent.
    with safe_open(tmp_path / "one.safetensors", "pt") as opened:
        assert int(opened.metadata()["sshs_model_hash"], 16)
    adapterkit.combine([f"{where}/a1", f"{where}/a2"], save_plan=tmp_path / "plan.json", dry_run=True)
    plan = Plan.from_json((tmp_path / "plan.json").read_bytes())
    execute(plan, f"{where}/by-plan")
    assert (
        download(s3.server, "models", f"{place}/by-plan/")["adapter_model.safetensors"]
        == (tmp_path / "sum/adapter_model.safetensors").read_bytes()
    )
    # The result is an adapter as any other, and no working object is left.
    adapterkit.merge(f"{where}/base", f"{where}/sum", tmp_path / "merged")
    adapterkit.merge(made / "base", tmp_path / "sum", tmp_path / "again")
    assert files(tmp_path / "merged")["model.safetensors"] == files(tmp_path / "again")["model.safetensors"]
    keys = client_of(s3.server).list_objects_v2(Bucket="models", Prefix=f"{place}/.").get("Contents", [])
    assert not keys


def test_a_computed_adapter_is_refused_resumed_and_replaced_as_every_output(
    s3: Proxy, made: Path, place: str, tmp_path: Path
) -> None:
    upload(s3.server, made / "a1", "models", f"{place}/a1")
    stored, out = f"s3://models/{place}/a1", f"s3://models/{place}/out"
    with pytest.raises(UsageError, match="lies in or over the input"):
        adapterkit.resize(stored, f"{stored}/low", rank=2)
    with pytest.raises(UsageError, match="arrow"):
        adapterkit.combine([made / "a1", made / "a2"], out, method="arrow")

    def spoilt(asked: Asked) -> tuple[int, str] | None:
        return (403, "AccessDenied") if asked.method == "PUT" and asked.path.endswith("adapter_config.json") else None

    s3.rule = spoilt
    with pytest.raises((StoreError, adapterkit.errors.AuthError)):
        adapterkit.resize(stored, out, rank=2, resume=True)
    s3.rule = None
    with pytest.raises(OutputError, match=r"exists|another run"):  # of other options
        adapterkit.resize(stored, out, rank=1)
    adapterkit.resize(stored, out, rank=2, resume=True)
    adapterkit.resize(made / "a1", tmp_path / "low", rank=2)
    assert unnamed(download(s3.server, "models", f"{place}/out/")) == unnamed(files(tmp_path / "low"))
    with pytest.raises(OutputError, match="exists"):
        adapterkit.resize(stored, out, rank=2)
    adapterkit.resize(stored, out, rank=1, force=True)
    config = json.loads(download(s3.server, "models", f"{place}/out/")["adapter_config.json"])
    assert config["r"] == 1


def test_a_computed_adapter_in_parts_is_that_of_one_run(
    s3: Proxy, made: Path, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results lie beside the output until it is there; a driver that is killed at the worst moment costs nothing."""
    for name in ("a1", "a2"):
        upload(s3.server, made / name, "models", f"{place}/{name}")
    where, size = f"s3://models/{place}", 2_000
    given: dict[str, Any] = {"adapters": [f"{where}/a1", f"{where}/a2"], "rank": 3}
    adapterkit.combine(**given, out=tmp_path / "whole")
    adapterkit.combine(**given, save_plan=tmp_path / "plan.json")
    plan, out = Plan.from_json((tmp_path / "plan.json").read_bytes()), f"{where}/out"
    workers = [OpenPlan(plan, out, size) for _ in range(2)]
    parts = workers[0].parts
    assert len(parts) > 2
    with pytest.raises(OutputError, match="not done"):
        workers[0].finish()
    workers[1].execute(len(parts) - 1)
    workers[0].execute(0)
    for part in workers[0].left():
        workers[1].execute(part.index)
    assert download(s3.server, "models", f"{place}/out/") == {}
    assert OpenPlan(plan, out).left() == []
    with monkeypatch.context() as patched:  # the results are there as one object, and the output is not yet
        patched.setattr(StoreOut, "_complete", failing_for(StoreOut._complete, "adapter_model"))
        with pytest.raises(OutputError, match="killed"):
            workers[0].finish()
    with pytest.raises(OutputError, match="another run writes"):
        adapterkit.resize(f"{where}/a1", out, rank=2)
    report = OpenPlan(plan, out, size).finish()
    assert report.requests
    whole = files(tmp_path / "whole")
    assert download(s3.server, "models", f"{place}/out/") == whole
    late = adapterkit.run(tmp_path / "plan.json", out, task=0, tasks=2)
    assert late.finished
    assert "is there already" in late.notes[0]
    again = adapterkit.run(tmp_path / "plan.json", f"{where}/array", task=0, tasks=1, part_size=str(size))
    assert again.finished
    assert download(s3.server, "models", f"{place}/array/") == whole
    adapterkit.combine(**given, out=f"{where}/other")
    with pytest.raises(OutputError, match="exists"):
        adapterkit.run(tmp_path / "plan.json", f"{where}/other", task=0, tasks=2)
    client = client_of(s3.server)
    assert not client.list_multipart_uploads(Bucket="models", Prefix=f"{place}/").get("Uploads")
    assert not client.list_objects_v2(Bucket="models", Prefix=f"{place}/.").get("Contents")


@pytest.mark.usefixtures("pieces_alike")
def test_results_of_inputs_that_changed_since_are_not_taken(
    s3: Proxy, made: Path, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the state of the files here; the plan need not know them apart."""
    adapter, saved, out = tmp_path / "adapter", tmp_path / "plan.json", f"s3://models/{place}/out"
    plain_adapter(adapter, made / "base", seed=1)
    adapterkit.resize(adapter, rank=2, save_plan=saved)
    with monkeypatch.context() as patched:  # the results are there as one object, and the output is not yet
        patched.setattr(StoreOut, "_complete", failing_for(StoreOut._complete, "adapter_model"))
        with pytest.raises(OutputError, match="killed"):
            adapterkit.run(saved, out, task=0, tasks=1, part_size="2KB")
    plain_adapter(adapter, made / "base", seed=2)
    with pytest.raises(OutputError, match=r"adapter_model\.safetensors changed since .*out was begun"):
        adapterkit.run(saved, out, task=0, tasks=1, part_size="2KB")
    assert adapterkit.run(saved, out, task=0, tasks=1, part_size="2KB", force=True).report
    adapterkit.resize(adapter, tmp_path / "whole", rank=2)
    assert download(s3.server, "models", f"{place}/out/") == files(tmp_path / "whole")
    # A third adapter: the output that is there is of the second, though its objects name this plan.
    late = adapterkit.run(saved, out, task=0, tasks=1, part_size="2KB")
    assert "is there already" in late.notes[0]
    plain_adapter(adapter, made / "base", seed=3)
    with pytest.raises(OutputError, match="exists"):
        adapterkit.run(saved, out, task=0, tasks=1, part_size="2KB")
    client = client_of(s3.server)
    assert not client.list_multipart_uploads(Bucket="models", Prefix=f"{place}/").get("Uploads")
    assert not client.list_objects_v2(Bucket="models", Prefix=f"{place}/.").get("Contents")


def failing_for(complete: Any, name: str) -> Any:
    """`StoreOut._complete`, which fails for files of a name."""

    def failing(self: Any, file: str) -> Any:
        if file.startswith(name):
            raise OutputError("killed")
        return complete(self, file)

    return failing
