"""The files of a pipeline beside its weights: each component's config, the schedulers and the tokenizers.

diffusers builds every component from its own config, so one that says something else makes another model of right weights.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from adapterkit.checkpoint.folder import INDEX
from adapterkit.checkpoint.pipeline import MODEL_INDEX, components
from adapterkit.foreign import json_value
from adapterkit.verbs.verify.report import ERROR, WARNING, Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adapterkit.verbs.verify.subject import Subject

# Fields of a config that the library writes of itself.
_OWN = frozenset({"_diffusers_version", "_name_or_path", "transformers_version", "torch_dtype", "dtype"})
NAMED = 4  # files or fields that a sentence names


def companions(subject: Subject) -> Iterator[Finding]:
    """What differs from the files that merge would write; nothing where no pipeline is compared."""
    if not components(subject.base.config):
        return
    there = {file.name: file for file in subject.found.side_files}
    held = [name for name in subject.side if (name == MODEL_INDEX or "/" in name) and not name.endswith(INDEX)]
    lost = sorted(name for name in held if name not in there)
    for kind, severity in ((True, ERROR), (False, WARNING)):
        some = [name for name in lost if name.endswith("config.json") is kind]
        if some:
            text = f"MERGED lacks {_listed(some)}, which the base has"
            yield Finding("pipeline file", severity, text, "copy what is missing, or merge again")
    other = []
    for name in held:
        if name not in there:
            continue
        mine, theirs = subject.side[name], there[name].bytes()
        if mine == theirs:
            continue
        wanted, found = _object(mine), _object(theirs)
        if wanted is None or not (name == MODEL_INDEX or name.endswith("config.json")):
            other.append(name)
            continue
        # diffusers writes defaults out when it saves, so what is there alone says nothing.
        apart = sorted(key for key in wanted if key not in _OWN and (found or {}).get(key) != wanted[key])
        if apart:
            says = f"{apart[0]}: {json.dumps((found or {}).get(apart[0]))[:60]}"
            text = f"{name} says {says}, and merge would write {json.dumps(wanted[apart[0]])[:60]}"
            more = f" ({_listed(apart[1:])} differ too)" if apart[1:] else ""
            yield Finding("pipeline file", ERROR, text + more, "take the base's file, or merge again")
    if other:
        text = f"{_listed(other)} {'is' if len(other) == 1 else 'are'} not as in the base"
        yield Finding("pipeline file", WARNING, text, "take the base's")


def _object(data: bytes) -> dict[str, Any] | None:
    try:
        found = json_value(data)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
