"""Whatever ends a worker ends the run with its cause; memory that runs out is one sentence; inputs that change are noticed."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from models import plain_adapter, plain_base

import adapterkit
from adapterkit.checkpoint import files, limits, sink
from adapterkit.cli import app
from adapterkit.errors import AdapterkitError, CheckpointError, OutOfMemory, OutputError, no_memory
from adapterkit.ops import threads
from adapterkit.verbs.ordered import in_order

VERBS: dict[str, Any] = {
    "merge": lambda base, adapter, out: adapterkit.merge(base, [adapter], out, jobs=2),
    "convert": lambda base, adapter, out: adapterkit.convert(base, out, to="f16", jobs=2),
    "combine": lambda base, adapter, out: adapterkit.combine([adapter, adapter], out, jobs=2),
    "verify": lambda base, adapter, out: adapterkit.verify(base, base=base, adapters=[adapter], jobs=2),
}


class Odd(BaseException):
    """Nobody catches this by name."""


@pytest.mark.parametrize("error", [MemoryError("none left"), RuntimeError("can't start new thread"), Odd("odd")])
@pytest.mark.parametrize("verb", ["merge", "convert", "combine", "verify"])
def test_a_worker_that_fails_before_its_first_task(
    verb: str, error: BaseException, inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise error

    from adapterkit.verbs.verify import tensors

    for module in (sink, threads, tensors):
        monkeypatch.setattr(module, "settle", broken)
    monkeypatch.setattr(threads, "_threads", threading.local())
    with pytest.raises((OutOfMemory, Odd, RuntimeError, MemoryError)) as caught:
        VERBS[verb](*inputs, tmp_path / "out")
    assert str(error) in str(caught.value)
    assert no_memory(caught.value) or isinstance(error, Odd) or isinstance(caught.value, OutOfMemory)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("started", [0, 1])
def test_threads_that_the_system_does_not_give(
    started: int, inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one the run goes on; with none it ends in one sentence."""
    left = started
    real = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        nonlocal left
        if left <= 0:
            raise RuntimeError("can't start new thread")
        left -= 1
        real(thread)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        if started:
            adapterkit.merge(inputs[0], [inputs[1]], tmp_path / "out", jobs=3)
        else:
            with pytest.raises(OutOfMemory, match="memory ran out"):
                adapterkit.merge(inputs[0], [inputs[1]], tmp_path / "out", jobs=3)
    assert (tmp_path / "out").exists() == bool(started)


def test_tasks_that_nobody_did_are_a_failure(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sink._Pool, "_worker", lambda self: None)
    with pytest.raises(OutputError, match="not written to its end"):
        adapterkit.merge(inputs[0], [inputs[1]], tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_work_in_order_fails_with_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "settle", lambda: (_ for _ in ()).throw(MemoryError("none left")))
    monkeypatch.setattr(threads, "_threads", threading.local())
    with pytest.raises(MemoryError, match="none left"):
        list(in_order(lambda x: x, [1, 2, 3], 2))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: can't allocate memory: you tried"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        RuntimeError("can't start new thread"),
    ],
)
def test_the_ways_in_which_libraries_say_it(error: BaseException) -> None:
    assert no_memory(error)
    wrapped = ValueError("something else")
    wrapped.__cause__ = error
    assert no_memory(wrapped)
    assert not no_memory(ValueError("memory of a shape"))
    assert not no_memory(CheckpointError("out of memory.safetensors is damaged"))


# ------------------------------------------------------------------ limits


