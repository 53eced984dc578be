"""Every option that writes a path, with something planted at each place that it writes: what is there stays, and nobody waits.

The places are found by running the command once: whatever appears, in the folder that it may write to, is a place. So an
option that writes one more file is tried there too. `test_every_path_is_known` fails for an option that is not in the tables.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import click
import pytest
from models import plain_adapter, plain_base

import adapterkit
from adapterkit import disk
from adapterkit.cli import app
from adapterkit.disk import files as disk_files
from adapterkit.errors import AdapterkitError
from adapterkit.provenance.register import register

# What is run, by the options whose paths it writes; {in} holds the inputs, {out} is where it may write.
COMMANDS: dict[str, tuple[str, ...]] = {
    "merge --out": ("merge", "{in}/base", "{in}/adapter", "-o", "{out}/x"),
    "convert --out of a file": ("convert", "{in}/adapter", "--to", "kohya", "-o", "{out}/x.safetensors"),
    "merge --save-plan": ("merge", "{in}/base", "{in}/adapter", "-o", "{out}/x", "--save-plan", "{out}/plan.json"),
    "merge --events": (
        *("merge", "{in}/base", "{in}/adapter", "-o", "{out}/x", "--on", "local", "--workers", "1"),
        *("--events", "{out}/events"),
    ),
    "convert --out": ("convert", "{in}/base", "--to", "f16", "-o", "{out}/x"),
    "convert --save-plan": ("convert", "{in}/base", "--to", "f16", "-o", "{out}/x", "--save-plan", "{out}/plan.json"),
    "combine --out": ("combine", "{in}/adapter", "{in}/adapter", "-o", "{out}/x"),
    "combine --save-plan": (
        *("combine", "{in}/adapter", "{in}/adapter", "-o", "{out}/x"),
        *("--save-plan", "{out}/plan.json"),
    ),
    "extract --out": ("extract", "{in}/base", "{in}/tuned", "--rank", "1", "-o", "{out}/x"),
    "extract --save-plan": ("extract", "{in}/base", "{in}/tuned", "-o", "{out}/x", "--save-plan", "{out}/plan.json"),
    "resize --out": ("resize", "{in}/adapter", "--rank", "1", "-o", "{out}/x"),
    "resize --save-plan": ("resize", "{in}/adapter", "--rank", "1", "-o", "{out}/x", "--save-plan", "{out}/plan.json"),
    "execute --out": ("execute", "{in}/plan.json", "-o", "{out}/x"),
    "run --out": ("run", "{in}/plan.json", "-o", "{out}/x", "--on", "local", "--workers", "1"),
    "run --events": (
        *("run", "{in}/plan.json", "-o", "{out}/x", "--on", "local", "--workers", "1"),
        *("--events", "{out}/events"),
    ),
    "execute --html": (
        *("execute", "{in}/verify.json", "-o", "{out}/r.json"),
        *("--html", "{out}/v.html", "--markdown", "{out}/v.md"),
    ),
    "run --html": (
        *("run", "{in}/verify.json", "-o", "{out}/r.json", "--on", "local", "--workers", "1"),
        *("--html", "{out}/v.html", "--markdown", "{out}/v.md"),
    ),
    "run slurm": ("run", "{in}/plan.json", "-o", "{out}/x", "--on", "slurm", "--workers", "2"),
    "export --out": ("export", "x", "-o", "{out}/x.bundle"),
    "export --folder": ("export", "x", "--folder", "-o", "{out}/x"),
    "imatrix --in-file": ("imatrix", "--in-file", "{in}/i.gguf", "--in-file", "{in}/i.gguf", "-o", "{out}/x.gguf"),
    "check --report": ("check", "{in}/base", "{in}/adapter", "--report", "{out}/r.json"),
    "check --summary": ("check", "{in}/base", "{in}/adapter", "--summary", "{out}/s.md"),
    "inspect --html": ("inspect", "{in}/adapter", "--compare", "{in}/adapter", "--html", "{out}/c.html"),
    "verify --out": ("verify", "{in}/tuned", "--base", "{in}/base", "--adapter", "{in}/adapter", "-o", "{out}/r.json"),
    "verify --save-plan": (
        *("verify", "{in}/tuned", "--base", "{in}/base", "--adapter", "{in}/adapter"),
        *("--save-plan", "{out}/plan.json"),
    ),
    "verify --html": (
        "verify",
        "{in}/tuned",
        "--base",
        "{in}/base",
        "--adapter",
        "{in}/adapter",
        "--html",
        "{out}/v.html",
    ),
    "verify --markdown": (
        *("verify", "{in}/tuned", "--base", "{in}/base", "--adapter", "{in}/adapter", "--level", "load"),
        *("--markdown", "{out}/v.md"),
    ),
    "serve-args --copy": ("serve-args", "x", "--for", "vllm", "--base", "org/base", "--copy", "{out}"),
    "attest": ("attest", "{out}/there"),
    "build": ("build", "{out}/adapterkit.toml", "--report", "{out}/r.json", "--summary", "{out}/s.md"),
}
# Options that name what is read, a program, or a folder in which nothing is written under a name that can be foreseen.
READ = {
    *("key", "sign"),
    *("imatrix", "tensor_type_file", "template", "metadata", "mmproj", "calibration", "compressor", "include_path"),
    *("files", "plan", "text", "in_file", "bundle", "prompts", "target", "attestation", "signature", "path", "recipe"),
    "verify",
}
# Held by tests of their own: a server is needed, keys, or a training.
ELSEWHERE = {
    "deploy --copy": "tests/serving/test_deploy.py",
    "deploy --restart-file": "tests/serving/test_deploy.py",
    "sign": "tests/test_signing.py",
    "imatrix --out": "imatrix --in-file",
    "execute --markdown": "execute --html",
    "run --markdown": "run --html",
    "demo": "test_a_demo_makes_nothing_through_a_link",
    "doctor": "tests/test_doctor.py",
}
PLANTED = ("link", "dangling", "hard", "folder", "pipe")


@pytest.fixture(autouse=True)
def _in_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(disk_files, "READER", 0.1)  # nobody reads these pipes

    def late(number: int, frame: FrameType | None) -> None:
        raise AssertionError("it waits for what was planted")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(600)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    import gguf
    import numpy

    folder = tmp_path_factory.mktemp("given")
    base = plain_base(folder / "base", layers=1)
    adapter = plain_adapter(folder / "adapter", base)
    adapterkit.merge(base, [adapter], folder / "tuned")
    adapterkit.merge(base, [adapter], folder / "x", save_plan=folder / "plan.json")
    adapterkit.verify(
        folder / "tuned", base=base, adapters=[adapter], level="tensors", save_plan=folder / "verify.json"
    )
    writer = gguf.GGUFWriter(folder / "i.gguf", "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["x"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 8)
    writer.add_tensor("blk.0.attn_q.weight.in_sum2", numpy.ones((1, 32), numpy.float32))
    writer.add_tensor("blk.0.attn_q.weight.counts", numpy.ones((1, 1), numpy.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADAPTERKIT_HOME", str(folder / "home"))
        register(adapter, "x")
        yield folder


def _ready(given: Path, out: Path) -> None:
    """A folder to write to, with what some commands expect there."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    shutil.copytree(given / "tuned", out / "there")
    text = f'base = "{given}/base"\nadapters.a = "{given}/adapter"\n[verify]\nlevel = "tensors"\nhtml = "page.html"\n'
    (out / "adapterkit.toml").write_text(f'{text}[outputs.merged]\npath = "build/merged"\n')


