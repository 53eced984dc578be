"""Bases, adapters and outputs in buckets of the Hub, by the real clients: the bytes of a local run, counted as planned."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace as changed
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from bases import gguf_adapter, gguf_base
from hub import TOKEN, client_of
from hub_buckets import DROP, LOSE, Bucket, BucketHub, Held, Wanted
from models import plain_adapter, plain_base
from test_writing import here, within

import adapterkit
from adapterkit.bucket.layout import parse_bucket
from adapterkit.bucket.pull import pull_bucket
from adapterkit.bucket.push import push_bucket
from adapterkit.checkpoint.plan import Plan
from adapterkit.checkpoint.uploads import sweep_uploads
from adapterkit.errors import AuthError, CheckFailed, CheckpointError, NotFound, OutputError, StoreError, UsageError
from adapterkit.integrations.resolving import find_adapter, sources_of
from adapterkit.places import Address, address_of
from adapterkit.provenance.register import register
from adapterkit.registry import verbs
from adapterkit.registry.checkout import checkout
from adapterkit.stores.connect import open_store
from adapterkit.stores.hub import _fault as fault_of
from adapterkit.stores.store import Store
from adapterkit.verbs.execute import OpenPlan

for module in ("hf_xet", "huggingface_hub"):
    pytest.importorskip(module, reason=f"{module} is not installed")
NAME = "org/models"
ROOT = f"hf://buckets/{NAME}"
Put = Callable[[Path], str]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BucketHub]:
    with BucketHub(tmp_path_factory.mktemp("xet")) as hub:
        yield hub


@pytest.fixture
def hub(served: BucketHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BucketHub]:
    """The Hub that the real client asks, with a bucket of its own for each test."""
    monkeypatch.setattr("adapterkit.stores.faults.FIRST_PAUSE", 0.001)
    monkeypatch.setenv("HF_ENDPOINT", served.url)
    with client_of(served, tmp_path / "cache", monkeypatch, TOKEN):
        api().create_bucket(NAME, exist_ok=True)
        yield served
        served.clear()
        served.buckets.clear()


def api() -> Any:
    import huggingface_hub as hf

    return hf.HfApi()


@pytest.fixture
def store(hub: BucketHub) -> Store:
    return open_store(Address("hf", f"buckets/{NAME}", ""))


@pytest.fixture
def put(hub: BucketHub) -> Put:
    """Puts a folder or a file into the bucket by huggingface_hub; its address."""

    def one(path: Path) -> str:
        files = here(path) if path.is_dir() else {"": path.read_bytes()}
        names = {name: f"in/{path.name}/{name}".rstrip("/") for name in files}
        api().batch_bucket_files(NAME, add=[(data, names[name]) for name, data in files.items()])
        return f"{ROOT}/in/{path.name}"

    return one


def there(prefix: str, folder: Path) -> dict[str, bytes]:
    """What lies below a prefix, as huggingface_hub lists and downloads it."""
    found = [one.path for one in api().list_bucket_tree(NAME, prefix.rstrip("/"), recursive=True) if one.type == "file"]
    names = {path: folder / path.removeprefix(prefix) for path in found if path.startswith(prefix)}
    api().download_bucket_files(NAME, list(names.items()))
    return here(folder) if folder.exists() else {}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("small")
    base = plain_base(folder / "base", layers=4, width=64, shards=3)
    (base / "tokenizer.json").write_text('{"model": {}}')
    return base, plain_adapter(folder / "adapter", base)


@pytest.fixture(scope="module")
def merged(small: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("merged") / "out"
    adapterkit.merge(*small, out)
    return here(out)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, bytes]]:
    """A base of two files of 6 MB, an adapter that touches the second, and what they make."""
    folder = tmp_path_factory.mktemp("wide")
    base = plain_base(folder / "base", layers=2, width=900, shards=2)
    last = plain_adapter(folder / "adapter", base, modules=("lm_head",))
    adapterkit.merge(base, last, folder / "out")
    return base, last, here(folder / "out")


def working(hub: BucketHub, prefix: str = "") -> list[str]:
    """Names of files that are of no use after a run."""
    return [path for path in hub.buckets[NAME].files if path.startswith(f"{prefix}.") or "/." in path]


def test_merges_in_a_bucket_are_merges(
    hub: BucketHub, put: Put, small: tuple[Path, Path], merged: dict[str, bytes], tmp_path: Path
) -> None:
    stored, beside = put(small[0]), put(small[1])
    out = f"{ROOT}/m e+r%20g/öut"
    planned = adapterkit.merge(stored, beside, out, dry_run=True)
    done = adapterkit.merge(stored, beside, out)
    assert there("m e+r%20g/öut/", tmp_path / "down") == merged
    assert working(hub) == []
    within(planned, done)
    assert [note for note in done.notes if "two runs" in note] == [
        f"{ROOT} keeps no conditions on writing: two runs to {out} at one time are not kept apart"
    ]
    assert adapterkit.verify(out, base=stored, adapters=beside).ok
    assert adapterkit.inspect(f"{stored}/model-00001-of-00003.safetensors")


def test_what_no_adapter_touches_gets_another_name_and_does_not_move(
    hub: BucketHub, put: Put, wide: tuple[Path, Path, dict[str, bytes]], tmp_path: Path
) -> None:
    base, beside = put(wide[0]), put(wide[1])
    planned = adapterkit.merge(base, beside, f"{ROOT}/out", dry_run=True)
    done = adapterkit.merge(base, beside, f"{ROOT}/out")
    assert there("out/", tmp_path / "down") == wide[2]
    within(planned, done)
    first = "model-00001-of-00002.safetensors"
    assert done.bytes_inside == len(wide[2][first])
    assert done.bytes_up < len(wide[2][first]) * 11 // 10
    files = hub.buckets[NAME].files
    assert files[f"out/{first}"].hash == files[f"in/base/{first}"].hash

    # From a model repository too: what goes up is only what an adapter touches.
    hub.add("org/base", wide[0])
    planned = adapterkit.merge("hf://org/base", beside, f"{ROOT}/from-model", dry_run=True)
    done = adapterkit.merge("hf://org/base", beside, f"{ROOT}/from-model")
    assert (planned.bytes_inside, planned.bytes_up) == (done.bytes_inside, pytest.approx(done.bytes_up, rel=0.05))
    assert done.bytes_inside == len(wide[2][first])
    found = there("from-model/", tmp_path / "model")
    assert {name: data for name, data in found.items() if name != "adapterkit.json"} == {
        name: data for name, data in wide[2].items() if name != "adapterkit.json"
    }


@pytest.mark.slow
def test_what_the_hub_does_not_copy_takes_the_way_through_here(
    hub: BucketHub, put: Put, wide: tuple[Path, Path, dict[str, bytes]], tmp_path: Path
) -> None:
    """From another region, for example."""
    base, beside, first = put(wide[0]), put(wide[1]), "model-00001-of-00002.safetensors"
    hub.add("org/base", wide[0])
    hub.rule = lambda asked: refused_copy(asked, ".parts/")
    done = adapterkit.merge(base, beside, f"{ROOT}/again")
    hub.clear()
    assert done.bytes_inside == 0
    assert there("again/", tmp_path / "again") == wide[2]
    hub.rule = lambda asked: refused_copy(asked, ".parts/")
    assert adapterkit.merge("hf://org/base", beside, f"{ROOT}/by-way").bytes_inside == 0
    hub.clear()
    assert there("by-way/", tmp_path / "way")[first] == wide[2][first]


@pytest.mark.slow
def test_several_workers_send_one_file(hub: BucketHub, put: Put, tmp_path: Path) -> None:
    """Each sends a piece of it: they are read back, and sent as one."""
    big = plain_base(tmp_path / "base", layers=2, width=1408)  # 32 MB in one file
    adapter = plain_adapter(tmp_path / "adapter", big, modules=("q_proj",))
    adapterkit.merge(big, adapter, tmp_path / "out")
    expected, base, beside = here(tmp_path / "out"), put(big), put(adapter)
    adapterkit.merge(base, beside, save_plan=tmp_path / "plan.json")
    plan = Plan.from_json((tmp_path / "plan.json").read_bytes())
    workers = [OpenPlan(plan, f"{ROOT}/many", 4_000_000) for _ in range(2)]
    parts = workers[0].parts
    assert len(parts) > len(plan.files)
    for number, part in enumerate(reversed(parts)):
        workers[number % 2].execute(part.index)
        if number == 0:
            workers[1].execute(part.index)  # a second time, as of a worker that was lost
    assert there("many/", tmp_path / "none") == {}
    pieces = [path for path in working(hub) if re.search(r"/\d{5}-\d{5}$", path)]
    assert len(pieces) > 1
    assert OpenPlan(plan, f"{ROOT}/many").left() == []
    OpenPlan(plan, f"{ROOT}/many").finish()
    assert there("many/", tmp_path / "many") == expected

    # As an array of tasks: the last one makes the output, and one that comes later finds it.
    array = {"plan": tmp_path / "plan.json", "out": f"{ROOT}/array", "tasks": 2, "part_size": "4MB"}
    tasks = [adapterkit.run(**array, task=task) for task in (0, 1, 0)]
    assert [one.finished for one in tasks] == [False, True, True]
    assert there("array/", tmp_path / "array") == expected
    assert working(hub) == []


def test_a_task_does_not_take_the_output_of_another_plan_for_its_own(
    hub: BucketHub, put: Put, small: tuple[Path, Path], tmp_path: Path
) -> None:
    """Nor one of the same names and sizes that is newer than both plans; the record says of which plan it is."""
    base, beside = put(small[0]), put(small[1])
    gguf, changed = put(gguf_base(tmp_path)), put(gguf_adapter(tmp_path))
    for inputs, name in (((base, beside), "out"), ((gguf, changed), "out.gguf")):
        out = f"{ROOT}/{name}"
        for weight in (1.0, 0.5):
            adapterkit.merge(*inputs, weights=weight, save_plan=tmp_path / f"{weight}.json")
            os.utime(tmp_path / f"{weight}.json", (0, 0))
        assert adapterkit.run(tmp_path / "0.5.json", out, task=0, tasks=1).report
        late = adapterkit.run(tmp_path / "0.5.json", out, task=0, tasks=1)
        assert late.notes == (f"{out} is there already",)
        with pytest.raises(OutputError, match="exists"):
            adapterkit.run(tmp_path / "1.0.json", out, task=0, tasks=1)
        record = next(key for key in hub.buckets[NAME].files if re.fullmatch(rf"{name}[./]adapterkit\.json", key))
        api().batch_bucket_files(NAME, add=[(b"{}", record)])
        with pytest.raises(OutputError, match="exists"):
            adapterkit.run(tmp_path / "0.5.json", out, task=0, tasks=1)


def test_tasks_that_end_at_one_moment_make_one_output(
    hub: BucketHub, put: Put, small: tuple[Path, Path], merged: dict[str, bytes], tmp_path: Path
) -> None:
    """Whatever the other has done in between: nothing is refused to either, and each file is the one that both would make."""
    from adapterkit.verbs.run import _finished

    base, beside = put(small[0]), put(small[1])
    adapterkit.merge(base, beside, save_plan=tmp_path / "plan.json")
    plan, at, met = Plan.from_json((tmp_path / "plan.json").read_bytes()), 0, list[int]()
    while True:
        out, asked, ends = f"{ROOT}/{at}", list[Wanted](), list[Any]()
        for part in OpenPlan(plan, out).parts:
            OpenPlan(plan, out).execute(part.index)

        def other(wanted: Wanted, at: int = at, out: str = out, asked: Any = asked, ends: Any = ends) -> None:
            if wanted.path.endswith("/batch"):
                asked.append(wanted)
                if len(asked) == at + 1:
                    met.append(at)
                    ends.append(_finished(OpenPlan(plan, out), force=False))

        hub.rule = other  # type: ignore[assignment]
        ends.append(_finished(OpenPlan(plan, out), force=False))
        hub.rule = None
        assert len(ends) == 1 + (at in met), at  # the other was not refused
        assert any(ends), at
        assert there(f"{at}/", tmp_path / str(at)) == merged, at
        assert working(hub) == []
        if at not in met:
            break
        at += 1
    assert at > 5


def test_files_of_two_runs_at_one_moment_are_seen(
    hub: BucketHub, small: tuple[Path, Path], merged: dict[str, bytes], tmp_path: Path
) -> None:
    """A bucket cannot keep them apart; whichever ends last sees what is left of both."""
    name = "out/model-00002-of-00003.safetensors"

    def other(wanted: Wanted) -> None:
        if any(line["path"] == "out/adapterkit.json" for line in wanted.lines):
            hub.buckets[NAME].files[name] = changed(hub.buckets[NAME].files[name], hash="2" * 64)

    hub.rule = other  # type: ignore[assignment]
    with pytest.raises(
        OutputError, match=rf"another run wrote {ROOT}/{name} at the same time; .*run one of them again"
    ):
        adapterkit.merge(*small, f"{ROOT}/out", resume=True)
    assert not {"out/config.json", "out/model.safetensors.index.json"} & hub.buckets[NAME].files.keys()
    hub.clear()
    adapterkit.merge(*small, f"{ROOT}/out", force=True)
    assert there("out/", tmp_path / "down") == merged


def refused_copy(asked: Wanted, words: str) -> tuple[int, dict[str, str]] | int | None:
    """As if a file could not be copied from where it lies."""
    return 422 if any(line["type"] == "copyFile" and words in line["path"] for line in asked.lines) else None


def test_parts_in_any_order_are_one_file(store: Store, hub: BucketHub) -> None:
    work = Address("hf", f"buckets/{NAME}", ".work")
    pieces = {number: bytes([number]) * (number % 5 + 1) for number in range(1, 31)}
    made = store.begin("whole", {}, work)
    made.expect([3, 4, 5, 9])
    for number in (9, 3, 4, 5, *(one for one in pieces if one not in (3, 4, 5, 9))):
        made.put(number, pieces[number])
    again = store.resumed(made.key, made.id)
    held = again.parts()
    assert held is not None
    assert {number: part.size for number, part in held.items()} == {n: len(data) for n, data in pieces.items()}
    assert store.head("whole") is None
    etag = again.complete({number: part.etag for number, part in held.items()}, absent=True)
    found = store.head("whole")
    assert found is not None
    assert found.etag == etag
    assert store.read("whole", 0, found.size, found.etag) == b"".join(pieces.values())
    assert again.parts() == held  # until it is noted what they became
    assert again.complete({number: part.etag for number, part in held.items()}, absent=True) == etag  # the same bytes
    again.release()
    assert [one.key for one in store.entries("")] == ["whole"]
    assert made.parts() is None  # it is over
    another = store.begin("whole", {}, work)
    another.put(1, b"x")
    assert another.complete({1: "", 2: ""}, absent=False) is None  # a part is missing
    assert another.complete({1: ""}, absent=True) is None  # there is one
    assert another.complete({1: ""}, absent=False)
    another.release()

    # Parts that follow one another wait for their turn, and not for one that will not come.
    made = store.begin("late", {}, work)
    made.expect([1, 2, 3])
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(made.put, number, b"x") for number in (3, 2)]
        pool.submit(made.put, 1, b"x").result()
        assert [one.result() for one in waiting] == ["3", "2"]
    assert made.complete({1: "", 2: "", 3: ""}, absent=True)
    made.release()
    made = store.begin("never", {}, work)
    made.expect([1, 2])
    with ThreadPoolExecutor(1) as pool:
        waiting = [pool.submit(made.put, 2, b"x")]
        made.give_up(OutputError("the first part does not come"))
        with pytest.raises(OutputError, match="does not come"):
            waiting[0].result()
    made.abort()
    assert [one.key for one in store.entries("")] == ["late", "whole"]


def test_an_interrupted_run_goes_on_and_what_it_left_can_be_swept(
    hub: BucketHub, put: Put, small: tuple[Path, Path], merged: dict[str, bytes], tmp_path: Path
) -> None:
    def interrupt(done: int, total: int) -> None:
        if done >= total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adapterkit.merge(*small, f"{ROOT}/x/out", resume=True, progress=interrupt, jobs=1)
    assert there("x/out/", tmp_path / "none") == {}
    for where in (ROOT, f"{ROOT}/x", f"{ROOT}/x/out"):
        swept = sweep_uploads(where, keep_days=0)
        assert swept.uploads
        assert not swept.applied
        assert sweep_uploads(where).young == len(swept.uploads)
    done = adapterkit.merge(*small, f"{ROOT}/x/out", resume=True)
    assert there("x/out/", tmp_path / "down") == merged
    assert done.reused
    assert done.bytes_up < sum(map(len, merged.values()))  # what was sent is not sent again
    with pytest.raises(KeyboardInterrupt):
        adapterkit.merge(*small, f"{ROOT}/x/two", resume=True, progress=interrupt, jobs=1)
    beside = put(small[1])
    adapterkit.resize(beside, rank=2, save_plan=tmp_path / "plan.json")
    opened = OpenPlan(Plan.from_json((tmp_path / "plan.json").read_bytes()), f"{ROOT}/x/low")
    opened.execute(0)
    opened._gathered(False)  # results that nobody goes on with, and a claim
    strays = [
        f"x/.two.partial.parts/model.safetensors.{'0' * 32}/00007-00007",
        "x/.a.results-0123456789ab/x.safetensors",
    ]
    api().batch_bucket_files(NAME, add=[(b"late", one) for one in strays])  # a part that came too late; somebody else's
    swept = sweep_uploads(f"{ROOT}/x", keep_days=0, apply=True)
    assert swept.uploads
    assert {".low.partial", opened.place.name, ".two.partial.parts"} <= {key.split("/")[1] for key in swept.notes}
    assert working(hub) == strays[1:]


@pytest.mark.slow
def test_two_runs_to_one_target(
    hub: BucketHub, small: tuple[Path, Path], merged: dict[str, bytes], tmp_path: Path
) -> None:
    """Not at one moment, which a bucket cannot keep apart: one sees what the other wrote."""
    out, other = f"{ROOT}/out", list[str]()

    def meanwhile(done: int, total: int) -> None:
        if not other:
            with pytest.raises(OutputError, match="another run writes") as error:
                adapterkit.merge(*small, out, weights=0.5)
            other.append(str(error.value))

    adapterkit.merge(*small, out, progress=meanwhile)
    assert there("out/", tmp_path / "down") == merged
    assert other
    with pytest.raises(OutputError, match="exists"):
        adapterkit.merge(*small, out, weights=0.5)
    adapterkit.merge(*small, out, weights=0.5, force=True)
    assert there("out/", tmp_path / "half").keys() == merged.keys()
    assert there("out/", tmp_path / "half") != merged
    adapterkit.merge(*small, out, force=True)
    assert there("out/", tmp_path / "again") == merged
    assert working(hub) == []


def test_a_source_that_is_replaced_is_an_error_that_names_it(
    hub: BucketHub, store: Store, put: Put, small: tuple[Path, Path], tmp_path: Path
) -> None:
    base, beside = put(small[0]), put(small[1])
    adapterkit.merge(base, beside, save_plan=tmp_path / "plan.json")
    name = "in/base/model-00002-of-00003.safetensors"
    found = store.head(name)
    assert found is not None
    before = store.read(name, 0, found.size, found.etag)

    def replace(done: int, total: int) -> None:
        store.put(name, before[:-2] + b"\x01\x01")

    # In mid-run it is read as it was, by its hash; a mixture it can never be. It is said all the same.
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003.safetensors changed while it was read"):
        adapterkit.merge(base, beside, f"{ROOT}/out", progress=replace)
    assert there("out/", tmp_path / "none") == {}
    with pytest.raises(CheckpointError, match="changed since the plan was made"):
        adapterkit.execute(Plan.from_json((tmp_path / "plan.json").read_bytes()), f"{ROOT}/out", part=0)
    store.delete([name])
    with pytest.raises(CheckpointError, match="changed while it was read"):
        store.check_unchanged(name, found.etag)
    assert working(hub) == []


@pytest.mark.slow
def test_formats(hub: BucketHub, put: Put, small: tuple[Path, Path], tmp_path: Path) -> None:
    """GGUF in parts, a quantized base that keeps its format, and a computed adapter."""
    base, adapter = gguf_base(tmp_path), gguf_adapter(tmp_path)
    (tmp_path / "gguf").mkdir()
    adapterkit.merge(base, adapter, tmp_path / "gguf/m.gguf", max_shard_size="40KB")
    adapterkit.merge(put(base), put(adapter), f"{ROOT}/gguf/m.gguf", max_shard_size="40KB")
    adapterkit.convert(small[0], tmp_path / "nf4", to="nf4")
    adapterkit.merge(tmp_path / "nf4", small[1], tmp_path / "keep", quant="keep", keep_touched="bf16")
    adapterkit.merge(put(tmp_path / "nf4"), put(small[1]), f"{ROOT}/keep", quant="keep", keep_touched="bf16")
    adapterkit.combine([small[1], small[1]], tmp_path / "two", weights=[0.5, 0.25])
    adapterkit.combine([f"{ROOT}/in/adapter", f"{ROOT}/in/adapter"], f"{ROOT}/two", weights=[0.5, 0.25])
    for name in ("gguf", "keep", "two"):
        assert there(f"{name}/", tmp_path / "down" / name) == here(tmp_path / name), name
    assert working(hub) == []


def first_of(fault: int | str | tuple[int, dict[str, str]], *ends: str) -> Callable[[Wanted], object]:
    """A fault for the first two requests of each kind."""
    seen: dict[str, int] = {}

    def rule(asked: Wanted) -> object:
        end = next((end for end in ends if end in asked.path), None)
        if end is None or seen.get(end, 0) >= 2:
            return None
        seen[end] = seen.get(end, 0) + 1
        return fault

    return rule


@pytest.mark.parametrize(
    "fault",
    [
        LOSE,
        *(pytest.param(one, marks=pytest.mark.slow) for one in (503, (429, {"ratelimit": '"api";r=0;t=0'}), DROP)),
    ],
)
def test_what_passes_is_tried_again(
    fault: int | str | tuple[int, dict[str, str]],
    hub: BucketHub,
    put: Put,
    small: tuple[Path, Path],
    merged: dict[str, bytes],
    tmp_path: Path,
) -> None:
    base, beside = put(small[0]), put(small[1])
    hub.rule = first_of(fault, "/batch", "/paths-info", "/tree", "-token")  # type: ignore[assignment]
    adapterkit.merge(base, beside, f"{ROOT}/out")
    hub.clear()
    assert there("out/", tmp_path / "down") == merged
    assert working(hub) == []


STAYS = [
    (403, AuthError, "refused"),
    (401, AuthError, "does not accept the credentials"),
    ((403, {"X-Error-Message": "Storage limit reached"}), OutputError, "no room"),
    (500, StoreError, "in 7 attempts"),
    (422, StoreError, "OperationFailed"),
]


@pytest.mark.parametrize(("fault", "kind", "words"), STAYS)
def test_what_stays_leaves_nothing(
    fault: int | tuple[int, dict[str, str]],
    kind: type[Exception],
    words: str,
    hub: BucketHub,
    small: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    def rule(asked: Wanted) -> object:
        adds = [line["path"] for line in asked.lines if line["type"] != "deleteFile"]
        return fault if any("00002-of-00003.safetensors." in path and path[-1].isdigit() for path in adds) else None

    hub.rule = rule  # type: ignore[assignment]
    with pytest.raises(kind, match=words) as error:
        adapterkit.merge(*small, f"{ROOT}/out", jobs=3)
    hub.clear()
    assert "00002-of-00003.safetensors" in str(error.value)
    assert hub.buckets[NAME].files == {}


@pytest.mark.slow
def test_the_store_of_bytes_may_fail_too(hub: BucketHub, small: tuple[Path, Path], tmp_path: Path) -> None:
    """In a process of its own: hf_xet reads how often it tries again from the environment, once."""
    kinds = {401: "AuthError", 403: "AuthError", 404: "StoreError", 429: "StoreError", 503: "StoreError"}
    held = Held("1" * 64, 1000, datetime.now(timezone.utc))
    for status in kinds:
        hub.buckets[f"org/x{status}"] = Bucket({"there/model.safetensors": held})
    ask = """
