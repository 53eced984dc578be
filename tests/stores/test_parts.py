"""Parts of one plan, sent to a store by several workers in any order: the object is that of a whole run."""

from __future__ import annotations

from pathlib import Path

import pytest
from bases import wide_base
from models import plain_adapter
from store_server import Proxy, client_of, download, upload

import adapterkit
from adapterkit.checkpoint.plan import Plan
from adapterkit.errors import CheckpointError, OutputError
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


@pytest.mark.parametrize("quant", [None, "keep"])
def test_a_part_in_a_store_opens_what_it_needs(s3: Proxy, place: str, tmp_path: Path, quant: str | None) -> None:
    """The other files of the base are not touched. A config is that of the plan, or an error."""
    import json

    from models import plain_base

    where = f"s3://models/{place}"
    base = plain_base(tmp_path / "base", layers=6, width=128, shards=4)
    adapter = plain_adapter(tmp_path / "adapter", base, modules=("q_proj",))
    if quant is not None:
        adapterkit.convert(base, tmp_path / "small", to="fp8-block", max_shard_size="150KB")
        base = tmp_path / "small"
    upload(s3.server, base, "models", f"{place}/base")
    upload(s3.server, adapter, "models", f"{place}/adapter")
    adapterkit.merge(f"{where}/base", f"{where}/adapter", tmp_path / "whole", quant=quant)
    adapterkit.merge(f"{where}/base", f"{where}/adapter", save_plan=tmp_path / "plan.json", quant=quant)
    plan = Plan.from_json((tmp_path / "plan.json").read_bytes())
    assert len(plan.files) > 2
    for out in (f"{where}/out", tmp_path / "out"):
        for index in range(len(plan.files)):
            worker = OpenPlan(plan, out)
            s3.clear()
            worker.execute(index)
            assert "job" not in vars(worker)
            asked = {one.path.rpartition("/")[2] for one in s3.seen if one.method == "GET" and "/base/" in one.path}
            assert len({name for name in asked if name.endswith(".safetensors")}) < len(plan.files)
        OpenPlan(plan, out).finish()
    made = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir() if path.name != "adapterkit.json"}
    found = download(s3.server, "models", f"{place}/out/")
    assert {name: data for name, data in found.items() if name != "adapterkit.json"} == made
    assert {name: (tmp_path / "out" / name).read_bytes() for name in made} == made
    # The weights stay what they are; what they mean does not.
    other = f"{where}/other"
    OpenPlan(plan, other).execute(0)
    said = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**said, "lora_alpha": 2}))
    upload(s3.server, adapter, "models", f"{place}/adapter")
    for door in (
        lambda: OpenPlan(plan, other).execute(1),
        lambda: OpenPlan(plan, other).finish(),
        lambda: adapterkit.run(tmp_path / "plan.json", other, on="local", workers="1"),
        lambda: adapterkit.run(tmp_path / "plan.json", other, task=0, tasks=1),
    ):
        with pytest.raises(CheckpointError, match=r"adapter/adapter_config\.json changed since the plan was made"):
            door()
    with pytest.raises(OutputError, match=r"adapter/adapter_config\.json changed since .*other was begun"):
        adapterkit.merge(f"{where}/base", f"{where}/adapter", other, quant=quant, resume=True)


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