def test_limits_of_control_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "OF_PROCESS", tmp_path / "cgroup")
    monkeypatch.setattr(limits, "GROUPS", tmp_path / "fs")
    monkeypatch.setattr(limits, "_of_process", list)
    assert limits.memory_limit() is None
    deep = tmp_path / "fs" / "pod" / "box"
    deep.mkdir(parents=True)
    (tmp_path / "cgroup").write_text("0::/pod/box\n")
    (deep / "memory.max").write_text("max\n")
    assert limits.memory_limit() is None
    (tmp_path / "fs" / "pod" / "memory.max").write_text("500000000\n")
    assert limits.memory_limit() == (500_000_000, "the control group of this process (a container, perhaps)")
    (tmp_path / "fs" / "memory" / "v1").mkdir(parents=True)
    (tmp_path / "cgroup").write_bytes(b"0::/pod/box\n5:cpu,memory:/v1/deep\n1:name=systemd:/x\xff\nodd\n")
    (tmp_path / "fs" / "memory" / "v1" / "memory.limit_in_bytes").write_text("400000000\n")
    assert limits.memory_limit()[0] == 400_000_000  # type: ignore[index]
    (tmp_path / "fs" / "memory" / "v1" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert limits.memory_limit()[0] == 500_000_000  # type: ignore[index]


def test_a_plan_that_does_not_fit_is_refused_before_the_first_byte(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit, words in ((100, "ulimit -v"), (700, "ulimit -v"), (100, "the container")):
        monkeypatch.setattr(limits, "_limits", lambda: [(limit * 10**6, words)])  # noqa: B023
        kind = "virtual memory" if words == "ulimit -v" else "memory"
        with pytest.raises(OutOfMemory, match=rf"needs about \d+ MB of {kind}, and {words} allows {limit} MB"):
            adapterkit.merge(inputs[0], [inputs[1]], tmp_path / "out")
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("megabytes", [300, 550, 700])
def test_a_process_with_little_address_space(megabytes: int, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """Done, or refused with one sentence about memory."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))

    command = [sys.executable, "-m", "adapterkit", "merge", *map(str, inputs), "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, timeout=900, check=False)
    assert "Traceback" not in done.stderr
    assert done.returncode == 0 or (done.returncode == 1 and "memory" in done.stderr.splitlines()[-1]), done.stderr
    assert (tmp_path / "out").exists() == (done.returncode == 0)
    assert [path.name for path in tmp_path.iterdir()] in ([], ["out"])


@pytest.mark.parametrize("verb", ["extract", "verify", "imatrix"])
def test_verbs_that_compute_before_they_write_say_it_first(
    verb: str, inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch ends the process with SIGABRT where it is loaded and gets no more: so it is not loaded."""
    base, adapter = inputs
    (tmp_path / "text").write_text("words")
    words = {
        "extract": [str(base), str(base), "-o", str(tmp_path / "out")],
        "verify": [str(base), "--base", str(base), "--adapter", str(adapter)],
        "imatrix": [str(base), "--text", str(tmp_path / "text"), "-o", str(tmp_path / "out.gguf")],
    }[verb]
    monkeypatch.setattr(limits, "_limits", lambda: [(400_000_000, limits.ADDRESSES)])
    with pytest.raises(OutOfMemory, match="virtual memory, and ulimit -v allows 400 MB"):
        app.main([verb, *words], standalone_mode=False)
    if verb != "extract":  # transformers is loaded too
        monkeypatch.setattr(limits, "_limits", lambda: [(1_000_000_000, limits.ADDRESSES)])
        with pytest.raises(OutOfMemory, match="virtual memory, and ulimit -v allows 1,000 MB"):
            app.main([verb, *words], standalone_mode=False)


# ------------------------------------------------------------------ processes of ours that are killed


KILLED = "import os, sys\nos.kill(os.getpid(), 9)\n"
ANSWERS_ONCE = """
import json, os, sys
import numpy
print("READY", flush=True)
for line in sys.stdin:
    numpy.save(json.loads(sys.argv[1])[3], numpy.zeros(3))
    print("ROW", flush=True)
    os.kill(os.getpid(), 9)
"""


def test_a_process_that_reads_pickles_and_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adapterkit.pickles import apart

    (tmp_path / "child.py").write_text(KILLED)
    (tmp_path / "x.bin").write_bytes(b"x")
    monkeypatch.setattr(apart, "CHILD", tmp_path / "child.py")
    with pytest.raises(
        OutOfMemory, match=r"x\.bin could not be read: .*ended by signal 9, perhaps since memory ran out"
    ):
        apart.answered("child.py", str(tmp_path / "x.bin"), str(tmp_path / "out"))


def test_llama_that_is_killed_between_two_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adapterkit.verbs.verify import decode_child, runtime

    (tmp_path / "child.py").write_text(ANSWERS_ONCE)
    monkeypatch.setattr(decode_child, "__file__", str(tmp_path / "child.py"))
    child = runtime._Inside(tmp_path / "x.gguf", 8, 1, tmp_path / "row.npy")
    assert child.ask({"ids": [1]}).tolist() == [0, 0, 0]
    child._process.wait(20)
    with pytest.raises(AdapterkitError, match=r"no answer \(it was ended by signal 9"):
        child.ask({"ids": [1]})
    child.close()


def test_processes_that_the_system_does_not_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user may have only so many (``ulimit -u``)."""

    def _execute_child(*_: Any, **__: Any) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(subprocess.Popen, "_execute_child", _execute_child)
    with pytest.raises(BlockingIOError) as caught:
        subprocess.run([sys.executable], check=False)
    assert no_memory(caught.value)
    assert not no_memory(BlockingIOError(errno.EAGAIN, "a lock"))


# ------------------------------------------------------------------ inputs that change


@pytest.fixture
def own(tmp_path: Path) -> tuple[Path, Path]:
    base = plain_base(tmp_path / "in" / "base", layers=2)
    return base, plain_adapter(tmp_path / "in" / "adapter", base)


def _change(how: str, path: Path) -> None:
    info = path.stat()
    if how == "bytes":
        with path.open("r+b") as file:
            file.seek(-3, 2)
            file.write(b"\x7f")
    elif how == "hidden":  # by somebody who sets the time back
        _change("bytes", path)
        os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    elif how == "longer":
        with path.open("ab") as file:
            file.write(b"x")
    elif how == "replaced":
        shutil.copy(path, path.with_name("new"))
        os.replace(path.with_name("new"), path)
    else:
        path.unlink()


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("how", ["bytes", "hidden", "longer", "replaced", "gone"])
def test_an_input_that_changes_while_it_is_read(
    verb: str, how: str, own: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    which = own[1] / "adapter_model.safetensors" if verb == "combine" else own[0] / "model.safetensors"
    (tmp_path / "out").mkdir()
    real = files.check_unchanged

    def late(sources: Any) -> None:
        _change(how, which)
        real(sources)

    from adapterkit.verbs.verify import opened

    for module in (sink, opened):
        monkeypatch.setattr(module, "check_unchanged", late)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        VERBS[verb](*own, tmp_path / "out" / "x")
    assert os.listdir(tmp_path / "out") == []


SMALL: dict[str, tuple[Any, tuple[str, ...]]] = {
    "merge": (VERBS["merge"], ("base/config.json", "base/tokenizer.json", "adapter/adapter_config.json")),
    "index": (VERBS["merge"], ("base/model.safetensors.index.json",)),
    "convert": (VERBS["convert"], ("base/config.json", "base/1_Pooling/config.json")),
    "mlx": (lambda base, adapter, out: adapterkit.convert(adapter, out, to="mlx"), ("adapter/adapter_config.json",)),
    "combine": (VERBS["combine"], ("adapter/adapter_config.json", "adapter/tokenizer_config.json")),
    "resize": (
        lambda base, adapter, out: adapterkit.resize(adapter, out=out, rank=1),
        ("adapter/adapter_config.json",),
    ),
    "extract": (
        lambda base, adapter, out: adapterkit.extract(base, base.with_name("tuned"), out),
        ("tuned/config.json",),
    ),
    "verify": (VERBS["verify"], ("adapter/adapter_config.json", "base/config.json")),
    "weights": (
        lambda base, adapter, out: adapterkit.merge(base, [adapter / "adapter_model.safetensors"], out),
        ("adapter/adapter_config.json",),
    ),
}


@pytest.fixture(scope="module")
def told_of(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    base = plain_base(folder / "base", layers=1, shards=2)
    adapter = plain_adapter(folder / "adapter", base)
    (base / "1_Pooling").mkdir()
    for path in ("base/1_Pooling/config.json", "base/tokenizer.json", "adapter/tokenizer_config.json"):
        (folder / path).write_text("{}")
    adapterkit.merge(base, [adapter], folder / "tuned")
    return folder


@pytest.mark.parametrize(("verb", "name"), [(verb, name) for verb, (_, names) in SMALL.items() for name in names])
def test_a_small_file_that_changes_while_weights_are_read(
    verb: str, name: str, told_of: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A config or a tokenizer is read before the weights and named by the record after them: it has to be the same one."""
    folder = tmp_path / "in"
    shutil.copytree(told_of, folder)
    real = files.check_unchanged

    def late(sources: Any) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes() + b" ")
        real(sources)

    from adapterkit.verbs.verify import opened

    for module in (sink, opened):
        monkeypatch.setattr(module, "check_unchanged", late)
    with pytest.raises(CheckpointError, match=rf"{Path(name).name} changed while it was read"):
        SMALL[verb][0](folder / "base", folder / "adapter", tmp_path / "out")
    assert os.listdir(tmp_path) == ["in"]


def test_an_input_that_changes_while_the_record_is_made(
    own: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adapterkit.checkpoint import write
    from adapterkit.verbs import merge

    real = merge._recorder

    def recorder(*args: Any, **more: Any) -> Any:
        made = real(*args, **more)

        def record(folder: Path) -> Any:
            found = made(folder)
            _change("bytes", own[0] / "model.safetensors")
            return found

        return record

    monkeypatch.setattr(merge, "_recorder", recorder)
    assert write.check_unchanged is files.check_unchanged
    with pytest.raises(CheckpointError, match="changed while it was read"):
        adapterkit.merge(own[0], [own[1]], tmp_path / "out")
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
@pytest.mark.parametrize("verb", ["inspect", "merge"])
def test_inputs_that_are_no_files(kind: str, verb: str, own: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(AdapterkitError):
        adapterkit.inspect(path) if verb == "inspect" else adapterkit.merge(path, [own[1]], tmp_path / "out")
    for name in ("config.json", "model.safetensors"):
        place = own[0] / name
        place.unlink()
        os.mkfifo(place) if kind != "device" else place.symlink_to("/dev/zero")
        with pytest.raises(AdapterkitError):
            adapterkit.inspect(own[0]) if verb == "inspect" else adapterkit.merge(own[0], [own[1]], tmp_path / "out")
