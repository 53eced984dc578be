"""Outputs in an S3 bucket: the bytes of a local run, what was planned is what is asked, and who may write."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bases import gguf_adapter, gguf_base, wide_base
from models import edit_config, plain_adapter, plain_base
from store_server import FLIP_UP, HANG_UP, KEY, LOSE_ANSWER, RENEWED, Asked, Proxy, client_of, download, upload

import adapterkit
from adapterkit.checkpoint.plan import Plan
from adapterkit.checkpoint.schedule import LEAST
from adapterkit.errors import AuthError, CheckpointError, NotFound, OutOfMemory, OutputError, StoreError, UsageError
from adapterkit.verbs.execute import OpenPlan

MOVED = ("requests", "bytes_down", "bytes_up", "bytes_inside")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("wide")
    base = wide_base(folder)
    return base, plain_adapter(folder / "adapter", base, modules=("q_proj",))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("small")
    base = plain_base(folder / "base", layers=4, width=64, shards=3)
    (base / "tokenizer.json").write_text('{"model": {}}')
    return base, plain_adapter(folder / "adapter", base)


Put = Callable[[Path], str]


@pytest.fixture
def put(s3: Proxy, place: str) -> Put:
    """Puts a folder or a file into the bucket; its address."""

    def one(path: Path) -> str:
        if path.is_dir():
            upload(s3.server, path, "models", f"{place}/{path.name}")
        else:
            client_of(s3.server).put_object(Bucket="models", Key=f"{place}/{path.name}", Body=path.read_bytes())
        return f"s3://models/{place}/{path.name}"

    return one


def here(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def left(s3: Proxy, place: str) -> tuple[list[str], int]:
    """What lies below a test's place beside inputs and outputs: keys of working objects, and open uploads."""
    client = client_of(s3.server)
    keys = [one["Key"] for one in client.list_objects_v2(Bucket="models", Prefix=f"{place}/.").get("Contents", [])]
    return keys, len(client.list_multipart_uploads(Bucket="models", Prefix=f"{place}/").get("Uploads", []))


def within(planned: Any, done: Any, share: float = 0.05) -> None:
    for name in MOVED:
        said, was = getattr(planned, name), getattr(done, name)
        assert abs(said - was) <= share * max(was, 1), (name, said, was)


def test_a_folder_is_written_as_on_a_disk_and_as_planned(
    s3: Proxy, wide: tuple[Path, Path], put: Put, place: str, tmp_path: Path
) -> None:
    base, adapter = put(wide[0]), put(wide[1])
    adapterkit.merge(*wide, tmp_path / "out")
    out = f"s3://models/{place}/out"
    planned = adapterkit.merge(base, adapter, out, dry_run=True)
    s3.clear()
    done = adapterkit.merge(base, adapter, out)
    assert download(s3.server, "models", f"{place}/out/") == here(tmp_path / "out")
    within(planned, done)
    assert (done.requests, done.bytes_down, done.bytes_inside) == (s3.count(), s3.down, s3.inside)
    assert done.bytes_up == s3.up
    total = sum(len(data) for name, data in here(tmp_path / "out").items() if name.endswith(".safetensors"))
    assert done.bytes_inside > total // 3  # what no adapter touches does not come here
    assert done.bytes_up < total * 2 // 3
    assert left(s3, place) == ([], 0)
    assert adapterkit.verify(out, base=base, adapters=adapter).ok


def test_the_format_of_the_base_is_kept(
    s3: Proxy, small: tuple[Path, Path], put: Put, place: str, tmp_path: Path
) -> None:
    adapterkit.convert(small[0], tmp_path / "nf4", to="nf4")
    how: dict[str, Any] = {"quant": "keep", "keep_touched": "bf16"}
    adapterkit.merge(tmp_path / "nf4", small[1], tmp_path / "out", **how)
    base, adapter, out = put(tmp_path / "nf4"), put(small[1]), f"s3://models/{place}/out"
    planned = adapterkit.merge(base, adapter, out, dry_run=True, **how)
    within(planned, adapterkit.merge(base, adapter, out, **how))
    assert download(s3.server, "models", f"{place}/out/") == here(tmp_path / "out")