import sys, adapterkit, adapterkit.stores.faults as faults
from adapterkit.errors import AdapterkitError
faults.FIRST_PAUSE = 0.001
for status in sys.argv[3:]:
    where = f"hf://buckets/org/x{status}"
    for call in (lambda: adapterkit.inspect(f"{where}/there"), lambda: adapterkit.merge(*sys.argv[1:3], f"{where}/out")):
        try:
            call()
        except AdapterkitError as error:
            print(status, type(error).__name__, error)
"""
    where = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
    once = {"HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1", "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms"}
    done = subprocess.run(
        [sys.executable, "-c", ask, *map(str, small), *map(str, kinds)],
        env={**os.environ, **where, **once, "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    told = [line.split(" ", 2) for line in done.stdout.splitlines()]
    print(done.stdout)
    assert len(told) == 2 * len(kinds), done.stdout + done.stderr
    writing = {int(status): (kind, words) for status, kind, words in told[1::2]}
    assert {status: kind for status, (kind, _) in writing.items()} == kinds
    assert all(f"org/x{status}/.out" in words for status, (_, words) in writing.items())
    assert "HTTP 503" in writing[503][1]
    # Of some faults hf_xet makes an empty stream: what was asked for is missing then, and that is an error too.
    assert all(kind in ("AuthError", "StoreError") for _, kind, _ in told)
    assert not any(word in done.stdout + done.stderr for word in (TOKEN, "cas-token"))


def test_buckets_that_are_not_there_or_are_nobodys(
    hub: BucketHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(NotFound, match="the bucket of hf://buckets/org/none/x does not exist"):
        adapterkit.inspect("hf://buckets/org/none/x")
    with pytest.raises(NotFound, match="nothing lies below"):
        adapterkit.inspect(f"{ROOT}/nothing")
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(AuthError, match="does not accept the credentials"):
        adapterkit.inspect(f"{ROOT}/nothing")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match=r"3 attempts \(no connection\)"):
        adapterkit.inspect(f"{ROOT}/nothing")


def test_a_token_that_is_renewed_in_mid_run_is_taken(
    hub: BucketHub,
    put: Put,
    small: tuple[Path, Path],
    merged: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, beside = put(small[0]), put(small[1])
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    asked: list[str] = []

    def who() -> str:
        asked.append("")
        return TOKEN if len(asked) > 1 else "hf_old"

    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", who)
    adapterkit.merge(base, beside, f"{ROOT}/out")
    monkeypatch.undo()
    assert len(asked) > 1


def test_credentials_are_in_no_output(
    hub: BucketHub, put: Put, small: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base, beside = put(small[0]), put(small[1])
    adapterkit.merge(base, beside, save_plan=tmp_path / "plan.json")
    done = adapterkit.merge(base, beside, f"{ROOT}/out")
    said = [repr(done), (tmp_path / "plan.json").read_text(), *capfd.readouterr()]
    said += [data.decode(errors="replace") for data in there("out/", tmp_path / "down").values()]
    said += [repr(open_store(Address("hf", f"buckets/{NAME}", "")).__dict__["_xet"].__dict__)]
    for text in said:
        assert TOKEN not in text
        assert "cas-token" not in text


def test_versions_of_the_registry(hub: BucketHub, home: Path, tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base")
    folder = plain_adapter(tmp_path / "a1", base, base_model_name_or_path="org/base")
    (folder / "model.sig").write_text("a signature\n")  # it travels with the files
    register(folder, "tickets", base=base)
    to = f"{ROOT}/adapters/tickets"
    done = push_bucket("tickets@1", f"{to}@v1")
    pulled = pull_bucket(f"{to}@v1", home=tmp_path / "elsewhere")
    first = verbs.show("tickets@1").record
    assert pulled.record.content == done.content
    assert (pulled.record.name, pulled.record.base, pulled.record.kind) == (first.name, first.base, first.kind)
    assert (checkout("tickets@1", home=tmp_path / "elsewhere") / "model.sig").read_text() == "a signature\n"
    again = push_bucket("tickets@1", f"{to}@v1")
    assert (again.new, again.uploaded) == (False, ())
    adapterkit.merge(base, done.folder, tmp_path / "merged")  # a folder that every verb reads
    served = find_adapter(
        f"tickets@{done.content[:12]}", sources=sources_of(f"registry,{ROOT}/adapters"), home=tmp_path / "new"
    )
    assert served.served == f"tickets@{done.content[:12]}"
    (folder / "LICENSE").write_text("all rights reserved\n")
    register(folder, "tickets", base=base)
    with pytest.raises(OutputError, match="is not moved"):
        push_bucket("tickets@2", f"{to}@v1")
    push_bucket("tickets@2", f"{to}@v1", move_tag=True)
    name = f"adapters/tickets/{done.digest}/adapter_model.safetensors"
    api().batch_bucket_files(NAME, add=[(b"others", name)])
    with pytest.raises(CheckFailed, match="not what the manifest says"):
        pull_bucket(f"{to}@sha256:{done.digest}", home=tmp_path / "third")


@pytest.mark.slow
def test_a_combination_by_several_tasks(hub: BucketHub, put: Put, small: tuple[Path, Path], tmp_path: Path) -> None:
    """Its parts are results, which lie in the bucket until the output is made of them."""
    adapterkit.combine([small[1], small[1]], tmp_path / "two", weights=[0.5, 0.25], method="svd", rank=2)
    beside = put(small[1])
    plan = tmp_path / "plan.json"
    adapterkit.combine([beside, beside], weights=[0.5, 0.25], method="svd", rank=2, save_plan=plan)
    done = [adapterkit.run(plan, f"{ROOT}/two", task=task, tasks=2, part_size="10KB") for task in (0, 1, 0)]
    assert [one.finished for one in done] == [False, True, True]
    assert there("two/", tmp_path / "down") == here(tmp_path / "two")
    os.utime(plan, (time.time() + 100,) * 2)  # whichever clock is off
    assert adapterkit.run(plan, f"{ROOT}/two", task=0, tasks=2).notes == (f"{ROOT}/two is there already",)
    other = put(
        plain_adapter(tmp_path / "other", small[0], seed=9)
    )  # of the same shapes, so of the same names and sizes
    adapterkit.combine([other, other], weights=[0.5, 0.25], method="svd", rank=2, save_plan=plan)
    os.utime(plan, (1, 1))
    with pytest.raises(OutputError, match="exists"):
        adapterkit.run(plan, f"{ROOT}/two", task=0, tasks=2)

    adapterkit.resize(
        beside, rank=2, to="kohya", save_plan=tmp_path / "one.json"
    )  # a file, which its plan does not say
    array = {"plan": tmp_path / "one.json", "out": f"{ROOT}/one.safetensors", "tasks": 1, "task": 0}
    first, late = adapterkit.run(**array), adapterkit.run(**array)
    assert (first.report is None, late.report is None) == (False, True)
    assert late.notes == (f"{ROOT}/one.safetensors is there already",)
    assert working(hub) == []


def test_what_the_hub_says_of_a_fault() -> None:
    """Headers as the Hub sends them (huggingface_hub 2.4, ``utils/_http.py``: ``parse_ratelimit_headers``)."""

    class Answer:
        def __init__(self, status: int, **headers: str) -> None:
            self.status_code = status
            self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    assert fault_of(Answer(429, ratelimit='"api";r=0;t=55')).wait == 55
    assert fault_of(Answer(429, Retry_After="7")).wait == 7
    assert fault_of(Answer(503, Retry_After="7")).wait == 0
    assert fault_of(Answer(404, X_Error_Code="RepoNotFound")).code == "NoSuchBucket"
    assert fault_of(Answer(404, X_Error_Code="EntryNotFound")).code == "EntryNotFound"
    assert fault_of(Answer(500, X_Error_Code="<b>hf_secret</b>")).said == "HTTP 500"


def test_a_hub_that_is_switched_off_is_said() -> None:
    with pytest.raises(StoreError, match="the Hub is switched off by HF_HUB_OFFLINE"):
        adapterkit.inspect("hf://buckets/org/nobodys/x")


def test_addresses() -> None:
    assert str(address_of("HF://buckets/org/x/a/b/")) == "hf://buckets/org/x/a/b"
    assert address_of(Path("hf://buckets/org/x/a")) == Address("hf", "buckets/org/x", "a")
    assert address_of("hf://org/model") is None
    for odd in ("hf://buckets", "hf://buckets/org", "hf://buckets//x", "hf://buckets/org/x/../y"):
        with pytest.raises(UsageError, match="write it like hf://buckets/owner/name/folder"):
            address_of(odd)
    with pytest.raises(UsageError, match="a whole bucket"):
        adapterkit.merge("a", "b", ROOT)
    for which in ("", "@", "@sha256:12"):
        with pytest.raises(UsageError, match=rf"a whole bucket|give it like {ROOT}/x@v1"):
            parse_bucket(f"{ROOT}{'/x' if which else ''}{which}")


def test_recipes_and_files_of_options_take_buckets(
    small: tuple[Path, Path], put: Put, home: Path, tmp_path: Path, merged: dict[str, bytes]
) -> None:
    from adapterkit.provenance.attest import attest
    from adapterkit.provenance.register import register
    from adapterkit.recipe.run import build

    base, adapter = put(small[0]), put(small[1])
    recipe = tmp_path / "r" / "recipe.toml"
    recipe.parent.mkdir()
    recipe.write_text(f'base = "{base}"\nadapters.one = "{adapter}"\noutputs.m.path = "{ROOT}/out/m"\n')
    assert build(recipe, outside=True).changed == 1
    made = there("out/m/", tmp_path / "got")
    assert {name: data for name, data in made.items() if name.endswith(".safetensors")} == {
        name: data for name, data in merged.items() if name.endswith(".safetensors")
    }
    assert build(recipe, outside=True, locked=True).changed == 0
    attest(f"{ROOT}/out/m", [base, adapter])
    assert "adapterkit.intoto.json" in there("out/m/", tmp_path / "again")
    record = register(f"{ROOT}/out/m", "m").record
    assert record.meta["from"] == f"{ROOT}/out/m"
    adapterkit.merge(*small, save_plan=f"{ROOT}/plan.json")
    adapterkit.run(f"{ROOT}/plan.json", tmp_path / "by-plan", task=0, tasks=1)
    assert (tmp_path / "by-plan" / "config.json").read_bytes() == merged["config.json"]
