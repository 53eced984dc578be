"""Adapters out of checkpoints of sharded training: FSDP's by two real processes, DeepSpeed's by its published layout."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from enum import IntEnum
from math import ceil
from typing import TYPE_CHECKING

import pytest
import torch
from models import plain_adapter, plain_base, read_tensors

import adapterkit
from adapterkit.errors import CheckpointError, NotFound, UnsafeError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("warm_processes")

TRAINING = """
import sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
rank, adapter, out, rendezvous = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
state = {}
for name, tensor in load_file(adapter).items():
    name = name.replace("lora_A.weight", "lora_A.default.weight").replace("lora_B.weight", "lora_B.default.weight")
    state[name] = distribute_tensor(tensor, mesh, [Shard(0)])
layer = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
state[layer] = distribute_tensor(torch.ones(16, 16), mesh, [Shard(0)])
dcp.save({"model": state, "step": 7}, checkpoint_id=out)
moments = {f"optimizer.state.{name}.exp_avg": torch.ones(2) for name in state}
dcp.save(moments, checkpoint_id=out.replace("pytorch_model_fsdp_0", "optimizer_0"))
dcp.save({"model": state, "optim": {f"state.{name}.exp_avg": torch.ones(2) for name in state}}, checkpoint_id=out + "_both")
dist.destroy_process_group()
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return plain_base(tmp_path / "base", layers=2, dtype="float32")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return plain_adapter(tmp_path / "adapter", base, rank=3)  # of two processes one has two rows of A, the other one


@pytest.fixture
def distributed(adapter: Path, tmp_path: Path) -> Path:
    """What FSDP training leaves: a checkpoint with the adapter's config, its weights in a folder below."""
    out = tmp_path / "checkpoint-7"
    out.mkdir()
    given = [str(adapter / "adapter_model.safetensors"), str(out / "pytorch_model_fsdp_0"), str(tmp_path / "meet")]
    ranks = [subprocess.Popen([sys.executable, "-c", TRAINING, str(rank), *given]) for rank in (0, 1)]
    assert [rank.wait(timeout=900) for rank in ranks] == [0, 0]
    shutil.copy(adapter / "adapter_config.json", out)
    return out


def same(one: Path, other: Path) -> bool:
    found, want = read_tensors(one), read_tensors(other)
    return set(found) == set(want) and all(found[name].equal(want[name]) for name in want)


@pytest.mark.slow  # two processes with torch, twice
def test_two_processes_of_fsdp(distributed: Path, adapter: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsafeError, match=r"distributed\.checkpoint") as raised:
        adapterkit.merge(base, [distributed], tmp_path / "no")
    assert "--allow-pickle" in raised.value.hint
    adapterkit.convert(distributed, tmp_path / "peft", to="peft", allow_pickle=True)
    assert same(tmp_path / "peft", adapter)
    both = distributed / "pytorch_model_fsdp_0_both"
    shutil.move(both, tmp_path / "both")  # model and optimizer in one
    shutil.copy(adapter / "adapter_config.json", tmp_path / "both")
    adapterkit.convert(tmp_path / "both", tmp_path / "peft-of-both", to="peft", allow_pickle=True)
    assert same(tmp_path / "peft-of-both", adapter)
    shards = distributed / "pytorch_model_fsdp_0"
    lost = next(shards.glob("__1_*.distcp"))
    lost.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=rf"{lost.name} is missing"):
        adapterkit.convert(distributed, tmp_path / "again", to="peft", allow_pickle=True)
    (tmp_path / "elsewhere").rename(lost)
    (shards / ".metadata").rename(tmp_path / "metadata")
    with pytest.raises(CheckpointError, match=r"no \.metadata"):
        adapterkit.convert(distributed, tmp_path / "again", to="peft", allow_pickle=True)
    (shards / ".metadata").write_bytes(b"not a pickle")
    with pytest.raises(CheckpointError, match=r"\.metadata is damaged"):
        adapterkit.convert(distributed, tmp_path / "again", to="peft", allow_pickle=True)


class LossScaler:
    """Stands for DeepSpeed's own classes, which a reader without DeepSpeed does not have."""


class ZeroStageEnum(IntEnum):
    """Named as DeepSpeed's, which writes it and not a number."""

    optimizer_states = 1
    gradients = 2
    weights = 3


def cut(value: torch.Tensor, processes: int) -> list[torch.Tensor]:
    """Each process's part of a parameter at stage 3."""
    size = ceil(value.numel() / processes)
    flat = torch.nn.functional.pad(value.flatten(), (0, size * processes - value.numel()))
    return [flat[rank * size : (rank + 1) * size].clone() for rank in range(processes)]


def with_attribute(tensor: torch.Tensor) -> torch.Tensor:
    tensor.ds_id = LossScaler()  # type: ignore[attr-defined]
    return tensor


