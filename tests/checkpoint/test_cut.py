"""Plans cut into parts: every byte is in one part, parts are even, and no byte of the output depends on the cut."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import plain_adapter, plain_base, read_bytes

sys.path.insert(0, str(Path(__file__).parents[1] / "gguf"))

import adapterkit
from adapterkit.checkpoint.cut import (
    FOR_EACH,
    LEAST,
    PART_SIZE,
    PlanPart,
    cost_of,
    cut,
    elements_between,
    even_size,
    shares,
)
from adapterkit.checkpoint.plan import Plan, PlannedFile
from adapterkit.checkpoint.plan_file import PlanStep
from adapterkit.disk import partial_folder
from adapterkit.errors import AdapterkitError, CheckpointError, OutputError
from adapterkit.verbs.execute import OpenPlan
from adapterkit.verbs.plan_merge import plan_merge


def planned(sizes: list[int]) -> Plan:
    """A plan of one file of computed tensors."""
    steps, offset = [], 10
    for index, size in enumerate(sizes):
        steps.append(PlanStep(f"t{index}", "U8", (size,), offset, size, "made", size))
        offset += size
    return Plan((PlannedFile("model.safetensors", offset, tuple(steps)),))


@settings(max_examples=100)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 200))
def test_parts_cover_a_file_without_overlap(sizes: list[int], work: int) -> None:
    plan = planned(sizes)
    parts = cut(plan, work)
    assert [parts[0].start, parts[-1].stop] == [0, plan.files[0].nbytes]
    assert all(one.stop == other.start for one, other in pairwise(parts))
    assert [step for part in parts for step in part.steps] == list(plan.steps)
    assert all(part.nbytes > 0 for part in parts)


def test_parts_of_equal_tensors_are_even() -> None:
    parts = cut(planned([10] * 97), 200)
    counts = sorted(len(part.steps) for part in parts)
    assert counts[-1] - counts[0] <= 1
    assert max(part.cost for part in parts) <= 210


def test_a_copy_weighs_less_than_a_merge_and_that_less_than_an_encoding() -> None:
    copied = PlanStep("a", "BF16", (50,), 0, 100, "copy", 100, "base", 8)
    merged = PlanStep("a", "BF16", (50,), 0, 100, "+ LoRA", 100)
    encoded = PlanStep("a", "Q4_K", (178,), 0, 100, "to Q4_K", 356)
    assert cost_of(copied) < cost_of(merged) < cost_of(encoded)


def test_shares_are_even() -> None:
    parts = cut(planned([10] * 64), 100)
    for count in (1, 2, 3, 5):
        dealt = shares(parts, count)
        assert sorted(part.index for share in dealt for part in share) == list(range(len(parts)))
        loads = [sum(part.cost for part in share) for share in dealt]
        assert max(loads) - min(loads) <= max(part.cost for part in parts)


# ------------------------------------------------------------------ bytes


def _folder(place: Path) -> tuple[Any, ...]:
    base = plain_base(place / "base", layers=3, shards=2)
    return base, plain_adapter(place / "adapter", base, modules=["q_proj", "down_proj"]), {}


def _one_gguf(place: Path) -> tuple[Any, ...]:
    pytest.importorskip("gguf")
    from gguf_files import random_array, write_gguf
    from models import write_adapter

    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (40, 256)}
    for layer in range(2):
        shapes |= {f"blk.{layer}.attn_q.weight": (256, 256), f"blk.{layer}.attn_norm.weight": (256,)}
    shapes |= {"output_norm.weight": (256,), "output.weight": (40, 256)}
    arrays = {name: random_array(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    heads = {"llama.block_count": 2, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 4}
    base = write_gguf(place / "base.gguf", arrays, metadata={**heads, "general.name": "tiny"})
    key = "base_model.model.model.layers.1.self_attn.q_proj"
    made = torch.Generator().manual_seed(1)
    factors = {
        f"{key}.lora_A.weight": torch.randn(2, 256, generator=made),
        f"{key}.lora_B.weight": torch.randn(256, 2, generator=made),
    }
    return base, write_adapter(place / "adapter", factors, r=2, lora_alpha=2), {"quant": "Q4_K_M"}


def _kept(place: Path) -> tuple[Any, ...]:
    base, adapter, _ = _folder(place)
    adapterkit.convert(base, place / "base-nf4", to="nf4")
    return place / "base-nf4", adapter, {"quant": "keep", "yes_lossy": True}


@pytest.mark.parametrize(
    "make",
    [_folder, pytest.param(_one_gguf, marks=pytest.mark.slow), _kept],
    ids=["folder", "one GGUF file", "keep"],
)
def test_no_byte_depends_on_the_cut(make: Callable[[Path], tuple[Any, ...]], tmp_path: Path) -> None:
    base, adapter, options = make(tmp_path)
    whole, out = (tmp_path / f"{name}{'.gguf' if base.suffix else ''}" for name in ("whole", "out"))
    to = {"to": "gguf"} if base.suffix else {}
    adapterkit.merge(base, [adapter], whole, **options)
    plan = Plan.from_json(plan_merge(base, [adapter], **options, **to).plan.to_json())
    opened = OpenPlan(plan, out, part_size=plan.nbytes // 7)
    assert len(opened.parts) > len(plan.files)
    for part in reversed(opened.parts):
        report = opened.execute(part.index, jobs=1)
        assert report.nbytes == part.nbytes
    assert opened.left() == []
    opened.finish()
    assert _bytes(out) == _bytes(whole)


def _bytes(path: Path) -> dict[str, bytes]:
    return read_bytes(path) if path.is_dir() else {"": path.read_bytes()}


def test_a_run_goes_on_with_another_cut(tmp_path: Path) -> None:
    base, adapter, _ = _folder(tmp_path)
    adapterkit.merge(base, [adapter], tmp_path / "whole")
    plan = plan_merge(base, [adapter]).plan
    fine, coarse = (OpenPlan(plan, tmp_path / "out", part_size=size) for size in (2000, None))
    for part in fine.parts[:-1]:
        fine.execute(part.index)
    assert [part.index for part in fine.left()] == [fine.parts[-1].index]
    assert [part.index for part in coarse.left()] == [len(coarse.parts) - 1]
    with pytest.raises(OutputError, match="are not done"):
        coarse.finish()
    coarse.execute(len(coarse.parts) - 1)
    coarse.finish()
    assert read_bytes(tmp_path / "out") == read_bytes(tmp_path / "whole")


def test_parts_of_two_plans_are_never_put_together(tmp_path: Path) -> None:
    base, adapter, _ = _folder(tmp_path)
    one, other = (
        OpenPlan(plan_merge(base, [adapter], weights=[weight]).plan, tmp_path / "out", part_size=3000)
        for weight in (1.0, 2.0)
    )
    for part in one.parts:
        one.execute(part.index)
    other.execute(0)
    assert len(one.left()) == len(one.parts)  # what the other wrote over is not said to be done
    for part in other.parts[1:]:
        other.execute(part.index)
    other.finish()
    adapterkit.merge(base, [adapter], tmp_path / "whole", weights=[2.0])
    assert read_bytes(tmp_path / "out") == read_bytes(tmp_path / "whole")


@pytest.mark.usefixtures("pieces_alike")
@pytest.mark.parametrize("when", ["before the part", "meanwhile", "unnoted"])
def test_parts_of_a_base_that_changed_in_between_are_refused(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the worker whose part would be the first of the new state, and by the file's name."""
    from adapterkit.checkpoint import parts

    base, adapter, _ = _folder(tmp_path)
    plan, out = plan_merge(base, [adapter]).plan, tmp_path / "out"
    changed = sorted(base.glob("*.safetensors"))[0]

    def change() -> None:
        changed.write_bytes(changed.read_bytes()[:-4] + b"\0\0\0\0")  # other values under the same header

    said = rf"{changed} changed while the parts were executed"
    if when == "meanwhile":  # of two workers that begin at the same moment, neither sees a part of the other
        run = parts.Sink.run

        def with_another(self: Any, some: Any) -> None:
            monkeypatch.setattr(parts.Sink, "run", run)
            run(self, some)
            change()
            adapterkit.execute(plan, out, part=1)

        monkeypatch.setattr(parts.Sink, "run", with_another)
        with pytest.raises(CheckpointError, match=said):
            adapterkit.execute(plan, out, part=0)
    else:
        adapterkit.execute(plan, out, part=0)
        change()
        if when == "unnoted":  # by an older adapterkit, or torn by a kill
            for note in partial_folder(out).glob(".inputs.*"):
                note.write_text("{")
            said = "an input changed while the parts were executed"
        with pytest.raises(CheckpointError, match=said):
            adapterkit.execute(plan, out, part=1)
    with pytest.raises(AdapterkitError, match="not done" if when != "meanwhile" else said):
        adapterkit.execute(plan, out)
    assert not out.exists()
    for note in partial_folder(out).glob(".done.*"):  # as the error says
        note.unlink()
    for index in range(len(plan.files)):
        adapterkit.execute(plan, out, part=index)
    adapterkit.execute(plan, out)
    adapterkit.merge(base, [adapter], tmp_path / "whole")
    assert read_bytes(out) == read_bytes(tmp_path / "whole")


