"""Plans: what is written where, by huggingface_hub's own reckoning; as a value; and part by part."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import INDEX, plain_adapter, plain_base, random_tensors, read_bytes, read_tensors, write_checkpoint

import adapterkit
from adapterkit.checkpoint.checkpoint import Checkpoint
from adapterkit.checkpoint.files import BytesFile
from adapterkit.checkpoint.open import open_checkpoint
from adapterkit.checkpoint.plan import Plan, parse_size, plan_safetensors
from adapterkit.checkpoint.tensor import Stored
from adapterkit.dtypes import DTYPES
from adapterkit.errors import AdapterkitError, CheckpointError, OutputError, UnsafeError, UsageError
from adapterkit.verbs.plan_merge import plan_merge

if TYPE_CHECKING:
    from pathlib import Path


def library_shards(sizes: dict[str, int], limit: int) -> dict[str, str]:
    """File of each tensor, by huggingface_hub."""
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards

    tensors = {name: torch.empty(size, dtype=torch.int8) for name, size in sizes.items()}
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=limit
    )
    return dict(split.tensor_to_filename) if split.is_sharded else dict.fromkeys(sizes, "model.safetensors")


@settings(max_examples=80)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=14), st.integers(1, 150))
def test_shards_as_the_library_makes_them(sizes: list[int], limit: int) -> None:
    named = {f"layer.{index}.weight": size for index, size in enumerate(sizes)}
    source = BytesFile("x", bytes(sum(sizes)))
    view = Checkpoint(
        "x", {name: Stored(name, DTYPES["U8"], (size,), source, 0) for name, size in named.items()}, metadata={}
    )
    plan = plan_safetensors(view, max_shard_size=limit)
    assert plan.weight_map == library_shards(named, limit)
    assert plan.total_size == sum(sizes)


def test_index_as_transformers_writes_it(tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base")
    adapter = plain_adapter(tmp_path / "adapter", base)
    adapterkit.merge(base, [adapter], tmp_path / "out", max_shard_size="2KB")
    tensors = read_tensors(tmp_path / "out")
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    # The order is the base's file order, which safetensors sorts by name.
    ordered = dict.fromkeys(open_checkpoint(base))
    assert index["weight_map"] == library_shards({name: tensors[name].nbytes for name in ordered}, 2000)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for file in set(index["weight_map"].values()):
        assert set(open_checkpoint(tmp_path / "out" / file)) == {n for n, f in index["weight_map"].items() if f == file}


def test_own_shards_are_kept(tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base", shards=3)
    adapter = plain_adapter(tmp_path / "adapter", base, modules=["q_proj"])
    adapterkit.merge(base, [adapter], tmp_path / "out")
    before, after = (json.loads((folder / INDEX).read_text()) for folder in (base, tmp_path / "out"))
    assert after == before


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500 MB", 5 * 10**8), ("2GiB", 2**31), ("1.5KB", 1500), ("17", 17), ("3kib", 3072)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5XB", "1e9", "0", "0.0001", "5GB5"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError):
        parse_size(text)


# ------------------------------------------------------------------ a plan as a value


@pytest.fixture
def merge_of(tmp_path: Path) -> tuple[Path, Path]:
    base = plain_base(tmp_path / "base", layers=4, shards=3)
    return base, plain_adapter(tmp_path / "adapter", base)


def test_round_trip(merge_of: tuple[Path, Path]) -> None:
    base, adapter = merge_of
    plan = plan_merge(base, [adapter], weights=[0.5]).plan
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.digest == plan.digest


def test_digest_does_not_depend_on_the_number_of_workers(merge_of: tuple[Path, Path]) -> None:
    base, adapter = merge_of
    one, many = (plan_merge(base, [adapter], jobs=jobs).plan for jobs in (1, 16))
    assert one.digest == many.digest
    assert plan_merge(base, [adapter], weights=[2]).plan.digest != one.digest


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": 99}', '{"format": 1, "files": [], "metadata": 3, "peak_memory": 0}', "[" * 9999],
)
def test_what_is_no_plan(text: str) -> None:
    with pytest.raises(CheckpointError):
        Plan.from_json(text)


def test_a_plan_that_knows_less_of_its_inputs_is_refused_by_its_format(merge_of: tuple[Path, Path]) -> None:
    """Formats before 4 say nothing of values. Nothing changed, so the error must not say that an input did."""
    data = json.loads(plan_merge(merge_of[0], [merge_of[1]]).plan.to_json())
    with pytest.raises(CheckpointError, match="the plan has format 3, not 4; make it again"):
        Plan.from_json(json.dumps({**data, "format": 3}))


def test_plan_that_writes_elsewhere(merge_of: tuple[Path, Path]) -> None:
    data = json.loads(plan_merge(merge_of[0], [merge_of[1]]).plan.to_json())
    data["files"][0]["name"] = "../../escaped.safetensors"
    with pytest.raises(UnsafeError):
        Plan.from_json(json.dumps(data))


def test_plan_without_a_request(merge_of: tuple[Path, Path], tmp_path: Path) -> None:
    data = json.loads(plan_merge(merge_of[0], [merge_of[1]]).plan.to_json())
    data["request"] = {"verb": "merge"}
    with pytest.raises(CheckpointError, match="does not say which merge"):
        adapterkit.execute(Plan.from_json(json.dumps(data)), tmp_path / "out")


def test_plan_of_another_base(merge_of: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = merge_of
    plan = plan_merge(base, [adapter]).plan
    write_checkpoint(base, random_tensors({"model.embed_tokens.weight": (2, 2)}))
    with pytest.raises(AdapterkitError):
        adapterkit.execute(plan, tmp_path / "out", part=0)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------ parts

CHILD = """
import sys
import torch
import adapterkit
torch.set_num_threads(1)
plan = adapterkit.Plan.from_json(open(sys.argv[1]).read())
for part in sys.argv[3:]:
    adapterkit.execute(plan, sys.argv[2], part=int(part), jobs=2)
