"""The model card: front matter that the Hub understands, what the record says, and the user's own prose untouched.

What adapterkit writes lies between two marks; everything outside them is the user's and comes back as it was. Making
the card again from its own output gives the same bytes.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from adapterkit.errors import RegistryError, option
from adapterkit.hub.files import is_local
from adapterkit.registry import verification
from adapterkit.registry.canonical import thaw

if TYPE_CHECKING:
    from adapterkit.registry.record import Record

BEGIN, END = "<!-- adapterkit: begin -->", "<!-- adapterkit: end -->"
_FRONT = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)(?:\r?\n)?---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_MOST = 64 << 10
_RELATIONS = {"adapter": "adapter", "combined": "adapter", "merged": "merge", "quantized": "quantized"}


def card(record: Record, repo: str, existing: bytes | None, where: str) -> bytes:
    """``README.md`` for a published record.

    Args:
        record: as published.
        repo: the repository.
        existing: the card that is there, whose prose and front matter stay.
        where: what to call ``existing`` in an error.

    Raises:
        RegistryError: the front matter of ``existing`` is not YAML that can be read.
    """
    front, prose = _split(existing, where) if existing is not None else ({}, f"# {repo.rpartition('/')[2]}\n")
    return (_front_matter(front, record) + _body(prose, _block(record, repo))).encode()


def _split(data: bytes, where: str) -> tuple[dict[str, Any], str]:
    """Front matter and the rest."""
    import yaml

    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise RegistryError(
            f"{where} is not text in UTF-8", f"save it again, or push with {option('replace_card', True)}"
        ) from None
    found = _FRONT.match(text)
    if found is None:
        return {}, text
    hint = f"repair it, or push with {option('replace_card', True)}"
    if len(found[1]) > _MOST:
        raise RegistryError(f"the front matter of {where} is longer than {_MOST} characters", hint)
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(found[1], Loader=yaml.SafeLoader)):
            raise RegistryError(f"the front matter of {where} uses YAML aliases", hint)
        front = yaml.safe_load(found[1])
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 2})" if mark is not None else ""
        raise RegistryError(f"the front matter of {where} is not valid YAML{line}", hint) from None
    if front is not None and not isinstance(front, dict):
        raise RegistryError(f"the front matter of {where} is not a mapping", hint)
    return dict(front or {}), text[found.end() :]


def _front_matter(front: dict[str, Any], record: Record) -> str:
    import yaml

    base = record.base.id if record.base is not None else ""
    if base:
        front["base_model"] = base
        if record.kind in _RELATIONS:
            front["base_model_relation"] = _RELATIONS[record.kind]
    elif isinstance(front.get("base_model"), str) and is_local(front["base_model"]):
        del front["base_model"]
        front.pop("base_model_relation", None)
    front["library_name"] = _library(record)
    licence = record.meta.get("license") or record.meta.get("licence")
    if licence and "license" not in front:
        front["license"] = licence
    said = front.get("tags")
    theirs = [tag for tag in said if not str(tag).startswith("base_model:")] if isinstance(said, list) else []
    ours = ["adapterkit", *([record.method] if re.fullmatch(r"[A-Za-z0-9][\w.-]*", record.method) else [])]
    front["tags"] = _once([*theirs, *ours])
    if measured := _metrics(record):
        said = front.get("metrics")
        front["metrics"] = _once([*(said if isinstance(said, list) else []), *measured])
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=1000)}---\n"


def _once(values: list[Any]) -> list[Any]:
    """Each value once, in order; a card may hold what has no hash."""
    return list({repr(value): value for value in values}.values())


def _metrics(record: Record) -> list[str]:
    """The names of the numbers that verification measured; the numbers themselves are in the table."""
    levels = verification.read(record.evidence)
    names = (name for level in levels for name, value in level.figures.items() if isinstance(value, (int, float)))
    return sorted({name for name in names if re.fullmatch(r"[a-z0-9][a-z0-9_]{0,39}", name)})


def _library(record: Record) -> str:
    if record.kind in ("adapter", "combined"):
        return "peft"
    return "gguf" if all(file.path.endswith((".gguf", ".json")) for file in record.files) else "transformers"


def _body(prose: str, block: str) -> str:
    start, stop = prose.find(BEGIN), prose.rfind(END)
    if 0 <= start < stop:
        return prose[:start] + block + prose[stop + len(END) :]
    # A lone mark is of a block that somebody cut: it goes, and what was around it is prose.
    prose = prose.replace(BEGIN, "").replace(END, "")
    return f"{prose.rstrip()}\n\n{block}\n" if prose.strip() else f"{block}\n"


def _block(record: Record, repo: str) -> str:
    rows = [("kind", f"{record.kind}{f' ({record.method})' if record.method else ''}")]
    base = record.base
    if base is not None and (base.id or base.known):
        name = f"[{_cell(base.id)}](https://huggingface.co/{base.id})" if base.id else _cell(base.label)
        rows.append(("base", name + (f" at `{base.commit}`" if base.commit else "")))
        strongest = next((level for level in ("merkle", "sampled", "probe") if base.level(level)), "")
        if strongest:
            rows.append(("base weights", f"{strongest} `{base.level(strongest)}`"))
    if record.operation is not None:
        operation = record.operation
        rows.append(("made by", f"{operation.tool} {operation.tool_version}, {operation.name}"))
        rows += _values(thaw(operation.parameters), "")
    rows += _values(thaw(record.parameters), "")
    for parent in record.parents:
        named = f"sha256 `{parent.content}`" if parent.content else ""
        rows.append((f"from {parent.role}", " ".join(part for part in (_cell(parent.label), named) if part)))
    for kind, evidence in thaw(record.evidence).items():
        if kind != verification.KEY:
            rows += _values(evidence, f"{kind}: ")
    for level in verification.read(record.evidence):
        rows.append((f"{verification.KEY}: {level.level}", _cell(verification.sentence(level))))
    rows += [(key, _cell(value)) for key, value in record.meta.items()]
    rows += [(f"`{_cell(file.path)}`", f"sha256 `{file.sha256}`") for file in record.files]
    lines = [BEGIN, "## Where this comes from", "", "| | |", "|---|---|"]
    lines += [f"| {_cell(name) if '`' not in name else name} | {value} |" for name, value in rows]
    lines += ["", f"`adapterkit pull {repo}` brings it with its record and checks every byte.", END]
    return "\n".join(lines)


def _values(values: Any, prefix: str) -> list[tuple[str, str]]:
    if not isinstance(values, dict):
        return []
    return [
        (f"{prefix}{key}", _cell(", ".join(map(str, value)) if isinstance(value, list) else str(value)))
        for key, value in values.items()
        if value not in (None, "", [], {}, False)
    ]


def _cell(text: str) -> str:
    """Text in a cell of a table: one line, nothing that Markdown or HTML would obey."""
    plain = "".join(char if char.isprintable() else " " for char in text)[:400]
    return re.sub(r"([\\`*_\[\]<>|#!~$])", lambda found: f"&#{ord(found[1])};", plain)
