"""The sink: same bytes with any number of workers, untouched bytes untouched, and failures that leave nothing."""

from __future__ import annotations

import errno
import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import INDEX, plain_adapter, plain_base, random_tensors, read_bytes, read_tensors, write_checkpoint

import adapterkit
from adapterkit.checkpoint import sink
from adapterkit.checkpoint.open import open_checkpoint
from adapterkit.checkpoint.plan import plan_safetensors
from adapterkit.checkpoint.tensor import Tensor
from adapterkit.checkpoint.write import Writing, write_together
from adapterkit.disk import calls
from adapterkit.errors import CheckpointError, OutputError


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Tensors of several blocks, so that workers share them."""
    folder = tmp_path_factory.mktemp("large")
    base = plain_base(folder / "base", layers=2, width=768, shards=2)
    return base, plain_adapter(folder / "adapter", base)


def test_same_bytes_with_any_number_of_workers(large: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = large
    for jobs in (1, 2, 8):
        adapterkit.merge(base, [adapter], tmp_path / str(jobs), jobs=jobs)
    first = read_bytes(tmp_path / "1")
    assert read_bytes(tmp_path / "2") == first
    assert read_bytes(tmp_path / "8") == first


def hold_torch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Workers do all that they can before torch is there; the bytes that files were given room for."""
    room: list[int] = []
    allocate = calls.allocate

    def counted(fd: int, start: int, nbytes: int) -> int:
        room.append(nbytes)
        return allocate(fd, start, nbytes)

    monkeypatch.setattr(calls, "allocate", counted)
    monkeypatch.setattr(sink._Pool, "_passed", lambda self: self._stop.is_set())
    return room


