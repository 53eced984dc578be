"""A merged model in a bucket is verified as on a disk: by its record, whole and by parts."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from models import plain_adapter, plain_base
from store_server import Proxy, client_of, download, upload

import adapterkit
from adapterkit.errors import UsageError
from adapterkit.verbs.verify.report import VerifyReport


def findings(report: VerifyReport) -> list[dict[str, Any]]:
    return [asdict(one) for one in report.findings if one.kind not in ("not loaded", "class not checked")]


def test_a_model_in_a_bucket_is_verified_by_its_record_and_by_parts(s3: Proxy, place: str, tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base")
    adapter = plain_adapter(tmp_path / "adapter", base)
    where = f"s3://models/{place}"
    upload(s3.server, base, "models", f"{place}/base")
    upload(s3.server, adapter, "models", f"{place}/adapter")
    asked: dict[str, Any] = {"base": f"{where}/base", "adapters": f"{where}/adapter"}
    adapterkit.merge(f"{where}/base", f"{where}/adapter", f"{where}/half", weights=0.5)
    whole = adapterkit.verify(f"{where}/half", **asked)
    assert (whole.ok, whole.record) == (True, True)  # without the record's weight it would be "scaling ignored"
    plan, out = tmp_path / "plan.json", f"{where}/report.json"
    adapterkit.verify(f"{where}/half", **asked, save_plan=plan)
    done = adapterkit.run(plan, out, task=0, tasks=1, part_size="2KB")
    assert done.finished
    assert done.parts > 3
    assert done.report.ok
    assert findings(done.report) == findings(whole)
    said = json.loads(download(s3.server, "models", f"{place}/report.json")[""])
    assert said["ok"]
    assert "is there already" in adapterkit.run(plan, out, task=0, tasks=1).notes[0]
    # A report has no place in a model that it is about: --force would take its config away.
    for folder, name in (
        (f"{where}/half", "report.json"),
        (f"{where}/base", "config.json"),
        (f"{where}/adapter/x", "y.json"),
    ):
        with pytest.raises(UsageError, match="lies in or over the input"):
            adapterkit.verify(f"{where}/half", **asked, out=f"{folder}/{name}", force=True)
        adapterkit.verify(f"{where}/half", **asked, save_plan=plan)
        with pytest.raises(UsageError, match="lies in or over the input"):
            adapterkit.run(plan, f"{folder}/{name}", task=0, tasks=1, force=True)
    client = client_of(s3.server)
    left = client.list_objects_v2(Bucket="models", Prefix=f"{place}/.").get("Contents")
    assert not left
    # Another record, and one that is damaged, are findings.
    other = plain_adapter(tmp_path / "other", base, seed=9)
    kinds = [one.kind for one in adapterkit.verify(f"{where}/half", base=base, adapters=other, weights=0.5).findings]
    assert "other adapter" in kinds
    client.put_object(Bucket="models", Key=f"{place}/half/adapterkit.json", Body=b"{")
    damaged = adapterkit.verify(f"{where}/half", **asked, weights=0.5)
    assert [one.kind for one in damaged.errors] == ["damaged record"]
    tampered = download(s3.server, "models", f"{place}/half/model.safetensors")[""]
    client.put_object(Bucket="models", Key=f"{place}/half/model.safetensors", Body=tampered[:-2] + b"\x01\x42")
    client.delete_object(Bucket="models", Key=f"{place}/half/adapterkit.json")
    wrong = adapterkit.verify(f"{where}/half", **asked, weights=0.5)
    adapterkit.verify(f"{where}/half", **asked, weights=0.5, save_plan=plan, force=False)
    again = adapterkit.run(plan, tmp_path / "report.json", task=0, tasks=1, part_size="2KB").report
    assert not wrong.ok
    assert findings(again) == findings(wrong)
    assert replace(again.tensors, seconds=0) == replace(wrong.tensors, seconds=0)


def test_keys_that_the_base_lacks_too_are_told_alike_wherever_it_lies(s3: Proxy, place: str, tmp_path: Path) -> None:
    for module in ("transformers", "accelerate"):
        pytest.importorskip(module)
    base = plain_base(tmp_path / "base", shards=2)  # without most of what a Llama has
    adapter = plain_adapter(tmp_path / "adapter", base)
    upload(s3.server, base, "models", f"{place}/base")
    adapterkit.merge(base, adapter, tmp_path / "merged")
    asked: dict[str, Any] = {"adapters": adapter, "level": "load"}
    for layers in (3, 4):  # and one whose config asks for what the base's does not
        config = tmp_path / "merged" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": layers}))
        here = adapterkit.verify(tmp_path / "merged", base=base, **asked)
        there = adapterkit.verify(tmp_path / "merged", base=f"s3://models/{place}/base", **asked)
        assert [asdict(one) for one in there.findings] == [asdict(one) for one in here.findings]
        said = {one.severity for one in here.findings if one.kind == "missing key"}
        assert (here.ok, said) == ((True, {"note"}) if layers == 3 else (False, {"note", "error"}))
