"""`adapterkit PATH`: what lies there, and the three commands that usually come next."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapterkit.cli.output import say, show_json
from adapterkit.errors import counted

if TYPE_CHECKING:
    from adapterkit.registry.record import Record
    from adapterkit.verbs.inspect import Inspection

MOST = 12  # folders that are listed
_OF_ONE = ("config.json", "adapter_config.json", "model_index.json")  # a folder with one of these is one thing


@click.command(name="look", hidden=True)
@click.argument("ref", metavar="PATH")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def command(ref: str, as_json: bool) -> None:
    """Say what PATH (a folder, a file or a Hub id) is, and which commands come next.

    \b
    Example:
      adapterkit ./my-adapter
    """
    what, commands = look(ref)
    if as_json:
        show_json({"ref": ref, "what": what, "next": commands})
        return
    say(what)
    for words in commands:
        say(f"  {words}")


def look(ref: str) -> tuple[str, list[str]]:
    """One sentence about a reference, and command lines.

    Raises:
        NotFound, CheckpointError, AdapterError, UnsafeError, AuthError, HubError: it is nothing that adapterkit knows.
    """
    path = Path(ref).expanduser()
    if path.suffix == ".toml" and path.is_file():
        name = shlex.quote(ref)
        said = f"{ref}: a recipe"
        return said, [
            f"adapterkit build {name} --plan",
            f"adapterkit build {name}",
            f"adapterkit build {name} --locked",
        ]
    inside = _inside(path)
    if inside:
        return inside
    from adapterkit.registry.beside import read_beside
    from adapterkit.verbs.inspect import inspect

    found = inspect(ref)
    if found.kind == "adapter":
        return _adapter(ref, found)
    return _checkpoint(ref, found, read_beside(path) if path.exists() else None)


def _inside(path: Path) -> tuple[str, list[str]] | None:
    """A folder of folders, as trainers leave it."""
    if not path.is_dir() or any((path / name).exists() for name in _OF_ONE):
        return None
    adapters = sorted(one.parent for one in path.glob("*/adapter_config.json"))
    models = sorted(one.parent for one in path.glob("*/config.json"))
    if not adapters and not models:
        return None
    kinds = [counted(len(rows), word) for rows, word in ((adapters, "adapter"), (models, "model")) if rows]
    every = [*adapters, *models]
    names = ", ".join(one.name for one in every[:MOST]) + (", ..." if len(every) > MOST else "")
    last = max(every, key=lambda one: one.stat().st_mtime)
    return f"{path}: a folder with {' and '.join(kinds)}: {names}", [f"adapterkit {shlex.quote(str(last))}"]


def _adapter(ref: str, found: Inspection) -> tuple[str, list[str]]:
    from adapterkit.adapters.load import load_adapter

    label = load_adapter(ref, headers_only=True).config.label
    rank = f" of rank {'/'.join(found.ranks)}" if found.ranks else ""
    article = "an" if label[:1] in "AEIO" or label.startswith("rs") else "a"
    said = f"{ref}: {article} {label}{rank} on {', '.join(found.targets) or 'whole modules'}"
    said += f", for {found.base}" if found.base else "; it does not name its base"
    if found.mergeable:
        said += f"; it cannot be merged: {found.mergeable}"
    base, name = shlex.quote(found.base) if found.base else "BASE", shlex.quote(ref)
    stem = _stem(ref)
    if "family" in found.details:  # of images, video or sound: one file and one checkpoint, which is never GGUF
        merged = _named(stem, "-merged.safetensors")
        return said, [f"adapterkit check {base} {name}", *_into_one_file(base, name, merged)]
    return said, [
        f"adapterkit check {base} {name}",
        f"adapterkit merge {base} {name} -o {_named(stem, '-merged')}",
        f"adapterkit merge {base} {name} -o {_named(stem, '-Q4_K_M.gguf')} --quant Q4_K_M",
    ]


def _into_one_file(base: str, adapter: str, merged: str) -> list[str]:
    return [
        f"adapterkit merge {base} {adapter} -o {merged}",
        f"adapterkit verify {merged} --base {base} --adapter {adapter}",
    ]


def _checkpoint(ref: str, found: Inspection, record: Record | None) -> tuple[str, list[str]]:
    name, stem = shlex.quote(ref), _stem(ref)
    kind = found.architecture or "a model"
    said = f"{ref}: {kind}, {counted(found.parameters, 'parameter')}"
    one_file = ref.endswith(".safetensors")  # without a config.json, by which GGUF would know how to store it
    quant = f"adapterkit convert {name} -o {_named(stem, '-Q4_K_M.gguf')} --quant Q4_K_M"
    if " " in kind or kind.endswith("Pipeline"):  # a family of images, video or sound, or several parts: never GGUF
        quant = f"adapterkit convert {name} -o {_named(stem, '-bf16')} --to bf16"
    if record is not None and record.operation is not None and record.operation.name == "merge":
        from adapterkit.registry.names import name_from

        labels = [one.label or one.content[:12] for one in record.parents]
        said += f", merged by adapterkit from {', '.join(labels)}"
        parts = {one.role: shlex.quote(_near(ref, one.label)) for one in record.parents if one.label}
        proof = (
            f"adapterkit verify {name} --base {parts.get('base', 'BASE')} --adapter {parts.get('adapter', 'ADAPTER')}"
        )
        known = name_from(stem)
        register = [f"adapterkit register {name} --name {known}"] if known else []
        return said, [proof, *register] if one_file else [proof, quant, *register]
    if ref.endswith(".gguf"):
        merge = f"adapterkit merge {name} ADAPTER -o {_named(stem, '-merged.gguf')}"
        return said, [f"adapterkit inspect {name}", merge, f"adapterkit convert {name} -o {_named(stem)} --to hf"]
    if one_file:
        return said, [
            f"adapterkit inspect {name}",
            *_into_one_file(name, "ADAPTER", _named(stem, "-merged.safetensors")),
        ]
    return said, [f"adapterkit inspect {name}", f"adapterkit merge {name} ADAPTER -o {_named(stem, '-merged')}", quant]


def _near(ref: str, label: str) -> str:
    """A folder of that name beside what was made of it, which is where most people keep it; else the name."""
    beside = Path(ref).expanduser().parent / label
    return str(beside) if not Path(label).exists() and beside.exists() else label


def _stem(ref: str) -> str:
    """A name for what is made of it."""
    path = Path(ref).expanduser()
    name = path.resolve().name if path.exists() else ref.rpartition("/")[2]
    return name.partition("@")[0].removesuffix(".gguf").removesuffix(".safetensors") or "model"


def _named(stem: str, end: str = "") -> str:
    return shlex.quote(stem + end)