def test_what_is_done_before_torch_is_there(
    large: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = large
    plan = adapterkit.plan_merge(base, [adapter]).plan
    adapterkit.merge(base, [adapter], tmp_path / "right", jobs=1)
    room = hold_torch(monkeypatch)
    monkeypatch.setattr(sink, "ALLOCATE", 1 << 20)
    monkeypatch.setattr(sink, "ASIDE", 3)  # what is behind them waits for its turn
    adapterkit.merge(base, [adapter], tmp_path / "few", jobs=3)
    monkeypatch.setattr(sink, "ASIDE", 4096)
    adapterkit.merge(base, [adapter], tmp_path / "all", jobs=3)
    assert read_bytes(tmp_path / "few") == read_bytes(tmp_path / "all") == read_bytes(tmp_path / "right")
    touched = [step for file in plan.files for step in file.steps if step.source is None]
    assert sum(room) == 2 * sum(step.nbytes for step in touched)
    assert len(room) > 4


@pytest.mark.parametrize("what", ["room", "copy"])
def test_a_disk_that_is_full_before_torch_is_there(
    what: str, large: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = large
    hold_torch(monkeypatch)

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(calls, "allocate", full) if what == "room" else monkeypatch.setattr(sink, "_copy", full)
    with pytest.raises(OutputError, match="disk is full"):
        adapterkit.merge(base, [adapter], tmp_path / "out", jobs=2)
    assert list(tmp_path.iterdir()) == []


def test_same_bytes_when_one_file_becomes_many(large: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = large
    adapterkit.merge(base, [adapter], tmp_path / "few")
    adapterkit.merge(base, [adapter], tmp_path / "many", max_shard_size="1MB")
    few, many = read_tensors(tmp_path / "few"), read_tensors(tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 4
    assert all(torch.equal(few[name].view(torch.uint8), many[name].view(torch.uint8)) for name in few)


def test_untouched_file_is_kept_byte_for_byte(tmp_path: Path) -> None:
    """Header, padding and metadata too: a shard no adapter touches is the base's own."""
    base = plain_base(tmp_path / "base", shards=3)
    file = base / "model-00001-of-00003.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    padded = data[8 : 8 + length].rstrip() + b" " * 37  # as another writer would pad it
    file.write_bytes(len(padded).to_bytes(8, "little") + padded + data[8 + length :])
    adapter = plain_adapter(tmp_path / "adapter", base, modules=["lm_head"])
    adapterkit.merge(base, [adapter], tmp_path / "out")
    before, after = read_bytes(base), read_bytes(tmp_path / "out")
    assert {name for name in before if after[name] != before[name]} == {"model-00003-of-00003.safetensors", INDEX}
    assert json.loads(after[INDEX]) == json.loads(before[INDEX])  # written anew, saying the same
    assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(("dtype", "kind"), [("bf16", torch.bfloat16), ("f16", torch.float16), ("f32", torch.float32)])
def test_conversion_is_one_rounding_to_nearest_even(dtype: str, kind: torch.dtype, tmp_path: Path) -> None:
    import numpy as np

    tensors = random_tensors({"model.embed_tokens.weight": (64, 33), "lm_head.weight": (8, 16)}, "float32", 3)
    # Values half way between two bf16 numbers, on both sides of an even one.
    tensors["model.embed_tokens.weight"].view(-1)[:4] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 2**-140])
    base = write_checkpoint(tmp_path / "base", {**tensors, "step": torch.arange(5)}, {"torch_dtype": "float32"})
    adapter = plain_adapter(tmp_path / "adapter", base, modules=["lm_head"])
    adapterkit.merge(base, [adapter], tmp_path / "out", dtype=dtype)
    out = read_tensors(tmp_path / "out")
    assert torch.equal(out["step"], torch.arange(5))
    value = tensors["model.embed_tokens.weight"].numpy()
    if kind is torch.bfloat16:
        bits = value.view(np.uint32).astype(np.uint64)
        expected = (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16).astype(np.uint32).view(np.float32)
    else:
        expected = value.astype(np.float16 if kind is torch.float16 else np.float32).astype(np.float32)
    assert np.array_equal(out["model.embed_tokens.weight"].float().numpy(), expected)
    assert {t.dtype for name, t in out.items() if name != "step"} == {kind}


def broken_copy(error: int) -> Any:
    def copy(*_: Any) -> int:
        if error == 0:
            return 0  # what some file systems answer instead of an error
        raise OSError(error, os.strerror(error))

    return copy


@pytest.mark.parametrize("error", [errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, 0])
def test_copies_where_the_kernel_cannot(
    error: int, large: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = large
    adapterkit.merge(base, [adapter], tmp_path / "one")
    monkeypatch.setattr(os, "copy_file_range", broken_copy(error))
    adapterkit.merge(base, [adapter], tmp_path / "other")
    assert read_bytes(tmp_path / "one") == read_bytes(tmp_path / "other")


def test_copies_across_file_systems(large: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = large
    adapterkit.merge(base, [adapter], tmp_path / "here")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        adapterkit.merge(base, [adapter], Path(other) / "there")
        assert read_bytes(Path(other) / "there") == read_bytes(tmp_path / "here")


# ------------------------------------------------------------------ failures


@pytest.mark.parametrize("nth", [1, 2, 5, 9])
@pytest.mark.parametrize(
    ("error", "words"),
    [(errno.ENOSPC, "disk is full"), (errno.EDQUOT, "disk is full"), (errno.EIO, "writing .* failed")],
)
def test_nth_write_fails(
    nth: int, error: int, words: str, large: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = large
    write, count = os.pwrite, iter(range(10**6))

    def failing(*arguments: Any) -> int:
        if next(count) + 1 >= nth:
            raise OSError(error, os.strerror(error))
        return write(*arguments)

    monkeypatch.setattr(sink.os, "pwrite", failing)
    with pytest.raises(OutputError, match=words):
        adapterkit.merge(base, [adapter], tmp_path / "deep" / "out")
    assert list(tmp_path.iterdir()) == []


def test_unforeseen_failure_of_a_worker(
    large: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(sink, "_bytes", out_of_memory)
    with pytest.raises(MemoryError):
        adapterkit.merge(large[0], [large[1]], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("which", ["base", "adapter"])
def test_input_that_shrinks_while_it_is_read(which: str, tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base", shards=2)
    adapter = plain_adapter(tmp_path / "adapter", base)
    planned = adapterkit.plan_merge(base, [adapter], headers_only=False)
    file = base / "model-00002-of-00002.safetensors" if which == "base" else adapter / "adapter_model.safetensors"
    os.truncate(file, file.stat().st_size - 200)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="ended"):
        write_together(
            [Writing(planned.plan, planned.folded.checkpoint, planned.sources, tmp_path / "out")], force=[False]
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_progress_is_whole_and_never_backwards(large: tuple[Path, Path], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = adapterkit.merge(
        large[0], [large[1]], tmp_path / "out", progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1] == (report.nbytes, report.nbytes)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_progress_callback_that_raises_stops_the_run(large: tuple[Path, Path], tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        adapterkit.merge(large[0], [large[1]], tmp_path / "out", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_empty_and_scalar_tensors(tmp_path: Path) -> None:
    tensors = {"lm_head.weight": torch.randn(4, 6), "empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5)}
    base = write_checkpoint(tmp_path / "base", tensors)
    adapter = plain_adapter(tmp_path / "adapter", base, modules=["lm_head"])
    adapterkit.merge(base, [adapter], tmp_path / "out", dtype="bf16", max_shard_size="50")
    out = read_tensors(tmp_path / "out")
    assert out["empty"].shape == (0, 3)
    assert out["scalar"].item() == 2.5


@pytest.mark.parametrize("where", ["touched", "untouched"])
def test_value_that_float16_cannot_hold(where: str, tmp_path: Path) -> None:
    """MiniCPM-V#502 and others: it would silently become infinite. What is infinite already stays so."""
    tensors = random_tensors({"lm_head.weight": (4, 6), "other.weight": (4, 6), "mask": (3,)}, "bfloat16")
    tensors["mask"][0] = float("-inf")
    base = write_checkpoint(tmp_path / "base", tensors)
    adapter = plain_adapter(tmp_path / "adapter", base, modules=["lm_head"])
    adapterkit.merge(base, [adapter], tmp_path / "fits", dtype="f16")
    assert read_tensors(tmp_path / "fits")["mask"][0] == float("-inf")
    name = "lm_head.weight" if where == "touched" else "other.weight"
    tensors[name][1, 1] = -70_000
    write_checkpoint(base, tensors)
    with pytest.raises(CheckpointError, match=rf"'{name}' holds .*, more than float16 can"):
        adapterkit.merge(base, [adapter], tmp_path / "out", dtype="f16")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------ several outputs of one base


class Told(Tensor):
    """A tensor that tells when it is read."""

    def __init__(self, inner: Tensor, log: list[str], word: str) -> None:
        self.name, self.dtype, self.shape, self.inner = inner.name, inner.dtype, inner.shape, inner
        self._log, self._word = log, word

    def read(self, start: int, stop: int) -> torch.Tensor:
        self._log.append(self._word)
        return self.inner.read(start, stop)


def test_several_outputs_are_written_abreast(tmp_path: Path) -> None:
    """They go through the base side by side: no one is ever more than a tensor ahead of another."""
    base = open_checkpoint(plain_base(tmp_path / "base", layers=20, width=32))
    log: list[str] = []
    writings = []
    for word in "abc":
        told = {name: Told(tensor, log, word) for name, tensor in base.items()}
        view = replace(base, tensors=told)
        writings.append(Writing(plan_safetensors(view, jobs=1), view, base.sources, tmp_path / word, {}))
    done = write_together(writings, jobs=1, force=[False] * 3)
    assert [one.reused for one in done] == [0, 0, 0]
    largest = max(tensor.nbytes for tensor in base.values())
    sizes = {"a": 0, "b": 0, "c": 0}
    walks = {word: iter(base.values()) for word in "abc"}
    for word in log:
        sizes[word] += next(walks[word]).nbytes
        assert max(sizes.values()) - min(sizes.values()) <= 2 * largest
    for word in "abc":
        assert read_bytes(tmp_path / word) == read_bytes(tmp_path / "a")
        assert read_tensors(tmp_path / word).keys() == base.keys()


def test_when_one_of_several_fails_none_appears(tmp_path: Path) -> None:
    base = open_checkpoint(plain_base(tmp_path / "base"))

    class Broken(Told):
        def read(self, start: int, stop: int) -> torch.Tensor:
            raise CheckpointError("broken")

    good = Writing(plan_safetensors(base), base, base.sources, tmp_path / "good", {})
    view = replace(base, tensors={name: Broken(tensor, [], "") for name, tensor in base.items()})
    bad = Writing(plan_safetensors(view), view, base.sources, tmp_path / "bad", {})
    with pytest.raises(CheckpointError, match="broken"):
        write_together([good, bad], force=[False, False])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine where there is time between two blocks, and a disk that is given every byte at once."""
    computed = sink.Sink._compute

    def slowly(self: sink.Sink, *arguments: Any) -> int:
        time.sleep(0.03)
        return computed(self, *arguments)

    monkeypatch.setattr(sink.Sink, "_compute", slowly)
    monkeypatch.setattr(sink, "FLUSH", 1)


@pytest.mark.usefixtures("unhurried")
def test_what_is_written_goes_to_the_disk_meanwhile(
    large: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only when the last byte is written, when all of it would have to be waited for."""
    base, adapter = large
    adapterkit.merge(base, [adapter], tmp_path / "wanted")
    whole = sum(path.stat().st_size for path in (tmp_path / "wanted").glob("*.safetensors"))
    seen = []
    fsync = os.fsync

    def noted(fd: int) -> None:
        seen.append(sum(one.done for one in sinks))
        fsync(fd)

    sinks: list[sink.Sink] = []
    opened = sink.Sink.open

    def open_noted(self: sink.Sink, *arguments: Any) -> Any:
        sinks.append(self)
        return opened(self, *arguments)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(sink.Sink, "open", open_noted)
    adapterkit.merge(base, [adapter], tmp_path / "out")
    assert any(0 < done < whole for done in seen)
    assert seen[-1] == whole
    assert read_bytes(tmp_path / "out") == read_bytes(tmp_path / "wanted")


@pytest.mark.usefixtures("unhurried")
def test_a_disk_that_fails_meanwhile_is_heard_of(
    large: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells of a failed write once; a later fsync of the same file succeeds."""
    base, adapter = large
    fsync = os.fsync
    told: list[int] = []

    def fails_once(fd: int) -> None:
        if not told:
            told.append(fd)
            raise OSError(errno.EIO, "Input/output error")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", fails_once)
    with pytest.raises(OutputError, match="Input/output error"):
        adapterkit.merge(base, [adapter], tmp_path / "out")
    assert not (tmp_path / "out").exists()