@pytest.mark.parametrize("split", [None, "40KB"])
def test_gguf_whole_and_in_parts(s3: Proxy, split: str | None, put: Put, place: str, tmp_path: Path) -> None:
    base, adapter = gguf_base(tmp_path), gguf_adapter(tmp_path)
    (tmp_path / "out").mkdir()
    adapterkit.merge(base, adapter, tmp_path / "out/m.gguf", max_shard_size=split)
    stored, beside, out = put(base), put(adapter), f"s3://models/{place}/out/m.gguf"
    planned = adapterkit.merge(stored, beside, out, max_shard_size=split, dry_run=True)
    done = adapterkit.merge(stored, beside, out, max_shard_size=split)
    found = download(s3.server, "models", f"{place}/out/")
    assert found == here(tmp_path / "out")
    assert len(found) > 3 if split else len(found) == 2  # and the record
    within(planned, done)


@pytest.mark.parametrize("there", ["nothing", "parts", "another file"])
def test_a_record_beside_a_file_is_replaced_only_if_its_output_is_gone(
    there: str, s3: Proxy, put: Put, place: str, tmp_path: Path
) -> None:
    base, adapter, out = gguf_base(tmp_path), gguf_adapter(tmp_path), f"s3://models/{place}/out/m.gguf"
    client, name = client_of(s3.server), f"{place}/out/m.gguf"
    adapterkit.merge(base, adapter, out, max_shard_size="40KB" if there == "parts" else None)
    if there != "parts":
        client.delete_object(Bucket="models", Key=name)
    if there == "another file":
        client.put_object(Bucket="models", Key=f"{name}.adapterkit.json", Body=b"mine")
    before = download(s3.server, "models", f"{place}/out/")
    if there == "nothing":
        within(
            adapterkit.merge(base, adapter, out, weights=[0.5], dry_run=True),
            adapterkit.merge(base, adapter, out, weights=[0.5]),
            share=0.5,
        )
        (tmp_path / "out").mkdir()
        adapterkit.merge(base, adapter, tmp_path / "out/m.gguf", weights=[0.5])
        assert download(s3.server, "models", f"{place}/out/") == here(tmp_path / "out")
    else:
        for more in ({"dry_run": True}, {}):
            with pytest.raises(OutputError, match=r"m.gguf exists .*m.gguf.adapterkit.json"):
                adapterkit.merge(base, adapter, out, **more)
        assert download(s3.server, "models", f"{place}/out/") == before
    assert left(s3, place) == ([], 0)


def test_convert_reads_and_writes_stores(
    s3: Proxy, small: tuple[Path, Path], put: Put, place: str, tmp_path: Path
) -> None:
    adapterkit.convert(small[0], tmp_path / "f16", to="f16")
    adapterkit.convert(small[1], tmp_path / "mlx", to="mlx")
    base, adapter = put(small[0]), put(small[1])
    planned = adapterkit.convert(base, f"s3://models/{place}/f16", to="f16", dry_run=True)
    within(planned, adapterkit.convert(base, f"s3://models/{place}/f16", to="f16"))
    adapterkit.convert(adapter, f"s3://models/{place}/mlx", to="mlx")
    for name in ("f16", "mlx"):
        assert download(s3.server, "models", f"{place}/{name}/") == here(tmp_path / name), name


def test_a_local_base_goes_to_a_store(s3: Proxy, small: tuple[Path, Path], place: str, tmp_path: Path) -> None:
    adapterkit.merge(*small, tmp_path / "out")
    adapterkit.merge(*small, f"s3://models/{place}/out", max_shard_size="20KB")
    adapterkit.merge(*small, f"s3://models/{place}/out", force=True)
    assert download(s3.server, "models", f"{place}/out/") == here(tmp_path / "out")  # nothing of the first is left