def _run(command: str, given: Path, out: Path) -> BaseException | None:
    words = [word.replace("{in}", str(given)).replace("{out}", str(out)) for word in COMMANDS[command]]
    try:
        app.main(words, standalone_mode=False)
    except (AdapterkitError, click.ClickException) as error:
        return error
    except SystemExit as error:
        return error if error.code else None
    return None


def _places(given: Path, out: Path, command: str) -> list[str]:
    """What a command writes, as names that have nothing of it above them; with the hidden folder of each."""
    _ready(given, out)
    before = {path.relative_to(out) for path in out.rglob("*")}
    error = _run(command, given, out)
    assert error is None, error
    made = sorted(path.relative_to(out) for path in out.rglob("*") if path.relative_to(out) not in before)
    tops = [path for path in made if not any(above in made for above in path.parents)]
    tops += [path for path in made if path.parent in tops and path.parent.name in (".adapterkit", "build")]
    assert tops, f"{command} wrote nothing"
    hidden = [disk.partial_folder(path) for path in tops]
    return [str(path) for path in (*tops, *hidden)]


def _plant(kind: str, place: Path, kept: Path) -> None:
    place.parent.mkdir(exist_ok=True)
    if kind == "link":
        place.symlink_to(kept)
    elif kind == "dangling":
        place.symlink_to(kept.with_name("nowhere"))
    elif kind == "hard":
        os.link(kept / "thesis.txt", place)
    elif kind == "folder":
        shutil.copytree(kept, place)
    else:
        os.mkfifo(place)


