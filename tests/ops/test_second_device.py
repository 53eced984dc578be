"""What runs on a device, run on a second device of torch, which refuses operators with tensors of both.

See `second_device`. Its arithmetic is the CPU's, so values are the CPU's bit for bit, and what differs is our way there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import second_device
import torch
from models import build_base, plain_adapter, plain_base, read_tensors, write_checkpoint

import adapterkit
from adapterkit.adapters.merged import Merged
from adapterkit.checkpoint.plan import Plan
from adapterkit.codecs.kinds import written
from adapterkit.errors import UsageError
from adapterkit.gguf.encode import encode
from adapterkit.gguf.types import TYPES
from adapterkit.ops import device as devices
from adapterkit.ops.lowrank import Factors, truncate, truncate_all
from adapterkit.ops.there import back, there
from adapterkit.registry.beside import read_beside
from adapterkit.verbs.execute import OpenPlan
from adapterkit.verbs.placed import said
from bench.speed.one_pass import tokenizer

# One of each way to encode; what they have in common with the others is code that these run too.
FORMATS = ("nf4", "int8", "fp8", "nvfp4", "mxfp4", "int4", "mlx-3bit", "mlx-mxfp8")
TYPES_OF_GGUF = ("Q4_0", "Q4_K", "Q6_K", "IQ4_XS", "TQ2_0")


@pytest.fixture(autouse=True)
def second(monkeypatch: pytest.MonkeyPatch) -> str:
    second_device.register()
    monkeypatch.setitem(devices.SORTS, second_device.NAME, second_device.sort())
    monkeypatch.setattr(devices, "_OPEN", {})
    # Several blocks of a tensor, and several pieces of a block, at the sizes of a test.
    monkeypatch.setattr(devices, "BATCH", 1 << 13)
    monkeypatch.setattr(devices, "PIECE", 1 << 12)
    second_device.COPIES.clear()
    second_device.OPERATORS.clear()
    return second_device.NAME


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain_base(tmp_path_factory.mktemp("second") / "base", layers=1, width=128)


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return plain_adapter(base.parent / "adapter", base)


def same(one: Path, other: Path) -> None:
    files = [one] if one.is_file() else sorted(one.glob("*.safetensors"))
    assert files
    for path in files:
        assert path.read_bytes() == (other if one.is_file() else other / path.name).read_bytes(), path.name


def evidence(out: Path) -> dict[str, Any]:
    record = read_beside(out if out.is_dir() else out.parent)
    assert record is not None
    return dict(record.evidence["computed_on"])


def test_the_second_device_refuses_what_a_gpu_refuses() -> None:
    here, moved = torch.ones(3), torch.ones(3).to("second:0")
    assert moved.device != here.device
    assert torch.equal((moved * 2 + 1).cpu(), here * 2 + 1)
    for wrong in (lambda: moved + here, lambda: here[moved.long()], lambda: torch.cat([moved, here])):
        with pytest.raises(second_device.Mixed):
            wrong()
    assert moved[torch.tensor([0])].device == moved.device  # indices may come from the CPU
    with pytest.raises(RuntimeError):
        moved.numpy()


def test_every_format_of_folders_is_encoded_there(base: Path, tmp_path: Path) -> None:
    for kind in FORMATS:
        assert kind in written()
        adapterkit.convert(base, tmp_path / kind / "cpu", to=kind)
        second_device.OPERATORS.clear()
        report = adapterkit.convert(base, tmp_path / kind / "there", to=kind, device="second")
        same(tmp_path / kind / "cpu", tmp_path / kind / "there")
        assert sum(second_device.OPERATORS.values()) > 10, kind
        found = evidence(tmp_path / kind / "there")
        assert (found["device"], found["name"]) == ("second", "a second CPU")
        assert "on_the_cpu" not in found, kind
        assert any(note.startswith("computed on second (a second CPU)") for note in report.notes)
    assert "computed_on" not in read_beside(tmp_path / "nf4" / "cpu").evidence  # type: ignore[union-attr]


def test_every_format_is_written_again_there(base: Path, adapter: Path, tmp_path: Path) -> None:
    for kind in ("nf4", "int8", "nvfp4", "int4", "mlx-4bit"):
        folder = tmp_path / kind
        adapterkit.convert(base, folder / "base", to=kind)
        how: dict[str, Any] = {"quant": "keep", "yes_lossy": True, "fidelity": True}
        one = adapterkit.merge(folder / "base", [adapter], folder / "cpu", **how)
        other = adapterkit.merge(folder / "base", [adapter], folder / "there", device="second", **how)
        same(folder / "cpu", folder / "there")
        assert one.fidelity == other.fidelity


def test_types_of_gguf_are_encoded_there() -> None:
    generator = torch.Generator().manual_seed(3)
    rows, weights = torch.randn(2, 256, generator=generator), torch.rand(256, generator=generator) + 0.1
    for kind in TYPES_OF_GGUF:
        assert TYPES[kind].encoder == "own"
        assert (encode(kind, rows, weights, "torch") == encode(kind, rows.to("second:0"), weights)).all(), kind


def test_a_merge_to_gguf(tmp_path: Path) -> None:
    base = build_base(tmp_path / "base", "llama", "bfloat16", vocab_size=512)
    tokenizer(base)
    adapter = plain_adapter(tmp_path / "adapter", base, modules=("q_proj", "up_proj"))
    for out, device in (("cpu.gguf", "cpu"), ("there.gguf", "second")):
        adapterkit.merge(base, [adapter], tmp_path / out, quant="Q8_0", device=device)
    assert second_device.OPERATORS["aten::addmm"]
    same(tmp_path / "cpu.gguf", tmp_path / "there.gguf")


def test_changes_of_every_kind_are_added_there(base: Path, tmp_path: Path) -> None:
    for name, more in {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}.items():
        tuned = plain_adapter(tmp_path / name / "adapter", base, **more)
        if name == "dora":
            tensors = read_tensors(tuned)
            tensors |= {
                key.replace("lora_B.weight", "lora_magnitude_vector"): torch.rand(value.shape[0]) + 0.5
                for key, value in tensors.items()
                if key.endswith("lora_B.weight")
            }
            from safetensors.torch import save_file

            save_file(tensors, tuned / "adapter_model.safetensors", metadata={"format": "pt"})
        for out, device in (("cpu", "cpu"), ("there", "second")):
            report = adapterkit.merge(base, [tuned], tmp_path / name / out, device=device, fidelity=True, jobs=3)
        same(tmp_path / name / "cpu", tmp_path / name / "there")
        assert any("computed on second" in note and "on the CPU:" not in note for note in report.notes), name


def test_what_stays_on_the_cpu_is_said(base: Path, adapter: Path, tmp_path: Path) -> None:
    """A rule over rows of two adapters is a kernel that takes rows of the CPU."""
    other = plain_adapter(tmp_path / "other", base, seed=9)
    for out, device in (("cpu", "cpu"), ("there", "second")):
        report = adapterkit.merge(
            base, [adapter, other], tmp_path / out, method="ties", parameters={"density": 0.5}, device=device
        )
    same(tmp_path / "cpu", tmp_path / "there")
    assert evidence(tmp_path / "there")["on_the_cpu"]
    assert any("; on the CPU: ties" in note for note in report.notes)


def test_views_stay_on_the_device(base: Path, adapter: Path, tmp_path: Path) -> None:
    """A merge that is quantized: W goes there once, and nothing but codes and scales comes back."""
    adapterkit.merge(base, [adapter], tmp_path / "out", quant="nf4", yes_lossy=True, device="second", jobs=1)
    folded = adapterkit.fold(adapterkit.open(base), [adapterkit.load_adapter(adapter)], device="second").checkpoint
    second_device.COPIES.clear()
    merged = folded["model.layers.0.mlp.up_proj.weight"]
    assert isinstance(merged, Merged)
    assert merged.block == 1 << 19  # a whole number of blocks of the CPU, and never fewer than one
    found = merged.read_on(devices.opened("second"), 0, merged.numel)
    assert isinstance(found, second_device.There)
    assert not second_device.COPIES["back"]
    assert torch.equal(merged.read_wide(0, merged.numel), found.cpu())


def test_a_block_is_computed_once_for_all_who_read_pieces_of_it(base: Path, adapter: Path) -> None:
    folded = adapterkit.fold(adapterkit.open(base), [adapterkit.load_adapter(adapter)], device="second").checkpoint
    merged = folded["model.layers.0.mlp.up_proj.weight"]
    assert isinstance(merged, Merged)
    seen: list[int] = []
    merged.watch = lambda start, old, new: seen.append(start)
    whole = merged.read(0, merged.numel)
    pieces = [merged.read(at, min(at + 1000, merged.numel)) for at in range(0, merged.numel, 1000)]
    assert torch.equal(torch.cat(pieces), whole)
    assert seen == [0]


def test_pieces_pass_through_two_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """With memory that is pinned, as on CUDA: a buffer is filled again when its copy is done, and not before."""
    log: list[str] = []

    class Event:
        def __init__(self, **_: Any) -> None:
            self.name = ""

        def record(self, stream: Any) -> None:
            self.name = f"copy {sum(one.startswith('copy') for one in log)}"
            log.append(self.name)

        def synchronize(self) -> None:
            log.append(f"waited for {self.name}")

    def empty(*shape: Any, pin_memory: bool = False, **more: Any) -> torch.Tensor:
        if pin_memory:
            log.append("pinned")
        return real(*shape, **more)

    real = torch.empty
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setitem(devices.SORTS, "second", devices.Sort(lambda: "", lambda: 1, lambda at: {}, pinned=True))
    device = devices.Device("second")
    values = torch.arange(5 * 4096, dtype=torch.float32)
    found = device.gather(lambda start, stop: values[start:stop], 0, values.numel(), 1024)
    assert log[:4] == ["pinned", "copy 0", "pinned", "copy 1"]
    assert log[4:6] == ["waited for copy 0", "copy 2"]
    assert log[6:8] == ["waited for copy 1", "copy 3"]
    assert {"waited for copy 3", "waited for copy 4"} <= set(log[8:])
    assert torch.equal(device.down(found), values)
    assert log[-3:] == ["pinned", "copy 5", "waited for copy 5"]


def test_few_blocks_are_computed_at_a_time() -> None:
    device = devices.opened("second")
    with device.at_work(), device.at_work():  # a thread may enter again
        assert device._slots._value == devices.AT_WORK - 1  # type: ignore[attr-defined]
    assert device._slots._value == devices.AT_WORK  # type: ignore[attr-defined]


def test_memory_of_the_device_that_runs_out_is_one_sentence() -> None:
    from adapterkit.errors import OutOfMemory

    with pytest.raises(OutOfMemory, match="the memory of second ran out"), devices.opened("second").at_work():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def test_a_device_without_float64(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(devices.SORTS, "second", devices.Sort(lambda: "", lambda: 1, lambda at: {}, wide=False))
    with pytest.raises(UsageError, match="factors are computed in float64, which second has not"):
        adapterkit.resize("adapter", tmp_path / "out", rank=2, device="second")
    wide = write_checkpoint(tmp_path / "wide", {"model.layers.0.self_attn.q_proj.weight": torch.ones(8, 8).double()})
    tuned = plain_adapter(tmp_path / "tuned", wide, modules=("q_proj",))
    with pytest.raises(UsageError, match="second has no float64, and these values are"):
        adapterkit.merge(wide, [tuned], tmp_path / "out", device="second")


# ------------------------------------------------------------------ factors


def test_decompositions_of_equal_shapes_are_computed_together() -> None:
    generator = torch.Generator().manual_seed(0)

    def some(rows: int, rank: int) -> Factors:
        return Factors(torch.randn(rows, rank, generator=generator), torch.randn(rank, 24, generator=generator))

    parts = [some(32, 4), some(48, 4), some(32, 4), some(32, 6), some(48, 4)]
    device = devices.opened("second")
    moved = [there(device, part) for part in parts]
    second_device.OPERATORS.clear()
    found = [back(device, one) for one in truncate_all(moved, rank=3)]  # type: ignore[arg-type]
    assert second_device.OPERATORS["aten::_linalg_svd"] == 3
    assert second_device.OPERATORS["aten::linalg_qr"] == 6
    for part, one in zip(parts, found, strict=True):
        alone = truncate(part, rank=3)
        assert one.rank == 3
        assert abs(one.error - alone.error) <= 1e-12 * alone.norm
        wanted, there_now = (each.b.double() @ each.a.double() for each in (alone.factors, one.factors))
        assert float((wanted - there_now).abs().max()) <= 1e-6 * float(wanted.abs().max())


def test_extract_resize_and_combine_compute_there(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = plain_adapter(tmp_path / "other", base, seed=9)
    adapterkit.merge(base, [adapter], tmp_path / "tuned", dtype="f32")
    runs: dict[str, Any] = {
        "extract": lambda out, **how: adapterkit.extract(base, tmp_path / "tuned", out, rank=4, **how),
        "exact": lambda out, **how: adapterkit.extract(base, tmp_path / "tuned", out, energy=0.9, exact=True, **how),
        "resize": lambda out, **how: adapterkit.resize(adapter, out, rank=2, **how),
        "combine": lambda out, **how: adapterkit.combine([adapter, other], out, rank=4, **how),
        "svd": lambda out, **how: adapterkit.combine([adapter, other], out, method="svd", rank=4, **how),
        "dare": lambda out, **how: adapterkit.combine(
            [adapter, other], out, method="dare_ties", parameters={"density": 0.5}, rank=4, **how
        ),
    }
    for name, run in runs.items():
        run(tmp_path / name / "cpu")
        second_device.OPERATORS.clear()
        report = run(tmp_path / name / "there", device="second")
        assert second_device.OPERATORS["aten::_linalg_svd"], name
        assert any(note.startswith("computed on second") for note in report.notes), name
        found = evidence(tmp_path / name / "there")
        assert (found["device"], found["name"]) == ("second", "a second CPU")
        assert found["agreement"].startswith("signs and bases may be others")
        one, two = read_tensors(tmp_path / name / "cpu"), read_tensors(tmp_path / name / "there")
        assert one.keys() == two.keys()
        for key in (key for key in one if key.endswith("lora_A.weight")):
            pair = key.replace("lora_A", "lora_B")
            wanted, other_one = (each[pair].double() @ each[key].double() for each in (one, two))
            assert float((wanted - other_one).abs().max()) <= 1e-5 * float(wanted.abs().max()), (name, key)


# ------------------------------------------------------------------ verify, plans


def test_verify_compares_there(base: Path, adapter: Path, tmp_path: Path) -> None:
    adapterkit.merge(base, [adapter], tmp_path / "out")
    second_device.OPERATORS.clear()
    report = adapterkit.verify(tmp_path / "out", base=base, adapters=[adapter], device="second")
    assert report.ok
    assert second_device.OPERATORS["aten::addmm"] or second_device.OPERATORS["aten::addmm_"]
    assert "computed on second (a second CPU): figures are the CPU's but for rounding" in report.notes
    adapterkit.merge(base, [adapter], tmp_path / "half", weights=[0.5])
    (tmp_path / "half/adapterkit.json").unlink()
    wrong = adapterkit.verify(tmp_path / "half", base=base, adapters=[adapter], device="second")
    assert not wrong.ok
    on_cpu = adapterkit.verify(tmp_path / "half", base=base, adapters=[adapter])
    assert wrong.tensors is not None
    assert on_cpu.tensors is not None
    assert wrong.tensors.retention == pytest.approx(on_cpu.tensors.retention, rel=1e-9)


def test_a_plan_is_executed_on_another_device(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Where the plan's device is not, it is refused by name, or computed on the one that is named."""
    plan = tmp_path / "plan.json"
    adapterkit.merge(base, [adapter], save_plan=plan, device="cuda")
    with pytest.raises(UsageError, match="cuda cannot be used"):
        adapterkit.run(plan, tmp_path / "out", task=0, tasks=1)
    assert not (tmp_path / "out").exists()
    adapterkit.run(plan, tmp_path / "out", task=0, tasks=1, device="second")
    adapterkit.merge(base, [adapter], tmp_path / "cpu")
    same(tmp_path / "cpu", tmp_path / "out")
    record = read_beside(tmp_path / "out")
    assert record is not None
    assert record.operation is not None
    assert record.operation.parameters["device"] == "second"
    assert evidence(tmp_path / "out")["device"] == "second"
    loaded = Plan.from_json(plan.read_bytes())
    for part in (0, None):
        adapterkit.execute(loaded, tmp_path / "executed", part=part, device="second")
    assert evidence(tmp_path / "executed")["name"] == "a second CPU"
    same(tmp_path / "cpu", tmp_path / "executed")


def test_facts_of_a_device_are_of_the_one_that_was_computed_on(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers may have another device of that name than the process that makes the output of their parts."""
    plan = tmp_path / "plan.json"
    adapterkit.merge(base, [adapter], save_plan=plan, device="second")
    loaded = Plan.from_json(plan.read_bytes())
    worker = OpenPlan(loaded, tmp_path / "out")
    for part in worker.parts:
        worker.execute(part.index)
    monkeypatch.setattr(devices, "_OPEN", {})  # as in another process
    OpenPlan(loaded, tmp_path / "out").finish()
    found = evidence(tmp_path / "out")
    assert (found["device"], found["by_this_process"]) == ("second", False)
    assert "name" not in found
    monkeypatch.setattr(devices, "_OPEN", {})
    assert said("second") == ("this process computed nothing on second",)
