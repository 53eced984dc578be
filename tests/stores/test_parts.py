"""Parts of one plan, sent to a store by several workers in any order: the object is that of a whole run."""

from __future__ import annotations

from pathlib import Path

import pytest
from bases import wide_base
from models import plain_adapter
from store_server import Proxy, client_of, download, upload

import adapterkit
from adapterkit.checkpoint.plan import Plan
from adapterkit.errors import OutputError
from adapterkit.verbs.execute import OpenPlan


def test_parts_in_any_order_by_several_workers(s3: Proxy, place: str, tmp_path: Path) -> None:
    base = wide_base(tmp_path)
    adapter = plain_adapter(tmp_path / "adapter", base, modules=("q_proj",))
    upload(s3.server, base, "models", f"{place}/base")
    upload(s3.server, adapter, "models", f"{place}/adapter")
    adapterkit.merge(base, adapter, tmp_path / "out")
    out = f"s3://models/{place}/out"
    plan_file = tmp_path / "plan.json"
    adapterkit.merge(f"s3://models/{place}/base", f"s3://models/{place}/adapter", save_plan=plan_file)
    plan = Plan.from_json(plan_file.read_bytes())
    workers = [OpenPlan(plan, out, 4_000_000) for _ in range(2)]
    parts = workers[0].parts
    assert len(parts) > len(plan.files)  # a file is several parts
    with pytest.raises(OutputError, match="not done"):
        OpenPlan(plan, out, 4_000_000).finish()
    for number, part in enumerate(reversed(parts)):
        workers[number % 2].execute(part.index)
        if number == 0:
            workers[1].execute(part.index)  # a second time, as of a worker that was lost
    assert download(s3.server, "models", f"{place}/out/") == {}  # nothing is to be seen before the end
    assert OpenPlan(plan, out, 4_000_000).left() == []
    assert OpenPlan(plan, out).left() == []  # however it is cut
    with pytest.raises(OutputError, match="another run writes"):
        adapterkit.merge(base, adapter, out, weights=0.5)
    report = OpenPlan(plan, out).finish()
    found = download(s3.server, "models", f"{place}/out/")
    assert found == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert report.requests
    client = client_of(s3.server)
    assert not client.list_multipart_uploads(Bucket="models", Prefix=f"{place}/").get("Uploads")
    assert not client.list_objects_v2(Bucket="models", Prefix=f"{place}/.").get("Contents")


def test_a_task_takes_the_place_of_another_plan_only_if_forced(s3: Proxy, place: str, tmp_path: Path) -> None:
    from models import plain_base

    base = plain_base(tmp_path / "base", layers=2)
    adapter = plain_adapter(tmp_path / "adapter", base)
    out = f"s3://models/{place}/out"
    for name, weight in (("one", 0.5), ("two", 1.0)):
        adapterkit.merge(base, adapter, weights=weight, save_plan=tmp_path / f"{name}.json")
    first = OpenPlan(Plan.from_json((tmp_path / "one.json").read_bytes()), out)
    first.execute(0)  # and is never heard of again
    with pytest.raises(OutputError, match="another run writes"):
        adapterkit.run(tmp_path / "two.json", out, task=0, tasks=1)
    s3.clear()
    done = adapterkit.run(tmp_path / "two.json", out, task=0, tasks=1, force=True)
    assert done.finished
    parts = [one for one in s3.seen if one.method == "PUT" and "partNumber" in one.query]
    # The parts and the notes of their uploads; what makes the output is in the report of the verb.
    assert 0 < sum(one.up for one in parts) <= done.bytes_up < s3.up
    assert 0 < done.requests < s3.count()
    adapterkit.merge(base, adapter, tmp_path / "out")
    assert download(s3.server, "models", f"{place}/out/") == {
        path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()
    }
    client = client_of(s3.server)
    assert not client.list_multipart_uploads(Bucket="models", Prefix=f"{place}/").get("Uploads")
    assert not client.list_objects_v2(Bucket="models", Prefix=f"{place}/.").get("Contents")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2])
def test_run_on_this_machine(s3: Proxy, workers: int, place: str, tmp_path: Path) -> None:
    from models import plain_base

    base = plain_base(tmp_path / "base", layers=4, width=64, shards=3)
    adapter = plain_adapter(tmp_path / "adapter", base)
    upload(s3.server, base, "models", f"{place}/base")
    adapterkit.merge(base, adapter, tmp_path / "out")
    adapterkit.merge(f"s3://models/{place}/base", adapter, save_plan=tmp_path / "plan.json")
    report = adapterkit.run(tmp_path / "plan.json", f"s3://models/{place}/out", on="local", workers=workers)
    assert report.finished
    found = download(s3.server, "models", f"{place}/out/")
    assert found == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for task in range(2):
        again = adapterkit.run(tmp_path / "plan.json", f"s3://models/{place}/array", task=task, tasks=2)
        assert again.finished is (task == 1)
    assert download(s3.server, "models", f"{place}/array/") == found