def test_workers_that_begin_at_one_moment_keep_the_first_note_of_their_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have one name for it, so one that took another's away would make a third fail. Here another wrote it in between."""
    from adapterkit.checkpoint import parts

    base, adapter, _ = _folder(tmp_path)
    plan, out = plan_merge(base, [adapter]).plan, tmp_path / "out"
    adapterkit.execute(plan, out, part=0)
    (note,) = partial_folder(out).glob(".inputs.*")
    note.write_bytes(b"of the other")
    read = parts.read_inside
    monkeypatch.setattr(parts, "read_inside", lambda at, name: None if name == note.name else read(at, name))
    adapterkit.execute(plan, out, part=1)
    assert note.read_bytes() == b"of the other"


def test_a_link_in_the_place_of_a_part_is_refused(tmp_path: Path) -> None:
    base, adapter, _ = _folder(tmp_path)
    plan = plan_merge(base, [adapter]).plan
    opened = OpenPlan(plan, tmp_path / "out", part_size=3000)
    opened.execute(0)
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    name = partial_folder(tmp_path / "out") / opened.parts[0].file.name
    name.unlink()
    os.symlink(victim, name)
    with pytest.raises(adapterkit.errors.UnsafeError, match="is a link"):
        opened.execute(1)
    assert victim.read_bytes() == b"mine"