def _tree(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


SLOW = {
    "merge --events",
    "run --events",
    "run --out",
    "run --html",
    "execute --html",
    "verify --html",
    "verify --out",
    "build",
}  # workers, and every kind in many places


@pytest.mark.parametrize(
    "command", [pytest.param(one, marks=[pytest.mark.slow] if one in SLOW else []) for one in COMMANDS]
)
def test_what_is_planted_stays(command: str, given: Path, tmp_path: Path) -> None:
    out, kept = tmp_path / "out", tmp_path / "kept"
    kept.mkdir()
    (kept / "thesis.txt").write_text("years of work")
    for place in _places(given, out, command):
        for kind in PLANTED:
            _ready(given, out)
            _plant(kind, out / place, kept)
            what = f"{kind} at {place}"
            error = _run(command, given, out)
            if kind == "hard" and place in ("events", "s.md") and error is None:
                # Added to by its own name, as asked; what it was before is still there.
                assert (kept / "thesis.txt").read_text().startswith("years of work"), what
                (kept / "thesis.txt").unlink()
                (kept / "thesis.txt").write_text("years of work")
            assert _tree(kept) == {"thesis.txt": "years of work"}, what
            assert not (tmp_path / "nowhere").exists(), what
            if kind == "folder":
                assert (out / place / "thesis.txt").read_text() == "years of work", what
            if error is not None and isinstance(error, AdapterkitError):
                assert len(error.message.splitlines()) == 1, what


def _options() -> Iterator[tuple[str, str, str]]:
    """Every verb's parameters that are paths: verb, option and name."""

    def walk(command: click.Command, name: str) -> Iterator[tuple[str, str, str]]:
        if isinstance(command, click.Group):
            for word in command.list_commands(click.Context(command)):
                found = command.get_command(click.Context(command), word)
                assert found is not None
                yield from walk(found, f"{name} {word}".strip())
            return
        for one in command.params:
            if getattr(one.type, "name", "") in ("path", "file") and one.name:
                flag = max(one.opts, key=len) if isinstance(one, click.Option) else ""
                yield name, flag, one.name

    return walk(app, "")


def test_every_path_is_known() -> None:
    """An option that takes a path is in a table: it is written and tried, or it is read."""
    tried = {*COMMANDS, *ELSEWHERE}
    used: dict[str, set[str]] = {}
    for words in COMMANDS.values():
        used.setdefault(words[0], set()).update(word for word in words if word.startswith("-"))
    unknown = []
    for verb, flag, name in _options():
        said = f"{verb} {flag}".strip()
        short = {"--out": "-o"}.get(flag, flag)
        if name not in READ and flag != "--events" and said not in tried and short not in used.get(verb, ()):
            unknown.append(said)
    assert not unknown


def test_a_demo_makes_nothing_through_a_link(tmp_path: Path) -> None:
    from adapterkit.verbs.demo import demo

    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "adapter").symlink_to(tmp_path / "nowhere")
    with pytest.raises(AdapterkitError, match="exists"):
        demo(tmp_path / "demo")
    assert not (tmp_path / "nowhere").exists()