def test_what_is_there_is_not_replaced_unless_asked(s3: Proxy, small: tuple[Path, Path], put: Put, place: str) -> None:
    out = f"s3://models/{place}/out"
    adapterkit.merge(*small, out)
    before = download(s3.server, "models", f"{place}/out/")
    with pytest.raises(OutputError, match=r"exists .*force=True"):
        adapterkit.merge(*small, out)
    with pytest.raises(OutputError, match="exists"):
        adapterkit.merge(*small, out, dry_run=True)
    base = put(small[0])
    for over in (base, f"{base}/sub", f"s3://models/{place}"):
        with pytest.raises((UsageError, OutputError), match=r"lies in or over|exists"):
            adapterkit.merge(base, small[1], over, force=over == base)
    assert download(s3.server, "models", f"{place}/out/") == before


def test_what_cannot_go_to_a_store_is_refused_by_name(small: tuple[Path, Path], s3: Proxy, place: str) -> None:
    out = f"s3://models/{place}/out"
    with pytest.raises(UsageError, match=r"events is s3://.*neither read nor written here"):
        adapterkit.merge(*small, out, on="local", events=f"{out}/events.jsonl")
    with pytest.raises(UsageError, match="a whole bucket"):
        adapterkit.merge(*small, "s3://models")
    assert not s3.seen


