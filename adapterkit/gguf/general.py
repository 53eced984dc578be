"""``general.*``: what a GGUF file says of itself, from the model card, the config and what was merged."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.checkpoint.hub_ref import parse_hub
from adapterkit.foreign import json_value
from adapterkit.gguf.metadata import Entry, array, f32, text, u32
from adapterkit.gguf.reader import I32, STRING

if TYPE_CHECKING:
    from adapterkit.adapters.adapter import Adapter
    from adapterkit.checkpoint.checkpoint import Checkpoint

CARD = "README.md"
HUB = "https://huggingface.co/"
MOST_CARD = 1 << 16  # bytes of a card that are read for its front matter; YAML takes a second of CPU for 200,000
# general.sampling.*: (key, fields of generation_config.json, whether it is a whole number)
_SAMPLING = (
    ("sequence", ("sequence",), None),
    ("top_k", ("top_k",), True),
    ("top_p", ("top_p",), False),
    ("min_p", ("min_p",), False),
    ("xtc_probability", ("xtc_probability",), False),
    ("xtc_threshold", ("xtc_threshold",), False),
    ("temp", ("temperature",), False),
    ("penalty_last_n", ("penalty_last_n",), True),
    ("penalty_repeat", ("penalty_repeat", "repetition_penalty"), False),
    ("mirostat", ("mirostat",), True),
    ("mirostat_tau", ("mirostat_tau",), False),
    ("mirostat_eta", ("mirostat_eta",), False),
)


_SIZES = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (1000, "K"))


@dataclass(frozen=True)
class Named:
    """A model that a user can find: ``org/name`` or a folder."""

    name: str
    organization: str = ""
    url: str = ""

    @classmethod
    def of(cls, ref: str) -> Named:
        hub = parse_hub(ref) if not Path(ref).expanduser().exists() else None
        if hub is not None:
            org, _, name = hub.repo.partition("/")
            return cls(title(name), title(org), f"{HUB}{hub.repo}")
        return cls(title(Path(ref).expanduser().resolve().name if ref else ""))


def general(
    base: Checkpoint, adapters: Sequence[Adapter], files: Mapping[str, bytes], label: str, arch: str
) -> list[Entry]:
    """The entries, in the order of llama.cpp's converter.

    Args:
        base: the Hugging Face checkpoint.
        adapters: that were folded into it.
        files: its side files by name.
        label: of its size, as ``8B``.
        arch: ``general.architecture``.
    """
    card = read_card(base)
    own = Named.of(base.ref)
    said = card.get("model_name")
    name = said if isinstance(said, str) and said else own.name
    entries = [text("general.architecture", arch), text("general.type", "model"), *_sampling(files)]
    entries.append(text("general.name", name))
    organization, finetune = card.get("organization") or own.organization, card.get("finetune")
    if organization and not adapters:
        entries.append(text("general.organization", str(organization)))
    if adapters:
        finetune = " + ".join(Named.of(adapter.ref).name for adapter in adapters)
    if finetune:
        entries.append(text("general.finetune", str(finetune)))
    entries.append(text("general.size_label", label))
    for key, field in {"": "license", ".name": "license_name", ".link": "license_link"}.items():
        value = card.get(field)
        if isinstance(value, str) and value:
            entries.append(text(f"general.license{key}", value))
    entries += _sources("base_model", [base.ref] if adapters else _texts(card.get("base_model")))
    if not adapters:
        entries += _sources("dataset", _texts(card.get("datasets", card.get("dataset"))), "datasets/")
    for key, fields in {"tags": ("tags", "pipeline_tag"), "languages": ("languages", "language")}.items():
        values = [one for field in fields for one in _texts(card.get(field))]
        if values:
            entries.append(array(f"general.{key}", STRING, values))
    return entries


def _sources(kind: str, refs: Sequence[str], where: str = "") -> list[Entry]:
    """What a model was made of: base models, or datasets, which the Hub has in a place of their own (``where``)."""
    if not refs:
        return []
    entries = [u32(f"general.{kind}.count", len(refs))]
    for number, ref in enumerate(refs):
        found = Named.of(ref)
        key = f"general.{kind}.{number}"
        entries.append(text(f"{key}.name", found.name))
        if found.organization:
            entries.append(text(f"{key}.organization", found.organization))
        if found.url:
            entries.append(text(f"{key}.repo_url", found.url.replace(HUB, HUB + where)))
    return entries


def _sampling(files: Mapping[str, bytes]) -> list[Entry]:
    try:
        config = json_value(files.get("generation_config.json", b"{}"))
    except ValueError:
        return []
    entries = []
    for key, fields, whole in _SAMPLING if isinstance(config, dict) else ():
        value = next((config[field] for field in fields if config.get(field) is not None), None)
        if whole is None and isinstance(value, str):
            entries.append(text(f"general.sampling.{key}", value))
        elif whole and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 31:
            entries.append(_i32(f"general.sampling.{key}", value))
        elif whole is False and isinstance(value, (int, float)) and not isinstance(value, bool):
            entries.append(f32(f"general.sampling.{key}", float(value)))
    return entries


def _i32(key: str, value: int) -> Entry:
    from adapterkit.gguf.metadata import entry

    return entry(key, I32, value)


def read_card(base: Checkpoint) -> dict[str, Any]:
    """The front matter of the model card beside the weights; ``{}`` when there is none that can be read."""
    path = base.sources[0].path if base.sources else None
    card = path.parent / CARD if path is not None else None
    if card is None or not card.is_file():
        return {}
    with card.open("rb") as file:
        data = file.read(MOST_CARD).decode("utf-8", "replace")
    found = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", data, re.DOTALL)
    if found is None:
        return {}
    import yaml

    try:
        front = yaml.safe_load(found[1])
    except (yaml.YAMLError, ValueError, RecursionError):  # a date that is none is a ValueError
        return {}
    return front if isinstance(front, dict) else {}


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [one for one in values if isinstance(one, str) and one]


def title(name: str) -> str:
    """``my-model_v2`` as ``My Model v2``: lower-case words get a capital, except versions and sizes."""
    words = re.sub(r"[-_\s]+", " ", name).strip().split(" ")
    return " ".join(w.title() if w.islower() and not re.match(r"v?\d", w) else w for w in words)


def size_label(shapes: Mapping[str, tuple[int, ...]], experts: int) -> str:
    """``8B``, or ``8x7B`` for experts: what all experts share and one of them, as gguf's ``size_label`` has it."""
    total = apart = 0
    for name, shape in shapes.items():
        count = 1
        for size in shape:
            count *= size
        total += count
        apart += count if "_exps." in name else 0
    if experts > 0 and apart:
        return f"{experts}x{_rounded(total - apart + apart // experts)}"
    return _rounded(total)


def _rounded(count: int) -> str:
    size, letter = next(row for row in _SIZES if count > row[0] or row[0] == 1000)
    value = count / size
    digits = max(2 - len(str(round(value)).lstrip("0")), 0)
    return f"{value:.{digits}f}{letter}"