"""


def test_parts_by_separate_processes_in_any_order(merge_of: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = merge_of
    adapterkit.merge(base, [adapter], tmp_path / "whole", max_shard_size="3KB")
    plan = plan_merge(base, [adapter], max_shard_size="3KB").plan
    (tmp_path / "plan.json").write_text(plan.to_json())
    parts = list(range(len(plan.files)))
    assert len(parts) >= 4
    random.Random(1).shuffle(parts)
    halves = parts[: len(parts) // 2], parts[len(parts) // 2 :]
    command = [sys.executable, "-c", CHILD, str(tmp_path / "plan.json"), str(tmp_path / "out")]
    running = [subprocess.Popen([*command, *map(str, half)]) for half in halves]
    assert [process.wait(120) for process in running] == [0, 0]
    assert not (tmp_path / "out").exists()
    adapterkit.execute(plan, tmp_path / "out")
    assert read_bytes(tmp_path / "out") == read_bytes(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out", "plan.json", "whole"]


def test_missing_parts_are_named(merge_of: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = merge_of
    plan = plan_merge(base, [adapter], max_shard_size="3KB").plan
    with pytest.raises(OutputError, match="no part is done"):
        adapterkit.execute(plan, tmp_path / "out")
    assert not (tmp_path / ".out.partial").exists()
    adapterkit.execute(plan, tmp_path / "out", part=1)
    with pytest.raises(OutputError, match="parts 0, 2"):
        adapterkit.execute(plan, tmp_path / "out")
    with pytest.raises(UsageError, match="there is no part 99"):
        adapterkit.execute(plan, tmp_path / "out", part=99)
    for part in range(len(plan.files)):
        adapterkit.execute(plan, tmp_path / "out", part=part)
    adapterkit.execute(plan, tmp_path / "out")
    adapterkit.merge(base, [adapter], tmp_path / "whole", max_shard_size="3KB")
    assert read_bytes(tmp_path / "out") == read_bytes(tmp_path / "whole")


def test_parts_of_another_plan_do_not_count(merge_of: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = merge_of
    one, other = (plan_merge(base, [adapter], weights=[w], max_shard_size="3KB").plan for w in (1, 2))
    for part in range(len(one.files)):
        adapterkit.execute(one, tmp_path / "out", part=part)
    with pytest.raises(OutputError, match="are not done"):
        adapterkit.execute(other, tmp_path / "out")