def test_memory_holds_what_is_on_its_way(
    s3: Proxy, small: tuple[Path, Path], put: Put, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight windows of 16 MiB, or two for each worker; and for each worker a part of 16 MiB that it sends."""
    base, adapter, out = put(small[0]), put(small[1]), f"s3://models/{place}/out"
    adapterkit.merge(base, adapter, save_plan=tmp_path / "plan.json", jobs=2)
    peak = json.loads((tmp_path / "plan.json").read_text())["peak_memory"]
    need = peak + (8 + 2) * (16 << 20)
    monkeypatch.setattr("adapterkit.checkpoint.limits._limits", lambda: [(need - 1, "a test")])
    with pytest.raises(OutOfMemory, match="a test allows"):
        adapterkit.merge(base, adapter, out, jobs=2)
    assert left(s3, place) == ([], 0)
    monkeypatch.setattr("adapterkit.checkpoint.limits._limits", lambda: [(need, "a test")])
    adapterkit.merge(base, adapter, out, jobs=2)
    for target, more in ((out + "-2", 10), (tmp_path / "out", 8)):
        text = tmp_path / "task.sh"
        text.write_text("{{memory}} {{command}}")
        monkeypatch.chdir(tmp_path)
        adapterkit.run(tmp_path / "plan.json", target, on="slurm", workers=2, jobs=2, template=text)
        said = (tmp_path / f"{str(target).rpartition('/')[2]}.slurm.sh").read_text().split()[0]
        assert int(said) == int((peak + more * (16 << 20)) * 1.25 / 2**20) + 1


# ------------------------------------------------------------------ two runs


def test_two_different_runs_do_not_mix(s3: Proxy, small: tuple[Path, Path], place: str, tmp_path: Path) -> None:
    out = f"s3://models/{place}/out"
    other: list[str] = []

    def meanwhile(done: int, total: int) -> None:
        """The other run comes when this one has sent all that it has."""
        if not other:
            with pytest.raises(OutputError, match="another run writes") as error:
                adapterkit.merge(*small, out, weights=0.5)
            other.append(str(error.value))

    adapterkit.merge(*small, out, progress=meanwhile)
    adapterkit.merge(*small, tmp_path / "out")
    assert download(s3.server, "models", f"{place}/out/") == here(tmp_path / "out")
    assert "claim.json" in other[0]
    assert left(s3, place) == ([], 0)


def test_a_run_that_is_replaced_does_not_appear(
    s3: Proxy, small: tuple[Path, Path], place: str, tmp_path: Path
) -> None:
    out = f"s3://models/{place}/out"
    reports: list[Any] = []

    def meanwhile(done: int, total: int) -> None:
        if not reports:
            reports.append(None)
            reports[0] = adapterkit.merge(*small, out, weights=0.5, force=True)

    with pytest.raises(OutputError, match=r"took over|is gone|appeared"):
        adapterkit.merge(*small, out, progress=meanwhile)
    adapterkit.merge(*small, tmp_path / "out", weights=0.5)
    assert download(s3.server, "models", f"{place}/out/") == here(tmp_path / "out")
    assert any("took the place of another run" in note for note in reports[0].notes)
    assert left(s3, place) == ([], 0)


def test_something_that_appears_meanwhile_is_not_written_over(s3: Proxy, small: tuple[Path, Path], place: str) -> None:
    client = client_of(s3.server)

    def meanwhile(done: int, total: int) -> None:
        client.put_object(Bucket="models", Key=f"{place}/out/config.json", Body=b"mine")

    with pytest.raises(OutputError, match=r"config.json appeared"):
        adapterkit.merge(*small, f"s3://models/{place}/out", progress=meanwhile)
    assert download(s3.server, "models", f"{place}/out/") == {"config.json": b"mine"}


def test_a_store_without_conditions_is_said(s3: Proxy, small: tuple[Path, Path], place: str, tmp_path: Path) -> None:
    def deaf(asked: Asked) -> tuple[int, str] | None:
        return (
            (501, "NotImplemented")
            if {"if-none-match", "if-match"} & set(asked.headers) and asked.method != "GET"
            else None
        )

    s3.rule = deaf
    report = adapterkit.merge(*small, f"s3://models/{place}/out")
    assert any("keeps no conditions" in note and "not kept apart" in note for note in report.notes)
    adapterkit.merge(*small, tmp_path / "out")
    assert download(s3.server, "models", f"{place}/out/") == here(tmp_path / "out")

    # Another run at the same moment, which nothing holds back: whoever ends last sees that the files are of two runs.
    key, client = f"{place}/two/model-00002-of-00003.safetensors", client_of(s3.server)

    def other(seen: Any) -> None:
        if seen.method == "PUT" and seen.path.endswith("/two/adapterkit.json"):
            data = (tmp_path / "out" / "model-00002-of-00003.safetensors").read_bytes()
            client.put_object(Bucket="models", Key=key, Body=data[:-2] + b"\x01\x01")

    s3.after = other
    with pytest.raises(
        OutputError, match=r"another run wrote \S+/two/model-00002-of-00003.safetensors at the same time"
    ):
        adapterkit.merge(*small, f"s3://models/{place}/two", resume=True)
    names = download(s3.server, "models", f"{place}/two/")
    assert not {"config.json", "model.safetensors.index.json"} & names.keys()  # no loader takes it for a model
    s3.after = None
    adapterkit.merge(*small, f"s3://models/{place}/two", force=True)
    assert download(s3.server, "models", f"{place}/two/") == here(tmp_path / "out")


# ------------------------------------------------------------------ faults


def first_of_each(what: object, method: str) -> Callable[[Asked], Any]:
    seen: set[str] = set()

    def rule(asked: Asked) -> Any:
        key = f"{asked.method}{asked.path}{asked.query}"
        if asked.method == method and key not in seen:
            seen.add(key)
            return what
        return None

    return rule


@pytest.mark.parametrize(
    ("fault", "method"),
    [
        ((503, "SlowDown"), "POST"),
        ((409, "ConditionalRequestConflict"), "PUT"),
        (HANG_UP, "PUT"),
        (FLIP_UP, "PUT"),
        (LOSE_ANSWER, "PUT"),
        (LOSE_ANSWER, "POST"),
        (LOSE_ANSWER, "DELETE"),
    ],
)
def test_what_passes_is_tried_again(
    fault: object, method: str, s3: Proxy, small: tuple[Path, Path], place: str, tmp_path: Path
) -> None:
    s3.rule = first_of_each(fault, method)
    adapterkit.merge(*small, f"s3://models/{place}/out")
    adapterkit.merge(*small, tmp_path / "out")
    assert download(s3.server, "models", f"{place}/out/") == here(tmp_path / "out")


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ((403, "AccessDenied"), AuthError, "refused"),
        ((400, "ExpiredToken"), AuthError, r"expired .*resume=True"),
        ((403, "QuotaExceeded"), OutputError, "no room"),
        ((507, "XMinioStorageFull"), OutputError, "no room"),
        ((500, "InternalError"), StoreError, "7 attempts"),
    ],
)
def test_what_stays_leaves_nothing(
    fault: object, kind: type[Exception], words: str, s3: Proxy, small: tuple[Path, Path], place: str
) -> None:
    s3.rule = lambda asked: fault if "partNumber=1" in asked.query and "00002" in asked.path else None  # type: ignore[assignment,return-value]
    with pytest.raises(kind, match=words) as error:
        adapterkit.merge(*small, f"s3://models/{place}/out")
    assert "00002-of-00003.safetensors" in str(error.value)
    assert download(s3.server, "models", f"{place}/") == {}
    assert left(s3, place) == ([], 0)


def test_credentials_that_expire_are_looked_for_again(
    s3: Proxy, small: tuple[Path, Path], put: Put, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of the run whoever hands them out has put new ones where the first came from."""
    base, adapter, expired = put(small[0]), put(small[1]), []

    def rule(asked: Asked) -> tuple[int, str] | None:
        if "partNumber" in asked.query:
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", RENEWED)
            expired.append(asked)
        old = f"Credential={KEY}/" in asked.headers.get("authorization", "")
        return (400, "ExpiredToken") if expired and old else None

    s3.rule = rule
    adapterkit.merge(base, adapter, f"s3://models/{place}/out")
    adapterkit.merge(*small, tmp_path / "out")
    assert download(s3.server, "models", f"{place}/out/") == here(tmp_path / "out")
    assert expired


ODD = (
    "sp ace",
    "plus+and%20percent",
    "ünï-日本",
    "a=b&c?d#e",
    "dots.of.many.safetensors.d",
    "..hidden",
    "q'uo\"te(s)*!",
)


def test_keys_of_every_kind(s3: Proxy, place: str, tmp_path: Path) -> None:
    """Names that URLs, shells and patterns read otherwise; a prefix that is an object too; a slash at the end."""
    base = plain_base(tmp_path / "base", shards=2)
    adapter = plain_adapter(tmp_path / "adapter", base)
    adapterkit.merge(base, adapter, tmp_path / "out")
    client = client_of(s3.server)
    for number, name in enumerate(ODD):
        upload(s3.server, base, "models", f"{place}/{name}/base")
        out = f"s3://models/{place}/{name}/out{'/' * (number % 3)}"
        adapterkit.merge(f"s3://models/{place}/{name}/base/", adapter, out)
        assert download(s3.server, "models", f"{place}/{name}/out/") == here(tmp_path / "out"), name
    # Beside the folder lies an object of its name, and a longer name that begins like it.
    client.put_object(Bucket="models", Key=f"{place}/two-more/config.json", Body=b"not json")
    client.put_object(Bucket="models", Key=f"{place}/two/", Body=b"")
    upload(s3.server, base, "models", f"{place}/two")
    found = adapterkit.merge(f"s3://models/{place}/two", adapter, f"s3://models/{place}/tw")
    assert found.bytes_up
    made, same = download(s3.server, "models", f"{place}/tw/"), here(tmp_path / "out")
    del made["adapterkit.json"], same["adapterkit.json"]  # it names the base by the folder
    assert made == same
    # One byte is no model; nothing is none either.
    client.put_object(Bucket="models", Key=f"{place}/byte/model.safetensors", Body=b"x")
    client.put_object(Bucket="models", Key=f"{place}/byte/config.json", Body=b"{}")
    for address, kind in ((f"{place}/byte", CheckpointError), (f"{place}/nothing", NotFound)):
        with pytest.raises(kind, match=address.rpartition("/")[2]):
            adapterkit.merge(f"s3://models/{address}", adapter, f"s3://models/{place}/never")
    assert download(s3.server, "models", f"{place}/never") == {}


def test_a_source_replaced_under_a_copy_is_an_error(s3: Proxy, wide: tuple[Path, Path], put: Put, place: str) -> None:
    base, adapter = put(wide[0]), put(wide[1])
    key = base.removeprefix("s3://models/") + "/model-00002-of-00002.safetensors"
    done: list[Any] = []

    def replace_it(seen: Any) -> None:
        if seen.method == "POST" and not done:  # the first upload is begun
            data = (wide[0] / "model-00002-of-00002.safetensors").read_bytes()
            done.append(client_of(s3.server).put_object(Bucket="models", Key=key, Body=data[:-2] + b"\x01\x01"))

    s3.after = replace_it
    with pytest.raises(CheckpointError, match=r"00002-of-00002.safetensors changed while it was read"):
        adapterkit.merge(base, adapter, f"s3://models/{place}/out")
    assert download(s3.server, "models", f"{place}/out/") == {}
    assert left(s3, place) == ([], 0)


def test_credentials_are_in_no_output(
    s3: Proxy, small: tuple[Path, Path], put: Put, place: str, tmp_path: Path
) -> None:
    base, adapter = put(small[0]), put(small[1])
    report = adapterkit.merge(base, adapter, f"s3://models/{place}/out")
    adapterkit.merge(base, adapter, save_plan=tmp_path / "plan.json")
    texts = [*download(s3.server, "models", f"{place}/out/").values(), (tmp_path / "plan.json").read_bytes()]
    texts.append(json.dumps(report, default=str).encode())
    for secret in (b"adapterkit-secret", s3.endpoint.encode()):
        assert not any(secret in text for text in texts)


# ------------------------------------------------------------------ interrupted runs


def test_an_interrupted_run_goes_on(s3: Proxy, wide: tuple[Path, Path], put: Put, place: str, tmp_path: Path) -> None:
    base, adapter, out = put(wide[0]), put(wide[1]), f"s3://models/{place}/out"
    sent: list[str] = []

    def stop(seen: Any) -> None:
        if seen.method == "PUT" and "partNumber" in seen.query:
            sent.append(seen.query)

    def interrupt(done: int, total: int) -> None:
        if done >= total // 2:
            raise KeyboardInterrupt

    s3.after = stop
    with pytest.raises(KeyboardInterrupt):
        adapterkit.merge(base, adapter, out, resume=True, progress=interrupt, jobs=1)
    assert download(s3.server, "models", f"{place}/out/") == {}
    begun = len(sent)
    assert begun
    with pytest.raises(OutputError, match=r"another run of this plan .*resume=True"):
        adapterkit.merge(base, adapter, out)
    report = adapterkit.merge(base, adapter, out, resume=True)
    assert len(sent) == len({*sent}), "no part is sent twice"
    adapterkit.merge(*wide, tmp_path / "out")
    assert download(s3.server, "models", f"{place}/out/") == here(tmp_path / "out")
    assert report.reused >= 0
    assert left(s3, place) == ([], 0)


@pytest.mark.slow
def test_parts_are_as_s3_wants_them(s3: Proxy, wide: tuple[Path, Path], put: Put, place: str) -> None:
    base, adapter = put(wide[0]), put(wide[1])
    adapterkit.merge(base, adapter, f"s3://models/{place}/out")
    sizes: dict[str, dict[int, int]] = {}
    for seen in s3.seen:
        if "partNumber" in seen.query:
            number = int(dict(part.split("=") for part in seen.query.split("&"))["partNumber"])
            sizes.setdefault(seen.path, {})[number] = seen.copied or seen.up
    assert len(sizes) == 2
    for parts in sizes.values():
        assert sorted(parts) == list(range(1, len(parts) + 1))
        assert all(parts[number] >= LEAST for number in parts if number != max(parts))


def test_what_rounding_took_is_written_beside_an_output_in_a_store(
    s3: Proxy, small: tuple[Path, Path], put: Put, place: str, tmp_path: Path
) -> None:
    adapterkit.convert(small[0], tmp_path / "nf4", to="nf4")
    how: dict[str, Any] = {"quant": "keep", "residual": 2}
    adapterkit.merge(tmp_path / "nf4", small[1], tmp_path / "out", **how)
    base, adapter, out = put(tmp_path / "nf4"), put(small[1]), f"s3://models/{place}/out"
    planned = adapterkit.merge(base, adapter, out, dry_run=True, **how)
    done = adapterkit.merge(base, adapter, out, **how)
    assert planned.residual is not None
    assert done.residual is not None
    assert done.residual.out == f"{out}-residual"
    assert download(s3.server, "models", f"{place}/out/") == here(tmp_path / "out")
    assert download(s3.server, "models", f"{place}/out-residual/") == here(tmp_path / "out-residual")
    with pytest.raises(OutputError):
        adapterkit.merge(base, adapter, out, **how)


@pytest.mark.parametrize("to_store", [False, True])
def test_what_outputs_of_one_pass_share_comes_once(
    s3: Proxy,
    wide: tuple[Path, Path],
    put: Put,
    place: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    to_store: bool,
) -> None:
    """The second output has a quarter of the bytes of the first, and reads beside them all the same: windows are few."""
    from adapterkit.stores.meter import moving
    from adapterkit.verbs.job import foreseen, run

    if not to_store:  # where a task is larger than all windows of this size
        monkeypatch.setattr("adapterkit.checkpoint.objects.WINDOW", 1 << 20)
        monkeypatch.setattr("adapterkit.checkpoint.sink.COPY_CHUNK", 2 << 20)
    base, adapter = put(wide[0]), put(wide[1])
    root = f"s3://models/{place}/out" if to_store else str(tmp_path / "out")
    Path(tmp_path / "out").mkdir()

    def jobs() -> list[Any]:
        asked: list[dict[str, Any]] = [{"dtype": "f16"}, {"quant": "nf4"}]
        return [
            adapterkit.plan_merge(base, adapter, f"{root}/{index}", headers_only=False, **one).job()
            for index, one in enumerate(asked)
        ]

    with moving():
        planned = foreseen(jobs())
    s3.clear()
    with moving() as meter:
        run(jobs(), workers=2 if to_store else 1)  # with one, the order of reads is always the same
    within(planned, meter.moved)
    stored = sum(path.stat().st_size for folder in wide for path in folder.glob("*.safetensors"))
    assert s3.down < 1.3 * stored


@pytest.mark.usefixtures("pieces_alike")
def test_local_inputs_that_change_between_two_parts_are_an_error(
    s3: Proxy, small: tuple[Path, Path], put: Put, place: str, tmp_path: Path
) -> None:
    """By the file's state, and by its name; the plan need not know the values apart."""
    base, adapter, out = put(small[0]), tmp_path / "adapter", f"s3://models/{place}/out"
    plain_adapter(adapter, small[0], seed=1)
    adapterkit.merge(base, adapter, save_plan=tmp_path / "plan.json")
    plan = Plan.from_json((tmp_path / "plan.json").read_bytes())
    OpenPlan(plan, out).execute(0)
    said = (adapter / "adapter_config.json").read_bytes()
    plain_adapter(adapter, small[0], seed=2)
    (adapter / "adapter_config.json").write_bytes(said)
    with pytest.raises(OutputError, match=r"adapter_model\.safetensors changed since .*out was begun"):
        OpenPlan(plan, out).execute(1)
    with pytest.raises(OutputError, match=r"adapter_model\.safetensors changed since .*out was begun"):
        adapterkit.merge(base, adapter, out, resume=True)
    adapterkit.merge(base, adapter, out, force=True)
    adapterkit.merge(base, adapter, tmp_path / "out")
    assert download(s3.server, "models", f"{place}/out/") == here(tmp_path / "out")
    assert left(s3, place) == ([], 0)
    other = f"s3://models/{place}/other"
    OpenPlan(plan, other).execute(0)
    edit_config(adapter, lora_alpha=2)  # the weights are the same, and what they mean is not
    with pytest.raises(CheckpointError, match=r"adapter_config\.json changed since the plan was made"):
        OpenPlan(plan, other).execute(1)