def saved_by_zero(adapter: Path, folder: Path, stage: int, processes: int, frozen: str = "") -> Path:
    """A ZeRO checkpoint of these values as DeepSpeed 0.19 lays it out (held against runs of it with two processes).

    Args:
        frozen: part of the names that were not trained.
    """
    place = folder / "global_step10"
    place.mkdir(parents=True)
    (folder / "latest").write_text("global_step10")
    shutil.copy(adapter / "adapter_config.json", folder)
    values = {
        name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."): tensor
        for name, tensor in read_tensors(adapter).items()
    }
    apart = {name: values.pop(name) for name in list(values) if frozen and frozen in name}
    names = list(values)
    groups = [names[: len(names) // 2], names[len(names) // 2 :]]
    shapes = [{name: values[name].shape for name in group} for group in groups]
    parts: list[list[torch.Tensor]] = [[] for _ in range(processes)]
    for group in groups:
        if stage == 3:
            for name in group:
                for rank, part in enumerate(cut(values[name], processes)):
                    parts[rank].append(part)
        else:
            flat = torch.cat([values[name].flatten() for name in group])
            flat = torch.nn.functional.pad(flat, (0, -len(flat) % (2 * processes)))
            for rank, part in enumerate(flat.chunk(processes)):
                parts[rank].append(part)
    attributed = [[with_attribute(part) for part in some] for some in parts]  # as stage 3 hangs its own on tensors
    for rank in range(processes):
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        state = {"zero_stage": ZeroStageEnum(stage), "loss_scaler": LossScaler()}
        state |= {"partition_count": processes if stage == 3 else [processes] * 2, key: attributed[rank]}
        if stage != 3:
            state["param_alignment_paddings"] = [[0] * len(group) for group in groups]
        torch.save(
            {"optimizer_state_dict": state, "ds_version": "0.17.0"},
            place / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
        )
        model = {
            "module": {"w": torch.ones(2).bfloat16()},
            "param_shapes": shapes,
            "buffer_names": [],
            "shared_params": {},
            "frozen_param_shapes": {name: value.shape for name, value in apart.items()},
            "frozen_param_fragments": {
                name: value if stage != 3 else cut(value, processes)[rank] for name, value in apart.items()
            },
        }
        if stage == 3:
            torch.save(model, place / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    if stage != 3:
        torch.save(model, place / "mp_rank_00_model_states.pt")
    return folder


@pytest.mark.parametrize(("stage", "processes"), [(1, 3), (2, 1), (3, 3)])
def test_zero_of_every_stage(adapter: Path, base: Path, tmp_path: Path, stage: int, processes: int) -> None:
    folder = saved_by_zero(adapter, tmp_path / "checkpoint", stage, processes)
    adapterkit.convert(folder, tmp_path / "peft", to="peft", allow_pickle=True)
    assert same(tmp_path / "peft", adapter)


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_of_factors_that_were_not_trained(adapter: Path, tmp_path: Path, stage: int) -> None:
    """As LoRA-FA leaves A: it stands among the frozen parameters."""
    folder = saved_by_zero(adapter, tmp_path / "checkpoint", stage, 2, frozen="lora_A")
    adapterkit.convert(folder, tmp_path / "peft", to="peft", allow_pickle=True)
    assert same(tmp_path / "peft", adapter)
    if stage == 3:
        next(folder.rglob("zero_pp_rank_1_mp_rank_00_model_states.pt")).unlink()
        with pytest.raises(CheckpointError, match="the model states of rank 1 are missing"):
            adapterkit.convert(folder, tmp_path / "again", to="peft", allow_pickle=True)


def test_zero_with_model_parallelism_is_refused(adapter: Path, tmp_path: Path) -> None:
    folder = saved_by_zero(adapter, tmp_path / "checkpoint", 2, 2)
    path = next(folder.rglob("*_rank_1_*optim_states.pt"))
    path.rename(path.with_name("bf16_zero_pp_rank_0_mp_rank_01_optim_states.pt"))
    with pytest.raises(CheckpointError, match="model or expert parallelism"):
        adapterkit.convert(folder, tmp_path / "peft", to="peft", allow_pickle=True)


def test_zero_with_a_missing_rank_is_said(adapter: Path, tmp_path: Path) -> None:
    folder = saved_by_zero(adapter, tmp_path / "checkpoint", 2, 3)
    next(folder.rglob("*_rank_1_*optim_states.pt")).unlink()
    with pytest.raises(CheckpointError, match="saved by 3 processes, and the optimizer states of rank 1 are missing"):
        adapterkit.convert(folder, tmp_path / "peft", to="peft", allow_pickle=True)


def test_zero_without_the_adapters_config_is_said(adapter: Path, tmp_path: Path) -> None:
    folder = saved_by_zero(adapter, tmp_path / "checkpoint", 3, 2)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(NotFound, match=r"without an adapter_config.json"):
        adapterkit.convert(folder, tmp_path / "peft", to="peft", allow_pickle=True)


def test_a_cut_state_is_said(adapter: Path, tmp_path: Path) -> None:
    folder = saved_by_zero(adapter, tmp_path / "checkpoint", 2, 1)
    path = next(folder.rglob("*optim_states.pt"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        adapterkit.convert(folder, tmp_path / "peft", to="peft", allow_pickle=True)


class Runs:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


def test_code_in_a_pickle_does_not_run(adapter: Path, tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    folder = saved_by_zero(adapter, tmp_path / "checkpoint", 2, 1)
    path = next(folder.rglob("*optim_states.pt"))
    state = torch.load(path, weights_only=False)
    torch.save({**state, "client": Runs(str(trace))}, path)
    adapterkit.convert(folder, tmp_path / "peft", to="peft", allow_pickle=True)
    assert not trace.exists()
    other = tmp_path / "dcp"
    other.mkdir()
    shutil.copy(adapter / "adapter_config.json", other)
    (other / ".metadata").write_bytes(pickle.dumps(Runs(str(trace))))
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        adapterkit.convert(other, tmp_path / "again", to="peft", allow_pickle=True)
    assert not trace.exists()
    assert json.loads((other / "adapter_config.json").read_text())