# ------------------------------------------------------------------ the plan file


def test_a_plan_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    base, adapter, options = _kept(tmp_path)
    plan = plan_merge(base, [adapter], **options).plan
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()
    assert {step.source for step in again.steps} == {step.source for step in plan.steps}


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("kinds", [99]),
        ("kinds", [-1]),
        ("kinds", ["0"]),
        ("tensors", [1]),
        ("tensors", ["a", "b"]),
        ("offsets", [[0, 200]]),
        ("offsets", [["x"]]),
        ("copies", [[0, 500, 0, 0]]),
        ("copies", [[0, 1, 7, 0]]),
        ("copies", [[-1, 1, 0, 0]]),
    ],
)
def test_a_plan_file_whose_columns_do_not_fit_is_refused(column: str, value: Any, tmp_path: Path) -> None:
    adapter = plain_adapter(tmp_path / "adapter", plain_base(tmp_path / "base"))
    data = json.loads(plan_merge(tmp_path / "base", [adapter]).plan.to_json())
    data["files"][0][column] = value
    with pytest.raises(CheckpointError, match="not a plan file"):
        Plan.from_json(json.dumps(data))


def test_a_part_knows_its_bytes() -> None:
    plan = planned([5, 6, 7])
    part = PlanPart(0, plan.files[0], 15, 28)
    assert [step.tensor for step in part.steps] == ["t1", "t2"]
    assert (part.nbytes, part.reads, part.whole) == (13, 13, False)


def test_a_part_that_only_copies_opens_its_own_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter, _ = _folder(tmp_path)
    adapterkit.merge(base, [adapter], tmp_path / "whole")
    plan = plan_merge(base, [adapter]).plan
    opened = OpenPlan(plan, tmp_path / "out", part_size=1500)
    copied = [part for part in opened.parts if all(step.source for step in part.steps)]
    assert 0 < len(copied) < len(opened.parts)
    for part in copied:
        opened.execute(part.index)
    assert "job" not in vars(opened)
    for part in opened.left():
        opened.execute(part.index)
    assert "job" in vars(opened)
    opened.finish()
    assert read_bytes(tmp_path / "out") == read_bytes(tmp_path / "whole")


def test_a_part_that_only_copies_sees_that_its_file_is_another(tmp_path: Path) -> None:
    base, adapter, _ = _folder(tmp_path)
    plan = plan_merge(base, [adapter]).plan
    opened = OpenPlan(plan, tmp_path / "out", part_size=1500)
    part = next(part for part in opened.parts if all(step.source for step in part.steps))
    changed = base / part.file.name
    data = changed.read_bytes()
    changed.write_bytes(data[:8] + data[8:].replace(b"model.norm", b"model.Norm").replace(b"layers.0.", b"layers.9."))
    with pytest.raises(adapterkit.AdapterkitError):
        opened.execute(part.index)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("tensors", "workers"), [(2, 1), (300, 2), (300, 8), (4000, 2), (4000, 64)])
def test_every_worker_has_enough_parts_or_parts_are_small_enough(tensors: int, workers: int) -> None:
    plan = planned([10_000_000] * tensors)
    size = even_size(plan, workers)
    parts = cut(plan, size)
    assert LEAST <= size <= PART_SIZE
    assert size in (LEAST, PART_SIZE) or FOR_EACH * workers <= len(parts) <= (FOR_EACH + 1) * workers
    loads = [sum(part.cost for part in share) for share in shares(parts, min(workers, len(parts)))]
    if len(parts) >= FOR_EACH * workers:
        assert max(loads) <= 1.15 * sum(loads) / workers  # nobody waits long for the last one


def test_elements_are_those_of_the_tensors_however_a_file_is_cut(tmp_path: Path) -> None:
    """Copied or computed, on a disk or in the parts of an object: an output goes on by the elements of its tensors."""
    base = plain_base(tmp_path / "base", layers=2)
    plan = plan_merge(base, [plain_adapter(tmp_path / "adapter", base)], quant="nf4").plan
    (file,) = plan.files
    whole = sum(prod(step.shape) for step in file.steps)
    assert {step.source is None for step in file.steps} == {True, False}
    size = file.steps[-1].offset + file.steps[-1].nbytes
    for count in (1, 2, 7, 50):
        ends = [size * at // count for at in range(count + 1)]
        spans = list(pairwise(ends))
        assert sum(elements_between(file, *span) for span in spans) == pytest.approx(whole)
    assert elements_between(file, 0, file.steps[0].offset) == 0
    assert elements_between(replace(file, verbatim="x"), 3, 10) == 7
