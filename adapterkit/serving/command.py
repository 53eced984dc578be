"""`serve-args`: the exact command or Modelfile that loads registered versions into a server. Handing over is our part."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adapterkit.errors import NotFound, UsageError
from adapterkit.registry import resolve
from adapterkit.registry.checkout import checkout
from adapterkit.registry.home import open_home
from adapterkit.registry.record import NOT_CONTENT, Record
from adapterkit.serving.handover import SUFFIXES, handover

_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes (vllm/config/lora.py)
_ADAPTERS = ("adapter", "combined")
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf")


@dataclass(frozen=True)
class Server:
    """How one server is started.

    Attributes:
        model: the command for a whole model; ``{path}``.
        adapters: the command for a base with adapters; ``{base}``, ``{each}``, ``{rank}``, ``{count}``.
        each: one adapter in it; ``{name}``, ``{path}``; ``between`` stands between two.
        several: what is added to the command where there is more than one.
        after: a request that names an adapter, where it takes more than its name; ``{json}`` path, ``{place}`` from 0.
        after_one: whether a single adapter needs that request too.
        parts: a set of GGUF files is named by a pattern, not by its first.
        note: what a user has to know.
        gguf: reads GGUF files and no folders of safetensors.
        single: takes one adapter.
        source: where the flags are documented.
    """

    model: str
    adapters: str
    each: str = ""
    between: str = " "
    several: str = ""
    after: str = ""
    after_one: bool = True
    parts: bool = False
    note: str = ""
    gguf: bool = False
    single: bool = False
    source: str = ""


SERVERS = {
    "vllm": Server(
        "vllm serve {path}",
        "vllm serve {base} --enable-lora --max-loras {count} --max-lora-rank {rank} --lora-modules {each}",
        "{name}={path}",
        source="docs.vllm.ai, Features, LoRA Adapters; vllm/config/lora.py",
    ),
    "sglang": Server(
        "python -m sglang.launch_server --model-path {path}",
        "python -m sglang.launch_server --model-path {base} --enable-lora --max-loras-per-batch {count} "
        "--max-lora-rank {rank} --lora-paths {each}",
        "{name}={path}",
        source="docs.sglang.io, Advanced Features, LoRA Serving",
    ),
    "lorax": Server(
        "lorax-launcher --model-id {path}",
        "lorax-launcher --model-id {base}",
        after='{{"inputs": "...", "parameters": {{"adapter_source": "local", "adapter_id": {json}}}}}',
        source="predibase/lorax, docs/models/adapters/index.md",
    ),
    "llama.cpp": Server(
        "llama-server -m {path}",
        "llama-server -m {base} --lora {each}",
        "{path}",
        # An option that is given twice counts once, and all adapters are applied together unless told otherwise.
        between=",",
        several=" --lora-init-without-apply",
        after='{{"prompt": "...", "lora": [{{"id": {place}, "scale": 1.0}}]}}',
        after_one=False,
        gguf=True,
        source="ggml-org/llama.cpp, tools/server/README.md and common/arg.cpp",
    ),
    "ollama": Server(
        "FROM {path}",
        "FROM {base}\nADAPTER {each}",
        "{path}",
        single=True,
        parts=True,
        note="Ollama takes ADAPTER up to 0.34.0 only; for a newer one fold it in: adapterkit merge BASE.gguf {ref} -o OUT.gguf",
        source="docs.ollama.com, Modelfile Reference and Importing a Model; ollama/ollama#14969",
    ),
}


@dataclass(frozen=True)
class ServeArgs:
    """``text`` is the command (or Modelfile), ``requests`` what names an adapter in a call, where that is needed."""

    server: str
    text: str
    requests: tuple[str, ...]
    refs: tuple[str, ...]
    paths: tuple[str, ...]
    source: str
    notes: tuple[str, ...] = ()


def serve_args(
    refs: Sequence[str], server: str, *, base: str = "", copy: Path | None = None, home: Path | None = None
) -> ServeArgs:
    """What loads these versions in a server.

    Args:
        refs: one whole model, or adapters of one base.
        server: a key of `SERVERS`.
        base: what to serve the adapters on; by default the Hub id of the base they were trained on.
        copy: a folder to copy the files to, for servers that do not follow links.

    Raises:
        UsageError: an unknown server, several models, adapters of several bases, or a base that nobody knows.
        NotFound, OutputError, RegistryError
    """
    if server not in SERVERS:
        raise UsageError(f"'{server}' is no server that is known here", f"known: {', '.join(SERVERS)}")
    row = SERVERS[server]
    at = open_home(home)
    records = [resolve.find(at, ref) for ref in refs]
    adapters = [record for record in records if record.kind in _ADAPTERS]
    if (len(adapters) < len(records) or row.single) and len(records) > 1:
        what = "adapter" if adapters else "model"
        raise UsageError(f"{server} is started with one {what} at a time here", "call it once for each")
    paths = [_path(record, row, server, copy, home) for record in records]
    quoted = [shlex.quote(path) if server != "ollama" else path for path in paths]
    requests: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    if not adapters and paths[0].endswith(".gguf") and server in SUFFIXES:
        found = handover(paths[0], server)
        text, notes = found.text.rstrip("\n"), found.notes
        if row.parts:
            text = text.replace(paths[0], _PART.sub("-*.gguf", paths[0]))
    elif not adapters:
        text = row.model.format(path=quoted[0])
    else:
        on = base or _base(adapters, server, row)
        each = [row.each.format(name=r.name, path=path) for r, path in zip(records, quoted, strict=True)]
        if row.between == "," and any("," in path for path in paths):
            raise UsageError(f"{server} takes paths apart at commas, and {paths[0]} has one", "use --copy DIR")
        text = row.adapters.format(
            base=shlex.quote(on) if server != "ollama" else on,
            each=row.between.join(each),
            count=len(records),
            rank=_rank(records, server),
        )
        if len(records) > 1:
            text += row.several
        if row.after and (row.after_one or len(records) > 1):
            requests = tuple(row.after.format(json=json.dumps(path), place=i) for i, path in enumerate(paths))
        notes = (row.note.format(ref=records[0].ref),) if row.note else ()
    return ServeArgs(server, text, requests, tuple(r.ref for r in records), tuple(paths), row.source, notes)


def _path(record: Record, row: Server, server: str, copy: Path | None, home: Path | None) -> str:
    if copy is not None:
        folder = checkout(record.ref, to=copy / f"{record.name}-{record.version}", home=home)
    else:
        folder = checkout(record.ref, home=home)
    files = [file.path for file in record.files if file.path not in NOT_CONTENT]
    ggufs = sorted(path for path in files if path.endswith(".gguf"))
    if row.gguf and not ggufs:
        raise UsageError(
            f"{record.ref} is no GGUF file, and {server} reads nothing else", "convert it and register that"
        )
    return str((folder / ggufs[0] if ggufs else folder).absolute())


def _base(adapters: Sequence[Record], server: str, row: Server) -> str:
    ids = {record.base.id for record in adapters if record.base is not None and record.base.id}
    if len(ids) > 1:
        raise UsageError(f"these adapters are of several bases ({', '.join(sorted(ids))})", "serve them apart")
    if not ids or row.gguf or server == "ollama":
        hint = "give it with --base: a GGUF file" if row.gguf else "give it with --base"
        raise NotFound(f"nothing says what {server} is to load as the base", hint)
    return ids.pop()


def _rank(records: Sequence[Record], server: str) -> int:
    """The largest rank of the adapters, rounded up to one that the server takes."""
    ranks = [16]
    for record in records:
        patterns = record.parameters.get("rank_pattern") or {}
        found = [record.parameters.get("r"), *(patterns.values() if hasattr(patterns, "values") else ())]
        ranks += [rank for rank in found if isinstance(rank, int)]
    largest = max(ranks)
    if server != "vllm":
        return largest
    if largest > _VLLM_RANKS[-1]:
        raise UsageError(f"vllm takes ranks up to {_VLLM_RANKS[-1]}, and one here is {largest}", "resize or merge it")
    return next(rank for rank in _VLLM_RANKS if rank >= largest)
